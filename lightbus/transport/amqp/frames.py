"""Reading: turns the bytes that a connection received into calls of its channels."""

from __future__ import annotations

from typing import Any, Protocol

import attrs

from lightbus.transport.amqp import wire as wire

LARGEST_HEADER = 16 * 1024 * 1024


class Receiver(Protocol):
    """What a `FrameReader` needs from its connection."""

    channels: Any
    """py-amqp's channels by their numbers. Number 0 is the connection itself."""
    is_closing: Any
    """While the connection is being closed, only its own frames count."""
    frame_max: Any
    """The agreed size of a frame, in bytes."""

    def not_amqp(self, what: str) -> Exception:
        """The error for bytes that are not AMQP. From now on, the connection is lost."""
        ...


@attrs.define
class _Content:
    """A message of which not all frames have arrived."""

    method: int
    arguments: bytes
    properties: bytes = b""
    missing: int = -1  # bytes of the body; -1 until its header frame has arrived
    pieces: list[bytes] = attrs.field(factory=list)


class FrameReader:
    """The received bytes of one connection. Used by the connection's owner or an event loop, one at a time."""

    def __init__(self, connection: Receiver) -> None:
        self._connection = connection
        self._buffer, self._position = b"", 0  # what was received, and how much of it is dispatched
        self._contents: dict[int, _Content] = {}  # by channel

    def feed(self, pieces: list[bytes]) -> None:
        """Add received bytes."""
        self._buffer, self._position = b"".join((self._buffer[self._position :], *pieces)), 0

    def clear(self) -> None:
        self._buffer, self._position = b"", 0

    def dispatch(self) -> bool:
        """Give every complete frame to its channel.

        Returns:
            whether there was one.

        Raises:
            amqp.exceptions.UnexpectedFrame: the peer does not speak AMQP.
            Exception: what a callback raised. The frames behind it are left for the next call.
        """
        dispatched = False
        connection = self._connection
        while True:
            # Read again for each frame: a callback may feed more, or close the connection.
            buffer, start = self._buffer, self._position
            if len(buffer) - start < 8:
                return dispatched
            kind, number, size = wire.frame.unpack_from(buffer, start)
            end = start + 7 + size
            # RabbitMQ adds headers to a message (x-death, x-delivery-count). If the message came with as many as fit a
            # frame, the result is a header frame that is larger than agreed.
            if kind not in wire.KINDS or (
                size > connection.frame_max and (kind != wire.HEADER or size > LARGEST_HEADER)
            ):
                raise connection.not_amqp(f"not an AMQP frame: {buffer[start : start + 20]!r}")
            if end >= len(buffer):
                return dispatched
            if buffer[end] != wire.END:
                raise connection.not_amqp(f"a frame ends with {buffer[end]:#04x} and not 0xce")
            dispatched = True
            self._position = end + 1
            channel = None if connection.is_closing and number else connection.channels.get(number)
            if kind == wire.METHOD:
                (method,) = wire.long.unpack_from(buffer, start + 7)
                if method in wire.WITH_CONTENT:
                    if not self._dispatch_message(method, number, start + 7, end, channel):
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

    def _dispatch_message(self, method: int, number: int, start: int, end: int, channel: Any) -> bool:
        """Dispatch a message whose method frame has the payload `buffer[start:end]`, if its header frame and its only
        body frame follow directly and are here. This is nearly always so. False: collect its frames one by one.
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
        """Add a header or body frame to the message that began on this channel. Dispatch the message once complete."""
        content = self._contents.get(number)
        if content is None or (kind == wire.HEADER) != (content.missing < 0):
            raise self._connection.not_amqp(f"a frame of type {kind} out of turn")
        if kind == wire.HEADER:
            (content.missing,) = wire.longlong.unpack_from(payload, 4)
            content.properties = payload[12:]
        else:
            content.missing -= len(payload)
            content.pieces.append(payload)
            if content.missing < 0:
                raise self._connection.not_amqp("a body longer than its header states")
        if content.missing == 0:
            del self._contents[number]
            if channel is not None:
                on_content = channel.on_content if len(content.pieces) < 2 else channel.on_large_content
                on_content(content.method, content.arguments, content.properties, b"".join(content.pieces))
