"""`lightbus check`: exit codes, one line for each break, JSON; and the page about it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import attrs
import pytest

from lightbus import Lightbus
from lightbus.catalog import catalog, storage
from lightbus.catalog.contract import Contract, contract_of, to_json
from lightbus.connection.declare import declare
from lightbus.connection.dial import BrokerAddresses
from lightbus.transport import Publication
from lightbus.wire.topology import cataloguing
from tests.bus import connected, publish_confirmed
from tests.processes import lightbus

PAGE = (Path(__file__).parents[2] / "docs" / "howto" / "check.md").read_text()
(EVENT,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
((COMMAND, OUTPUT),) = re.findall(r"^```console\n\$ lightbus ([^\n]+)\n(.*?)^```$", PAGE, re.M | re.S)
BUS = f"import attrs\n\nfrom lightbus import Lightbus\n\napp = Lightbus('shop')\n\n\n{EVENT}"
AGAINST = ("check", "shop.bus:app", "--against", "catalog.json")


def billing() -> Contract:
    app = Lightbus("billing", url="memory://")

    @attrs.frozen
    class Order:
        order_id: int
        email: str

    def invoice(order: Any) -> None: ...

    invoice.__annotations__["order"] = Order
    app.on("order.placed", source="shop")(invoice)
    return contract_of(app)


def shop(source: str) -> Contract:
    names: dict[str, Any] = {"__name__": "shop_bus"}
    exec(source, names)
    return contract_of(names["app"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "bus.py").write_text(BUS)
    write_snapshot(tmp_path, shop(BUS), billing())
    return tmp_path


def write_snapshot(folder: Path, *contracts: Contract) -> None:
    (folder / "catalog.json").write_text(json.dumps(catalog.to_json(catalog.of(list(contracts)))))


def change(folder: Path, old: str, new: str) -> None:
    assert old in BUS
    (folder / "shop" / "bus.py").write_text(BUS.replace(old, new))


def test_the_page_shows_the_output_for_a_removed_field(folder: Path) -> None:
    change(folder, "    email: str\n", "")
    done = lightbus(*COMMAND.split(), folder=folder, url="amqp://127.0.0.1:1/")
    assert (done.returncode, done.stdout, done.stderr) == (1, OUTPUT, "")


def test_an_added_field_passes(folder: Path) -> None:
    change(folder, "email: str", "email: str\n    note: str")
    done = lightbus(*AGAINST, folder=folder, url="amqp://127.0.0.1:1/")
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        "shop: checked against 1 other app. Nothing breaks.\n",
        "",
    )


def test_what_was_broken_before_does_not_fail_the_check(folder: Path) -> None:
    change(folder, "    email: str\n", "")
    write_snapshot(folder, shop(BUS.replace("    email: str\n", "")), billing())
    done = lightbus(*AGAINST, folder=folder, url="amqp://127.0.0.1:1/")
    assert done.returncode == 0
    assert done.stdout.startswith("before: order.placed, field email, handler billing.invoice: ")


def test_json_has_breaks_notes_and_what_is_missing(folder: Path) -> None:
    change(folder, "order_id: int\n    email: str", "order_id: str\n    email: str")
    write_snapshot(folder, billing())
    done = lightbus(*AGAINST, "--json", folder=folder, url="amqp://127.0.0.1:1/")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert {name: found[name] for name in ("app", "before", "notes")} == {"app": "shop", "before": [], "notes": []}
    (one,) = found["breaks"]
    assert one.pop("next")
    assert one == {
        "rule": "type",
        "event": "order.placed",
        "field": "order_id",
        "handler": "billing.invoice",
        "what": "Published: string; read: integer",
    }
    assert found["missing"] == [
        "The catalogue has no contract of shop: every problem counts as new, and removed events are not found."
    ]


def test_an_empty_catalogue_is_no_error(folder: Path) -> None:
    write_snapshot(folder)
    done = lightbus(*AGAINST, folder=folder, url="amqp://127.0.0.1:1/")
    assert done.returncode == 0
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == ["note", "note", "shop"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("check", "shop.bus:app", "--against", "missing.json"), "missing.json cannot be read"),
        (("check", "shop.bus:app", "--against", "shop/bus.py"), "is not JSON"),
        (("check", "shop.bus:nothing", "--against", "catalog.json"), "Did you mean shop.bus:app?"),
        (("check",), "Missing argument"),
    ],
)
def test_where_nothing_was_checked_the_exit_code_is_2(folder: Path, words: tuple[str, ...], said: str) -> None:
    done = lightbus(*words, folder=folder, url="amqp://127.0.0.1:1/")
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


@pytest.mark.rabbitmq
def test_a_change_is_checked_against_the_contracts_on_the_broker(folder: Path, rabbitmq_url: str) -> None:
    broker = BrokerAddresses.parse(rabbitmq_url)
    for one in (shop(BUS), billing()):
        storage.publish(broker, one)
    done = lightbus("check", "shop.bus:app", folder=folder, url=rabbitmq_url)
    assert (done.returncode, done.stdout) == (0, "shop: checked against 1 other app. Nothing breaks.\n"), done.stderr
    change(folder, "email: str", "email: str\n    note: str")
    done = lightbus("check", "shop.bus:app", folder=folder, url=rabbitmq_url)
    assert (done.returncode, done.stdout) == (0, "shop: checked against 1 other app. Nothing breaks.\n"), done.stderr
    change(folder, "    email: str\n", "")
    done = lightbus("check", "shop.bus:app", folder=folder, url=rabbitmq_url)
    assert (done.returncode, done.stdout, done.stderr) == (1, OUTPUT, "")


@pytest.mark.rabbitmq
def test_a_contract_that_cannot_be_read_does_not_end_the_commands(folder: Path, rabbitmq_url: str) -> None:
    broker = BrokerAddresses.parse(rabbitmq_url)
    bad = attrs.evolve(billing(), app="mallory", handlers=[attrs.evolve(billing().handlers[0], schema={"type": 5})])
    for one in (shop(BUS), billing()):
        storage.publish(broker, one)
    with connected(rabbitmq_url) as connection:
        declare(connection, cataloguing("mallory"))
        publish_confirmed(
            connection, Publication("mallory.internal", "contract", json.dumps(to_json(bad)).encode(), {})
        )
    change(folder, "    email: str\n", "")
    done = lightbus("check", "shop.bus:app", folder=folder, url=rabbitmq_url)
    assert done.returncode == 1
    first, note, last = done.stdout.splitlines()
    assert [first, last] == OUTPUT.splitlines()
    assert note.startswith("note: The contract of mallory is ignored, so its handlers are not checked: This is not a")
    done = lightbus("catalog", folder=folder, url=rabbitmq_url)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("2 apps, 1 event, on ")
    assert "A contract written by mallory is ignored: This is not a contract that" in done.stdout
    assert "handler 'invoice': its JSON Schema: Expected `str | array`, got `int` - at `$.type`." in done.stdout
    done = lightbus("who", "order.placed.email", folder=folder, url=rabbitmq_url)
    assert (done.returncode, done.stderr) == (0, "")
    assert "billing.invoice  email" in done.stdout
