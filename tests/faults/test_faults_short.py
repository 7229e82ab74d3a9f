"""The scenarios of `make faults`, each short: confirmed is handled, dead or still queued, and nothing is lost."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import need_rabbitmq
from tests.faults.plan import PLAN, Planned
from tests.faults.scenarios import CannotBeTried
from tests.faults.stage import Stage

SHORT = [planned for planned in PLAN if planned.short is not None]


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with Stage() as stage:
        yield stage


@pytest.mark.parametrize(
    "planned",
    [pytest.param(one, id=one.name, marks=[pytest.mark.rabbitmq] if one.rabbitmq else []) for one in SHORT],
)
def test_nothing_that_was_confirmed_is_lost(planned: Planned, stage: Stage) -> None:
    if planned.rabbitmq:
        need_rabbitmq()
    assert planned.short is not None
    try:
        row = planned.short(stage)
    except CannotBeTried as why:
        pytest.skip(str(why))
    print(row)
    row.check()
