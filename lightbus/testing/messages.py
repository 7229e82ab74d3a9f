"""Parts of the error messages of a TestBus."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from lightbus import errors, options

SHOWN = 5
"""The most handlers, queues or dead letters that one error shows."""

hide_lightbus_errors = operator.methodcaller("errisinstance", errors.LightbusError)
"""The `__tracebackhide__` of this package's modules. When a test makes a mistake, pytest shows the line of the test and
the message, and not the module's code."""


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def listed(lines: Sequence[str]) -> str:
    """The first lines, indented, and how many more there are."""
    shown = [f"  {line}" for line in lines[:SHOWN]]
    if len(lines) > SHOWN:
        shown.append(f"  ... and {len(lines) - SHOWN} more")
    return "\n".join(shown)


def hint(given: str, known: Sequence[str]) -> str:
    """The most similar name that exists; if none is similar, all of them."""
    near = errors.nearest(given, known)
    return f"Did you mean {near!r}?" if near else f"There are: {', '.join(known) or 'none'}."


def shown(value: object) -> str:
    """A function or class by its name; other values by their repr."""
    name = getattr(value, "__name__", None)
    return name if isinstance(name, str) else repr(value)


def checked_seconds(option: str, value: object, *, lowest: float = 0.001) -> float:
    """
    Raises:
        errors.InvalidOption: not a number, or less than `lowest`.
    """
    seconds = options.in_seconds(value)
    if not options.is_number(seconds) or seconds < lowest:
        raise errors.InvalidOption(f"TestBus: {option}={value!r}: use seconds, {lowest:g} or more.")
    return float(seconds)
