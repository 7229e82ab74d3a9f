"""`lightbus catalog` and `lightbus who`, as processes, with a snapshot and real brokers."""

from __future__ import annotations

import json
import re
import shlex
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from click.testing import CliRunner

from lightbus import errors
from lightbus.catalog import announcer, catalog, contract, live, storage
from lightbus.catalog.catalog import Catalog
from lightbus.catalog.live import Live
from lightbus.cli import main
from lightbus.cli import topology as topology_command
from lightbus.connection.declare import declare
from lightbus.connection.dial import BrokerAddresses
from lightbus.inspection.states import QueueState
from lightbus.transport import Publication
from lightbus.wire.topology import Topology, app_exchange, bus_exchange, catalog_stream, cataloguing
from tests import rabbitmq as nodes
from tests.bus import connected, publish_confirmed
from tests.catalogs import apps, large, small
from tests.faults.proxy import Proxy
from tests.patience import wait_until, within
from tests.processes import ROOT, lightbus, working

PASSWORD = "s3cr3t"

FILES = {
    "bus.py": """\
import os

from tests.catalogs import apps

shop, billing, audit = apps(os.environ["LIGHTBUS_URL"])
""",
}

NOWHERE = "amqp://ann:s3cr3t@127.0.0.1:1/"


@pytest.fixture
def snapshot(folder: Path) -> Path:
    (folder / "catalog.json").write_text(json.dumps(catalog.to_json(small())))
    return folder


# --- from a file ------------------------------------------------------------------------------


def test_a_snapshot_is_shown_in_all_formats_without_a_broker(snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTBUS_URL", NOWHERE)

    def shown(*options: str) -> str:
        done = CliRunner().invoke(main, ["catalog", "--from", str(snapshot / "catalog.json"), *options])
        assert (done.exit_code, done.stderr) == (0, ""), done.stderr
        return done.stdout

    assert "billing.misspelt: the pattern 'order.paced' matches no event. Did you mean 'order.placed'?" in shown()
    described = shown("--json")
    assert described == shown("--format", "json")
    (snapshot / "again.json").write_text(described)
    assert catalog.from_file(snapshot / "again.json") == catalog.from_file(snapshot / "catalog.json")
    assert json.loads(shown("--format", "asyncapi"))["asyncapi"] == "3.0.0"
    assert shown("--format", "mermaid").startswith("flowchart LR\n")
    assert shown("--format", "svg").startswith("<svg ")
    assert shown("--format", "html").startswith("<!doctype html>\n")


def test_who_shows_handlers_and_what_they_read(snapshot: Path) -> None:
    done = lightbus("who", "order.placed.lines.article", "--from", "catalog.json", folder=snapshot, url=NOWHERE)
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        done.stdout
        == """\
order.placed, field lines.article: published by shop (release 2026.11), string

HANDLER          READS          QUEUE
audit.note       any field      audit.main
billing.invoice  lines.article  billing.main
"""
    )
    done = lightbus("who", "order.*", "--from", "catalog.json", "--json", folder=snapshot, url=NOWHERE)
    found = json.loads(done.stdout)
    assert [(one["event"], [each["name"] for each in one["handlers"]]) for one in found] == [
        ("order.cancelled", []),
        ("order.paced", ["billing.misspelt", "billing.unknown"]),
        ("order.placed", ["audit.note", "billing.invoice"]),
    ]
    placed = found[2]
    assert placed["publishers"][0]["fields"] == ["lines", "email", "payment", "comments", "status"]
    assert [(one["reads"], one["fields"], one["live"]) for one in placed["handlers"]] == [
        ("any", None, None),
        ("yes", ["lines"], None),
    ]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ("who order.placd --from catalog.json", 1, "There is no event 'order.placd'. Did you mean 'order.placed'?"),
        ("who order.placed.emial --from catalog.json", 1, "Did you mean 'order.placed.email'?"),
        ("who order.placed invoice.paid --from catalog.json", 2, "Give one EVENT[.FIELD]"),
        ("who bus:app --from catalog.json", 2, "Give one EVENT[.FIELD]"),
        ("who order.placed --from missing.json", 1, "missing.json cannot be read: No such file"),
        ("catalog --from bus.py", 1, "bus.py is not JSON"),
        ("catalog bus:shop --from catalog.json", 1, "127.0.0.1:1"),
    ],
)
def test_what_is_wrong_is_named(snapshot: Path, arguments: str, status: int, message: str) -> None:
    done = lightbus(*shlex.split(arguments), folder=snapshot, url=NOWHERE)
    assert (done.returncode, done.stdout) == (status, "")
    assert message in done.stderr
    assert PASSWORD not in done.stderr
    assert "Traceback" not in done.stderr


PAGE = (ROOT / "docs" / "howto" / "catalog.md").read_text()
BLOCKS = dict(re.findall(r"^```console\n\$ lightbus ([^\n|>]+)\n(.*?)^```$", PAGE, re.M | re.S))
SHOWN = "amqp://ann:**@rabbit-1:5672/"
"""The broker on the page."""


@pytest.mark.rabbitmq
def test_the_page_shows_the_output(folder: Path, rabbitmq_url: str) -> None:
    broker = BrokerAddresses.parse(rabbitmq_url)
    with connected(rabbitmq_url) as connection:
        for one, written in zip(apps(rabbitmq_url), reversed(small().contracts), strict=True):
            declare(connection, one.topology())
            storage.publish(broker, attrs.evolve(written, at=time.time() - 575))  # 10m for 55 s
        declare(connection, cataloguing("mallory"))
        forged = json.dumps(contract.to_json(small().contracts[2])).encode()
        publish_confirmed(connection, Publication("mallory.internal", "contract", forged, {}))
        publish_confirmed(connection, *internal("billing", "main", 3))
        connection.channel().consume("audit.main", lambda _: None, on_cancel=lambda _: None)
        (folder / "catalog.json").write_text(lightbus("catalog", "--json", folder=folder, url=rabbitmq_url).stdout)
        for command, output in BLOCKS.items():
            done = lightbus(*shlex.split(command), folder=folder, url=rabbitmq_url)
            assert (done.returncode, done.stderr) == (0, ""), command
            assert done.stdout.replace(broker.masked, SHOWN) == output


def test_the_figures_on_the_page_are_the_codes() -> None:
    assert [*BLOCKS] == [
        "catalog",
        "who order.placed",
        "who order.placed.email",
        "who order.placed.lines.article",
        "catalog --from catalog.json",
    ]
    words = " ".join(PAGE.split())
    assert f"within {live.LIMIT:g} seconds in total" in words
    assert f"every {announcer.EVERY / 3600:g} hours" in words
    limits = catalog_stream().arguments
    assert f"after {limits['x-max-age'].removesuffix('D')} days" in words
    assert f"exceed {limits['x-max-length-bytes'] // 1024**2} MiB" in words


# --- the live state ---------------------------------------------------------------------------


def asked(url: str, found: Catalog, **options: float) -> Live:
    return live.ask(BrokerAddresses.parse(url), found, **options)


def test_consumers_waiting_events_and_dead_letters_are_counted(url: str) -> None:
    audit, billing, _ = small().contracts
    apps_by_name = {one.name: one for one in apps(url)}
    with connected(url) as connection:
        for name in ("audit", "billing"):
            declare(connection, apps_by_name[name].topology())
        connection.channel().queue_delete("billing.slow")
        connection.channel().consume("audit.main", lambda _: None, on_cancel=lambda _: None)
        publish_confirmed(connection, *internal("audit", "dead", 2), *internal("billing", "main", 3))
        found = asked(url, small())
    assert found.asked == 5  # shop has no handlers; billing has two queues, and each has a queue of dead letters
    assert found.queues["billing.slow"] == QueueState("billing.slow", False)
    assert (found.consumers(audit), found.waiting(audit), found.dead(audit)) == (1, 0, 2)
    assert (found.consumers(billing), found.waiting(billing), found.dead(billing)) == (0, 3, 0)


def internal(app: str, key: str, count: int) -> Iterator[Publication]:
    """So many events for a queue of an app."""
    return (Publication(f"{app}.internal", key, b"{}", {}) for _ in range(count))


def test_a_broker_that_is_not_there_is_an_error() -> None:
    with pytest.raises(errors.BrokerUnreachable):
        asked(NOWHERE, small())


def test_a_contract_cannot_pass_the_queue_of_another_app_for_its_own(sqlite_url: str) -> None:
    (forged,) = [attrs.evolve(one, app="mallory") for one in small().contracts if one.app == "billing"]
    with connected(sqlite_url) as connection:
        declare(connection, apps(sqlite_url)[1].topology())
        found = asked(sqlite_url, catalog.of([forged]))
        assert (found.consumers(forged), found.waiting(forged)) == (None, None)
        assert "billing.main" not in found.queues


@pytest.mark.rabbitmq
def test_a_slow_broker_is_asked_for_a_limited_time(rabbitmq: nodes.Node, rabbitmq_url: str) -> None:
    with Proxy(rabbitmq.port) as proxy:
        proxy.delay = 0.05
        url = rabbitmq_url.replace(str(rabbitmq.port), str(proxy.port))
        with within(6):  # 300 queues take 60 s over one connection, and 9 s over seven
            found = asked(url, large(100), limit=3.0)
        assert found.asked == 300
        assert 0 < len(found.queues) < 300


@pytest.mark.rabbitmq
def test_queues_are_asked_for_over_several_connections(rabbitmq: nodes.Node, rabbitmq_url: str) -> None:
    with Proxy(rabbitmq.port) as proxy:
        url = rabbitmq_url.replace(str(rabbitmq.port), str(proxy.port))
        found = asked(url, large(100), limit=60.0)
        assert len(found.queues) == 300
        assert not any(one.exists for one in found.queues.values())
        assert len(proxy.links) == 7


@pytest.mark.rabbitmq
def test_a_lost_connection_leaves_the_rest_unknown(rabbitmq: nodes.Node, rabbitmq_url: str) -> None:
    with Proxy(rabbitmq.port) as proxy:
        proxy.cut_at(b"audit.dead", forward=False)
        url = rabbitmq_url.replace(str(rabbitmq.port), str(proxy.port))
        found = asked(url, small())
        assert [*found.queues] == ["audit.main"]
        assert found.dead(small().contracts[0]) is None


@pytest.mark.rabbitmq
def test_a_queue_that_others_may_not_see_is_unknown(rabbitmq_url: str) -> None:
    with connected(rabbitmq_url) as connection:
        connection.channel().queue_declare("audit.dead", exclusive=True)
        connection.channel().queue_declare("audit.main", durable=True, auto_delete=False)
        found = asked(rabbitmq_url, small())
    audit = small().contracts[0]
    assert (found.dead(audit), found.waiting(audit), len(found.queues)) == (None, 0, found.asked - 1)


@pytest.fixture
def users(rabbitmq: nodes.Node, rabbitmq_url: str, folder: Path) -> dict[str, str]:
    """The URL of each app, with a user of its own, which has the printed permissions."""
    vhost = rabbitmq_url.rpartition("/")[2]
    with connected(rabbitmq_url) as connection:  # once, by the administrator
        declare(connection, Topology(exchanges=(bus_exchange(), app_exchange("shopp")), queues=(catalog_stream(),)))
    permissions = {f"{app.name}-{vhost}": topology_command.rules(app) for app in apps()}
    rabbitmq.add_users(vhost, permissions, PASSWORD)
    return {app.name: rabbitmq.vhost_url(vhost, f"{app.name}-{vhost}", PASSWORD) for app in apps()}


@pytest.mark.rabbitmq
def test_three_services_with_their_own_users_one_of_them_stopped(users: dict[str, str], snapshot: Path) -> None:
    def shown(*arguments: str, user: str) -> Any:
        done = lightbus(*arguments, "--from", "catalog.json", "--json", folder=snapshot, url=users[user])
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    with working("bus:shop", folder=snapshot, url=users["shop"]):  # first: others name its exchange
        with working("bus:billing", folder=snapshot, url=users["billing"]) as billing:
            assert billing.end(signal.SIGTERM) == 0
        with working("bus:audit", folder=snapshot, url=users["audit"]):
            for user in users:  # each may see the queues of the others
                found = shown("catalog", "bus:shop", user=user)
                assert [(one["app"], one.get("consumers")) for one in found["apps"]] == [
                    ("audit", 1),
                    ("billing", 0),
                    ("shop", None),
                ]
            (answer,) = shown("who", "bus:audit", "order.placed", user="audit")
            assert [(one["name"], one["live"]["consumers"]) for one in answer["handlers"]] == [
                ("audit.note", 1),
                ("billing.invoice", 0),
            ]
            done = lightbus("catalog", "bus:shop", "--from", "catalog.json", folder=snapshot, url=users["shop"])
            assert done.stdout.startswith("3 apps, 3 events, in catalog.json; live state of amqp://shop-"), done.stdout
            assert PASSWORD not in done.stdout
            done = lightbus(
                "who", "bus:shop", "order.placed", "--from", "catalog.json", folder=snapshot, url=users["shop"]
            )
            assert done.stdout.splitlines()[-3:] == [
                "HANDLER          READS      QUEUE         CONSUMERS  WAITING",
                "audit.note       any field  audit.main            1        0",
                "billing.invoice  lines      billing.main          0        0",
            ]


@pytest.mark.rabbitmq
def test_contracts_come_from_the_broker_also_of_a_stopped_service(users: dict[str, str], folder: Path) -> None:
    def shown(*arguments: str, user: str) -> Any:
        done = lightbus(*arguments, "--json", folder=folder, url=users[user])
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def stored() -> list[str]:
        return [one.app for one in storage.read(BrokerAddresses.parse(users["shop"])).contracts]

    with working("bus:shop", folder=folder, url=users["shop"]):
        with working("bus:billing", folder=folder, url=users["billing"]) as billing:
            wait_until(lambda: "billing" in stored(), "the contract of billing")
            assert billing.end(signal.SIGTERM) == 0
        with working("bus:audit", folder=folder, url=users["audit"]):
            wait_until(lambda: stored() == ["audit", "billing", "shop"], "all contracts")
            for user in users:
                (answer,) = shown("who", "order.placed", user=user)
                assert [(one["name"], one["live"]["consumers"]) for one in answer["handlers"]] == [
                    ("audit.note", 1),
                    ("billing.invoice", 0),
                ]
                (field,) = shown("who", "order.placed.lines.article", user=user)
                assert [(one["name"], one["reads"]) for one in field["handlers"]] == [
                    ("audit.note", "any"),
                    ("billing.invoice", "yes"),
                ]
            notices = shown("catalog", user="audit")["notices"]
            assert ("unmatched", "order.paced", "order.placed") in [
                (one["kind"], one["detail"], one["meant"]) for one in notices
            ]
