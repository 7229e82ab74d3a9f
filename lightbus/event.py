"""An event type: a class that says what happened, with a name and a version."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
import sys
import typing
from collections.abc import Generator
from typing import Any

import attrs
import msgspec

from lightbus import errors

MAX_NAME_BYTES = 255
"""AMQP's limit for a routing key (a short string)."""

_WORDS = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z0-9]+|[A-Z0-9]+")
_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_ATTRIBUTE = "__lightbus_event__"


@attrs.frozen
class EventType:
    """What `@app.event` knows of a class."""

    name: str
    version: int
    cls: type[Any]


def default_name(class_name: str) -> str:
    """The words of a CamelCase name, lower case, joined by dots: `HTTPCallFailed` -> `http.call.failed`."""
    return ".".join(word.lower() for word in _WORDS.findall(class_name))


def define(cls: type[Any], name: object, version: object) -> EventType:
    """Make an event type of a class.

    Raises:
        errors.InvalidEvent: the class cannot be written as JSON and read back; names the field.
        errors.InvalidName: the name cannot be a routing key.
        errors.InvalidOption: the version is not a positive int.
    """
    event_name = check_name(name if name is not None else default_name(cls.__name__), f"event class {cls.__name__}")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise errors.InvalidOption(
            f"event {event_name!r}: version={version!r} is not a whole number from 1 up. "
            "Count versions up from 1, one for each change that a listener must know of."
        )
    event_type = EventType(event_name, version, _as_value_class(cls))
    with _known_by_its_name(event_type.cls):
        _check_fields(event_type)
    setattr(event_type.cls, _ATTRIBUTE, event_type)
    return event_type


def event_type_of(cls: type[Any]) -> EventType | None:
    """What `@app.event` made of exactly this class (not of a base class), if anything."""
    found = cls.__dict__.get(_ATTRIBUTE)
    return found if isinstance(found, EventType) else None


def check_name(name: object, owner: str) -> str:
    """The name itself, if a routing key can be made of it.

    Raises:
        errors.InvalidName: words of letters, digits, `_` and `-`, joined by dots, are what it takes.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise errors.InvalidName(
            f"{owner}: {name!r} cannot be an event name. "
            "Use words of letters, digits, '_' and '-', joined by dots, as in 'user.registered'."
        )
    if len(name.encode()) > MAX_NAME_BYTES:
        raise errors.InvalidName(
            f"{owner}: the event name {name[:40]!r}... has {len(name)} characters; "
            f"a routing key takes {MAX_NAME_BYTES} bytes. Choose a shorter one."
        )
    return name


def is_value_class(cls: type[Any]) -> bool:
    """Whether the class itself (not a base of it) is an attrs class, a dataclass or a msgspec.Struct."""
    own = cls.__dict__
    return "__attrs_attrs__" in own or "__dataclass_fields__" in own or issubclass(cls, msgspec.Struct)


def _as_value_class(cls: type[Any]) -> type[Any]:
    if is_value_class(cls):
        return cls
    if type(cls) is not type or issubclass(cls, (dict, list, tuple, str, int, float, BaseException)):
        raise errors.InvalidEvent(
            f"{cls.__name__} (a {type(cls).__name__}, base {cls.__mro__[1].__name__}) cannot be an event. "
            "Use a plain class with annotated fields, an attrs class, a dataclass or a msgspec.Struct."
        )
    _refuse_unsaid_fields(cls)
    return attrs.define(cls, frozen=True, slots=True, kw_only=True)


def _refuse_unsaid_fields(cls: type[Any]) -> None:
    """
    Raises:
        errors.InvalidEvent: a plain class whose fields are not said by annotations, so that none would be sent.
    """
    if "__init__" in cls.__dict__:
        raise errors.InvalidEvent(
            f"{cls.__name__} has an __init__ of its own; an event's fields are said by annotations, as in "
            "`user_id: int`, and Lightbus writes the __init__. To keep yours, make it a dataclass or an attrs class."
        )
    if not inspect.get_annotations(cls):
        for name, value in cls.__dict__.items():
            if not name.startswith("_") and not callable(value) and not hasattr(value, "__get__"):
                raise errors.InvalidEvent(
                    f"{cls.__name__}.{name} has no type, so it is no field and would not be sent. "
                    f"Annotate it, as in `{name}: {type(value).__name__}`."
                )


@contextlib.contextmanager
def _known_by_its_name(cls: type[Any]) -> Generator[None]:
    """While a class is decorated, its module does not have it yet; but its fields may name it, as a tree's do."""
    module = getattr(sys.modules.get(cls.__module__), "__dict__", {})
    before = module.get(cls.__name__, module)
    module[cls.__name__] = cls
    try:
        yield
    finally:
        if before is module:
            del module[cls.__name__]
        else:
            module[cls.__name__] = before


def _check_fields(event_type: EventType) -> None:
    cls = event_type.cls
    try:
        info = msgspec.inspect.type_info(cls)
    except KeyError as error:  # what msgspec says of attrs.field() alone
        raise errors.InvalidEvent(
            f"event {event_type.name!r}: field {cls.__name__}.{error.args[0]} has no type. "
            f"Annotate it, as in `{error.args[0]}: int`."
        ) from error
    except NameError as error:
        raise errors.InvalidEvent(
            f"event {event_type.name!r}: {cls.__name__} has a field whose type is not known here ({error}). "
            "Import or define that type at the top of the module (not in a function, nor under TYPE_CHECKING)."
        ) from error
    except TypeError as error:
        raise errors.InvalidEvent(
            f"event {event_type.name!r}: {_unreadable_field(cls)} cannot be read from JSON: {error}"
        ) from error
    unreadable = unreadable_part(info)
    if unreadable is not None:
        where, part = unreadable
        raise errors.InvalidEvent(
            f"event {event_type.name!r}: field {cls.__name__}.{where} has the type {part}, "
            "which JSON cannot carry. Use str, int, float, bool, bytes, Decimal, datetime, UUID, Enum, "
            "lists and dicts of these, or another attrs class, dataclass or Struct."
        )
    try:
        msgspec.json.Decoder(cls)
    except TypeError as error:
        raise errors.InvalidEvent(
            f"event {event_type.name!r}: {cls.__name__} cannot be read from JSON: {error}"
        ) from error


def _unreadable_field(cls: type[Any]) -> str:
    """The field whose type msgspec refuses."""
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        try:
            msgspec.inspect.type_info(hint)
        except TypeError:
            return f"field {cls.__name__}.{name}, a {hint},"
    return cls.__name__


def unreadable_part(info: msgspec.inspect.Type) -> tuple[str, str] | None:
    """The first part of a type that JSON cannot carry, as (path, type name); None where all is well."""
    return _search(info, "", set())


def _search(info: Any, path: str, seen: set[type]) -> tuple[str, str] | None:
    if isinstance(info, msgspec.inspect.CustomType) and info.cls is object:
        return None  # whatever JSON has
    if isinstance(info, (msgspec.inspect.CustomType, msgspec.inspect.RawType, msgspec.inspect.ExtType)):
        return path, getattr(getattr(info, "cls", None), "__name__", type(info).__name__)
    if isinstance(info, msgspec.inspect.DictType) and not _may_be_key(info.key_type):
        return path, f"dict with keys that are no text or number ({type(info.key_type).__name__.removesuffix('Type')})"
    cls = getattr(info, "cls", None)
    if isinstance(cls, type) and hasattr(info, "fields"):
        if cls in seen:  # a class that holds itself, as a tree does
            return None
        seen.add(cls)
    for name, part in _parts(info):
        found = _search(part, f"{path}.{name}".strip(".") if name else path, seen)
        if found is not None:
            return found
    return None


def _may_be_key(info: msgspec.inspect.Type) -> bool:
    if isinstance(info, msgspec.inspect.UnionType):
        return any(_may_be_key(one) for one in info.types)
    return not (isinstance(info, _NO_KEYS) or hasattr(info, "fields"))


_NO_KEYS = (
    msgspec.inspect.BoolType,
    msgspec.inspect.NoneType,
    msgspec.inspect.CollectionType,
    msgspec.inspect.TupleType,
    msgspec.inspect.DictType,
)


def _parts(info: Any) -> list[tuple[str, Any]]:
    parts: list[tuple[str, Any]] = [(field.name, field.type) for field in getattr(info, "fields", ())]
    for attribute in ("types", "item_types"):
        parts += [("", part) for part in getattr(info, attribute, ())]
    for attribute in ("type", "item_type", "key_type", "value_type"):
        part = getattr(info, attribute, None)
        if isinstance(part, msgspec.inspect.Type):
            parts.append(("", part))
    return parts


def field_names(cls: type[Any]) -> list[str]:
    """The names of an event class's fields, in order."""
    if issubclass(cls, msgspec.Struct):
        return list(cls.__struct_fields__)
    if attrs.has(cls):
        return [field.name for field in attrs.fields(cls)]
    return [field.name for field in dataclasses.fields(cls)]
