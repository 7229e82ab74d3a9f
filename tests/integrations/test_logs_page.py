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
    (found,) = [line for line in lines if re.search(pattern, line[name])]
    return found


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
