"""Output for people: aligned tables, ages, and text without control characters."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = ()) -> list[str]:
    """Aligned columns, two spaces apart. `right` has the indexes of the right-aligned ones."""
    lines = [list(head), *[list(row) for row in rows]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def fitted(lines: Iterable[str], least: int) -> list[str]:
    """The lines, cut to the terminal's width, but not to less than `least` characters."""
    width = max(shutil.get_terminal_size().columns, least)
    return [line if len(line) <= width else line[: width - 1] + "…" for line in lines]


def printable(text: str, limit: int = 0, *, kept: str = "") -> str:
    """One line without control characters: text from other publishers must not control the terminal.

    Args:
        limit: the maximum length; 0 for none.
        kept: control characters that are not escaped.
    """
    text = "".join(one if one.isprintable() or one in kept else _escaped(one) for one in text)
    return text if not limit or len(text) <= limit else text[: limit - 1] + "…"


def printable_lines(text: str) -> str:
    """The same for a text of several lines."""
    return "\n".join(printable(line.replace("\t", "    ")) for line in text.splitlines())


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def json_laid_out(body: bytes, *, indent: int) -> str | None:
    """A formatted JSON body, with its numbers unchanged (9.50 stays 9.50). None if it is not JSON in UTF-8."""
    import msgspec

    try:
        return msgspec.json.format(body, indent=indent).decode()
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


def json_in_ascii(body: bytes) -> str | None:
    """The same in one line of ASCII, without line breaks and control characters."""
    text = json_laid_out(body, indent=-1)
    return None if text is None else re.sub(r"[^\x20-\x7e]", lambda found: json.dumps(found[0])[1:-1], text)


def age(seconds: float | None) -> str:
    """`45s`, `12m`, `3h`, `5d`."""
    if seconds is None:
        return "?"
    if seconds < 0:
        return "0s"
    for unit, size, most in (("s", 1, 120), ("m", 60, 7200), ("h", 3600, 172800)):
        if seconds < most:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds / 86400:.0f}d"


def age_of(moment: datetime | None) -> str:
    return age(None if moment is None else datetime.now(UTC).timestamp() - moment.timestamp())


def read_age(text: str) -> float:
    """The seconds in an age: `90`, `90s`, `5m`, `2h`, `7d`, `1w`.

    Raises:
        ValueError: it is not an age.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw]?)", text.strip())
    if found is None:
        raise ValueError(text)
    return float(found[1]) * UNITS[found[2] or "s"]
