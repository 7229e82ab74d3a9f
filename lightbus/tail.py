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
from collections.abc import Callable, Sequence

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
        self.fatal: errors.BrokerError | None = None
        """Why it has ended; None while it runs."""
        self._channel: Channel | None = None
        self._arrived: list[Delivery] = []
        self._fault: str | None = None
        self._next_check = 0.0
        self._held: deque[tuple[Delivery, float]] = deque()
        self._held_bytes = 0
        self._dropped = 0
        self._overrun = False
        self._changed = threading.Condition()

    def take(self, timeout: float) -> Taken | None:
        """The next event, or None if there was none within `timeout` seconds.

        Raises:
            errors.BrokerError: the tail has ended.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._held or self.fatal, timeout)
            if not self._held:
                if self.fatal is not None:
                    raise self.fatal
                return None
            delivery, received = self._held.popleft()
            self._held_bytes -= len(delivery.body)
            taken = Taken(delivery, received, self._dropped, self._overrun)
            self._dropped, self._overrun = 0, False
            return taken

    def left(self) -> int:
        """The number of events that were read but not taken."""
        with self._changed:
            return len(self._held) + self._dropped

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
        channel.consume(self.queue, self._arrived.append, on_cancel=self._cancelled)
        logger.info("Listening for %s on %s.", ", ".join(self.patterns), self.place)

    def _cancelled(self, _consumer_tag: str) -> None:
        self._fault = f"the queue {self.queue} was deleted"

    def work(self) -> float:
        if self._fault is not None:
            raise OSError(self._fault)
        if self._arrived:
            batch = self._arrived[:]
            self._arrived.clear()
            assert self._channel is not None
            self._check_length(len(batch))
            self._channel.basic_ack(batch[-1].delivery_tag, multiple=True)
            self._keep(batch)
        return 0.0 if self._arrived else IDLE

    def _check_length(self, batch: int) -> None:
        """Check whether the queue may have been full, before the acks let the broker send more. It was if this process
        was stopped or too slow. Small batches mean that it is fast enough.
        """
        if batch < MANY and time.monotonic() < self._next_check:
            return
        assert self._channel is not None
        ready = self._channel.queue_declare(self.queue, passive=True)[1]
        self._overrun |= ready + batch >= QUEUE_LIMIT
        self._next_check = time.monotonic() + 1.0

    def _keep(self, batch: Sequence[Delivery]) -> None:
        received = time.time()
        with self._changed:
            for delivery in filter(self.keep, batch):
                self._held.append((delivery, received))
                self._held_bytes += len(delivery.body)
                while len(self._held) > HELD or (self._held_bytes > HELD_BYTES and len(self._held) > 1):
                    self._held_bytes -= len(self._held.popleft()[0].body)
                    self._dropped += 1
            self._changed.notify_all()

    def lost(self, error: BaseException) -> None:
        self._channel = None
        if not isinstance(error, errors.BrokerError):  # `failed` logs it
            logger.warning("The connection was lost (%s); reconnecting. Events in the meantime are not shown.", error)

    def failed(self, error: errors.BrokerError) -> None:
        if self.epoch and not isinstance(error, FATAL):
            logger.error("%s Trying again.", error)
            return
        self.stopping = True
        with self._changed:
            self.fatal = error
            self._changed.notify_all()

    def closing(self) -> None:
        if self._channel is not None:
            with contextlib.suppress(OSError):
                self._channel.queue_delete(self.queue)
