"""AMQP over py-amqp, read and written in large pieces.

py-amqp reads a message with nine small `recv` calls and decodes it by generic tables. Here the socket
is read 64 KiB at a time, and the four methods of which there is one a message (deliver, publish, ack, nack)
are read and written by hand; everything else (handshake, declarations, errors) stays py-amqp's.

Every wait has a limit: `connect_timeout` (TCP, TLS and AMQP's handshake in total), `operation_timeout` (a synchronous
method, in total) and `write_timeout` (up to 256 KiB). All are in seconds, the latter two are transport options.
"""

# py-amqp and kombu have no types:
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import contextlib
import functools
import itertools
import platform
import select
import socket
import ssl
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from time import monotonic
from typing import Any

import amqp
import amqp.exceptions
import amqp.transport
import attrs
import kombu.transport.pyamqp
from amqp import serialization, spec

from lightbus import errors
from lightbus.transport import Delivery, Publication, Unencodable
from lightbus.transport.amqp import wire as wire
from lightbus.version import __version__

CONNECT_TIMEOUT = 5.0
OPERATION_TIMEOUT = 10.0
WRITE_TIMEOUT = 5.0
CLOSE_TIMEOUT = 3.0
USER_TIMEOUT = 30
"""Seconds that sent data may stay unacknowledged by the peer's system. py-amqp's 1 s ends connections over a hiccup."""

_READ_SIZE = 65536
_READS_AT_ONCE = 4
_WRITE_SIZE = 262144
_NOWAIT_SIZE = 1048576  # about what a system takes at once on the way to a broker that reads

_LARGEST_HEADER = 16 * 1024 * 1024

_WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Channel(kombu.transport.pyamqp.Channel):
    """A channel that delivers and publishes by the batch; see `lightbus.transport.Channel`."""

    channel_id: Any
    counts_bytes = False  # RabbitMQ knows no prefetch in bytes

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.on_ack: Callable[[int, bool], None] = _ignore
        self.on_nack: Callable[[int, bool], None] = _ignore
        self.on_return: Callable[[str], None] = _ignore
        self.on_closed: Callable[[Exception], object] | None = None
        self.takes: Callable[[int, int], bool] | None = None
        self._waiting = 0
        self.consumers: dict[bytes, Callable[[Delivery], object]] = {}
        self._consumer_numbers = itertools.count(1)
        self._on_get: Callable[[Delivery | None], object] | None = None
        self._callbacks[spec.Basic.GetEmpty] = self._on_got_nothing

    def publish(self, publications: Sequence[Publication]) -> None:
        """Send all, in one piece where possible; returns without waiting for confirms.

        Raises:
            Unencodable: one cannot be sent as it is; nothing was sent.
            TimeoutError: the broker does not read (the connection is lost then; what arrived is unknown).
            OSError or amqp.exceptions.AMQPError: the connection or the channel was lost.
        """
        connection, number = self._open_connection(), self.channel_id
        # First all that can fail, so that an error leaves no part of the batch sent.
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
                    connection.send(b"".join(parts))
                    parts, size = [], 0
        connection.send(b"".join(parts))
        connection.bytes_sent += 1  # for heartbeats

    def publish_nowait(self, publications: Sequence[Publication]) -> bool:
        """`publish` for any thread, where it needs no waiting; False where nothing was sent.

        Raises:
            Unencodable: one cannot be sent as it is; nothing was sent.
        """
        connection, number = self.connection, self.channel_id
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
        sent: bool = connection.send_nowait(b"".join(parts))
        return sent

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
        """Subscribe and return the consumer tag. `on_cancel(consumer_tag)` is called when the broker ends it."""
        # The tag is ours, and known before the broker's answer: deliveries may come in one piece with that.
        tag = consumer_tag or f"{self.channel_id}.{next(self._consumer_numbers)}"
        self.consumers[tag.encode()] = on_delivery
        self.cancel_callbacks[tag] = on_cancel
        self.basic_consume(queue, tag, no_ack=no_ack, exclusive=exclusive, on_cancel=on_cancel)
        return tag

    def get(self, queue: str) -> Delivery | None:
        """Take one message that is to be acked, or None where the queue is empty."""
        connection = self._open_connection()
        got: list[Delivery | None] = []
        self._on_get = got.append
        self.send_method(spec.Basic.Get, "Bsb", (0, queue, False))
        with connection.limit(connection.operation_timeout, "basic.get"):
            while not got:
                connection.drain_events()
        self._on_get = None
        return got[0]

    def basic_nack(self, delivery_tag: int, multiple: bool = False, requeue: bool = True) -> Any:
        """Reject one message, or all up to this one. RabbitMQ's extension, which py-amqp can only receive."""
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
        """Declare an exchange. py-amqp's own cannot declare an `internal` one."""
        return self.send_method(
            spec.Exchange.Declare,
            "BssbbbbbF",
            (0, exchange, type, passive, durable, auto_delete, internal, nowait, arguments),
            wait=None if nowait else spec.Exchange.DeclareOk,
        )

    def wait(self, method: Any, callback: Any = None, timeout: float | None = None, returns_tuple: bool = False) -> Any:
        """py-amqp's, but never for ever."""
        connection = self._open_connection()
        self._waiting += 1
        try:
            with connection.limit(timeout or connection.operation_timeout, _method_name(method)):
                return super().wait(method, callback, None, returns_tuple)
        finally:
            self._waiting -= 1

    def on_content(self, method: int, arguments: bytes, properties: bytes, body: bytes) -> None:
        """Handle a method that came with a message. `arguments` is the payload of its frame, from the class on."""
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
        else:  # somebody uses py-amqp's own basic_consume or basic_get
            message: Any = amqp.Message(channel=self)
            message.body = body
            message.properties = serialization.decode_properties_basic(properties, 0)[0]
            self.dispatch_method((method >> 16, method & 0xFFFF), arguments, message)

    def on_large_content(self, method: int, arguments: bytes, properties: bytes, body: bytes) -> None:
        """`on_content` for a body that came in several frames."""
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
        """The broker closed the channel over an error. It stays closed.

        py-amqp would open the same object again, with delivery tags from 1: an ack of an earlier delivery would then
        ack a different one, silently.
        """
        self.send_method(spec.Channel.CloseOk)
        if not self.is_closing:
            self.collect()
            method = (class_id, method_id)
            error = amqp.exceptions.error_for_code(reply_code, reply_text, method, amqp.exceptions.ChannelError)
            if self.on_closed is None or self._waiting:
                raise error
            self.on_closed(error)

    def _open_connection(self) -> Connection:
        if self.connection is None:
            raise amqp.exceptions.RecoverableConnectionError("channel already closed")
        connection: Connection = self.connection
        return connection


def _encode_heads(number: int, publications: Sequence[Publication], frame_max: int) -> list[bytes]:
    heads: list[bytes] = []
    try:
        for publication in publications:
            heads.append(wire.encode_publish(number, publication, frame_max))  # its length tells which
    except ValueError as error:
        culprit = publications[len(heads)]
        try:
            wire.encode_publish(number, culprit, frame_max)
        except ValueError:
            raise Unencodable(str(error), culprit) from error
        raise  # it can be encoded: a signal's handler raised
    return heads


@attrs.define
class _Content:
    """A message of which not all frames have arrived."""

    method: int
    arguments: bytes
    properties: bytes = b""
    missing: int = -1  # bytes of the body; -1 until the header is here
    pieces: list[bytes] = attrs.field(factory=list)


class Connection(kombu.transport.pyamqp.Connection):
    """A connection that reads and writes large pieces; see `lightbus.transport.Connection`."""

    Channel = Channel
    _transport: Any
    channels: Any

    def __init__(
        self,
        *args: Any,
        operation_timeout: float = OPERATION_TIMEOUT,
        write_timeout: float = WRITE_TIMEOUT,
        connect_timeout: float | None = None,
        socket_settings: Mapping[int, int] | None = None,
        client_properties: Mapping[str, Any] | None = None,
        endpoint: tuple[int, int, int, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            endpoint: family, type, protocol and address of the socket to connect, instead of looking the host up.
        """
        settings = dict(socket_settings or {})
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            settings.setdefault(socket.TCP_USER_TIMEOUT, USER_TIMEOUT * 1000)
        kwargs["connect_timeout"] = connect_timeout or CONNECT_TIMEOUT
        kwargs["socket_settings"] = settings
        kwargs["client_properties"] = {**_product(), **(client_properties or {})}
        super().__init__(*args, **kwargs)
        self.endpoint = endpoint
        self.reached: Any = None
        self.operation_timeout = operation_timeout
        self.write_timeout = write_timeout
        self.blocked = False
        self._buffer, self._position = b"", 0  # what was read, and how much of it was dispatched
        self._contents: dict[int, _Content] = {}  # by channel
        self._deadline: float | None = None
        self._interrupted = False
        # Reentrant, so that it knows its owner: see `send_nowait`.
        self._sending = threading.RLock()
        self._unsent: bytes | memoryview = b""  # what somebody began to send who could not wait
        self.may_wait = True
        self.on_unsent: Callable[[], object] = _ignore
        self._wake_up, self._woken = socket.socketpair()
        self._wake_up.setblocking(False)
        self._woken.setblocking(False)

    def connect(self, callback: Any = None) -> None:
        """Connect and shake hands.

        Raises:
            OSError: nobody answered (TimeoutError: within `connect_timeout`).
            amqp.exceptions.AMQPError: the broker refused, or does not speak AMQP.
        """
        if self.connected:
            return
        deadline = monotonic() + (self.connect_timeout or CONNECT_TIMEOUT)
        try:
            tls = _verified(self.ssl, self.host)
            self._transport = self.Transport(self.host, self.connect_timeout, tls, socket_settings=self.socket_settings)
            if self.endpoint is not None:
                self._transport._connect = functools.partial(_dial, self._transport, self.endpoint, deadline)
            self._transport.connect()
            # From here on no call on the socket blocks, and we poll. (py-amqp's way is one timeout, which reads change
            # while writes rely on it.)
            sock = self._transport.sock
            sock.setblocking(False)
            self._transport.write = self.send
            self.frame_writer = self.frame_writer_cls(self, self._transport)
            self._poll, self._read_poll, self._write_poll = select.poll(), select.poll(), select.poll()
            self._poll.register(sock, select.POLLIN)
            self._poll.register(self._woken, select.POLLIN)
            self._read_poll.register(sock, select.POLLIN)
            self._write_poll.register(sock, select.POLLIN | select.POLLOUT)
            with self.limit(max(0.0, deadline - monotonic()), "the AMQP handshake"):
                self._shake_hands()
        except BaseException:
            self.collect()
            raise

    def _shake_hands(self) -> None:
        try:
            while not self._handshake_complete:
                self.drain_events()
        except (OSError, amqp.exceptions.AMQPError):
            raise
        except Exception as error:  # py-amqp's, over frames that only look like AMQP
            raise amqp.exceptions.UnexpectedFrame(
                f"the peer at {self.host} does not speak AMQP 0-9-1: {type(error).__name__}: {error}"
            ) from error

    def close(self, *_: Any, **__: Any) -> None:
        """Close with the protocol's handshake, within `CLOSE_TIMEOUT`."""
        if self._transport is None:
            return
        self.is_closing = True
        try:
            # A peer that is gone or silent is no reason to fail: closed is what the caller wants.
            with contextlib.suppress(OSError, amqp.exceptions.AMQPError), self.limit(CLOSE_TIMEOUT, "connection.close"):
                self.send_method(spec.Connection.Close, "BsBB", (0, "", 0, 0))
                super().wait(spec.Connection.CloseOk)
        finally:
            self.is_closing = False
            self.collect()

    def collect(self) -> None:
        """Drop the connection without a word to the peer: what is left to do after a fault or a fork."""
        transport, self._transport = self._transport, None
        if transport is not None and transport.sock is not None:
            # Not while another thread sends, or it might send to whatever gets the same descriptor next. (In a forked
            # child that thread is not there, and its lock may stay held.)
            held = self._sending.acquire(timeout=0.1)
            # Not `transport.close()`: its shutdown and its TLS goodbye, in a forked child, would end the connection
            # for the parent too.
            transport.sock.close()
            transport.connected = False
            if held:
                self._sending.release()
        self._wake_up.close()
        self._woken.close()
        self._buffer, self._position = b"", 0
        super().collect()

    # --- waiting ------------------------------------------------------------------------------

    def drain_events(self, timeout: float | None = None) -> None:
        """Wait up to `timeout` seconds for something to arrive, then dispatch *all* that has arrived.

        Returns after one such piece of work, or as soon as `interrupt()` was called (before or during).
        Inside a synchronous method that one's limit counts, and interruptions are left to the next call.
        """
        if self._deadline is None:
            poll, deadline = self._poll, None if timeout is None else monotonic() + timeout
        else:
            poll, deadline = self._read_poll, self._deadline
            if monotonic() > deadline:
                raise TimeoutError
        if self._unsent:
            self.send(b"")
        if self._dispatch():  # what an error left behind in the last call
            return
        while True:
            sock = self._open_socket()
            ready = poll.poll(None if deadline is None else max(0.0, deadline - monotonic()) * 1000)
            if not ready:
                raise TimeoutError("nothing arrived")
            interrupted = False
            for descriptor, _ in ready:
                if descriptor == sock.fileno():
                    self._read()
                else:
                    # In this order: an interruption in between costs one idle turn. The other way round it is lost.
                    self._woken.recv(64)
                    self._interrupted = False
                    interrupted = True
            if self._dispatch() or interrupted:
                return

    def interrupt(self) -> None:
        """Make the present or the next `drain_events` return at once. From any thread, at any time."""
        if not self._interrupted:
            self._interrupted = True  # one byte serves any number of calls
            try:
                self._wake_up.send(b"\0")
            except BaseException as error:
                if isinstance(error, OSError) and not errors.is_from_deeper(error):  # closed: nobody waits any more
                    return
                self._interrupted = False  # a signal's handler raised: whether the byte was sent is not known
                raise

    # for an event loop: see `lightbus.transport.WatchedConnection`

    def watched(self) -> Connection:
        return self

    def fileno(self) -> int:
        descriptor: int = self._open_socket().fileno()
        return descriptor

    def drain_nowait(self) -> None:
        self._read()
        self._dispatch()

    def catch_up(self) -> bool:
        if self._unsent:
            self.send(b"")
        return self._dispatch()

    def wait(self, method: Any, callback: Any = None, timeout: float | None = None, returns_tuple: bool = False) -> Any:
        """py-amqp's, but never for ever."""
        with self.limit(timeout or self.operation_timeout, _method_name(method)):
            return super().wait(method, callback, None, returns_tuple)

    @contextlib.contextmanager
    def limit(self, seconds: float, what: str) -> Generator[None]:
        """Let all reads and writes inside end within `seconds` in total, else with a TimeoutError that names `what`."""
        before, self._deadline = self._deadline, monotonic() + seconds
        try:
            yield
        except TimeoutError as error:
            raise TimeoutError(f"the broker at {self.host} did not complete {what} within {seconds:.3g} s") from error
        finally:
            self._deadline = before

    # --- reading ------------------------------------------------------------------------------

    def _read(self) -> None:
        """Add what the socket has to the buffer, without waiting."""
        sock = self._open_socket()
        pieces = [self._buffer[self._position :]]
        # TLS gives one record (16 KiB at most) a call, and holds nothing back from a call that asks for more than that.
        for _ in range(_READS_AT_ONCE):
            try:
                piece = sock.recv(_READ_SIZE)
            except _WOULD_BLOCK:
                break
            except OSError:
                self._transport.connected = False
                raise
            pieces.append(piece)
            if not piece or (len(piece) < _READ_SIZE and not self.ssl):
                break
        if pieces[1:] == [b""]:
            self._transport.connected = False
            raise ConnectionResetError("the broker closed the connection without giving a reason")
        self.bytes_recv += 1  # for heartbeat_tick, which only looks whether it changed
        self._buffer, self._position = b"".join(pieces), 0

    def _dispatch(self) -> bool:
        """Hand on every complete frame in the buffer; False where there was none."""
        dispatched = False
        while True:
            # Looked up afresh each time: a callback may read, or close the connection.
            buffer, start = self._buffer, self._position
            if len(buffer) - start < 8:
                return dispatched
            kind, number, size = wire.frame.unpack_from(buffer, start)
            end = start + 7 + size
            # RabbitMQ adds headers to a message (x-death, x-delivery-count) that came with as many as fit a frame, and
            # sends them in a frame that is larger than agreed.
            if kind not in wire.KINDS or (size > self.frame_max and (kind != wire.HEADER or size > _LARGEST_HEADER)):
                raise self._protocol_error(f"not an AMQP frame: {buffer[start : start + 20]!r}")
            if end >= len(buffer):
                return dispatched
            if buffer[end] != wire.END:
                raise self._protocol_error(f"a frame ends with {buffer[end]:#04x} and not 0xce")
            dispatched = True
            self._position = end + 1
            channel = None if self.is_closing and number else self.channels.get(number)
            if kind == wire.METHOD:
                (method,) = wire.long.unpack_from(buffer, start + 7)
                if method in wire.WITH_CONTENT:
                    if not self._hand_on_message(method, number, start + 7, end, channel):
                        self._contents[number] = _Content(method, buffer[start + 7 : end])
                elif channel is None:
                    continue
                elif method == wire.ACK:
                    tag, multiple = wire.tag_and_bit.unpack_from(buffer, start + 11)
                    channel.on_ack(tag, multiple != 0)
                elif method == wire.NACK:
                    tag, bits = wire.tag_and_bit.unpack_from(buffer, start + 11)
                    channel.on_nack(tag, bits & 1 != 0)
                else:
                    channel.dispatch_method((method >> 16, method & 0xFFFF), buffer[start + 7 : end], None)
            elif kind != wire.HEARTBEAT:
                self._collect_content(kind, number, buffer[start + 7 : end], channel)

    def _hand_on_message(self, method: int, number: int, start: int, end: int, channel: Any) -> bool:
        """Hand on a message whose method frame's payload is `buffer[start:end]`, if its header frame and its only body
        frame follow directly and are here: nearly always. Else return False, and its frames are collected one by one.
        """
        buffer = self._buffer
        header = end + 1
        if len(buffer) < header + 28:
            return False
        kind, same, size, _, _, length = wire.header_frame.unpack_from(buffer, header)
        header_end = header + 7 + size
        body = header_end + 8
        body_end = body + length
        if (
            kind != wire.HEADER
            or same != number
            or body_end >= len(buffer)
            or wire.frame.unpack_from(buffer, header_end + 1) != (wire.BODY, number, length)
            or not buffer[header_end] == wire.END == buffer[body_end]
        ):
            return False
        self._position = body_end + 1
        if channel is not None:
            channel.on_content(method, buffer[start:end], buffer[header + 19 : header_end], buffer[body:body_end])
        return True

    def _collect_content(self, kind: int, number: int, payload: bytes, channel: Any) -> None:
        """Add a header or body frame to the message that began on this channel, and hand that on when it is whole."""
        content = self._contents.get(number)
        if content is None or (kind == wire.HEADER) != (content.missing < 0):
            raise self._protocol_error(f"a frame of type {kind} out of turn")
        if kind == wire.HEADER:
            (content.missing,) = wire.longlong.unpack_from(payload, 4)
            content.properties = payload[12:]
        else:
            content.missing -= len(payload)
            content.pieces.append(payload)
            if content.missing < 0:
                raise self._protocol_error("a body longer than its header says")
        if content.missing == 0:
            del self._contents[number]
            if channel is not None:
                on_content = channel.on_content if len(content.pieces) < 2 else channel.on_large_content
                on_content(content.method, content.arguments, content.properties, b"".join(content.pieces))

    def _open_socket(self) -> Any:
        if self._transport is None or not self._transport.connected:
            raise amqp.exceptions.RecoverableConnectionError("connection already closed")
        return self._transport.sock

    def _protocol_error(self, what: str) -> Exception:
        self._transport.connected = False
        return amqp.exceptions.UnexpectedFrame(f"the peer at {self.host} does not speak AMQP 0-9-1: {what}")

    def _x_close_ok(self) -> None:
        """Agree to the broker's close. It may be gone by now: its reason, raised next, is worth more than that."""
        with contextlib.suppress(OSError):
            super()._x_close_ok()
        self.collect()

    def _on_blocked(self) -> None:
        self.blocked = True
        super()._on_blocked()

    def _on_unblocked(self) -> None:
        self.blocked = False
        super()._on_unblocked()

    # --- writing ------------------------------------------------------------------------------

    def send(self, data: bytes | memoryview) -> None:
        """Write all of it, within `write_timeout`; while nobody `may_wait`, what goes at once.

        Raises:
            TimeoutError: the peer did not read in time. A part is written, so the connection is lost.
            OSError or amqp.exceptions.AMQPError: the connection is lost.
        """
        with self._sending:
            if self._unsent:
                data, self._unsent = b"".join((self._unsent, data)), b""
            self._send_all(memoryview(data))

    def _send_all(self, left: memoryview) -> None:
        deadline = monotonic() + self.write_timeout
        if self._deadline is not None:
            deadline = min(deadline, self._deadline)
        while left:
            sock = self._open_socket()
            try:
                left = left[sock.send(left) :]
            except _WOULD_BLOCK:
                if not self.may_wait:
                    self._unsent = bytes(left)
                    self.on_unsent()
                    return
                ready = self._write_poll.poll(max(0.0, deadline - monotonic()) * 1000)
                if not ready or monotonic() > deadline:
                    self._transport.connected = False
                    raise TimeoutError(f"the broker at {self.host} does not read from the connection") from None
                if ready[0][1] != select.POLLOUT:
                    # Read meanwhile, and dispatch later: a broker that cannot send its confirms may stop to read.
                    self._read()
            except OSError:
                self._transport.connected = False
                raise

    def send_nowait(self, data: bytes) -> bool:
        """Send from any thread, if that needs no waiting; False where nothing was sent, and the owner has to do it.

        It saves a publisher the change to the owner's thread and back. What the system does not take at once is the
        owner's to send.

        Raises:
            BaseException: what a signal's handler raised. Nobody knows what was sent: the connection must be replaced.
        """
        if self.ssl:  # two threads must not use one TLS session at once
            return False
        try:
            # Inside, since a signal's handler may raise right after it.
            if not self._sending.acquire(blocking=False):
                return False
            transport = self._transport
            if transport is None or not transport.connected or self._unsent:
                return False
            try:
                sent = transport.sock.send(data)
            except OSError as error:
                if errors.is_from_deeper(error):
                    raise
                return False  # would block, or is lost: the owner finds out
            if sent < len(data):
                self._unsent = memoryview(data)[sent:]
                self.interrupt()
                self.on_unsent()
            self.bytes_sent += 1
            return True
        finally:
            try:
                self._sending.release()
            except RuntimeError as error:  # somebody else holds it
                if errors.is_from_deeper(error):
                    raise


def _dial(transport: Any, endpoint: tuple[int, int, int, Any], deadline: float, *_: object) -> None:
    """Connect a transport's socket to this one address; what is left of the time is for TLS."""
    family, kind, protocol, address = endpoint
    transport.sock = socket.socket(family, kind, protocol)
    try:
        transport.sock.settimeout(max(0.001, deadline - monotonic()))
        transport.sock.connect(address)
    except BaseException:
        transport.sock.close()
        transport.sock = None
        raise
    transport.connect_timeout = max(0.001, deadline - monotonic())


class Transport(kombu.transport.pyamqp.Transport):
    """The class to give to `kombu.Connection(transport=...)`."""

    Connection = Connection


def _product() -> dict[str, str]:
    """What the broker's administrators see of us."""
    driver = f"Python {platform.python_version()}, py-amqp {amqp.__version__}"
    return {"product": "Lightbus", "product_version": __version__, "version": __version__, "platform": driver}


def _ignore(*_: object) -> None:
    """Nobody listens."""


def _method_name(method: Any) -> str:
    methods = method if isinstance(method, list) else [method]
    names = [amqp.exceptions.METHOD_NAME_MAP.get(one, str(one)) for one in methods]
    return " or ".join(names).lower().replace("_", "-")


def _verified(tls: Any, host: str) -> Any:
    """The options for TLS, under which a certificate must be for this host (unless they turn verification off)."""
    if not tls:
        return False
    options = dict(tls) if isinstance(tls, Mapping) else {}
    if "context" not in options and options.get("cert_reqs") != ssl.CERT_NONE:
        options["server_hostname"] = options.get("server_hostname") or amqp.transport.to_host_port(host)[0]
    return options
