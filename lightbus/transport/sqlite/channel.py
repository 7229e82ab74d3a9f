"""A channel of the embedded broker: publishes, consumes, settles and declares."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Protocol

import attrs
from amqp import exceptions as amqp_errors
from amqp.protocol import queue_declare_ok_t

from lightbus.transport import (
    Delivery,
    OnCancel,
    OnClosed,
    OnConfirm,
    OnDelivery,
    OnReturn,
    Properties,
    Publication,
    Takes,
)
from lightbus.transport.kombu_calls import KombuChannel, amqp_error, ignore
from lightbus.transport.sqlite.answers import not_for_streams, precondition_failed
from lightbus.transport.sqlite.deliveries import Claim
from lightbus.transport.sqlite.store import Outcome, Store
from lightbus.transport.sqlite.tables import decode_table
from lightbus.transport.sqlite.topology import Exchange, Queue

UNLIMITED = 1 << 30


@attrs.define(eq=False)
class Consumer:
    tag: str
    queue: Queue
    limit: int  # how many messages it may hold
    no_ack: bool
    on_delivery: OnDelivery
    on_cancel: OnCancel
    held: int = 0


class Owner(Protocol):
    """What a channel needs from its connection."""

    channels: dict[int, Channel]

    @property
    def connected(self) -> bool: ...

    def transaction(self) -> AbstractContextManager[None]:
        """A transaction that begins with the acks that are waiting to be stored."""
        ...

    def dispatch_later(self, event: Callable[[], object]) -> None:
        """Call it in the next `drain_events`."""
        ...

    def look_again(self) -> None:
        """Look for messages to deliver: there is a new consumer, or room for more."""
        ...


class Channel(KombuChannel):
    """A channel; see `lightbus.transport.Channel`.

    A little over 300 lines: a third of them are the signatures of AMQP's declarations, one line of code each.
    """

    counts_bytes = True

    def __init__(self, connection: Owner, store: Store, number: int) -> None:
        self.connection = connection
        self.channel_id = number
        self.consumers: dict[str, Consumer] = {}
        self.events: defaultdict[str, set[Callable[..., object]]] = defaultdict(set)  # kombu's listeners
        self.on_ack: OnConfirm = ignore
        self.on_nack: OnConfirm = ignore
        self.on_return: OnReturn = ignore
        self.on_closed: OnClosed | None = None
        self.takes: Takes | None = None
        self._store = store
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
        """Requeue what is not settled, and remove the consumers."""
        if not self._is_open or not self.connection.connected:
            return
        entries = [entry for entry, _, _ in self._unacked.values()]
        with self.connection.transaction():
            self._store.deliveries.requeue(entries)
            for tag in self.consumers:
                self._store.declarations.remove_consumer(self._global_tag(tag))
        self._unacked.clear()
        self.consumers.clear()
        del self.connection.channels[self.channel_id]

    @contextmanager
    def _transaction(self) -> Generator[None]:
        """A transaction of the connection. An error of the channel closes the channel, as in AMQP."""
        try:
            with self.connection.transaction():
                yield
        except amqp_errors.ChannelError:
            self.close()
            raise

    # --- publishing -----------------------------------------------------------------------

    def confirm_select(self, nowait: bool = False) -> None:
        """Count publications from 1, and confirm each once it is on the disk."""
        self._store.session.file.sync_on_commit()
        self._confirms = True

    def publish(self, publications: Sequence[Publication]) -> None:
        """Store all in one transaction. After an error, none is stored."""
        with self._transaction():
            outcomes = self._store.publish(publications)
        for publication, outcome in zip(publications, outcomes, strict=True):
            if outcome is Outcome.UNROUTED and publication.mandatory:
                self._return_later(publication.properties.get("message_id", ""))
        if self._confirms:
            self._store.session.file.check_place()  # what a deleted file has received is lost
            self._confirm(outcomes)

    def publish_nowait(self, publications: Sequence[Publication]) -> bool:
        """Always False: a transaction may wait for the disk, and the file belongs to the owner's thread."""
        return False

    # The callbacks are read when they are called: they may be set after the publish.

    def _return_later(self, message_id: str) -> None:
        self.connection.dispatch_later(lambda: self.on_return(message_id))

    def _confirm(self, outcomes: Sequence[Outcome]) -> None:
        for refused, group in itertools.groupby(outcomes, key=lambda outcome: outcome is Outcome.REFUSED):
            count = len(list(group))
            self._published += count
            self._confirm_later(refused, self._published, count > 1)

    def _confirm_later(self, refused: bool, tag: int, multiple: bool) -> None:
        if refused:
            self.connection.dispatch_later(lambda: self.on_nack(tag, multiple))
        else:
            self.connection.dispatch_later(lambda: self.on_ack(tag, multiple))

    # --- consuming ------------------------------------------------------------------------

    def basic_qos(self, prefetch_size: int, prefetch_count: int, a_global: bool) -> None:
        """Limit what each *new* consumer may hold, or with `a_global` all of the channel together. 0 means no limit.

        `prefetch_size` limits the bytes that all consumers of the channel hold together, existing ones too: at or over
        it, they get no more.
        """
        self._bytes_limit = prefetch_size or math.inf
        if a_global:
            self._channel_limit = prefetch_count or UNLIMITED
        else:
            self._consumer_limit = prefetch_count or UNLIMITED

    def consume(
        self,
        queue: str,
        on_delivery: OnDelivery,
        *,
        on_cancel: OnCancel,
        no_ack: bool = False,
        exclusive: bool = False,
        consumer_tag: str = "",
    ) -> str:
        """Subscribe and return the consumer tag."""
        tag = consumer_tag or f"ctag{self.channel_id}.{next(self._tags)}"
        if tag in self.consumers:
            raise amqp_error(amqp_errors.NotAllowed, f"NOT_ALLOWED - attempt to reuse consumer tag '{tag}'")
        with self._transaction():
            found = self._queue_of_messages(queue, "basic.consume")
            self._store.declarations.add_consumer(self._global_tag(tag), found, exclusive)
        limit = UNLIMITED if no_ack else self._consumer_limit
        self.consumers[tag] = Consumer(tag, found, limit, no_ack, on_delivery, on_cancel)
        self.connection.look_again()
        return tag

    def _global_tag(self, tag: str) -> str:
        return f"{self.channel_id}/{tag}"

    def basic_cancel(self, consumer_tag: str, nowait: bool = False) -> None:
        """Remove a consumer. What it holds stays with the channel."""
        if self.consumers.pop(consumer_tag, None) is not None:
            with self._transaction():
                self._store.declarations.remove_consumer(self._global_tag(consumer_tag))

    def cancel_orphan(self, consumer: Consumer) -> None:
        """Its queue was deleted."""
        if self.consumers.get(consumer.tag) is consumer:  # otherwise, a callback has cancelled it or closed the channel
            del self.consumers[consumer.tag]
            consumer.on_cancel(consumer.tag)

    def credit(self, consumer: Consumer) -> int:
        """How many more messages it may get."""
        if consumer.no_ack:
            return consumer.limit
        if self.bytes_left <= 0:
            return 0
        return min(consumer.limit - consumer.held, self._channel_limit - len(self._unacked))

    @property
    def bytes_left(self) -> float:
        """How many more bytes its consumers may hold."""
        return self._bytes_limit - self._bytes_held

    def deliver(self, consumer: Consumer, claims: Sequence[Claim]) -> None:
        for claim in claims:
            delivery = self._delivery(claim, None if consumer.no_ack else (claim.id, consumer))
            self.connection.dispatch_later(partial(self._hand_over, consumer, delivery))

    def _hand_over(self, consumer: Consumer, delivery: Delivery) -> None:
        if self._is_open:  # otherwise, a callback has closed it, and the message is back in its queue
            consumer.on_delivery(delivery)

    @property
    def _is_open(self) -> bool:
        return self.connection.channels.get(self.channel_id) is self

    def _delivery(self, claim: Claim, unacked: tuple[int, Consumer | None] | None) -> Delivery:
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
        """Take one message, which must be settled. None: the queue is empty."""
        return self.take(queue, no_ack=False)

    def take(self, queue: str, *, no_ack: bool) -> Delivery | None:
        """`get`; with `no_ack`, the message is settled at once."""
        expired = False
        claims: list[Claim] = []
        while not expired:
            with self._transaction():
                found = self._queue_of_messages(queue, "basic.get")
                expired = self._store.dead_letters.expire()
                if expired:
                    claims = self._store.deliveries.claim(found, 1, settled=no_ack)
        return self._delivery(claims[0], None if no_ack else (claims[0].id, None)) if claims else None

    def _queue_of_messages(self, name: str, method: str) -> Queue:
        """
        Raises:
            amqp.exceptions.AMQPNotImplementedError: it is a stream, which is read with `read_stream` only.
        """
        found = self._store.declarations.queue(name)
        if found.is_stream:
            raise not_for_streams(method, name)
        return found

    def read_stream(self, queue: str, on_delivery: OnDelivery, *, seconds: float) -> None:
        """Read all messages that a stream has now, in one transaction."""
        with self._transaction():
            while not self._store.dead_letters.expire():
                pass
            entries = self._store.entries.all_ready(self._store.declarations.queue(queue))
        for number, (exchange, routing_key, properties, body) in enumerate(entries, 1):
            on_delivery(
                Delivery(self, number, False, exchange, routing_key, partial(_read_properties, properties, 0), body)
            )

    def first_properties(self, queue: str) -> Properties | None:
        """Those of the first ready message."""
        with self._transaction():
            self._store.dead_letters.expire()
            properties = self._store.entries.first_ready(self._store.declarations.queue(queue))
        return None if properties is None else decode_table(properties)

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
        """Settle. The ack is stored with the next transaction, in the next `drain_events` at the latest."""
        self._acks += self._settle(delivery_tag, multiple)

    def basic_reject(self, delivery_tag: int, requeue: bool) -> None:
        self.basic_nack(delivery_tag, requeue=requeue)

    def basic_nack(self, delivery_tag: int, multiple: bool = False, requeue: bool = True) -> None:
        """Requeue to the old place, or dead-letter."""
        entries = self._settle(delivery_tag, multiple)
        with self._transaction():
            if requeue:
                self._store.deliveries.requeue(entries)
            else:
                self._store.deliveries.reject(entries)

    def basic_recover(self, requeue: bool = True) -> None:
        """Requeue everything that is not settled."""
        if self._unacked:
            self.basic_nack(0, multiple=True)

    def _settle(self, delivery_tag: int, multiple: bool) -> list[int]:
        """Remove the tags from the unsettled ones, and return their entries."""
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
        # The dict is in order, since tags only grow. 0 means all.
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
        with self._transaction():
            if passive:
                self._store.declarations.exchange(exchange)
                return
            wanted = Exchange(exchange, type, durable, auto_delete, internal, dict(arguments or {}))
            self._store.declarations.declare_exchange(wanted)

    def exchange_delete(self, exchange: str, if_unused: bool = False, nowait: bool = False) -> None:
        with self._transaction():
            self._store.declarations.delete_exchange(exchange, if_unused)

    def exchange_bind(
        self,
        destination: str,
        source: str = "",
        routing_key: str = "",
        nowait: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        with self._transaction():
            self._store.declarations.bind("exchange", destination, source, routing_key, arguments)

    def exchange_unbind(
        self,
        destination: str,
        source: str = "",
        routing_key: str = "",
        nowait: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        with self._transaction():
            self._store.declarations.unbind("exchange", destination, source, routing_key, arguments)

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
        with self._transaction():
            if not passive:
                queue = self._store.declarations.declare_queue(queue, durable, exclusive, auto_delete, arguments or {})
            self._store.dead_letters.expire()
            return queue_declare_ok_t(queue, *self._store.declarations.count(self._store.declarations.queue(queue)))

    def queue_bind(
        self,
        queue: str,
        exchange: str = "",
        routing_key: str = "",
        nowait: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        with self._transaction():
            self._store.declarations.bind("queue", queue, exchange, routing_key, arguments)

    def queue_unbind(
        self,
        queue: str,
        exchange: str,
        routing_key: str = "",
        nowait: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        with self._transaction():
            self._store.declarations.unbind("queue", queue, exchange, routing_key, arguments)

    def queue_purge(self, queue: str = "", nowait: bool = False) -> int:
        """Returns how many messages were deleted."""
        with self._transaction():
            return self._store.entries.purge(self._queue_of_messages(queue, "queue.purge"))

    def queue_delete(
        self, queue: str = "", if_unused: bool = False, if_empty: bool = False, nowait: bool = False
    ) -> int:
        """Returns how many messages were deleted with it."""
        with self._transaction():
            return self._store.declarations.delete_queue(queue, if_unused, if_empty)


def _read_properties(data: bytes, returns: int) -> Properties:
    properties = decode_table(data)
    if returns:
        properties["headers"] = {**(properties.get("headers") or {}), "x-delivery-count": returns}
    return properties
