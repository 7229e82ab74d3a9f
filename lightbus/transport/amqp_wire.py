"""The bytes of AMQP 0-9-1 of which there is one lot a message: properties, and the frames around a publish.

By hand, since py-amqp's tables cost several times as much; header tables of rarer types are left to those.
"""

# py-amqp has no types:
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import functools
import struct
from collections.abc import Mapping
from typing import Any

import amqp.exceptions
from amqp import serialization

from lightbus.transport import Properties, Publication

METHOD, HEADER, BODY, HEARTBEAT = KINDS = (1, 2, 3, 8)
END = 0xCE
DELIVER, GET_OK, RETURN = WITH_CONTENT = (60 << 16 | 60, 60 << 16 | 71, 60 << 16 | 50)
ACK, NACK = 60 << 16 | 80, 60 << 16 | 120

frame = struct.Struct(">BHI")  # type, channel, size of the payload
header_frame = struct.Struct(">BHIHHQ")  # up to its properties: frame, class, weight, size of the body
tag_and_bit = struct.Struct(">QB")
long = struct.Struct(">I")
longlong = struct.Struct(">Q")
_signed_long = struct.Struct(">i")
_signed_longlong = struct.Struct(">q")

_SHORTSTR, _TABLE, _OCTET, _TIMESTAMP = range(4)
_PROPERTIES = tuple(
    (name, 0x8000 >> index, kind)
    for index, (name, kind) in enumerate(
        {
            "content_type": _SHORTSTR,
            "content_encoding": _SHORTSTR,
            "headers": _TABLE,
            "delivery_mode": _OCTET,
            "priority": _OCTET,
            "correlation_id": _SHORTSTR,
            "reply_to": _SHORTSTR,
            "expiration": _SHORTSTR,
            "message_id": _SHORTSTR,
            "timestamp": _TIMESTAMP,
            "type": _SHORTSTR,
            "user_id": _SHORTSTR,
            "app_id": _SHORTSTR,
            "cluster_id": _SHORTSTR,
        }.items()
    )
)
_KNOWN = frozenset(name for name, _, _ in _PROPERTIES)
_MALFORMED = (
    struct.error,
    UnicodeError,
    IndexError,
    ArithmeticError,
    OSError,
    RecursionError,
    amqp.exceptions.AMQPError,
)

_UNENCODABLE = (
    struct.error,
    ArithmeticError,
    RecursionError,
    TypeError,
    AttributeError,
    ValueError,
    IndexError,
    amqp.exceptions.AMQPError,
)


def decode_properties(data: bytes) -> Properties:
    """The property flags and values of a header frame.

    Raises:
        ValueError: they are not well-formed.
    """
    properties: Properties = {}
    try:
        flags = data[0] << 8 | data[1]
        position = 2
        for name, kind in _present(flags):
            if kind == _SHORTSTR:
                end = position + 1 + data[position]
                properties[name] = data[position + 1 : end].decode()
                position = end
            elif kind == _TABLE:
                properties[name], position = _decode_table(data, position)
            elif kind == _OCTET:
                properties[name] = data[position]
                position += 1
            else:
                (properties[name],) = longlong.unpack_from(data, position)
                position += 8
    except _MALFORMED as error:
        raise ValueError(f"the message's properties are malformed: {error}") from error
    if position != len(data) or flags & 1:
        raise ValueError(f"the message's properties are malformed: they end at byte {position} of {len(data)}")
    return properties


@functools.lru_cache(256)  # of 65536 combinations, an application meets a few
def _present(flags: int) -> tuple[tuple[str, int], ...]:
    return tuple((name, kind) for name, bit, kind in _PROPERTIES if flags & bit)


def _decode_table(data: bytes, start: int) -> tuple[dict[str, Any], int]:
    """A table of the usual types by hand, any other by py-amqp."""
    table: dict[str, Any] = {}
    position = start + 4
    end = position + long.unpack_from(data, start)[0]
    while position < end:
        at = position + 1 + data[position]
        key = data[position + 1 : at].decode()
        kind = data[at : at + 1]
        if kind == b"S":
            position = at + 5 + long.unpack_from(data, at + 1)[0]
            value = data[at + 5 : position]
            try:
                table[key] = value.decode()
            except UnicodeDecodeError:
                table[key] = value
        elif kind == b"I":
            (table[key],) = _signed_long.unpack_from(data, at + 1)
            position = at + 5
        elif kind == b"l":
            (table[key],) = _signed_longlong.unpack_from(data, at + 1)
            position = at + 9
        elif kind == b"t":
            table[key] = data[at + 1] != 0
            position = at + 2
        else:
            values, position = serialization.loads("F", data, start)
            table = values[0]
            break
    if position != end:
        raise IndexError(f"a table ends at byte {position}, not {end}")
    return table, end


def encode_properties(properties: Properties) -> bytes:
    """The property flags and values of a header frame.

    Raises:
        ValueError: one is not known, or its value not of its type.
    """
    flags = 0
    parts = [b""]
    name = ""
    try:
        for name, bit, kind in _PROPERTIES:
            value = properties.get(name)
            if value is None:
                continue
            flags |= bit
            if kind == _SHORTSTR:
                parts.append(_shortstr(value))
            elif kind == _TABLE:
                parts.append(_encode_table(value))
            elif kind == _OCTET:
                parts.append(bytes((value,)))
            else:
                parts.append(longlong.pack(value))
    except _UNENCODABLE as error:
        raise ValueError(f"the property {name}={properties[name]!r} cannot be encoded: {error}") from error
    if len(parts) <= len(properties) and (unknown := properties.keys() - _KNOWN):
        raise ValueError(f"AMQP knows no property {sorted(unknown)[0]!r}")
    parts[0] = flags.to_bytes(2)
    return b"".join(parts)


def _shortstr(value: str) -> bytes:
    encoded = value.encode()
    if len(encoded) > 255:
        raise ValueError(f"it is {len(encoded)} bytes long, and 255 is the most")
    return bytes((len(encoded),)) + encoded


def _encode_table(table: Mapping[str, Any]) -> bytes:
    """A table of the usual types by hand, any other by py-amqp."""
    parts = []
    for key, value in table.items():
        kind = type(value)
        if kind is str:
            encoded = value.encode()
            parts.append(_shortstr(key) + b"S" + long.pack(len(encoded)) + encoded)
        elif kind is int and -0x80000000 <= value < 0x80000000:
            parts.append(_shortstr(key) + b"I" + _signed_long.pack(value))
        elif kind is bool:
            parts.append(_shortstr(key) + (b"t\x01" if value else b"t\x00"))
        else:
            rendered: bytes = serialization.dumps("F", [table])
            return rendered
    encoded = b"".join(parts)
    return long.pack(len(encoded)) + encoded


def encode_publish(number: int, publication: Publication, frame_max: int) -> bytes:
    """The method frame and the header frame of a message.

    Raises:
        ValueError: a property cannot be encoded, or all together do not fit one frame of `frame_max` bytes.
    """
    method = _publish_frame(number, publication.exchange, publication.routing_key, publication.mandatory)
    properties = encode_properties(publication.properties)
    if len(properties) > frame_max - 20:  # the broker would close the connection
        raise ValueError(
            f"its headers and properties have {len(properties):,} bytes; the broker takes {frame_max - 20:,} at most"
        )
    body_size = len(publication.body)
    header = header_frame.pack(HEADER, number, 12 + len(properties), 60, 0, body_size)
    return b"".join((method, header, properties, b"\xce"))


@functools.lru_cache(1024)  # an application publishes few kinds of events
def _publish_frame(number: int, exchange: str, routing_key: str, mandatory: bool) -> bytes:
    names = b"".join(_name(name) for name in (exchange, routing_key))
    payload = b"".join((b"\x00\x3c\x00\x28\x00\x00", names, b"\x01" if mandatory else b"\x00"))
    return frame.pack(METHOD, number, len(payload)) + payload + b"\xce"


def _name(name: str) -> bytes:
    encoded = name.encode(errors="surrogateescape")
    if len(encoded) > 255:
        raise ValueError(f"the name {name!r} is {len(encoded)} bytes long, and 255 is the most")
    return bytes((len(encoded),)) + encoded


@functools.lru_cache(1024)  # as above: the same few come again and again
def decode_names(data: bytes) -> tuple[str, str]:
    """An exchange's name and a routing key. Any publisher may use bytes there that are no UTF-8: they survive."""
    middle = 1 + data[0]
    end = middle + 1 + data[middle]
    return data[1:middle].decode(errors="surrogateescape"), data[middle + 1 : end].decode(errors="surrogateescape")
