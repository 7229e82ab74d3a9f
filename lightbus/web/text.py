"""How values are shown. Text from the broker is another program's: it is cut, and control characters are escaped."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from urllib.parse import quote

import msgspec

LONGEST = 20_000
"""Characters of a body or a traceback that are shown."""
LONGEST_JSON = 256 * 1024
"""Bytes of a body that is formatted as JSON. A longer one is shown as it is."""


def printable(text: str) -> str:
    """Without control characters and marks that change the order of what is read. Line breaks and tabs stay."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in "\n\t" else _escaped(one) for one in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def cut(text: str, limit: int) -> str:
    """At most so many characters, with `…` in the place of the rest."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def quoted(text: str) -> str:
    """As a part of a URL's path or query."""
    return quote(text, safe="", errors="replace")


def counted(count: int, what: str) -> str:
    """`1 event`, `2,000 events`."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def age(seconds: float | None) -> str:
    """`45 s`, `12 min`, `3 h`, `5 d`; `?` if unknown."""
    if seconds is None:
        return "?"
    for unit, size, most in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172800)):
        if seconds < most:
            return f"{max(0.0, seconds) / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def ago(at: float | datetime | None) -> str:
    """`12 min ago`; `?` if unknown.

    Args:
        at: a time, or seconds since 1970; 0 and None: unknown.
    """
    seconds = at.timestamp() if isinstance(at, datetime) else at
    return f"{age(time.time() - seconds)} ago" if seconds else "?"


def moment(at: float | datetime | None) -> str:
    """`2026-11-28 12:00:00 UTC`; `unknown`."""
    try:
        one = at.astimezone(UTC) if isinstance(at, datetime) else datetime.fromtimestamp(at, UTC) if at else None
    except (ValueError, OverflowError, OSError):
        one = None
    return "unknown" if one is None else f"{one:%Y-%m-%d %H:%M:%S} UTC"


def body(content: bytes, limit: int = LONGEST, *, indent: int = 2) -> tuple[str, str]:
    """A message's body as text, and what was done with it: `JSON`, `text`, `bytes`, with `, cut` if it was.

    Args:
        indent: of JSON; 0: on one line.
    """
    kind, text = _decoded(content, limit, indent)
    return (cut(text, limit), kind + (", cut" if len(text) > limit else ""))


def _decoded(content: bytes, limit: int, indent: int) -> tuple[str, str]:
    if len(content) <= LONGEST_JSON:
        try:
            return "JSON", msgspec.json.format(content, indent=indent).decode()
        except (msgspec.MsgspecError, ValueError, RecursionError):
            pass
    try:
        return "text", content[: 4 * limit + 4].decode()
    except UnicodeDecodeError as error:
        if error.start > 4 * limit:  # a character that was cut
            return "text", content[: error.start].decode()
    return "bytes", repr(content[: limit + 1])[2:-1]
