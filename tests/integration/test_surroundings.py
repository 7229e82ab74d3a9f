"""Commands and workers whose stdout or stderr is closed, full, or a pipe without a reader."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightbus.cli import logs, output
from tests.patience import LIMIT, wait_until
from tests.processes import LIGHTBUS, environment, lightbus

BUS = """\
import asyncio, os, pathlib, sys
from lightbus import Lightbus

app = Lightbus("billing")

@app.event
class InvoicePaid:
    number: str

@app.on("invoice.paid")
async def note(invoice: dict):
    pathlib.Path("handled").touch()
    if invoice["number"] == "slow":
        await asyncio.sleep(600)
    if invoice["number"] == "print":
        print("x" * 200_000, flush=True)
"""
FILES = {"bus.py": BUS}


pytestmark = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux' /dev/full")


@pytest.fixture
def url(sqlite_url: str) -> str:
    return sqlite_url


def start(
    folder: Path, url: str, *command: str, redirected: str = "", stdout: int | None = None, stderr: int | None = None
) -> subprocess.Popen[bytes]:
    shell = ("/bin/sh", "-c", f'exec "$@" {redirected}', "sh")
    buffered = {key: value for key, value in environment().items() if key != "PYTHONUNBUFFERED"}
    return subprocess.Popen(
        [*shell, *LIGHTBUS, *command],
        cwd=folder,
        env={**buffered, "LIGHTBUS_URL": url},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL if stdout is None else stdout,
        stderr=subprocess.DEVNULL if stderr is None else stderr,
        start_new_session=True,
    )


@contextlib.contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def full_pipe() -> Iterator[int]:
    """The write end of a full pipe that nobody reads."""
    reading, writing = os.pipe()
    fill(writing)
    yield writing
    os.close(writing)
    os.close(reading)


def fill(writing: int) -> None:
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, b"x" * 1024)
    os.set_blocking(writing, True)


@pytest.mark.parametrize("surroundings", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full", ">/dev/null 2>/dev/full"])
@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("--version", 0),
        ("events bus:app", 0),
        ("publish bus:app invoice.paid number=1", 0),
        ("publish bus:app invoice.paid --jsonl events.jsonl", 0),
        ("publish bus:app invoice.payed", 2),
        ("publish bus:nothing invoice.paid", 2),
        ("nonsense", 2),
        ("health bus:app", 1),
        ("doctor bus:app", 1),
    ],
)
def test_the_exit_code_shows_what_the_command_did(
    folder: Path, url: str, surroundings: str, command: str, code: int
) -> None:
    (folder / "events.jsonl").write_text('{"number": "1"}\n')
    with ended(start(folder, url, *command.split(), redirected=surroundings)) as process:
        assert process.wait(LIMIT) == code


@pytest.mark.parametrize("surroundings", ["2>&-", ">&- 2>&-", "2>/dev/full"])
def test_tail_shows_events_with_closed_or_full_streams(folder: Path, url: str, surroundings: str) -> None:
    with ended(start(folder, url, "tail", "bus:app", "--limit", "1", redirected=surroundings)) as process:

        def is_over() -> bool:
            lightbus("publish", "bus:app", "invoice.paid", "number=1", folder=folder, url=url)
            return process.poll() is not None

        wait_until(is_over, "tail has shown an event")
        assert process.wait() == 0


def test_tail_stops_on_sigterm_even_if_nobody_reads_its_output(folder: Path, url: str, full_pipe: int) -> None:
    with ended(start(folder, url, "tail", "bus:app", stdout=full_pipe, stderr=full_pipe)) as process:

        def is_over() -> bool:
            lightbus("publish", "bus:app", "invoice.paid", "number=1", folder=folder, url=url)
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1.0)
            return process.poll() is not None

        wait_until(is_over, "tail ends")


@pytest.mark.parametrize("options", ["", "--json-logs", "--processes 2", "--reload"])
@pytest.mark.parametrize("surroundings", ["2>&-", ">&- 2>&-", ">/dev/full 2>/dev/full", "not read", "no reader"])
def test_a_worker_handles_events_and_stops_with_closed_or_full_streams(
    folder: Path, url: str, surroundings: str, options: str, full_pipe: int
) -> None:
    command = ("worker", "bus:app", "--log-level", "debug", *options.split())
    if surroundings == "not read":
        process = start(folder, url, *command, stdout=full_pipe, stderr=full_pipe)
    elif surroundings == "no reader":
        reading, writing = os.pipe()
        process = start(folder, url, *command, stderr=writing)
        os.close(reading)
        os.close(writing)
    else:
        process = start(folder, url, *command, redirected=surroundings)
    with ended(process):
        wait_until(lambda: is_ready(folder, url), "a worker consumes")
        assert lightbus("publish", "bus:app", "invoice.paid", "number=1", folder=folder, url=url).returncode == 0
        wait_until((folder / "handled").exists, "the event is handled")
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == 0


def is_ready(folder: Path, url: str) -> bool:
    return lightbus("health", "bus:app", folder=folder, url=url).returncode == 0


def test_a_second_signal_ends_a_worker_even_if_nobody_reads_its_log(folder: Path, url: str, full_pipe: int) -> None:
    with ended(start(folder, url, "worker", "bus:app", stderr=full_pipe)) as process:
        wait_until(lambda: is_ready(folder, url), "a worker consumes")
        lightbus("publish", "bus:app", "invoice.paid", "number=slow", folder=folder, url=url)
        wait_until((folder / "handled").exists, "the event is being handled")

        def is_over() -> bool:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
            return process.poll() is not None

        wait_until(is_over, "the worker ends")
        assert process.wait() == 128 + signal.SIGTERM


def test_a_handler_that_prints_to_a_full_stdout_does_not_prevent_the_stop(
    folder: Path, url: str, full_pipe: int
) -> None:
    with ended(start(folder, url, "worker", "bus:app", "--grace", "0.5", stdout=full_pipe)) as process:
        wait_until(lambda: is_ready(folder, url), "a worker consumes")
        lightbus("publish", "bus:app", "invoice.paid", "number=print", folder=folder, url=url)
        wait_until((folder / "handled").exists, "the event is being handled")
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == 1


# --- stderr itself ----------------------------------------------------------------------------


class Pipe(io.StringIO):
    """A reader that can pause."""

    def __init__(self) -> None:
        super().__init__()
        self.is_read = threading.Event()

    def write(self, text: str) -> int:
        assert self.is_read.wait(LIMIT)
        return super().write(text)


def record(message: str) -> logs.logging.LogRecord:
    return logs.logging.LogRecord("lightbus", logs.logging.INFO, "", 0, message, (), None)


@pytest.mark.parametrize("as_json", [False, True])
def test_dropped_log_lines_are_counted_and_reported(as_json: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "MOST_WAITING", 10)
    monkeypatch.setattr(output, "FLUSH_LIMIT", 0.05)
    pipe = Pipe()
    stderr = output.Stderr(pipe)
    handler = logs.Handler(stderr)
    handler.setFormatter(logs.JSONLines("") if as_json else logs.Lines("", False))
    handler.emit(record("one"))
    handler.flush()
    for number in range(30):
        handler.emit(record(f"number {number}"))
    assert stderr.lost >= 19
    lost = stderr.lost
    pipe.is_read.set()
    wait_until(lambda: stderr.has_room and not stderr.stuck, "it is read")
    monkeypatch.setattr(output, "FLUSH_LIMIT", LIMIT)
    handler.emit(record("last"))
    stderr.flush()
    lines = pipe.getvalue().splitlines()
    assert f"{lost} log lines to stderr were lost" in lines[-2]
    assert "last" in lines[-1]
    assert len(lines) == 1 + (30 - lost) + 2


def test_everything_is_written_before_the_exit(tmp_path: Path) -> None:
    program = (
        "import sys, logging; from lightbus.cli import logs, output; sys.stderr = output.Stderr(sys.stderr); "
        "logs.configure('info'); [logging.info('number %d', n) for n in range(500)]; print('last', file=sys.stderr)"
    )
    done = subprocess.run(
        [LIGHTBUS[0], "-c", program], env=environment(), capture_output=True, text=True, timeout=LIMIT, check=True
    )
    assert [line.rpartition(" ")[2] for line in done.stderr.splitlines()] == [*map(str, range(500)), "last"]


def test_a_forked_process_writes_too(capfd: pytest.CaptureFixture[str]) -> None:
    program = (
        "import os, sys; from lightbus.cli import output; sys.stderr = output.Stderr(sys.stderr); "
        "print('parent', file=sys.stderr, flush=True); pid = os.fork(); "
        "pid and os.waitpid(pid, 0); print('child' if pid == 0 else 'parent again', file=sys.stderr, flush=True)"
    )
    done = subprocess.run(
        [LIGHTBUS[0], "-c", program], env=environment(), capture_output=True, text=True, timeout=LIMIT, check=True
    )
    assert done.stderr == "parent\nchild\nparent again\n"
