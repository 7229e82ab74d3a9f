"""Dead letters: read them, retry them, throw them away. With plain AMQP.

Letters are taken without ack and given back, so that looking changes nothing. An interruption at any moment loses
nothing: the end of the connection gives back what was not acked, too (though RabbitMQ keeps no order then).

The broker sends them ahead, `WINDOW` at a time: a round trip for each (`basic.get`) made it minutes for a long queue.
A consumer that holds its prefetch is cancelled, which leaves it what it holds, and another one begins. So each letter
is taken once, and comes back once: the 1,000,000 returns that the queue allows are as many looks.

Who says what a letter is? The app wrote it, if it has no `x-death` header: only the app may publish to its internal
exchange, and its copies carry no `x-death` on. Else the broker dead-lettered it (its workers died over it): then
`x-death` says from which queue, and no `lightbus-` header of a first delivery counts, since a stranger may have written
it. Before version 4, RabbitMQ even merges its record into an `x-death` that a stranger has published (verified on
3.10.8), so the source of such a letter is a claim: `Letter.proven` is False, and no claim is retried unasked.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import amqp.exceptions

from lightbus import errors
from lightbus.app import Lightbus
from lightbus.connection.diagnosis import LOST, describe
from lightbus.connection.dial import address_of
from lightbus.dead_letters.letter import Letter, read_letter
from lightbus.transport import Channel, Connection, Delivery
from lightbus.wire import topology

FIRST_WINDOW = 50
"""Letters that the broker may send ahead at first: as many as `lightbus dead list` shows. Each next window is twice as
large, up to WINDOW."""
WINDOW = 500
"""Letters that the broker may send ahead at most, and so the most that are in memory at once."""
SECONDS_AHEAD = 60.0
"""What is retried at a rate in so many seconds may be sent ahead: RabbitMQ ends what keeps a letter for 30 minutes."""
WINDOW_BYTES = 32 * 1024 * 1024
"""Bytes of letters that may be sent ahead, as far as the mean of those before tells."""
QUIET = 0.1
"""Seconds without a letter after which the broker is asked whether there are any left."""
FEW = 5000
"""Letters that are all taken once, so that they keep their order, also where only some of them are looked at."""
PATIENCE = 2.0
"""Seconds without a letter, though there are some, after which they are fetched one by one."""
IN_ORDER = 32
"""Letters that are given back in one return: of more, RabbitMQ (3.10.8) does not keep the order."""
GROUPS = 16
"""Returns before they are waited for: with more than 32 (`quorum_commands_soft_limit`) on their way, RabbitMQ makes one
of them."""


class DeadQueue:
    """An app's dead-letter queue on an open connection. What is not acked is given back at the end."""

    def __init__(self, app: Lightbus, connection: Connection) -> None:
        self.app = app
        self.name = topology.queue_name(app.name, topology.DEAD_KEY)
        self.connection = connection
        self.channel: Channel = connection.channel()
        self.count = self.ready()
        """Letters that are there when it is opened: no more than these are looked at, so that work ends."""
        self.seen = 0
        self.most_ahead = WINDOW
        """Letters that the broker may send ahead at most."""
        self.on_look: Callable[[], object] = _nothing
        """Called after each letter that was looked at."""
        self._forgeable = _takes_over_deaths(connection.server_properties)
        self._next_tick = time.monotonic() + 1.0
        self._arrived: deque[Delivery] = deque()
        self._hand = _Hand()
        self._consumer: str | None = None
        self._numbers = itertools.count(1)
        self._window = FIRST_WINDOW // 2
        self._reads_ahead = True
        self._over = False

    def letters(self) -> Iterator[Letter]:
        while self.seen < self.count:
            self.beat()
            delivery = self._next()
            if delivery is None:
                return
            self.seen += 1
            self.on_look()
            yield read_letter(self.app.name, delivery, forgeable=self._forgeable)

    def _next(self) -> Delivery | None:
        """The next letter; None where the queue is empty."""
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
            self._hand.take(delivery)
            self._hand.close()
        return delivery

    def _subscribe(self) -> None:
        # No more than are left to look at: then each window is filled, and no letter is on its way when it ends.
        most = min(self.most_ahead, max(1, int(WINDOW_BYTES / self._hand.mean_size)), self.count - self._hand.taken)
        self._window = min(2 * self._window, most)
        self.channel.basic_qos(0, self._window, False)
        self._consumer = tag = f"dead.{next(self._numbers)}"  # known before, in case that Ctrl-C comes meanwhile
        self.channel.consume(self.name, self._arrive, on_cancel=self._cancelled, consumer_tag=tag)

    def _receive(self) -> bool:
        """Wait for letters that the consumer is still to be sent; False where there are none."""
        before, since = self._hand.present, time.monotonic()
        while self._consumer is not None and before < self._window:
            try:
                self.connection.drain_events(QUIET)
            except TimeoutError:
                # Others may have taken what was there, or the consumer is stalled. What was sent and has not arrived
                # comes with the cancellation, or is back in the queue: the last word is a `basic.get`'s.
                if not self.ready() or time.monotonic() - since > PATIENCE:
                    self._reads_ahead = False
                    break
            self.beat()
            if self._hand.present > before:
                return True
        return False

    def _complete(self) -> None:
        """Let the consumer be sent its whole window, then cancel it. An ack would let the broker send it more, and
        what is on its way to a consumer that is cancelled comes back behind those that are behind it."""
        while self._receive():
            pass
        self._unsubscribe()

    def _unsubscribe(self) -> None:
        if self._consumer is not None:
            self.channel.basic_cancel(self._consumer)
            self._consumer = None
            self._hand.close()

    def _arrive(self, delivery: Delivery) -> None:
        self._hand.take(delivery)
        if not self._over:
            self._arrived.append(delivery)

    def _cancelled(self, _: str) -> None:
        """By the broker: the queue is gone, or its leader. A `basic.get` tells."""
        self._consumer, self._reads_ahead = None, False
        self._hand.close()

    def ready(self) -> int:
        return int(self.channel.queue_declare(self.name, passive=True)[1])

    def ack(self, letters: Sequence[Letter]) -> None:
        """Take them out of the queue, for good, and return once they are."""
        self._complete()
        for number, (tag, multiple) in enumerate(self._hand.drop([letter.tag for letter in letters]), 1):
            self.channel.basic_ack(tag, multiple)
            if number % GROUPS == 0:
                self._catch_up()
        self._catch_up()

    def _catch_up(self) -> None:
        """Return once the broker has done what it was sent, as it has before it answers a `basic.get`. (RabbitMQ holds
        acks back where many are on their way, and forgets those where the connection ends.)"""
        delivery = self._get()
        if delivery is not None:
            self._arrived.append(delivery)

    def give_back(self) -> None:
        """Return all that was not acked to the queue, in its order; return once it is there, for who looks next."""
        self._over = True
        self._arrived.clear()
        self._complete()
        while self._reads_ahead and self._may_take_the_rest():
            self._subscribe()
            self._complete()
        given, patient = 0, True
        for number, (tag, count) in enumerate(self._hand.groups(), 1):
            self.channel.basic_nack(tag, multiple=True, requeue=True)
            given += count
            if number % GROUPS == 0:
                patient = patient and self._are_back(given)
        if patient and given:
            self._are_back(given)

    def _may_take_the_rest(self) -> bool:
        """RabbitMQ puts what comes back before what never left, and behind what came back before: so that a look at
        some does not move them behind others, all are taken, where they are few."""
        rest = self.count - self._hand.taken
        return self._hand.any and 0 < rest <= FEW and rest * self._hand.mean_size <= WINDOW_BYTES

    def _are_back(self, count: int) -> bool:
        """Wait until so many are there; False where they are not soon, as others may take them at once."""
        deadline = time.monotonic() + PATIENCE
        while self.ready() < count:
            if time.monotonic() > deadline:
                return False
            self.wait(0.005)
        return True

    def beat(self) -> None:
        if time.monotonic() >= self._next_tick:
            self.connection.heartbeat_tick()
            self._next_tick = time.monotonic() + 1.0

    def wait(self, seconds: float) -> None:
        """Let time pass, and the connection live."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            with suppress(TimeoutError):
                self.connection.drain_events(min(left, 1.0))
            self.beat()


class _Hand:
    """Which deliveries are neither acked nor given back: a byte for each, since there may be a million."""

    def __init__(self) -> None:
        self.present = 0
        """How many the present consumer was sent."""
        self._held = bytearray()  # by delivery tag, from 1
        self._ends: list[int] = []  # the last tag of each consumer
        self._bytes = 0

    @property
    def taken(self) -> int:
        return len(self._held)

    @property
    def mean_size(self) -> float:
        """Bytes of a body, 1 at least."""
        return max(1.0, self._bytes / max(1, self.taken))

    @property
    def any(self) -> bool:
        return 1 in self._held

    def take(self, delivery: Delivery) -> None:
        self._held.extend(bytes(delivery.delivery_tag - self.taken))  # Ctrl-C may have swallowed one
        self._held[-1] = 1
        self._bytes += len(delivery.body)
        self.present += 1

    def drop(self, tags: Sequence[int]) -> Iterator[tuple[int, bool]]:
        """Hold these no more. What to ack for that, and whether it stands for all before it."""
        for tag in tags:
            self._held[tag - 1] = 0
        kept = self._held.find(1) + 1  # 0: none is
        first = [tag for tag in tags if not kept or tag < kept]
        if first:
            yield max(first), True
        yield from ((tag, False) for tag in tags if kept and tag > kept)

    def close(self) -> None:
        """What comes from now on is another consumer's."""
        self._ends.append(len(self._held))
        self.present = 0

    def groups(self) -> Iterator[tuple[int, int]]:
        """What is held, in its order: the last tag of some that one consumer holds, and how many they are."""
        first = 0
        for end in self._ends:
            tags = [tag for tag, held in enumerate(self._held[first:end], first + 1) if held]
            for start in range(0, len(tags), IN_ORDER):
                group = tags[start : start + IN_ORDER]
                yield group[-1], len(group)
            first = end


def _nothing() -> None:
    """Nobody watches."""


def _takes_over_deaths(server: Mapping[str, Any]) -> bool:
    """RabbitMQ before 4.0. The embedded broker does too, but has no users whom it could tell apart."""
    major = str(server.get("version", "")).partition(".")[0]
    return server.get("product") == "RabbitMQ" and not (major.isdigit() and int(major) >= 4)


@contextmanager
def opened(app: Lightbus) -> Generator[DeadQueue]:
    """The app's dead-letter queue.

    Raises:
        errors.TopologyMissing: there is none: no worker of the app has run on this broker.
        errors.BrokerError: the broker cannot be used, or the connection was lost in between.
    """
    connection = app.broker.connect(f"lightbus {app.name} dead")
    try:
        queue = DeadQueue(app, connection)
        try:
            yield queue
        finally:
            with suppress(*LOST):  # then the broker gives them back
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
