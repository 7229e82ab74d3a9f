"""A JSON Schema as the rows of a table."""

from __future__ import annotations

from typing import Any

import attrs

from lightbus.catalog import schemas
from lightbus.catalog.schemas import Schema

MOST_ROWS = 200
"""Rows of one schema."""
DEEPEST = 5
"""Levels of a schema that are shown."""


@attrs.frozen
class Row:
    """One field."""

    path: str
    """`lines.article`."""
    level: int
    type: str
    required: bool
    doc: str
    default: str
    """"" if it has none."""


def rows(schema: Schema) -> list[Row]:
    """The fields, and the fields of their objects below them. Of a hostile schema, too, at most `MOST_ROWS`."""
    found: list[Row] = []
    _collect(schema, schema, "", 0, found, ())
    return found


def _collect(root: Schema, part: Schema, prefix: str, level: int, found: list[Row], inside: tuple[str, ...]) -> None:
    for one, references in _objects(root, part, inside):
        properties = one.get("properties")
        if not isinstance(properties, dict):
            continue
        required = one.get("required")
        required = required if isinstance(required, list) else []
        for name, inner in properties.items():
            if len(found) >= MOST_ROWS:
                return
            if not isinstance(inner, dict):
                inner = {}
            default = repr(inner["default"]) if "default" in inner else ""
            doc = inner.get("description")
            found.append(
                Row(
                    prefix + name,
                    level,
                    schemas.described(inner),
                    name in required,
                    doc if isinstance(doc, str) else "",
                    default if len(default) < 60 else default[:59] + "…",
                )
            )
            if level < DEEPEST:
                _collect(root, inner, f"{prefix}{name}.", level + 1, found, references)


def _objects(root: Schema, part: Schema, inside: tuple[str, ...]) -> list[tuple[Schema, tuple[str, ...]]]:
    """The objects that a part can be, or hold as an array, with the references that led there."""
    found: list[tuple[Schema, tuple[str, ...]]] = []
    left: list[tuple[Any, tuple[str, ...]]] = [(part, inside)]
    for _ in range(MOST_ROWS):
        if not left:
            break
        one, references = left.pop(0)
        if not isinstance(one, dict):
            continue
        if isinstance(target := one.get("$ref"), str):
            parts = root.get("$defs")
            if target not in references and isinstance(parts, dict):
                left.append((parts.get(target.removeprefix("#/$defs/")), (*references, target)))
            continue
        if "properties" in one:
            found.append((one, references))
        for key in ("anyOf", "oneOf", "allOf"):
            several = one.get(key)
            left += [(inner, references) for inner in several] if isinstance(several, list) else []
        if "items" in one:
            left.append((one["items"], references))
    return found
