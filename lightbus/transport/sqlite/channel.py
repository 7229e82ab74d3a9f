"""The embedded broker: a kombu transport that keeps the AMQP model in an SQLite file.

    kombu.Connection("sqlite:///bus.db", transport=Transport)

| URL | the file |
|---|---|
| `sqlite:///bus.db` | relative to the working directory in which the app was made: three slashes |
| `sqlite:////var/lib/billing/bus.db` | absolute: four slashes |
| `sqlite://` | one for the user, in the platform's folder for state |
| `memory://`, `memory://name` | none that lasts: shared by all connections of this process, gone with it |

Processes share the file by SQLite's own locks, so it belongs on a local disk. Beside it lies the folder
`bus.db.clients` (see `wake_pipe`). Nothing runs in the background: a client in `drain_events`
also expires messages and finds the clients that died.

It differs from RabbitMQ where nobody should notice: a message expires when its time has come, not only at
its queue's head; queues that are not durable last as long as the file (the broker is never restarted);
`x-expires`, `x-max-length-bytes` and priorities are accepted and ignored; an error in a batch undoes the whole
batch; a message that waits to be dead-lettered at least once moves on as soon as there is a way.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import amqp
import attrs
from amqp import exceptions as amqp_errors
from amqp.protocol import queue_declare_ok_t
from kombu import message
from kombu.transport import base

from lightbus import errors
from lightbus.transport import Delivery, Properties, Publication
from lightbus.transport.sqlite import store as store
from lightbus.transport.sqlite.answers import amqp_error, precondition_failed
from lightbus.transport.sqlite.place import forget_memory, locate
from lightbus.transport.sqlite.store import Outcome, Store
from lightbus.transport.sqlite.tables import decode_table
from lightbus.transport.sqlite.topology import Exchange, Queue
from lightbus.version import __version__

__all__ = ["Channel", "Connection", "TestControl", "Transport", "advance_clock", "forget_memory"]

TICK = 0.5  # seconds between looks for dead clients
SHARED_FOR = 0.1
"""Seconds for which messages are left to the other clients that consume a queue. After that, any client may claim them:
the others have no room, or do not run."""
UNLIMITED = 1 << 30


def advance_clock(url: str, seconds: float) -> None:
    """Move the clock of a `memory://` broker forward, for all its connections: what is to expire does so now.

    Raises:
        ValueError: the broker is not in memory.
    """
    place = locate(url)
    if not place.in_memory:
        raise ValueError(f"The clock of {url!r} cannot be moved: only that of a memory:// broker can.")
    client = Store(place)
    try:
        client.advance_clock(seconds)
    finally:
        client.close([])


@attrs.frozen
class Holding:
    """What one queue holds."""

    queue: str
    ready: int
    unready: int
    """With consumers, or waiting for a way out."""
    due_in: float | None
    """Seconds until the first of them expires, by the broker's clock."""


class TestControl:
    """A test's hand on a `memory://` broker: its clock stands still but for `advance`. From any thread."""

    __test__ = False

    def __init__(self, url: str) -> None:
        place = locate(url)
        if not place.in_memory:
            raise ValueError(f"The clock of {url!r} cannot be stopped: only that of a memory:// broker can.")
        self._store = Store(place)
        self._lock = threading.Lock()
        self._store.stop_clock()

    def holdings(self) -> list[Holding]:
        """All that is in the queues, at one moment."""
        with self._lock:
            rows, now = self._store.holdings(), self._store.now()
        return [Holding(name, ready, unready, None if due is None else due - now) for name, ready, unready, due in rows]

    def advance(self, seconds: float) -> None:
        """Move the clock, and expire what is due then."""
        with self._lock:
            self._store.advance_clock(seconds)
            self._expire()

    def expire_early(self, queues: Sequence[str], seconds: float) -> None:
        """Let expire now what would expire in these queues within so many seconds. The clock does not move."""
        with self._lock:
            self._store.make_due(queues, self._store.now() + seconds)
            self._expire()

    def _expire(self) -> None:
        done = False
        while not done:
            with self._store.transaction():
                done = self._store.expire()

    def close(self) -> None:
        with self._lock:
            self._store.close([])


class Transport(base.Transport):
    """What kombu asks for: makes connections, and hands its calls on to them."""

    client: Any = None  # kombu's connection
    can_parse_url = True
    driver_type = "lightbus-sqlite"
    driver_name = "sqlite3"
    connection_errors: Any = amqp.Connection.connection_errors
    channel_errors: Any = amqp.Connection.channel_errors
    recoverable_connection_errors = amqp.Connection.recoverable_connection_errors
    recoverable_channel_errors = amqp.Connection.recoverable_channel_errors

    def establish_connection(self) -> Connection:
        connection = Connection(self.client.hostname)
        connection.client = self.client
        return connection

    def close_connection(self, connection: Connection) -> None:
        connection.client = None
        connection.close()

    def create_channel(self, connection: Connection) -> Channel:
        return connection.channel()

    def drain_events(self, connection: Connection, **kwargs: Any) -> None:
        connection.drain_events(**kwargs)

    def heartbeat_check(self, connection: Connection, rate: int = 2) -> None:
        connection.heartbeat_tick()

    def verify_connection(self, connection: Connection) -> Any:
        return connection.connected

    def driver_version(self) -> Any:
        return __version__

    def as_uri(self, uri: str, include_password: bool = False, mask: str = "**") -> str:
        return uri

    def _collect(self, connection: Connection | None) -> None:
        if connection is not None:
            connection.collect()


@attrs.define(eq=False)
class Consumer:
    tag: str
    queue: Queue
    limit: int  # how many messages it may hold
    no_ack: bool
    on_delivery: Callable[[Delivery], object]
    on_cancel: Callable[[str], object]
    held: int = 0


class Connection:
    """One client of the file. One thread owns it; only `interrupt` is for others."""

    blocked = False  # a full disk is an error here

    def __init__(self, url: str) -> None:
        self.client: Any = None  # kombu's connection
        self.reached: Any = None
        self.channels: dict[int, Channel] = {}
        self._numbers = itertools.count(1)
        self._store = Store(locate(url))
        self._open = True
        self._interrupted = False
        self._busy = False  # whether there was a transaction since the last tick
        self._outbox: deque[Callable[[], object]] = deque()  # what the next drain_events dispatches
        self._stale = True  # the file may have something for us that we have not looked at
        self._next_due: float | None = None
        self._shared_until = math.inf
        """When (monotonic) this client claims what it has left to others; infinity where there is none."""
        self._next_tick = time.monotonic() + TICK

    @property
    def server_properties(self) -> Mapping[str, Any]:
        return {"product": "Lightbus embedded broker", "version": __version__}

    @property
    def connected(self) -> bool:
        return self._open and self._store.is_open

    def channel(self) -> Channel:
        self._check_open()
        number = next(self._numbers)
        self.channels[number] = channel = Channel(self, self._store, number)
        return channel

    def interrupt(self) -> None:
        """Make the present or the next `drain_events` return at once. From any thread, at any time."""
        self._interrupted = True
        self._store.wake_pipe.ring()

    def watched(self) -> None:
        """No: a transaction may wait for the disk, and time alone makes things ready."""

    def heartbeat_tick(self, rate: int = 2) -> None:
        """Nothing to do: the kernel tells who is alive."""

    def close(self) -> None:
        """Settle what was acked, and leave the rest to others."""
        if not self._open:
            return
        self._open = False
        try:
            self._store.close([entry for channel in self.channels.values() for entry in channel.take_acks()])
        finally:
            self.channels.clear()

    def collect(self) -> None:
        """Drop the connection; what it held returns to its queues once others find it dead."""
        self._open = False
        if self._store.is_open and any(channel.has_acks for channel in self.channels.values()):
            # An ack that is lost makes a duplicate: no reason to fail here.
            with contextlib.suppress(errors.BrokerError, amqp_errors.AMQPError, OSError), self.transaction():
                pass
        self._store.drop()
        self.channels.clear()

    def _check_open(self) -> None:
        if not self.connected:
            raise amqp_error(
                amqp_errors.RecoverableConnectionError,
                "This connection to the embedded broker is closed, or belongs to the process that this one was "
                "forked from. Open another.",
            )

    # --- transactions ---------------------------------------------------------------------

    @contextlib.contextmanager
    def transaction(self) -> Generator[None]:
        """A transaction that begins with the acks that are waiting to be stored."""
        acks = [(channel, channel.take_acks()) for channel in self.channels.values()]
        self._busy = True
        try:
            with self._store.transaction():
                self._store.ack([entry for _, entries in acks for entry in entries])
                yield
        except BaseException:
            for channel, entries in acks:
                channel.put_acks_back(entries)
            raise

    # --- events ---------------------------------------------------------------------------

    def dispatch_later(self, event: Callable[[], object]) -> None:
        """Have the next `drain_events` call it."""
        self._outbox.append(event)

    def look_again(self) -> None:
        """There may be something to deliver: a new consumer, or room for more."""
        self._stale = True

    def drain_events(self, timeout: float | None = None) -> None:
        """Wait up to `timeout` seconds for something to arrive, then dispatch all that has arrived.

        Raises:
            TimeoutError: nothing arrived in time.
            BrokerFileError: the file cannot be used any more.
            amqp.exceptions.AMQPError: the connection is closed, or the file was locked for too long.
        """
        self._check_open()
        deadline = None if timeout is None else time.monotonic() + timeout
        seconds = 0.0
        while True:
            if self._store.wake_pipe.wait(seconds):
                self._stale = True
            self._look()
            if self._dispatch() or self._was_interrupted():
                return
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                raise TimeoutError("Nothing arrived from the embedded broker in time.")
            seconds = self._seconds_to_wait(now, deadline)

    def _was_interrupted(self) -> bool:
        # Cleared only where it was seen: another thread may set it between the two.
        if self._interrupted:
            self._interrupted = False
            return True
        return False

    def _dispatch(self) -> bool:
        # Only what is there now: a callback that publishes must not keep us here for ever.
        waiting = len(self._outbox)
        for _ in range(waiting):
            self._outbox.popleft()()
        return waiting > 0

    def _seconds_to_wait(self, now: float, deadline: float | None) -> float:
        if self._stale:
            return 0.0
        until = min(self._next_tick, self._shared_until)
        if deadline is not None:
            until = min(until, deadline)
        seconds = until - now
        if self._next_due is not None:
            seconds = min(seconds, self._next_due - self._store.now())
        return max(seconds, 0.0)

    def _look(self) -> None:
        """Store acks, expire what is due and claim what is ready: in one transaction, and only where there is any."""
        self._tick()
        due = self._next_due is not None and self._next_due <= self._store.now()
        acks = any(channel.has_acks for channel in self.channels.values())
        if not (self._stale or due or acks) and time.monotonic() < self._shared_until:
            return
        self._stale = False
        self._store.refresh()
        self._cancel_orphans()
        self._next_due = self._store.next_due()
        due = self._next_due is not None and self._next_due <= self._store.now()
        if acks or due or any(self._store.has_ready(consumer.queue) for _, consumer in self._hungry()):
            with self.transaction():
                expired = self._store.expire()
                claims = self._claim() if expired else []
            for channel, consumer, claimed in claims:
                channel.deliver(consumer, claimed)
            self._cancel_orphans()
            self._next_due = self._store.next_due()
        else:
            self._shared_until = math.inf

    def _tick(self) -> None:
        now = time.monotonic()
        if now >= self._next_tick:
            self._next_tick = now + TICK
            self._store.check_place()
            self._store.watch_clock()
            self._store.reap()
            if not self._busy:
                self._store.give_back()
            self._busy = False
            self._stale = True  # in case a client died between its commit and its ring

    def _hungry(self) -> Iterator[tuple[Channel, Consumer]]:
        for channel in self.channels.values():
            for consumer in channel.consumers.values():
                if channel.credit(consumer) > 0:
                    yield channel, consumer

    def _claim(self) -> list[tuple[Channel, Consumer, list[store.Claim]]]:
        claims: list[tuple[Channel, Consumer, list[store.Claim]]] = []
        now = time.monotonic()
        for_any = now >= self._shared_until
        left_to_others = False
        for channel, consumer in self._hungry():
            credit = channel.credit(consumer)
            share = credit if for_any or consumer.no_ack else self._store.fair_share(consumer.queue, credit)
            room = channel.bytes_left
            claimed = self._store.claim(consumer.queue, share, settled=consumer.no_ack, room=room) if share else []
            if claimed:
                claims.append((channel, consumer, claimed))
                self._stale = self._stale or len(claimed) < share
            if share < credit:
                left_to_others = left_to_others or self._store.has_ready(consumer.queue)
        if not left_to_others:
            self._shared_until = math.inf
        elif for_any or self._shared_until == math.inf:
            self._shared_until = now + SHARED_FOR
        return claims

    def _cancel_orphans(self) -> None:
        known = self._store.topology.queues_by_id
        for channel in list(self.channels.values()):
            for consumer in list(channel.consumers.values()):
                queue = known.get(consumer.queue.id)
                if queue is None:
                    del channel.consumers[consumer.tag]
                    self.dispatch_later(partial(consumer.on_cancel, consumer.tag))
                else:
                    consumer.queue = queue


def _ignore(*_: Any) -> None:
    """Where nobody has asked for confirms or returns."""


class Channel(base.StdChannel):
    """A channel: Lightbus' own methods (see `lightbus.transport.Channel`), and kombu's."""

    Message = message.Message
    counts_bytes = True
    no_ack_consumers = None

    def __init__(self, connection: Connection, file: Store, number: int) -> None:
        self.connection = connection
        self.channel_id = number
        self.consumers: dict[str, Consumer] = {}
        self.events: defaultdict[str, set[Callable[..., object]]] = defaultdict(set)  # kombu's listeners
        self.on_ack: Callable[[int, bool], None] = _ignore
        self.on_nack: Callable[[int, bool], None] = _ignore
        self.on_return: Callable[[str], None] = _ignore
        self.on_closed: Callable[[Exception], object] | None = None
        self.takes: Callable[[int, int], bool] | None = None
        self._store = file
        self._confirms = False
        self._published = 0
        self._delivered = 0
        self._tags = itertools.count(1)
        self._consumer_limit = UNLIMITED
        self._channel_limit = UNLIMITED
        self._bytes_limit, self._bytes_held = math.inf, 0
        self._unacked: dict[int, tuple[int, Consumer | None, int]] = {}  # delivery tag -> (entry, consumer, size)
        self._acks: list[int] = []

    def close(self) -> None:
        """Return what is not acked to its queues."""
        if not self._is_open or not self.connection.connected:
            return
        entries = [entry for entry, _, _ in self._unacked.values()]
        with self.connection.transaction():
            self._store.requeue(entries)
            for tag in self.consumers:
                self._store.remove_consumer(self._global_tag(tag))
        self._unacked.clear()
        self.consumers.clear()
        del self.connection.channels[self.channel_id]

    # --- publishing -----------------------------------------------------------------------

    def confirm_select(self, nowait: bool = False) -> None:
        """Count publications from 1, and confirm each once it is on the disk."""
        self._store.sync_on_commit()
        self._confirms = True

    def publish(self, publications: Sequence[Publication]) -> None:
        """Store all in one transaction: all of them, or after an error none."""
        with self.connection.transaction():
            outcomes = self._store.publish(publications)
        for publication, outcome in zip(publications, outcomes, strict=True):
            if outcome is Outcome.UNROUTED and publication.mandatory:
                self._later("on_return", publication.properties.get("message_id", ""))
        if self._confirms:
            self._store.check_place()  # what a deleted file has got is not kept
            self._confirm(outcomes)

    def publish_nowait(self, publications: Sequence[Publication]) -> bool:
        """Never: a transaction may wait for the disk, and SQLite's connection is its owner's."""
        return False

    def _confirm(self, outcomes: Sequence[Outcome]) -> None:
        for refused, group in itertools.groupby(outcomes, key=lambda outcome: outcome is Outcome.REFUSED):
            count = len(list(group))
            self._published += count
            self._later("on_nack" if refused else "on_ack", self._published, count > 1)

    def _later(self, callback: str, *arguments: Any) -> None:
        # Looked up when it is called: it may be set after the publish.
        self.connection.dispatch_later(lambda: getattr(self, callback)(*arguments))

    # --- consuming ------------------------------------------------------------------------

    def basic_qos(self, prefetch_size: int, prefetch_count: int, a_global: bool) -> None:
        """Limit what each *new* consumer may hold, or with `a_global` all of the channel together. 0 is no limit.

        Where the channel's consumers hold `prefetch_size` bytes, they get no more: for present ones too, all together.
        """
        self._bytes_limit = prefetch_size or math.inf
        if a_global:
            self._channel_limit = prefetch_count or UNLIMITED
        else:
            self._consumer_limit = prefetch_count or UNLIMITED

    def consume(
        self,
        queue: str,
        on_delivery: Callable[[Delivery], object],
        *,
        on_cancel: Callable[[str], object],
        no_ack: bool = False,
        exclusive: bool = False,
        consumer_tag: str = "",
    ) -> str:
        """Subscribe and return the consumer tag."""
        tag = consumer_tag or f"ctag{self.channel_id}.{next(self._tags)}"
        if tag in self.consumers:
            raise amqp_error(amqp_errors.NotAllowed, f"NOT_ALLOWED - attempt to reuse consumer tag '{tag}'")
        with self.connection.transaction():
            found = self._store.queue(queue)
            self._store.add_consumer(self._global_tag(tag), found, exclusive)
        limit = UNLIMITED if no_ack else self._consumer_limit
        self.consumers[tag] = Consumer(tag, found, limit, no_ack, on_delivery, on_cancel)
        self.connection.look_again()
        return tag

    def _global_tag(self, tag: str) -> str:
        return f"{self.channel_id}/{tag}"

    def basic_cancel(self, consumer_tag: str, nowait: bool = False) -> None:
        """End a subscription. What it holds stays with the channel."""
        if self.consumers.pop(consumer_tag, None) is not None:
            with self.connection.transaction():
                self._store.remove_consumer(self._global_tag(consumer_tag))

    def credit(self, consumer: Consumer) -> int:
        """How many more messages it may be given."""
        if consumer.no_ack:
            return consumer.limit
        if self.bytes_left <= 0:
            return 0
        return min(consumer.limit - consumer.held, self._channel_limit - len(self._unacked))

    @property
    def bytes_left(self) -> float:
        """How many bytes more its consumers may hold."""
        return self._bytes_limit - self._bytes_held

    def deliver(self, consumer: Consumer, claims: Sequence[store.Claim]) -> None:
        for claim in claims:
            delivery = self._delivery(claim, None if consumer.no_ack else (claim.id, consumer))
            self.connection.dispatch_later(partial(self._hand_over, consumer, delivery))

    def _hand_over(self, consumer: Consumer, delivery: Delivery) -> None:
        if self._is_open:  # else a callback has just closed it, and the message is back in its queue
            consumer.on_delivery(delivery)

    @property
    def _is_open(self) -> bool:
        return self.connection.channels.get(self.channel_id) is self

    def _delivery(self, claim: store.Claim, unacked: tuple[int, Consumer | None] | None) -> Delivery:
        self._delivered += 1
        if unacked is not None:
            self._unacked[self._delivered] = (*unacked, len(claim.body))
            if unacked[1] is not None:
                unacked[1].held += 1
                self._bytes_held += len(claim.body)
        return Delivery(
            self,
            self._delivered,
            claim.returns > 0,
            claim.exchange,
            claim.routing_key,
            partial(_read_properties, claim.properties, claim.returns),
            claim.body,
        )

    def get(self, queue: str) -> Delivery | None:
        """Take one message that is to be acked, or None where the queue is empty."""
        return self._get(queue, no_ack=False)

    def _get(self, queue: str, no_ack: bool) -> Delivery | None:
        expired = False
        claims: list[store.Claim] = []
        while not expired:
            with self.connection.transaction():
                found = self._store.queue(queue)
                expired = self._store.expire()
                if expired:
                    claims = self._store.claim(found, 1, settled=no_ack)
        return self._delivery(claims[0], None if no_ack else (claims[0].id, None)) if claims else None

    # --- settling -------------------------------------------------------------------------

    @property
    def has_acks(self) -> bool:
        return bool(self._acks)

    def take_acks(self) -> list[int]:
        acks, self._acks = self._acks, []
        return acks

    def put_acks_back(self, acks: list[int]) -> None:
        self._acks = acks + self._acks

    def basic_ack(self, delivery_tag: int, multiple: bool = False) -> None:
        """Settle. It is stored with the next transaction, at the latest in the next `drain_events`."""
        self._acks += self._settle(delivery_tag, multiple)

    def basic_reject(self, delivery_tag: int, requeue: bool) -> None:
        self.basic_nack(delivery_tag, requeue=requeue)

    def basic_nack(self, delivery_tag: int, multiple: bool = False, requeue: bool = True) -> None:
        """Requeue, in the old place, or dead-letter."""
        entries = self._settle(delivery_tag, multiple)
        with self.connection.transaction():
            if requeue:
                self._store.requeue(entries)
            else:
                self._store.reject(entries)

    def basic_recover(self, requeue: bool = True) -> None:
        """Return everything that is not acked to its queues."""
        if self._unacked:
            self.basic_nack(0, multiple=True)

    def _settle(self, delivery_tag: int, multiple: bool) -> list[int]:
        """The entries that a settlement is about, which are unacked no more."""
        tags = [delivery_tag] if not multiple else self._tags_up_to(delivery_tag)
        if delivery_tag not in self._unacked and not (multiple and delivery_tag == 0):
            raise precondition_failed(f"unknown delivery tag {delivery_tag}")
        entries: list[int] = []
        for tag in tags:
            entry, consumer, size = self._unacked.pop(tag)
            entries.append(entry)
            if consumer is not None:
                consumer.held -= 1
                self._bytes_held -= size
        self.connection.look_again()
        return entries

    def _tags_up_to(self, last: int) -> list[int]:
        # In order, since tags only grow; 0 stands for all.
        return list(itertools.takewhile(lambda tag: not last or tag <= last, self._unacked))

    # --- exchanges, queues, bindings ------------------------------------------------------

    def exchange_declare(
        self,
        exchange: str,
        type: str,
        passive: bool = False,
        durable: bool = False,
        auto_delete: bool = True,
        nowait: bool = False,
        arguments: Mapping[str, Any] | None = None,
        *,
        internal: bool = False,
    ) -> None:
        with self.connection.transaction():
            if passive:
                self._store.exchange(exchange)
                return
            wanted = Exchange(exchange, type, durable, auto_delete, internal, dict(arguments or {}))
            self._store.declare_exchange(wanted)

    def exchange_delete(self, exchange: str, if_unused: bool = False, nowait: bool = False) -> None:
        with self.connection.transaction():
            self._store.delete_exchange(exchange, if_unused)

    def exchange_bind(
        self,
        destination: str,
        source: str = "",
        routing_key: str = "",
        nowait: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        with self.connection.transaction():
            self._store.bind("exchange", destination, source, routing_key, arguments)

    def exchange_unbind(
        self,
        destination: str,
        source: str = "",
        routing_key: str = "",
        nowait: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        with self.connection.transaction():
            self._store.unbind("exchange", destination, source, routing_key, arguments)

    def queue_declare(
        self,
        queue: str = "",
        passive: bool = False,
        durable: bool = False,
        exclusive: bool = False,
        auto_delete: bool = True,
        nowait: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> queue_declare_ok_t:
        """Returns (queue, message_count, consumer_count); only ready messages count."""
        with self.connection.transaction():
            if not passive:
                queue = self._store.declare_queue(queue, durable, exclusive, auto_delete, arguments or {})
            self._store.expire()
            return queue_declare_ok_t(queue, *self._store.count(self._store.queue(queue)))

    def queue_bind(
        self,
        queue: str,
        exchange: str = "",
        routing_key: str = "",
        nowait: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        with self.connection.transaction():
            self._store.bind("queue", queue, exchange, routing_key, arguments)

    def queue_unbind(
        self,
        queue: str,
        exchange: str,
        routing_key: str = "",
        nowait: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        with self.connection.transaction():
            self._store.unbind("queue", queue, exchange, routing_key, arguments)

    def queue_purge(self, queue: str = "", nowait: bool = False) -> int:
        """Returns how many messages were deleted."""
        with self.connection.transaction():
            return self._store.purge(self._store.queue(queue))

    def queue_delete(
        self, queue: str = "", if_unused: bool = False, if_empty: bool = False, nowait: bool = False
    ) -> int:
        """Returns how many messages were deleted with it."""
        with self.connection.transaction():
            return self._store.delete_queue(queue, if_unused, if_empty)

    # --- what only kombu calls ------------------------------------------------------------

    def prepare_queue_arguments(self, arguments: Mapping[str, Any], **options: Any) -> Mapping[str, Any]:
        return cast("Mapping[str, Any]", base.to_rabbitmq_queue_arguments(arguments, **options))

    def prepare_message(
        self,
        body: bytes | str,
        priority: int | None = None,
        content_type: str | None = None,
        content_encoding: str | None = None,
        headers: Mapping[str, Any] | None = None,
        properties: Mapping[str, Any] | None = None,
    ) -> Publication:
        given = {
            "priority": priority,
            "content_type": content_type,
            "content_encoding": content_encoding,
            "headers": dict(headers or {}),
            **(properties or {}),
        }
        data = body.encode() if isinstance(body, str) else body
        return Publication("", "", data, {key: value for key, value in given.items() if value is not None}, False)

    def basic_publish(
        self,
        publication: Publication,
        exchange: str = "",
        routing_key: str = "",
        mandatory: bool = False,
        immediate: bool = False,
        **_: Any,
    ) -> None:
        self.publish(
            [attrs.evolve(publication, exchange=exchange, routing_key=routing_key or "", mandatory=bool(mandatory))]
        )

    def basic_consume(
        self,
        queue: str = "",
        consumer_tag: str = "",
        no_ack: bool = False,
        exclusive: bool = False,
        callback: Callable[[message.Message], object] = _ignore,
        on_cancel: Callable[[str], object] | None = None,
        **_: Any,
    ) -> str:
        return self.consume(
            queue,
            lambda delivery: callback(self._message(delivery)),
            on_cancel=on_cancel or _cancelled,
            no_ack=bool(no_ack),
            exclusive=exclusive,
            consumer_tag=consumer_tag,
        )

    def basic_get(self, queue: str = "", no_ack: bool = False) -> message.Message | None:
        delivery = self._get(queue, no_ack=bool(no_ack))
        return None if delivery is None else self._message(delivery)

    def message_to_python(self, raw_message: message.Message) -> message.Message:
        return raw_message

    def _message(self, delivery: Delivery) -> message.Message:
        properties = delivery.properties
        new: Any = message.Message  # untyped
        made: message.Message = new(
            body=delivery.body,
            delivery_tag=delivery.delivery_tag,
            content_type=properties.get("content_type"),
            content_encoding=properties.get("content_encoding"),
            headers=properties.get("headers"),
            properties=properties,
            delivery_info={
                "exchange": delivery.exchange,
                "routing_key": delivery.routing_key,
                "redelivered": delivery.redelivered,
                "delivery_tag": delivery.delivery_tag,
            },
            channel=self,
        )
        return made

    def flow(self, active: bool) -> None:
        """RabbitMQ has no such flow either."""
        if not active:
            raise amqp_error(amqp_errors.AMQPNotImplementedError, "NOT_IMPLEMENTED - active=false")


def _cancelled(consumer_tag: str) -> None:
    raise amqp_error(amqp_errors.ConsumerCancelled, consumer_tag)


def _read_properties(data: bytes, returns: int) -> Properties:
    properties = decode_table(data)
    if returns:
        properties["headers"] = {**(properties.get("headers") or {}), "x-delivery-count": returns}
    return properties
