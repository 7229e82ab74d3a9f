"""Messages that no client of ours would write, byte by byte: what other programs' clients send to RabbitMQ."""

from __future__ import annotations

import struct
from typing import Any

from lightbus import Lightbus
from lightbus.transport.amqp import wire as wire
from tests.bus import connected

CONTENT_TYPE, HEADERS, CORRELATION_ID, MESSAGE_ID = 0x8000, 0x2000, 0x0400, 0x0080


def table(items: dict[bytes, bytes]) -> bytes:
    """Headers of these names and values, the latter with the letter of their type."""
    inside = b"".join(bytes((len(name),)) + name + value for name, value in items.items())
    return struct.pack(">I", len(inside)) + inside


ODD_PROPERTIES: dict[str, tuple[int, bytes, dict[str, Any]]] = {
    "milliseconds": (HEADERS, table({b"at": b"T" + struct.pack(">Q", 1_700_000_000_000)}), {"at": 1_700_000_000_000}),
    "go-zero-time": (HEADERS, table({b"at": b"T" + struct.pack(">q", -62135596800)}), {"at": -62135596800}),
    "latin-1-name": (HEADERS, table({b"a": b"V", b"gr\xf6sse": b"S\0\0\0\x01x"}), {"a": None, "gr\\xf6sse": "x"}),
    "latin-1-value": (HEADERS, table({b"a": b"S\0\0\0\x02\xf6\xe4"}), {"a": b"\xf6\xe4"}),
    "short": (HEADERS, table({b"a": b"s\0\x07", b"b": b"t\x01"}), {"a": 7, "b": True}),
    "nested": (HEADERS, table({b"a": b"F" + table({b"\xff": b"A\0\0\0\x01V"})}), {"a": {"\\xff": [None]}}),
    "correlation": (CORRELATION_ID, b"\x02\xff\xfe", {}),
    "content-type": (CONTENT_TYPE, b"\x03a/\xf6", {}),
}
"""The flag of one property and its bytes; and the headers, as they arrive."""


def odd_properties(name: str, message_id: bytes = b"m-1") -> bytes:
    flag, encoded, _ = ODD_PROPERTIES[name]
    return (flag | MESSAGE_ID).to_bytes(2) + encoded + bytes((len(message_id),)) + message_id


def publish_raw(
    app_or_url: Lightbus | str, routing_key: bytes, properties: bytes, body: bytes, *, exchange: bytes = b"shop"
) -> None:
    """`properties` are the flags and values of the header frame."""
    arguments = b"".join(
        (b"\x00\x3c\x00\x28\x00\x00", *(bytes((len(n),)) + n for n in (exchange, routing_key)), b"\x00")
    )
    with connected(app_or_url) as connection:
        channel: Any = connection.channel()
        number = channel.channel_id
        header = wire.header_frame.pack(wire.HEADER, number, 12 + len(properties), 60, 0, len(body)) + properties
        method = wire.frame.pack(wire.METHOD, number, len(arguments)) + arguments
        content = wire.frame.pack(wire.BODY, number, len(body)) + body
        channel.connection.writer.send(b"".join((method, b"\xce", header, b"\xce", content, b"\xce")))
        channel.exchange_declare("amq.topic", "topic", passive=True)  # behind it: the broker takes them in order
