"""The formats of `lightbus catalog`, drawn from values: no broker."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import attrs
import jsonschema
import msgspec
import pytest

from lightbus.catalog import asyncapi, catalog
from lightbus.catalog.catalog import Catalog, Ignored
from lightbus.catalog.contract import PublishedEvent
from lightbus.catalog.live import Live
from lightbus.cli.catalog import described, flowchart, overview, page, picture
from lightbus.cli.catalog.reading import Reading
from lightbus.inspection.states import QueueState
from lightbus.wire import codec
from tests import browser as browsers
from tests.browser import Browser
from tests.catalogs import Card, Cheque, Comment, Line, Paid, Placed, apps, large, small

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "<script>alert(1)</script>\x1b[31m\"'&]]>"


def read(found: Catalog, *queues: QueueState, asked: int = 5) -> Reading:
    return Reading(found, Live({one.name: one for one in queues}, asked) if queues else None, "in catalog.json")


def with_live() -> Reading:
    return read(
        small(),
        QueueState("audit.main", True, 3, 2),
        QueueState("audit.dead", True, 1, 0),
        QueueState("billing.main", True, 7, 0),
        QueueState("billing.slow", False),
    )


def hostile() -> Catalog:
    """Another app can write any text into its contract."""
    shop, billing = small().contracts[2], small().contracts[1]
    event = PublishedEvent(HOSTILE, 1, HOSTILE, {"properties": {HOSTILE: {"type": HOSTILE}}})
    handlers = [attrs.evolve(billing.handlers[0], handler=HOSTILE, patterns=["#"], source=HOSTILE, doc=HOSTILE)]
    contracts = [attrs.evolve(shop, events=[event], release=HOSTILE), attrs.evolve(billing, handlers=handlers)]
    return catalog.of(contracts, [Ignored(HOSTILE, 0.0, HOSTILE)])


# --- tables and JSON --------------------------------------------------------------------------


def test_the_tables_show_what_runs_what_waits_and_what_is_unknown() -> None:
    text = "\n".join(overview.lines(with_live()))
    assert (
        re.sub(r"\d+s ago", "0s ago", text)
        == """\
3 apps, 3 events, in catalog.json

APP      RELEASE  EVENTS  HANDLERS  CONSUMERS  WAITING  DEAD LETTERS  CONTRACT
audit    7             0         1          2        3             1  0s ago
billing  -             1         3          0        7             ?  0s ago
shop     2026.11       2         0          -        -             -  0s ago

EVENT            VERSION  PUBLISHED BY  HANDLED BY
invoice.paid           1  billing       audit.note
order.cancelled        1  shop          -
order.placed           2  shop          audit.note, billing.invoice (no consumer)

To look at:
  A contract written by mallory is ignored: it says that it is of 'shop'. Check who uses this user.
  billing.unknown: no app 'shopp' (source=) is known. Did you mean 'shop'?
  billing.misspelt: the pattern 'order.paced' matches no event. Did you mean 'order.placed'?
  order.cancelled of shop: no handler gets it.

?: the state of 1 of 5 queues is unknown, because there was no answer within 5 s, or this broker user may not see it."""
    )


def test_a_bus_without_contracts_is_shown_as_such() -> None:
    assert overview.lines(read(catalog.of([]))) == [
        "0 apps, 0 events, in catalog.json. No app has published a contract."
    ]


def test_the_json_is_a_snapshot_too(tmp_path: Path) -> None:
    reading = with_live()
    found = described.described(reading)
    file = tmp_path / "catalog.json"
    file.write_text(json.dumps(found))
    assert catalog.from_file(file) == reading.catalog
    assert found["apps"][:2] == [
        {"app": "audit", "release": "7", "consumers": 2, "waiting": 3, "dead_letters": 1},
        {"app": "billing", "release": "", "consumers": 0, "waiting": 7, "dead_letters": None},
    ]
    assert [(one["event"], one["app"], one["handlers"]) for one in found["events"]] == [
        ("invoice.paid", "billing", ["audit.note"]),
        ("order.cancelled", "shop", []),
        ("order.placed", "shop", ["audit.note", "billing.invoice"]),
    ]
    assert [one["kind"] for one in found["notices"]] == ["ignored", "unknown source", "unmatched", "unconsumed"]


def test_a_contract_cannot_control_the_terminal_or_write_markup() -> None:
    tables = "\n".join(overview.lines(read(hostile())))
    drawn = [flowchart.flowchart(read(hostile())), picture.draw(read(hostile()))]
    for text in (tables, *drawn):
        assert "\x1b" not in text
        assert "\\x1b[31m" in text
    assert not any("<script" in text for text in drawn)


# --- pictures ---------------------------------------------------------------------------------


def test_the_flowchart_leads_from_apps_over_events_to_apps() -> None:
    assert (
        flowchart.flowchart(with_live())
        == """\
flowchart LR
  app0["audit"]
  app1["billing"]
  app2["shop"]
  event0(["invoice.paid"])
  app1 --> event0
  event0 --> app0
  event1(["order.cancelled"])
  app2 --> event1
  event2(["order.placed"])
  app2 --> event2
  event2 --> app0
  event2 -.-> app1"""
    )


def boxes(svg: str) -> Iterator[tuple[str, float, float, float, float]]:
    """The kind, and the left, top, right and bottom of each."""
    for one in ElementTree.fromstring(svg).iter(f"{SVG}rect"):
        if one.get("class") != "back":
            x, y, width, height = (float(one.get(name, 0)) for name in ("x", "y", "width", "height"))
            yield one.get("class", ""), x, y, x + width, y + height


def texts(svg: str) -> list[str]:
    return [one.text or "" for one in ElementTree.fromstring(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize("bus", [small(), large(30), hostile(), catalog.of([])])
def test_nothing_overlaps_in_the_picture(bus: Catalog) -> None:
    svg = picture.draw(read(bus))
    drawn = list(boxes(svg))
    for number, (_, left, top, right, bottom) in enumerate(drawn):
        for _, other_left, other_top, other_right, other_bottom in drawn[number + 1 :]:
            assert right <= other_left or other_right <= left or bottom <= other_top or other_bottom <= top
    root = ElementTree.fromstring(svg)
    width, height = (float(root.get(name, 0)) for name in ("width", "height"))
    assert all(right <= width and bottom <= height for _, _, _, right, bottom in drawn)


def test_the_picture_shows_all_apps_and_events_and_marks_those_without_a_consumer_or_handler() -> None:
    svg = picture.draw(with_live())
    assert {"billing", "shop", "audit", "invoice.paid", "order.placed", "order.cancelled", "no handler"} <= {
        *texts(svg)
    }
    kinds = [kind for kind, _, _, _, bottom in boxes(svg)]
    assert (kinds.count("app down"), kinds.count("event unconsumed")) == (2, 2)  # one each in the legend
    assert "Without events of their own: audit" in texts(svg)
    assert "billing.invoice (no consumer)" in svg


def test_many_handlers_of_one_event_are_on_several_lines() -> None:
    bus = large(30)
    shop = attrs.evolve(bus.contracts[0], events=[PublishedEvent("thing", 1, "", {})])
    listener = attrs.evolve(bus.contracts[0].handlers[0], patterns=["thing"])
    every = [attrs.evolve(one, events=[], handlers=[listener]) for one in bus.contracts[1:]]
    svg = picture.draw(read(catalog.of([shop, *every])))
    rows = {top for kind, _, top, _, _ in boxes(svg) if kind == "app"}
    assert len(rows) > 3
    assert float(ElementTree.fromstring(svg).get("width", 0)) < 1200


# --- the page ---------------------------------------------------------------------------------


def test_the_page_needs_nothing_from_elsewhere_and_runs_no_script() -> None:
    text = page.page(read(hostile()))
    assert "<script" not in text
    assert "\x1b" not in text
    assert "&lt;script&gt;" in text
    assert "default-src 'none'" in text
    assert re.findall(r"""(?:src|href|url\()=?["']?[^\s>]*""", re.sub(r"<meta[^>]*>", "", text)) == []


def test_the_page_has_the_tables_the_notices_and_the_picture() -> None:
    text = page.page(with_live())
    for wanted in (
        "audit.note, billing.invoice (no consumer)",
        "Dead letters",
        "order.paced",
        "<svg",
        "unknown, because",
    ):
        assert wanted in text


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = browsers.find()
    if program is None:
        pytest.skip(browsers.INSTALL)
    with browsers.start(program, tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_a_phone_and_is_readable_in_both_schemes(
    browser: Browser, tmp_path: Path, scheme: str, width: int
) -> None:
    file = tmp_path / "catalog.html"
    file.write_text(page.page(attrs.evolve(with_live(), catalog=large(30))))
    browser.prefer(scheme)
    browser.resize(width)
    browser.open(file)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    for selector in ("td", "th", "p.summary", "svg text.faint", "svg text.name"):
        assert browser.evaluate(CONTRAST.replace("SELECTOR", selector)) >= 4.5, selector  # WCAG 2.2 AA


CONTRAST = """(() => {
  const luminance = (color) => {
    const [r, g, b] = color.match(/[0-9.]+/g).slice(0, 3).map((one) => one / 255)
      .map((one) => (one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = document.querySelector("SELECTOR");
  const style = getComputedStyle(found);
  const back = found.closest("svg") ? getComputedStyle(document.querySelector("svg rect.back")).fill
    : getComputedStyle(document.body).backgroundColor;
  const ink = found.closest("svg") ? style.fill : style.color;
  const [low, high] = [luminance(ink), luminance(back)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
})()"""


# --- AsyncAPI ---------------------------------------------------------------------------------
# tests/integrations/test_asyncapi.py has the official parser.


def accepts(component: str, body: Any) -> bool:
    """Whether a component's schema, which must be in the dialect of draft 07, accepts a body."""
    schema = {**asyncapi.document(small()), "$ref": f"#/components/schemas/{component}"}
    validator = jsonschema.Draft7Validator(schema)
    validator.check_schema(schema)
    return validator.is_valid(msgspec.json.decode(msgspec.json.encode(body)))


def test_the_schemas_accept_the_events_and_refuse_others() -> None:
    placed = Placed([Line("a", Decimal("9.50"))], "a@example.com", Card("1"), [Comment("x", [Comment("y")])], "paid")
    assert accepts("shop.order.placed", placed)
    body = msgspec.to_builtins(placed)
    assert not accepts("shop.order.placed", body | {"status": "lost"})
    assert not accepts("shop.order.placed", body | {"comments": [{"text": "x", "answers": [{}]}]})
    assert not accepts("shop.order.placed", body | {"payment": {"type": "transfer", "iban": "1", "parts": ["a", 1]}})
    assert accepts("shop.order.placed", body | {"payment": {"type": "transfer", "iban": "1", "parts": [1, "a"]}})
    paid = Paid(amount=Decimal("9.50"), how=Cheque(bank="b"))
    assert accepts("billing.invoice.paid", json.loads(paid.model_dump_json()))
    assert not accepts("billing.invoice.paid", {"amount": "1", "how": {"kind": "gold"}})


def test_channels_name_the_exchange_and_operations_the_apps() -> None:
    found = asyncapi.document(small())
    assert found["channels"]["shop.order.placed"]["bindings"]["amqp"]["exchange"]["name"] == "shop"
    receive = found["operations"]["receive.billing.shop.order.placed"]
    assert receive["x-lightbus-handlers"] == [
        {"name": "invoice", "queue": "billing.main", "patterns": ["order.placed"]}
    ]
    assert receive["description"] == "Send an invoice."
    assert "receive.billing.shop.order.cancelled" not in found["operations"]


def test_the_headers_describe_those_of_a_published_event() -> None:
    app = apps()[0]
    properties = codec.event_properties("shop", app.events["order.placed"], None)
    assert accepts("envelope", properties["headers"])
    assert not accepts("envelope", {codec.VERSION: "one"})
    described = asyncapi.document(small())["components"]["schemas"]["envelope"]
    assert {*properties["headers"], codec.CAUSATION} == {*described["properties"]}
    for name in properties.keys() - {"headers"}:
        assert f"`{name}`" in described["description"]


def test_no_part_is_left_that_draft_07_does_not_know() -> None:
    text = json.dumps(asyncapi.document(small()))
    for keyword in ('"$defs"', '"prefixItems"', '"$schema"', "#/$defs/"):
        assert keyword not in text
