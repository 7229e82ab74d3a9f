"""Without LIGHTBUS_URL, the broker is a local file. A warning says so once, and LIGHTBUS_REQUIRE_URL forbids it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import environment, lightbus, working

APP = """\
import sys
from lightbus import Lightbus
app = Lightbus("billing", url=None if len(sys.argv) < 2 or not sys.argv[1].startswith("sqlite") else sys.argv[1])

@app.event
class InvoicePaid:
    id: int

@app.on("invoice.paid")
def handle(invoice: dict): ...

if __name__ == "__main__":
    with app:
        for number in range(3):
            app.publish_sync(InvoicePaid(id=number))
    print("published")
"""
UNSET = "LIGHTBUS_URL is not set: using the embedded broker, a file on this machine"
REFUSED = "LIGHTBUS_REQUIRE_URL is set, so the embedded broker is not allowed"

FILES = {"billing.py": APP}


def _environment(folder: Path, **extra: str) -> dict[str, str]:
    wanted = environment({"XDG_STATE_HOME": str(folder / "state"), **extra})
    return wanted if "LIGHTBUS_URL" in extra else {key: value for key, value in wanted.items() if key != "LIGHTBUS_URL"}


def _run(folder: Path, *words: str, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=_environment(folder, **extra),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("extra", [{}, {"LIGHTBUS_URL": ""}, {"LIGHTBUS_URL": " "}, {"LIGHTBUS_REQUIRE_URL": "0"}])
def test_a_publisher_warns_once_and_names_the_file(folder: Path, extra: dict[str, str]) -> None:
    done = _run(folder, "billing.py", **extra)
    assert (done.returncode, done.stdout) == (0, "published\n")
    assert done.stderr.count(UNSET) == 1
    assert f"{folder}/state/lightbus/bus.db" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_given_url_causes_no_warning(folder: Path) -> None:
    for done in (
        _run(folder, "billing.py", LIGHTBUS_URL=f"sqlite:///{folder}/bus.db"),
        _run(folder, "billing.py", LIGHTBUS_URL="sqlite://", LIGHTBUS_REQUIRE_URL="1"),
        _run(folder, "billing.py", "sqlite://", LIGHTBUS_REQUIRE_URL="1"),
    ):
        assert (done.returncode, done.stdout, done.stderr) == (0, "published\n", "")


def test_with_a_required_url_nothing_starts_without_one(folder: Path) -> None:
    done = _run(folder, "billing.py", LIGHTBUS_REQUIRE_URL="1")
    assert done.returncode == 1
    assert "InvalidURL: LIGHTBUS_URL is not set, and " + REFUSED in done.stderr
    for command in (
        ("worker", "billing:app"),
        ("worker", "billing:app", "--json-logs", "--processes", "2"),
        ("publish", "billing:app", "invoice.paid", "id=1"),
        ("doctor", "billing:app"),
        ("dead", "list", "billing:app"),
        ("health", "billing:app"),
        ("tail",),
    ):
        done = _run(folder, "-m", "lightbus", *command, LIGHTBUS_REQUIRE_URL="1", LIGHTBUS_URL="")
        assert done.returncode == 1, command
        assert f"LIGHTBUS_URL is empty, and {REFUSED}" in done.stderr, command
        assert "Traceback" not in done.stderr
    assert not (folder / "state").exists()


def test_a_test_bus_needs_no_url_even_if_one_is_required(folder: Path) -> None:
    (folder / "test_it.py").write_text(
        "import anyio\nfrom billing import InvoicePaid, app\nfrom lightbus.testing import TestBus\n"
        "async def main():\n    async with TestBus(app) as bus:\n        await app.publish(InvoicePaid(id=1))\n"
        "        await bus.drain()\nanyio.run(main)\n"
    )
    done = _run(folder, "test_it.py", LIGHTBUS_REQUIRE_URL="1")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_workers_first_line_names_its_broker_also_in_json(folder: Path, processes: str) -> None:
    command = [sys.executable, "-m", "lightbus", "worker", "billing:app", "--json-logs", "--processes", processes]
    worker = subprocess.Popen(command, cwd=folder, env=_environment(folder), stderr=subprocess.PIPE, text=True)
    assert worker.stderr is not None
    lines = []
    for line in worker.stderr:
        lines.append(json.loads(line))
        if sum("Ready" in one["message"] for one in lines) == int(processes):
            break
    worker.send_signal(signal.SIGTERM)
    worker.communicate(timeout=60)
    assert "worker of app 'billing' (billing:app) on embedded (SQLite file " in lines[0]["message"]
    assert [one["level"] for one in lines if UNSET in one["message"]] == ["warning"]


def test_a_worker_with_a_url_does_not_warn(folder: Path) -> None:
    url = f"sqlite:///{folder}/bus.db"
    with working("billing:app", folder=folder, url=url) as worker:
        worker.end(signal.SIGTERM)
        assert UNSET not in worker.output
    assert lightbus("publish", "billing:app", "invoice.paid", "id=1", folder=folder, url=url).stderr == ""
    assert os.path.exists(folder / "bus.db")
