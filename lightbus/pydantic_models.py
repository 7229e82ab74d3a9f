"""Pydantic models as events and payloads: validation from bytes, serialization to bytes, errors of one line per field.

Nothing here imports Pydantic before a program uses one of its models: a model is recognized by its attributes.
"""

from __future__ import annotations

import functools
import math
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightbus import errors

if TYPE_CHECKING:
    from pydantic import TypeAdapter

SHOWN_ERRORS = 10
"""Fields that an error lists."""
MOST_LISTED = 10_000
"""Of more errors only the number is shown: a body may have millions, and Pydantic would need 500 bytes for each."""

_NO_OBJECT = "it is not written as a JSON object, which the body of an event is"
_NOT_FINITE = "it has a NaN or an infinity, which JSON cannot represent"


def is_model(cls: object) -> bool:
    """Whether the class itself is a Pydantic v2 model or a Pydantic dataclass."""
    return isinstance(cls, type) and "__pydantic_validator__" in cls.__dict__


def holds_model(annotation: Any) -> bool:
    """Whether a type is a Pydantic model, or a union, list, dict or the like of one."""
    return "pydantic" in sys.modules and any(map(is_model, _classes(annotation)))


def _classes(annotation: Any) -> Iterator[Any]:
    seen: list[Any] = []  # some annotations are not hashable
    left: list[Any] = [annotation]
    while left:
        one = left.pop()
        if any(one is other for other in seen):
            continue
        seen.append(one)
        yield one
        if (value := getattr(one, "__value__", None)) is not None:  # `type X = A | B`
            left.append(value)
        left += [typing.get_origin(one), *typing.get_args(one)]


def shown(annotation: Any) -> str:
    """A type as in source code: `Card | Cash`, without `Annotated` and what it adds."""
    if typing.get_origin(annotation) is typing.Annotated:
        return shown(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " | ".join(map(shown, typing.get_args(annotation)))
    if annotation is types.NoneType:
        return "None"
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation.__name__
    return str(annotation)


def adapter(annotation: Any) -> TypeAdapter[Any]:
    """What validates and serializes this type.

    Raises:
        TypeError: Pydantic cannot build it: a type cannot be resolved or is not supported; the message says which.
    """
    from pydantic import TypeAdapter
    from pydantic.errors import PydanticUserError

    try:
        made: TypeAdapter[Any] = TypeAdapter(annotation)
        if not made.pydantic_complete:  # with `defer_build`
            made.rebuild(raise_errors=True)
    except (PydanticUserError, NameError) as error:  # PydanticUndefinedAnnotation is a NameError
        raise TypeError(str(getattr(error, "message", error)).partition("\n")[0]) from error
    return made


# --- encoding and decoding --------------------------------------------------------------------


class Coder:
    """Encodes and decodes one type, from and to bytes.

    `decode` is Pydantic's own `validate_json`, so an event costs no further call.
    """

    def __init__(self, annotation: Any) -> None:
        """
        Raises:
            TypeError: see `adapter`.
        """
        made = adapter(annotation)
        self.decode: Callable[[bytes], Any] = made.validator.validate_json
        self._validate = made.validator.validate_json
        self._to_json = made.serializer.to_json
        self._by_alias = writes_aliases(annotation)
        self._to_python = functools.partial(made.serializer.to_python, warnings=False)
        self.hashed = [*_hashed(made.core_schema)]
        """What the elements of each set and the keys of each dict consist of: the types of their core schemas."""
        kinds = {node["type"] for node in nodes(made.core_schema)}
        not_finite = {
            (node.get("config") or {}).get("ser_json_inf_nan", "null")
            for node in nodes(made.core_schema)
            if node["type"] in ("model", "dataclass")
        }
        self._may_lose_numbers = (
            "null" in not_finite and not kinds.isdisjoint(_MAYBE_NULL) and not kinds.isdisjoint(_MAYBE_FLOAT)
        )
        self._may_write_constants = "constants" in not_finite

    def encode(self, event: object) -> bytes:
        """The body, which has been validated.

        It is validated strictly, because otherwise `"5"` would pass as an int, and subscribers would receive a string.

        Raises:
            ValueError: a value does not have its field's type, or JSON cannot represent it.
        """
        body = self._to_json(event, by_alias=self._by_alias, warnings=False)
        try:
            self._check_written(event, body)
        except ValueError:
            raise
        except Exception as error:  # whatever a validator of the user raises
            raise ValueError(
                f"a validator cannot read what the model writes ({errors.summary(error)}), so a handler with this "
                "class could not read it. Let the validator accept that, too"
            ) from error
        if body[:1] != b"{":
            raise ValueError(_NO_OBJECT)
        if self._may_lose_numbers and b"null" in body and holds_not_finite(self._to_python(event)):
            raise ValueError(f"{_NOT_FINITE} (it would arrive as null)")
        if self._may_write_constants and (b"NaN" in body or b"Infinity" in body):
            from pydantic_core import from_json

            try:
                from_json(body, allow_inf_nan=False)
            except ValueError as error:
                raise ValueError(_NOT_FINITE) from error
        return body

    def _check_written(self, event: object, body: bytes) -> None:
        try:
            self._validate(body, strict=True)
        except ValueError as error:
            self._check_leniently(event, body, error)

    def _check_leniently(self, event: object, body: bytes, error: ValueError) -> None:
        """A type of the user may not accept, if strict, what it writes. What counts then is that each value has the
        type of its field, and that it can be read.
        """
        try:
            self._to_json(event, by_alias=self._by_alias, warnings="error")
        except ValueError:
            raise error from None
        self._validate(body)

    @staticmethod
    def check(body: bytes) -> None:
        """`encode` has validated it already."""


_MAYBE_NULL = ("nullable", "none", "any")
_MAYBE_FLOAT = ("float", "decimal", "any")


def holds_not_finite(value: Any) -> bool:
    """Whether a NaN or an infinity is in it, which JSON cannot represent."""
    if isinstance(value, float):
        return not math.isfinite(value)
    if isinstance(value, dict):
        return any(holds_not_finite(part) for pair in value.items() for part in pair)
    return isinstance(value, (list, tuple, set, frozenset)) and any(holds_not_finite(part) for part in value)


def writes_aliases(annotation: Any) -> bool:
    """Whether the body has the aliases of a model's fields: unless its configuration says otherwise."""
    config = config_of(annotation)
    return bool(config.get("serialize_by_alias", config.get("validate_by_alias", True)))


def config_of(cls: Any) -> dict[str, Any]:
    """The `model_config` of a model, or the configuration of a Pydantic dataclass."""
    return dict(getattr(cls, "model_config", None) or getattr(cls, "__pydantic_config__", None) or {})


def nodes(schema: Any) -> Iterator[dict[str, Any]]:
    """The parts of a core schema that count for JSON."""
    left = [schema]
    while left:
        node = left.pop()
        if isinstance(node, (list, tuple)):
            left += node
        elif isinstance(node, dict):
            if isinstance(node.get("type"), str):
                yield node
            left += [
                part
                for name, part in node.items()
                if name not in ("metadata", "serialization")
                and not (name == "python_schema" and node.get("type") == "json-or-python")
            ]


def _hashed(schema: Any) -> Iterator[set[str]]:
    definitions = {
        one["ref"]: one for node in nodes(schema) if node["type"] == "definitions" for one in node["definitions"]
    }
    for node in nodes(schema):
        if node["type"] in ("set", "frozenset"):
            yield _kinds(node.get("items_schema", {"type": "any"}), definitions)
        elif node["type"] == "dict" and "keys_schema" in node:
            yield _kinds(node["keys_schema"], definitions)


def _kinds(schema: Any, definitions: Mapping[str, Any]) -> set[str]:
    """The types of a schema's parts, also of a class that is used more than once: Pydantic only refers to such one."""
    kinds: set[str] = set()
    followed: set[str] = set()
    left = [schema]
    while left:
        for node in nodes(left.pop()):
            if node["type"] != "definition-ref":
                kinds.add(node["type"])
            elif node["schema_ref"] not in followed:  # a class may be recursive
                followed.add(node["schema_ref"])
                left.append(definitions.get(node["schema_ref"], {"type": "any"}))
    return kinds


# --- errors -----------------------------------------------------------------------------------


def explain(error: BaseException) -> str:
    """The message of an error of a decoder. Of Pydantic's validation errors: one line per field, without its URL.

    Values are left out: they may be secret, and the body is in the dead letter.
    """
    if type(error).__module__ != "pydantic_core._pydantic_core" or not hasattr(error, "errors"):
        return str(error)
    validation: Any = error
    if (count := validation.error_count()) > MOST_LISTED:
        return f"{count:,} errors, which are too many to list"
    details = validation.errors(include_url=False, include_context=False, include_input=False)
    paths = [_path(one["loc"]) for one in details[:SHOWN_ERRORS]]
    lines = [
        f"{path}: {_printable(one['msg'], 500)}" if path else _printable(one["msg"], 500)
        for path, one in zip(paths, details, strict=False)
    ]
    if count == 1:
        return lines[0]
    if count > SHOWN_ERRORS:
        lines.append(f"... and {count - SHOWN_ERRORS:,} more")
    # Lists of dead letters show only the first line.
    first = ", ".join(filter(None, [*paths[:3], "..." if count > 3 else ""]))
    return f"{count:,} errors ({first}):\n" + "\n".join(f"  {line}" for line in lines)


def _path(location: Sequence[int | str]) -> str:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{_printable(part)}" for part in location).strip(".")
    return _printable(path, 200)


def _printable(text: str, limit: int = 100) -> str:
    """A location may be a key of the body: from anyone, and of any length."""
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= limit else f"{text[:limit]}..."


# --- checks when an event is declared ---------------------------------------------------------


def problem_of(cls: type[Any]) -> str | None:
    """Why instances of this model would lose a field on the way to JSON or back, as the body of an event.

    Raises:
        TypeError: see `adapter`.
    """
    if getattr(cls, "__pydantic_root_model__", False):
        return f"{cls.__name__} is a RootModel, but an event is a JSON object. Use a BaseModel with a field for it."
    by_alias = writes_aliases(cls)
    schema = adapter(cls).core_schema
    for node in nodes(schema):
        if node["type"] in ("model", "dataclass"):
            for check in (_unreadable_names, _left_out):
                if (problem := check(node["cls"], by_alias)) is not None:
                    return problem
    return _unwritable(schema, cls.__name__)


def _fields(cls: type[Any]) -> dict[str, Any]:
    return getattr(cls, "__pydantic_fields__", {})


def written_name(name: str, field: Any, by_alias: bool) -> str:
    """The name of a field in the body."""
    return str(field.serialization_alias or field.alias or name) if by_alias else name


def read_names(cls: type[Any], name: str, field: Any) -> list[str]:
    """The names in a body that fill a field. An `AliasPath` has none: it reads a part of another value."""
    config = config_of(cls)
    alias = field.validation_alias or field.alias
    choices = getattr(alias, "choices", [alias])
    names = [one for one in choices if isinstance(one, str)] if config.get("validate_by_alias", True) else []
    if alias is None or config.get("validate_by_name") or config.get("populate_by_name"):
        names.append(name)
    return names


def _unreadable_names(cls: type[Any], by_alias: bool) -> str | None:
    for name, field in _fields(cls).items():
        written, read = written_name(name, field, by_alias), read_names(cls, name, field)
        if written not in read and not field.exclude:
            from_where = " or ".join(map(repr, read)) or "a path"
            return (
                f"{cls.__name__}.{name} is written as {written!r}, but read from {from_where}, so it would be lost. "
                f"Use alias={written!r} (and validate_by_name=True in model_config, to keep "
                f"{cls.__name__}({name}=...))."
            )
    return None


def _left_out(cls: type[Any], by_alias: bool) -> str | None:
    for name, field in _fields(cls).items():
        if field.exclude and field.is_required():
            return (
                f"{cls.__name__}.{name} is required, but has exclude=True, so it would not be sent. Give it a default, "
                "or remove exclude."
            )
    decorators = getattr(cls, "__pydantic_decorators__", None)
    computed = list(getattr(decorators, "computed_fields", ()))
    if computed and config_of(cls).get("extra") == "forbid":
        return (
            f"{cls.__name__}.{computed[0]} is a computed field, which is sent, but {cls.__name__} has extra='forbid', "
            "so no handler could read it as this class. Use extra='ignore', or make it a property."
        )
    return None


def _unwritable(schema: Any, place: str) -> str | None:
    """The first part of a schema that JSON cannot fill, or that is masked when it is written."""
    if isinstance(schema, (list, tuple)):
        return next((found for one in schema if (found := _unwritable(one, place)) is not None), None)
    if not isinstance(schema, dict):
        return None
    serialization = schema.get("serialization")
    if isinstance(serialization, dict) and "function" in serialization:
        if getattr(serialization["function"], "__name__", "") == "_serialize_secret_field":
            return f"{place} is a secret, which is written as '**********'. Use str, or a field_serializer."
        return None
    kind = schema.get("type")
    if kind in ("is-instance", "is-subclass", "callable"):
        name = getattr(schema.get("cls"), "__name__", kind)
        return f"{place} has the type {name}, which JSON cannot represent. Use a type that Pydantic reads from JSON."
    if kind in ("function-before", "function-wrap", "function-plain", "union", "tagged-union"):
        return None  # such a function may make anything of JSON, and another choice of a union may fit
    if kind in ("model", "dataclass"):
        place = schema["cls"].__name__
    if kind == "json-or-python":
        return _unwritable(schema["json_schema"], place)
    if kind == "model-fields":
        parts = [(f"{place}.{name}", part) for name, part in schema["fields"].items()]
    elif kind == "dataclass-args":
        parts = [(f"{place}.{part['name']}", part) for part in schema["fields"]]
    else:
        parts = [(place, part) for name, part in schema.items() if name != "metadata"]
    return next((found for where, part in parts if (found := _unwritable(part, where)) is not None), None)


# --- for the commands -------------------------------------------------------------------------


def json_schema(
    cls: type[Any], *, reads: bool = False, exact: bool = False
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The JSON Schema of a model as a reference, and the schemas that it refers to, by name.

    Args:
        reads: of what it reads; otherwise of what it writes, with computed fields.
        exact: a field that is always written is required, also with a default; a decimal number has a format.
    """
    from pydantic import TypeAdapter
    from pydantic.json_schema import GenerateJsonSchema

    mode: Any = "validation" if reads else "serialization"
    made, definitions = TypeAdapter.json_schemas(
        [("event", mode, adapter(cls))],
        by_alias=writes_aliases(cls),
        ref_template="#/$defs/{model}",
        schema_generator=_exact_generator() if exact else GenerateJsonSchema,
    )
    return dict(made["event", mode]), definitions.get("$defs", {})


@functools.cache
def _exact_generator() -> Any:
    from pydantic.json_schema import GenerateJsonSchema

    class Exact(GenerateJsonSchema):
        def field_is_required(self, field: Any, total: bool) -> bool:
            if self.mode != "serialization" or field["type"] == "typed-dict-field":
                return super().field_is_required(field, total)
            return not field.get("serialization_exclude") and "serialization_exclude_if" not in field

        def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> dict[str, Any]:
            return {}  # any value: a field that JSON Schema cannot describe

        def decimal_schema(self, schema: Any) -> dict[str, Any]:
            made = super().decimal_schema(schema)
            for part in made.get("anyOf", [made]):
                if part.get("type") == "string":
                    part["format"] = "decimal"
            return made

    return Exact


def described(cls: type[Any]) -> Iterator[dict[str, Any]]:
    """The fields of a model, by their names in the body: name, attribute, required, and `default` or `default_factory`.

    Of a computed field, `computed` is True.
    """
    from pydantic_core import to_jsonable_python

    by_alias = writes_aliases(cls)
    for name, field in _fields(cls).items():
        if field.exclude:
            continue
        one = {"name": written_name(name, field, by_alias), "attribute": name, "required": field.is_required()}
        if field.default_factory is not None:
            one["default_factory"] = getattr(field.default_factory, "__name__", "?")
        elif not field.is_required():
            one["default"] = to_jsonable_python(field.default, fallback=str)
        yield one
    computed = getattr(getattr(cls, "__pydantic_decorators__", None), "computed_fields", {})
    for name, decorator in computed.items():
        alias = decorator.info.alias if by_alias else None
        yield {"name": alias or name, "attribute": name, "required": False, "computed": True}


def computed_type(cls: Any, name: str) -> Any:
    """The annotation of a computed field."""
    return cls.__pydantic_decorators__.computed_fields[name].info.return_type


def accepted_names(cls: type[Any]) -> set[str] | None:
    """The names that a body may have; None if the model takes any (`extra="allow"`)."""
    if config_of(cls).get("extra") == "allow":
        return None
    names: set[str] = set()
    for name, field in _fields(cls).items():
        names |= {*read_names(cls, name, field)}
        alias = field.validation_alias
        paths = [one for one in (alias, *getattr(alias, "choices", ())) if hasattr(one, "path")]
        names |= {str(one.path[0]) for one in paths}
    return names
