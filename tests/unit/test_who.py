"""`who`: the publishers, handlers and readers of an event or a field. Pure values, without a broker."""

from __future__ import annotations

from typing import Any

import attrs
import msgspec
import pytest

from lightbus import Lightbus, Message, errors
from lightbus.catalog import catalog
from lightbus.catalog.catalog import Catalog, Ignored
from lightbus.catalog.contract import contract_of
from lightbus.catalog.notices import notices
from lightbus.catalog.who import who


class Line(msgspec.Struct):
    article: str
    count: int = 1


class Ordered(msgspec.Struct):
    lines: list[Line]


class Article(msgspec.Struct):
    article: str


class Lines(msgspec.Struct):
    lines: list[Article]
    coupon: str = ""


@pytest.fixture(scope="module")
def bus() -> Catalog:
    shop = Lightbus("shop", url="memory://")

    @shop.event("order.placed")
    class Placed(Ordered):
        email: str

    @shop.event("order")
    class Order(msgspec.Struct):
        placed: int

    @shop.event("order.cancelled")
    class Cancelled(msgspec.Struct):
        email: str
        extra: dict[str, Any]

    old = Lightbus("old", url="memory://")
    old.event("order.placed")(type("Placed", (Ordered,), {}))
    billing = Lightbus("billing", url="memory://")

    @billing.on("order.placed", source="shop")
    def invoice(order: Lines) -> None: ...

    @billing.on("order.*", queue="slow")
    def audit(order: dict[str, Any]) -> None: ...

    @billing.on("order.placed", source="old")
    def count(message: Message) -> None: ...

    @billing.on("order.placed", source="nobody")
    def lost(message: Message) -> None: ...

    @billing.on("machine.started")
    def machine(body: dict[str, Any]) -> None: ...

    return catalog.of([contract_of(one) for one in (shop, old, billing)])


def answered(bus: Catalog, question: str) -> dict[str, tuple[list[str], dict[str, str]]]:
    return {
        one.name: (
            [each.contract.app for each in one.publishers],
            {each.subscriber.name: each.reads for each in one.handlers},
        )
        for one in who(bus, question)
    }


def test_an_event_that_several_apps_publish_has_the_handlers_of_all(bus: Catalog) -> None:
    """And not one whose source= is another app."""
    handlers = {"billing.invoice": "yes", "billing.audit": "any", "billing.count": "no"}
    found = answered(bus, "order.placed")
    assert found["order.placed"] == (["old", "shop"], handlers)


def test_a_name_can_be_an_event_and_a_field_of_another_event(bus: Catalog) -> None:
    assert list(answered(bus, "order.placed")) == ["order.placed", "order, field placed"]
    assert list(answered(bus, "order.cancelled")) == ["order.cancelled"]


def test_only_handlers_with_this_field_read_it(bus: Catalog) -> None:
    def readers(question: str) -> dict[str, str]:
        ((_, found),) = answered(bus, question).values()
        return found

    reads = {"billing.audit": "any", "billing.count": "no"}
    assert readers("order.placed.email") == {"billing.invoice": "no", **reads}
    assert readers("order.placed.lines") == {"billing.invoice": "yes", **reads}
    assert readers("order.placed.lines.article") == {"billing.invoice": "yes", **reads}
    assert readers("order.placed.lines.count") == {"billing.invoice": "no", **reads}


def test_a_field_that_only_a_handler_names_is_shown_without_publisher_types(bus: Catalog) -> None:
    (answer,) = who(bus, "order.placed.coupon")
    assert [one.field.known for one in answer.publishers if one.field] == ["no", "no"]
    assert [one.subscriber.name for one in answer.handlers if one.reads == "yes"] == ["billing.invoice"]


def test_a_dict_can_have_any_field(bus: Catalog) -> None:
    ((answer),) = who(bus, "order.cancelled.extra.colour")
    assert [one.field.known for one in answer.publishers if one.field] == ["open"]


def test_a_pattern_is_answered_for_each_event_that_it_matches(bus: Catalog) -> None:
    assert list(answered(bus, "order.*")) == ["order.cancelled", "order.placed"]
    assert list(answered(bus, "#.email")) == ["order.cancelled, field email", "order.placed, field email"]
    assert list(answered(bus, "order.*.email")) == list(answered(bus, "#.email"))


def test_an_event_of_a_foreign_program_is_known_by_its_handlers(bus: Catalog) -> None:
    assert answered(bus, "machine.started") == {"machine.started": ([], {"billing.machine": "any"})}


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("order.placd", "'order' has no field 'placd'. Did you mean 'order.placed'?"),
        ("order.placd.email", "There is no event 'order.placd.email'. Did you mean 'order.placed.email'?"),
        ("order.placed.emial", "'order.placed' has no field 'emial'. Did you mean 'order.placed.email'?"),
        ("order.placed.lines.artikel", "no field 'lines.artikel'. Did you mean 'order.placed.lines.article'?"),
        ("order.placed.xxxxxx", "'order.placed' has no field 'xxxxxx'. Its fields: lines, email."),
        ("ordr.placd", "There is no event 'ordr.placd'. Did you mean 'order.placed'?"),
        ("zzz", "There is no event 'zzz'. There are: machine.started, order, order.cancelled, order.placed."),
        ("user.*", "No event matches 'user.*'. There are: machine.started, order, order.cancelled, order.placed."),
    ],
)
def test_an_unknown_name_is_an_error_with_what_was_probably_meant(bus: Catalog, question: str, message: str) -> None:
    with pytest.raises(errors.CatalogError) as raised:
        who(bus, question)
    assert str(raised.value).endswith(message)


def test_without_contracts_nothing_is_known() -> None:
    with pytest.raises(errors.CatalogError, match="no app has published a contract"):
        who(catalog.of([]), "order.placed")


def test_notices_name_what_to_look_at(bus: Catalog) -> None:
    ignored = Ignored("mallory", 0.0, "it says that it is of shop.")
    found = notices(attrs.evolve(bus, ignored=[ignored]))
    assert [(one.kind, one.subject, one.detail, one.meant) for one in found] == [
        ("ignored", "mallory", "", None),
        ("unknown source", "billing.lost", "nobody", None),
        ("unmatched", "billing.machine", "machine.started", None),
        ("unconsumed", "order", "", None),
    ]
    assert [one.text for one in found] == [
        "A contract written by mallory is ignored: it says that it is of shop.",
        "billing.lost: no app 'nobody' (source=) is known. It has published no contract.",
        "billing.machine: the pattern 'machine.started' matches no event.",
        "order of shop: no handler gets it.",
    ]
