"""Retry or purge the dead letters that an operator selects."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import attrs

from lightbus import errors
from lightbus.dead_letters.letter import DeadLetter, Filter, retry_publication
from lightbus.dead_letters.queue import SECONDS_AHEAD, WINDOW, DeadQueue

CHUNK = 100
"""Maximum number of dead letters that are published at once. An interruption between their confirms and their acks
duplicates at most this many."""


@attrs.define
class Outcome:
    """What happened to the selected dead letters."""

    matched: int = 0
    done: int = 0
    """Retried, or purged."""
    unproven: int = 0
    """Skipped, because their source is not verified."""
    stranded: dict[str, int] = attrs.field(factory=dict)
    """Skipped, because their queue no longer exists: the number for each queue."""
    gone: dict[str, int] = attrs.field(factory=dict)
    """Of those done: the number for each handler that this code does not have."""
    vanished: int = 0
    """Selected, but no longer in the queue."""
    problem: str = ""
    """Why the action stopped early."""

    @property
    def left(self) -> int:
        return self.matched - self.done


def retry(
    queue: DeadQueue,
    wanted: Filter,
    outcome: Outcome,
    *,
    limit: int | None = None,
    rate: float | None = None,
    trust_origin: bool = False,
    only: Collection[bytes] | None = None,
) -> None:
    """Publish each selected dead letter to the queue that it came from, and ack it after the confirm.

    After an interruption, every dead letter is retried or still in the queue (up to `CHUNK` of them both).

    Args:
        outcome: updated after each chunk, so it is right after an interruption, too.
        limit: retry at most so many.
        rate: dead letters per second at most.
        trust_origin: include those whose source is not verified.
        only: retry only dead letters with these digests, one for each.
    """
    size = CHUNK if rate is None else max(1, min(CHUNK, int(rate)))
    if rate is not None:
        queue.most_ahead = max(1, min(WINDOW, int(SECONDS_AHEAD * rate)))
    began = time.monotonic()
    selected = retriable(queue, wanted, outcome, limit=limit, trust_origin=trust_origin, only=only)
    for chunk in _chunks(selected, size):
        _retry_chunk(queue, chunk, outcome)
        if outcome.problem:
            return
        if rate is not None:
            queue.wait(began + outcome.done / rate - time.monotonic())


def retriable(
    queue: DeadQueue,
    wanted: Filter,
    outcome: Outcome,
    *,
    limit: int | None = None,
    trust_origin: bool = False,
    only: Collection[bytes] | None = None,
) -> Iterator[DeadLetter]:
    """The dead letters that `retry` retries with the same arguments. Counts `matched` and `unproven` in the outcome."""
    if limit == 0:
        return
    taken = 0
    for dead_letter in chosen(queue.matching(wanted), only):
        outcome.matched += 1
        if not dead_letter.proven and not trust_origin:
            outcome.unproven += 1
            continue
        taken += 1
        yield dead_letter
        if taken == limit:
            return


def purge(
    queue: DeadQueue,
    wanted: Filter,
    outcome: Outcome,
    *,
    limit: int | None = None,
    only: Collection[bytes] | None = None,
) -> None:
    """Delete each selected dead letter permanently.

    Args:
        limit: purge at most so many.
        only: purge only dead letters with these digests, one for each.
    """
    for chunk in _chunks(purgeable(queue, wanted, limit=limit, only=only), CHUNK):
        outcome.matched += len(chunk)
        queue.ack(chunk)
        outcome.done += len(chunk)


def purgeable(
    queue: DeadQueue, wanted: Filter, *, limit: int | None = None, only: Collection[bytes] | None = None
) -> Iterator[DeadLetter]:
    """The dead letters that `purge` deletes with the same arguments."""
    return itertools.islice(chosen(queue.matching(wanted), only), limit)


def chosen(dead_letters: Iterator[DeadLetter], only: Collection[bytes] | None) -> Iterator[DeadLetter]:
    """One dead letter for each of these digests; all of them for None. Messages without an id may have the same one."""
    if only is None:
        yield from dead_letters
        return
    left = Counter(only)
    while left.total() and (one := next(dead_letters, None)) is not None:
        if left[one.digest]:
            left[one.digest] -= 1
            yield one


def _chunks(dead_letters: Iterator[DeadLetter], size: int) -> Iterator[list[DeadLetter]]:
    while chunk := list(itertools.islice(dead_letters, size)):
        yield chunk


def _retry_chunk(queue: DeadQueue, chunk: Sequence[DeadLetter], outcome: Outcome) -> None:
    publisher = queue.app.publisher
    try:
        results: list[Any] = list(publisher.publish_many_sync([retry_publication(one) for one in chunk]))
    except errors.PublishManyError as error:
        results = error.outcomes
    published: list[DeadLetter] = []
    for dead_letter, result in zip(chunk, results, strict=True):
        handler = dead_letter.handler
        if isinstance(result, errors.PublishError):
            outcome.problem = outcome.problem or str(result)
        elif not result.routed:
            outcome.stranded[dead_letter.queue] = outcome.stranded.get(dead_letter.queue, 0) + 1
        else:
            published.append(dead_letter)
            outcome.done += 1
            if handler is not None and handler not in queue.app.handlers:
                outcome.gone[handler] = outcome.gone.get(handler, 0) + 1
    queue.ack(published)
