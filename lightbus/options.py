"""Options that users pass: checks of their values, and the error for an option that does not exist."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import ParamSpec, TypeGuard, TypeVar

from lightbus import errors

P = ParamSpec("P")
R = TypeVar("R")

MAX_DELAY = 30 * 24 * 3600
"""Seconds: the longest delay of a publish, and of a retry."""


# --- values -----------------------------------------------------------------------------------


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite int or float. A bool is not, although Python counts it among the integers."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf


def is_integer(value: object) -> TypeGuard[int]:
    """Whether it is an int, and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def in_seconds(value: object) -> object:
    """A timedelta as seconds; any other value unchanged."""
    return value.total_seconds() if isinstance(value, timedelta) else value


def check_count(value: object, owner: str, option: str, highest: int) -> int:
    """
    Raises:
        errors.InvalidOption: not an integer from 1 to `highest`.
    """
    if not is_integer(value) or not 1 <= value <= highest:
        raise errors.InvalidOption(f"{owner}: {option}={value!r}: use a whole number from 1 to {highest:,}.")
    return value


def check_timeout(value: object, owner: str, limit: float) -> float:
    """The timeout of a handler.

    Raises:
        errors.InvalidOption: not a number of seconds (or a timedelta) up to `limit`.
    """
    seconds = in_seconds(value)
    if not is_number(seconds) or not 0 < seconds <= limit:
        raise errors.InvalidOption(
            f"{owner}: timeout={value!r}: use seconds, more than 0 and up to {limit:g}, which is below RabbitMQ's "
            "consumer timeout of 30 minutes. Split work that takes longer into steps, each an event."
        )
    return float(seconds)


def check_publish_timeout(value: object, owner: str) -> float:
    """
    Raises:
        errors.InvalidOption: not a number of seconds (or a timedelta) up to an hour.
    """
    seconds = in_seconds(value)
    if not is_number(seconds) or not 0 < seconds <= 3600:
        raise errors.InvalidOption(
            f"{owner}: a publish timeout of {value!r}: use seconds, more than 0 and up to 3,600."
        )
    return float(seconds)


# --- names ------------------------------------------------------------------------------------

_UNEXPECTED = re.compile(r"got an unexpected keyword argument '(.+?)'")


def explains_options(what: str, meant: Mapping[str, str]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Turn Python's TypeError for an unknown option into an InvalidOption that names the options that exist.

    It adds a call, so decorate functions that declare, and not those that publish.

    Args:
        what: the function, as a user calls it.
        meant: what to do instead of options that other libraries have.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **options: P.kwargs) -> R:
            try:
                return function(*args, **options)
            except TypeError as error:
                found = None if errors.is_from_deeper(error) else _UNEXPECTED.search(str(error))
                if found is None:
                    raise
                unknown = found[1]
            raise errors.InvalidOption(_unknown_option(what, unknown, function, meant))

        return call

    return decorate


def _unknown_option(what: str, unknown: str, function: Callable[..., object], meant: Mapping[str, str]) -> str:
    parameters = inspect.signature(function).parameters.values()
    known = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY or one.name == "delays"]
    near = errors.nearest(unknown, known)
    advice = meant.get(unknown) or (f"Did you mean {near}=?" if near else "")
    return " ".join(filter(None, (f"{what} has no option {unknown!r}.", advice, f"It has: {'=, '.join(known)}=.")))
