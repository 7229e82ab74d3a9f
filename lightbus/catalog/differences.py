"""Can a reader's JSON Schema accept every body that a writer's schema allows? If not: which field differs, and how.

Types are compared strictly, as `msgspec` decodes: that Pydantic reads "5" as an int does not count, because it depends
on the value. An integer is accepted as a number.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Iterator
from enum import Enum
from typing import Any

import attrs

from lightbus import errors
from lightbus.catalog import schemas
from lightbus.catalog.schemas import Schema


class Kind(Enum):
    """How a field differs."""

    MISSING = "missing"
    """The reader requires it, and the writer does not have it."""
    LOST = "lost"
    """The reader has a default for it, and the writer does not have it."""
    OPTIONAL = "optional"
    """The reader requires it, and the writer does not always write it."""
    NULL = "null"
    """The writer may write null."""
    TYPE = "type"
    """The writer may write another type."""
    VALUE = "value"
    """The writer may write another value of an enum, a Literal or a tag."""
    LIMIT = "limit"
    """The writer may write a value outside of the reader's limits: a length, a range, a pattern."""
    UNKNOWN = "unknown"
    """The reader forbids unknown fields, and the writer has this one."""


@attrs.frozen
class Difference:
    """One that keeps the reader from reading a body, or a field of it."""

    kind: Kind
    path: str
    """`lines[].count`; `[]` is each item of a list, `{}` each value of a map. "" is the whole body."""
    written: str
    """What the writer writes, in words."""
    read: str
    """What the reader accepts, in words."""
    near: str | None = None
    """The writer's field that was probably meant, of a field that it does not have."""


def differences(written: Schema, read: Schema) -> list[Difference]:
    """All differences, by the reader's fields. None: the reader accepts every body."""
    found = _Comparison(written, read).compare(written, read, "")
    return list(dict.fromkeys(found))


_IGNORED = frozenset({"$schema", "$comment", "$defs", "title", "description", "default", "examples", "deprecated"})
_UPPER = {"maximum": "at most", "exclusiveMaximum": "less than", "maxLength": "length at most"}
_LOWER = {"minimum": "at least", "exclusiveMinimum": "more than", "minLength": "length at least"}
_ITEMS_UPPER = {"maxItems": "items at most", "maxProperties": "keys at most"}
_ITEMS_LOWER = {"minItems": "items at least", "minProperties": "keys at least"}
_SAME = (
    "pattern",
    "multipleOf",
    "patternProperties",
    "propertyNames",
    "not",
    "allOf",
    "if",
    "contains",
    "dependentRequired",
)
"""Keywords that cannot be compared: the writer must have the same."""
_ANY_TEXT = frozenset({"binary", "password"})
"""Formats that any string has."""
DEEPEST = 100
"""Levels of classes in each other that are compared."""
_PART_OF = {"uuid": {"uuid1", "uuid3", "uuid4", "uuid5", "uuid6", "uuid7", "uuid8"}}

Value = tuple[str, Any]


class _Comparison:
    def __init__(self, written: Schema, read: Schema) -> None:
        self.written_root = written
        self.read_root = read
        self.open: set[tuple[str, str]] = set()
        """Pairs that are being compared: of recursive classes, they are compared once."""
        self.left = schemas.MOST_PARTS

    def compare(self, written: Any, read: Any, path: str) -> list[Difference]:
        pair = (_key(written), _key(read))
        if pair in self.open:
            return []
        self.left -= 1
        if self.left < 0 or len(self.open) == DEEPEST:
            return [Difference(Kind.LIMIT, path, "a schema that is too large to compare", "a smaller one")]
        self.open.add(pair)
        try:
            accepted = list(_alternatives(read, self.read_root))
            return [
                one
                for alternative in _alternatives(written, self.written_root)
                for one in self._alternative(alternative, accepted, path)
            ]
        finally:
            self.open.discard(pair)

    def _alternative(self, written: Schema, accepted: list[Schema], path: str) -> list[Difference]:
        """The differences to the alternative that is nearest."""
        if any(_is_any(one) for one in accepted):
            return []
        shown = " or ".join(dict.fromkeys(map(_words, accepted))) or "nothing"
        if not accepted:
            return [Difference(Kind.TYPE, path, _words(written), shown)]
        if _is_any(written):
            return [Difference(Kind.TYPE, path, "any type", shown)]
        if "const" in written:
            return self._value(written["const"], accepted, path, shown)
        candidates = [one for one in accepted if _takes_type(one, written)]
        if not candidates:
            kind = Kind.NULL if written.get("type") == "null" else Kind.TYPE
            if all("const" in one for one in accepted) and any(
                _type_of(one["const"]) == written.get("type") for one in accepted
            ):
                kind = Kind.VALUE
            return [Difference(kind, path, _words(written), shown)]
        results = [self._same_type(written, one, path) for one in candidates]
        return min(results, key=lambda one: (len(one), any(each.kind is Kind.VALUE for each in one)))

    def _value(self, value: Any, accepted: list[Schema], path: str, shown: str) -> list[Difference]:
        if any(_accepts_value(one, value) for one in accepted):
            return []
        kind = Kind.VALUE if any("const" in one for one in accepted) else Kind.TYPE
        if kind is Kind.TYPE and any(_takes_type(one, {"type": _type_of(value)}) for one in accepted):
            kind = Kind.LIMIT
        return [Difference(Kind.NULL if value is None else kind, path, json.dumps(value), shown)]

    def _same_type(self, written: Schema, read: Schema, path: str) -> list[Difference]:
        found = list(_limits(written, read, path))
        match written.get("type"):
            case "object":
                fields = list(self._object(written, read, path))
                # With another tag it is another class: then its fields say nothing.
                found += [one for one in fields if self._is_tag(one, written, read, path)] or fields
            case "array":
                found += self._array(written, read, path)
            case _:
                pass
        return found

    def _is_tag(self, one: Difference, written: Schema, read: Schema, path: str) -> bool:
        name = one.path.removeprefix(f"{path}.") if path else one.path
        values = [
            list(_alternatives(schema.get("properties", {}).get(name, False), root))
            for schema, root in ((written, self.written_root), (read, self.read_root))
        ]
        return one.kind is Kind.VALUE and all(len(each) == 1 and "const" in each[0] for each in values)

    def _object(self, written: Schema, read: Schema, path: str) -> Iterator[Difference]:
        has, wants = written.get("properties", {}), read.get("properties", {})
        # Without `properties`, a class has no fields known here: a dict. With them, nothing else is written.
        rest = written.get("additionalProperties", "properties" not in written)
        if rest is True:
            rest = {}
        always, required = set(written.get("required", ())), set(read.get("required", ()))
        for name, schema in wants.items():
            where = f"{path}.{name}" if path else name
            if name in has:
                if name in required and name not in always:
                    yield Difference(Kind.OPTIONAL, where, "a field that may be absent", "a required field")
                yield from self.compare(has[name], schema, where)
            elif rest is not False:
                if name in required:
                    yield Difference(Kind.OPTIONAL, where, "any fields", "a required field")
                yield from self.compare(rest, schema, where)
            else:
                kind = Kind.MISSING if name in required else Kind.LOST
                near = errors.nearest(name, [one for one in has if one not in wants])
                yield Difference(kind, where, "no such field", _words_of(schema, self.read_root), near)
        extra = read.get("additionalProperties", True)
        if extra is True or extra == {}:
            return
        for name, schema in has.items():
            if name not in wants:
                where = f"{path}.{name}" if path else name
                if extra is False:
                    yield Difference(Kind.UNKNOWN, where, _words_of(schema, self.written_root), "no unknown fields")
                else:
                    yield from self.compare(schema, extra, where)
        if rest is not False:
            if extra is False:
                yield Difference(Kind.UNKNOWN, f"{path}{{}}", "any fields", "no unknown fields")
            else:
                yield from self.compare(rest, extra, f"{path}{{}}")

    def _array(self, written: Schema, read: Schema, path: str) -> Iterator[Difference]:
        sent, wanted = written.get("prefixItems", []), read.get("prefixItems", [])
        rest = written.get("items", not sent)
        accepted = read.get("items", True)
        for index in range(max(len(sent), len(wanted))):
            one = sent[index] if index < len(sent) else rest
            other = wanted[index] if index < len(wanted) else accepted
            if one is not False and other is not False:  # else the lengths differ: see `_limits`
                yield from self.compare(one, other, f"{path}[{index}]")
        if rest is not False and accepted is not False:
            yield from self.compare(rest, accepted, f"{path}[]")


def _key(schema: Any) -> str:
    if isinstance(schema, dict) and "$ref" in schema:
        return f"-> {schema['$ref']}"
    return json.dumps(schema, sort_keys=True)


def _alternatives(schema: Any, root: Schema) -> Iterator[Schema]:
    """The parts of a union, each with one type. A value of an enum is a part: `{"const": ...}`."""
    left, followed = [schema], set[str]()
    while left:
        one = left.pop(0)
        if one is False:
            continue
        if one is True:
            yield {}
        elif "$ref" in one:
            # Beside a reference, Pydantic writes a description or a default.
            if one["$ref"] not in followed:
                followed.add(one["$ref"])
                left.insert(0, root.get("$defs", {}).get(one["$ref"].removeprefix("#/$defs/"), {}))
        elif several := one.get("anyOf") or one.get("oneOf") or _single(one.get("allOf", [])):
            left[:0] = several
        elif "enum" in one:
            yield from ({"const": value} for value in one["enum"])
        elif "const" in one:
            yield {"const": one["const"]}
        elif isinstance(one.get("type"), list):
            yield from (one | {"type": each} for each in one["type"])
        else:
            yield one


def _single(parts: list[Any]) -> list[Any]:
    return parts if len(parts) == 1 else []


def _is_any(schema: Schema) -> bool:
    return not set(schema) - _IGNORED


def _type_of(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
        case _:
            return "object"


def _takes_type(read: Schema, written: Schema) -> bool:
    """Whether a type of JSON is read at all."""
    if "const" in read:
        return False
    wanted, sent = read.get("type"), written.get("type")
    if wanted == "string" and read.get("format") == "decimal" and sent in ("integer", "number"):
        return True
    return wanted is None or wanted == sent or (wanted == "number" and sent == "integer")


def _limits(written: Schema, read: Schema, path: str) -> Iterator[Difference]:
    """What the reader's schema restricts further than the writer's."""
    if written.get("type") == "string" and (form := _form(read)) is not None and not _has_form(written, form):
        yield Difference(Kind.TYPE, path, _words(written), _words(read))
    closed = "prefixItems" in written and written.get("items", False) is False
    least_known = written | ({"maxItems": len(written["prefixItems"])} if closed else {})
    for keywords, fits in (
        (_UPPER | _ITEMS_UPPER, operator.le),
        (_LOWER | _ITEMS_LOWER, operator.ge),
    ):
        for name, words in keywords.items():
            if name not in read or (name in ("minItems", "minProperties", "minLength") and read[name] == 0):
                continue
            if name not in least_known or not fits(least_known[name], read[name]):
                sent = (
                    f"{words} {least_known[name]}" if name in least_known else f"{_words(written)} without that limit"
                )
                yield Difference(Kind.LIMIT, path, sent, f"{words} {read[name]}")
    for name in _SAME:
        if name in read and read[name] != written.get(name):
            yield Difference(Kind.LIMIT, path, f"{_words(written)} without the same {name}", f"{name} {read[name]}")


def _form(schema: Schema) -> str | None:
    """The form of a string: a date, a UUID, base64; None: any text."""
    form = schema.get("contentEncoding") or schema.get("format")
    return None if form in _ANY_TEXT else form


def _has_form(written: Schema, form: str) -> bool:
    own = _form(written)
    return own == form or own in _PART_OF.get(form, ())


def _accepts_value(read: Schema, value: Any) -> bool:
    """False also if that is unknown: a pattern in another dialect, a number that Python cannot divide."""
    try:
        return _accepts(read, value)
    except (re.error, OverflowError, RecursionError):
        return False


def _accepts(read: Schema, value: Any) -> bool:
    if "const" in read:
        return type(read["const"]) is type(value) and read["const"] == value
    if not _takes_type(read, {"type": _type_of(value)}) or _form(read) is not None:
        return False
    if isinstance(value, str):
        return (
            read.get("minLength", 0) <= len(value) <= read.get("maxLength", len(value))
            and re.search(read.get("pattern", ""), value) is not None
        )
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (
            read.get("minimum", value) <= value <= read.get("maximum", value)
            and not value <= read.get("exclusiveMinimum", value - 1)
            and not value >= read.get("exclusiveMaximum", value + 1)
            and value % read.get("multipleOf", 1 if isinstance(value, int) else value or 1) == 0
        )
    return True


# --- in words ---------------------------------------------------------------------------------


def _words_of(schema: Any, root: Schema) -> str:
    return " or ".join(dict.fromkeys(map(_words, _alternatives(schema, root)))) or "nothing"


def _words(schema: Schema) -> str:
    """A type in words: `integer`, `uuid`, `"paid"`."""
    if "const" in schema:
        return json.dumps(schema["const"])
    kind = schema.get("type")
    if kind == "object" and "properties" in schema:
        return f"object {schema['title']}" if isinstance(schema.get("title"), str) else "object"
    if kind == "string":
        form = _form(schema)
        return "string" if form is None else f"string ({form})"
    return kind if isinstance(kind, str) else "any type"
