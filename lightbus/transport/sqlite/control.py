"""Control of a `memory://` broker from tests: its clock and what its queues hold."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import attrs

from lightbus.transport.sqlite.place import locate
from lightbus.transport.sqlite.store import Store


def advance_clock(url: str, seconds: float) -> None:
    """Move the clock of a `memory://` broker forward, for all its connections. What is due then expires.

    Raises:
        ValueError: the broker is not in memory.
    """
    place = locate(url)
    if not place.in_memory:
        raise ValueError(f"The clock of {url!r} cannot be moved: only that of a memory:// broker can.")
    client = Store(place)
    try:
        client.session.advance_clock(seconds)
    finally:
        client.close([])


@attrs.frozen
class Holding:
    """What one queue holds."""

    queue: str
    ready: int
    unready: int
    """With consumers, or waiting to be dead-lettered."""
    due_in: float | None
    """Seconds until the first of them expires, by the broker's clock."""


class TestControl:
    """Stops the clock of a `memory://` broker, and moves it only by `advance`. From any thread."""

    __test__ = False

    def __init__(self, url: str) -> None:
        place = locate(url)
        if not place.in_memory:
            raise ValueError(f"The clock of {url!r} cannot be stopped: only that of a memory:// broker can.")
        self._store = Store(place)
        self._lock = threading.Lock()
        self._store.session.stop_clock()

    def holdings(self) -> list[Holding]:
        """What all queues hold, at one moment."""
        with self._lock:
            rows, now = self._store.holdings(), self._store.session.now()
        return [Holding(name, ready, unready, None if due is None else due - now) for name, ready, unready, due in rows]

    def advance(self, seconds: float) -> None:
        """Move the clock, and expire what is due then."""
        with self._lock:
            self._store.session.advance_clock(seconds)
            self._expire()

    def expire_early(self, queues: Sequence[str], seconds: float) -> None:
        """Expire what would expire in these queues within `seconds`. The clock does not move."""
        with self._lock:
            self._store.dead_letters.make_due(queues, self._store.session.now() + seconds)
            self._expire()

    def _expire(self) -> None:
        done = False
        while not done:
            with self._store.session.transaction():
                done = self._store.dead_letters.expire()

    def close(self) -> None:
        with self._lock:
            self._store.close([])
