"""`lightbus worker` as real processes: started, stopped, killed and reloaded."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator
from pathlib import Path

import anyio
import pytest

from lightbus import Lightbus, errors
from lightbus.worker.worker import serve
from tests.bus import take_all
from tests.patience import LIMIT, wait_until, within
from tests.processes import ROOT, Program, alive, lightbus, working

BUS = """\
import os, threading, time
import anyio
from lightbus import Lightbus, Message, Retry

app = Lightbus("billing", retry=Retry.none())

@app.event
class InvoicePaid:
    number: str

@app.event
class Block:
    seconds: float

@app.on(InvoicePaid)
async def handle(paid: InvoicePaid, message: Message):
    print(f"began {paid.number} in {os.getpid()}", flush=True)
    while paid.number == "slow" and not os.path.exists("let-go"):
        await anyio.sleep(0.02)
    if paid.number == "bad":
        raise LookupError("no such invoice")
    if paid.number == "evil":
        raise LookupError("\\x1b[2J\\a\\b\\r\\x7f\\x9b31m\\u202e caf\\u00e9:\\n\\tsecond line")
    print(f"ended {paid.number} redelivered={message.redelivered}", flush=True)

@app.on(Block)
async def block(event: Block):
    print("blocking now", flush=True)
    time.sleep(event.seconds)

@app.on("thread.stuck", queue="threads")
def plain(event: dict):
    print("plain", flush=True)
"""

each_backend = pytest.mark.parametrize("backend", ["asyncio", "trio"])


FILES = {"billing/bus.py": BUS}


def worker(folder: Path, url: str, *options: str) -> Program:
    return Program("worker", "billing.bus:app", *options, folder=folder, url=url)


def publish(folder: Path, url: str, *arguments: str) -> None:
    done = lightbus("publish", "billing.bus:app", *arguments, folder=folder, url=url)
    assert done.returncode == 0, done.stderr


@each_backend
def test_a_worker_handles_events_and_finishes_running_handlers_on_sigterm(folder: Path, url: str, backend: str) -> None:
    with worker(folder, url, "--backend", backend) as running:
        running.wait_for("Ready")
        publish(folder, url, "invoice.paid", "number=slow")
        running.wait_for("began slow")
        running.signal(signal.SIGTERM)
        running.wait_for(r"Stopping \(SIGTERM\): 1 handler in flight, up to 30 s. Press Ctrl-C again")
        (folder / "let-go").touch()
        assert running.end() == 0
    assert "ended slow redelivered=False" in running.output
    with worker(folder, url, "--backend", backend) as again:  # it was settled: nothing comes again
        again.wait_for("Ready")
        publish(folder, url, "invoice.paid", "number=next")
        again.wait_for("ended next")
        assert again.end(signal.SIGINT) == 0
    assert "slow" not in again.output


@each_backend
def test_handlers_that_outlast_the_grace_time_are_named_and_delivered_again(
    folder: Path, url: str, backend: str
) -> None:
    with worker(folder, url, "--backend", backend, "--grace", "0.2") as running:
        running.wait_for("Ready")
        publish(folder, url, "invoice.paid", "number=slow")
        running.wait_for("began slow")
        assert running.end(signal.SIGTERM) == 1
    assert "Not finished within 0.2 s: handle (1). Its event will be redelivered." in running.output
    (folder / "let-go").touch()
    with worker(folder, url, "--backend", backend) as again:
        again.wait_for("ended slow redelivered=True")


@each_backend
def test_a_second_signal_ends_a_worker_with_a_blocked_event_loop(folder: Path, sqlite_url: str, backend: str) -> None:
    with worker(folder, sqlite_url, "--backend", backend) as running:
        running.wait_for("Ready")
        publish(folder, sqlite_url, "block", "seconds=600")
        running.wait_for("blocking now")
        running.signal(signal.SIGINT)
        running.signal(signal.SIGINT)  # a repeated signal, as `timeout` sends it, is ignored
        running.wait_for("Stopping .*: 1 handler in flight")
        time.sleep(0.5)  # longer than SIGNAL_REPEAT
        with within(0):  # the grace period is 30 s
            assert running.end(signal.SIGINT) == 130
    assert "Stopped at once" in running.output
    assert "Traceback" not in running.output


@each_backend
def test_a_worker_with_a_blocked_event_loop_ends_after_the_grace_period(
    folder: Path, sqlite_url: str, backend: str
) -> None:
    with worker(folder, sqlite_url, "--backend", backend, "--grace", "0.3") as running:
        running.wait_for("Ready")
        publish(folder, sqlite_url, "block", "seconds=600")
        running.wait_for("blocking now")
        assert running.end(signal.SIGTERM) == 1
    assert "Not finished within 0.3 s: block (1)" in running.output


@each_backend
def test_a_worker_retries_an_unreachable_broker_and_ctrl_c_stops_it(folder: Path, backend: str) -> None:
    with worker(folder, "amqp://me:geheim@127.0.0.1:1/", "--backend", backend) as running:
        running.wait_for("Connection refused.*Trying again")
        running.wait_for("Connection refused.*Trying again")
        assert running.end(signal.SIGINT) == 0
    assert "geheim" not in running.output
    assert "Traceback" not in running.output


@pytest.mark.rabbitmq
@pytest.mark.parametrize("options", [(), ("--processes", "2")])
def test_a_wrong_password_is_reported_once_and_exits_with_1(
    folder: Path, rabbitmq_url: str, options: tuple[str, ...]
) -> None:
    with worker(folder, rabbitmq_url.replace("guest:guest", "guest:geheim"), *options) as running:
        assert running.end() == 1
    assert running.output.count("refused the user name or password") == 1
    assert "geheim" not in running.output
    assert "guest:**@" in running.output
    assert "Traceback" not in running.output


def test_only_the_given_queues_are_consumed(folder: Path, sqlite_url: str) -> None:
    with worker(folder, sqlite_url, "--queue", "threads", "--prefetch", "7", "--concurrency", "3") as running:
        running.wait_for(r"billing.threads\s+prefetch 7\s+concurrency 3")
        running.wait_for("Ready")
        assert "-> handle" not in running.output
        assert "-> plain" in running.output
    done = lightbus("worker", "billing.bus:app", "--queue", "nope", folder=folder, url=sqlite_url)
    assert done.returncode == 2
    assert done.stderr == "Error: app 'billing' has no queue 'nope'. It has: main, threads.\n"


def test_a_killed_worker_is_replaced_and_all_stop_on_sigterm(folder: Path, url: str) -> None:
    with worker(folder, url, "--processes", "2") as running:
        running.wait_for("Ready")
        running.wait_for("Ready")
        publish(folder, url, "invoice.paid", "number=1")
        pid = int(running.wait_for(r"began 1 in (\d+)")[1])
        os.kill(pid, signal.SIGKILL)
        running.wait_for(rf"pid {pid}\) was ended by signal 9 \(SIGKILL\); starting another one in 0.5 s")
        running.wait_for("Ready")
        publish(folder, url, "invoice.paid", "number=2")
        running.wait_for("ended 2")
        assert running.end(signal.SIGTERM) == 0


def test_workers_stop_when_their_supervisor_is_killed(folder: Path, sqlite_url: str) -> None:
    with worker(folder, sqlite_url, "--processes", "2") as running:
        running.wait_for("Ready")
        running.wait_for("Ready")
        publish(folder, sqlite_url, "invoice.paid", "number=1")
        pid = int(running.wait_for(r"began 1 in (\d+)")[1])
        running.signal(signal.SIGKILL)
        running.wait_for("the supervisor has exited")
        running.wait_for("the supervisor has exited")
        wait_until(lambda: not alive(pid), "the worker has ended")


def test_ctrl_c_in_a_terminal_counts_once_for_workers_and_supervisor(folder: Path, sqlite_url: str) -> None:
    with worker(folder, sqlite_url, "--processes", "2") as running:
        running.wait_for("Ready")
        running.wait_for("Ready")
        publish(folder, sqlite_url, "invoice.paid", "number=slow")
        running.wait_for("began slow")
        os.killpg(running.process.pid, signal.SIGINT)  # Ctrl-C in a terminal reaches the whole process group
        running.wait_for(r"\] Stopping \(asked by the supervisor\): 1 handler in flight")
        (folder / "let-go").touch()
        running.wait_for("ended slow")
        assert running.end() == 0


def test_a_second_ctrl_c_ends_supervisor_and_blocked_workers(folder: Path, sqlite_url: str) -> None:
    with worker(folder, sqlite_url, "--processes", "2") as running:
        running.wait_for("Ready")
        running.wait_for("Ready")
        publish(folder, sqlite_url, "block", "seconds=600")
        running.wait_for("blocking now")
        os.killpg(running.process.pid, signal.SIGINT)
        running.wait_for("1 handler in flight")
        time.sleep(0.5)  # longer than SIGNAL_REPEAT
        os.killpg(running.process.pid, signal.SIGINT)
        assert running.end() == 130


@pytest.mark.parametrize("options", [(), ("--processes", "2"), ("--reload",)])
def test_ctrl_c_during_startup_shows_no_traceback(folder: Path, sqlite_url: str, options: tuple[str, ...]) -> None:
    with (folder / "billing" / "bus.py").open("a") as source:
        source.write("print('importing', flush=True)\ntime.sleep(60)\n")
    with worker(folder, sqlite_url, *options) as running:
        running.wait_for("importing")
        os.killpg(running.process.pid, signal.SIGINT)
        assert running.end() in ((0,) if options else (1, 130))
    assert "Traceback" not in running.output


def test_reload_finishes_running_handlers_then_runs_the_new_code(folder: Path, sqlite_url: str) -> None:
    source = folder / "billing" / "bus.py"
    with worker(folder, sqlite_url, "--reload") as running:
        running.wait_for("Ready")
        publish(folder, sqlite_url, "invoice.paid", "number=slow")
        running.wait_for("began slow")
        source.write_text(BUS.replace('f"ended', 'f"newly ended'))
        running.wait_for(r"billing/bus.py changed: starting again")
        running.wait_for("1 handler in flight")
        (folder / "let-go").touch()
        running.wait_for("^ended slow")
        running.wait_for("Ready")
        publish(folder, sqlite_url, "invoice.paid", "number=2")
        running.wait_for("^newly ended 2")
        source.write_text("def (")
        running.wait_for("SyntaxError: invalid syntax")
        running.wait_for("waiting for a change in")
        source.write_text(BUS.replace('f"ended', 'f"at last ended'))
        running.wait_for("Ready")
        publish(folder, sqlite_url, "invoice.paid", "number=3")
        running.wait_for("^at last ended 3")
        assert running.end(signal.SIGINT) == 0


def test_reload_watches_included_modules_of_other_folders(
    folder: Path, sqlite_url: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("RF")  # letters that are messages to the supervisor, too
    handlers = other / "shared_handlers.py"
    text = "from billing.bus import app\n@app.on('a.b')\ndef shared(event: dict): ...\nprint('VERSION 0', flush=True)\n"
    handlers.write_text(text)
    (folder / "billing" / "bus.py").write_text(BUS.replace("Retry.none()", "Retry.none(), include=['shared_handlers']"))
    path = {"PYTHONPATH": f"{ROOT}{os.pathsep}{other}"}
    with Program("worker", "billing.bus:app", "--reload", folder=folder, url=sqlite_url, extra=path) as running:
        running.wait_for("VERSION 0")
        running.wait_for("Ready")
        versions = itertools.count(1)

        def changed() -> bool:
            """Save it, as an editor does, until it is noticed: the watch begins after the worker is ready."""
            new = other / "new"
            new.write_text(text.replace("VERSION 0", f"VERSION {next(versions)}"))
            new.replace(handlers)
            time.sleep(0.5)  # changes within 0.4 s are one
            return "shared_handlers.py changed: starting again." in running.output

        wait_until(changed, "a change is noticed")
        running.wait_for(r"VERSION [1-9]")
        running.wait_for("Ready")
        assert running.end(signal.SIGINT) == 0


def test_reload_watches_an_included_module_that_cannot_be_imported(
    folder: Path, sqlite_url: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("shared")
    handlers = other / "shared_handlers.py"
    handlers.write_text("from billing.bus import\n")
    (folder / "billing" / "bus.py").write_text(BUS.replace("Retry.none()", "Retry.none(), include=['shared_handlers']"))
    path = {"PYTHONPATH": f"{ROOT}{os.pathsep}{other}"}
    with Program("worker", "billing.bus:app", "--reload", folder=folder, url=sqlite_url, extra=path) as running:
        running.wait_for("waiting for a change")
        versions = itertools.count(1)

        def changed() -> bool:
            """Save it until that is noticed: the watch begins at about the same time as the message."""
            handlers.write_text(f"print('VERSION {next(versions)}', flush=True)\n")
            time.sleep(0.5)  # changes within 0.4 s are one
            return "shared_handlers.py changed: starting again." in running.output

        wait_until(changed, "a change is noticed")
        running.wait_for("Ready")
        assert running.end(signal.SIGINT) == 0


def test_reload_without_watchfiles_names_the_extra(folder: Path, sqlite_url: str) -> None:
    (folder / "watchfiles.py").write_text("raise ImportError('not installed')")
    done = lightbus("worker", "billing.bus:app", "--reload", folder=folder, url=sqlite_url)
    assert done.returncode == 1
    assert done.stderr == "Error: --reload needs watchfiles: pip install watchfiles\n"


def test_json_logs_are_one_object_per_line(folder: Path, sqlite_url: str) -> None:
    with worker(folder, sqlite_url, "--json-logs") as running:
        running.wait_for("Ready")
        publish(folder, sqlite_url, "invoice.paid", "number=bad")
        running.wait_for("dead-lettered")
        assert running.end(signal.SIGTERM) == 0
    records = [json.loads(line) for line in running.lines if not line.startswith("began")]
    assert {"time", "level", "logger", "message", "app", "broker"} == set(records[0])
    assert {"time", "level", "logger", "message"} == set(records[1])
    (failure,) = [record for record in records if record["level"] == "error"]
    assert (failure["handler"], failure["event"], failure["outcome"]) == ("handle", "invoice.paid", "dead")
    assert "LookupError: no such invoice" in failure["exception"]


def test_a_dead_letter_is_logged_with_its_traceback_and_without_colors(folder: Path, sqlite_url: str) -> None:
    with worker(folder, sqlite_url) as running:
        running.wait_for("Ready")
        publish(folder, sqlite_url, "invoice.paid", "number=bad")
        moment, event = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}", r"'invoice\.paid' \([-0-9a-f]{36}\)"
        running.wait_for(rf"^{moment} ERROR    handle failed on {event} in .*dead-lettered")
        running.wait_for("LookupError: no such invoice")
        assert running.end(signal.SIGTERM) == 0
    assert "\x1b" not in running.output


def test_control_characters_of_an_error_are_escaped_in_logs(folder: Path, sqlite_url: str) -> None:
    with worker(folder, sqlite_url) as running:
        running.wait_for("Ready")
        publish(folder, sqlite_url, "invoice.paid", "number=evil")
        running.wait_for(r"LookupError: \\x1b\[2J\\x07\\x08\\r\\x7f\\x9b31m\\u202e caf\u00e9:$")
        running.wait_for("^    \tsecond line$")
        assert running.end(signal.SIGTERM) == 0
    assert running.output.replace("\n", "").replace("\t", "").isprintable()


def test_control_characters_of_an_error_are_escaped_in_json_logs(folder: Path, sqlite_url: str) -> None:
    with worker(folder, sqlite_url, "--json-logs") as running:
        running.wait_for("Ready")
        publish(folder, sqlite_url, "invoice.paid", "number=evil")
        line = running.wait_for(r"^.*dead-lettered.*caf\u00e9.*$")[0]
        assert running.end(signal.SIGTERM) == 0
    assert line.isprintable()
    text = "LookupError: \x1b[2J\a\b\r\x7f\x9b31m\u202e caf\u00e9:\n\tsecond line"
    assert json.loads(line)["exception"].endswith(text)


def test_colors_on_a_terminal_unless_no_color_is_set(folder: Path, sqlite_url: str) -> None:
    assert "\x1b[1m" in _banner_on_a_terminal(folder, sqlite_url, {"TERM": "xterm"})
    assert "\x1b" not in _banner_on_a_terminal(folder, sqlite_url, {"TERM": "xterm", "NO_COLOR": "1"})


def _banner_on_a_terminal(folder: Path, url: str, extra: dict[str, str]) -> str:
    import pty
    import sys

    from tests.processes import environment

    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "lightbus", "worker", "billing.bus:app"],
        cwd=folder,
        env=environment({"LIGHTBUS_URL": url, **extra}),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    try:
        while b"Ready" not in shown:
            shown += os.read(ours, 4096)
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(OSError):  # the worker has exited, which closes its end of the terminal
            while more := os.read(ours, 4096):
                shown += more
        assert process.wait(LIMIT) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    return shown.decode()


# --- serve, in other programs -----------------------------------------------------------------


@each_backend
def test_serve_runs_within_the_lifespan_and_stops_when_asked(broker_url: str, backend: str) -> None:
    story: list[str] = []

    @contextlib.asynccontextmanager
    async def lifespan(app: Lightbus) -> AsyncGenerator[None]:
        story.append(f"{app.name} up")
        yield
        story.append("down")

    app = Lightbus("billing", url=broker_url, lifespan=lifespan)

    @app.event
    class Ping:
        number: int

    async def main() -> None:
        stop, started, handled = anyio.Event(), anyio.Event(), anyio.Event()

        @app.on(Ping)
        async def handle(event: dict[str, int]) -> None:
            story.append(f"handled {event['number']}")
            handled.set()

        async with anyio.create_task_group() as tasks:

            async def run() -> None:
                story.append(f"all ended: {await serve(app, stop=stop, on_started=started.set)}")

            tasks.start_soon(run)
            with anyio.fail_after(LIMIT):
                await started.wait()
                await app.publish(Ping(number=1))
                await handled.wait()
                stop.set()

    anyio.run(main, backend=backend)
    assert story == ["billing up", "handled 1", "down", "all ended: True"]


@each_backend
def test_serve_raises_permanent_errors_unwrapped(backend: str, tmp_path: Path) -> None:
    (tmp_path / "bus.db").write_bytes(b"not a database, and not empty either" * 100)
    app = Lightbus("billing", url=f"sqlite:///{tmp_path}/bus.db")
    with pytest.raises(errors.BrokerFileError, match=re.escape(str(tmp_path))):
        anyio.run(serve, app, backend=backend)


@each_backend
def test_serve_raises_the_error_of_the_lifespan(backend: str, sqlite_url: str) -> None:
    @contextlib.asynccontextmanager
    async def lifespan(app: Lightbus) -> AsyncGenerator[None]:
        raise ConnectionError("no database")
        yield

    app = Lightbus("billing", url=sqlite_url, lifespan=lifespan)
    with pytest.raises(ConnectionError, match="no database"):
        anyio.run(serve, app, backend=backend)


@each_backend
def test_an_invalid_grace_period_is_refused(backend: str) -> None:
    async def main() -> None:
        await serve(Lightbus("billing"), grace=-1)

    with pytest.raises(errors.InvalidOption, match="grace=-1"):
        anyio.run(main, backend=backend)


# --- a worker that ends without a stop ----------------------------------------------------------

SERVE = """\
import asyncio, sys, time
import anyio
from lightbus import Lightbus, Retry
from lightbus.worker import serve

app = Lightbus("billing", retry=Retry.none())

@app.event
class InvoicePaid:
    number: int

@app.on(InvoicePaid)
async def handle(paid: InvoicePaid):
    print("blocking now", flush=True)
    while True:
        time.sleep(0.01)

async def main():
    async with anyio.create_task_group() as tasks:
        started = anyio.Event()
        async def publish():
            await started.wait()
            await app.publish(InvoicePaid(number=1))
        tasks.start_soon(publish)
        await serve(app, on_started=started.set)

def run():
    match sys.argv[1]:
        case "asyncio.run":
            asyncio.run(main())
        case "an event loop":
            asyncio.new_event_loop().run_until_complete(main())
        case backend:
            anyio.run(main, backend=backend)

if __name__ == "__main__":
    run()
"""


@pytest.mark.parametrize("how", ["asyncio.run", "an event loop", "trio"])
def test_ctrl_c_during_a_handler_of_serve_does_not_fail_its_event(tmp_path: Path, sqlite_url: str, how: str) -> None:
    tmp_path.joinpath("serving.py").write_text(SERVE)
    with Program("serving.py", how, folder=tmp_path, url=sqlite_url, program=(sys.executable,)) as program:
        program.wait_for("blocking now")

        def ended() -> bool:  # asyncio.run turns the first Ctrl-C into a cancellation, which the handler suppresses
            program.signal(signal.SIGINT)
            return program.process.poll() is not None

        wait_until(ended, "the end")
        assert program.end() != 0
    app = Lightbus("billing", url=sqlite_url)
    assert len(take_all(app, "billing.main")) == 1
    assert take_all(app, "billing.dead") == []


ENDING = """\
import asyncio, sys
from lightbus import Lightbus

app = Lightbus("billing")
kept = []

@app.event
class InvoicePaid:
    number: int

async def leave():
    sys.exit(0)

@app.on(InvoicePaid)
async def handle(paid: InvoicePaid):
    kept.append(asyncio.create_task(leave()))
    await asyncio.sleep(3600)
"""


def test_a_worker_ended_by_a_users_task_does_not_exit_with_0(tmp_path: Path, sqlite_url: str) -> None:
    tmp_path.joinpath("ending.py").write_text(ENDING)
    with working("ending:app", folder=tmp_path, url=sqlite_url) as program:
        done = lightbus("publish", "ending:app", "invoice.paid", '{"number": 1}', folder=tmp_path, url=sqlite_url)
        assert done.returncode == 0, done.stderr
        assert program.end() == 1
        assert "ERROR    The worker failed while it ran." in program.output
    app = Lightbus("billing", url=sqlite_url)
    assert len(take_all(app, "billing.main")) == 1
    assert take_all(app, "billing.dead") == []


@pytest.mark.parametrize(
    ("holds", "what"),
    [
        ("atexit.register(time.sleep, 60)", "exit handlers of Python (atexit): an exporter, perhaps."),
        ("threading.Thread(target=time.sleep, args=[60], name='one').start()", "threads that do not stop: one."),
    ],
)
def test_what_holds_up_the_exit_is_named(holds: str, what: str) -> None:
    code = f"""
import atexit, logging, threading, time
from lightbus.worker import process
logging.basicConfig()
process.LAST_STEPS = 1.0
{holds}
process.leave_process(3)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT, check=False)
    assert (done.returncode, done.stderr) == (3, f"WARNING:lightbus:Not waiting for {what}\n")


def test_telemetry_is_sent_although_the_logs_cannot_be_written() -> None:
    code = """
import logging, os, time
from lightbus import exit_handlers
from lightbus.worker import process

class Stuck(logging.Handler):
    def flush(self):
        time.sleep(60)

logging.getLogger().addHandler(Stuck())
exit_handlers.before_exit.append(lambda: os.write(1, b"sent"))
process.FLUSH_LIMIT, process.LAST_STEPS = 0.1, 100.0
process.leave_process(3)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT, check=False)
    assert (done.returncode, done.stdout) == (3, "sent")
