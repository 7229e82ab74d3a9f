"""JSON Schemas (2020-12) of events, and of what handlers read."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import attrs
import msgspec

from lightbus import pydantic_models
from lightbus.app import Lightbus
from lightbus.catalog import exact as exactly
from lightbus.event import EventType

DIALECT = "https://json-schema.org/draft/2020-12/schema"

Schema = dict[str, Any]

MOST_PARTS = 10_000
"""Parts of a schema that are looked at for one question. A hostile one can have more."""


def schemas(app: Lightbus) -> dict[str, Schema]:
    """The schema of each event, by name."""
    return {name: schema_of(app.name, app.events[name]) for name in sorted(app.events)}


def schema_of(app: str, event_type: EventType, *, exact: bool = False) -> Schema:
    """A complete schema: everything that it refers to is in its `$defs`.

    Args:
        exact: of the bodies that the app sends: a field with a default is required there, if it is always written.
    """
    return {
        "$schema": DIALECT,
        "title": event_type.name,
        "$comment": (
            f"Version {event_type.version} of the event that {app!r} publishes with the routing key "
            f"{event_type.name!r}."
        ),
        **_complete(event_type.cls, reads=False, exact=exact),
    }


def schema_read(annotation: Any) -> Schema:
    """What a handler with this payload annotation accepts. An unknown field is ignored, except by a class that forbids
    it.
    """
    return {"$schema": DIALECT, **_complete(annotation, reads=True, exact=True)}


def _complete(annotation: Any, *, reads: bool, exact: bool) -> Schema:
    """The schema of an annotation as a reference or a type, and in `$defs` the schemas that it refers to."""
    if pydantic_models.holds_model(annotation):
        root, parts = pydantic_models.json_schema(annotation, reads=reads, exact=exact)
    elif exact:
        root, parts = exactly.components(annotation, reads=reads)
    else:
        (root,), parts = msgspec.json.schema_components([annotation], ref_template="#/$defs/{name}")
    return {**root, "$defs": {name: _cleaned(parts[name]) for name in sorted(parts)}}


def _cleaned(part: Schema) -> Schema:
    """Remove the indentation of docstrings."""
    return part | {"description": inspect.cleandoc(part["description"])} if "description" in part else part


def fields(schema: Schema) -> list[str] | None:
    """The names of an object's fields, in order; None if it is not an object with known fields.

    Of several alternatives (`A | B`), the fields of all.
    """
    found: dict[str, None] = {}
    for part in _alternatives(schema, schema):
        if "properties" not in part:
            return None
        found |= dict.fromkeys(_dictionary(part["properties"]))
    return list(found)


# --- one field --------------------------------------------------------------------------------


@attrs.frozen
class Field:
    """What a schema says about a field."""

    known: Literal["yes", "open", "no"]
    """Whether it exists. `open`: the schema allows any field there, as that of a dict does."""
    type: str = ""
    """As a few words: `array of Line`; "" if unknown."""
    siblings: list[str] = attrs.field(factory=list)
    """If it does not exist: the fields that exist in its place."""


def field(schema: Schema, path: Sequence[str]) -> Field:
    """Look up a field by its path: `("lines", "article")` is `article` of each element of the array `lines`."""
    parts: list[Schema] = [schema]
    siblings: dict[str, None] = {}
    for name in path:
        inner: list[Schema] = []
        is_open, siblings = False, {}
        for part in [element for each in parts for element in elements(each, schema)]:
            properties, others = _dictionary(part.get("properties")), part.get("additionalProperties")
            if name in properties:
                inner.append(_dictionary(properties[name]))
            elif isinstance(others, dict) and others:
                inner.append(others)
            elif others in (True, {}) or _is_open(part):
                is_open = True
            siblings |= dict.fromkeys(properties)
        if not inner:
            return Field("open") if is_open else Field("no", siblings=list(siblings))
        parts = inner
    return Field("yes", " | ".join(dict.fromkeys(described(part) for part in parts)))


def described(part: Schema, depth: int = 3) -> str:
    """The type of a part of a schema as a few words: `string (decimal)`, `array of Line`, `integer | null`."""
    several = [_dictionary(one) for key in ("anyOf", "oneOf", "allOf") for one in _list(part.get(key))]
    values = [part["const"]] if "const" in part else _list(part.get("enum"))
    match part:
        case _ if depth == 0:
            return "..."
        case {"$ref": str(target)}:
            return target.rpartition("/")[2]
        case _ if several:
            return " | ".join(dict.fromkeys(described(one, depth - 1) for one in several))
        case _ if values:
            return " | ".join(json.dumps(one) for one in values[:5]) + (" | ..." if len(values) > 5 else "")
        case {"type": "array", "items": dict(items)} if items:
            return f"array of {described(items, depth - 1)}"
        case {"type": "object", "additionalProperties": dict(items)} if items:
            return f"object of {described(items, depth - 1)}"
        case {"type": str(kind), "format": str(form)}:
            return f"{kind} ({form})"
        case {"type": str(kind)}:
            return kind
        case {"type": list(kinds)}:
            return " | ".join(map(str, kinds))
        case _:
            return "any"


def _is_open(part: Schema) -> bool:
    """Whether it is an object without declared fields, or anything."""
    return part.get("type", "object") == "object" and not part.keys() & {"properties", "enum", "const"}


def elements(part: Schema, root: Schema) -> Iterator[Schema]:
    """The alternatives of a part; instead of arrays, those of their elements."""
    left, seen = [part], 0
    while left and seen < MOST_PARTS:
        for one in _alternatives(left.pop(), root):
            seen += 1
            if one.get("type") != "array":
                yield one
                continue
            inner = [*_list(one.get("prefixItems")), *([one["items"]] if "items" in one else [])]
            left += [_dictionary(item) for item in inner if item is not False] or [{}]


def _alternatives(part: Schema, root: Schema) -> list[Schema]:
    """What a part can be, without references. A schema may come from another app, so it may be wrong or circular: what
    a wrong reference names is unknown (`{}`).
    """
    found: list[Schema] = []
    left, followed = [part], set[str]()
    while left:
        one = left.pop(0)
        if isinstance(target := one.get("$ref"), str):
            if target not in followed:
                followed.add(target)
                left.insert(0, _dictionary(_dictionary(root.get("$defs")).get(target.removeprefix("#/$defs/"))))
            continue
        several = [inner for key in ("anyOf", "oneOf", "allOf") for inner in _list(one.get(key))]
        if several and len(found) + len(left) < MOST_PARTS:
            left[:0] = [_dictionary(inner) for inner in several]
        else:
            found.append(one)
    return found or [{}]


def _dictionary(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
