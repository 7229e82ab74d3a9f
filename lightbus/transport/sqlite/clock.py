"""The clock that decides on delays: steady, also over a restart of the machine."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

from lightbus.transport.sqlite.schema import CLOCKS, FORGET_CLOCKS, KNOWN_CLOCK, NEWEST_CLOCK, NOTE_CLOCK

# It counts while the machine sleeps, too.
_STEADY = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def steady() -> float:
    return time.clock_gettime(_STEADY)


def clock_domain() -> str:
    """What the steady clock's numbers can be compared within."""
    boot = namespace = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/time")
    return f"{boot} {namespace}"


Sql = Callable[..., sqlite3.Cursor]
"""Executes a statement with its parameters."""


class Clock:
    """The broker's time, in seconds: that of the wall's clock when the file was made, and a second a second since then.

    So nothing comes early, late or never when somebody (or NTP) sets the machine's clock. Only for the time in which
    the machine was off, the wall's clock has to be believed; and it never goes back.
    """

    def __init__(self) -> None:
        self._domain = clock_domain()
        self._offset = 0.0
        self._ahead = 0.0  # of the wall's clock, by what the file says

    def read(self, sql: Sql) -> None:
        """In a transaction: find out, from what the file says, what time it is."""
        sql(CLOCKS)
        row = sql(KNOWN_CLOCK, self._domain).fetchone()
        alone = not sql("SELECT 1 FROM clients LIMIT 1").fetchone()
        if row is not None and not (alone and self._domain == " "):  # unknown: it may be another boot
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
        """In a transaction: keep what time it is, for those who come after the next boot."""
        now, wall, since_boot = self.now(), time.time(), steady()
        self._ahead = now - wall
        sql(NOTE_CLOCK, self._domain, now, wall, since_boot)

    @property
    def wall_was_set(self) -> bool:
        """Whether somebody has set the wall's clock since that was noted."""
        return abs(self.now() - time.time() - self._ahead) > 1.0
