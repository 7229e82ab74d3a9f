"""kombu transports that speak the whole AMQP model: `amqp` (RabbitMQ) and `sqlite` (embedded).

kombu's virtual transports lack exchange-to-exchange bindings, confirms and returns, and kombu's
`basic_publish` and `basic_consume` cost one call chain a message. So both of ours give, beside
kombu's and py-amqp's own methods (declare, bind, ack, reject, qos ...), the few that follow: they
move *batches*, and they are all that `connection`, `publishing` and `consuming` call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import attrs

Properties = dict[str, Any]
"""AMQP basic properties by their AMQP names: content_type, content_encoding, headers (a dict),
delivery_mode, priority, correlation_id, reply_to, expiration (milliseconds as a string), message_id,
timestamp (seconds since 1970, an int), type, user_id, app_id. Absent ones have no key. Text that is not UTF-8
is bytes."""

UNREADABLE = "unreadable"
"""Among the properties of a message that was malformed: what of them could not be read, in words."""


@attrs.frozen
class Publication:
    """A message to publish: where to, and what."""

    exchange: str
    routing_key: str
    body: bytes
    properties: Properties
    mandatory: bool = True


class Unencodable(ValueError):
    """A message cannot be sent as it is. Nothing of its batch was sent."""

    def __init__(self, why: str, publication: Publication) -> None:
        super().__init__(why)
        self.publication = publication

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (*self.args, self.publication), self.__dict__


class Delivery:
    """A message as it came from a queue. Its properties are decoded when first asked for:
    most deliveries are handled without."""

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


class Channel(Protocol):
    """The methods of a channel that Lightbus uses.

    Errors are py-amqp's (`amqp.exceptions`), with the broker's words: `NotFound`, `AccessRefused`,
    `PreconditionFailed`, `ResourceLocked`. After any of them the channel and its connection are
    thrown away by the caller (a reopened channel counts its delivery tags from 1 again).
    """

    on_ack: Callable[[int, bool], None]
    """Called with (delivery tag, multiple) for a confirm."""
    on_nack: Callable[[int, bool], None]
    """Called with (delivery tag, multiple) for a negative confirm."""
    on_return: Callable[[str], None]
    """Called with the message id of a mandatory message that no queue got; always before its ack."""

    on_closed: Callable[[Exception], object] | None
    """Called with the broker's reason where it closes the channel; the connection goes on. None: that is raised, as it
    is in any case where a method of this channel waits for its answer."""
    takes: Callable[[int, int], bool] | None
    """Called with (delivery tag, size) before a large body is delivered (one of several frames: over 128 KiB).
    False: it is not delivered, and to be returned to its queue later. Not where the broker `counts_bytes`."""

    @property
    def counts_bytes(self) -> bool:
        """Whether `basic_qos` can limit the bytes that a consumer holds. RabbitMQ cannot."""
        ...

    def confirm_select(self) -> Any: ...

    def publish(self, publications: Sequence[Publication]) -> None:
        """Send all, in one piece where possible; returns without waiting for confirms.

        After `confirm_select` each counts one delivery tag, from 1.

        Raises:
            Unencodable: one cannot be sent as it is; nothing was sent.
        """
        ...

    def publish_nowait(self, publications: Sequence[Publication]) -> bool:
        """`publish` for any thread, where that needs no waiting. False: nothing was sent, the owner has to do it.

        After any exception but `Unencodable` (a signal's handler may raise one) nobody knows what was sent.
        """
        ...

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
        """Subscribe and return the consumer tag. `on_cancel(consumer_tag)` is called when the broker ends it.

        Who names the consumer can cancel it also where this call is interrupted.
        """
        ...

    def get(self, queue: str) -> Delivery | None:
        """Take one message that is to be acked, or None where the queue is empty."""
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
        """Returns (queue, message_count, consumer_count), by name too."""
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
    """The methods of a connection that Lightbus uses. One thread owns it; only `interrupt` is for others.

    (But see `WatchedConnection`: an event loop may take the owner's place for a moment.)
    """

    blocked: bool
    """True while the broker refuses to read publishes (a memory or disk alarm)."""
    reached: Any
    """Where it leads to, as noted by the one who connected."""

    @property
    def server_properties(self) -> Mapping[str, Any]:
        """At least `product` and `version`."""
        ...

    def channel(self) -> Channel: ...

    def drain_events(self, timeout: float | None = None) -> None:
        """Wait up to `timeout` seconds for something to arrive, then dispatch *all* that has arrived.

        Returns after one such piece of work, or as soon as `interrupt()` was called (before or during).

        Raises:
            TimeoutError: nothing arrived in time (`socket.timeout` is the same class).
            OSError or amqp.exceptions.AMQPError: the connection or a channel was lost.
        """
        ...

    def interrupt(self) -> None:
        """Make the present or the next `drain_events` return at once. From any thread, at any time."""
        ...

    def watched(self) -> WatchedConnection | None:
        """The same connection as an event loop may use it; None where only `drain_events` can know what arrives."""
        ...

    def heartbeat_tick(self) -> None:
        """Send a heartbeat where one is due; raise where the peer's are overdue. Call once a second or so."""
        ...

    def close(self) -> Any:
        """Close with the protocol's handshake, within a few seconds."""
        ...

    def collect(self) -> None:
        """Drop the connection without a word to the peer: what is left to do after a fault or a fork."""
        ...


class WatchedConnection(Protocol):
    """What an event loop needs to read a connection itself. Only one at a time, it or the owner, may call these."""

    may_wait: bool
    """False while a loop uses the connection: what cannot be sent at once is kept for the owner's `catch_up`."""
    on_unsent: Callable[[], object]
    """Called where something was kept for `catch_up`, also by `publish_nowait`; from any thread."""

    def fileno(self) -> int:
        """A descriptor that is readable when something has arrived."""
        ...

    def drain_nowait(self) -> None:
        """Dispatch all that has arrived, without waiting.

        Raises:
            OSError or amqp.exceptions.AMQPError: the connection or a channel was lost.
        """
        ...

    def catch_up(self) -> bool:
        """Send what was kept, and dispatch what was read on the way: no descriptor tells of it. True: there was some.

        Raises:
            OSError or amqp.exceptions.AMQPError: the connection or a channel was lost.
        """
        ...
