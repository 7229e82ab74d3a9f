"""A channel of a connection to Artemis: publishes, consumes, settles and declares. All share one AMQP 1.0 session."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import attrs
from amqp import exceptions as amqp_errors
from amqp.protocol import queue_declare_ok_t
from proton import Condition

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
    Unencodable,
)
from lightbus.transport.activemq import answers, message, names, selector
from lightbus.transport.activemq.declarations import Declarations
from lightbus.transport.activemq.engine import Engine
from lightbus.transport.activemq.links import (
    ACCEPTED,
    REJECTED,
    RELEASED,
    UNLIMITED,
    Consumer,
    Incoming,
    Outgoing,
    Sent,
    Transfer,
    settle,
    settle_as_failed,
)
from lightbus.transport.activemq.transactions import Transaction, Transactions, enlist, is_enlisted, leave_to
from lightbus.transport.kombu_calls import KombuChannel, ignore

BEGINNING = 200
"""Messages that may be what crashed the worker before: the most that it held, with the default prefetch."""
OPERATION_TIMEOUT = 10.0
"""Seconds for a request and its answer."""
CREDIT_WAIT = 2.0
"""Seconds that a publication waits for the credit of a new link."""
LARGE = 131072
"""Bytes of a body from which `takes` is asked."""
DRAIN_AGAIN = 0.25
"""Seconds after which a drain without an answer is repeated."""
TRIES = 10
"""Drains that find nothing, after which a queue counts as empty though the broker counts messages in it."""
BROWSED = 500
"""Messages of the catalogue that are asked for at once."""


class Owner(Protocol):
    """What a channel needs from its connection."""

    channels: dict[int, Channel]
    declarations: Declarations
    engine: Engine
    transactions: Transactions

    @property
    def connected(self) -> bool: ...

    @property
    def links(self) -> dict[str, Incoming | Outgoing]: ...

    def link_name(self, what: str) -> str: ...

    def flush(self) -> None: ...

    def wait_for(self, is_over: Callable[[], bool], what: str, seconds: float) -> None: ...

    def dispatch_later(self, callback: Callable[[], object]) -> None: ...

    def dispatch(self) -> bool: ...


@attrs.frozen
class _Target:
    """Where a publication goes."""

    address: str
    capability: str = "topic"
    subject: str | None = None
    """Instead of the routing key."""
    ttl: int | None = None
    delay: int | None = None
    """Both in milliseconds."""


@attrs.define(eq=False)
class _Held:
    """A message that is delivered and not settled."""

    transfer: Transfer
    link: Incoming
    consumer: Consumer | None
    guarded: message.Received | None = None
    """What to acknowledge in a transaction before it is handed over: see `transactions`."""
    transaction: Transaction | None = None

    @property
    def is_ready(self) -> bool:
        """Whether it may be handed over."""
        return self.guarded is None or (self.transaction is not None and is_enlisted(self.transfer))


class Channel(KombuChannel):
    """A channel; see `lightbus.transport.Channel`.

    Over 300 lines: a third of them are the signatures of AMQP's declarations.
    """

    counts_bytes = False

    def __init__(self, connection: Owner, number: int) -> None:
        self.connection = connection
        self.channel_id = number
        self.on_ack: OnConfirm = ignore
        self.on_nack: OnConfirm = ignore
        self.on_return: OnReturn = ignore
        self.on_closed: OnClosed | None = None
        self.takes: Takes | None = None
        self._error: Exception | None = None
        """Why the broker closed it."""
        self._waits = 0
        """Methods that wait for an answer."""
        self._published = 0
        self._delivered = 0
        self._limit = UNLIMITED
        self._beginning = 0
        """So many of the next messages are acknowledged in transactions."""
        self._tags = itertools.count(1)
        self._senders: dict[str, Outgoing] = {}
        """By address."""
        self._receivers: dict[str, Incoming] = {}
        """By queue."""
        self._held: dict[int, _Held] = {}
        """By delivery tag, in ascending order."""
        self._rejected: deque[message.Identity] = deque(maxlen=1000)
        """Messages that were rejected in a transaction, as they come again after its rollback."""
        self._declared: dict[str, set[str]] = {}
        """The queues that were declared, and the clauses of their bindings: declared in one piece, since on Artemis a
        queue has one selector."""

    @property
    def _is_open(self) -> bool:
        return self.connection.channels.get(self.channel_id) is self

    def _check_open(self) -> None:
        if self._error is not None:
            raise self._error
        if not self._is_open or not self.connection.connected:
            raise answers.closed("channel")

    def _wait(self, is_over: Callable[[], bool], what: str, seconds: float | None = None) -> None:
        """
        Raises:
            amqp.exceptions.AMQPError: the broker closed the channel; or the connection, which others raise as well.
        """
        self._waits += 1
        try:
            limit = OPERATION_TIMEOUT if seconds is None else seconds
            self.connection.wait_for(lambda: is_over() or self._error is not None, what, limit)
        finally:
            self._waits -= 1
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Declare what was begun. What is not settled returns to its queue."""
        if not self._is_open or not self.connection.connected:
            return
        self._failing(self.settle_declarations)
        self._end()
        self.connection.flush()
        if self.connection.transactions.are_ending:
            self.connection.wait_for(
                lambda: not self.connection.transactions.are_ending, "returning messages", OPERATION_TIMEOUT
            )

    def _end(self) -> None:
        links: list[Incoming | Outgoing] = [*self._senders.values(), *self._receivers.values()]
        for link in links:
            self.connection.links.pop(link.link.name, None)
        self.give_back()
        # Others may hold this channel for longer, and forget it in any thread.
        self._senders, self._receivers = {}, {}
        self.connection.engine.end_links([link.link for link in links])
        self.connection.channels.pop(self.channel_id, None)

    def give_back(self) -> None:
        """Return what is not settled to its queue. It counts as a delivery, as on RabbitMQ: a handler may have run."""
        for held in self._held.values():
            if held.transaction is None:
                settle_as_failed(held.transfer)
            else:
                self._end_transaction(held, failed=True)
        self._held.clear()
        for link in self._receivers.values():
            link.waiting.clear()

    def drop(self) -> None:
        """The connection has ended."""
        self._held.clear()

    def fail(self, error: Exception) -> None:
        """The broker refused something, which closes the channel, as in AMQP 0-9-1."""
        if not self._is_open:
            return
        self._error = error
        self._declared.clear()
        self._end()
        if not self._waits:
            self.connection.dispatch_later(self._report)

    def _report(self) -> None:
        assert self._error is not None
        if self.on_closed is None:
            raise self._error
        self.on_closed(self._error)

    # --- publishing -----------------------------------------------------------------------

    def confirm_select(self, nowait: bool = False) -> None:
        """Count publications from 1. Artemis confirms each in any case."""

    def publish(self, publications: Sequence[Publication]) -> None:
        """Send all for which the broker has given credit. The rest waits for it here."""
        self._check_open()
        self._failing(self.settle_declarations)
        encoded: list[tuple[_Target, bytes]] = []
        for publication in publications:
            target = self._target(publication)
            if target.delay is not None and "expiration" in publication.properties:
                properties = {name: value for name, value in publication.properties.items() if name != "expiration"}
                publication = attrs.evolve(publication, properties=properties)  # it would expire before it is delivered
            subject = publication.routing_key if target.subject is None else target.subject
            try:
                data = message.encode(publication, subject, ttl=target.ttl, delay=target.delay)
            except ValueError as error:
                raise Unencodable(str(error), publication) from error
            encoded.append((target, data))
        touched: dict[str, Outgoing] = {}
        new: list[Outgoing] = []
        for publication, (target, data) in zip(publications, encoded, strict=True):
            link = self._senders.get(target.address)
            if link is None:
                link = self._new_sender(target)
                new.append(link)
            self._published += 1
            message_id = publication.properties.get("message_id", "")
            link.put(Sent(self._published, message_id, publication.mandatory), data)
            touched[target.address] = link
        for link in touched.values():
            link.push()
        self.connection.flush()
        if new:
            self._wait_for_credit(new)

    def _wait_for_credit(self, links: Sequence[Outgoing]) -> None:
        """The broker gives it when a link opens. What has none after `CREDIT_WAIT` is sent when it comes."""
        with contextlib.suppress(TimeoutError):
            self._wait(lambda: not any(link.waiting for link in links), "opening a link", CREDIT_WAIT)
        self.connection.flush()

    def publish_nowait(self, publications: Sequence[Publication]) -> bool:
        """Always False: the engine belongs to the connection's owner."""
        return False

    def _new_sender(self, target: _Target) -> Outgoing:
        self._check_open()  # during the last wait, the broker may have closed it
        sender = self.connection.engine.session.sender(self.connection.link_name(target.address))
        link = Outgoing(self, sender, target.address, target.capability)
        self._senders[target.address] = self.connection.links[sender.name] = link
        return link

    def _target(self, publication: Publication) -> _Target:
        """
        Raises:
            amqp.exceptions.AMQPError: it can go nowhere on Artemis.
        """
        exchange, key = publication.exchange, publication.routing_key
        if exchange == "":
            waits_in = names.retry_queue_of(key)
            if waits_in is not None:
                return _Target(names.queue_address(waits_in[0]), delay=waits_in[1])
            return _Target(names.queue_address(key))
        if exchange == names.BUS:
            raise answers.access_refused(f"cannot publish to internal exchange '{exchange}'")
        delaying = names.delaying_app(exchange)
        if delaying is not None:
            return _Target(names.DELAYS + delaying, "queue", ttl=1000 * delay_of(publication.properties))
        if not exchange.endswith(names.INTERNAL):
            return _Target(names.exchange_address(exchange))
        app = exchange.removesuffix(names.INTERNAL)
        if key == names.CONTRACT:
            return _Target(names.CONTRACTS + app)
        retry = names.retry_of(key)
        if retry is None:
            return _Target(names.queue_address(f"{app}.{key}"))
        suffix, delay = retry
        ttl = publication.properties.get("expiration")
        delay = min(delay, int(ttl)) if ttl is not None else delay
        return _Target(names.queue_address(f"{app}.{suffix}"), subject=suffix, delay=delay)

    def accepted(self, sent: Sent) -> None:
        self.connection.dispatch_later(lambda: self.on_ack(sent.number, False))

    def unroutable(self, sent: Sent) -> None:
        """No such queue."""
        if sent.mandatory:
            self.connection.dispatch_later(lambda: self.on_return(sent.message_id))
        self.accepted(sent)

    def rejected(self, link: Outgoing, sent: Sent, condition: Condition | None) -> None:
        name = "" if condition is None else condition.name
        if _is_missing_queue(link, name):
            self.unroutable(sent)
        elif name in (answers.REFUSED, *answers.MISSING):
            self._fail_publishing(condition)
        else:
            self.connection.dispatch_later(lambda: self.on_nack(sent.number, False))

    def sender_closed(self, link: Outgoing, condition: Condition | None) -> None:
        self._senders.pop(link.address, None)
        if _is_missing_queue(link, "" if condition is None else condition.name):
            for sent in link.take_back():
                self.unroutable(sent)
            link.link.close()
        else:
            self._fail_publishing(condition)

    def _fail_publishing(self, condition: Condition | None) -> None:
        name, description = ("", "") if condition is None else (condition.name, condition.description or "")
        self.fail(answers.channel_error(name, description, answers.PUBLISH))

    # --- consuming ------------------------------------------------------------------------

    def basic_qos(self, prefetch_size: int, prefetch_count: int, a_global: bool) -> None:
        """Limit what each new consumer may hold. 0 means no limit."""
        self._limit = prefetch_count or UNLIMITED

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
        self._check_open()
        tag = consumer_tag or f"ctag{self.channel_id}.{next(self._tags)}"
        link: Incoming = self._failing(partial(self._unused_receiver, queue))
        link.consumer = Consumer(tag, no_ack, on_delivery, on_cancel)
        if self._limit == 1:  # so begins a worker, maybe one in place of another that crashed
            self._beginning = BEGINNING
        link.give(self._limit)
        self.connection.flush()
        return tag

    def basic_cancel(self, consumer_tag: str, nowait: bool = False) -> None:
        """Receive no more. What it holds stays with the channel."""
        links = [one for one in self._receivers.values() if one.consumer and one.consumer.tag == consumer_tag]
        if not links:
            return
        link = links[0]
        # The broker sends what it may and answers the drain: then nothing is on its way. What it delivers between, it
        # keeps for the next consumer of this link, or until the link is closed.
        self._drain(link, 0, "cancelling a consumer")
        self._wait(lambda: not link.waiting, "counting deliveries")
        # As the port demands, what has arrived is delivered before this returns: the caller counts it.
        self.connection.dispatch()
        if self._is_open and link.consumer is not None:
            link.consumer = None
            self._close_unused(link)
            self.connection.flush()

    def _unused_receiver(self, queue: str) -> Incoming:
        """The link of a queue.

        Raises:
            amqp.exceptions.NotFound: there is no such queue.
            amqp.exceptions.PreconditionFailed: a consumer uses it: its credit is for what the consumer may hold.
        """
        link = self._receiver(queue)
        if link.consumer is not None:
            raise answers.precondition_failed(f"this channel consumes queue '{queue}' already")
        return link

    def _receiver(self, queue: str) -> Incoming:
        self.settle_declarations()
        known = self._receivers.get(queue)
        if known is not None:
            return known
        declarations = self.connection.declarations
        if queue in declarations.volatile:
            return self._subscribe(queue)
        if declarations.selector_of(queue) is None:
            raise answers.not_found("queue", queue)
        link = self._attach(queue, names.queue_address(queue))
        declarations.selector_of(queue)  # the attach has created the queue, if it was deleted meanwhile
        return link

    def _subscribe(self, queue: str) -> Incoming:
        """Open, or open again, the subscription of an exclusive queue."""
        known = self._receivers.pop(queue, None)
        clauses = self.connection.declarations.volatile[queue]
        if known is not None:
            self._drop_link(known)
        return self._attach(queue, names.BUS_ADDRESS, chosen=selector.subscription(clauses))

    def _attach(self, queue: str, address: str, *, chosen: str | None = None, browse: bool = False) -> Incoming:
        self._check_open()  # during the last wait, the broker may have closed it
        connection = self.connection
        receiver = connection.engine.session.receiver(connection.link_name(queue))
        link = Incoming(self, receiver, address, queue, selector=chosen, browse=browse)
        self._receivers[queue] = connection.links[receiver.name] = link
        self._wait(lambda: link.is_open, f"attaching to {address}")
        return link

    def _drop_link(self, link: Incoming) -> None:
        self.connection.links.pop(link.link.name, None)
        self.connection.engine.end_links([link.link])

    def _close_unused(self, link: Incoming) -> None:
        """Close a link without a consumer, once all that it delivered is settled."""
        is_used = link.consumer is not None or link.get is not None or link.unsettled > 0
        is_present = self._receivers.get(link.queue) is link
        if not is_used and is_present and link.queue not in self.connection.declarations.volatile:
            del self._receivers[link.queue]
            self._drop_link(link)

    def receiver_closed(self, link: Incoming, condition: Condition | None) -> None:
        if self._receivers.get(link.queue) is link:
            del self._receivers[link.queue]
        consumer, link.consumer = link.consumer, None
        name, description = ("", "") if condition is None else (condition.name, condition.description or "")
        if consumer is None or not link.is_open:
            self.fail(answers.channel_error(name, description))
        else:
            link.link.close()
            self.connection.dispatch_later(lambda: consumer.on_cancel(consumer.tag))

    def arrived(self, link: Incoming, transfer: Transfer, data: bytes) -> None:
        consumer, get = link.consumer, link.get
        if not self._is_open or (consumer is None and get is None):
            settle(transfer, RELEASED)
            return
        tag = self._delivered + 1
        guarded = None
        try:
            received = message.split(data)
            delivery = self._delivery(link.queue, tag, received)
            if (received.deliveries or self._beginning) and self._guards(link):
                guarded = received
        except ValueError as error:
            delivery = Delivery(self, tag, False, "", "", partial(_unreadable, str(error)), data)
        if guarded is not None and self._rejected and guarded.identity() in self._rejected:
            self._rejected.remove(guarded.identity())
            settle(transfer, REJECTED)
            link.give(1)
            return
        self._delivered = tag
        if consumer is not None and consumer.no_ack:
            settle(transfer, ACCEPTED)
            link.give(1)
        else:
            self._held[tag] = _Held(transfer, link, consumer, guarded)
            link.unsettled += 1
        if get is not None:
            get(delivery)
        elif guarded is not None or link.waiting:
            link.waiting.append(delivery)
            if guarded is not None:
                self.connection.transactions.begin(partial(self._begun, link, tag))
        elif consumer is not None:
            self.connection.dispatch_later(partial(self._hand_over, consumer, delivery))

    def _guards(self, link: Incoming) -> bool:
        """Whether the next message of a link is acknowledged in a transaction, since it may crash its worker."""
        consumer = link.consumer
        if consumer is None or consumer.no_ack or link.get is not None:
            return False
        self._beginning = max(0, self._beginning - 1)
        return True

    def _begun(self, link: Incoming, tag: int, transaction: Transaction | None) -> None:
        held = self._held.get(tag)
        if held is not None and transaction is not None:
            held.transaction = transaction
            enlist(held.transfer, transaction)
        elif held is not None:
            held.guarded = None
        elif transaction is not None:  # it was returned meanwhile
            self.connection.transactions.end(transaction, failed=True)
        self.enlisted(link)

    def enlisted(self, link: Incoming) -> None:
        """Hand over what the broker has enlisted, and what arrived behind it."""
        waiting = link.waiting
        while waiting:
            held = self._held.get(waiting[0].delivery_tag)
            if held is not None and not held.is_ready:
                return
            delivery = waiting.popleft()
            if held is not None and held.consumer is not None:  # otherwise it was returned meanwhile
                self.connection.dispatch_later(partial(self._hand_over, held.consumer, delivery))

    def _hand_over(self, consumer: Consumer, delivery: Delivery) -> None:
        if not self._is_open:
            return  # a callback has closed it, and the message is back in its queue
        size = len(delivery.body)
        if size > LARGE and self.takes is not None and not self.takes(delivery.delivery_tag, size):
            return
        consumer.on_delivery(delivery)

    def _delivery(self, queue: str, tag: int, received: message.Received) -> Delivery:
        source = None if received.orig_address is None else names.source_of(received.orig_address)
        properties = received.properties
        if received.orig_address is None:
            # Only the app may send to its queue: through its internal exchange, or by the queue's name.
            app, _, suffix = queue.partition(".")
            key = received.subject
            exchange = f"{app}{names.INTERNAL}" if key == suffix else ""
        elif queue.endswith(f".{names.DEAD}"):
            exchange, key = "", received.subject
            properties = partial(_dead_lettered, received)
        else:
            exchange, key = source or "", received.subject
        return Delivery(self, tag, received.deliveries > 0, exchange, key, properties, received.body)

    def get(self, queue: str) -> Delivery | None:
        """Take one message, which must be settled. None: the queue is empty."""
        return self.take(queue, no_ack=False)

    def take(self, queue: str, *, no_ack: bool) -> Delivery | None:
        """`get`; with `no_ack`, the message is settled at once."""
        self._check_open()
        _not_the_catalog(queue, "basic.get")
        link: Incoming = self._failing(partial(self._unused_receiver, queue))
        found: list[Delivery] = []
        link.get = found.append
        is_empty = False
        try:
            for _ in range(TRIES):
                self._drain(link, 1, "basic.get")
                # Artemis may answer a drain before it delivers what is in the queue (seen on 2.40.0). What it has not
                # sent by then it counts as delivered, and sends with the next credit.
                if found or is_empty:
                    break
                is_empty = queue not in self.connection.declarations.volatile and not self._ready(queue)
        finally:
            link.get = None
        if not found:
            self._close_unused(link)
            return None
        if no_ack:
            self.basic_ack(found[0].delivery_tag)
        return found[0]

    def _drain(self, link: Incoming, count: int, what: str) -> None:
        """Let the broker send up to `count` messages, and wait until it has sent what it has."""
        receiver = link.link
        receiver.drain(max(0, count - receiver.credit))
        deadline = time.monotonic() + OPERATION_TIMEOUT
        while link.is_open and receiver.credit > 0:
            try:
                self._wait(lambda: receiver.credit <= 0 or not link.is_open, what, DRAIN_AGAIN)
            except TimeoutError:
                if time.monotonic() > deadline:
                    raise
                # Artemis ignores a drain that arrives while it still ends the one before.
                receiver.drain(0)
        receiver.drain_mode = False

    def _ready(self, queue: str) -> int:
        return self.connection.declarations.counts(queue).ready

    def read_stream(self, queue: str, on_delivery: OnDelivery, *, seconds: float) -> None:
        """Browse all messages of a queue that keeps them."""
        self._check_open()
        expected = self._ready(queue)
        link = self._attach(queue, names.queue_address(queue), browse=True)
        deadline = time.monotonic() + seconds
        seen = 0

        def take(delivery: Delivery) -> None:
            nonlocal seen
            seen += 1
            held = self._held.pop(delivery.delivery_tag)
            settle(held.transfer, ACCEPTED)
            link.unsettled -= 1
            on_delivery(delivery)

        link.get = take
        while seen < expected:
            if time.monotonic() > deadline:
                raise TimeoutError(f"reading {queue} took longer than {seconds:g} s")
            before = seen
            self._drain(link, BROWSED, f"reading {queue}")
            if seen == before:
                expected = min(expected, self._ready(queue))  # some have expired
        link.get = None
        self._close_unused(link)

    def first_properties(self, queue: str) -> Properties | None:
        """AMQP 1.0 has no such request."""
        return None

    # --- settling -------------------------------------------------------------------------

    def basic_ack(self, delivery_tag: int, multiple: bool = False) -> None:
        self._settle(delivery_tag, multiple, ACCEPTED)

    def basic_reject(self, delivery_tag: int, requeue: bool) -> None:
        self._settle(delivery_tag, False, RELEASED if requeue else REJECTED)

    def basic_nack(self, delivery_tag: int, multiple: bool = False, requeue: bool = True) -> None:
        self._settle(delivery_tag, multiple, RELEASED if requeue else REJECTED)

    def basic_recover(self, requeue: bool = False) -> None:
        """Return all that is not settled to its queue."""
        if self._held:
            self._settle(max(self._held), True, RELEASED)

    def _settle(self, delivery_tag: int, multiple: bool, state: Any) -> None:
        if self._error is not None:
            return  # which `on_closed` is about to report: what was held comes again
        self._check_open()
        held = self._held
        if multiple:
            tags = list(itertools.takewhile(lambda tag: tag <= delivery_tag, held)) if delivery_tag else [*held]
        else:
            tags = [delivery_tag] if delivery_tag in held else []
        if not tags:
            self.fail(answers.precondition_failed(f"unknown delivery tag {delivery_tag}"))
            return
        credit: dict[Incoming, int] = {}
        for tag in tags:
            one = held.pop(tag)
            if one.transaction is None:
                settle(one.transfer, state)
            else:
                self._end_transaction(one, failed=state != ACCEPTED)
                if state == REJECTED and one.guarded is not None:
                    self._rejected.append(one.guarded.identity().redelivered())
            one.link.unsettled -= 1
            more = one.consumer is not None and one.consumer is one.link.consumer
            credit[one.link] = credit.get(one.link, 0) + more
        for link, count in credit.items():
            if count:
                link.give(count)
            else:
                self._close_unused(link)
        self.connection.flush()

    def _end_transaction(self, one: _Held, *, failed: bool) -> None:
        assert one.transaction is not None
        leave_to(one.transfer, one.transaction)
        self.connection.transactions.end(one.transaction, failed=failed)

    # --- declaring ------------------------------------------------------------------------

    def settle_declarations(self) -> None:
        """Create the declared queues, or add the bindings that they lack."""
        declared, self._declared = self._declared, {}
        for queue, clauses in declared.items():
            wanted = self.connection.declarations.wanted(queue, clauses)
            if wanted is not None:
                link = self._attach(queue, names.queue_address(queue), chosen=wanted)
                self._close_unused(link)

    def exchange_declare(
        self,
        exchange: str,
        type: str = "topic",
        passive: bool = False,
        durable: bool = False,
        auto_delete: bool = True,
        nowait: bool = False,
        arguments: Mapping[str, Any] | None = None,
        *,
        internal: bool = False,
    ) -> None:
        self._check_open()
        if passive:
            self._failing(partial(self._require_exchange, exchange))
        elif exchange == names.BUS:
            self._failing(self.connection.declarations.check_bus)
        elif names.delaying_app(exchange) is None and not exchange.endswith(names.INTERNAL):
            self._failing(partial(_check_type, exchange, type))
            self._attach_once(names.exchange_address(exchange))

    def _require_exchange(self, exchange: str) -> None:
        if not self.connection.declarations.exchange_exists(exchange):
            raise answers.not_found("exchange", exchange)

    def _attach_once(self, address: str) -> None:
        """Open a link to an address: that creates the address, and fails without the right to send."""
        link = self._senders.get(address) or self._new_sender(_Target(address))
        self._wait(lambda: link.link.remote_target.address is not None, f"attaching to {address}")

    def exchange_delete(self, exchange: str, if_unused: bool = False, nowait: bool = False) -> None:
        """Nothing: an address without messages costs nothing, and is created again by the next publication."""

    def exchange_bind(
        self,
        destination: str,
        source: str = "",
        routing_key: str = "",
        nowait: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """The broker's diverts bind the exchanges of all apps to the bus; there are no other such bindings."""
        if destination != names.BUS and names.delaying_app(source) is None and names.delaying_app(destination) is None:
            raise answers.not_implemented(f"on Artemis, an exchange cannot be bound to '{destination}'")

    def exchange_unbind(
        self,
        destination: str,
        source: str = "",
        routing_key: str = "",
        nowait: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        raise answers.not_implemented("on Artemis, the exchange of an app cannot be unbound from the bus")

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
        """Returns (queue, message_count, consumer_count)."""
        self._check_open()
        declarations = self.connection.declarations
        if passive:
            self._failing(self.settle_declarations)
            counts = self._failing(partial(declarations.counts, queue))
            return queue_declare_ok_t(queue, counts.ready, counts.consumers)
        if exclusive:
            declarations.volatile.setdefault(queue, [])
        elif queue == names.CATALOG:
            self._failing(partial(self._require_catalog))
        elif names.retry_queue_of(queue) is None and names.delaying_app(queue) is None:
            self._failing(partial(_check_arguments, queue, arguments or {}))
            self._declared.setdefault(queue, set())
        return queue_declare_ok_t(queue, 0, 0)

    def _require_catalog(self) -> None:
        if self.connection.declarations.selector_of(names.CATALOG) is None:
            raise answers.access_refused(
                f"queue '{names.CATALOG}' does not exist: the broker's broker.xml lacks the part that `lightbus "
                "topology artemis` prints"
            )

    def _failing(self, method: Callable[[], Any]) -> Any:
        """Call it. An error closes the channel, as in AMQP 0-9-1."""
        try:
            return method()
        except amqp_errors.ChannelError as error:
            if self._is_open:
                self._error = error
                self._end()
            raise

    def queue_bind(
        self,
        queue: str,
        exchange: str = "",
        routing_key: str = "",
        nowait: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        self._check_open()
        if queue == names.CATALOG:
            self._attach_once(names.CONTRACTS + exchange.removesuffix(names.INTERNAL))
            return
        if exchange.endswith(names.INTERNAL) or names.delaying_app(exchange) is not None:
            return  # a queue is found by its name
        clause = self._failing(partial(_clause, exchange, routing_key))
        declarations = self.connection.declarations
        if queue in declarations.volatile:
            declarations.volatile[queue].append(clause)
            self._subscribe(queue)
        elif queue in self._declared:
            self._declared[queue].add(clause)
        else:
            self._failing(partial(declarations.bind, queue, clause))

    def queue_unbind(
        self,
        queue: str,
        exchange: str,
        routing_key: str = "",
        nowait: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        self._check_open()
        if queue == names.CATALOG:
            return  # only contracts get there
        if exchange.endswith(names.INTERNAL):
            raise answers.not_implemented("on Artemis, a queue is found by its name, without a binding")
        self._failing(self.settle_declarations)
        clause = self._failing(partial(_clause, exchange, routing_key))
        self._failing(partial(self.connection.declarations.unbind, queue, clause))

    def queue_purge(self, queue: str = "", nowait: bool = False) -> int:
        self._check_open()
        _not_the_catalog(queue, "queue.purge")
        self._failing(self.settle_declarations)
        return int(self._failing(partial(self.connection.declarations.purge, queue)))

    def queue_delete(
        self, queue: str = "", if_unused: bool = False, if_empty: bool = False, nowait: bool = False
    ) -> None:
        self._check_open()
        if self.connection.declarations.volatile.pop(queue, None) is not None:
            link = self._receivers.pop(queue, None)
            if link is not None:
                self._drop_link(link)
            return
        self._failing(partial(self.connection.declarations.delete, queue))


def _is_missing_queue(link: Outgoing, condition: str) -> bool:
    """Whether no queue took a publication. A missing exchange is an error, after which the publisher declares it."""
    return names.is_queue(link.address) and condition in answers.MISSING


def _check_type(exchange: str, type: str) -> None:
    """
    Raises:
        amqp.exceptions.AMQPNotImplementedError: only topic exchanges can be expressed.
    """
    if type != "topic":
        raise answers.not_implemented(f"exchange '{exchange}': the type '{type}' does not exist on Artemis")


def _check_arguments(queue: str, arguments: Mapping[str, Any]) -> None:
    """
    Raises:
        amqp.exceptions.AMQPNotImplementedError: one of them asks for what queues on Artemis do not have.
    """
    for name, value in arguments.items():
        is_stream = name == "x-queue-type" and value == "stream"
        is_other = name == "x-dead-letter-exchange" and not str(value).endswith(names.INTERNAL)
        if is_stream or is_other or name not in _ARGUMENTS:
            raise answers.not_implemented(f"queue '{queue}': {name}={value!r} does not exist on Artemis")


_ARGUMENTS = {
    "x-queue-type",
    "x-dead-letter-exchange",
    "x-dead-letter-routing-key",
    "x-dead-letter-strategy",
    "x-overflow",
    "x-delivery-limit",
}
"""Of an app's queues. The administrator's part of broker.xml has what they mean."""


def _not_the_catalog(queue: str, method: str) -> None:
    """
    Raises:
        amqp.exceptions.AMQPNotImplementedError: it is the catalogue, which is read with `read_stream` only.
    """
    if queue == names.CATALOG:
        raise answers.not_implemented(f"{method} not supported by queue '{queue}', which keeps what was read")


def _clause(exchange: str, pattern: str) -> str:
    try:
        return selector.clause(exchange, pattern)
    except ValueError as error:
        raise answers.precondition_failed(str(error)) from error


def _unreadable(why: str) -> Properties:
    """The properties of a message of which nothing could be read.

    Raises:
        ValueError: always.
    """
    raise ValueError(why)


_DELAY_HEADER = "lightbus-delay-"


def delay_of(properties: Properties) -> int:
    """The seconds of a delayed publication: its headers name the powers of two."""
    headers = properties.get("headers") or {}
    return sum(1 << int(name.removeprefix(_DELAY_HEADER)) for name in headers if name.startswith(_DELAY_HEADER))


def _dead_lettered(received: message.Received) -> Properties:
    """The properties of a message that the broker itself dead-lettered, with an `x-death` header as RabbitMQ writes it.

    Artemis does not keep the time, the reason, and the address that the event came from. So the source is the one that
    its publisher gives, which nothing proves.
    """
    app_id = received.properties().get("app_id")
    death: dict[str, Any] = {
        "queue": received.orig_queue or "",
        "reason": "unrecorded",
        "exchange": app_id if isinstance(app_id, str) else "",
        "routing-keys": [received.subject],
        "count": 1,
    }
    return received.properties([death])
