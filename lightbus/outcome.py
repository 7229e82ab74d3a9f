"""`Outcome`: what came of one attempt to handle an event, or of one publish. For metrics, logs and tests."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

from lightbus.message import Message, Receipt

logger = logging.getLogger("lightbus")

Kind = Literal["handled", "skipped", "retried", "dead", "redelivered", "published", "failed"]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What `app.observe` calls its function with: once per attempt of a handler, and once per published event."""

    kind: Kind
    """
    Of an attempt: `handled` (the handler returned), `skipped` (a middleware did not call it), `retried` (it failed; a
    copy comes after `delay`), `dead` (it failed for the last time, or the broker refused a copy for its retry: a dead
    letter), `redelivered` (it failed, and no copy could be stored: the broker delivers the event again).

    Of a publish: `published` (confirmed), `failed` (not confirmed, or the outcome is unknown).
    """
    app: str
    """The app whose handler ran, or that published."""
    message: Message
    handler: str | None = None
    """None for a publish, and for an event that no handler matches."""
    queue: str | None = None
    """The queue that the event came from; None for a publish."""
    attempt: int = 1
    seconds: float = 0.0
    """How long the handler ran with its middleware, or until the confirm."""
    error: BaseException | None = None
    """Why it failed."""
    delay: float | None = None
    """Seconds until the retry, or of a delayed publish."""
    receipt: Receipt | None = None
    """Of a publish that was confirmed."""
    waited: float | None = None
    """Of a publish by the relay of an outbox: the seconds from `outbox.add` until the relay sent it. It contains the
    time until the commit, and compares the clocks of two programs. None for any other publish.
    """


Observe = Callable[[Outcome], object]


def notifier(observers: Sequence[Observe]) -> Observe:
    """One function that calls all of them. What they raise is logged, and changes nothing."""

    def notify(outcome: Outcome) -> None:
        for observe in observers:
            try:
                observe(outcome)
            except Exception:
                logger.exception("An observer of app %r failed: %r", outcome.app, observe)

    return notify
