"""200 apps and 2,000 events: each page comes within a second, and the map stays legible."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from lightbus.catalog import catalog
from lightbus.catalog.contract import PublishedEvent
from tests.browser import Browser
from tests.catalogs import large
from tests.patience import sometimes_within
from tests.web.conftest import Faults, ask, serving

APPS, EVENTS = 200, 10


def very_large() -> catalog.Catalog:
    """As `large`, with ten events of each app."""
    found = []
    for contract in large(APPS).contracts:
        number, schema = contract.app.removeprefix("service-"), contract.events[0].schema
        kinds = [f"kind{kind}" for kind in range(EVENTS - len(contract.events))]
        more = [PublishedEvent(f"thing{number}.{kind}", 1, "", schema) for kind in kinds]
        found.append(attrs.evolve(contract, events=[*contract.events, *more]))
    return catalog.of(found)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("large")
    (folder / "catalog.json").write_text(json.dumps(catalog.to_json(very_large())))
    with serving("--from", "catalog.json", folder=folder) as one:
        yield one


@pytest.mark.parametrize("path", ["/", "/?app=service-3", "/?q=thing1", "/apps", "/events?page=40", "/health"])
def test_a_page_of_a_large_bus_comes_within_a_second(address: str, path: str) -> None:
    def seconds() -> float:
        began = time.monotonic()
        assert ask(address + path).status == 200
        return time.monotonic() - began

    sometimes_within(1.0, seconds)


def test_a_large_map_is_found_by_app_and_by_search(address: str, chromium: Browser, faults: Faults) -> None:
    chromium.resize(1280)
    chromium.visit(address)
    assert "200 apps, 2,000 events" in chromium.text()
    assert chromium.evaluate("document.querySelectorAll('ul.tiles li').length") == APPS
    assert chromium.evaluate("document.querySelector('svg.map')") is None
    assert faults(chromium) == []

    chromium.click("service-3", ".tiles")
    names = "[...document.querySelectorAll('svg.map a.%s text')].map((one) => one.textContent)"
    # It publishes ten events, and handles all ten of service-4 and one of each of three others.
    assert len(chromium.evaluate(names % "event")) == 23
    assert {"service-3", "service-4", "service-2"} <= set(chromium.evaluate(names % "app"))
    assert faults(chromium) == []

    # With the keyboard: one stop for the map, which scrolls, and then its boxes, whose lines are marked.
    chromium.evaluate("document.querySelector('.wide').focus()")
    chromium.press_tab()
    assert chromium.evaluate("document.activeElement.getAttribute('href')") == "/apps/service-21"
    assert chromium.evaluate("document.querySelectorAll('.edge.lit').length") == 1

    chromium.evaluate("document.getElementById('q').value = 'thing150.'")
    chromium.evaluate("document.getElementById('app').value = ''")
    chromium.click("Show", "form")
    assert len(chromium.evaluate(names % "event")) == EVENTS
    overlapping = """(() => {
      const boxes = [...document.querySelectorAll('svg.map rect')].map((one) => one.getBoundingClientRect());
      return boxes.filter((a, at) => boxes.slice(at + 1).some((b) =>
        a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom)).length;
    })()"""
    assert chromium.evaluate(overlapping) == 0
    too_long = """[...document.querySelectorAll('svg.map a')].filter((one) =>
      one.querySelector('text').getBBox().width > one.querySelector('rect').getBBox().width - 20).length"""
    assert chromium.evaluate(too_long) == 0


def test_a_search_that_fits_too_much_draws_the_first_events(address: str) -> None:
    page = ask(f"{address}/?q=thing").text
    assert "2,000 events match. The map shows the first 60: add a word to the search." in page
    assert page.count('class="node event') == 60


def test_the_pages_of_errors_and_of_the_login_are_accessible(
    address: str, tmp_path: Path, chromium: Browser, faults: Faults
) -> None:
    chromium.visit(f"{address}/nothing")
    assert "There is no such page." in chromium.text()
    assert faults(chromium) == []
    chromium.visit(f"{address}/apps/service-2000")
    assert "Did you mean 'service-200'?" in chromium.text() or "Did you mean 'service-20'?" in chromium.text()
    with serving(folder=tmp_path, LIGHTBUS_WEB_TOKEN="a token of sixteen") as guarded:
        chromium.visit(guarded)
        assert "Log in" in chromium.text()
        assert faults(chromium) == []
        chromium.evaluate("document.getElementById('token').value = 'a token of sixteen'")
        chromium.click("Log in", "main")
        assert "Map of the bus" in chromium.text()
