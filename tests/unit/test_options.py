"""Checks of option values that several declarations share."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import anyio
import anyio.to_thread
import pytest

from lightbus import errors, event_loop, options


@pytest.mark.parametrize("value", [0, -1, 1.5, 10**400])
def test_ints_and_finite_floats_are_numbers(value: Any) -> None:
    assert options.is_number(value)


@pytest.mark.parametrize("value", [True, math.nan, math.inf, -math.inf, "1", None, 1j, Decimal(1)])
def test_other_values_are_not_numbers(value: Any) -> None:
    assert not options.is_number(value)


@pytest.mark.parametrize(("value", "expected"), [(1, True), (10**400, True), (True, False), (1.0, False), ("1", False)])
def test_only_ints_are_integers(value: Any, expected: bool) -> None:
    assert options.is_integer(value) is expected


@pytest.mark.parametrize("value", [0, 11, 1.0, True, "1", None])
def test_an_invalid_count_is_refused_with_its_range(value: Any) -> None:
    with pytest.raises(errors.InvalidOption, match=r"Lightbus\('a'\): prefetch=.*: use a whole number from 1 to 10\."):
        options.check_count(value, "Lightbus('a')", "prefetch", 10)


def test_a_misspelt_name_is_matched_with_the_nearest_one() -> None:
    assert errors.nearest("invoice.payed", {"invoice.paid": 1, "invoice.due": 2}) == "invoice.paid"
    assert errors.nearest("charge", ["refund", "remind"]) is None
    assert errors.nearest("invoice.payed", ["invoice.paid"], cutoff=0.99) is None


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_a_blocking_call_is_refused_in_an_event_loop_and_allowed_in_its_threads(anyio_backend: str) -> None:
    def call() -> None:
        event_loop.refuse("wait()", "await wait()", errors.PublishInEventLoop)

    with pytest.raises(errors.PublishInEventLoop, match=r"^wait\(\) would block .* Use `await wait\(\)`\.$"):
        call()
    await anyio.to_thread.run_sync(call)
