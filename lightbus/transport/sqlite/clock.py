"""The clock for delays and TTLs: steady, also across a restart of the machine."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

from lightbus.transport.sqlite.schema import CLOCKS, FORGET_CLOCKS, KNOWN_CLOCK, NEWEST_CLOCK, NOTE_CLOCK

# Unlike CLOCK_MONOTONIC on Linux, it also runs while the machine is suspended.
_STEADY = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def steady() -> float:
    """Seconds since the machine's boot. No one can set this clock."""
    return time.clock_gettime(_STEADY)


def clock_domain() -> str:
    """Where times of `steady` can be compared: within one boot, and one container."""
    boot = namespace = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/time")
    return f"{boot} {namespace}"


Sql = Callable[..., sqlite3.Cursor]
"""Executes a statement with its parameters."""


class Clock:
    """The broker's time in seconds: the wall clock's time when the file was created, plus the seconds since then.

    So no message comes early, late or never when the machine's clock is set (by hand, or by NTP). Only for the time in
    which the machine was off does it follow the wall clock. It never goes back.
    """

    def __init__(self) -> None:
        self._domain = clock_domain()
        self._offset = 0.0
        self._ahead = 0.0  # of the wall clock, when that was last noted in the file

    def read(self, sql: Sql) -> None:
        """In a transaction: set this clock from the file."""
        sql(CLOCKS)
        row = sql(KNOWN_CLOCK, self._domain).fetchone()
        alone = not sql("SELECT 1 FROM clients LIMIT 1").fetchone()
        if row is not None and not (alone and self._domain == " "):  # an unknown domain: it may be another boot
            then, wall, since_boot = row
            self._offset, self._ahead = then - since_boot, then - wall
            return
        now = time.time()
        newest = sql(NEWEST_CLOCK).fetchone()
        if newest is not None:
            then, wall = newest
            now = max(then, now + then - wall)
        self._offset = now - steady()
        self.note(sql)
        sql(FORGET_CLOCKS)

    def now(self) -> float:
        return steady() + self._offset

    def note(self, sql: Sql) -> None:
        """In a transaction: store the time in the file, for the next boot."""
        now, wall, since_boot = self.now(), time.time(), steady()
        self._ahead = now - wall
        sql(NOTE_CLOCK, self._domain, now, wall, since_boot)

    @property
    def wall_was_set(self) -> bool:
        """Whether the wall clock was set since the last `note`."""
        return abs(self.now() - time.time() - self._ahead) > 1.0
