"""JSON Schemas (2020-12) of events, and of what handlers read."""

from __future__ import annotations

import inspect
from typing import Any

import msgspec

from lightbus import pydantic_models
from lightbus.app import Lightbus
from lightbus.catalog import exact as exactly
from lightbus.event import EventType

DIALECT = "https://json-schema.org/draft/2020-12/schema"

Schema = dict[str, Any]


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
        found |= dict.fromkeys(part["properties"])
    return list(found)


def _alternatives(part: Schema, root: Schema) -> list[Schema]:
    while "$ref" in part:
        part = root["$defs"][part["$ref"].removeprefix("#/$defs/")]
    several = part.get("anyOf") or part.get("oneOf")
    return [part] if not several else [one for other in several for one in _alternatives(other, root)]
