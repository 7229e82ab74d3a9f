"""A person with a browser, a broker and a worker: each page, and a dead letter that is retried until it is handled."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest

from tests.browser import Browser
from tests.patience import wait_until
from tests.processes import Program, lightbus, working
from tests.web.conftest import Faults, serving

SHOP = """\
import attrs
from lightbus import Lightbus

app = Lightbus("shop")

@app.event("order.placed", version=2)
@attrs.frozen
class OrderPlaced:
    "A customer has placed an order."
    number: int
    note: str = ""

@app.event("order.cancelled")
@attrs.frozen
class OrderCancelled:
    number: int
"""

BILLING = """\
import os
import attrs
from lightbus import Lightbus, Retry

app = Lightbus("billing", retry=Retry(delays=()))

@attrs.frozen
class Order:
    number: int

@app.on("order.placed", source="shop")
def charge(order: Order):
    "Charge the card."
    if not os.path.exists("fixed"):
        raise LookupError(f"no card for order {order.number}")
    print(f"charged {order.number}", flush=True)
"""


@attrs.frozen
class Bus:
    """Two apps on a broker; billing has two dead letters."""

    address: str
    folder: Path
    url: str
    worker: Program

    def publish(self, number: int, note: str = "") -> None:
        body = f'{{"number": {number}, "note": "{note}"}}'
        done = lightbus("publish", "shop:app", "order.placed", body, folder=self.folder, url=self.url)
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module", params=["sqlite", pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)])
def bus(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bus]:
    folder = tmp_path_factory.mktemp("bus")
    (folder / "shop.py").write_text(SHOP)
    (folder / "billing.py").write_text(BILLING)
    url = f"sqlite:///{folder}/bus.db"
    if request.param == "rabbitmq":
        node = request.getfixturevalue("rabbitmq")
        node.add_vhosts(["web"])
        url = node.vhost_url("web")
    with contextlib.ExitStack() as stack:
        worker = stack.enter_context(working("billing:app", folder=folder, url=url))
        done = lightbus(
            "contract", "publish", "shop:app", folder=folder, url=url, extra={"LIGHTBUS_RELEASE": "2026.11"}
        )
        assert done.returncode == 0, done.stderr
        address = stack.enter_context(serving("--allow-actions", folder=folder, url=url))
        found = Bus(address, folder, url, worker)
        for number in (1, 2):
            found.publish(number)
            worker.wait_for("LookupError")
        yield found


Accessible = Callable[[Bus], bool]


@pytest.fixture
def accessible(chromium: Browser, faults: Faults) -> Accessible:
    """Fails if the page has faults. On one broker only: the pages are the same."""

    def check(bus: Bus) -> bool:
        if bus.url.startswith("sqlite"):
            assert faults(chromium) == []
        return True

    return check


def shown(chromium: Browser, text: str) -> None:
    """Open the page again until it shows this: states are up to 3 seconds old."""

    def is_shown() -> bool:
        chromium.visit(chromium.evaluate("location.href"))
        return text in chromium.text()

    wait_until(is_shown, text)


@pytest.mark.parametrize("path", ["/events/order.placed", "/apps/billing"])
def test_names_in_tables_stay_in_one_piece_on_a_phone(bus: Bus, chromium: Browser, path: str) -> None:
    chromium.resize(320)
    chromium.visit(bus.address + path)
    lines = "[...document.querySelectorAll(':is(th, td) code')].map((one) => one.getClientRects().length)"
    assert {*chromium.evaluate(lines)} == {1}
    assert chromium.evaluate("document.documentElement.scrollWidth") <= 320


def test_each_page_shows_the_bus(bus: Bus, chromium: Browser, accessible: Accessible) -> None:
    chromium.resize(1280)
    chromium.visit(bus.address)
    shown(chromium, "order.placed")
    assert accessible(bus)
    assert chromium.evaluate("[...document.querySelectorAll('svg.map a')].map((one) => one.textContent.trim()).sort()")

    chromium.click("order.placed", "table")
    for text in ("A customer has placed an order.", "Version 2", "release 2026.11", "billing.charge", "1 consumer"):
        assert text in chromium.text()
    assert "note" in chromium.evaluate("document.querySelector('table').innerText")
    assert accessible(bus)

    chromium.click("billing", "table")
    shown(chromium, "1 consumer")
    for text in ("Charge the card.", "billing.main", "billing.dead", "order.placed from shop"):
        assert text in chromium.text()
    assert accessible(bus)

    for page, text in (
        ("Apps", "2026.11"),
        ("Events", "order.cancelled"),
        ("Health", "1 of 1 app with handlers"),
        ("Dead letters", "billing"),
        ("Live events", "Body contains"),
    ):
        chromium.click(page, "header")
        assert text in chromium.text()
        assert accessible(bus)


def test_a_dead_letter_is_retried_until_it_is_handled_and_another_is_purged(
    bus: Bus, chromium: Browser, accessible: Accessible
) -> None:
    chromium.visit(f"{bus.address}/dead/billing")
    shown(chromium, "2 shown of 2 dead letters")
    assert accessible(bus)
    row = next(n for n in (1, 2) if "order 1" in chromium.evaluate(f"document.querySelectorAll('tr')[{n}].innerText"))
    chromium.evaluate(f"document.querySelectorAll('tbody tr')[{row - 1}].querySelector('a').id = 'first'")
    chromium.click(
        chromium.evaluate("document.getElementById('first').textContent.trim()"), f"tbody tr:nth-child({row})"
    )
    for text in ("no card for order 1", "Traceback", '"number": 1', "LookupError"):
        assert text in chromium.text()
    assert accessible(bus)

    (bus.folder / "fixed").touch()
    chromium.click("Retry …")
    assert "Retry 1 dead letter of billing?" in chromium.text()
    assert accessible(bus)
    chromium.click("Retry now")
    assert "1 of 1 retried." in chromium.text()
    assert accessible(bus)
    bus.worker.wait_for("charged 1")

    chromium.click("Back to the dead letters")
    assert "1 shown of 1 dead letter" in chromium.text()
    chromium.evaluate("document.querySelector('input[name=letter]').click()")
    chromium.click("Purge selected …")
    assert "They are deleted permanently." in chromium.text()
    chromium.click("Purge permanently")
    assert "1 of 1 purged." in chromium.text()
    chromium.click("Back to the dead letters")
    assert "No dead letters." in chromium.text()


def test_live_events_arrive_and_others_are_held_back(bus: Bus, chromium: Browser, accessible: Accessible) -> None:
    chromium.visit(f"{bus.address}/tail?pattern=order.*&contains=gift")
    wait_until(lambda: "Listening." in chromium.text(), "the stream is open")
    note = "plain"

    def arrives() -> bool:
        nonlocal note
        bus.publish(7, note)
        note = "gift <b>wrapped</b>"  # until the queue of the page is bound, events are missed
        return "gift <b>wrapped</b>" in chromium.text()

    wait_until(arrives, "an event on the page")
    assert "plain" not in chromium.text()
    assert chromium.evaluate("document.querySelectorAll('#tail b').length") == 0
    assert accessible(bus)


@pytest.mark.parametrize("bus", ["sqlite"], indirect=True)
def test_the_checker_finds_a_fault(bus: Bus, chromium: Browser, faults: Faults) -> None:
    chromium.visit(f"{bus.address}/apps")
    chromium.evaluate("document.querySelector('label').remove()")
    assert [one for one in faults(chromium) if "label" in one]


@pytest.mark.parametrize("bus", ["sqlite"], indirect=True)
def test_without_scripts_live_events_are_collected(bus: Bus, chromium: Browser) -> None:
    chromium.without_scripts()
    try:
        chromium.visit(f"{bus.address}/tail?pattern=%23")
        assert "Collect for 3 s" in chromium.text()
        chromium.visit(f"{bus.address}/tail?pattern=%23&collect=1")
        assert "within 3 s." in chromium.text()
    finally:
        chromium.without_scripts(False)
