"""What other programs write, in contracts and in dead letters, is shown as text: nothing of it runs or hides."""

from __future__ import annotations

import json
import time
from pathlib import Path

import attrs
import pytest

from lightbus.catalog import catalog
from lightbus.catalog.catalog import Ignored
from lightbus.catalog.contract import Contract, Listener, PublishedEvent
from lightbus.connection.declare import declare
from lightbus.transport import Publication
from lightbus.wire import codec
from tests.browser import Browser
from tests.bus import connected, publish_confirmed
from tests.integration.test_dead import app_of, put_dead_letters
from tests.odd import ODD_PROPERTIES, odd_properties, publish_raw
from tests.web.conftest import Faults, ask, serving

SCRIPT = "<script>window.hacked = 1</script>"
IMAGE = '"><img src=x onerror="window.hacked = 1">'
TURNED = "\u202egnp.exe\u202c"
HOSTILE = f"{SCRIPT}{IMAGE}'{{{{ 7*7 }}}}{TURNED}"


def hostile() -> catalog.Catalog:
    schema = {
        "$ref": "#/$defs/A",
        "$defs": {
            "A": {
                "type": "object",
                "properties": {HOSTILE: {"description": HOSTILE, "default": HOSTILE, "anyOf": [{"$ref": "#/$defs/A"}]}},
            }
        },
    }
    event = PublishedEvent(f"order.{SCRIPT}"[:60], 1, HOSTILE * 1000, schema)
    listener = Listener(HOSTILE, [event.name, "#"], HOSTILE, f"shop.{IMAGE}", HOSTILE, schema)
    contracts = [
        Contract("shop", HOSTILE, time.time(), HOSTILE, [event], [listener, attrs.evolve(listener, source=None)]),
        Contract("far", "", 1e300, "", [], [attrs.evolve(listener, handler="a" * 10_000, source=None)] * 300),
    ]
    return catalog.of(contracts, [Ignored(HOSTILE, 0.0, HOSTILE)])


def is_harmless(chromium: Browser) -> bool:
    return bool(chromium.evaluate("!window.hacked && !document.querySelector('main img, main script')"))


def test_a_hostile_contract_is_shown_as_text(tmp_path: Path, chromium: Browser, faults: Faults) -> None:
    (tmp_path / "catalog.json").write_text(json.dumps(catalog.to_json(hostile())))
    with serving("--from", "catalog.json", folder=tmp_path) as address:
        links = {"/", "/apps", "/events", "/health", "/apps/shop", "/apps/far", f"/?q={SCRIPT}", f"/events?app={IMAGE}"}
        chromium.visit(address)
        links |= set(
            chromium.evaluate("[...document.querySelectorAll('main a')].map((one) => one.getAttribute('href'))")
        )
        assert len(links) > 8
        chromium.resize(390)
        for link in sorted(links):
            chromium.visit(address + link)
            assert is_harmless(chromium), link
            assert TURNED not in chromium.text(), link
            assert "49" not in chromium.evaluate("document.querySelector('h1').innerText")
            assert chromium.evaluate("document.documentElement.scrollWidth <= innerWidth"), link
        chromium.visit(f"{address}/apps/shop")
        assert SCRIPT in chromium.text()
        assert "\\u202egnp.exe" in chromium.text()


def hostile_letters(url: str) -> None:
    """A dead letter whose every part is hostile, and one with a large body."""
    app = app_of(url)
    headers = {
        codec.ERROR_TYPE: IMAGE,
        codec.ERROR_MESSAGE: HOSTILE * 200,
        codec.ERROR_TRACEBACK: HOSTILE * 2000,
        codec.ERROR_TIME: "never",
        codec.QUEUE: IMAGE,
        "lightbus-handler": SCRIPT,
        SCRIPT[:30]: IMAGE,
    }
    properties = {"message_id": IMAGE, "headers": headers, "correlation_id": SCRIPT, "content_type": SCRIPT}
    with connected(url) as connection:
        declare(connection, app.topology())
        publish_confirmed(
            connection,
            Publication("billing.internal", "dead", json.dumps({"a": SCRIPT, "b": TURNED}).encode(), properties),
            Publication("billing.internal", "dead", b"\xff<script>" * 200_000, {}),
            Publication("billing.internal", "dead", b"[" * 100_000, {"headers": {codec.ERROR_MESSAGE: "\n\n"}}),
        )


def test_a_hostile_dead_letter_is_shown_as_text_and_cut(tmp_path: Path, chromium: Browser) -> None:
    url = f"sqlite:///{tmp_path}/bus.db"
    hostile_letters(url)
    with serving(folder=tmp_path, url=url) as address:
        chromium.visit(f"{address}/dead/billing")
        assert is_harmless(chromium)
        links = chromium.evaluate("[...document.querySelectorAll('tbody th a')].map((one) => one.getAttribute('href'))")
        assert len(links) == 3
        for link in links:
            page = ask(address + link)
            assert page.status == 200, page.text
            assert len(page.text) < 200_000
            chromium.visit(address + link)
            assert is_harmless(chromium), link
        assert SCRIPT in ask(address + links[0]).text.replace("&lt;", "<").replace("&gt;", ">")


@pytest.mark.rabbitmq
def test_dead_letters_with_odd_properties_are_shown_and_not_retried_by_mistake(
    tmp_path: Path, rabbitmq_url: str, chromium: Browser
) -> None:
    with connected(rabbitmq_url) as connection:
        declare(connection, app_of(rabbitmq_url).topology())
    for name in ODD_PROPERTIES:
        publish_raw(rabbitmq_url, b"billing.dead", odd_properties(name, name.encode()), b"{}", exchange=b"")
    with serving("--allow-actions", folder=tmp_path, url=rabbitmq_url) as address:
        chromium.visit(f"{address}/dead/billing")
        links = chromium.evaluate("[...document.querySelectorAll('tbody th a')].map((one) => one.getAttribute('href'))")
        assert len(links) == len(ODD_PROPERTIES)
        for link in links:
            assert ask(address + link).status == 200
        chromium.evaluate("document.querySelectorAll('input[name=letter]').forEach((one) => one.click())")
        chromium.click("Retry selected …")
        chromium.click("Retry now")
        assert f"0 of {len(ODD_PROPERTIES)} retried." in chromium.text()
        assert "skipped: the queue billing no longer exists" in chromium.text()


def test_an_app_without_a_contract_has_its_dead_letters_shown(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/bus.db"
    put_dead_letters(url, 120)
    with serving(folder=tmp_path, url=url) as address:
        assert ask(f"{address}/dead?app=billing").headers["location"] == "/dead/billing"
        page = ask(f"{address}/dead/billing").text
        assert "50 shown of 120 dead letters; 70 were not read" in page
        assert "1 shown of 120" not in page
        assert "no invoice 3" in page
        assert "No dead letter matches." in ask(f"{address}/dead/billing?error=KeyError").text
        assert "There is no queue audit.dead" in ask(f"{address}/dead/audit").text
        assert ask(f"{address}/dead/Not%20an%20app").status == 404
