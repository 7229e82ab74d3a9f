"""What happens to a delivery whose handler failed. A decision is a value; the dispatcher acts on it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import attrs

from lightbus import errors, options
from lightbus.options import MAX_DELAY


@attrs.frozen
class RetryIn:
    """Retry after `delay` seconds: the step of the retry schedule, which names the retry queue.

    `expiration` is the actual waiting time (less than `delay` with jitter).
    """

    delay: float
    expiration: float


@attrs.frozen
class DeadLetter:
    """Keep it in the app's dead-letter queue."""

    error: BaseException
    """The reason; for an exception group, the member that decided."""


ErrorTypes = type[BaseException] | tuple[type[BaseException], ...]


def _as_delays(delays: object) -> tuple[Any, ...]:
    if isinstance(delays, (str, bytes)) or not isinstance(delays, Sequence):
        raise errors.InvalidOption(f"Retry: delays={delays!r} is not a sequence of seconds, as in delays=(1, 5, 30).")
    return tuple(options.in_seconds(delay) for delay in delays)


def _as_tuple(types: ErrorTypes) -> tuple[type[BaseException], ...]:
    return types if isinstance(types, tuple) else (types,)


def _check_delays(_instance: object, _attribute: object, delays: Sequence[object]) -> None:
    for delay in delays:
        if not options.is_number(delay):
            raise errors.InvalidOption(f"Retry: the delay {delay!r} is not a number of seconds.")
        if not 0.001 <= delay <= MAX_DELAY:
            raise errors.InvalidOption(
                f"Retry: the delay {delay!r} is not in the range 0.001 to {MAX_DELAY} seconds (30 days). For no "
                "retries, use Retry.none()."
            )


def _check_errors(_instance: object, attribute: attrs.Attribute[Any], types: tuple[object, ...]) -> None:
    for error in types:
        if not isinstance(error, type) or not issubclass(error, BaseException):
            raise errors.InvalidOption(f"Retry: {attribute.name}={error!r} is not an exception class.")


def _check_jitter(_instance: object, _attribute: object, jitter: Any) -> None:
    if not options.is_number(jitter) or not 0 <= jitter < 1:
        raise errors.InvalidOption(f"Retry: jitter={jitter!r} is not a number from 0 up to (not including) 1.")


FINAL = (errors.Reject, errors.DecodeError, errors.UnverifiedOrigin)
"""Errors that no policy retries."""


@attrs.frozen(init=False)
class Retry:
    """How often, and after which delays, a failed handler is retried.

    Meanwhile the event waits in the broker (a retry queue for each distinct delay), never in a worker's memory.
    """

    delays: tuple[float, ...] = attrs.field(validator=_check_delays)
    """Seconds before the second attempt, the third, and so on. After the last, the event is dead-lettered."""
    on: tuple[type[BaseException], ...] = attrs.field(validator=_check_errors)
    """Only these errors are retried; others are dead-lettered at once."""
    never: tuple[type[BaseException], ...] = attrs.field(validator=_check_errors)
    """These errors are dead-lettered at once, even if `on` contains them."""
    jitter: float = attrs.field(validator=_check_jitter)
    """The part of each delay, from 0 to below 1, by which it may be shortened at random, so that events that failed
    together are not retried together. A retry queue keeps its order, so in a burst the spread is smaller."""

    @options.explains_options(
        "Retry",
        {
            **dict.fromkeys(
                ("max_retries", "retries", "max_attempts", "attempts", "retry", "count"),
                "Use delays=, the seconds before each retry: Retry(delays=(1, 5, 30)) retries three times.",
            ),
            **dict.fromkeys(
                ("delay", "backoff", "retry_backoff", "min_backoff", "max_backoff", "interval", "countdown", "wait"),
                "Use delays=, the seconds before each retry: Retry(delays=(1, 5, 30)).",
            ),
            **dict.fromkeys(("exceptions", "autoretry_for", "retry_on", "throws"), "Use on= for the errors to retry."),
            **dict.fromkeys(("dont_autoretry_for", "ignore"), "Use never= for the errors not to retry."),
            "retry_jitter": "Use jitter=, at least 0 and less than 1.",
        },
    )
    def __init__(
        self,
        delays: Sequence[float | timedelta] = (1, 5, 30, 120, 600),
        *,
        on: ErrorTypes = Exception,
        never: ErrorTypes = (),
        jitter: float = 0.0,
    ) -> None:
        """
        Args:
            delays: seconds (or timedeltas) between attempts, each from 0.001 to 30 days.
            on: the error class(es) that are retried. Errors that are not an `Exception` (SystemExit, KeyboardInterrupt,
                a Rust panic) are dead-lettered at once, unless `on` contains them: on=BaseException.
            never: the error class(es) that are not, even if `on` contains them.
            jitter: the part of each delay, from 0 to below 1, by which it may be shortened at random.

        Raises:
            errors.InvalidOption: an argument has an invalid value.
        """
        self.__attrs_init__(_as_delays(delays), _as_tuple(on), _as_tuple(never), jitter)  # pyright: ignore[reportAttributeAccessIssue]  # attrs makes it

    @classmethod
    def none(cls) -> Retry:
        """No retries: the first failure is dead-lettered."""
        return cls(delays=())

    def decide(
        self, error: BaseException, attempt: int, *, part: Callable[[], float] = random.random
    ) -> RetryIn | DeadLetter:
        """Decide what to do after this error on this attempt (from 1).

        In an exception group (a TaskGroup raises one), each member counts: if one of them is not retryable, the event
        is dead-lettered.
        """
        final = self._first_final(error)
        if final is not None:
            return DeadLetter(errors.without_machinery(final))
        if attempt > len(self.delays):
            return DeadLetter(errors.without_groups(error))
        delay = self.delays[attempt - 1]
        return RetryIn(delay, delay * (1 - self.jitter * part()))

    def _first_final(self, error: BaseException) -> BaseException | None:
        """The first error that is not retryable: this one, or a member of a group."""
        final: tuple[type[BaseException], ...] = (*FINAL, *self.never)
        others: list[BaseException] = []
        ahead = [error]
        while ahead:
            one = ahead.pop()
            inner = errors.members(one)
            ahead += reversed(inner)
            if errors.is_a(one, final):
                return one
            if not inner:
                others.append(one)
        if errors.is_a(error, self.on):
            return None
        return next((one for one in others if not errors.is_a(one, self.on)), None)
