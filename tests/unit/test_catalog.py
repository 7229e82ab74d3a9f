"""Contracts and what a catalogue answers: pure values, without a broker."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import attrs
import msgspec
import pytest
from pydantic import BaseModel, Field

from lightbus import Lightbus, Message, errors
from lightbus.catalog import catalog, contract
from lightbus.catalog.catalog import Catalog
from lightbus.catalog.contract import Contract, contract_of


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
    return catalog.of([shop(), billing()])


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
