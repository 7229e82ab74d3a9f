"""What an operator does with dead letters: retry or purge those that were chosen."""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import attrs

from lightbus import errors
from lightbus.dead_letters.letter import Filter, Letter, retry_publication
from lightbus.dead_letters.queue import SECONDS_AHEAD, WINDOW, DeadQueue

CHUNK = 100
"""Letters that are published at once at most: an interruption between their confirms and acks repeats no more."""


@attrs.define
class Outcome:
    """What happened to the selected dead letters."""

    matched: int = 0
    done: int = 0
    """Retried, or purged."""
    unproven: int = 0
    """Skipped, because their source is not verified."""
    stranded: dict[str, int] = attrs.field(factory=dict)
    """Left, because the queue that they came from no longer exists: how many, by queue."""
    gone: dict[str, int] = attrs.field(factory=dict)
    """Of those done, the ones for a handler that the app, as it is here, does not have: how many, by handler."""
    vanished: int = 0
    """Were selected, and no longer exist."""
    problem: str = ""
    """Why it ended before its time."""

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
) -> None:
    """Publish each letter that is meant to the queue that it came from, and ack it once that is confirmed.

    An interruption leaves every letter either retried or in the queue (up to `CHUNK` of them both).

    Args:
        outcome: counted up on the way, so that an interruption leaves what is done known.
        limit: retry so many at most.
        rate: letters a second at most.
        trust_origin: also those whose source is not verified.
    """
    size = CHUNK if rate is None else max(1, min(CHUNK, int(rate)))
    if rate is not None:
        queue.most_ahead = max(1, min(WINDOW, int(SECONDS_AHEAD * rate)))
    began = time.monotonic()
    for chunk in _chunks(_retriable(queue, wanted, outcome, limit, trust_origin), size):
        _retry_chunk(queue, chunk, outcome)
        if outcome.problem:
            return
        if rate is not None:
            queue.wait(began + outcome.done / rate - time.monotonic())


def _retriable(
    queue: DeadQueue, wanted: Filter, outcome: Outcome, limit: int | None, trust_origin: bool
) -> Iterator[Letter]:
    now = time.time()
    taken = 0
    for letter in queue.letters():
        if limit is not None and taken >= limit:
            return
        if not wanted.fits(letter, now):
            continue
        outcome.matched += 1
        if not letter.proven and not trust_origin:
            outcome.unproven += 1
            continue
        taken += 1
        yield letter
        if limit is not None and taken >= limit:
            return


def _chunks(letters: Iterator[Letter], size: int) -> Iterator[list[Letter]]:
    chunk: list[Letter] = []
    for letter in letters:
        chunk.append(letter)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _retry_chunk(queue: DeadQueue, chunk: Sequence[Letter], outcome: Outcome) -> None:
    publisher = queue.app.publisher
    try:
        results: list[Any] = list(publisher.publish_many_sync([retry_publication(letter) for letter in chunk]))
    except errors.PublishManyError as error:
        results = error.outcomes
    published: list[Letter] = []
    for letter, result in zip(chunk, results, strict=True):
        if isinstance(result, errors.PublishError):
            outcome.problem = outcome.problem or str(result)
        elif not result.routed:
            outcome.stranded[letter.queue] = outcome.stranded.get(letter.queue, 0) + 1
        else:
            published.append(letter)
            outcome.done += 1
            if letter.handler is not None and letter.handler not in queue.app.handlers:
                outcome.gone[letter.handler] = outcome.gone.get(letter.handler, 0) + 1
    queue.ack(published)


def purge(
    queue: DeadQueue,
    wanted: Filter,
    outcome: Outcome,
    *,
    limit: int | None = None,
    only: Collection[bytes] | None = None,
) -> None:
    """Take each letter that is meant out of the queue, for good.

    Args:
        limit: so many at most.
        only: the digests of those that may be meant.
    """
    now = time.time()
    fitting = (letter for letter in queue.letters() if wanted.fits(letter, now))
    meant = itertools.islice((letter for letter in fitting if only is None or letter.digest in only), limit)
    for chunk in _chunks(meant, CHUNK):
        outcome.matched += len(chunk)
        queue.ack(chunk)
        outcome.done += len(chunk)
