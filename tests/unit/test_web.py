"""The values that the pages show: texts, schemas as rows, the places of boxes on the map, forms."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import pytest
from starlette.datastructures import Headers
from starlette.types import Message

from lightbus import errors
from lightbus.catalog import storage
from lightbus.catalog.catalog import Catalog
from lightbus.catalog.contract import contract_of
from lightbus.catalog.live import Live
from lightbus.connection.declare import declare
from lightbus.connection.dial import BrokerAddresses
from lightbus.dead_letters import actions
from lightbus.dead_letters.actions import Outcome
from lightbus.dead_letters.letter import Filter
from lightbus.inspection.states import QueueState
from lightbus.transport import Publication
from lightbus.web import fields, letters, live, picture, text
from lightbus.web.security import BROWSER, Guard
from lightbus.web.source import Snapshot, Source
from tests.bus import connected, publish_confirmed
from tests.catalogs import apps, small
from tests.integration.test_dead import app_of, put_dead_letters
from tests.patience import LIMIT

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize(
    ("content", "shown", "kind"),
    [
        (b'{"a":9.50}', '{\n  "a": 9.50\n}', "JSON"),
        (b"plain", "plain", "text"),
        (b"\xff\x00", "\\xff\\x00", "bytes"),
        (b"", "", "text"),
        (b"x" * 50, "x" * 19 + "…", "text, cut"),
        ("é".encode() * 200 + b"\xff", "é" * 19 + "…", "text, cut"),
        (b"[" * 5000, "[" * 19 + "…", "text, cut"),
    ],
    ids=lambda one: repr(one)[:20],
)
def test_a_body_is_shown_as_what_it_is_and_cut(content: bytes, shown: str, kind: str) -> None:
    assert text.body(content, 20) == (shown, kind)


def test_a_body_in_the_stream_is_on_one_line() -> None:
    assert text.body(b'{"a":9.50,\n"b":[1,2]}', 100, indent=0) == ('{"a": 9.50, "b": [1, 2]}', "JSON")


def test_text_that_would_turn_or_hide_what_is_read_is_escaped() -> None:
    assert text.printable("a\u202eb\x1b[0m\udc80\tc\nd") == "a\\u202eb\\x1b[0m\\udc80\tc\nd"
    assert text.quoted("a/b ?\udc80") == "a%2Fb%20%3F%3F"


@pytest.mark.parametrize(
    ("seconds", "shown"), [(-5, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (400000, "5 d"), (None, "?")]
)
def test_an_age_has_one_unit(seconds: float | None, shown: str) -> None:
    assert text.age(seconds) == shown


def test_a_time_is_shown_in_utc_and_an_impossible_one_as_unknown() -> None:
    assert text.moment(datetime(2026, 11, 28, 12, tzinfo=UTC)) == "2026-11-28 12:00:00 UTC"
    assert [text.moment(one) for one in (1e300, 0, None, -1e300)] == ["unknown"] * 4
    assert text.ago(time.time() - 600) == "10 min ago"


# --- schemas


def test_a_schema_becomes_rows_with_the_fields_of_its_objects() -> None:
    contract = small().contract("shop")
    assert contract is not None
    placed = next(one for one in contract.events if one.name == "order.placed")
    found = {one.path: one for one in fields.rows(placed.schema)}
    assert found["lines"].type == "array of Line"
    assert (found["lines.article"].level, found["lines.article"].type) == (1, "string")
    assert {"payment.iban", "payment.number", "comments.answers"} <= set(found)
    assert "comments.answers.text" not in found  # a comment holds comments: their fields are shown once
    assert found["status"].default == "'new'"


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#/$defs/A", "$defs": {"A": {"$ref": "#/$defs/A"}}},
        {"$ref": "#/$defs/A", "$defs": {"A": {"anyOf": [{"$ref": "#/$defs/A"}] * 500}}},
        {"properties": {"a": True, "c": {"properties": {"d": False}}}},
        {"properties": {f"f{number}": {"properties": {"x": {}}} for number in range(5000)}},
        {"$ref": "#/$defs/A", "items": True},
    ],
)
def test_a_hostile_schema_has_bounded_rows(schema: dict[str, Any]) -> None:
    assert len(fields.rows(schema)) <= fields.MOST_ROWS


# --- the map


def snapshot(**consumers: int) -> Snapshot:
    catalog = small()
    states = {f"{app}.main": QueueState(f"{app}.main", True, 0, count) for app, count in consumers.items()}
    return Snapshot(catalog, Live(states, len(states)), "", 1.0, 0.0)


def test_the_map_has_each_app_and_event_and_a_line_for_each_handler() -> None:
    one = snapshot(billing=0, audit=2)
    found = picture.draw(one, list(one.catalog.events()), "order.placed")
    assert [(each.kind, each.label) for each in found.nodes] == [
        ("app down", "billing"),
        ("app", "shop"),
        ("event", "invoice.paid"),
        ("event alone", "order.cancelled"),
        ("event", "order.placed"),
        ("app", "audit"),
        ("app down", "billing"),
    ]
    assert [each.label for each in found.nodes if each.focus] == ["order.placed"]
    lines = {(each.source, each.target) for each in found.edges}
    assert ("/events/order.placed", "/apps/billing") in lines
    assert ("/events/invoice.paid", "/apps/audit") in lines
    assert [each.target for each in found.edges if each.down] == ["/apps/billing"]
    assert all(each.x + each.width <= found.width and each.y + each.height <= found.height for each in found.nodes)


def test_boxes_beside_each_other_are_on_one_line() -> None:
    one = snapshot()
    event, app = picture.draw(one, [one.catalog.publishers("invoice.paid")[0]]).nodes[1:]
    assert (event.label, app.label) == ("invoice.paid", "audit")
    assert event.middle == app.middle


def test_the_map_of_nothing_is_empty() -> None:
    nothing = Snapshot(Catalog(0.0, []), None, "", 0.0, 0.0)
    assert picture.draw(nothing, []).nodes == []


# --- the guard


def headers(**given: str) -> Headers:
    return Headers({name.replace("_", "-"): value for name, value in given.items()})


def test_a_form_belongs_to_one_browser_and_one_server() -> None:
    guard, other = (Guard(None, frozenset(), True) for _ in range(2))
    sent = headers(cookie=f"{BROWSER}=abc", origin="http://localhost:1", host="localhost:1")
    assert guard.allows_form(sent, guard.form_token("abc"))
    assert not guard.allows_form(sent, guard.form_token("abd"))
    assert not guard.allows_form(sent, other.form_token("abc"))
    assert not guard.allows_form(headers(origin="http://localhost:1", host="localhost:1"), guard.form_token(""))


def test_a_session_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = Guard("t" * 16, frozenset(), False)
    session = guard.session()
    assert guard.is_session(session)
    later = time.time() + 13 * 3600
    monkeypatch.setattr(time, "time", lambda: later)
    assert not guard.is_session(session)


def test_a_server_for_other_machines_answers_to_addresses_and_given_names_only() -> None:
    guard = Guard("t" * 16, frozenset({"bus.example"}), False)
    assert all(guard.allows_host(one) for one in ("10.0.0.7:8765", "[fe80::1]", "bus.example:80", "localhost"))
    assert not any(guard.allows_host(one) for one in ("evil.example", "", "bus.example.evil", "[", "10.0.0.7.evil"))


# --- the source


def test_an_answer_is_kept_for_a_moment_and_the_last_one_is_kept_while_the_broker_is_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightbus.web.source.FRESH", LIMIT)
    url = f"sqlite:///{tmp_path}/bus.db"
    shop = apps(url)[0]
    storage.publish(shop.broker, contract_of(shop, "1"))
    source = Source(shop.broker)
    first = source.snapshot()
    assert [one.app for one in first.catalog.contracts] == ["shop"]
    storage.publish(shop.broker, contract_of(shop, "2"))
    assert source.snapshot() is first
    source.expire()
    assert source.snapshot().catalog.contracts[0].release == "2"

    def is_down(*_: object) -> None:
        raise errors.BrokerUnreachable("The broker is down.")

    monkeypatch.setattr(storage, "read", is_down)
    source.expire()
    last = source.snapshot()
    assert (last.problem, last.catalog.contracts[0].release) == ("The broker is down.", "2")
    assert 0 < last.at <= time.time()


# --- dead letters


def test_an_action_that_loses_the_broker_halfway_reports_what_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path}/bus.db"
    put_dead_letters(url, 3)
    source = Source(BrokerAddresses.parse(url))
    digests = [one.digest for one in letters.listed(source, "billing", Filter()).found]

    def purge(_queue: Any, _wanted: Any, outcome: Outcome, **_: Any) -> None:
        outcome.matched, outcome.done = 2, 1
        raise errors.BrokerUnreachable("The broker is gone.")

    with monkeypatch.context() as patched:
        patched.setattr(actions, "purge", purge)
        outcome = letters.act(source, "billing", "purge", digests, trust_origin=False)
    assert (outcome.done, outcome.problem, outcome.vanished) == (1, "The broker is gone.", 1)

    outcome = letters.act(source, "billing", "retry", digests[1:], trust_origin=False)
    assert (outcome.done, outcome.problem, outcome.vanished) == (2, "", 0)
    assert [one.digest for one in letters.listed(source, "billing", Filter()).found] == digests[:1]


def test_of_dead_letters_that_are_the_same_only_as_many_as_selected_are_deleted(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/bus.db"
    bodies = (b"{}", b"{}", b'{"b":1}')
    with connected(url) as connection:
        declare(connection, app_of(url).topology())
        publish_confirmed(connection, *(Publication("billing.internal", "dead", body, {}) for body in bodies))
    source = Source(BrokerAddresses.parse(url))
    first, twin, other = (one.digest for one in letters.listed(source, "billing", Filter()).found)
    assert first == twin
    assert len(letters.selected(source, "billing", [first, twin])) == 2
    outcome = letters.act(source, "billing", "purge", [first, other], trust_origin=False)
    assert (outcome.done, outcome.vanished) == (2, 0)
    assert [one.delivery.body for one in letters.listed(source, "billing", Filter()).found] == [b"{}"]


async def test_a_stream_ends_if_nobody_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "PATIENCE", 0.05)
    ended = []

    async def parts() -> AsyncIterator[str]:
        try:
            while True:
                yield "data: 1\n\n"
        finally:
            ended.append(True)

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            await anyio.sleep_forever()

    async def receive() -> Message:
        await anyio.sleep_forever()
        raise AssertionError

    with anyio.fail_after(LIMIT):
        await live.EventStream(parts())({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send)
    assert ended
