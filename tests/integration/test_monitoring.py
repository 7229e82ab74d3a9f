"""docs/examples/monitoring: the rules by promtool's unit tests; rules and dashboard on a real Prometheus that scrapes
a real worker.
"""

from __future__ import annotations

import functools
import json
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightbus.telemetry.families import FAMILIES
from tests.conftest import need_prometheus
from tests.patience import LIMIT, wait_until
from tests.processes import ROOT, Program, lightbus
from tests.prometheus import Prometheus, find
from tests.rabbitmq import free_port

pytestmark = pytest.mark.prometheus

MONITORING = ROOT / "docs" / "examples" / "monitoring"
RULES = MONITORING / "lightbus.rules.yml"
DASHBOARD: dict[str, Any] = json.loads((MONITORING / "dashboard.json").read_text())
EXPRESSIONS = [
    pytest.param(target["expr"], id=f"{panel['title']}-{target['refId']}")
    for panel in DASHBOARD["panels"]
    for target in panel["targets"]
]
ALERTS = re.findall(r"- alert: (\w+)", RULES.read_text())

BUS = """\
from contextlib import asynccontextmanager
from sqlalchemy import create_engine
from lightbus import Lightbus, Retry
from lightbus.outbox import Outbox, metadata

engine = create_engine("sqlite:///data.db")

@asynccontextmanager
async def lifespan(app):
    metadata.create_all(engine)
    yield

app = Lightbus("shop", lifespan=lifespan, retry=Retry(delays=(0.05,)))
outbox = Outbox(app, engine)

@app.event
class OrderPlaced:
    number: int

@app.event
class OrderBilled:
    number: int

@app.on(OrderPlaced)
async def bill(order: OrderPlaced):
    if order.number % 10 == 9:
        raise ValueError
    await app.publish(OrderBilled(number=order.number))

@app.on(OrderBilled, queue="slow")  # the worker does not consume this queue
async def report(order: OrderBilled): ...
"""


@pytest.fixture(scope="module")
def monitored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus with the rules, which scrapes a worker of two processes that has handled and published events."""
    need_prometheus()
    folder = tmp_path_factory.mktemp("monitored")
    (folder / "shop.py").write_text(BUS)
    url, port = f"sqlite:///{folder}/bus.db", free_port(2)
    command = ("worker", "shop:app", "--queue", "main", "--processes", "2", "--health-port", str(port), "--metrics")
    with Program(*command, folder=folder, url=url) as worker:
        for _ in range(2):
            worker.wait_for("Ready")
        publish(folder, url)  # before the first scrape, with which the worker asks the broker
        worker.wait_for("dead-lettered")
        with Prometheus([f"127.0.0.1:{port}"], [RULES]) as prometheus:
            wait_until(lambda: prometheus.query('lightbus_dead_letters{app="shop"}'), "the worker is scraped")
            publish(folder, url)
            counted = "sum(lightbus_events_total{outcome=~'handled|dead'}) == 40"
            wait_until(lambda: prometheus.query(counted), "all are counted")
            wait_until(lambda: prometheus.query("lightbus_outbox_rows"), "the depth of the outbox")
            yield prometheus
        assert worker.end(signal.SIGTERM) == 0


def publish(folder: Path, url: str) -> None:
    events = "".join(f'{{"number": {number}}}\n' for number in range(20))
    options = ("publish", "shop:app", "order.placed", "--jsonl", "-")
    assert lightbus(*options, folder=folder, url=url, given=events.encode()).returncode == 0


# --- rules ------------------------------------------------------------------------------------


def promtool(*arguments: str) -> str:
    need_prometheus()
    program = find("promtool")
    assert program is not None
    done = subprocess.run(
        [program, *arguments], cwd=MONITORING, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_rules_and_the_configuration_are_valid() -> None:
    assert f"SUCCESS: {len(ALERTS)} rules found" in promtool("check", "rules", RULES.name)
    assert "SUCCESS" in promtool("check", "config", "prometheus.yml")


def test_the_unit_tests_of_the_rules_pass_and_test_each_rule() -> None:
    assert "SUCCESS" in promtool("test", "rules", "lightbus.rules.test.yml")
    tests = (MONITORING / "lightbus.rules.test.yml").read_text()
    for alert in ALERTS:
        assert re.search(rf"- alertname: {alert}\n +eval_time: \S+\n +exp_alerts:", tests), f"{alert} never fires"


def test_a_real_prometheus_evaluates_each_rule(monitored: Prometheus) -> None:
    def rules() -> list[dict[str, Any]]:
        (group,) = monitored.ask("rules")["groups"]
        found: list[dict[str, Any]] = group["rules"]
        return found

    wait_until(lambda: all(rule["health"] == "ok" for rule in rules()), "each rule was evaluated")
    assert [rule["name"] for rule in rules()] == ALERTS
    assert not [rule["lastError"] for rule in rules() if rule.get("lastError")]


def test_a_queue_that_nobody_consumes_raises_the_alert(monitored: Prometheus) -> None:
    pending = 'ALERTS{alertname="LightbusNoConsumer", alertstate="pending", app="shop", queue="shop.slow"}'
    wait_until(lambda: monitored.query(pending), "the alert waits for its two minutes")
    raised = [alert["labels"] for alert in monitored.ask("alerts")["alerts"]]
    assert {one["queue"] for one in raised if one["alertname"] == "LightbusNoConsumer"} == {"shop.slow"}


# --- the dashboard ----------------------------------------------------------------------------


def as_grafana_sends(expression: str) -> str:
    """With the variables replaced, for all apps and queues, over the whole test."""
    replaced = expression.replace("$__rate_interval", "1h").replace("$app", ".*").replace("$queue", ".*")
    assert "$" not in replaced
    return replaced


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_each_expression_of_the_dashboard_has_data(monitored: Prometheus, expression: str) -> None:
    def values() -> list[float]:
        return [float(series["value"][1]) for series in monitored.query(as_grafana_sends(expression))]

    # The first samples of `rate`, and the answer of the broker, may be yet to come.
    wait_until(lambda: any(value == value for value in values()), f"data of {expression}")


def test_the_dashboard_uses_every_metric_and_the_metrics_of_its_variables_exist(monitored: Prometheus) -> None:
    text = json.dumps(DASHBOARD)
    for family in FAMILIES:
        assert family.name in text, f"no panel shows {family.name}"
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            metric, label = re.fullmatch(r"label_values\((\w+).*, (\w+)\)", variable["query"]["query"]).groups()  # type: ignore[union-attr]
            wait_until(functools.partial(monitored.query, f"group by ({label}) ({metric})"), f"{metric} with {label}")


def test_each_panel_says_what_it_shows_and_has_its_place() -> None:
    places = [tuple(panel["gridPos"].values()) for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places)
    for panel in DASHBOARD["panels"]:
        assert panel["description"].endswith(".")
        assert panel["datasource"]["uid"] == "${datasource}"


def test_every_metric_is_in_a_rule_or_a_panel_under_its_own_name() -> None:
    known = {family.name for family in FAMILIES} | {
        f"{family.name}_bucket" for family in FAMILIES if family.kind == "histogram"
    }
    for file in (RULES, MONITORING / "dashboard.json", MONITORING / "lightbus.rules.test.yml"):
        assert set(re.findall(r"\blightbus_\w+", file.read_text())) <= known, file.name
