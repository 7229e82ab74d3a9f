"""Contracts and what a catalogue answers: pure values, without a broker."""

from __future__ import annotations

import datetime
import json
import time
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import attrs
import msgspec
import pytest
from pydantic import BaseModel, ConfigDict, Field

from lightbus import Lightbus, Message, errors
from lightbus.catalog import catalog, contract, schemas
from lightbus.catalog.catalog import Catalog, Ignored
from lightbus.catalog.contract import Contract, Listener, PublishedEvent, contract_of
from tests.patience import sometimes_within


class Line(msgspec.Struct):
    article: str
    count: int = 1


def shop() -> Contract:
    app = Lightbus("shop", url="memory://")

    @app.event("order.placed", version=2)
    @attrs.frozen
    class OrderPlaced:
        """A customer has placed an order."""

        order_id: int
        lines: list[Line]
        note: str = ""

    @app.event("order.cancelled")
    @attrs.frozen
    class OrderCancelled:
        order_id: int

    return contract_of(app, "2026.11")


class Wanted(BaseModel):
    number: int = Field(validation_alias="order_id")


def billing() -> Contract:
    app = Lightbus("billing", url="memory://")

    @app.on("order.placed", source="shop")
    async def invoice(order: Wanted) -> None:
        """Send an invoice."""

    @app.on("order.*", queue="slow")
    def audit(order: dict[str, Any]) -> None: ...

    @app.on("order.paced", "user.*")
    def misspelt(order, message: Message) -> None: ...  # type: ignore[no-untyped-def]

    @app.on("item.sold", source="shopp")
    def unknown(message: Message) -> None: ...

    return contract_of(app)


@pytest.fixture(scope="module")
def bus() -> Catalog:
    return catalog.of([shop(), billing()], [Ignored("mallory", 1.0, "it says that it is of 'shop'.")])


def test_a_contract_has_the_events_with_schemas_and_the_handlers_with_the_fields_that_they_read(bus: Catalog) -> None:
    assert [one.app for one in bus.contracts] == ["billing", "shop"]
    published = bus.contracts[1]
    assert (published.release, [event.name for event in published.events]) == (
        "2026.11",
        ["order.cancelled", "order.placed"],
    )
    placed = published.events[1]
    assert (placed.version, placed.doc, placed.fields) == (
        2,
        "A customer has placed an order.",
        ["order_id", "lines", "note"],
    )
    assert placed.schema["$defs"]["Line"]["properties"]["count"] == {"type": "integer", "default": 1}
    read = {one.handler: (one.patterns, one.source, one.queue, one.fields) for one in bus.contracts[0].handlers}
    assert read == {
        "invoice": (["order.placed"], "shop", "billing.main", ["order_id"]),
        "audit": (["order.*"], None, "billing.slow", None),
        "misspelt": (["order.paced", "user.*"], None, "billing.main", None),
        "unknown": (["item.sold"], "shopp", "billing.main", []),
    }
    assert bus.contracts[0].handlers[0].doc == "Send an invoice."


def test_the_fields_of_alternatives_are_those_of_all() -> None:
    app = Lightbus("billing", url="memory://")

    class Paid(msgspec.Struct, tag=True):
        amount: int

    class Refunded(msgspec.Struct, tag=True):
        reason: str

    @app.on("a.b")
    def either(event: Paid | Refunded) -> None: ...

    assert contract_of(app).handlers[0].fields == ["type", "amount", "reason"]


class Item(msgspec.Struct):
    article: str
    price: Decimal
    tags: dict[str, Line]
    parent: Item | None = None


class Order(msgspec.Struct):
    lines: list[Item]
    meta: dict[str, Any]
    status: Literal["new", "paid"]
    payload: Any = None


ORDER = schemas.schema_read(Order)


@pytest.mark.parametrize(
    ("path", "known", "kind"),
    [
        ("lines", "yes", "array of Item"),
        ("lines.article", "yes", "string"),
        ("lines.price", "yes", "string (decimal)"),
        ("lines.tags.red", "yes", "Line"),
        ("lines.tags.red.count", "yes", "integer"),
        ("lines.parent.parent.article", "yes", "string"),
        ("lines.parent", "yes", "null | Item"),
        ("status", "yes", '"new" | "paid"'),
        ("meta.anything.below", "open", ""),
        ("payload.anything", "open", ""),
        ("lines.artikel", "no", ""),
        ("status.new", "no", ""),
        ("total", "no", ""),
    ],
)
def test_a_field_is_found_by_its_path(path: str, known: str, kind: str) -> None:
    found = schemas.field(ORDER, path.split("."))
    assert (found.known, set(found.type.split(" | "))) == (known, set(kind.split(" | ")))


def test_a_field_that_does_not_exist_comes_with_those_that_do() -> None:
    assert schemas.field(ORDER, ["lines", "artikel"]).siblings == ["article", "price", "tags", "parent"]


def test_fields_of_a_base_schema_and_of_a_tuple_are_found() -> None:
    class Strict(BaseModel):
        model_config = {"extra": "allow"}
        pair: tuple[Wanted, int]

    schema = schemas.schema_read(Strict)
    assert schemas.field(schema, ["pair", "order_id"]).known == "yes"
    assert schemas.field(schema, ["other"]).known == "open"
    both = {"allOf": [{"$ref": "#/$defs/A"}, {"properties": {"b": {}}}], "$defs": {"A": {"properties": {"a": {}}}}}
    assert schemas.fields(both) == ["a", "b"]


LOOP = {"$ref": "#/$defs/A", "$defs": {"A": {"anyOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}]}}}


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#/$defs/A", "$defs": {"A": {"$ref": "#/$defs/A"}}},
        LOOP,
        {"$ref": "#/$defs/A"},
        {"$ref": 1, "$defs": []},
        {"anyOf": "x"},
        {
            "type": "array",
            "items": {"$ref": "#/$defs/A"},
            "$defs": {"A": {"type": "array", "items": {"$ref": "#/$defs/A"}}},
        },
    ],
)
def test_a_wrong_or_circular_schema_of_another_app_is_no_error(schema: dict[str, Any]) -> None:
    assert schemas.fields(schema) is None
    assert schemas.field(schema, ["a", "b"]).known in ("open", "no")
    assert schemas.described(schema)
    assert schemas.fields({"properties": 1}) == []


def test_a_bus_with_thousands_of_events_and_handlers_is_compared_without_all_pairs() -> None:
    """All pairs would be 4 million comparisons: seconds."""
    one_app = shop()
    apps = [
        attrs.evolve(
            one_app,
            app=f"app{number}",
            events=[PublishedEvent(f"thing{number}.e{one}", 1, "", {}) for one in range(4)],
            handlers=[
                Listener(f"h{one}", [f"thing{number + 1}.{one and '*'}", f"thing{number}.e{one}"], None, "", "", None)
                for one in range(4)
            ],
        )
        for number in range(500)
    ]
    bus = catalog.of(apps)

    def seconds() -> float:
        began = time.monotonic()
        assert len(bus.unmatched()) == 503
        assert bus.unconsumed() == []
        return time.monotonic() - began

    sometimes_within(2.0, seconds)


def test_a_catalogue_knows_who_publishes_and_who_gets_an_event(bus: Catalog) -> None:
    def names(event: str, source: str | None = None) -> list[str]:
        return [one.name for one in bus.subscribers(event, source)]

    assert names("order.placed") == ["billing.invoice", "billing.audit"]
    assert names("order.placed", "shop") == ["billing.invoice", "billing.audit"]
    assert names("order.placed", "other") == ["billing.audit"]
    assert [one.app for one, _ in bus.publishers("order.placed")] == ["shop"]
    assert bus.publishers("order.paced") == []
    without = attrs.evolve(bus, contracts=[bus.contracts[1]])
    assert [event.name for _, event in without.unconsumed()] == ["order.cancelled", "order.placed"]
    assert bus.unconsumed() == []


def test_patterns_and_sources_that_match_nothing_are_shown_with_what_was_probably_meant(bus: Catalog) -> None:
    assert [(one.name, pattern, meant) for one, pattern, meant in bus.unmatched()] == [
        ("billing.misspelt", "order.paced", "order.placed"),
        ("billing.misspelt", "user.*", None),
    ]
    assert [(one.name, meant) for one, meant in bus.unknown_sources()] == [("billing.unknown", "shop")]


def test_a_contract_takes_the_place_of_the_earlier_one_of_its_app(bus: Catalog) -> None:
    newer = attrs.evolve(shop(), release="2027.1", events=[])
    assert [one.release for one in bus.replaced(newer).contracts] == ["", "2027.1"]
    assert [one.release for one in catalog.of([shop(), newer]).contracts] == ["2027.1"]


def test_a_snapshot_is_read_as_it_was_written(bus: Catalog, tmp_path: Path) -> None:
    file = tmp_path / "catalog.json"
    file.write_text(json.dumps(catalog.to_json(bus)))
    assert catalog.from_file(file) == bus


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "is not JSON"),
        ("[" * 200_000, "is not JSON"),
        ('{"lightbus": 1, "contracts": [], "ignored": [1]}', "its ignored contracts cannot be read"),
        ("[]", "is not a snapshot of a catalogue"),
        ('{"lightbus": 2, "contracts": []}', "is not a snapshot of a catalogue"),
        ('{"lightbus": 1}', "is not a snapshot of a catalogue"),
        ('{"lightbus": 1, "contracts": [{"app": "x"}]}', "missing required field"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_file_that_is_no_snapshot_is_an_error(tmp_path: Path, text: str | None, problem: str) -> None:
    file = tmp_path / "catalog.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(errors.CatalogError, match=problem):
        catalog.from_file(file)


@pytest.mark.parametrize("change", [{"app": "Not A Name"}, {"events": 1}, {"handlers": [{}]}])
def test_a_damaged_contract_is_an_error(change: dict[str, Any]) -> None:
    with pytest.raises(errors.CatalogError, match="This is not a contract"):
        contract.from_json(contract.to_json(shop()) | change)


def test_unknown_parts_of_a_newer_contract_are_ignored() -> None:
    found = shop()
    assert contract.from_json(contract.to_json(found) | {"later": 1}) == found


# --- exact schemas ----------------------------------------------------------------------------


class Gap(msgspec.Struct, omit_defaults=True):
    at: int
    text: str = ""


class Everything(msgspec.Struct):
    when: datetime.datetime
    hours: list[datetime.time | None]
    gap: Gap
    count: int = 1
    note: str | msgspec.UnsetType = msgspec.UNSET


class Priced(BaseModel):
    amount: Decimal
    count: int = 1
    secret: str = Field("", exclude=True)


def test_a_contract_requires_the_fields_that_are_in_every_body() -> None:
    app = Lightbus("shop", url="memory://")
    app.event("order.placed")(Everything)
    app.event("order.priced")(Priced)
    placed, priced = (one.schema["$defs"] for one in contract_of(app).events)
    assert placed["Everything"]["required"] == ["when", "hours", "gap", "count"]
    assert placed["Gap"]["required"] == ["at"]
    assert priced["Priced"]["required"] == ["amount", "count"]


def test_a_contract_has_the_formats_of_dates_and_decimal_numbers() -> None:
    app = Lightbus("billing", url="memory://")

    @app.on("order.placed")
    def placed(order: Everything) -> None: ...

    @app.on("order.priced")
    def priced(order: Priced) -> None: ...

    first, second = (one.schema["$defs"] for one in contract_of(app).handlers if one.schema is not None)
    assert first["Everything"]["required"] == ["when", "hours", "gap"]
    read = first["Everything"]["properties"]
    assert read["when"] == {"type": "string", "format": "date-time"}
    assert {"type": "string", "format": "time"} in read["hours"]["items"]["anyOf"]
    assert [one.get("format") for one in second["Priced"]["properties"]["amount"]["anyOf"]] == [None, "decimal"]


class Opaque:
    pass


class Odd(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)

    number: int
    other: Opaque | None = None


def test_a_field_that_json_schema_cannot_describe_may_be_anything() -> None:
    app = Lightbus("billing", url="memory://")

    @app.on("order.placed")
    def placed(order: Odd) -> None: ...

    (listener,) = contract_of(app).handlers
    assert listener.schema is not None
    properties = listener.schema["$defs"]["Odd"]["properties"]
    assert properties["number"]["type"] == "integer"
    assert {} in properties["other"]["anyOf"]
