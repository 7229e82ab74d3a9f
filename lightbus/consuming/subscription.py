"""One consumed queue, as the event loop and the connection both know it. What only one of them knows is elsewhere:
`runner.QueueRunner` is the event loop's side, `consumer.Consumer` the connection's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import attrs

from lightbus.consuming.credit import BUDGET
from lightbus.handler import Handler
from lightbus.transport import Channel, Delivery


class PendingHandlers:
    """The handlers that share one delivery: it is settled when the last of them has ended."""

    __slots__ = ("accepted", "unended")

    def __init__(self, unended: int) -> None:
        self.unended = unended
        self.accepted = True
        """False once the broker must dead-letter the delivery itself for one of them."""


HandlerRun = tuple[Delivery, "Handler | None", "PendingHandlers | None"]
"""A delivery, a handler for it, and the others that share the delivery, if any."""


@attrs.frozen(kw_only=True)
class SubscriptionConfig:
    """What the app declares and the worker's options say about one queue."""

    name: str
    """The queue's name on the broker."""
    suffix: str
    """The part after the app's name: `main`, or what `@app.on(queue=...)` gives."""
    handlers: Mapping[str, Handler]
    """By the handler's name."""
    prefetch: int
    """At most; see `credit`."""
    concurrency: int
    """Handlers that may run at once."""
    budget: int = BUDGET
    """Bytes of large bodies that may be held."""


class Subscription:
    """What the event loop and the connection share about one queue.

    The connection is read by one reader at a time: its thread, or the event loop.
    """

    def __init__(self, config: SubscriptionConfig) -> None:
        self.config = config
        self.name = config.name
        self.channels: tuple[Channel, ...] = ()
        """On which deliveries can be settled. The reader replaces it; every thread may read it."""
        self.ack_batch = 0
        """More settled deliveries than this are acked at once, whatever else there is to do. The reader sets it."""
        self.settled: deque[tuple[Delivery, bool]] = deque()
        """The event loop appends, the reader takes: a delivery, and whether it is acked (else dead-lettered)."""
