"""Live events: an exclusive, auto-delete queue on the bus, bounded on every side.

The broker keeps up to `QUEUE_LIMIT` events in that queue and lets the oldest go, so that a reader who has stopped
costs it nothing more, and no publisher ever waits or is refused. What has been read waits in `Tail` until
it is shown, and there too the oldest go first, counted.
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
"""Events in the broker's queue at most; the oldest make room."""
QUEUE_BYTES = 32 * 1024 * 1024
"""Bytes of bodies there at most (the embedded broker counts events only)."""
PREFETCH = 200
MANY = 20
"""Events at once that are worth a look at the queue."""
HELD = 1000
"""Events that were read and wait to be shown, at most."""
HELD_BYTES = 32 * 1024 * 1024
IDLE = 60.0


@attrs.frozen
class Taken:
    """The next event, and how many before it nobody will see."""

    delivery: Delivery
    received: float
    """Seconds since 1970."""
    dropped: int
    """Read, and dropped since they were not shown in time."""
    overrun: bool
    """The broker's queue was full meanwhile: some more may be missing, and nobody knows how many."""


class Tail(ConnectionThread):
    """A thread that subscribes to the bus with an exclusive queue, which is deleted with its connection.

    After a lost connection it listens again with a fresh queue; what passes meanwhile is not seen.
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
            keep: which deliveries are kept, called in the connection's thread.
            place: how people call the broker; else its URL without the password.
        """
        super().__init__(broker, "lightbus tail" if owner == BUS else f"lightbus {owner} tail")
        self.owner = owner
        self.patterns = patterns
        self.keep = keep
        self.place = place or broker.masked
        self.queue = ""
        self.fatal: errors.BrokerError | None = None
        """Why it has ended, where it cannot go on."""
        self._channel: Channel | None = None
        self._arrived: list[Delivery] = []
        self._fault: str | None = None
        self._next_look = 0.0
        self._held: deque[tuple[Delivery, float]] = deque()
        self._held_bytes = 0
        self._dropped = 0
        self._overrun = False
        self._changed = threading.Condition()

    def take(self, timeout: float) -> Taken | None:
        """The next event; None where there was none within `timeout` seconds.

        Raises:
            errors.BrokerError: it has ended, and nothing more comes.
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
        """How many it has read that nobody has taken."""
        with self._changed:
            return len(self._held) + self._dropped

    # --- the connection's thread

    def opened(self, connection: Connection) -> None:
        declare(connection, Topology(shared=(bus_exchange(),)))
        channel = connection.channel()
        # A name for each connection: after a fault the broker may hold on to the old one, and its queue, for a while.
        self.queue = f"{self.owner}.tail.{uuid.uuid4().hex[:12]}"
        arguments = {
            "x-queue-type": "classic",  # a quorum queue cannot be exclusive, also where the virtual host prefers those
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
            self._look(len(batch))
            self._channel.basic_ack(batch[-1].delivery_tag, multiple=True)
            self._keep(batch)
        return 0.0 if self._arrived else IDLE

    def _look(self, batch: int) -> None:
        """Ask, before the acks make room, whether the queue may have been full: where this process did not run, or
        could not keep pace. Small batches mean that it does.
        """
        if batch < MANY and time.monotonic() < self._next_look:
            return
        assert self._channel is not None
        ready = self._channel.queue_declare(self.queue, passive=True)[1]
        self._overrun |= ready + batch >= QUEUE_LIMIT
        self._next_look = time.monotonic() + 1.0

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
        if not isinstance(error, errors.BrokerError):  # `failed` says it
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
