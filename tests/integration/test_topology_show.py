"""`lightbus topology` as a table, JSON and pictures, with and without --live."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from lightbus import Lightbus, Retry
from lightbus.cli import mermaid, picture
from lightbus.connection.declare import declare
from lightbus.inspection.states import States, states
from lightbus.transport import Publication
from lightbus.transport.activemq import broker_xml
from tests.bus import connected
from tests.processes import lightbus, wait_until

BUS = """\
from lightbus import Lightbus, Retry

app = Lightbus("billing", retry=Retry(delays=(1, 5)))

@app.on("user.registered", "user.gone")
async def keep_account(user: dict): ...

@app.on("order.#", source="shop")
async def charge(order: dict): ...

@app.on("invoice.*", source="billing", queue="reports", retry=Retry(delays=(60,)))
def report(invoice: dict): ...
"""

TABLE = """\
EXCHANGE          TYPE             PURPOSE
lightbus          topic, internal  events of all apps
shop              topic            events of shop
billing           topic            events of billing
billing.internal  direct           retries and dead letters

QUEUE                      PURPOSE
billing.dead               dead letters
billing.main               handled by keep_account, charge
billing.retry.1s           waits 1 s, then back (main)
billing.retry.5s           waits 5 s, then back (main)
billing.reports            handled by report
billing.reports.retry.1s   waits 1 s, then back (reports)
billing.reports.retry.5s   waits 5 s, then back (reports)
billing.reports.retry.60s  waits 60 s, then back (reports)

FROM EXCHANGE     KEY                TO
billing           #                  exchange lightbus
billing.internal  dead               queue billing.dead
billing.internal  main               queue billing.main
billing.internal  retry.1s           queue billing.retry.1s
billing.internal  retry.5s           queue billing.retry.5s
lightbus          user.registered    queue billing.main
lightbus          user.gone          queue billing.main
shop              order.#            queue billing.main
billing.internal  reports            queue billing.reports
billing.internal  reports.retry.1s   queue billing.reports.retry.1s
billing.internal  reports.retry.5s   queue billing.reports.retry.5s
billing.internal  reports.retry.60s  queue billing.reports.retry.60s
billing           invoice.*          queue billing.reports
"""

NOWHERE = "amqp://ann:s3cr3t@127.0.0.1:1/"


FILES = {"bus.py": BUS}


def billing(url: str = "memory://") -> Lightbus:
    app = Lightbus("billing", url=url, retry=Retry(delays=(1, 5)))
    app.on("user.registered", "user.gone", name="keep_account")(lambda body: None)
    app.on("order.#", source="shop", name="charge")(lambda body: None)
    app.on("invoice.*", source="billing", queue="reports", retry=Retry(delays=(60,)), name="report")(lambda body: None)
    return app


# --- as it is declared ------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["topology"], ["topology", "show"]])
def test_exchanges_queues_and_bindings_are_a_table(folder: Path, command: list[str]) -> None:
    done = lightbus(*command, "bus:app", folder=folder, url=NOWHERE)  # no broker listens there, and none is needed
    assert (done.stdout, done.stderr, done.returncode) == (TABLE, "", 0)


@pytest.mark.parametrize("options", [["--json"], ["--format", "json"]])
def test_options_may_come_first_and_json_has_the_arguments(folder: Path, options: list[str]) -> None:
    done = lightbus("topology", *options, "bus:app", folder=folder, url=NOWHERE)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    wanted = billing().topology()
    assert found["app"] == "billing"
    assert {one["name"]: one["arguments"] for one in found["queues"]} == {
        one.name: one.arguments for one in wanted.queues
    }
    assert found["exchanges"][0] == {
        "name": "lightbus",
        "type": "topic",
        "internal": True,
        "shared": True,
        "arguments": {},
    }
    assert [one["handlers"] for one in found["queues"] if one["name"] == "billing.main"] == [["keep_account", "charge"]]
    assert {"exchange": "shop", "key": "order.#", "to": "queue", "name": "billing.main"} in found["bindings"]
    assert len(found["bindings"]) == len(wanted.bindings)


def test_permissions_is_a_subcommand(folder: Path) -> None:
    done = lightbus("topology", "permissions", "bus:app", folder=folder, url=NOWHERE)
    assert done.stdout.startswith("rabbitmqctl set_permissions")
    assert lightbus("topology", folder=folder, url=NOWHERE).stderr.startswith("Usage: lightbus topology")
    mistyped = lightbus("topology", "permision", "bus:app", folder=folder, url=NOWHERE)
    assert mistyped.returncode == 2
    assert "No such command 'permision'. Did you mean 'permissions'?" in mistyped.stderr


def test_permissions_for_artemis_name_each_queue_of_the_app(folder: Path) -> None:
    done = lightbus(
        "topology", "permissions", "bus:app", "--format", "artemis", "--user", "b", folder=folder, url=NOWHERE
    )
    queues = ["billing.main", "billing.reports"]
    assert done.stdout == broker_xml.permissions("billing", queues, user="b")
    assert "s3cr3t" not in done.stdout
    done = lightbus("topology", "artemis", "--admin-role", "operators", folder=folder, url=NOWHERE)
    assert done.stdout == broker_xml.administrator("operators")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ("--format artemis --vhost events", "--vhost and --json are for RabbitMQ: omit them with --format artemis."),
        ("--format artemis --json", "--vhost and --json are for RabbitMQ: omit them with --format artemis."),
        ("--admin-role amq", "--admin-role is for ActiveMQ Artemis: add --format artemis."),
    ],
)
def test_options_of_another_broker_are_refused(folder: Path, options: str, error: str) -> None:
    done = lightbus("topology", "permissions", "bus:app", *options.split(), folder=folder, url=NOWHERE)
    assert done.returncode == 2
    assert error in done.stderr


# --- on a broker ------------------------------------------------------------------------------


def live(folder: Path, url: str) -> Any:
    done = lightbus("topology", "bus:app", "--live", "--json", folder=folder, url=url)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def test_live_shows_the_state_on_the_broker(folder: Path, url: str) -> None:
    nothing = live(folder, url)
    assert {one["live"]["exists"] for one in (*nothing["exchanges"], *nothing["queues"])} == {False}
    app = billing(url)
    with connected(url) as connection:
        declare(connection, app.topology())
        channel = connection.channel()
        channel.publish([Publication("billing.internal", "dead", b"{}", {})] * 2)
        wait_until(lambda: channel.queue_declare("billing.dead", passive=True).message_count == 2, "two dead letters")
        whole = lightbus("topology", "bus:app", "--live", folder=folder, url=url)
        assert "All exchanges and queues exist as declared." in whole.stdout
        assert re.search(r"^billing\.dead +yes +2 +0 +dead letters$", whole.stdout, re.MULTILINE), whole.stdout
        channel.queue_delete("billing.retry.1s")
        channel.queue_delete("billing.retry.5s")
        channel.queue_declare("billing.retry.5s", durable=True, auto_delete=False, arguments={"x-message-ttl": 7000})
    by_name = {one["name"]: one["live"] for one in live(folder, url)["queues"]}
    assert by_name["billing.dead"] == {"exists": True, "difference": None, "ready": 2, "consumers": 0}
    assert by_name["billing.retry.1s"] == {"exists": False, "difference": None}
    assert "inequivalent arg" in by_name["billing.retry.5s"]["difference"]
    done = lightbus("topology", "bus:app", "--live", folder=folder, url=url)
    assert "Missing: billing.retry.1s (queue). A worker declares them: lightbus worker bus:app" in done.stdout
    assert re.search(r"^billing\.retry\.5s \(queue\): .*inequivalent arg", done.stdout, re.MULTILINE)
    with connected(url) as connection:
        channel = connection.channel()
        assert channel.queue_declare("billing.dead", passive=True).message_count == 2  # the command has changed nothing
        seen = states(connection, app)
    assert '[("billing.retry.1s: missing<br/>billing.retry.5s: 0 ready, differs")]' in mermaid.flowchart(app, seen)
    drawn = picture.draw(app, seen)
    assert ">1 s: missing<" in drawn
    assert ">5 s: 0 wait, differs<" in drawn
    assert ">2 ready, 0 consuming<" in drawn


def test_an_unreachable_broker_is_one_line_without_the_password(folder: Path) -> None:
    done = lightbus("topology", "bus:app", "--live", folder=folder, url=NOWHERE)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Connection refused. Is the broker running there?" in done.stderr
    assert done.stderr.count("\n") == 1
    assert "s3cr3t" not in done.stderr


# --- pictures ---------------------------------------------------------------------------------


def test_the_flowchart_has_a_line_for_each_binding_and_each_dead_letter_exchange(folder: Path) -> None:
    done = lightbus("topology", "bus:app", "--format", "mermaid", folder=folder, url=NOWHERE)
    first, *lines = done.stdout.splitlines()
    assert first == "flowchart LR"
    names = dict(re.findall(r'^  (\w+)[(\[]+"([^"<]+)', done.stdout, re.MULTILINE))  # of retry queues, the first one
    ladders = dict(re.findall(r'^  (queue\d+)[(\[]+"([^"]+)"', done.stdout, re.MULTILINE))
    homes = {name: queue for queue, several in ladders.items() for name in several.split("<br/>")}
    wanted = billing().topology()
    assert set(homes) == {one.name for one in wanted.queues}
    solid = [found for line in lines if (found := re.fullmatch(r'  (\w+) -- "(.+)" --> (\w+)', line))]
    drawn = {(names[one[1]], key, one[3]) for one in solid for key in one[2].split("<br/>")}
    nodes = homes | {name: node for node, name in names.items() if node.startswith("exchange")}
    assert drawn == {
        (one.source, one.key, homes[one.destination] if one.to_queue else nodes[one.destination])
        for one in wanted.bindings
    }
    dotted = [found for line in lines if (found := re.fullmatch(r'  (\w+) -\. "(.+)" \.-> (\w+)', line))]
    assert [(names[one[1]], one[2], names[one[3]]) for one in dotted] == [
        ("keep_account", "fails", "billing.internal"),
        ("charge", "fails", "billing.internal"),
        ("report", "fails", "billing.internal"),
        ("billing.main", "after 20 deliveries", "billing.internal"),
        ("billing.retry.1s", "after 1, 5 s", "billing.internal"),
        ("billing.reports", "after 20 deliveries", "billing.internal"),
        ("billing.reports.retry.1s", "after 1, 5, 60 s", "billing.internal"),
    ]
    handled = re.findall(r"^  (\w+) --> (\w+)$", done.stdout, re.MULTILINE)
    assert [(names[queue], names[handler]) for queue, handler in handled] == [
        ("billing.main", "keep_account"),
        ("billing.main", "charge"),
        ("billing.reports", "report"),
    ]


def few() -> Lightbus:
    return Lightbus("few", url="memory://", queue_type="classic", retry=Retry.none())


def many() -> Lightbus:
    app = Lightbus("many", url="memory://", retry=Retry(delays=(1, 5, 30, 120, 600, 3600)))
    for number in range(12):
        queue = (None, "slow", "bulk")[number % 3]
        source = (None, "shop", "auth", "many")[number % 4]
        app.on(f"event.number-{number}.#", f"other.*.{number}", source=source, queue=queue, name=f"handler_{number}")(
            lambda body: None
        )
    return app


def long() -> Lightbus:
    app = Lightbus("a" * 90 + "-end", url="memory://")
    app.on("w." * 60 + "#", source="b" * 99, name='"<handle> & ' + "h" * 200)(lambda body: None)
    app.on("x.#", queue="q" * 99, retry=Retry(delays=(0.001, 86400.5)), name="other")(lambda body: None)
    return app


Box = tuple[float, float, float, float]


def apart(one: Box, other: Box) -> bool:
    return one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


def inside(one: Box, other: Box) -> bool:
    return other[0] <= one[0] and other[1] <= one[1] and one[2] <= other[2] and one[3] <= other[3]


@pytest.mark.parametrize("make", [few, billing, many, long])
@pytest.mark.parametrize("alive", [False, True], ids=["declared", "live"])
def test_nothing_in_the_picture_overlaps(make: Any, alive: bool) -> None:
    """No boxes overlap. Each text is inside of one box or outside of all, inside of the picture, and overlaps no
    text."""
    app: Lightbus = make()
    seen: States | None = None
    if alive:
        with connected(app) as connection:
            declare(connection, app.topology())
            connection.channel().queue_delete(f"{app.name}.dead")
            seen = states(connection, app)
    root = ElementTree.fromstring(picture.draw(app, seen, "somewhere" if alive else ""))
    whole: Box = (0, 0, float(root.attrib["width"]), float(root.attrib["height"]))
    boxes: list[Box] = []
    texts: list[Box] = []
    for element in root:
        kind = element.tag.rpartition("}")[2]
        x, y = float(element.get("x", 0)), float(element.get("y", 0))
        if kind == "rect" and element.get("class") != "back":
            boxes.append((x, y, x + float(element.attrib["width"]), y + float(element.attrib["height"])))
        elif kind == "text" and "transform" not in element.attrib:
            wide = len(element.text or "") * picture.CHARACTER
            x -= wide if element.get("text-anchor") == "end" else 0
            texts.append((x, y - 10, x + wide, y + 3))
    assert len(boxes) >= 2 + len(app.consumed_queues()) + len(app.handlers)
    for number, box in enumerate(boxes):
        assert inside(box, whole)
        assert all(apart(box, other) for other in boxes[:number]), box
    for number, text in enumerate(texts):
        assert inside(text, whole), text
        assert all(apart(text, other) for other in texts[:number]), text
        assert all(inside(text, box) or apart(text, box) for box in boxes), text


def test_the_picture_has_all_names_and_both_color_schemes() -> None:
    app = many()
    drawn = picture.draw(app)
    for queue in app.topology().queues:
        assert f">{queue.name}<" in drawn
    for name, handler in app.handlers.items():
        assert f">{name}<" in drawn
        assert all(f">{pattern}<" in drawn for pattern in handler.patterns)
    assert "prefers-color-scheme: dark" in drawn
    assert "http" not in drawn.replace("http://www.w3.org/2000/svg", "")  # nothing is loaded from elsewhere


@pytest.mark.parametrize("name", ["kitchen", "order-intake-and-fulfilment"])
def test_the_name_of_the_internal_exchange_fits_for_a_small_app(name: str) -> None:
    app = Lightbus(name, url="memory://", retry=Retry.none())
    app.on("order.placed", name="cook")(lambda body: None)
    assert f">{name}.internal  (direct)<" in picture.draw(app)


def test_a_name_that_is_cut_is_whole_in_its_tooltip() -> None:
    app = long()
    root = ElementTree.fromstring(picture.draw(app))
    tooltips = {element.text for element in root.iter("{http://www.w3.org/2000/svg}title")}
    assert {app.name, f"{app.name}.dead", '"<handle> & ' + "h" * 200} <= tooltips
