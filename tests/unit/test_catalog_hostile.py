"""A contract of another app may contain anything. It is refused by name, or the commands can read it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightbus import errors
from lightbus.catalog import asyncapi, catalog, compatibility, contract
from lightbus.catalog.contract import Contract
from lightbus.catalog.differences import differences
from lightbus.catalog.notices import notices
from lightbus.catalog.who import who
from lightbus.cli.catalog import described, flowchart, overview, page, picture
from lightbus.cli.catalog.reading import Reading
from tests.catalogs import small
from tests.patience import within

AUDIT, BILLING, SHOP = small().contracts


def nested(levels: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(levels):
        found = {"type": "array", "items": found}
    return found


def changed(schema: object) -> Contract:
    """The contract of billing with this schema of its event, and of all that it reads; as it arrives."""
    written = contract.to_json(BILLING)
    for one in [*written["events"], *written["handlers"]]:
        one["schema"] = schema
    return contract.from_json(json.loads(json.dumps(written)))


def use(found: Contract) -> None:
    """All that the commands do with a contract."""
    whole = small().replaced(found)
    reading = Reading(whole, None, "in catalog.json")
    notices(whole)
    for question in ("invoice.paid", "invoice.paid.a", "order.placed.lines.article", "#"):
        with contextlib.suppress(errors.CatalogError):
            who(whole, question)
    for one in (found, SHOP, AUDIT):
        compatibility.check(one, whole)
    compatibility.check(found, small())
    for show in (described.described, flowchart.flowchart, picture.draw, page.page, overview.lines):
        show(reading)
    json.dumps(asyncapi.document(whole), allow_nan=False)
    json.dumps(described.described(reading), allow_nan=False)


REFUSED = {
    "a type that is a number": ({"type": 5}, "event 'invoice.paid': its JSON Schema: .* at `\\$.type`"),
    "properties that are a list": ({"properties": ["a"]}, "at `\\$.properties`"),
    "a field that is a text": ({"properties": {"a": "integer"}}, "at `\\$.properties"),
    "definitions that are a list": ({"$defs": []}, "at `\\$.\\$defs`"),
    "a reference that is a number": ({"$ref": 1}, "at `\\$.\\$ref`"),
    "alternatives that are an object": ({"anyOf": {}}, "at `\\$.anyOf`"),
    "an enum that is null": ({"enum": None}, "at `\\$.enum`"),
    "required fields that are true": ({"required": True}, "at `\\$.required`"),
    "a limit that is a text": ({"type": "integer", "minimum": "0"}, "at `\\$.minimum`"),
    "a division by zero": ({"type": "integer", "multipleOf": 0}, "at `\\$.multipleOf`"),
    "a number that is not JSON": ({"default": float("inf")}, "the number inf, which is not JSON"),
    "many levels": (nested(110), "more than 100 levels"),
    "very many levels": (nested(400), "more than 100 levels"),
    "no object": ([], "Expected `object`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_schema_that_commands_cannot_read_is_refused_with_its_place(case: str) -> None:
    schema, place = REFUSED[case]
    with pytest.raises(errors.CatalogError, match=rf"This is not a contract .*{place}"):
        changed(schema)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("at", float("nan"), "its time is nan"),
        ("events", [{"name": "a" * 256, "version": 1, "doc": "", "schema": {}}], "more than 255 bytes"),
    ],
)
def test_a_time_or_a_name_that_cannot_be_is_refused(key: str, value: object, problem: str) -> None:
    with pytest.raises(errors.CatalogError, match=problem):
        contract.from_json(contract.to_json(SHOP) | {key: value})


def chain(length: int, width: int) -> dict[str, Any]:
    """Classes in each other: each has so many fields of the next one, so there are width ** length paths."""
    part = {
        f"C{at}": {
            "type": "object",
            "properties": {f"f{number}": {"$ref": f"#/$defs/C{at + 1}"} for number in range(width)},
            "required": ["f0"],
        }
        for at in range(length)
    }
    return {"$ref": "#/$defs/C0", "$defs": {**part, f"C{length}": {"type": "integer"}}}


UNION = {f"C{at}": {"anyOf": [{"$ref": f"#/$defs/C{at + 1}"}] * 2} for at in range(500)}
ACCEPTED: dict[str, Any] = {
    "circular": {"$ref": "#/$defs/A", "$defs": {"A": {"$ref": "#/$defs/A"}}},
    "a circular union": {"anyOf": [{"$ref": "#/$defs/A"}], "$defs": {"A": {"anyOf": [{"$ref": "#/$defs/A"}]}}},
    "a circular list": {"$ref": "#/$defs/A", "$defs": {"A": {"type": "array", "items": {"$ref": "#/$defs/A"}}}},
    "a reference to nowhere": {"$ref": "https://example.com/x"},
    "classes in each other": chain(500, 1),
    "more paths than atoms": chain(300, 5),
    "more alternatives than atoms": {"$ref": "#/$defs/C0", "$defs": UNION},
    "a pattern in another dialect": {
        "type": "object",
        "properties": {"number": {"pattern": r"\p{L}+", "type": "string"}},
    },
    "no field at all": {"type": "object", "properties": {"a": False}},
    "empty": {},
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_an_odd_schema_is_read_in_limited_time(case: str) -> None:
    with within(20):
        use(changed(ACCEPTED[case]))


def test_an_enum_is_compared_with_a_pattern_in_another_dialect() -> None:
    """Pydantic's patterns are those of Rust's regular expressions."""
    (found,) = differences({"const": "x"}, {"type": "string", "pattern": r"\p{L}+"})
    assert (found.written, found.kind.value) == ('"x"', "limit")
    (found,) = differences({"const": 10**400}, {"type": "number", "multipleOf": 0.5})
    assert found.kind.value == "limit"


def test_what_is_too_large_to_compare_is_shown_as_such() -> None:
    found = differences(chain(30, 5), chain(30, 5) | {"title": "another"})
    assert {one.written for one in found} == {"a schema that is too large to compare"}


def test_a_snapshot_with_a_bad_contract_names_its_app(tmp_path: Path) -> None:
    written = catalog.to_json(small())
    written["contracts"][1]["events"][0]["schema"] = {"type": 5}
    (tmp_path / "catalog.json").write_text(json.dumps(written))
    with pytest.raises(errors.CatalogError, match="contract 2, of app 'billing': This is not a contract"):
        catalog.from_file(tmp_path / "catalog.json")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "object", "string", "a", "#/$defs/A"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "A", "type"]), inner, max_size=3),
    max_leaves=6,
)
KEYWORDS = st.sampled_from(
    [
        *("$ref", "$defs", "type", "title", "description", "default", "enum", "const", "format", "pattern"),
        *("anyOf", "oneOf", "allOf", "items", "prefixItems", "properties", "additionalProperties", "required"),
        *("minimum", "maximum", "exclusiveMinimum", "multipleOf", "minLength", "maxItems", "discriminator"),
    ]
)
PARTS = st.recursive(
    st.dictionaries(KEYWORDS, JSON, max_size=3),
    lambda inner: st.fixed_dictionaries(
        {},
        optional={
            "$ref": st.just("#/$defs/A"),
            "$defs": st.dictionaries(st.just("A"), inner),
            "type": st.sampled_from(["object", "array", "string", "integer", "null", "number", ["string", "null"]]),
            "properties": st.dictionaries(st.sampled_from(["a", "lines", "article"]), inner, max_size=2),
            "items": inner,
            "prefixItems": st.lists(inner, max_size=2),
            "anyOf": st.lists(inner, max_size=2),
            "additionalProperties": inner | st.booleans(),
            "required": st.lists(st.sampled_from(["a", "b"]), max_size=2),
            "enum": st.lists(JSON, max_size=2),
            "multipleOf": st.floats(),
        },
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(PARTS)
def test_any_schema_is_refused_or_can_be_read(schema: dict[str, Any]) -> None:
    with contextlib.suppress(errors.CatalogError):
        use(changed(schema))
