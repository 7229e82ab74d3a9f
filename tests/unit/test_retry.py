"""What becomes of a delivery whose handler failed."""

from __future__ import annotations

import math
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightbus import Reject, Retry, errors
from lightbus.options import MAX_DELAY
from lightbus.retry import DeadLetter, RetryIn

delays = st.lists(st.floats(0.001, MAX_DELAY), max_size=8)


def test_the_ladder_is_climbed_step_by_step_and_ends_in_a_dead_letter() -> None:
    retry = Retry(delays=(1, 5, 30))
    error = ValueError()
    decisions = [retry.decide(error, attempt) for attempt in range(1, 6)]
    assert decisions == [RetryIn(1, 1), RetryIn(5, 5), RetryIn(30, 30), DeadLetter(error), DeadLetter(error)]


def test_the_default_ladder_takes_about_a_quarter_of_an_hour() -> None:
    assert Retry().delays == (1, 5, 30, 120, 600)
    assert Retry().jitter == 0


def test_none_dead_letters_the_first_failure() -> None:
    error = ValueError()
    assert Retry.none().decide(error, 1) == DeadLetter(error)


def test_only_the_named_errors_are_retried() -> None:
    retry = Retry(delays=(1,), on=(ConnectionError, TimeoutError), never=BrokenPipeError)
    assert isinstance(retry.decide(ConnectionResetError(), 1), RetryIn)
    assert isinstance(retry.decide(TimeoutError(), 1), RetryIn)
    assert isinstance(retry.decide(BrokenPipeError(), 1), DeadLetter)
    assert isinstance(retry.decide(ValueError(), 1), DeadLetter)


@pytest.mark.parametrize("error", [Reject("no"), errors.DecodeError("no")], ids=repr)
def test_what_can_never_be_handled_is_not_retried_whatever_the_policy_says(error: Exception) -> None:
    assert Retry(on=BaseException).decide(error, 1) == DeadLetter(error)


def test_a_timeout_and_an_unmatched_event_are_retried() -> None:
    assert isinstance(Retry().decide(errors.HandlerTimeout(), 1), RetryIn)
    assert isinstance(Retry().decide(errors.NoHandler(), 1), RetryIn)


def test_a_handler_that_ends_the_process_is_not_retried_unless_asked_for() -> None:
    assert isinstance(Retry().decide(SystemExit(), 1), DeadLetter)
    assert isinstance(Retry(on=(Exception, SystemExit)).decide(SystemExit(), 1), RetryIn)


@given(delays, st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True), st.integers(1, 10))
def test_jitter_shortens_a_delay_by_its_part_at_most_and_keeps_the_step(
    ladder: list[float], jitter: float, part: float, attempt: int
) -> None:
    decision = Retry(ladder, jitter=jitter).decide(ValueError(), attempt, part=lambda: part)
    match decision:
        case RetryIn(delay, expiration):
            assert delay == ladder[attempt - 1]
            assert delay * (1 - jitter) * (1 - 1e-9) <= expiration <= delay
            assert expiration > 0
        case DeadLetter():
            assert attempt > len(ladder)


def test_jitter_is_random() -> None:
    retry = Retry(delays=(100,), jitter=0.5)
    expirations = {
        decision.expiration for _ in range(50) if isinstance(decision := retry.decide(ValueError(), 1), RetryIn)
    }
    assert len(expirations) > 25
    assert all(50 <= expiration <= 100 for expiration in expirations)


@pytest.mark.parametrize(
    "options",
    [
        {"delays": 5},
        {"delays": 1.5},
        {"delays": "1, 5"},
        {"delays": b"\x01"},
        {"delays": None},
        {"delays": {1, 5}},
        {"delays": ("1",)},
        {"delays": (True,)},
        {"delays": (None,)},
        {"delays": (0,)},
        {"delays": (-1,)},
        {"delays": (0.0001,)},
        {"delays": (math.nan,)},
        {"delays": (math.inf,)},
        {"delays": (MAX_DELAY + 1,)},
        {"on": "ValueError"},
        {"on": ValueError()},
        {"on": [ValueError]},
        {"on": (int,)},
        {"never": None},
        {"never": (ValueError, "x")},
        {"jitter": 1},
        {"jitter": -0.1},
        {"jitter": True},
        {"jitter": "0.1"},
        {"jitter": math.nan},
        {"jitter": None},
    ],
    ids=str,
)
def test_an_option_outside_of_what_it_can_be_is_refused_by_its_name_and_value(options: dict[str, Any]) -> None:
    with pytest.raises(errors.InvalidOption, match="Retry: ") as caught:
        Retry(**options)
    (value,) = options.values()
    shown = value[-1] if isinstance(value, (tuple, list)) else value
    assert repr(shown) in str(caught.value)


@given(delays)
def test_any_ladder_of_seconds_within_30_days_is_taken(ladder: list[float]) -> None:
    assert Retry(ladder).delays == tuple(ladder)
    assert Retry(tuple(ladder)) == Retry(ladder)


def test_a_policy_is_a_value() -> None:
    assert Retry(delays=[1, 5], on=ValueError) == Retry(delays=(1, 5), on=(ValueError,))
    assert len({Retry(), Retry(), Retry.none()}) == 2
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        Retry().jitter = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(
    "final",
    [Reject("no"), errors.DecodeError("no"), BrokenPipeError(), KeyboardInterrupt()],
    ids=repr,
)
def test_one_member_of_a_group_that_is_not_retried_is_the_reason_for_a_dead_letter(final: BaseException) -> None:
    retry = Retry(delays=(1,), on=(Exception,), never=BrokenPipeError)
    for group in (
        BaseExceptionGroup("alone", [final]),
        BaseExceptionGroup("one of them", [OSError(), final]),
        BaseExceptionGroup("deep", [ValueError(), BaseExceptionGroup("in it", [OSError(), final]), OSError()]),
    ):
        assert retry.decide(group, 1) == DeadLetter(final)


def test_a_group_is_retried_where_each_of_its_members_is() -> None:
    retry, other = Retry(delays=(1,), on=(OSError, LookupError)), ValueError()
    assert isinstance(retry.decide(ExceptionGroup("all", [TimeoutError(), KeyError()]), 1), RetryIn)
    nested = ExceptionGroup("all", [ExceptionGroup("in it", [OSError()]), KeyError()])
    assert isinstance(retry.decide(nested, 1), RetryIn)
    assert retry.decide(ExceptionGroup("not all", [TimeoutError(), other]), 1) == DeadLetter(other)


def test_a_group_can_be_named_itself() -> None:
    group = ExceptionGroup("both", [OSError(), ValueError()])
    assert isinstance(Retry(delays=(1,), on=ExceptionGroup).decide(group, 1), RetryIn)
    assert Retry(delays=(1,), never=ExceptionGroup).decide(group, 1) == DeadLetter(group)


def test_a_group_that_has_failed_for_the_last_time_is_named_by_its_one_member_or_itself() -> None:
    error, both = OSError(), ExceptionGroup("both", [OSError(), ValueError()])
    assert Retry.none().decide(ExceptionGroup("one", [ExceptionGroup("one", [error])]), 1) == DeadLetter(error)
    assert Retry.none().decide(both, 1) == DeadLetter(both)


def test_the_cause_of_an_error_is_not_the_error() -> None:
    error = ValueError()
    error.__cause__ = Reject("no")
    assert isinstance(Retry(delays=(1,)).decide(error, 1), RetryIn)
