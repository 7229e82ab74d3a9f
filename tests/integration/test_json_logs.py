"""`--json-logs` of real workers: each line on stderr is one object, and the first one names the broker."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.processes import Program, lightbus

BUS = """\
import logging, threading, warnings
from lightbus import Lightbus

app = Lightbus("billing")
logger = logging.getLogger("billing")

@app.event
class InvoicePaid:
    number: str

@app.on(InvoicePaid)
def handle(paid: InvoicePaid):
    match paid.number:
        case "warn":
            warnings.warn("old invoice", DeprecationWarning, stacklevel=1)
            warnings.warn("odd invoice", stacklevel=1)
        case "thread":
            thread = threading.Thread(target=lambda: {}["no such invoice"], name="mailer")
            thread.start()
            thread.join()
        case "misfit":
            logger.info("%d invoices", "three")
    logger.info("done")
"""

FILES = {"billing/bus.py": BUS, "broken.py": "import no_such_module\n"}


def worker(folder: Path, url: str, *options: str) -> Program:
    return Program("worker", "billing.bus:app", *options, folder=folder, url=url)


def publish(folder: Path, url: str, number: str) -> None:
    done = lightbus("publish", "billing.bus:app", "invoice.paid", f"number={number}", folder=folder, url=url)
    assert done.returncode == 0, done.stderr


def read(program: Program) -> list[dict[str, Any]]:
    return [json.loads(line) for line in program.lines]


def test_warnings_failed_threads_and_odd_records_are_lines_of_json(folder: Path, sqlite_url: str) -> None:
    with worker(folder, sqlite_url, "--json-logs") as running:
        running.wait_for("Ready")
        for number in ("warn", "thread", "misfit"):
            publish(folder, sqlite_url, number)
            running.wait_for('"message": "done"')
        assert running.end(signal.SIGTERM) == 0
    lines = read(running)
    (warned,) = [line for line in lines if line["logger"] == "py.warnings"]
    assert "UserWarning: odd invoice" in warned["message"]
    assert (warned["level"], warned["handler"]) == ("warning", "handle")
    (failed,) = [line for line in lines if line["message"] == "Thread mailer failed."]
    assert failed["exception"].endswith("KeyError: 'no such invoice'")
    ours = [line["message"] for line in lines if line["logger"] == "billing"]
    assert ours == ["done", "done", "%d invoices ('three',)", "done"]


@pytest.mark.parametrize("target", ["broken:app", "billing.bus:nothing"])
@pytest.mark.parametrize("processes", ["1", "2"])
def test_the_error_that_ends_a_worker_is_a_line_of_json(
    folder: Path, sqlite_url: str, target: str, processes: str
) -> None:
    options = ("--json-logs", "--processes", processes)
    done = lightbus("worker", target, *options, folder=folder, url=sqlite_url)
    assert done.returncode == 2
    first = json.loads(done.stderr.splitlines()[0])
    assert (first["level"], first["logger"]) == ("error", "lightbus")
    if target == "broken:app":
        assert first["exception"].startswith("Traceback")
        assert first["exception"].endswith(first["message"])
    assert ("no_such_module" if target == "broken:app" else "nothing") in first["message"]
    for line in done.stderr.splitlines():
        assert json.loads(line)["level"] in ("error", "info")


@pytest.mark.parametrize("level", ["info", "error"])
def test_the_first_line_has_the_broker_as_a_field_at_each_level(folder: Path, sqlite_url: str, level: str) -> None:
    with worker(folder, sqlite_url, "--json-logs", "--log-level", level) as running:
        running.wait_for("worker of app")
        first = json.loads(running.lines[0])
    assert (first["app"], first["broker"]) == ("billing", f"embedded (SQLite file {folder}/bus.db)")
    assert (first["level"], first["logger"]) == ("info", "lightbus")


def test_several_processes_are_told_apart(folder: Path, sqlite_url: str) -> None:
    with worker(folder, sqlite_url, "--json-logs", "--processes", "2") as running:
        for _ in range(2):
            running.wait_for("Ready")
        assert running.end(signal.SIGTERM) == 0
    lines = read(running)
    assert {line.get("worker") for line in lines if "worker of app" in line["message"]} == {"1", "2"}
    assert all("broker" in line for line in lines if "worker of app" in line["message"])


def test_text_has_a_line_for_each_handled_event_at_level_debug_only(folder: Path, sqlite_url: str) -> None:
    for level in ("info", "debug"):
        with worker(folder, sqlite_url, "--log-level", level) as running:
            running.wait_for("Ready")
            publish(folder, sqlite_url, "1")
            running.wait_for(r"^\S+ \S+ INFO     billing: done$")
            assert running.end(signal.SIGTERM) == 0
        lines = [line for line in running.lines if "handle handled 'invoice.paid' (" in line]
        assert len(lines) == (1 if level == "debug" else 0)
        assert all(" DEBUG    handle handled " in line for line in lines)
