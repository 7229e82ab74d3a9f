"""Whether the parts of a contract can be read: another app may have written anything into it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any

import msgspec

from lightbus.event import MAX_NAME_BYTES

DEEPEST = 100
"""Levels of a schema. Classes are not nested in it: they refer to each other."""

_Size = Annotated[int, msgspec.Meta(ge=0)]


class _Part(msgspec.Struct, rename={"ref": "$ref", "defs": "$defs"}):
    """The keywords of a JSON Schema that Lightbus reads, with their types."""

    ref: str = ""
    defs: dict[str, _Part | bool] = {}
    type: str | list[str] = ""
    title: str = ""
    description: str = ""
    format: str = ""
    pattern: str = ""
    contentEncoding: str = ""
    enum: list[Any] = []
    anyOf: list[_Part | bool] = []
    oneOf: list[_Part | bool] = []
    allOf: list[_Part | bool] = []
    items: _Part | bool = True
    prefixItems: list[_Part | bool] = []
    properties: dict[str, _Part | bool] = {}
    additionalProperties: _Part | bool = True
    required: list[str] = []
    minimum: int | float = 0
    maximum: int | float = 0
    exclusiveMinimum: int | float = 0
    exclusiveMaximum: int | float = 0
    multipleOf: Annotated[int, msgspec.Meta(gt=0)] | Annotated[float, msgspec.Meta(gt=0)] = 1
    minLength: _Size = 0
    maxLength: _Size = 0
    minItems: _Size = 0
    maxItems: _Size = 0
    minProperties: _Size = 0
    maxProperties: _Size = 0


def check_schema(schema: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: it is not a JSON Schema that commands can read; the message has the place.
    """
    for value, level in _values(schema):
        if level > DEEPEST:
            raise ValueError(f"it has more than {DEEPEST} levels")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"it has the number {value}, which is not JSON")
    msgspec.convert(schema, _Part)


def _values(schema: object) -> Iterator[tuple[object, int]]:
    """All values of a JSON document, with their levels."""
    left = [(schema, 1)]
    while left:
        value, level = left.pop()
        yield value, level
        if isinstance(value, dict):
            left += ((inner, level + 1) for inner in value.values())
        elif isinstance(value, list):
            left += ((inner, level + 1) for inner in value)


def check_name(name: str) -> None:
    """
    Raises:
        ValueError: no event and no pattern can have this name.
    """
    if len(name.encode(errors="replace")) > MAX_NAME_BYTES:
        raise ValueError(f"the name {name[:40]!r}... has more than {MAX_NAME_BYTES} bytes")
