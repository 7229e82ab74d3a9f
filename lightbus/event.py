"""An event type: a class that describes what happened, with a name and a version."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import re
import string
import sys
import typing
from collections.abc import Callable, Generator, Sequence
from typing import Any

import attrs
import msgspec

from lightbus import errors, options, pydantic_models

PYDANTIC = " (a Pydantic model)"
"""The end of a type's name in `unreadable_part`, for a model within a class of another kind."""

MAX_NAME_BYTES = 255
"""AMQP's limit for a routing key (a short string)."""

_WORDS = re.compile(r"[A-Z][A-Z0-9]*(?=[A-Z][a-z])|[A-Z]?[a-z0-9]+|[A-Z0-9]+")
_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_CLASS_VARIABLE = re.compile(r"(\w+\.)*(ClassVar|InitVar|KW_ONLY)\b")
_ATTRIBUTE = "__lightbus_event__"
_NOT_BASES = ("builtins", "typing", "typing_extensions", "abc", "collections.abc", "msgspec", "pydantic.main")
"""Modules whose classes have no fields of the user."""
_MUTABLE = (list, dict, set, bytearray)
_NO_DEFAULT: Any = object()


@attrs.frozen
class EventType:
    """The name and version that `@app.event` gives to a class."""

    name: str
    version: int
    cls: type[Any]


def default_name(class_name: str) -> str:
    """The words of a CamelCase name, lower case, joined by dots: `HTTPCallFailed` -> `http.call.failed`."""
    return ".".join(word.lower() for word in _WORDS.findall(class_name))


def define(cls: type[Any], name: object, version: object) -> EventType:
    """Make an event type from a class.

    Raises:
        errors.InvalidEvent: the class cannot be written as JSON and read back; the message names the field.
        errors.InvalidName: the name cannot be a routing key.
        errors.InvalidOption: the version is not a positive int.
    """
    event_name = _check_own_name(cls.__name__, name)
    if not options.is_integer(version) or version < 1:
        raise errors.InvalidOption(
            f"event {event_name!r}: version={version!r} is not an integer of 1 or more. Increment the version for "
            "each change that subscribers must know about."
        )
    event_type = EventType(event_name, version, _as_value_class(cls))
    with _known_by_its_name(event_type.cls):
        _check_fields(event_type)
    setattr(event_type.cls, _ATTRIBUTE, event_type)
    return event_type


def event_type_of(cls: type[Any]) -> EventType | None:
    """The event type of this class itself (not of a base class), if it has one."""
    found = cls.__dict__.get(_ATTRIBUTE)
    return found if isinstance(found, EventType) else None


def check_name(name: object, owner: str) -> str:
    """The name, if it is a valid routing key: words of letters, digits, `_` and `-`, joined by dots.

    Raises:
        errors.InvalidName: it is not valid, or longer than a routing key may be.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise errors.InvalidName(
            f"{owner}: {name!r} is not a valid event name. Use words of letters, digits, '_' and '-', joined by dots, "
            "as in 'user.registered'."
        )
    if len(name.encode()) > MAX_NAME_BYTES:
        raise errors.InvalidName(
            f"{owner}: the event name {name[:40]!r}... has {len(name)} characters; "
            f"a routing key takes {MAX_NAME_BYTES} bytes. Choose a shorter one."
        )
    return name


def _check_own_name(class_name: str, name: object) -> str:
    """The name of an event that an app declares. Patterns, for events of other programs, may have capital letters.

    Raises:
        errors.InvalidName: it is not a valid routing key, or has capital letters, which subscribers easily miss.
    """
    owner = f"event class {class_name}"
    if name is None:
        name = default_name(class_name)
        lost = sorted({*class_name} - {*string.ascii_letters, *string.digits, "_"})
        if lost:
            raise errors.InvalidName(
                f"{owner}: {', '.join(map(repr, lost))} is not allowed in an event name, which would be {name!r}. Set "
                "a name with lower-case letters from a to z: @app.event('user.registered')."
            )
    checked = check_name(name, owner)
    if checked != checked.lower():
        words = (default_name(word) for word in re.split("[._-]", checked))
        raise errors.InvalidName(
            f"{owner}: the event name {checked!r} has capital letters. Routing keys are case-sensitive: a subscriber "
            f"to {checked.lower()!r} would never receive it. Use {'.'.join(filter(None, words))!r}."
        )
    return checked


def is_value_class(cls: type[Any]) -> bool:
    """Whether the class itself (not a base) is an attrs class, a dataclass, a msgspec.Struct or a Pydantic model."""
    own = cls.__dict__
    return (
        "__attrs_attrs__" in own
        or "__dataclass_fields__" in own
        or issubclass(cls, msgspec.Struct)
        or pydantic_models.is_model(cls)
    )


def _as_value_class(cls: type[Any]) -> type[Any]:
    if is_value_class(cls):
        return cls
    if type(cls) is not type or issubclass(cls, (dict, list, tuple, str, int, float, BaseException)):
        raise errors.InvalidEvent(
            f"{cls.__name__} (a {type(cls).__name__}, base {cls.__mro__[1].__name__}) cannot be an event. "
            "Use a plain class with annotated fields, an attrs class, a dataclass, a msgspec.Struct or a Pydantic "
            "model."
        )
    inherited = _inherited_annotations(cls)
    _refuse_missing_annotations(cls, inherited)
    if dataclasses.is_dataclass(cls) and not attrs.has(cls):
        return _as_dataclass(cls, inherited)
    these = _attrs_fields(cls, inherited) if inherited else None
    return attrs.define(cls, these=these, frozen=True, slots=True, kw_only=True, field_transformer=_fresh_defaults)


def _inherited_annotations(cls: type[Any]) -> dict[str, Any]:
    """The fields that neither attrs nor dataclasses would collect: those of bases without a decorator, and those that
    the class gives a new default without a new annotation.

    Raises:
        errors.InvalidEvent: such a base has an `__init__`, which would not run.
    """
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__[1:-1]):
        if is_value_class(base):  # its fields are collected
            fields = field_names(base)
            found = {name: one for name, one in found.items() if name not in fields or name in cls.__dict__}
            annotations = inspect.get_annotations(base)
            found |= {name: annotations[name] for name in fields if name in cls.__dict__ and name in annotations}
        elif base.__module__ not in _NOT_BASES:
            annotations = inspect.get_annotations(base)
            own_fields = {name: one for name, one in annotations.items() if not _is_private_or_no_field(name, one)}
            if own_fields and "__init__" in base.__dict__:
                raise errors.InvalidEvent(
                    f"{base.__name__}, a base of {cls.__name__}, defines __init__, which would not run: its fields "
                    f"become fields of the event. Remove it, or make {base.__name__} an attrs class or a dataclass."
                )
            found |= own_fields
    own = inspect.get_annotations(cls)
    return {name: annotation for name, annotation in found.items() if name not in own}


def _default_of(cls: type[Any], name: str) -> Any:
    """The default of an inherited field: the nearest value in the class and its bases; `_NO_DEFAULT` without one.

    Raises:
        errors.InvalidEvent: a method or a property has the name of the field.
    """
    for base in cls.__mro__:
        if name in base.__dict__:
            value = base.__dict__[name]
            if inspect.ismemberdescriptor(value):  # a slot
                continue
            if hasattr(value, "__get__"):
                raise errors.InvalidEvent(
                    f"{base.__name__}.{name} is a {type(value).__name__}, but a base of {cls.__name__} declares a "
                    "field with this name. Rename one of them."
                )
            return value
    return _NO_DEFAULT


def _attrs_fields(cls: type[Any], inherited: dict[str, Any]) -> dict[str, Any]:
    """The inherited fields and those of the class itself, in this order: for attrs."""
    fields: dict[str, Any] = {}
    for name, annotation in inherited.items():
        default = _default_of(cls, name)
        if type(default) is type(attrs.field()):
            fields[name] = default
        else:
            fields[name] = attrs.field(default=attrs.NOTHING if default is _NO_DEFAULT else default, type=annotation)
    for name, annotation in inspect.get_annotations(cls).items():
        if not _is_no_field(name, annotation):
            default = cls.__dict__.get(name, attrs.NOTHING)
            fields[name] = default if type(default) is type(attrs.field()) else attrs.field(default=default)
    return fields


def _as_dataclass(cls: type[Any], inherited: dict[str, Any]) -> type[Any]:
    """A plain class with a dataclass as its base: a keyword-only dataclass, frozen if the base is.

    Raises:
        errors.InvalidEvent: the dataclass cannot be made.
    """
    if any(map(pydantic_models.is_model, cls.__mro__)):
        raise errors.InvalidEvent(
            f"{cls.__name__} has a Pydantic dataclass as its base. Decorate it with @pydantic.dataclasses.dataclass "
            "too."
        )
    own = inspect.get_annotations(cls)
    defaults = {name: _default_of(cls, name) for name in inherited}
    defaults |= {name: cls.__dict__.get(name, _NO_DEFAULT) for name in own if not _is_no_field(name, own[name])}
    for name, default in defaults.items():
        if isinstance(default, _MUTABLE):
            setattr(cls, name, dataclasses.field(default_factory=functools.partial(copy.deepcopy, default)))
        elif default is not _NO_DEFAULT:
            setattr(cls, name, default)
    cls.__annotations__ = inherited | own
    bases: list[Any] = [base for base in cls.__mro__ if "__dataclass_params__" in base.__dict__]
    frozen = any(base.__dataclass_params__.frozen for base in bases)
    try:
        made = dataclasses.dataclass(frozen=frozen, kw_only=True)(cls)
    except (TypeError, ValueError) as error:
        raise errors.InvalidEvent(f"{cls.__name__} cannot be made a dataclass, as its base is: {error}") from error
    cls.__annotations__ = own  # the others are read where they are written: their names belong to that module
    return made


def _fresh_defaults(_: type[Any], fields: list[attrs.Attribute[Any]]) -> list[attrs.Attribute[Any]]:
    """Give each event its own copy of a mutable default (a list, dict or set): events must not share it."""
    return [
        field.evolve(default=attrs.Factory(functools.partial(copy.deepcopy, field.default)))
        if isinstance(field.default, _MUTABLE)
        else field
        for field in fields
    ]


def _refuse_missing_annotations(cls: type[Any], inherited: dict[str, Any]) -> None:
    """
    Raises:
        errors.InvalidEvent: a plain class whose attributes have no annotations, so that they would not be sent.
    """
    if "__init__" in cls.__dict__:
        raise errors.InvalidEvent(
            f"{cls.__name__} defines __init__; an event's fields are declared by annotations, as in `user_id: int`, "
            "and Lightbus generates __init__. To keep yours, make it a dataclass or an attrs class."
        )
    if not inspect.get_annotations(cls):
        for name, value in cls.__dict__.items():
            if not (name.startswith("_") or name in inherited or callable(value) or hasattr(value, "__get__")):
                raise errors.InvalidEvent(
                    f"{cls.__name__}.{name} has no type, so it is not a field and would not be sent. Annotate it, as "
                    f"in `{name}: {type(value).__name__}`."
                )


@contextlib.contextmanager
def _known_by_its_name(cls: type[Any]) -> Generator[None]:
    """Within this block the module has the class, which is still being decorated: its own fields may refer to it."""
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
    if pydantic_models.is_model(cls):
        _check_model(event_type)
        return
    try:
        info = msgspec.inspect.type_info(cls)
    except KeyError as error:  # msgspec raises it for an attrs.field() without a type
        raise errors.InvalidEvent(
            f"event {event_type.name!r}: field {cls.__name__}.{error.args[0]} has no type. "
            f"Annotate it, as in `{error.args[0]}: int`."
        ) from error
    except NameError as error:
        raise errors.InvalidEvent(
            f"event {event_type.name!r}: {cls.__name__} has a field whose type cannot be resolved ({error}). Import "
            "or define that type at the top of the module (not in a function, nor under TYPE_CHECKING)."
        ) from error
    except TypeError as error:
        raise errors.InvalidEvent(
            f"event {event_type.name!r}: {_unreadable_field(cls)} cannot be read from JSON: {error}"
        ) from error
    unreadable = unreadable_part(info)
    if unreadable is not None:
        where, part = unreadable
        if part.endswith(PYDANTIC):
            raise errors.InvalidEvent(
                f"event {event_type.name!r}: field {cls.__name__}.{where} has the type {part}, which only another "
                f"Pydantic model can have as a part. Make {cls.__name__} a Pydantic model too."
            )
        raise errors.InvalidEvent(
            f"event {event_type.name!r}: field {cls.__name__}.{where} has the type {part}, which JSON cannot "
            "represent. Use str, int, float, bool, bytes, Decimal, datetime, UUID, Enum, lists and dicts of these, "
            "or another attrs class, dataclass or Struct."
        )
    if getattr(info, "array_like", False):
        raise errors.InvalidEvent(
            f"event {event_type.name!r}: {cls.__name__} is array_like, but an event is a JSON object. Remove "
            "array_like."
        )
    problem = lossy_part(info) or private_part(info)
    if problem is not None:
        raise errors.InvalidEvent(f"event {event_type.name!r}: {problem}")
    try:
        msgspec.json.Decoder(cls)
    except TypeError as error:
        raise errors.InvalidEvent(
            f"event {event_type.name!r}: {cls.__name__} cannot be read from JSON: {error}"
        ) from error


def _check_model(event_type: EventType) -> None:
    """
    Raises:
        errors.InvalidEvent: the Pydantic model is incomplete, or its instances would lose a field.
    """
    try:
        problem = pydantic_models.problem_of(event_type.cls)
    except TypeError as error:
        raise errors.InvalidEvent(
            f"event {event_type.name!r}: {event_type.cls.__name__} is a Pydantic model that is not complete: {error}. "
            "Import or define its types at the top of the module (not in a function, nor under TYPE_CHECKING)."
        ) from error
    if problem is not None:
        raise errors.InvalidEvent(f"event {event_type.name!r}: {problem}")


def _unreadable_field(cls: type[Any]) -> str:
    """The field whose type msgspec does not support."""
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        try:
            msgspec.inspect.type_info(hint)
        except TypeError:
            return f"field {cls.__name__}.{name}, a {hint},"
    return cls.__name__


def unreadable_part(info: msgspec.inspect.Type) -> tuple[str, str] | None:
    """The first part of a type that JSON cannot represent, as (path, type name); None if there is none."""
    return _search(info, "", set())


def _search(info: Any, path: str, seen: set[type]) -> tuple[str, str] | None:
    if isinstance(info, msgspec.inspect.CustomType) and info.cls is object:
        return None  # any JSON value
    if isinstance(info, (msgspec.inspect.CustomType, msgspec.inspect.RawType, msgspec.inspect.ExtType)):
        name = getattr(getattr(info, "cls", None), "__name__", type(info).__name__)
        return path, f"{name}{PYDANTIC}" if pydantic_models.is_model(getattr(info, "cls", None)) else name
    if isinstance(info, msgspec.inspect.DictType) and not _may_be_key(info.key_type):
        return (
            path,
            f"dict with keys that are not strings or numbers ({type(info.key_type).__name__.removesuffix('Type')})",
        )
    cls: Any = getattr(info, "cls", None)
    if pydantic_models.is_model(cls):  # a Pydantic dataclass: msgspec would leave out its validators
        return path, f"{cls.__name__}{PYDANTIC}"
    if isinstance(cls, type) and hasattr(info, "fields"):
        if cls in seen:  # a recursive class, such as a tree
            return None
        seen.add(cls)
    for name, part in _parts(info):
        found = _search(part, f"{path}.{name}".strip(".") if name else path, seen)
        if found is not None:
            return found
    return None


# --- fields that would be lost ----------------------------------------------------------------


def lossy_part(info: msgspec.inspect.Type) -> str | None:
    """Why a value would lose a field on the way to JSON or back, or share a default with others; None if it would not.

    It compares the fields that msgspec reads and writes, of each class in a type, with those that the class declares.
    """
    return _first_problem(info, (_mixed_kinds, _lost_annotation, _unset_default, _shared_default))


def private_part(info: msgspec.inspect.Type) -> str | None:
    """Why a field would not be written: in attrs classes, msgspec leaves out names that begin with `_`."""
    return _first_problem(info, (_private_field,))


def _first_problem(info: Any, checks: Sequence[Callable[[type[Any], Any], str | None]]) -> str | None:
    seen: set[type] = set()
    left = [info]
    while left:
        part = left.pop()
        cls = getattr(part, "cls", None)
        if isinstance(cls, type) and hasattr(part, "fields"):
            if cls in seen:
                continue
            seen.add(cls)
            for check in checks:
                if (problem := check(cls, part)) is not None:
                    return problem
        left += [one for _, one in _parts(part)]
    return None


def _kinds(cls: type[Any]) -> list[str]:
    """The kinds of class that it is: more than one if a base class is of another kind."""
    kinds = {"attrs class": attrs.has(cls), "dataclass": dataclasses.is_dataclass(cls)}
    kinds["msgspec.Struct"] = issubclass(cls, msgspec.Struct)
    return [kind for kind, it_is in kinds.items() if it_is]


def _mixed_kinds(cls: type[Any], info: Any) -> str | None:
    kinds = _kinds(cls)
    if len(kinds) < 2:
        return None
    return (
        f"{cls.__name__} is an {' and a '.join(kinds)} at once, through its base classes, so fields would be lost. "
        "Use one kind for the class and its bases (@app.event makes an attrs class of a plain one)."
    )


def _lost_annotation(cls: type[Any], info: Any) -> str | None:
    fields = {field.name for field in info.fields}
    for base in cls.__mro__:
        if base.__module__ in _NOT_BASES:
            continue
        private = base is not cls and not is_value_class(base)
        for name, annotation in inspect.get_annotations(base).items():
            if private and _is_private_or_no_field(name, annotation):
                continue
            if name not in fields and not _is_no_field(name, annotation):
                kind = (_kinds(cls) or ["NamedTuple"])[0]
                article = "an" if kind[0] == "a" else "a"
                decorate = f"Make {base.__name__} {article} {kind} too"
                return (
                    f"{base.__name__}.{name} is annotated, but is not a field of {cls.__name__}, so it would be lost. "
                    f"{decorate}; or, if it is not a field, annotate it as `{name}: ClassVar[...]`."
                )
    return None


def _is_no_field(name: str, annotation: Any) -> bool:
    if name.startswith("__") and name.endswith("__"):
        return True
    if isinstance(annotation, str):
        return _CLASS_VARIABLE.match(annotation) is not None
    return (
        any(annotation is one for one in (typing.ClassVar, dataclasses.KW_ONLY, dataclasses.InitVar))
        or typing.get_origin(annotation) is typing.ClassVar
        or isinstance(annotation, dataclasses.InitVar)
    )


def _is_private_or_no_field(name: str, annotation: Any) -> bool:
    """For bases that are plain classes: their private attributes are no fields."""
    return name.startswith("_") or _is_no_field(name, annotation)


def _unset_default(cls: type[Any], info: Any) -> str | None:
    """A dataclass's `__init__` does not set such a field, so msgspec does not write it."""
    if not dataclasses.is_dataclass(cls) or hasattr(cls, "__post_init__"):
        return None
    for field in dataclasses.fields(cls):
        if not field.init and field.default is not dataclasses.MISSING and "__slots__" not in cls.__dict__:
            return (
                f"{cls.__name__}.{field.name} has init=False and a default, which would not be sent. Use "
                "default_factory=lambda: ..., remove init=False, or make it a ClassVar."
            )
    return None


def _shared_default(cls: type[Any], info: Any) -> str | None:
    for field in info.fields:
        if field.default is not msgspec.NODEFAULT and not _is_hashable(field.default):
            kind = type(field.default).__name__
            make = (
                kind if isinstance(field.default, (list, dict, set, bytearray)) and not field.default else "lambda: ..."
            )
            how = f"attrs.field(factory={make})" if attrs.has(cls) else f"a default_factory ({make})"
            return (
                f"the default of {cls.__name__}.{field.name} is a {kind}, which all events would share: a change to "
                f"one would appear in the others. Use {how}, or an immutable default such as a tuple."
            )
    return None


def _is_hashable(value: object) -> bool:
    try:
        hash(value)
    except Exception:  # noqa: BLE001  # whatever the user's own __hash__ raises
        return False
    return True


def _private_field(cls: type[Any], info: Any) -> str | None:
    if not attrs.has(cls):
        return None
    for field in info.fields:
        if field.name.startswith("_"):
            public = field.name.strip("_") or "value"
            return (
                f"{cls.__name__}.{field.name} begins with '_', so it would not be sent. Rename it to {public!r}, or "
                f"make {cls.__name__} a dataclass or a msgspec.Struct, which send such fields."
            )
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
    if pydantic_models.is_model(cls):
        return list(cls.__pydantic_fields__)
    if issubclass(cls, msgspec.Struct):
        return list(cls.__struct_fields__)
    if attrs.has(cls):
        return [field.name for field in attrs.fields(cls)]
    return [field.name for field in dataclasses.fields(cls)]
