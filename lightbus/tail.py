"""Live events: reads an exclusive, auto-delete queue that is bound to the bus.

The broker keeps up to `QUEUE_LIMIT` events in the queue and drops the oldest. So a stopped reader needs no more memory,
and publishers are never blocked or refused. `Tail` keeps up to `HELD` events that were read but not shown yet. It drops
the oldest, too, and counts them.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import attrs

from lightbus import errors
from lightbus.connection.declare import declare
from lightbus.connection.diagnosis import FATAL
from lightbus.connection.dial import BrokerAddresses
from lightbus.connection.thread import ConnectionThread
from lightbus.transport import Channel, Connection, Delivery
from lightbus.wire.topology import BUS, Topology, bus_exchange

logger = logging.getLogger("lightbus")

QUEUE_LIMIT = 1000
"""Maximum length of the queue. The broker drops the oldest event."""
QUEUE_BYTES = 32 * 1024 * 1024
"""Maximum size of all bodies in the queue (the embedded broker limits only the length)."""
PREFETCH = 200
MANY = 20
"""Batch size from which the length of the queue is checked."""
HELD = 1000
"""Maximum number of events that were read but not taken."""
HELD_BYTES = 32 * 1024 * 1024
IDLE = 60.0


@attrs.frozen
class Taken:
    """The next event, and how many before it were dropped."""

    delivery: Delivery
    received: float
    """Seconds since 1970."""
    dropped: int
    """The number of events that were read, but dropped before they were taken."""
    overrun: bool
    """The queue was full, so the broker may have dropped more. Their number is not known."""


class Buffer:
    """Events that were read but not taken, bounded in number and bytes. Thread-safe."""

    def __init__(self) -> None:
        self._events: deque[tuple[Delivery, float]] = deque()
        self._bytes = 0
        self._dropped = 0
        self._overrun = False
        self._ended: errors.BrokerError | None = None
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._events)

    @property
    def newest(self) -> Delivery | None:
        with self._changed:
            return self._events[-1][0] if self._events else None

    @property
    def dropped(self) -> int:
        """The number of dropped events since the last one that was taken."""
        return self._dropped

    def left(self) -> int:
        """The number of events that were put and not taken, including dropped ones."""
        with self._changed:
            return len(self._events) + self._dropped

    def put(self, deliveries: Iterable[Delivery], *, overrun: bool) -> None:
        """Add events, and drop the oldest ones if there are too many.

        Args:
            overrun: the broker may have dropped events before these.
        """
        received = time.time()
        with self._changed:
            self._overrun |= overrun
            for delivery in deliveries:
                self._events.append((delivery, received))
                self._bytes += len(delivery.body)
                while len(self._events) > HELD or (self._bytes > HELD_BYTES and len(self._events) > 1):
                    self._bytes -= len(self._events.popleft()[0].body)
                    self._dropped += 1
            self._changed.notify_all()

    def take(self, timeout: float) -> Taken | None:
        """The oldest event, or None if there was none within `timeout` seconds.

        Raises:
            errors.BrokerError: the buffer is empty, and `end` was called with this error.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._events or self._ended, timeout)
            if not self._events:
                if self._ended is not None:
                    raise self._ended
                return None
            delivery, received = self._events.popleft()
            self._bytes -= len(delivery.body)
            taken = Taken(delivery, received, self._dropped, self._overrun)
            self._dropped, self._overrun = 0, False
            return taken

    def end(self, error: errors.BrokerError) -> None:
        """Let `take` raise this error when the buffer is empty."""
        with self._changed:
            self._ended = error
            self._changed.notify_all()


class Tail(ConnectionThread):
    """A thread that consumes from the bus with an exclusive queue, which is deleted with its connection.

    After a lost connection, it uses a new queue. Events in the meantime are missed.
    """

    def __init__(
        self,
        broker: BrokerAddresses,
        patterns: Sequence[str],
        *,
        owner: str = BUS,
        keep: Callable[[Delivery], bool] = lambda delivery: True,
        place: str = "",
    ) -> None:
        """
        Args:
            owner: begins the queue's name (`billing.tail.…`), so that an app's own broker user may declare it.
            keep: whether to keep a delivery. Called in the connection's thread.
            place: the broker's description in logs. Default: its URL without the password.
        """
        super().__init__(broker, "lightbus tail" if owner == BUS else f"lightbus {owner} tail")
        self.owner = owner
        self.patterns = patterns
        self.keep = keep
        self.place = place or broker.masked
        self.queue = ""
        self.buffer = Buffer()
        self._channel: Channel | None = None
        self._arrived: list[Delivery] = []
        self._fault: str | None = None
        self._next_check = 0.0

    def take(self, timeout: float) -> Taken | None:
        """The next event, or None if there was none within `timeout` seconds.

        Raises:
            errors.BrokerError: the tail has ended.
        """
        return self.buffer.take(timeout)

    def left(self) -> int:
        """The number of events that were read but not taken."""
        return self.buffer.left()

    # --- the connection's thread

    def opened(self, connection: Connection) -> None:
        declare(connection, Topology(shared=(bus_exchange(),)))
        channel = connection.channel()
        # A new name for each connection: after a fault, the broker may keep the old queue for a while.
        self.queue = f"{self.owner}.tail.{uuid.uuid4().hex[:12]}"
        arguments = {
            "x-queue-type": "classic",  # explicit: the virtual host's default may be quorum, which cannot be exclusive
            "x-max-length": QUEUE_LIMIT,
            "x-max-length-bytes": QUEUE_BYTES,
            "x-overflow": "drop-head",
        }
        channel.queue_declare(self.queue, durable=False, exclusive=True, auto_delete=True, arguments=arguments)
        for pattern in self.patterns:
            channel.queue_bind(self.queue, BUS, pattern)
        channel.basic_qos(0, PREFETCH, False)
        self._arrived, self._fault, self._channel = [], None, channel
        channel.consume(self.queue, self._arrived.append, on_cancel=self.consumer_cancelled)
        logger.info("Listening for %s on %s.", ", ".join(self.patterns), self.place)

    def consumer_cancelled(self, _consumer_tag: str) -> None:
        """The broker has cancelled the consumer. The connection is replaced."""
        self._fault = f"the queue {self.queue} was deleted"

    def work(self) -> float:
        if self._fault is not None:
            raise OSError(self._fault)
        if self._arrived:
            batch = self._arrived[:]
            self._arrived.clear()
            assert self._channel is not None
            overrun = self._may_have_overrun(len(batch))
            self._channel.basic_ack(batch[-1].delivery_tag, multiple=True)
            self.buffer.put(filter(self.keep, batch), overrun=overrun)
        return 0.0 if self._arrived else IDLE

    def _may_have_overrun(self, batch: int) -> bool:
        """Check whether the queue may have been full, before the acks let the broker send more. It was if this process
        was stopped or too slow. Small batches mean that it is fast enough.
        """
        if batch < MANY and time.monotonic() < self._next_check:
            return False
        assert self._channel is not None
        ready = int(self._channel.queue_declare(self.queue, passive=True)[1])
        self._next_check = time.monotonic() + 1.0
        return ready + batch >= QUEUE_LIMIT

    def lost(self, error: BaseException) -> None:
        self._channel = None
        if not isinstance(error, errors.BrokerError):  # `failed` logs it
            logger.warning("The connection was lost (%s); reconnecting. Events in the meantime are not shown.", error)

    def failed(self, error: errors.BrokerError) -> None:
        if self.epoch and not isinstance(error, FATAL):
            logger.error("%s Trying again.", error)
            return
        self.stopping = True
        self.buffer.end(error)

    def closing(self) -> None:
        if self._channel is not None:
            with contextlib.suppress(OSError):
                self._channel.queue_delete(self.queue)
