"""`lightbus demo` as a separate process."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import amqp.exceptions
import pytest

from lightbus.catalog import storage
from lightbus.cli.demo.services import Services
from lightbus.cli.demo.stopping import Failed
from lightbus.connection.dial import BrokerAddresses
from lightbus.wire.topology import CATALOG
from tests.patience import LIMIT, wait_until
from tests.web.conftest import ask

COMMAND = [sys.executable, "-m", "lightbus", "demo"]


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    """The folder in which the demo creates its own."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    return folder


def start(temporary: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *arguments],
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def processes_of(temporary: Path) -> list[int]:
    """The processes whose working directory is the demo's folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(temporary) in os.readlink(entry / "cwd"):
                found.append(int(entry.name))
    return found


def columns(output: str) -> dict[str, tuple[int, int]]:
    """The table at the end: what -> (handled, expected)."""
    table = output[output.index("expected") :].splitlines()[1:]
    rows = [row.rsplit(maxsplit=2) for row in table[: table.index("")]]
    return {
        what.strip(): (int(handled.replace(",", "")), int(expected.replace(",", "")))
        for what, handled, expected in rows
    }


def test_all_events_are_handled_as_expected(temporary: Path) -> None:
    done = start(temporary)
    output, _ = done.communicate(timeout=3 * LIMIT)
    assert done.returncode == 0, output
    found = columns(output)
    assert found["reviews  commits checked"] == (2000, 2000)
    assert found["of more than 500 lines: review.requested"] == (116, 116)
    assert found["dead letters, kept in inbox.dead"] == (8, 8)
    assert all(handled == expected for handled, expected in found.values())
    assert "attempt 1: MailTooLong" in output
    assert "attempt 3: MailTooLong" in output
    progress = [line for line in output.splitlines() if line.startswith("forge ")]
    assert progress[-1] != progress[-2], "the last line is printed once"
    assert "\x1b" not in output, "colors and cursor movements are for terminals only"
    assert not list(temporary.iterdir())
    assert not processes_of(temporary)


@pytest.mark.rabbitmq
def test_on_rabbitmq_it_handles_the_same_and_deletes_its_queues(temporary: Path, rabbitmq_url: str) -> None:
    done = start(temporary, "--url", rabbitmq_url, "--events", "600")
    output, _ = done.communicate(timeout=3 * LIMIT)
    assert done.returncode == 0, output
    assert all(handled == expected for handled, expected in columns(output).values())
    assert columns(output)["reviews  commits checked"] == (600, 600)
    prefix = next(word for word in output.split() if word.startswith("'demo-")).strip("'").removesuffix("inbox")
    assert leftovers(rabbitmq_url, prefix) == []


@pytest.mark.rabbitmq
def test_an_interrupted_demo_on_rabbitmq_deletes_its_queues(temporary: Path, rabbitmq_url: str) -> None:
    running = start(temporary, "--url", rabbitmq_url)
    seen = ""
    assert running.stdout is not None
    for line in running.stdout:
        seen += line
        if "'demo-" in line:  # a log line of inbox with its app's name
            break
    running.send_signal(signal.SIGINT)
    rest, _ = running.communicate(timeout=LIMIT)
    assert running.returncode == 130, seen + rest
    prefix = next(word for word in seen.split() if word.startswith("'demo-")).strip("'").removesuffix("inbox")
    assert leftovers(rabbitmq_url, prefix) == []


def leftovers(url: str, prefix: str) -> list[str]:
    """The demo's queues and exchanges that still exist, and the stream that its contracts would be in."""
    connection = BrokerAddresses.parse(url).connect("test")
    found = []
    with contextlib.suppress(amqp.exceptions.NotFound):
        connection.channel().queue_declare(CATALOG, passive=True)
        found.append(f"queue {CATALOG}")
    for app in ("forge", "stats", "reviews", "inbox"):
        for name in (f"{prefix}{app}.main", f"{prefix}{app}.dead", f"{prefix}{app}.retry.1s"):
            with contextlib.suppress(amqp.exceptions.NotFound):
                connection.channel().queue_declare(name, passive=True)
                found.append(f"queue {name}")
        for name in (f"{prefix}{app}", f"{prefix}{app}.internal"):
            with contextlib.suppress(amqp.exceptions.NotFound):
                connection.channel().exchange_declare(name, "topic", passive=True)
                found.append(f"exchange {name}")
    connection.close()
    return found


@pytest.mark.parametrize(
    ("how", "moment"),
    [
        (signal.SIGINT, 0.6),
        (signal.SIGINT, 1.2),
        (signal.SIGINT, 3.0),
        (signal.SIGTERM, 1.5),
        (signal.SIGHUP, 2.0),
    ],
)
def test_an_interrupted_demo_leaves_nothing_behind(temporary: Path, how: signal.Signals, moment: float) -> None:
    running = start(temporary)
    time.sleep(moment * random.uniform(0.8, 1.2))
    running.send_signal(how)
    output, _ = running.communicate(timeout=LIMIT)
    before_our_code = running.returncode == 1 and "KeyboardInterrupt" in output and "lightbus" not in output
    assert running.returncode in (130, -how) or before_our_code, output  # the last two if Python was starting
    assert not list(temporary.iterdir())
    assert not processes_of(temporary)


def test_a_killed_service_ends_the_demo_with_an_error(temporary: Path) -> None:
    running = start(temporary)
    wait_until(lambda: len(processes_of(temporary)) >= 3, "all services run")
    os.kill(processes_of(temporary)[0], signal.SIGKILL)
    output, _ = running.communicate(timeout=LIMIT)
    assert running.returncode == 1, output
    assert "ended with status -9" in output
    assert not list(temporary.iterdir())
    assert not processes_of(temporary)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("amqp://127.0.0.1:1", "Is the broker running there?"),
        ("redis://localhost", "is not supported"),
        ("nonsense", "is not a broker URL"),
        ("memory://", "within one process"),
    ],
)
def test_an_invalid_url_is_explained(temporary: Path, url: str, expected: str) -> None:
    done = start(temporary, "--url", url)
    output, _ = done.communicate(timeout=LIMIT)
    assert done.returncode in (1, 2)
    assert expected in " ".join(output.split())
    assert "Traceback" not in output
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("kind", ["embedded", pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)])
def test_with_web_a_page_shows_the_services_until_ctrl_c(
    temporary: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    url: str = request.getfixturevalue("rabbitmq_url") if kind == "rabbitmq" else ""
    running = start(temporary, "--web", *(["--url", url] if url else []))
    assert running.stdout is not None
    address, seen = "", ""
    for line in running.stdout:
        seen += line
        if line.startswith("Page: "):
            address = line.split()[1]
            break
    assert address, seen
    # The workers publish their contracts in the background.
    wait_until(lambda: "4 apps" in ask(f"{address}apps").text, "all contracts")
    page = ask(f"{address}apps").text
    prefix = re.findall(r"/apps/([\w-]*)inbox", page)[0]
    assert all(f">{prefix}{app}<" in page for app in ("forge", "stats", "reviews", "inbox"))
    wait_until(lambda: "MailTooLong" in ask(f"{address}dead/{prefix}inbox").text, "a dead letter to retry")
    running.send_signal(signal.SIGINT)
    rest, _ = running.communicate(timeout=LIMIT)
    assert running.returncode == 0, seen + rest
    assert rest.splitlines()[-1] == "Stopped."
    assert not list(temporary.iterdir())
    assert not processes_of(temporary)
    if url:
        assert leftovers(url, prefix) == [f"queue {CATALOG}"]
        assert storage.read(BrokerAddresses.parse(url)).contracts == []


def test_a_contract_that_cannot_be_published_ends_the_page(tmp_path: Path) -> None:
    services = Services(tmp_path, "amqp://127.0.0.1:1/", "demo-1-")
    with pytest.raises(Failed, match=r"(?s)contract publish forge:app ended with status 1\..*Connection refused"):
        services.contract("publish", "forge")
    assert services.processes == {}
