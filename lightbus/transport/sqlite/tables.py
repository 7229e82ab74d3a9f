"""Properties and arguments, encoded for the file (msgpack)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, cast

import msgspec
from amqp import exceptions as amqp_errors

from lightbus.transport import PROPERTY_NAMES, Properties
from lightbus.transport.kombu_calls import amqp_error
from lightbus.transport.sqlite.answers import Arguments

_SIMPLE = frozenset({str, int, bool, float, bytes, type(None)})
_TIME = 1  # msgpack extension: seconds since 1970
_encoder = msgspec.msgpack.Encoder()


def _read_extension(code: int, data: memoryview) -> datetime:
    return datetime.fromtimestamp(int.from_bytes(data, "big", signed=True), tz=UTC)


_decoder = msgspec.msgpack.Decoder(dict[str, Any], ext_hook=_read_extension)


def encode_properties(properties: Properties) -> bytes:
    """Encode a message's properties.

    Raises:
        ValueError: a property is unknown, or has a type that AMQP does not have.
    """
    if not properties.keys() <= PROPERTY_NAMES:
        raise ValueError(f"AMQP has no property {sorted(properties.keys() - PROPERTY_NAMES)[0]!r}")
    try:
        return _encoder.encode(_plain(properties))
    except (TypeError, OverflowError) as error:
        raise ValueError(f"the properties {properties!r} cannot be encoded: {error}") from error


def decode_table(data: bytes) -> Properties:
    return _decoder.decode(data)


def _plain(value: Any) -> Any:
    if type(value) in _SIMPLE:
        return value
    if isinstance(value, str):
        return str.__str__(value)  # of a subclass, which msgspec refuses
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in cast("Arguments", value).items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in cast("Sequence[Any]", value)]
    if isinstance(value, datetime):
        seconds = int((value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp())
        return msgspec.msgpack.Ext(_TIME, seconds.to_bytes(8, "big", signed=True))
    return value


def encode_arguments(arguments: Arguments | None) -> bytes:
    try:
        return _encoder.encode(_plain(dict(sorted((arguments or {}).items()))))
    except (TypeError, OverflowError) as error:
        raise amqp_error(amqp_errors.FrameSyntaxError, f"{arguments!r} cannot be sent: {error}") from error
