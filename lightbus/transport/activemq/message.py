"""The bytes of AMQP 1.0 that come once per message: its sections.

Written by hand, since proton's `Message` costs twice as much as the rest of proton. AMQP 1.0 has a place for most of
RabbitMQ's properties. The others, and headers that are lists or tables, are message annotations `x-opt-lightbus-...`:
Artemis keeps them. Any program may have sent a message, so a malformed property or header must not lose the others.
"""

from __future__ import annotations

import decimal
import functools
import struct
import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from lightbus.transport import PROPERTY_NAMES, UNREADABLE, Properties, Publication
from lightbus.transport.activemq import names

MOST_NESTED = 64
"""The depth of tables and lists inside each other. A header with more can neither be sent nor read."""
LARGEST = 128 * 1024
"""The most bytes of properties and headers: as many as fit a frame of RabbitMQ."""

_HEADER, _DELIVERY_ANNOTATIONS, _ANNOTATIONS, _PROPERTIES, _APPLICATION, _DATA, _SEQUENCE, _VALUE, _FOOTER = range(
    0x70, 0x79
)
_SECTIONS = {
    name: code
    for code, name in enumerate(
        (
            "header",
            "delivery-annotations",
            "message-annotations",
            "properties",
            "application-properties",
            "data",
            "amqp-sequence",
            "amqp-value",
            "footer",
        ),
        _HEADER,
    )
}

_NOTED = {f"x-opt-lightbus-{name.replace('_', '-')}".encode(): name for name in ("type", "app_id", "cluster_id")}
"""The properties without a place in AMQP 1.0: annotations."""
_TABLES = b"x-opt-lightbus-headers"
"""The annotation of headers that are lists or tables: application properties cannot be. Also of those with a name that
Artemis acts on."""
_THE_PREFIXES = ("_AMQ_", "JMSX", "JMS_")
"""Names that Artemis acts on as application properties. One of them would let the queue's selector drop a copy."""
_THE_BROKERS = ("x-death", "x-delivery-count")
"""Headers that RabbitMQ writes. Those of a publisher are left out."""

_FIELDS = (
    "message_id",
    "user_id",
    None,  # to
    None,  # subject
    "reply_to",
    "correlation_id",
    "content_type",
    "content_encoding",
    None,  # absolute-expiry-time
    "timestamp",
)
_ORIG_ADDRESS, _ORIG_QUEUE = names.ORIG_ADDRESS.encode(), names.ORIG_QUEUE.encode()

_PERSISTENT = 2
_LARGEST_HEADER = 64
_LATEST = (1 << 63) - 1
"""The last creation-time that AMQP 1.0 can express, in milliseconds since 1970. AMQP 0-9-1 has seconds."""
_MOST_SECTIONS = 10_000
_LONGEST_DESCRIPTION = 1000
_EPOCH = datetime.fromtimestamp(0, UTC)
_MILLISECOND = timedelta(milliseconds=1)
_DIGITS, _BIAS = 34, 6176  # of a decimal128, as a binary integer with a decimal exponent
_COEFFICIENT = (1 << 113) - 1
_LARGE_COEFFICIENT = 0b11 << 125  # over 34 digits, so AMQP reads it as 0; also the infinities and NaN

_long = struct.Struct(">I")
_signed_long = struct.Struct(">i")
_signed_longlong = struct.Struct(">q")
_longlong = struct.Struct(">Q")
_double = struct.Struct(">d")
_two_longs = struct.Struct(">II")

_UNENCODABLE = (struct.error, ArithmeticError, RecursionError, TypeError, AttributeError, ValueError, IndexError)
_MALFORMED = (struct.error, ArithmeticError, ValueError, LookupError)

_ONE_BYTE, _FOUR_BYTES, _NO_TYPE = -1, -4, -9
_WIDTHS = [
    {4: 0, 5: 1, 6: 2, 7: 4, 8: 8, 9: 16, 10: -1, 11: -4, 12: -1, 13: -4, 14: -1, 15: -4}.get(code >> 4, _NO_TYPE)
    for code in range(256)
]
"""The bytes of a value of each type, or those of its size."""

_NUMBERS = {
    code: struct.Struct(f">{letter}")
    for code, letter in {
        0x50: "B",
        0x51: "b",
        0x52: "B",
        0x53: "B",
        0x54: "b",
        0x55: "b",
        0x60: "H",
        0x61: "h",
        0x70: "I",
        0x71: "i",
        0x72: "f",
        0x80: "Q",
        0x81: "q",
        0x82: "d",
    }.items()
}
_CONSTANTS = {0x40: None, 0x41: True, 0x42: False, 0x43: 0, 0x44: 0}
_STRINGS = frozenset((0xA1, 0xB1, 0xA3, 0xB3))
_OCTETS = frozenset((0xA0, 0xB0))
_LISTS = {0x45: 1, 0xC0: 3, 0xD0: 9}
"""A list's types, and the bytes before its first item."""
_MAPS = {0xC1: 3, 0xD1: 9}
_ARRAYS = {0xE0: 3, 0xF0: 9}
_BOOLEAN = (bool, type(None))
_INTEGER = (int, type(None))
_ULONGS = frozenset((0x44, 0x53, 0x80))
_UUID = 0x98


# --- encoding ---------------------------------------------------------------------------------


def encode(publication: Publication, subject: str, *, ttl: int | None = None, delay: int | None = None) -> bytes:
    """Encode a message.

    Args:
        subject: the routing key.
        ttl: milliseconds after which it expires; instead of its property `expiration`.
        delay: milliseconds after which the broker delivers it.

    Raises:
        ValueError: a property is unknown, its value has a wrong type, or the headers are too large.
    """
    properties = publication.properties
    try:
        head = _head(properties, subject, ttl, delay)
    except _UNENCODABLE as error:
        raise ValueError(_explain(properties, subject, error)) from error
    if len(head) > LARGEST:
        raise ValueError(f"its headers and properties have {len(head):,} bytes; {LARGEST:,} is the most")
    body = publication.body
    size = len(body)
    if size > 255:
        return b"".join((head, b"\x00\x53\x75\xb0", _long.pack(size), body))
    return b"".join((head, b"\x00\x53\x75\xa0", size.to_bytes(1), body))


def _explain(properties: Properties, subject: str, error: Exception) -> str:
    """What cannot be encoded, and why."""
    for name, value in properties.items():
        if name not in PROPERTY_NAMES:
            return f"AMQP has no property {name!r}"
        try:
            _head({name: value}, "", None, None)
        except _UNENCODABLE as own:
            return f"the property {name}={value!r} cannot be encoded: {own}"
    try:
        _short_string(subject)
    except ValueError as own:
        return f"the routing key {subject!r} cannot be encoded: {own}"
    return f"the message cannot be encoded: {error}"


def _head(properties: Properties, subject: str, ttl: int | None, delay: int | None) -> bytes:
    """The sections before the body."""
    if not properties.keys() <= PROPERTY_NAMES:
        raise ValueError
    get = properties.get
    if ttl is None and (expiration := get("expiration")) is not None:
        ttl = _milliseconds(expiration)
    headers = get("headers")
    noted = _annotations(get("type"), get("app_id"), get("cluster_id"), delay)
    application = b""
    if headers is not None:
        entries: list[bytes] = []
        tables: list[bytes] = []
        for key, value in headers.items():
            kind = type(value)
            if key.startswith(_THE_PREFIXES):
                tables += (_key(key), _encode_value(value, 1))
            elif kind is str:
                entries += (_key(key), _string(value))
            elif kind is int and -128 <= value < 128:
                entries += (_key(key), b"\x54" + value.to_bytes(1, signed=True))
            elif isinstance(value, (list, tuple, Mapping)):
                tables += (_key(key), _encode_value(value, 1))
            else:
                entries += (_key(key), _encode_value(value, 1))
        application = b"\x00\x53\x74" + _compound(0xC1, entries)
        if tables:
            noted = (*noted, b"\xa3\x16" + _TABLES, _compound(0xC1, tables))
    message_id = get("message_id")
    correlation_id = get("correlation_id")
    fields = (
        b"\x40" if message_id is None else _short(message_id),
        _addresses(get("user_id"), subject, get("reply_to")),
        b"\x40" if correlation_id is None else _short(correlation_id),
        _content(get("content_type"), get("content_encoding"), get("timestamp")),
    )
    size = sum(map(len, fields))
    sizes = b"\xc0" + bytes((size + 1, 10)) if size < 255 else b"\xd0" + _two_longs.pack(size + 4, 10)
    return b"".join(
        (
            _header(get("delivery_mode"), get("priority"), ttl),
            b"\x00\x53\x72" + _compound(0xC1, noted) if noted else b"",
            b"\x00\x53\x73",
            sizes,
            *fields,
            application,
        )
    )


@functools.lru_cache(1024, typed=True)
def _header(delivery_mode: int | None, priority: int | None, ttl: int | None) -> bytes:
    if delivery_mode is None and priority is None and ttl is None:
        return b""
    durable = b"\x40"
    if delivery_mode is not None:
        durable = b"\x41" if bytes((delivery_mode,))[0] == _PERSISTENT else b"\x42"
    fields = [
        durable,
        b"\x40" if priority is None else b"\x50" + bytes((priority,)),
        b"\x40" if ttl is None else b"\x70" + _long.pack(ttl),
    ]
    return b"\x00\x53\x70" + _compound(0xC0, fields)


@functools.lru_cache(1024, typed=True)  # an application publishes few kinds of events
def _annotations(
    type: str | bytes | None, app_id: str | bytes | None, cluster_id: str | bytes | None, delay: int | None
) -> tuple[bytes, ...]:
    entries: list[bytes] = []
    for key, value in zip(_NOTED, (type, app_id, cluster_id), strict=True):
        if value is not None:
            entries += (_symbol(key), _short(value))
    if delay is not None:
        entries += (_symbol(names.DELAY.encode()), b"\x81" + _signed_longlong.pack(delay))
    return tuple(entries)


@functools.lru_cache(1024, typed=True)
def _addresses(user_id: str | bytes | None, subject: str, reply_to: str | None) -> bytes:
    """The fields user-id, to, subject and reply-to."""
    user = b"\x40"
    if user_id is not None:
        user = b"\xa0" + _short(user_id)[1:]
    answers = b"\x40" if reply_to is None else _short_string(reply_to)
    return b"".join((user, b"\x40", _short_string(subject), answers))


@functools.lru_cache(1024, typed=True)
def _content(content_type: str | None, content_encoding: str | None, timestamp: int | None) -> bytes:
    """The fields content-type, content-encoding, absolute-expiry-time and creation-time."""
    created = b"\x40"
    if timestamp is not None:
        if timestamp < 0:
            raise ValueError("it is before 1970")
        created = b"\x83" + _signed_longlong.pack(min(timestamp * 1000, _LATEST))
    symbols = (
        b"\x40" if value is None else _symbol(_short_string(value)[2:].decode().encode("ascii"))
        for value in (content_type, content_encoding)
    )
    return b"".join((*symbols, b"\x40", created))


@functools.lru_cache(1024)
def _key(name: str) -> bytes:
    return _short_string(name)


def _short_string(value: str) -> bytes:
    encoded = value.encode()
    size = len(encoded)
    if size > 255:
        raise ValueError(f"it is {size} bytes long, and 255 is the most")
    return b"\xa1" + size.to_bytes(1) + encoded


def _short(value: str | bytes) -> bytes:
    """A string; binary, if it is bytes."""
    if not isinstance(value, bytes):
        return _short_string(value)
    if len(value) > 255:
        raise ValueError(f"it is {len(value)} bytes long, and 255 is the most")
    return b"\xa0" + len(value).to_bytes(1) + value


def _symbol(value: bytes) -> bytes:
    return b"\xa3" + len(value).to_bytes(1) + value


def _milliseconds(expiration: str) -> int:
    if not (expiration.isascii() and expiration.isdigit()) or len(expiration) > 10:
        raise ValueError("it is not a number of milliseconds")
    return int(expiration)


def _string(value: str) -> bytes:
    encoded = value.encode()
    size = len(encoded)
    return b"\xa1" + size.to_bytes(1) + encoded if size < 256 else b"\xb1" + _long.pack(size) + encoded


def _compound(code: int, items: list[bytes] | tuple[bytes, ...]) -> bytes:
    """A list or a map, of the type `code` or, if it is large, of that with 4-byte sizes."""
    encoded = b"".join(items)
    count, size = len(items), len(encoded)
    if size < 255 and count < 256:
        return bytes((code, size + 1, count)) + encoded
    return bytes((code | 0x10,)) + _two_longs.pack(size + 4, count) + encoded


def _encode_value(value: Any, depth: int) -> bytes:
    match value:
        case None:
            return b"\x40"
        case bool():
            return b"\x41" if value else b"\x42"
        case str():
            return _string(value)
        case bytes():
            size = len(value)
            return b"\xa0" + size.to_bytes(1) + value if size < 256 else b"\xb0" + _long.pack(size) + value
        case int():
            if -0x80000000 <= value < 0x80000000:
                return b"\x71" + _signed_long.pack(value)
            return b"\x81" + _signed_longlong.pack(value) if value < 1 << 63 else b"\x80" + _longlong.pack(value)
        case float():
            return b"\x82" + _double.pack(value)
        case datetime():
            aware = value if value.tzinfo is not None else value.replace(tzinfo=UTC)
            return b"\x83" + _signed_longlong.pack((aware - _EPOCH) // _MILLISECOND)
        case decimal.Decimal():
            return b"\x94" + _decimal128(value)
        case list() | tuple() | Mapping() if depth > MOST_NESTED:
            raise ValueError(f"it has more than {MOST_NESTED} lists and tables inside each other")
        case list() | tuple():
            return _compound(0xC0, [_encode_value(item, depth + 1) for item in value])
        case Mapping():
            entries: list[bytes] = []
            for key, item in value.items():
                entries += (_key(key), _encode_value(item, depth + 1))
            return _compound(0xC1, entries)
        case _:
            raise ValueError(f"AMQP has no type for a {type(value).__name__}")


def _decimal128(value: decimal.Decimal) -> bytes:
    sign, digits, exponent = value.as_tuple()
    biased = int(exponent) + _BIAS  # of an infinity or NaN, the exponent is a letter
    if len(digits) > _DIGITS or not 0 <= biased < 3 << 12:
        raise ValueError(f"AMQP's decimals have at most {_DIGITS} digits, and an exponent of 4")
    coefficient = int("".join(map(str, digits)) or "0")
    return (sign << 127 | biased << 113 | coefficient).to_bytes(16)


# --- decoding ---------------------------------------------------------------------------------


class Identity(NamedTuple):
    """Of a delivery."""

    content: int
    """A hash: the same whenever the message is delivered."""
    deliveries: int
    """Before this one."""

    def redelivered(self) -> Identity:
        """Of the next delivery of this message."""
        return self._replace(deliveries=self.deliveries + 1)


class Received:
    """A message as the broker delivered it. Its properties are decoded by `properties`: most handlers do not need them.

    Attributes:
        subject: its routing key.
        orig_address: the address that the broker moved it from, if it did; None otherwise.
        orig_queue: the queue or divert that moved it.
        deliveries: how often it was delivered before.
    """

    __slots__ = (
        "_annotations",
        "_application",
        "_data",
        "_header",
        "_properties",
        "_unreadable",
        "body",
        "deliveries",
        "orig_address",
        "orig_queue",
        "subject",
    )

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._header = _NO_HEADER
        self._annotations = _NOTHING
        self._properties = _NOTHING
        self._application = _NOTHING
        self._unreadable = ""
        self.body = b""
        self.deliveries = 0
        self.subject = ""
        self.orig_address: str | None = None
        self.orig_queue: str | None = None
        position, last, total = 0, 0, len(data)
        while position < total:
            if data[position] == 0 and data[position + 1] == 0x53:
                section, start = data[position + 2], position + 3
            else:
                section, start = _descriptor(data, position)
            code = data[start]
            width = _WIDTHS[code]
            if width == _ONE_BYTE:
                end = start + 2 + data[start + 1]
            elif width == _FOUR_BYTES:
                end = start + 5 + _long.unpack_from(data, start + 1)[0]
            else:
                end = _end(data, start)
            if end > total:
                raise IndexError(f"a section ends at byte {end} of {total}")
            if section <= last:
                raise ValueError(f"section {section:#x} comes after section {last:#x}")
            last = section
            if section == _DATA and end == total and code in _OCTETS:
                self.body = data[start + 1 - width :]
            elif section == _PROPERTIES:
                self._properties = (start, end)
                self.subject = _subject(data, start, end)
            elif section == _ANNOTATIONS:
                self._annotations = (start, end)
                self.orig_address, self.orig_queue = _origin(data, start, end)
            elif section == _HEADER:
                if end - start > _LARGEST_HEADER:
                    raise ValueError(f"a header has {end - start} bytes")
                self._header = header = _decode_header(data[start:end])
                self.deliveries = header[3]
            elif section == _APPLICATION:
                self._application = (start, end)
            elif section in (_DATA, _SEQUENCE, _VALUE):
                self.body, self._unreadable = _decode_body(data, position)
                break
            elif section not in (_DELIVERY_ANNOTATIONS, _FOOTER):
                raise ValueError(f"no section has the number {section:#x}")
            position = end

    def identity(self) -> Identity:
        """Of this delivery."""
        (start, end), (first, last) = self._properties, self._application
        return Identity(hash((self._data[start:end], self._data[first:last], self.body)), self.deliveries)

    def properties(self, deaths: list[dict[str, Any]] | None = None) -> Properties:
        """RabbitMQ's properties. What cannot be read is left out, and described in `UNREADABLE`.

        Args:
            deaths: the header `x-death`, if the broker dead-lettered the message. One that a publisher wrote is left
                out; so is `x-delivery-count`, which is `deliveries` if that is not 0.
        """
        properties: Properties = {}
        headers: dict[str, Any] = {}
        unreadable: list[str] = [self._unreadable] if self._unreadable else []
        durable, priority, ttl, _ = self._header
        if durable is not None:
            properties["delivery_mode"] = _PERSISTENT if durable else 1
        if priority is not None:
            properties["priority"] = priority
        if ttl is not None:
            properties["expiration"] = str(ttl)
        for section, read in (
            (self._properties, _read_fields),
            (self._application, _read_application),
            (self._annotations, _read_annotations),
        ):
            start, end = section
            if start < end:
                encoded = self._data[start:end] if end - start <= LARGEST else b""
                read(encoded, properties, headers, unreadable)
        for name in _THE_BROKERS:
            headers.pop(name, None)
        if self.deliveries:
            headers["x-delivery-count"] = self.deliveries
        if deaths is not None:
            headers["x-death"] = deaths
        if headers or self._application != _NOTHING:
            properties["headers"] = headers
        if unreadable:
            described = ", ".join(unreadable)
            long = len(described) > _LONGEST_DESCRIPTION
            properties[UNREADABLE] = described[:_LONGEST_DESCRIPTION] + " ..." if long else described
        return properties


_NOTHING: tuple[int, int] = (0, 0)
_NO_HEADER: tuple[bool | None, int | None, int | None, int] = (None, None, None, 0)


def split(data: bytes) -> Received:
    """Split a message into its body, and what is needed to dispatch it.

    A body is the octets of its data sections, of a text, or of a binary value. Another one (a number, a list) is kept
    as it was encoded, and `UNREADABLE` describes it.

    Raises:
        ValueError: its sections, its header, or the names of its annotations are malformed.
    """
    try:
        return Received(data)
    except _MALFORMED as error:
        raise ValueError(f"it is not a message of AMQP 1.0: {error}") from error


def _origin(data: bytes, start: int, end: int) -> tuple[str | None, str | None]:
    """The address and the queue or divert that the broker moved it from."""
    if end - start > LARGEST:
        raise ValueError(f"the annotations have {end - start:,} bytes; {LARGEST:,} is the most")
    address = queue = None
    position = start + _MAPS[data[start]]
    while position < end:
        if data[position] == 0xA3:
            key_end = position + 2 + data[position + 1]
            key = data[position + 2 : key_end]
        else:
            key, key_end = b"", _end(data, position)
            if data[position] == 0xB3:
                key = data[position + 5 : key_end]
        position = key_end + 2 + data[key_end + 1] if data[key_end] == 0xA1 else _end(data, key_end)
        if key == _ORIG_ADDRESS:
            if address is not None:
                raise ValueError("it has two origins")
            address = _plain_text(data, key_end, position)
        elif key == _ORIG_QUEUE:
            if queue is not None:
                raise ValueError("it has two origins")
            queue = _plain_text(data, key_end, position)
    if position != end:
        raise IndexError(f"the annotations end at byte {position}, not {end}")
    return address, queue


def _plain_text(data: bytes, position: int, end: int) -> str:
    code = data[position]
    if code not in _STRINGS:
        raise ValueError("an origin is not text")
    return data[position + 1 - _WIDTHS[code] : end].decode()


def _subject(data: bytes, start: int, end: int) -> str:
    """The routing key: the fourth field of the properties. Bytes that are not UTF-8 are kept, as surrogate escapes."""
    code = data[start]
    position = start + _LISTS[code]
    if (0 if code == 0x45 else data[start + 2] if code == 0xC0 else _long.unpack_from(data, start + 5)[0]) < 4:
        return ""
    for _ in range(3):
        code = data[position]
        if code == 0x40:
            position += 1
        elif code == 0xA1:
            position += 2 + data[position + 1]
        else:
            position = _end(data, position)
    code = data[position]
    subject_end = _end(data, position)
    if subject_end > end:
        raise IndexError(f"the subject ends at byte {subject_end}, and the properties at byte {end}")
    if code == 0x40:
        return ""
    if code not in _STRINGS:
        raise ValueError("its subject is not text")
    return data[position + 1 - _WIDTHS[code] : subject_end].decode(errors="surrogateescape")


@functools.lru_cache(1024)  # those of an application are nearly always the same
def _decode_header(data: bytes) -> tuple[bool | None, int | None, int | None, int]:
    """The fields durable, priority, ttl and delivery-count."""
    fields = [_decode_value(data, position, 1)[0] for position, _ in _items(data, _LISTS)]
    durable, priority, ttl, _, deliveries, *_ = (*fields, None, None, None, None, None)
    if type(durable) not in _BOOLEAN or any(type(value) not in _INTEGER for value in (priority, ttl, deliveries)):
        raise ValueError("a field of its header has a wrong type")
    if not (0 <= (priority or 0) < 256 and 0 <= (ttl or 0) < 1 << 32 and (deliveries or 0) >= 0):
        raise ValueError("a number in its header is out of range")
    return durable, priority, ttl, deliveries or 0


def _decode_body(data: bytes, position: int) -> tuple[bytes, str]:
    """The body of several sections, or of another kind than data; and a description, if it cannot be read."""
    first = position
    parts: list[tuple[int, int, int]] = []
    while position < len(data):
        section, start = _descriptor(data, position)
        end = _end(data, start)
        if section == _FOOTER:
            if end != len(data):
                raise ValueError("something follows its footer")
            break
        if section not in (_DATA, _SEQUENCE, _VALUE):
            raise ValueError(f"section {section:#x} comes after its body")
        parts.append((section, start, end))
        if len(parts) > _MOST_SECTIONS:
            raise ValueError(f"its body has over {_MOST_SECTIONS:,} sections")
        position = end
    if len(parts) == 1 and parts[0][0] == _VALUE and data[parts[0][1]] == 0x40:
        return b"", ""
    readable = all(
        (section == _DATA and data[start] in _OCTETS)
        or (section == _VALUE and len(parts) == 1 and data[start] in _OCTETS | _STRINGS)
        for section, start, _ in parts
    )
    if not readable:
        return data[first:position], "the body"
    return b"".join([data[start + 1 - _WIDTHS[data[start]] : end] for _, start, end in parts]), ""


def _descriptor(data: bytes, position: int) -> tuple[int, int]:
    """The code of a section, and where its value starts."""
    if data[position] != 0:
        raise ValueError(f"no section starts at byte {position}")
    code, end = data[position + 1], _end(data, position + 1)
    if code in _ULONGS:
        return int.from_bytes(data[position + 2 : end]), end
    if code in _STRINGS:
        name = data[position + 1 - _WIDTHS[code] + 1 : end].decode("ascii")
        return _SECTIONS[name.removeprefix("amqp:").rpartition(":")[0]], end
    raise ValueError(f"no section starts at byte {position}")


def _end(data: bytes, position: int) -> int:
    """The end of the value that starts there."""
    code = data[position]
    while code == 0:
        position = _end_of_plain(data[position + 1], data, position + 2)
        code = data[position]
    return _end_of_plain(code, data, position + 1)


def _end_of_plain(code: int, data: bytes, position: int) -> int:
    """The end of a value of this type, whose octets start there."""
    width = _WIDTHS[code]
    if width >= 0:
        end = position + width
    elif width == _ONE_BYTE:
        end = position + 1 + data[position]
    elif width == _FOUR_BYTES:
        end = position + 4 + _long.unpack_from(data, position)[0]
    else:
        raise ValueError(f"no type has the code {code:#x}")
    if end > len(data):
        raise IndexError(f"a value ends at byte {end} of {len(data)}")
    return end


def _items(data: bytes, kinds: Mapping[int, int]) -> Iterator[tuple[int, int]]:
    """Where the items of a list, or the keys and values of a map, start and end. `data` is all of it."""
    first = kinds[data[0]]
    count = 0 if first == 1 else data[2] if first == 3 else _long.unpack_from(data, 5)[0]
    position = first
    for _ in range(count):
        end = _end(data, position)
        yield position, end
        position = end
    if position != len(data):
        raise ValueError(f"its items end at byte {position}, not {len(data)}")


def _read_fields(data: bytes, properties: Properties, headers: dict[str, Any], unreadable: list[str]) -> None:
    name: str | None = "message_id"
    try:
        for name, (position, end) in zip(_FIELDS, _items(data, _LISTS), strict=False):
            if name is None or data[position] == 0x40:
                continue
            try:
                properties[name] = _field(name, data, position, end)
            except _MALFORMED:
                unreadable.append(name)
    except _MALFORMED:
        unreadable.append(f"the properties from {name} on")


def _field(name: str, data: bytes, position: int, end: int) -> Any:
    code = data[position]
    octets = data[position + 1 + max(0, -_WIDTHS[code]) : end]
    if len(octets) > 255:
        raise ValueError(f"{name} is {len(octets)} bytes long")
    if name == "timestamp":
        milliseconds = _signed_longlong.unpack(octets)[0] if code == 0x83 else -1
        if milliseconds < 0:
            raise ValueError("it is not a time since 1970")
        return milliseconds // 1000
    if name in ("content_type", "content_encoding", "reply_to"):
        if code not in _STRINGS:
            raise ValueError(f"{name} is not text")
        return octets.decode("utf-8" if name == "reply_to" else "ascii")
    if code in _STRINGS or code in _OCTETS:
        return _text(octets)
    if code in _ULONGS:
        return str(int.from_bytes(octets))
    if code == _UUID:
        return str(uuid.UUID(bytes=octets))
    raise ValueError(f"{name} has a wrong type")


def _read_annotations(data: bytes, properties: Properties, headers: dict[str, Any], unreadable: list[str]) -> None:
    try:
        items = _items(data, _MAPS)
        for (position, key_end), (start, end) in zip(items, items, strict=True):
            code = data[position]
            key = data[position + 1 - _WIDTHS[code] : key_end] if code in _STRINGS else b""
            if key in _NOTED:
                octets = data[start + 1 - _WIDTHS[data[start]] : end]
                if data[start] in _STRINGS | _OCTETS and len(octets) <= 255:
                    properties.setdefault(_NOTED[key], _text(octets))
                else:
                    unreadable.append(_NOTED[key])
            elif key == _TABLES:
                _read_headers(data[start:end], headers, unreadable)
    except _MALFORMED:
        unreadable.append("the annotations")


def _read_application(data: bytes, properties: Properties, headers: dict[str, Any], unreadable: list[str]) -> None:
    _read_headers(data, headers, unreadable)


def _read_headers(data: bytes, headers: dict[str, Any], unreadable: list[str]) -> None:
    """The headers that can be read, and descriptions of those that cannot. The first of a name counts."""
    name = "the first one"
    try:
        items = _items(data, _MAPS)
        for (position, key_end), (start, _) in zip(items, items, strict=True):
            code = data[position]
            if code not in _STRINGS:
                unreadable.append("a header whose name is not text")
                continue
            name = _header_name(data[position + 1 - _WIDTHS[code] : key_end])
            if name in headers:
                unreadable.append(f"another header {name!r}")
                continue
            try:
                headers[name] = _decode_value(data, start, 1)[0]
            except _MALFORMED:
                unreadable.append(f"the header {name!r}")
    except _MALFORMED:
        unreadable.append(f"the headers from {name!r} on")


def _header_name(name: bytes) -> str:
    """The name with escapes. At most 255 bytes, so that a copy of the message can have it, too."""
    return name.decode(errors="backslashreplace").encode()[:255].decode(errors="ignore")


def _text(value: bytes) -> str | bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def _decode_value(data: bytes, position: int, depth: int) -> tuple[Any, int]:
    """Decode the value that starts there. A described one without its descriptor."""
    code = data[position]
    while code == 0:
        position = _end_of_plain(data[position + 1], data, position + 2)
        code = data[position]
    return _decode_plain(code, data, position + 1, depth)


def _decode_plain(code: int, data: bytes, position: int, depth: int) -> tuple[Any, int]:
    """Decode a value of this type, whose octets start there."""
    end = _end_of_plain(code, data, position)
    if code in _STRINGS:
        return _text(data[position - _WIDTHS[code] : end]), end
    if code in _NUMBERS:
        return _NUMBERS[code].unpack_from(data, position)[0], end
    if code in _CONSTANTS:
        return _CONSTANTS[code], end
    if code in _OCTETS:
        return data[position - _WIDTHS[code] : end], end
    octets = data[position:end]
    match code:
        case 0x56:
            return octets != b"\0", end
        case 0x73:
            return octets.decode("utf-32-be"), end
        case 0x83:
            return _moment(*_signed_longlong.unpack(octets)), end
        case 0x94:
            return _decode_decimal128(int.from_bytes(octets)), end
        case 0x98:
            return str(uuid.UUID(bytes=octets)), end
        case _:
            pass
    if depth > MOST_NESTED:
        raise ValueError(f"it has more than {MOST_NESTED} lists and tables inside each other")
    whole = data[position - 1 : end]
    if code in _LISTS:
        return [_decode_value(whole, at, depth + 1)[0] for at, _ in _items(whole, _LISTS)], end
    if code in _MAPS:
        return _decode_map(whole, depth + 1), end
    if code in _ARRAYS:
        return _decode_array(whole, depth + 1), end
    raise ValueError(f"no value of the type {code:#x} can be read")


def _decode_map(data: bytes, depth: int) -> dict[str, Any]:
    table: dict[str, Any] = {}
    items = _items(data, _MAPS)
    for (position, key_end), (start, _) in zip(items, items, strict=True):
        code = data[position]
        if code not in _STRINGS:
            raise ValueError("a name is not text")
        value, _ = _decode_value(data, start, depth)
        table.setdefault(_header_name(data[position + 1 - _WIDTHS[code] : key_end]), value)
    return table


def _decode_array(data: bytes, depth: int) -> list[Any]:
    first = _ARRAYS[data[0]]
    count = data[2] if first == 3 else _long.unpack_from(data, 5)[0]
    if count > len(data):  # of items without octets, a few bytes could claim billions
        raise ValueError(f"{count} items in {len(data)} bytes")
    position = first
    while data[position] == 0:
        position = _end_of_plain(data[position + 1], data, position + 2)
    code = data[position]
    position += 1
    values: list[Any] = []
    for _ in range(count):
        value, position = _decode_plain(code, data, position, depth)
        values.append(value)
    if position != len(data):
        raise ValueError(f"its items end at byte {position}, not {len(data)}")
    return values


def _moment(milliseconds: int) -> datetime | int:
    """A time, or an int if it is out of range."""
    try:
        return _EPOCH + milliseconds * _MILLISECOND
    except OverflowError:
        return milliseconds


def _decode_decimal128(value: int) -> decimal.Decimal:
    coefficient = value & _COEFFICIENT
    if value & _LARGE_COEFFICIENT == _LARGE_COEFFICIENT or coefficient >= 10**_DIGITS:
        raise ValueError("it is not a decimal with 34 digits")
    digits = tuple(map(int, str(coefficient)))
    return decimal.Decimal((value >> 127, digits, (value >> 113 & 0x3FFF) - _BIAS))
