"""The methods of a channel that only kombu calls. Lightbus itself uses the port (`lightbus.transport.Channel`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import attrs
from amqp import exceptions as amqp_errors
from kombu import message
from kombu.transport import base

from lightbus.transport import Delivery, OnCancel, OnDelivery, Publication


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


def _cancelled(consumer_tag: str) -> None:
    raise amqp_error(amqp_errors.ConsumerCancelled, consumer_tag)
