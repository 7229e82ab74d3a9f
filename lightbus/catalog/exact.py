"""What msgspec's JSON Schemas leave out: the fields that are always written, and the format of dates without a zone.

`msgspec` lists a field with a default as not required, although it writes it into every body.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import inspect as types

Schema = dict[str, Any]


def components(annotation: Any, *, reads: bool) -> tuple[Schema, dict[str, Schema]]:
    """The schema of an annotation, and by name those that it refers to.

    Args:
        reads: of what is read; otherwise of what is written: there, `required` has every field that is always written.
    """
    root_type = types.type_info(annotation)
    found = list(_classes(root_type))
    (root, *references), parts = msgspec.json.schema_components(
        [annotation, *(one.cls for one in found)], ref_template="#/$defs/{name}"
    )
    _add_formats(root_type, root)
    for one, reference in zip(found, references, strict=True):
        part = parts[reference["$ref"].removeprefix("#/$defs/")]
        if "prefixItems" in part:
            for field, schema in zip(one.fields, part["prefixItems"], strict=False):
                _add_formats(field.type, schema)
            continue
        for field in one.fields:
            _add_formats(field.type, part["properties"][field.encode_name])
        if not reads and not isinstance(one, types.TypedDictType):
            own = {field.encode_name for field in one.fields}
            tag = [name for name in part["required"] if name not in own]
            part["required"] = [*tag, *_always_written(one)]
    return root, parts


def _classes(root: Any) -> Iterator[Any]:
    """All classes with fields that the JSON Schema refers to by name."""
    seen: list[Any] = []
    left = [root]
    while left:
        one = _bare(left.pop())
        if isinstance(one, types.StructType | types.DataclassType | types.TypedDictType):
            if one.cls in seen:
                continue
            seen.append(one.cls)
            yield one
        left += _parts(one)


def _bare(one: Any) -> Any:
    while isinstance(one, types.Metadata):
        one = one.type
    return one


def _parts(one: Any) -> list[Any]:
    match one:
        case types.UnionType():
            return list(one.types)
        case types.DictType():
            return [one.key_type, one.value_type]
        case types.TupleType():
            return list(one.item_types)
        case _ if hasattr(one, "fields"):
            return [field.type for field in one.fields]
        case _:
            return [one.item_type] if hasattr(one, "item_type") else []


def _add_formats(one: Any, schema: Any) -> None:
    """Of dates and times without a time zone, msgspec gives no format."""
    one = _bare(one)
    if not isinstance(schema, dict) or "$ref" in schema:
        return
    match one:
        case types.DateTimeType() | types.TimeType() if schema.get("type") == "string":
            schema.setdefault("format", "date-time" if isinstance(one, types.DateTimeType) else "time")
        case types.UnionType():
            for part in one.types:
                bare = _bare(part)
                kind = "string" if isinstance(bare, types.DateTimeType | types.TimeType) else None
                kind = "object" if isinstance(bare, types.DictType) else kind
                kind = "array" if hasattr(bare, "item_type") or isinstance(bare, types.TupleType) else kind
                for alternative in schema.get("anyOf", ()):
                    if kind is not None and alternative.get("type") == kind:
                        _add_formats(bare, alternative)
        case types.DictType():
            _add_formats(one.value_type, schema.get("additionalProperties"))
        case types.TupleType():
            for part, inner in zip(one.item_types, schema.get("prefixItems", ()), strict=False):
                _add_formats(part, inner)
        case _ if hasattr(one, "item_type"):
            _add_formats(one.item_type, schema.get("items"))
        case _:
            pass


def _always_written(one: Any) -> list[str]:
    """The names of the fields that are in every body."""
    omits = isinstance(one, types.StructType) and one.cls.__struct_config__.omit_defaults
    hints = _hints(one.cls)
    return [
        field.encode_name
        for field in one.fields
        if not (omits and not field.required)
        and field.default is not msgspec.UNSET
        and not _may_be_unset(hints.get(field.name))
    ]


def _hints(cls: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except (NameError, TypeError):  # defined in a function: then only a default shows that a field may be unset
        return {}


def _may_be_unset(hint: Any) -> bool:
    return hint is msgspec.UnsetType or msgspec.UnsetType in typing.get_args(hint)
