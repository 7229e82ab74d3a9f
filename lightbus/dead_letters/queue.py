"""The dead-letter queue of an app: read it without changing it, and ack what was retried or purged. Plain AMQP.

Dead letters are read without an ack and returned to the queue at the end, so reading changes nothing. An interruption
loses nothing at any point: when the connection ends, the broker returns what was not acked (but RabbitMQ then does not
keep the order).

The broker sends up to `WINDOW` of them ahead, because one round trip for each (`basic.get`) takes minutes for a long
queue. When a consumer holds its whole prefetch, it is cancelled, which leaves it what it holds, and the next consumer
begins. So each dead letter is delivered once and returned once. The queue allows 1,000,000 returns.

Who wrote the headers? If there is no `x-death` header, the app did: only the app may publish to its internal exchange,
and its copies carry no `x-death`. Otherwise the broker dead-lettered the message (its workers crashed): `x-death` names
the queue, and the `lightbus-` headers of a first delivery do not count, since any publisher may have written them.
RabbitMQ before version 4 even merges its record into an `x-death` header that a publisher has written (verified on
3.10.8). The source of such a dead letter is not verified: `DeadLetter.proven` is False, and a retry needs trust_origin.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress

import amqp.exceptions

from lightbus import errors
from lightbus.app import Lightbus
from lightbus.connection.counts import TRIES, queue_counts
from lightbus.connection.diagnosis import LOST, describe
from lightbus.connection.dial import address_of
from lightbus.dead_letters.letter import DeadLetter, Filter, read_dead_letter
from lightbus.transport import Channel, Connection, Delivery
from lightbus.wire import topology

FIRST_WINDOW = 50
"""The prefetch of the first consumer: as many as `lightbus dead list` shows. Each next one has twice as much, up to
WINDOW."""
WINDOW = 500
"""Maximum prefetch, and so the maximum number of dead letters in memory."""
SECONDS_AHEAD = 60.0
"""With a rate, the prefetch is what is retried in this time: RabbitMQ's consumer timeout is 30 minutes."""
WINDOW_BYTES = 32 * 1024 * 1024
"""Maximum size of a window, estimated from the mean size of the dead letters so far."""
QUIET = 0.1
"""Seconds without a delivery after which the queue's length is checked."""
FEW = 5000
"""Up to this length, the whole queue is read before anything is returned: this keeps the order."""
PATIENCE = 5.0
"""Seconds without a delivery, although the queue is not empty, after which `basic.get` is used."""
IN_ORDER = 32
"""Maximum number of dead letters in one nack. For more, RabbitMQ (3.10.8) does not keep the order."""
GROUPS = 16
"""Nacks or acks that are sent before waiting for the broker. With more than 32 in flight, RabbitMQ combines them
(`quorum_commands_soft_limit`)."""

ReadHook = Callable[["DeadQueue"], object]
"""Called after each dead letter that was read."""


class DeadQueue:
    """An app's dead-letter queue on an open connection. What is not acked is returned at the end."""

    def __init__(self, app: Lightbus, connection: Connection, on_read: ReadHook | None = None) -> None:
        self.app = app
        self.name = topology.queue_name(app.name, topology.DEAD_KEY)
        self.connection = connection
        self.channel: Channel = connection.channel()
        self.count = self.ready()
        """The queue's length at the start. No more than these are read, so that reading ends."""
        self.seen = 0
        """How many of them were read."""
        self.most_ahead = WINDOW
        """Maximum prefetch."""
        self._on_read = on_read
        broker = address_of(connection, app.broker).broker
        self._forgeable = broker.keeps_forged_deaths(connection.server_properties)
        self._next_tick = time.monotonic() + 1.0
        self._arrived: deque[Delivery] = deque()
        self._unsettled = _Unsettled()
        self._consumer: str | None = None
        self._numbers = itertools.count(1)
        self._window = FIRST_WINDOW // 2
        self._reads_ahead = True
        self._over = False

    def dead_letters(self) -> Iterator[DeadLetter]:
        """The dead letters that existed at the start, in the order of the queue."""
        while self.seen < self.count:
            self.beat()
            delivery = self._next()
            if delivery is None:
                return
            self.seen += 1
            if self._on_read is not None:
                self._on_read(self)
            yield read_dead_letter(self.app.name, delivery, forgeable=self._forgeable)

    def matching(self, wanted: Filter) -> Iterator[DeadLetter]:
        """Those of them that the filter selects."""
        now = time.time()
        return (one for one in self.dead_letters() if wanted.matches(one, now))

    def _next(self) -> Delivery | None:
        """The next one; None if the queue is empty."""
        while not self._arrived:
            if self._receive():
                continue
            self._unsubscribe()
            if self._reads_ahead:
                self._subscribe()
            elif not self._arrived:  # by the cancellation
                return self._get()
        return self._arrived.popleft()

    def _get(self) -> Delivery | None:
        delivery = self.channel.get(self.name)
        if delivery is not None:
            self._unsettled.take(delivery)
            self._unsettled.close()
        return delivery

    def _subscribe(self) -> None:
        # Not more than are left to read. So each window is filled, and no delivery is in flight at its end.
        most = min(
            self.most_ahead, max(1, int(WINDOW_BYTES / self._unsettled.mean_size)), self.count - self._unsettled.taken
        )
        self._window = min(2 * self._window, most)
        self.channel.basic_qos(0, self._window, False)
        self._consumer = tag = f"dead.{next(self._numbers)}"  # set before the request, in case Ctrl-C interrupts it
        self.channel.consume(self.name, self._arrive, on_cancel=self._cancelled, consumer_tag=tag)

    def _receive(self) -> bool:
        """Wait for deliveries of the current window. False if there are none left."""
        before, since = self._unsettled.present, time.monotonic()
        while self._consumer is not None and before < self._window:
            try:
                self.connection.drain_events(QUIET)
            except TimeoutError:
                # Another client may have taken the rest, or the consumer is stalled. What was sent but has not arrived
                # comes before the answer to the cancellation, or is back in the queue: `basic.get` decides.
                if not self.ready() or time.monotonic() - since > PATIENCE:
                    self._reads_ahead = False
                    break
            self.beat()
            if self._unsettled.present > before:
                return True
        return False

    def _complete(self) -> None:
        """Receive the whole window, then cancel the consumer. Before an ack or a nack: an ack would let the broker send
        more, and RabbitMQ returns what is in flight to a cancelled consumer in the wrong order."""
        while self._receive():
            pass
        self._unsubscribe()

    def _unsubscribe(self) -> None:
        if self._consumer is not None:
            self.channel.basic_cancel(self._consumer)
            self._consumer = None
            self._unsettled.close()

    def _arrive(self, delivery: Delivery) -> None:
        self._unsettled.take(delivery)
        if not self._over:
            self._arrived.append(delivery)

    def _cancelled(self, _: str) -> None:
        """By the broker: the queue was deleted, or its leader has changed. `basic.get` decides which."""
        self._consumer, self._reads_ahead = None, False
        self._unsettled.close()

    def ready(self) -> int:
        """The number of ready messages in the queue now."""
        return queue_counts(self.channel, self.name, tries=TRIES).ready

    def ack(self, dead_letters: Sequence[DeadLetter]) -> None:
        """Delete them from the queue, and return when the broker has done it."""
        self._complete()
        for number, (tag, multiple) in enumerate(self._unsettled.drop([one.tag for one in dead_letters]), 1):
            self.channel.basic_ack(tag, multiple)
            if number % GROUPS == 0:
                self._catch_up()
        self._catch_up()

    def _catch_up(self) -> None:
        """Wait until the broker has done what it was sent: it answers a `basic.get` after that. (If many acks are in
        flight, RabbitMQ delays some, and drops these when the connection ends.)"""
        delivery = self._get()
        if delivery is not None:
            self._arrived.append(delivery)

    def give_back(self) -> None:
        """Return everything that was not acked to the queue, in order. Wait until the next reader can get it."""
        self._over = True
        self._arrived.clear()
        self._complete()
        while self._reads_ahead and self._should_read_the_rest():
            self._subscribe()
            self._complete()
        given, patient = 0, True
        for number, (tag, count) in enumerate(self._unsettled.groups(), 1):
            self.channel.basic_nack(tag, multiple=True, requeue=True)
            given += count
            if number % GROUPS == 0:
                patient = patient and self._are_back(given)
        if patient and given:
            self._are_back(given)

    def _should_read_the_rest(self) -> bool:
        """RabbitMQ puts returned messages before those that were never delivered, but behind those returned earlier.
        So reading some would change the order. If there are few, all are read."""
        rest = self.count - self._unsettled.taken
        return self._unsettled.any and 0 < rest <= FEW and rest * self._unsettled.mean_size <= WINDOW_BYTES

    def _are_back(self, count: int) -> bool:
        """Wait until so many are ready. False after a timeout: other clients may have taken them."""
        deadline = time.monotonic() + PATIENCE
        while self.ready() < count:
            if time.monotonic() > deadline:
                return False
            self.wait(0.005)
        return True

    def beat(self) -> None:
        """Send a heartbeat if one is due."""
        if time.monotonic() >= self._next_tick:
            self.connection.heartbeat_tick()
            self._next_tick = time.monotonic() + 1.0

    def wait(self, seconds: float) -> None:
        """Wait, and keep the connection alive."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            with suppress(TimeoutError):
                self.connection.drain_events(min(left, 1.0))
            self.beat()


class _Unsettled:
    """The deliveries that are neither acked nor returned: one byte for each, because there may be a million."""

    def __init__(self) -> None:
        self.present = 0
        """Deliveries to the current consumer."""
        self._held = bytearray()  # by delivery tag, from 1
        self._ends: list[int] = []  # the last tag of each consumer
        self._bytes = 0

    @property
    def taken(self) -> int:
        return len(self._held)

    @property
    def mean_size(self) -> float:
        """Mean size of a body in bytes, at least 1."""
        return max(1.0, self._bytes / max(1, self.taken))

    @property
    def any(self) -> bool:
        return 1 in self._held

    def take(self, delivery: Delivery) -> None:
        self._held.extend(bytes(delivery.delivery_tag - self.taken))  # Ctrl-C may have interrupted an earlier call
        self._held[-1] = 1
        self._bytes += len(delivery.body)
        self.present += 1

    def drop(self, tags: Sequence[int]) -> Iterator[tuple[int, bool]]:
        """Remove these. Returns the tags to ack, and for each of them the `multiple` flag."""
        for tag in tags:
            self._held[tag - 1] = 0
        kept = self._held.find(1) + 1  # the first tag that is kept; 0 if there is none
        first = [tag for tag in tags if not kept or tag < kept]
        if first:
            yield max(first), True
        yield from ((tag, False) for tag in tags if kept and tag > kept)

    def close(self) -> None:
        """The next delivery belongs to another consumer."""
        self._ends.append(len(self._held))
        self.present = 0

    def groups(self) -> Iterator[tuple[int, int]]:
        """All of them in order, in groups of one consumer: the last tag, and the number of deliveries."""
        first = 0
        for end in self._ends:
            tags = [tag for tag, held in enumerate(self._held[first:end], first + 1) if held]
            for start in range(0, len(tags), IN_ORDER):
                group = tags[start : start + IN_ORDER]
                yield group[-1], len(group)
            first = end


@contextmanager
def opened(app: Lightbus, on_read: ReadHook | None = None) -> Generator[DeadQueue]:
    """The app's dead-letter queue.

    Args:
        on_read: called after each dead letter that was read.

    Raises:
        errors.TopologyMissing: the queue does not exist: no worker of the app has run on this broker.
        errors.BrokerError: the broker is not usable, or the connection was lost.
    """
    connection = app.broker.connect(f"lightbus {app.name} dead")
    try:
        queue = DeadQueue(app, connection, on_read)
        try:
            yield queue
        finally:
            with suppress(*LOST):  # then the broker returns them
                queue.give_back()
    except amqp.exceptions.NotFound as error:
        connection.collect()
        raise errors.TopologyMissing(
            f"There is no queue {app.name}.{topology.DEAD_KEY} on {app.broker.masked}: no worker of {app.name!r} has "
            "run there. Is it the right broker? Check LIGHTBUS_URL; `lightbus doctor` shows what exists there."
        ) from error
    except LOST as error:
        connection.collect()
        raise describe(error, address_of(connection, app.broker)) from error
    finally:
        connection.close()
