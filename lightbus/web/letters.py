"""The dead letters of an app: list, find, retry and purge them. All calls block.

An app's name is enough: a dead letter holds all that its retry needs. What the broker's user may not do, the broker
refuses.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Collection, Generator, Iterator
from typing import Literal

import attrs

from lightbus import errors
from lightbus.dead_letters import actions, queue
from lightbus.dead_letters.actions import Outcome
from lightbus.dead_letters.letter import DeadLetter, Filter
from lightbus.dead_letters.queue import DeadQueue
from lightbus.web.source import Source

SHOWN = 50
"""Dead letters on a page."""
READ = 2000
"""Dead letters that are read for one page."""
Action = Literal["retry", "purge"]

READ_FOR_ONE = 50_000
"""Dead letters that are read to find certain ones."""
PATIENCE = 15.0
"""Seconds that a page waits for another one that reads the same queue."""

_locks = [threading.Lock() for _ in range(64)]
"""By app: two readers of a queue would each see only a part of it."""


@attrs.frozen
class Listing:
    """The first dead letters that match."""

    found: list[DeadLetter]
    total: int
    """The length of the queue."""
    read: int
    """How many of them were compared with the filter."""

    @property
    def complete(self) -> bool:
        """Whether the whole queue was read."""
        return self.read >= self.total


@contextlib.contextmanager
def _opened(source: Source, app: str) -> Generator[DeadQueue]:
    owner = source.app_named(app)
    lock = _locks[hash(app) % len(_locks)]
    if not lock.acquire(timeout=PATIENCE):
        raise errors.TopologyConflict(f"Another page reads the dead letters of {app!r}. Open this page again.")
    try:
        with queue.opened(owner) as found:
            yield found
    finally:
        lock.release()


def _first(dead: DeadQueue, count: int) -> Iterator[DeadLetter]:
    return itertools.islice(dead.dead_letters(), count)


def listed(source: Source, app: str, wanted: Filter, shown: int = SHOWN) -> Listing:
    """The dead letters that the filter selects, in the order of the queue.

    Raises:
        errors.LightbusError: the queue does not exist or cannot be read.
    """
    found: list[DeadLetter] = []
    with _opened(source, app) as dead:
        now = time.time()
        for one in _first(dead, READ):
            if wanted.matches(one, now):
                found.append(one)
            if len(found) == shown:
                break
        return Listing(found, dead.count, dead.seen)


def selected(source: Source, app: str, digests: Collection[bytes]) -> list[DeadLetter]:
    """A dead letter for each of these digests. Those that are no longer in the queue are missing.

    Raises:
        errors.LightbusError: as `listed`.
    """
    with _opened(source, app) as dead:
        return list(actions.chosen(_first(dead, READ_FOR_ONE), digests))


def act(source: Source, app: str, action: Action, digests: Collection[bytes], *, trust_origin: bool) -> Outcome:
    """Retry or purge a dead letter for each of these digests.

    Args:
        trust_origin: retry also those whose source is not verified.

    Raises:
        errors.LightbusError: as `listed`; or the broker refuses it before anything was done.
    """
    outcome = Outcome()
    try:
        with _opened(source, app) as dead:
            if action == "purge":
                actions.purge(dead, Filter(), outcome, only=digests)
            else:
                _retry(dead, outcome, digests, trust_origin)
    except errors.BrokerError as error:
        if not outcome.matched:
            raise
        outcome.problem = str(error)
    outcome.vanished = max(0, len(digests) - outcome.matched)
    return outcome


def _retry(dead: DeadQueue, outcome: Outcome, digests: Collection[bytes], trust_origin: bool) -> None:
    try:
        actions.retry(dead, Filter(), outcome, trust_origin=trust_origin, only=digests)
    finally:
        if not dead.app.handlers:  # made for this action only: see `Source.app_named`
            dead.app.publisher.close(1.0)
