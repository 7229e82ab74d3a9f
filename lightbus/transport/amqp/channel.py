"""A channel of a connection to RabbitMQ: publishes and delivers in batches."""

# py-amqp and kombu have no types:
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import amqp
import amqp.exceptions
import kombu.transport.pyamqp
from amqp import serialization, spec

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
from lightbus.transport.amqp import wire as wire
from lightbus.transport.amqp.writer import SocketWriter

_STREAM_PREFETCH = 1000
_STREAM_SILENCE = 2.0
"""Seconds without a message after which a stream is empty, if the broker counts none in it. (It counts them every 5
seconds. With the first one, it sends all of its chunk.)"""
_WRITE_SIZE = 262144
_NOWAIT_SIZE = 1048576  # about what a system takes at once for a broker that reads


class Owner(Protocol):
    """What a channel needs from its connection."""

    writer: SocketWriter
    frame_max: Any
    """The agreed size of a frame, in bytes."""
    operation_timeout: float
    """Seconds that a method waits for its answer."""
    bytes_sent: Any
    """Changes with each send: then no heartbeat is due."""

    def limit(self, seconds: float, what: str) -> AbstractContextManager[None]:
        """End all reads and writes inside within `seconds`, with a TimeoutError that names `what`."""
        ...

    def drain_events(self, timeout: float | None = None) -> None: ...


def _offset(delivery: Delivery, otherwise: int) -> int:
    """The place of a message in its stream. `otherwise`, if the publisher's headers cannot be read."""
    try:
        headers = delivery.properties.get("headers")
    except ValueError:
        return otherwise
    offset = headers.get("x-stream-offset") if isinstance(headers, dict) else None
    return offset if isinstance(offset, int) else otherwise


def ignore(*_: object) -> None:
    """The default of a callback."""


def method_name(method: Any) -> str:
    """The name of an AMQP method for messages. Of several, with "or" between them."""
    methods = method if isinstance(method, list) else [method]
    names = [amqp.exceptions.METHOD_NAME_MAP.get(one, str(one)) for one in methods]
    return " or ".join(names).lower().replace("_", "-")


class Channel(kombu.transport.pyamqp.Channel):
    """A channel that delivers and publishes in batches; see `lightbus.transport.Channel`."""

    channel_id: Any
    counts_bytes = False  # RabbitMQ has no prefetch in bytes

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.on_ack: OnConfirm = ignore
        self.on_nack: OnConfirm = ignore
        self.on_return: OnReturn = ignore
        self.on_closed: OnClosed | None = None
        self.takes: Takes | None = None
        self._waiting = 0  # methods that wait for their answers
        self.consumers: dict[bytes, OnDelivery] = {}
        self._consumer_numbers = itertools.count(1)
        self._on_get: Callable[[Delivery | None], object] | None = None
        self._callbacks[spec.Basic.GetEmpty] = self._on_got_nothing

    def publish(self, publications: Sequence[Publication]) -> None:
        """Send all messages, in one piece if possible. Returns without waiting for confirms.

        Raises:
            Unencodable: a message cannot be sent as it is. Nothing was sent.
            TimeoutError: the broker does not read. The connection is lost, and it is unknown what arrived.
            OSError or amqp.exceptions.AMQPError: the connection or the channel was lost.
        """
        connection, number = self._open_connection(), self.channel_id
        # Encode everything first: after an error, nothing of the batch is sent.
        heads = _encode_heads(number, publications, connection.frame_max)
        frame_size = connection.frame_max - 8
        parts: list[bytes | memoryview] = []
        size = 0
        for head, publication in zip(heads, publications, strict=True):
            body = memoryview(publication.body)
            parts.append(head)
            for start in range(0, len(body), frame_size):
                piece = body[start : start + frame_size]
                parts += (wire.frame.pack(wire.BODY, number, len(piece)), piece, b"\xce")
                size += len(piece) + 300
                if size > _WRITE_SIZE:
                    connection.writer.send(b"".join(parts))
                    parts, size = [], 0
        connection.writer.send(b"".join(parts))
        connection.bytes_sent += 1  # for heartbeats

    def publish_nowait(self, publications: Sequence[Publication]) -> bool:
        """`publish` from any thread, if that needs no waiting. False: nothing was sent, and the owner must send it.

        Raises:
            Unencodable: a message cannot be sent as it is. Nothing was sent.
        """
        connection: Owner | None = self.connection
        number = self.channel_id
        if connection is None:
            return False
        sizes = [len(publication.body) for publication in publications]
        if max(sizes) > connection.frame_max - 8 or sum(sizes) > _NOWAIT_SIZE:
            return False
        parts: list[bytes] = []
        heads = _encode_heads(number, publications, connection.frame_max)
        for head, publication in zip(heads, publications, strict=True):
            body = publication.body
            parts.append(head)
            if body:
                parts += (wire.frame.pack(wire.BODY, number, len(body)), body, b"\xce")
        if not connection.writer.send_nowait(b"".join(parts)):
            return False
        connection.bytes_sent += 1  # for heartbeats
        return True

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
        """Start a consumer and return its tag."""
        # The client chooses the tag, so it is known before the broker's answer: deliveries may come together with it.
        tag = consumer_tag or f"{self.channel_id}.{next(self._consumer_numbers)}"
        self.consumers[tag.encode()] = on_delivery
        self.cancel_callbacks[tag] = on_cancel
        self.basic_consume(queue, tag, no_ack=no_ack, exclusive=exclusive, on_cancel=on_cancel)
        return tag

    def read_stream(self, queue: str, on_delivery: OnDelivery, *, seconds: float) -> None:
        """Read all messages that a stream has now. The broker counts them late, so the last one is asked for first."""
        connection = self._open_connection()
        with connection.limit(seconds, f"reading {queue}"):
            last = -1

            def find_last(delivery: Delivery) -> None:
                nonlocal last
                last = _offset(delivery, last + 1)

            def wait_for_last() -> None:
                while last < 0:
                    connection.drain_events()

            declared: Any = self.queue_declare(queue, passive=True)
            is_empty = declared.message_count == 0
            self.basic_qos(0, _STREAM_PREFETCH, False)
            tag = self._consume_stream(queue, "last", find_last)
            if is_empty:
                with contextlib.suppress(TimeoutError), connection.limit(_STREAM_SILENCE, f"reading {queue}"):
                    wait_for_last()
            else:
                wait_for_last()
            self.basic_cancel(tag)  # waits for the answer, behind the rest of the last chunk
            if last < 0:
                return
            read, unacked = -1, 0

            def take(delivery: Delivery) -> None:
                nonlocal read, unacked
                read, unacked = _offset(delivery, read + 1), unacked + 1
                on_delivery(delivery)
                if unacked >= _STREAM_PREFETCH // 2:
                    self.basic_ack(delivery.delivery_tag, multiple=True)
                    unacked = 0

            self._consume_stream(queue, "first", take)
            while read < last:
                connection.drain_events()

    def _consume_stream(self, queue: str, offset: str, on_delivery: OnDelivery) -> str:
        tag = f"{self.channel_id}.{next(self._consumer_numbers)}"
        self.consumers[tag.encode()] = on_delivery
        self.basic_consume(queue, tag, on_cancel=ignore, arguments={"x-stream-offset": offset})
        return tag

    def first_properties(self, queue: str) -> Properties | None:
        """AMQP has no such request."""
        return None

    def get(self, queue: str) -> Delivery | None:
        """Take one message, which must be settled. None: the queue is empty."""
        connection = self._open_connection()
        got: list[Delivery | None] = []
        self._on_get = got.append
        self._waiting += 1
        try:
            self.send_method(spec.Basic.Get, "Bsb", (0, queue, False))
            with connection.limit(connection.operation_timeout, "basic.get"):
                while not got:
                    connection.drain_events()
        finally:
            self._waiting -= 1
            self._on_get = None
        return got[0]

    def basic_nack(self, delivery_tag: int, multiple: bool = False, requeue: bool = True) -> Any:
        """Reject one message, or all up to this one. An extension of RabbitMQ, which py-amqp can only receive."""
        return self.send_method(spec.Basic.Nack, "Lbb", (delivery_tag, multiple, requeue))

    def exchange_declare(  # type: ignore[override] # pyright: ignore[reportIncompatibleMethodOverride]
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
    ) -> Any:
        """Declare an exchange. py-amqp's method cannot declare an `internal` one."""
        return self.send_method(
            spec.Exchange.Declare,
            "BssbbbbbF",
            (0, exchange, type, passive, durable, auto_delete, internal, nowait, arguments),
            wait=None if nowait else spec.Exchange.DeclareOk,
        )

    def wait(self, method: Any, callback: Any = None, timeout: float | None = None, returns_tuple: bool = False) -> Any:
        """Wait for an answer, as py-amqp does, but with a limit."""
        connection = self._open_connection()
        self._waiting += 1
        try:
            with connection.limit(timeout or connection.operation_timeout, method_name(method)):
                return super().wait(method, callback, None, returns_tuple)
        finally:
            self._waiting -= 1

    def on_content(self, method: int, arguments: bytes, properties: bytes, body: bytes) -> None:
        """Handle a method with content. `arguments` is the payload of its frame, from the class id on."""
        if self.is_closing:
            return
        start, on_delivery = 4, None
        if method == wire.DELIVER:
            start = 5 + arguments[4]
            on_delivery = self.consumers.get(arguments[5:start])
        elif method == wire.GET_OK:
            on_delivery = self._on_get
        elif method == wire.RETURN:
            self.on_return(wire.decode_properties(properties).get("message_id", ""))
            return
        if on_delivery is not None:
            tag, redelivered = wire.tag_and_bit.unpack_from(arguments, start)
            exchange, routing_key = wire.decode_names(arguments[start + 9 :])
            decode = functools.partial(wire.decode_properties, properties)
            on_delivery(Delivery(self, tag, redelivered != 0, exchange, routing_key, decode, body))
        else:  # the caller uses py-amqp's basic_consume or basic_get
            message: Any = amqp.Message(channel=self)
            message.body = body
            message.properties = serialization.decode_properties_basic(properties, 0)[0]
            self.dispatch_method((method >> 16, method & 0xFFFF), arguments, message)

    def on_large_content(self, method: int, arguments: bytes, properties: bytes, body: bytes) -> None:
        """`on_content` for a body of several frames."""
        if method == wire.DELIVER and self.takes is not None and not self.is_closing:
            (tag,) = wire.longlong.unpack_from(arguments, 5 + arguments[4])
            if not self.takes(tag, len(body)):
                return
        self.on_content(method, arguments, properties, body)

    def _on_got_nothing(self, *_: object) -> None:
        if self._on_get is not None:
            self._on_get(None)

    def _remove_tag(self, consumer_tag: str) -> Any:
        self.consumers.pop(consumer_tag.encode(), None)
        return super()._remove_tag(consumer_tag)

    def _on_close(self, reply_code: int, reply_text: str, class_id: int, method_id: int) -> None:
        """The broker closed the channel because of an error. It stays closed.

        py-amqp would open the same object again, with delivery tags from 1. A late ack of an earlier delivery would
        then settle a different one.
        """
        self.send_method(spec.Channel.CloseOk)
        if not self.is_closing:
            self.collect()
            method = (class_id, method_id)
            error = amqp.exceptions.error_for_code(reply_code, reply_text, method, amqp.exceptions.ChannelError)
            if self.on_closed is None or self._waiting:
                raise error
            self.on_closed(error)

    def _open_connection(self) -> Owner:
        if self.connection is None:
            raise amqp.exceptions.RecoverableConnectionError("channel already closed")
        connection: Owner = self.connection
        return connection


def _encode_heads(number: int, publications: Sequence[Publication], frame_max: int) -> list[bytes]:
    heads: list[bytes] = []
    try:
        for publication in publications:
            heads.append(wire.encode_publish(number, publication, frame_max))  # the error is in the next one
    except ValueError as error:
        culprit = publications[len(heads)]
        try:
            wire.encode_publish(number, culprit, frame_max)
        except ValueError:
            raise Unencodable(str(error), culprit) from error
        raise  # it can be encoded: a signal handler raised the error
    return heads
