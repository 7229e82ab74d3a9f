"""The service of an inbox: it deletes the ids that are older than `keep`. The same for each database library."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import anyio

from lightbus import errors
from lightbus.app import Lightbus
from lightbus.outbox.rows import check_keep, free_name

logger = logging.getLogger("lightbus")

KEEP = timedelta(days=7)
SWEEP = 3600.0
"""Seconds between two sweeps."""
FIRST_SWEEP = 60.0
SWEPT = 5_000
"""Rows that one statement of a sweep deletes."""


class Sweep:
    """What an inbox does beside its handlers: a `Service` of its app."""

    def __init__(self, app: Lightbus, keep: timedelta) -> None:
        """
        Raises:
            errors.InvalidOption: `keep` is not positive.
        """
        self.app = app
        self.name = free_name(app, "inbox")
        self.keep = check_keep(app.name, keep)
        """Seconds."""
        self.deleted = 0
        """Rows that the sweeps of this process have deleted."""
        self.trouble: str | None = None
        """Why the last sweep failed."""

    async def delete_oldest(self, before: float) -> tuple[int, bool]:
        """Delete about `SWEPT` of the app's ids that were handled before (seconds since 1970). Returns how many, and
        whether there are more."""
        raise NotImplementedError

    async def run(self, stopping: anyio.Event) -> None:
        """Delete the ids that are older than `keep`, every hour."""
        seconds = FIRST_SWEEP
        while True:
            with anyio.move_on_after(seconds):
                await stopping.wait()
            if stopping.is_set():
                return
            seconds = SWEEP
            try:
                await self.sweep()
                self.trouble = None
            except Exception as error:  # noqa: BLE001  # the next sweep does it: no reason to end the worker
                self.trouble = errors.summary(error)
                logger.warning(
                    "The inbox of app %r could not be swept: %s. The next sweep is in an hour.",
                    self.app.name,
                    self.trouble,
                )

    async def sweep(self) -> int:
        """Delete the ids that are older than `keep`, 5,000 at a time. Returns how many."""
        before, at_start = time.time() - self.keep, self.deleted
        more = True
        while more:
            count, more = await self.delete_oldest(before)
            self.deleted += count
        return self.deleted - at_start

    def health(self) -> Mapping[str, Any]:
        return {"error": self.trouble, "deleted": self.deleted}
