"""docs/examples/logs: what docs/howto/logs.md shows is what a worker writes."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.example import EXAMPLES, LIGHTBUS, Example
from tests.processes import Program

PAGE = (EXAMPLES.parent / "howto" / "logs.md").read_text()
MakeExample = Callable[[str], Example]


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/bus.db"


def publish(logs: Example, url: str, order_id: int, amount: float) -> None:
    arguments = ("publish", "charging:app", "order.placed", f"order_id={order_id}", f"amount={amount}")
    done = logs.run(*LIGHTBUS, *arguments, url=url)
    assert done.returncode == 0, done.stderr


def read(program: Program) -> list[dict[str, Any]]:
    """All lines, each of which is an object."""
    return [json.loads(line) for line in program.lines]


def matching(lines: list[dict[str, Any]], pattern: str, name: str = "message") -> dict[str, Any]:
    """The first such line: a second attempt may write it again."""
    return next(line for line in lines if re.search(pattern, line[name]))


def shown(line: dict[str, Any]) -> dict[str, object]:
    """A line without what differs in each run."""
    varying = {"time", "id", "seconds", "broker"}
    text = re.sub(r"\([0-9a-f-]{36}\)|Lightbus [\w.]+|on embedded.*", "...", line["message"])
    return {**{name: "..." if name in varying else value for name, value in line.items()}, "message": text}


def test_json_lines_are_as_shown_on_the_page(example: MakeExample, sqlite_url: str) -> None:
    logs = example("logs")
    with logs.start("worker", "charging:app", "--json-logs", url=sqlite_url) as worker:
        worker.wait_for("Ready")
        publish(logs, sqlite_url, 7, 0.0)
        worker.wait_for("nothing to charge")
        assert worker.end(signal.SIGTERM) == 0
    lines = read(worker)
    on_the_page = [json.loads(line) for line in re.findall(r"^\{\"time\".*\}$", PAGE, re.MULTILINE)]
    real = [matching(lines, "worker of app"), matching(lines, "^Charging"), matching(lines, "charge failed")]
    assert [shown(line) for line in on_the_page] == [shown(line) for line in real]
    assert [list(line) for line in on_the_page] == [list(line) for line in real]


def test_a_configuration_of_its_own_is_the_only_one(example: MakeExample, sqlite_url: str) -> None:
    logs = example("logs")
    with logs.start("worker", "own_config:app", "--no-configure-logging", url=sqlite_url) as worker:
        worker.wait_for(r"^INFO lightbus: Lightbus .* worker of app 'billing' \(own_config:app\) on embedded ")
        worker.wait_for("^INFO lightbus: Ready")
        publish(logs, sqlite_url, 7, 9.5)
        worker.wait_for("^INFO billing: Charging$")
        publish(logs, sqlite_url, 8, 0.0)
        worker.wait_for("^WARNING lightbus: charge failed")
        assert worker.end(signal.SIGTERM) == 0
    assert all(re.match(r"(INFO|WARNING) \w+: ", line) for line in worker.lines)
    lines = [json.loads(line) for line in (logs.folder / "billing.log").read_text().splitlines()]
    assert matching(lines, "worker of app")["broker"].startswith("embedded (SQLite file ")
    handled = next(line for line in lines if line["message"] == "Charging")
    assert (handled["order_id"], handled["handler"], handled["event"]) == (7, "charge", "order.placed")
    assert matching(lines, "charge failed")["outcome"] == "retried"


def test_structlog_gets_all_lines_with_the_event(example: MakeExample, sqlite_url: str) -> None:
    logs = example("logs")
    with logs.start("worker", "own_structlog:app", "--no-configure-logging", url=sqlite_url) as worker:
        worker.wait_for("Ready")
        publish(logs, sqlite_url, 7, 0.0)
        worker.wait_for("nothing to charge")
        assert worker.end(signal.SIGTERM) == 0
    lines = read(worker)
    first = matching(lines, "worker of app", "event")
    assert first["lightbus"]["broker"].startswith("embedded (SQLite file ")
    charging = matching(lines, "^Charging", "event")
    assert (charging["order_id"], charging["level"], charging["logger"]) == (7, "info", "billing")
    failed = matching(lines, "charge failed", "event")
    names = ("app", "event", "id", "handler", "queue", "attempt")
    assert [charging["lightbus"][name] for name in names] == [failed["lightbus"][name] for name in names]
    assert (failed["lightbus"]["outcome"], failed["lightbus"]["delay"]) == ("retried", 5.0)


def test_with_several_processes_the_supervisor_logs_as_its_options_say(example: MakeExample, sqlite_url: str) -> None:
    logs = example("logs")
    options = ("--no-configure-logging", "--json-logs", "--processes", "2")
    with logs.start("worker", "own_structlog:app", *options, url=sqlite_url) as worker:
        for _ in range(2):
            worker.wait_for("Ready")
        assert worker.end(signal.SIGTERM) == 0
    lines = read(worker)
    assert sum("worker of app" in line.get("event", "") for line in lines) == 2
    assert (
        matching([line for line in lines if "message" in line], r"Stopping \(SIGTERM\): 2 processes")["level"] == "info"
    )
