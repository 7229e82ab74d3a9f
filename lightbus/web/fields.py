"""A JSON Schema as the rows of a table."""

from __future__ import annotations

import attrs

from lightbus.catalog import schemas
from lightbus.catalog.schemas import Schema
from lightbus.web import text

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
    """The fields, and the fields of their objects below them: at most `MOST_ROWS`."""
    found: list[Row] = []
    _collect(schema, schema, "", found, ())
    return found


def _collect(root: Schema, part: Schema, prefix: str, found: list[Row], inside: tuple[Schema, ...]) -> None:
    """
    Args:
        inside: the objects around this part. One that is among them is not shown again.
    """
    for one in schemas.elements(part, root):
        if any(one is outer for outer in inside):
            continue
        for name, inner in one.get("properties", {}).items():
            if len(found) >= MOST_ROWS:
                return
            about = inner if isinstance(inner, dict) else {}  # True: any value
            found.append(
                Row(
                    prefix + name,
                    len(inside),
                    schemas.described(about),
                    name in one.get("required", ()),
                    about.get("description", ""),
                    text.cut(repr(about["default"]), 60) if "default" in about else "",
                )
            )
            if len(inside) < DEEPEST:
                _collect(root, about, f"{prefix}{name}.", found, (*inside, one))
