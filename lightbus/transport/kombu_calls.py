"""What only kombu calls, of channels and transports. Lightbus itself uses the port (`lightbus.transport`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import amqp
import attrs
from amqp import exceptions as amqp_errors
from kombu import message
from kombu.transport import base

from lightbus.transport import Delivery, OnCancel, OnDelivery, Publication
from lightbus.version import __version__


def amqp_error(kind: Any, text: str) -> Exception:
    """An error of `amqp.exceptions`, which has no types."""
    error: Exception = kind(text, reply_code=kind.code or None)
    return error


def ignore(*_: Any) -> None:
    """The default of a callback."""


class KombuChannel(base.StdChannel):
    """kombu's methods, built on three methods of the port."""

    Message = message.Message
    no_ack_consumers = None

    def publish(self, publications: Sequence[Publication]) -> None:
        raise NotImplementedError

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
        raise NotImplementedError

    def take(self, queue: str, *, no_ack: bool) -> Delivery | None:
        raise NotImplementedError

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
        callback: Callable[[message.Message], object] = ignore,
        on_cancel: OnCancel | None = None,
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
        delivery = self.take(queue, no_ack=bool(no_ack))
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
        """Refused for `active=False`, as by RabbitMQ."""
        if not active:
            raise amqp_error(amqp_errors.AMQPNotImplementedError, "NOT_IMPLEMENTED - active=false")


class KombuConnection(Protocol):
    """What kombu calls on a connection."""

    client: Any
    """kombu's connection."""

    @property
    def connected(self) -> bool: ...

    def channel(self) -> Any: ...

    def drain_events(self, timeout: float | None = None) -> None: ...

    def heartbeat_tick(self) -> None: ...

    def close(self) -> None: ...

    def collect(self) -> None: ...


class KombuTransport(base.Transport):
    """Passes kombu's calls on to a connection. A subclass creates the connections."""

    client: Any = None  # kombu's connection
    can_parse_url = True
    connection_errors: Any = amqp.Connection.connection_errors
    channel_errors: Any = amqp.Connection.channel_errors
    recoverable_connection_errors = amqp.Connection.recoverable_connection_errors
    recoverable_channel_errors = amqp.Connection.recoverable_channel_errors

    def close_connection(self, connection: KombuConnection) -> None:
        connection.client = None
        connection.close()

    def create_channel(self, connection: KombuConnection) -> Any:
        return connection.channel()

    def drain_events(self, connection: KombuConnection, **kwargs: Any) -> None:
        connection.drain_events(**kwargs)

    def heartbeat_check(self, connection: KombuConnection, rate: int = 2) -> None:
        connection.heartbeat_tick()

    def verify_connection(self, connection: KombuConnection) -> Any:
        return connection.connected

    def driver_version(self) -> Any:
        return __version__

    def _collect(self, connection: KombuConnection | None) -> None:
        if connection is not None:
            connection.collect()


def _cancelled(consumer_tag: str) -> None:
    raise amqp_error(amqp_errors.ConsumerCancelled, consumer_tag)
