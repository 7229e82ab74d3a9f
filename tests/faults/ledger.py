"""What was tried, confirmed and handled, written by the processes under test into files that outlast them.

Each line is one write to a file that was opened for appending: a `kill -9` of the writer keeps it, whole. Times are
those of the monotonic clock, which all processes of a machine share.
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
"""Confirmed, but no queue was bound to hear it: the publisher was told so."""
FAILED = "failed"
"""The publisher got an error, so that nothing was promised."""
HANDLED = "handled"
"""Written by the handler as its last step."""


@attrs.frozen
class Entry:
    id: str
    time: float
    words: tuple[str, ...]


class Ledger:
    """A folder of such files, one a kind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, int] = {}
        self._read: dict[str, list[Entry]] = {}
        self._positions: dict[str, int] = {}

    def write(self, kind: str, id: str, *words: object) -> None:
        file = self._files.get(kind)
        if file is None:
            flags = os.O_CREAT | os.O_APPEND | os.O_WRONLY
            file = self._files.setdefault(kind, os.open(self.folder / kind, flags, 0o600))
        line = " ".join([id, f"{time.monotonic():.6f}", *map(str, words)])
        os.write(file, f"{line}\n".encode())

    def entries(self, kind: str) -> Sequence[Entry]:
        """All lines so far. Only what is new is read."""
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
            id, when, *words = line.split(" ")
            known.append(Entry(id, float(when), tuple(words)))
        return known

    def ids(self, kind: str) -> set[str]:
        return {entry.id for entry in self.entries(kind)}

    # Publishers look for this file between two events.

    def pause(self, *, paused: bool) -> None:
        if paused:
            (self.folder / "pause").touch()
        else:
            (self.folder / "pause").unlink(missing_ok=True)

    def is_paused(self) -> bool:
        return (self.folder / "pause").exists()
