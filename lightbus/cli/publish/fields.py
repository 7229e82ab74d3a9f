"""Builds an event from the fields on the command line."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from lightbus.cli import did_you_mean

if TYPE_CHECKING:
    from lightbus.event import EventType


def build(event_type: EventType, payload: tuple[str, ...]) -> Any:
    """The event with these fields: one JSON object, or FIELD=VALUE each.

    Raises:
        errors.InvalidPayload: a field is unknown, is missing, or has an invalid value.
        click.UsageError: an argument is neither.
    """
    if len(payload) == 1 and payload[0].lstrip().startswith(("{", "[", '"')):
        body = payload[0].encode()
        _refuse_unknown_fields(event_type, _decode(event_type, body))
        return _checked(event_type, body)
    data = _fields(event_type, payload)
    _refuse_unknown_fields(event_type, data)
    return _checked(event_type, data)


def _checked(event_type: EventType, given: dict[str, Any] | bytes) -> Any:
    from lightbus import errors
    from lightbus.cli import events
    from lightbus.wire import codec

    try:
        return codec.build_event(event_type, given)
    except errors.InvalidPayload as error:
        fields = ", ".join(
            f"{one['name']}: {one['type']}" for one in events.fields(event_type.cls) if "computed" not in one
        )
        text = f"{error}\n" if "\n" in str(error) else f"{error}. "
        raise errors.InvalidPayload(f"{text}Its fields: {fields or 'none'}.") from error


def _decode(event_type: EventType, body: bytes) -> Any:
    import msgspec

    from lightbus import errors

    try:
        return msgspec.json.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise errors.InvalidPayload(f"event {event_type.name!r}: {error}") from error


def _fields(event_type: EventType, payload: tuple[str, ...]) -> dict[str, Any]:
    """`a=1 b.c=2` as an object. A value stays a string if the field's type can be decoded from one."""
    data: dict[str, Any] = {}
    types = _field_types(event_type)
    for one in payload:
        path, equals, value = one.partition("=")
        names = path.split(".")
        if not equals or not all(names):
            raise click.UsageError(f"{one!r} is not FIELD=VALUE, as in amount=9.50, nor a JSON object.")
        place = data
        for name in names[:-1]:
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise click.UsageError(f"{one!r}: {name!r} has a value already.")
        if names[-1] in place:
            raise click.UsageError(f"{path!r} is given twice. A list is written as JSON: {names[-1]}='[1, 2]'.")
        place[names[-1]] = _value(_type_at(types, names), value)
    return data


def _field_types(owner: Any) -> dict[str, Any]:
    """The types of the fields of an event (or of a class within it), by their names on the wire."""
    import msgspec

    from lightbus import pydantic_models
    from lightbus.cli.publish import model_fields

    if hasattr(owner, "version") and pydantic_models.is_model(owner.cls):
        return model_fields.types(owner.cls)
    if isinstance(owner, model_fields.Part):
        return owner.fields()
    info = msgspec.inspect.type_info(owner.cls) if hasattr(owner, "version") else owner
    return {field.encode_name: field.type for field in getattr(info, "fields", ())}


def _type_at(types: Mapping[str, Any], names: list[str]) -> Any:
    found: Any = types.get(names[0])
    for name in names[1:]:
        found = next((part for part in _alternatives(found) if hasattr(part, "fields")), None)
        found = None if found is None else _field_types(found).get(name)
    return found


def _alternatives(info: Any) -> tuple[Any, ...]:
    return tuple(getattr(info, "types", (info,)))


def _value(info: Any, text: str) -> Any:
    """The string, or its value as JSON for a type that cannot be decoded from a string."""
    import msgspec

    from lightbus.cli.publish import model_fields

    if isinstance(info, model_fields.Part):
        return text if info.takes_text() else _as_json(text)
    plain = (
        msgspec.inspect.StrType,
        msgspec.inspect.BoolType,
        msgspec.inspect.IntType,
        msgspec.inspect.FloatType,
        msgspec.inspect.NoneType,
        msgspec.inspect.DecimalType,
        msgspec.inspect.DateTimeType,
        msgspec.inspect.DateType,
        msgspec.inspect.TimeType,
        msgspec.inspect.TimeDeltaType,
        msgspec.inspect.UUIDType,
        msgspec.inspect.EnumType,
        msgspec.inspect.LiteralType,
        msgspec.inspect.BytesType,
        msgspec.inspect.ByteArrayType,
    )
    alternatives = _alternatives(info)
    if any(isinstance(one, msgspec.inspect.StrType) for one in alternatives):
        return text
    if all(isinstance(one, plain) for one in alternatives):
        return text
    return _as_json(text)


def _as_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _refuse_unknown_fields(event_type: EventType, data: Any) -> None:
    """Consumers ignore unknown fields. On the command line, an unknown field is probably a typo."""
    from lightbus import errors

    unknown = unknown_fields(event_type, data)
    if unknown:
        known = _field_types(event_type)
        hint = did_you_mean(unknown[0], known, otherwise=f"It has: {', '.join(known) or 'none'}.")
        raise errors.InvalidPayload(f"event {event_type.name!r} has no field {unknown[0]!r}. {hint}")


def unknown_fields(event_type: EventType, data: Any) -> list[str]:
    """The keys of an object that are not fields of the event."""
    known = _known_fields(event_type)
    return [name for name in data if name not in known] if known and isinstance(data, dict) else []


@functools.cache
def _known_fields(event_type: EventType) -> frozenset[str]:
    from lightbus import pydantic_models

    if pydantic_models.is_model(event_type.cls):
        return frozenset(pydantic_models.accepted_names(event_type.cls) or ())
    return frozenset(_field_types(event_type))
