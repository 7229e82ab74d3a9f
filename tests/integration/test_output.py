"""Commands with a closed pipe or a full disk as stdout: the exit code shows what they did."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from lightbus import Lightbus
from lightbus.connection.declare import declare
from lightbus.wire import topology
from tests.bus import connected
from tests.patience import LIMIT
from tests.processes import LIGHTBUS, environment

BUS = """\
from lightbus import Lightbus

app = Lightbus("billing")

@app.event
class InvoicePaid:
    number: str

hearing = Lightbus("stats")

@hearing.on("invoice.paid")
async def count(invoice: dict): ...
"""

FILES = {"bus.py": BUS}


@pytest.fixture
def url(sqlite_url: str) -> str:
    """The URL of a broker on which `billing` has published before."""
    with connected(sqlite_url) as connection:
        declare(connection, topology.publishing("billing"))
    return sqlite_url


def run(
    folder: Path, url: str, stdout: int, *command: str, stderr: int = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    # As for users: text that could not be written is still in Python's buffer at the exit.
    buffered = {key: value for key, value in environment().items() if key != "PYTHONUNBUFFERED"}
    return subprocess.run(
        [*LIGHTBUS, *command],
        cwd=folder,
        env={**buffered, "LIGHTBUS_URL": url},
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        text=True,
        timeout=LIMIT,
        check=False,
    )


def without_a_reader(folder: Path, url: str, *command: str) -> subprocess.CompletedProcess[str]:
    """As in `lightbus ... | true`."""
    ours, theirs = os.pipe()
    os.close(ours)
    try:
        return run(folder, url, theirs, *command)
    finally:
        os.close(theirs)


def on_a_full_disk(folder: Path, url: str, *command: str, both: bool = False) -> subprocess.CompletedProcess[str]:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs Linux' /dev/full")
    with open("/dev/full", "wb") as full:
        return run(folder, url, full.fileno(), *command, stderr=full.fileno() if both else subprocess.PIPE)


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("publish bus:app invoice.paid number=1", 0),
        ("publish bus:app invoice.paid number=1 --json", 0),
        ("publish bus:app invoice.paid --jsonl events.jsonl", 0),
        ("events bus:app", 0),
        ("events bus:app --json", 0),
        ("schema bus:app", 0),
        ("topology bus:app", 0),
        ("topology bus:app --json", 0),
        ("topology bus:app --format mermaid", 0),
        ("topology bus:app --format svg", 0),
        ("topology permissions bus:app", 0),
        ("topology permissions bus:app --json", 0),
        ("topology permissions bus:app --format artemis", 0),
        ("topology artemis", 0),
        ("doctor bus:app", 0),
        ("doctor bus:app --json", 0),
        ("doctor bus:hearing", 1),
        ("doctor bus:hearing --json", 1),
        ("health bus:app", 0),
        ("health bus:app --json", 0),
        ("health bus:hearing --json", 1),
    ],
)
def test_the_exit_code_does_not_depend_on_the_reader_of_the_output(
    folder: Path, url: str, command: str, code: int
) -> None:
    (folder / "events.jsonl").write_text('{"number": "1"}\n')
    done = without_a_reader(folder, url, *command.split())
    assert (done.returncode, done.stderr) == (code, "")


@pytest.mark.parametrize(
    "command", ["events bus:app", "schema bus:app", "topology bus:app --json", "doctor bus:app", "health bus:app"]
)
def test_output_that_cannot_be_written_is_an_error(folder: Path, url: str, command: str) -> None:
    done = on_a_full_disk(folder, url, *command.split())
    assert done.returncode == 1
    assert done.stderr == "Error: the output cannot be written: No space left on device. It is incomplete.\n"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("number=1", r"Published invoice.paid [0-9a-f-]{36}: confirmed, .*\."),
        ("number=1 --json", r'\{"id": "[0-9a-f-]{36}", "event": "invoice.paid", "routed": false\}'),
        ("--jsonl events.jsonl", r"Published 1 of 1 line in .*; no queue is bound for it\."),
    ],
)
def test_an_event_is_published_even_if_the_report_cannot_be_written(
    folder: Path, url: str, options: str, expected: str
) -> None:
    (folder / "events.jsonl").write_text('{"number": "1"}\n')
    done = on_a_full_disk(folder, url, "publish", "bus:app", "invoice.paid", *options.split())
    assert done.returncode == 0
    assert re.fullmatch(rf"Not written to stdout \(No space left on device\): {expected}\n", done.stderr)


def test_an_event_is_published_even_if_stdout_and_stderr_are_full(folder: Path, url: str) -> None:
    done = on_a_full_disk(folder, url, "publish", "bus:app", "invoice.paid", "number=1", both=True)
    assert done.returncode == 0


def test_a_purge_is_done_even_if_nobody_reads_its_output(folder: Path, url: str) -> None:
    with connected(url) as connection:
        declare(connection, Lightbus("stats").topology())
    done = without_a_reader(folder, url, "dead", "purge", "bus:hearing", "--all", "--yes")
    assert (done.returncode, done.stderr) == (0, "")
