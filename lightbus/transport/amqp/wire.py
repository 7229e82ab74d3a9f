"""The bytes of AMQP 0-9-1 that come once per message: properties, and the frames of a publish.

Written by hand, since py-amqp's tables cost several times as much. Any program may have sent a message, so a malformed
property or header must not lose the others.
"""

from __future__ import annotations

import decimal
import functools
import struct
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from lightbus.transport import UNREADABLE, Properties, Publication

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
_MALFORMED = (struct.error, UnicodeError, IndexError, ArithmeticError, OSError, RecursionError)
MOST_NESTED = 64
"""The depth of tables and arrays inside each other. A header with more is unreadable."""

_NUMBERS = {
    kind: struct.Struct(f">{code}")
    for kind, code in zip(b"bBsuIiLlfd", "bBhHiIqqfd", strict=True)  # RabbitMQ's letters: `s` is a short there
}
_NUMBERS[ord("U")] = _NUMBERS[ord("s")]

_UNENCODABLE = (
    struct.error,
    ArithmeticError,
    RecursionError,
    TypeError,
    AttributeError,
    ValueError,
    IndexError,
)


def decode_properties(data: bytes) -> Properties:
    """Decode the property flags and values of a header frame.

    Values that Python cannot represent arrive in another form: text that is not UTF-8 as bytes, a time out of range as
    an int, a header's name with escapes. What cannot be read is left out, and described in `UNREADABLE`.
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
    except _MALFORMED:
        return _decode_odd_properties(data)
    if position != len(data) or flags & 1:
        return _decode_odd_properties(data)
    return properties


def _decode_odd_properties(data: bytes) -> Properties:
    """Decode each property separately, so that a malformed one does not lose the others."""
    properties: Properties = {}
    unreadable: list[str] = []
    position = 2
    flags = int.from_bytes(data[:2]) if len(data) >= 2 else 0
    for name, kind in _present(flags):
        try:
            if kind == _SHORTSTR:
                value, position = _octets(data, position + 1, data[position])
                properties[name] = _text(value)
            elif kind == _TABLE:
                (size,) = long.unpack_from(data, position)
                position += 4
                properties[name], problem = _decode_odd_table(data[position : position + size])
                unreadable += problem
                if position + size > len(data):
                    raise IndexError
                position += size
            elif kind == _OCTET:
                properties[name] = data[position]
                position += 1
            else:
                (properties[name],) = longlong.unpack_from(data, position)
                position += 8
        except _MALFORMED:  # its end is unknown, and so is what follows
            unreadable.append(f"{name} and what follows it")
            break
    else:
        if position != len(data) or flags & 1:
            unreadable.append(f"what follows byte {position}")
    if unreadable:
        properties[UNREADABLE] = ", ".join(unreadable)
    return properties


def _decode_odd_table(data: bytes) -> tuple[dict[str, Any], list[str]]:
    """The headers that can be read, and descriptions of those that cannot. The first of a name counts: it is the one
    that RabbitMQ reads, and replaces with its own (`x-death`, `x-stream-offset`)."""
    table: dict[str, Any] = {}
    unreadable: list[str] = []
    position = 0
    key = "the first one"
    try:
        while position < len(data):
            name, position = _octets(data, position + 1, data[position])
            key = _header_name(name)
            try:
                value, position = _decode_value(data, position, 1)
                if key in table:
                    unreadable.append(f"another header {key!r}")
                else:
                    table[key] = value
            except _MALFORMED:
                if data[position : position + 1] not in (b"F", b"A"):
                    raise
                _, position = _octets(data, position + 5, *long.unpack_from(data, position + 1))
                unreadable.append(f"the header {key!r}")
    except _MALFORMED:
        unreadable.append(f"the headers from {key!r} on")
    return table, unreadable


def _octets(data: bytes, start: int, size: int) -> tuple[bytes, int]:
    end = start + size
    if end > len(data):
        raise IndexError(f"{size} bytes from byte {start} on, of {len(data)}")
    return data[start:end], end


def _text(value: bytes) -> str | bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def _header_name(name: bytes) -> str:
    """The name with escapes. At most 255 bytes, so that a copy of the message can have it, too."""
    return name.decode(errors="backslashreplace").encode()[:255].decode(errors="ignore")


def _decode_value(data: bytes, position: int, depth: int) -> tuple[Any, int]:
    """Decode a header's value. `position` is that of its type letter."""
    kind, position = data[position], position + 1
    number = _NUMBERS.get(kind)
    if number is not None:
        return number.unpack_from(data, position)[0], position + number.size
    match chr(kind):
        case "t":
            return data[position] != 0, position + 1
        case "V":
            return None, position
        case "T":
            return _moment(*_signed_longlong.unpack_from(data, position)), position + 8
        case "D":
            scaled, *_ = _signed_long.unpack_from(data, position + 1)
            sign, digits, _ = decimal.Decimal(scaled).as_tuple()
            return decimal.Decimal((sign, digits, -data[position])), position + 5
        case "S" | "x" | "F" | "A" as letter:
            part, end = _octets(data, position + 4, *long.unpack_from(data, position))
            if letter == "S":
                return _text(part), end
            if letter == "x":
                return part, end
            if depth > MOST_NESTED:
                raise RecursionError
            return (_decode_inner_table if letter == "F" else _decode_array)(part, depth + 1), end
        case letter:
            raise IndexError(f"no type has the letter {letter!r}")


def _decode_inner_table(data: bytes, depth: int) -> dict[str, Any]:
    table: dict[str, Any] = {}
    position = 0
    while position < len(data):
        name, position = _octets(data, position + 1, data[position])
        value, position = _decode_value(data, position, depth)
        table.setdefault(_header_name(name), value)
    return table


def _decode_array(data: bytes, depth: int) -> list[Any]:
    values: list[Any] = []
    position = 0
    while position < len(data):
        value, position = _decode_value(data, position, depth)
        values.append(value)
    return values


def _moment(seconds: int) -> datetime | int:
    """A time, or an int if it is out of range: some programs send milliseconds, and Go's zero time is in the year 1."""
    try:
        return datetime.fromtimestamp(seconds, UTC) if seconds >= 0 else seconds
    except (ValueError, OverflowError, OSError):
        return seconds


@functools.lru_cache(256)  # of 65,536 combinations, an application sees a few
def _present(flags: int) -> tuple[tuple[str, int], ...]:
    return tuple((name, kind) for name, bit, kind in _PROPERTIES if flags & bit)


def _decode_table(data: bytes, start: int) -> tuple[dict[str, Any], int]:
    """Decode a table. Values are nearly always of a few types, which are decoded here."""
    table: dict[str, Any] = {}
    position = start + 4
    end = position + long.unpack_from(data, start)[0]
    count = 0
    while position < end:
        count += 1
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
            table[key], position = _decode_value(data, at, 1)
    if position != end:
        raise IndexError(f"a table ends at byte {position}, not {end}")
    if count != len(table):
        raise IndexError("a name occurs twice")
    return table, end


def encode_properties(properties: Properties) -> bytes:
    """Encode the property flags and values of a header frame.

    Raises:
        ValueError: a property is unknown, or its value has a wrong type.
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
        raise ValueError(f"AMQP has no property {sorted(unknown)[0]!r}")
    parts[0] = flags.to_bytes(2)
    return b"".join(parts)


def _shortstr(value: str | bytes) -> bytes:
    encoded = value if isinstance(value, bytes) else value.encode()
    if len(encoded) > 255:
        raise ValueError(f"it is {len(encoded)} bytes long, and 255 is the most")
    return bytes((len(encoded),)) + encoded


def _encode_table(table: Mapping[str, Any]) -> bytes:
    """Encode a table. Values are nearly always of a few types, which are encoded here."""
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
            parts.append(_shortstr(key) + _encode_value(value))
    return _sized(b"".join(parts))


def _sized(encoded: bytes) -> bytes:
    return long.pack(len(encoded)) + encoded


def _encode_value(value: Any) -> bytes:
    """Encode a header's value, with its type letter."""
    match value:
        case None:
            return b"V"
        case bool():
            return b"t\x01" if value else b"t\x00"
        case str():
            return b"S" + _sized(value.encode())
        case bytes():
            return (b"x" if isinstance(_text(value), str) else b"S") + _sized(value)
        case int():
            small = -0x80000000 <= value < 0x80000000
            return b"I" + _signed_long.pack(value) if small else b"l" + _signed_longlong.pack(value)
        case float():
            return b"d" + _NUMBERS[ord("d")].pack(value)
        case datetime():
            aware = value if value.tzinfo is not None else value.replace(tzinfo=UTC)
            return b"T" + longlong.pack(int(aware.timestamp()))
        case decimal.Decimal():
            scale = max(0, -int(value.as_tuple().exponent))
            return b"D" + bytes((scale,)) + _signed_long.pack(int(value.scaleb(scale)))
        case Mapping():
            return b"F" + _encode_table(value)
        case list() | tuple():
            return b"A" + _sized(b"".join(map(_encode_value, value)))
        case _:
            raise ValueError(f"AMQP has no type for a {type(value).__name__}")


def encode_publish(number: int, publication: Publication, frame_max: int) -> bytes:
    """Encode the method frame and the header frame of a message.

    Raises:
        ValueError: a property cannot be encoded, or all of them do not fit one frame of `frame_max` bytes.
    """
    method = _publish_frame(number, publication.exchange, publication.routing_key, publication.mandatory)
    properties = encode_properties(publication.properties)
    if len(properties) > frame_max - 20:  # the broker closes the connection over it
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


@functools.lru_cache(1024)  # an application consumes few kinds of events
def decode_names(data: bytes) -> tuple[str, str]:
    """Decode an exchange's name and a routing key. Bytes that are not UTF-8 are kept, as surrogate escapes."""
    middle = 1 + data[0]
    end = middle + 1 + data[middle]
    return data[1:middle].decode(errors="surrogateescape"), data[middle + 1 : end].decode(errors="surrogateescape")
