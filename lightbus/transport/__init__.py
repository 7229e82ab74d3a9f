"""The port: what a broker must do for Lightbus. Two transports implement it: `amqp` (RabbitMQ) and `sqlite` (embedded).

kombu's virtual transports have no exchange-to-exchange bindings, confirms and returns, and its `basic_publish` and
`basic_consume` cost one chain of calls per message. So both transports add a few methods to those of kombu and py-amqp
(declare, bind, ack, reject, qos ...): they move *batches*. `connection`, `publishing` and `consuming` call only what
this module lists.

**A third transport** is a kombu transport (a subclass of `kombu.transport.base.Transport`) whose connections and
channels have the methods of `Connection` and `Channel` below. A row in `connection/brokers` maps its URL schemes to it,
and `tests/conformance` must pass on it.

**Threads.** One thread owns a connection, and calls all methods of it and its channels, except where a method allows
other threads. In the owner's place, an event loop may read the connection (`Connection.watched`): one at a time.

**Callbacks.** A transport calls them in `drain_events`, or in another method that reads (`drain_nowait`, `catch_up`, a
method that waits for its answer), in the order in which things arrived:

| callback | where it is set | called when | not called |
|---|---|---|---|
| `OnDelivery` | `consume` | a message arrived for this consumer | after the channel is closed |
| `OnCancel` | `consume` | the broker cancelled the consumer: its queue was deleted or moved | after `basic_cancel` |
| `OnConfirm` | `Channel.on_ack`, `on_nack` | the broker confirmed, or refused, publications | before `confirm_select` |
| `OnReturn` | `Channel.on_return` | no queue took a mandatory message; before its ack | |
| `OnClosed` | `Channel.on_closed` | the broker closed the channel | while a method of the channel waits |
| `Takes` | `Channel.takes` | a large body arrived, before its `OnDelivery` | if the channel `counts_bytes` |

A callback must not block. It may call methods of the channel and the connection, also `close`. An exception ends the
current `drain_events`, and what has arrived behind it is dispatched by the next call.

`OnUnsent` (`WatchedConnection.on_unsent`) is different: it is called on any thread while something is sent, and may
only wake the owner.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import attrs

Properties = dict[str, Any]
"""AMQP basic properties by their AMQP names: content_type, content_encoding, headers (a dict),
delivery_mode, priority, correlation_id, reply_to, expiration (milliseconds as a string), message_id,
timestamp (seconds since 1970, an int), type, user_id, app_id. Absent properties have no key. Text that is not UTF-8
is bytes."""

PROPERTY_NAMES = frozenset(
    {
        "app_id",
        "cluster_id",
        "content_encoding",
        "content_type",
        "correlation_id",
        "delivery_mode",
        "expiration",
        "headers",
        "message_id",
        "priority",
        "reply_to",
        "timestamp",
        "type",
        "user_id",
    }
)
"""All that AMQP has. `cluster_id` is obsolete, and some programs still set it."""

UNREADABLE = "unreadable"
"""A key among the properties of a malformed message: describes what could not be read."""


@attrs.frozen
class Publication:
    """A message to publish."""

    exchange: str
    routing_key: str
    body: bytes
    properties: Properties
    mandatory: bool = True


@attrs.frozen
class StoredPublication(Publication):
    """One that a relay sends from an outbox."""

    added_at: float = attrs.field(kw_only=True)
    """When it was added to the outbox, in seconds since 1970, by the clock of the program that added it."""


class Unencodable(ValueError):
    """A message cannot be sent as it is. Nothing of its batch was sent."""

    def __init__(self, why: str, publication: Publication) -> None:
        super().__init__(why)
        self.publication = publication

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (*self.args, self.publication), self.__dict__


class Delivery:
    """A message as it came from a queue. Its properties are decoded on first access: most handlers do not need them."""

    __slots__ = ("_properties", "body", "channel", "delivery_tag", "exchange", "redelivered", "routing_key")

    def __init__(
        self,
        channel: Channel,
        delivery_tag: int,
        redelivered: bool,
        exchange: str,
        routing_key: str,
        properties: Callable[[], Properties] | Properties,
        body: bytes,
    ) -> None:
        self.channel = channel
        self.delivery_tag = delivery_tag
        self.redelivered = redelivered
        self.exchange = exchange
        self.routing_key = routing_key
        self._properties = properties
        self.body = body

    @property
    def properties(self) -> Properties:
        """The AMQP properties.

        Raises:
            ValueError: they are not well-formed.
        """
        if not isinstance(self._properties, dict):
            self._properties = self._properties()
        return self._properties


OnDelivery = Callable[[Delivery], object]
"""Called with each message that arrives for a consumer."""

OnCancel = Callable[[str], object]
"""Called with the consumer tag when the broker cancels a consumer. What it holds stays unsettled, and its channel stays
open."""

OnConfirm = Callable[[int, bool], object]
"""Called with (delivery tag, multiple). After `confirm_select`, the publications of a channel are counted from 1. With
`multiple`, the confirm is for all up to this one."""

OnReturn = Callable[[str], object]
"""Called with the message id of a mandatory message that no queue took, before `on_ack` for the same message."""

OnClosed = Callable[[Exception], object]
"""Called with the broker's reason (an `amqp.exceptions.ChannelError`) when the broker closes a channel. The connection
stays open."""

Takes = Callable[[int, int], bool]
"""Called with (delivery tag, size in bytes) before a large body is delivered: one of several frames, over 128 KiB.
False: do not deliver it. The caller returns it to its queue later, with `basic_nack`."""

OnUnsent = Callable[[], object]
"""Called from any thread when data was kept for `WatchedConnection.catch_up`: wake the owner."""


class Channel(Protocol):
    """The methods of a channel that Lightbus uses.

    Errors are py-amqp's (`amqp.exceptions`), with the broker's reason: `NotFound`, `AccessRefused`,
    `PreconditionFailed`, `ResourceLocked`. After any of them, the channel is closed for good. It must not be opened
    again: a reopened channel counts its delivery tags from 1, so a late ack would settle a different message.
    """

    on_ack: OnConfirm
    on_nack: OnConfirm
    on_return: OnReturn
    on_closed: OnClosed | None
    """None: the error is raised by `drain_events`. It is raised in any case while a method of the channel waits for its
    answer."""
    takes: Takes | None
    """None: every body is delivered."""

    @property
    def counts_bytes(self) -> bool:
        """Whether `basic_qos` can limit the bytes that a consumer holds. RabbitMQ cannot. If so, `takes` is unused."""
        ...

    def confirm_select(self) -> Any: ...

    def publish(self, publications: Sequence[Publication]) -> None:
        """Send all messages, in one piece if possible. Returns without waiting for confirms.

        Raises:
            Unencodable: a message cannot be sent as it is. Nothing was sent.
            OSError or amqp.exceptions.AMQPError: the connection or the channel was lost.
        """
        ...

    def publish_nowait(self, publications: Sequence[Publication]) -> bool:
        """`publish` from any thread, if that needs no waiting. False: nothing was sent, and the owner must send it.

        After any exception except `Unencodable` (a signal handler may raise one), it is unknown what was sent: replace
        the connection.
        """
        ...

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
        """Start a consumer and return its tag. Deliveries may arrive before this returns.

        Args:
            consumer_tag: a name for the consumer. With it, the caller can cancel the consumer even if this call is
                interrupted. "": the transport chooses one.
        """
        ...

    def get(self, queue: str) -> Delivery | None:
        """Take one message, which must be settled. None: the queue is empty."""
        ...

    def read_stream(self, queue: str, on_delivery: OnDelivery, *, seconds: float) -> None:
        """Read all messages that a stream (a queue with `x-queue-type: stream`) has now, the oldest first. They stay in
        it. The channel is used for nothing else, and is closed afterwards.

        Raises:
            TimeoutError: it takes longer.
        """
        ...

    def first_properties(self, queue: str) -> Properties | None:
        """The properties of the first message that waits in the queue. None: there is none, or the broker cannot tell
        without delivering it."""
        ...

    def basic_qos(self, prefetch_size: int, prefetch_count: int, a_global: bool) -> Any: ...

    def basic_cancel(self, consumer_tag: str) -> Any: ...

    def basic_ack(self, delivery_tag: int, multiple: bool = False) -> Any: ...

    def basic_reject(self, delivery_tag: int, requeue: bool) -> Any: ...

    def basic_nack(self, delivery_tag: int, multiple: bool = False, requeue: bool = True) -> Any: ...

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
    ) -> Any: ...

    def exchange_delete(self, exchange: str, if_unused: bool = False) -> Any: ...

    def exchange_bind(
        self,
        destination: str,
        source: str = "",
        routing_key: str = "",
        nowait: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> Any: ...

    def exchange_unbind(
        self,
        destination: str,
        source: str = "",
        routing_key: str = "",
        nowait: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> Any: ...

    def queue_declare(
        self,
        queue: str = "",
        passive: bool = False,
        durable: bool = False,
        exclusive: bool = False,
        auto_delete: bool = True,
        nowait: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> Any:
        """Returns a named tuple (queue, message_count, consumer_count)."""
        ...

    def queue_bind(
        self,
        queue: str,
        exchange: str = "",
        routing_key: str = "",
        nowait: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> Any: ...

    def queue_unbind(
        self,
        queue: str,
        exchange: str,
        routing_key: str = "",
        nowait: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> Any: ...

    def queue_purge(self, queue: str = "", nowait: bool = False) -> Any:
        """Returns how many messages were deleted."""
        ...

    def queue_delete(self, queue: str = "", if_unused: bool = False, if_empty: bool = False) -> Any: ...

    def close(self) -> Any: ...


class Connection(Protocol):
    """The methods of a connection that Lightbus uses. One thread owns it. Other threads may call only `interrupt`.

    (See `WatchedConnection`: an event loop may use it in the owner's place.)
    """

    blocked: bool
    """True while the broker does not read publications (a memory or disk alarm)."""
    reached: Any
    """The address that was connected to. Set by `connection.dial`; a transport only keeps it."""

    @property
    def server_properties(self) -> Mapping[str, Any]:
        """At least `product` and `version`."""
        ...

    def channel(self) -> Channel: ...

    def drain_events(self, timeout: float | None = None) -> None:
        """Wait up to `timeout` seconds for something to arrive, then dispatch *everything* that has arrived.

        Returns after that, or as soon as `interrupt()` is called (or was called before).

        Raises:
            TimeoutError: nothing arrived in time (`socket.timeout` is the same class).
            OSError or amqp.exceptions.AMQPError: the connection or a channel was lost.
        """
        ...

    def interrupt(self) -> None:
        """Let the current or the next `drain_events` return at once. From any thread, at any time."""
        ...

    def watched(self) -> WatchedConnection | None:
        """The connection for use by an event loop. None: only `drain_events` can find out what has arrived."""
        ...

    def heartbeat_tick(self) -> None:
        """Send a heartbeat if one is due. Raise if the broker's are overdue. Called about once a second."""
        ...

    def close(self) -> Any:
        """Close with the protocol's handshake, within a few seconds."""
        ...

    def collect(self) -> None:
        """Drop the connection without closing it at the broker: after a fault, or in a forked child."""
        ...


class WatchedConnection(Protocol):
    """What an event loop needs to read a connection. The loop and the owner must not use these at the same time."""

    may_wait: bool
    """False while a loop uses the connection: what cannot be sent at once is kept for the owner's `catch_up`."""
    on_unsent: OnUnsent
    """Also called by `publish_nowait`."""

    def fileno(self) -> int:
        """A file descriptor that is readable when something has arrived."""
        ...

    def drain_nowait(self) -> None:
        """Dispatch everything that has arrived, without waiting.

        Raises:
            OSError or amqp.exceptions.AMQPError: the connection or a channel was lost.
        """
        ...

    def catch_up(self) -> bool:
        """Send what was kept, and dispatch what was read in the meantime: the descriptor does not show that.

        Returns:
            whether anything was dispatched.

        Raises:
            OSError or amqp.exceptions.AMQPError: the connection or a channel was lost.
        """
        ...
