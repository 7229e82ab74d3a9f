"""Records which events were tried, confirmed and handled, in files that the processes under test write.

Each line is one write to a file that is open for appending, so a `kill -9` of the writer cannot lose or split it.
Times are those of the monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import attrs

TRIED = "tried"
"""Written before an event is published."""
CONFIRMED = "confirmed"
UNROUTED = "unrouted"
"""Confirmed, but not routed: no queue was bound, and the receipt shows that."""
FAILED = "failed"
"""The publish raised an error, so the event may be lost."""
HANDLED = "handled"
"""Written by the handler as its last step; with an inbox: after its transaction."""
SKIPPED = "skipped"
"""Delivered once more, and skipped by the inbox."""
COUNTING, COUNTED = "counting", "counted"
"""Written right before and right after the metrics count an outcome."""
HELD = "held"
"""A handler keeps its transaction open."""
PLACED = "placed"
"""The transaction of an order has committed."""
ROLLED_BACK = "rolled-back"
"""The transaction of an order, or its savepoint, was rolled back."""


@attrs.frozen
class Entry:
    id: str
    time: float
    fields: tuple[str, ...]


class Ledger:
    """A folder with one such file per kind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, int] = {}
        self._read: dict[str, list[Entry]] = {}
        self._positions: dict[str, int] = {}

    def write(self, kind: str, id: str, *fields: object) -> None:
        file = self._files.get(kind)
        if file is None:
            flags = os.O_CREAT | os.O_APPEND | os.O_WRONLY
            file = self._files.setdefault(kind, os.open(self.folder / kind, flags, 0o600))
        line = " ".join([id, f"{time.monotonic():.6f}", *map(str, fields)])
        os.write(file, f"{line}\n".encode())

    def entries(self, kind: str) -> Sequence[Entry]:
        """All lines so far. Only new lines are read from the file."""
        known = self._read.setdefault(kind, [])
        position = self._positions.get(kind, 0)
        try:
            with (self.folder / kind).open("rb") as file:
                file.seek(position)
                new = file.read()
        except FileNotFoundError:
            return known
        new = new[: new.rfind(b"\n") + 1]
        self._positions[kind] = position + len(new)
        for line in new.decode().splitlines():
            id, when, *fields = line.split(" ")
            known.append(Entry(id, float(when), tuple(fields)))
        return known

    def ids(self, kind: str) -> set[str]:
        return {entry.id for entry in self.entries(kind)}

    # Publishers check this file between two events.

    def pause(self, *, paused: bool) -> None:
        if paused:
            (self.folder / "pause").touch()
        else:
            (self.folder / "pause").unlink(missing_ok=True)

    def is_paused(self) -> bool:
        return (self.folder / "pause").exists()
