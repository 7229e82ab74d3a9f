"""`lightbus demo`: three services, three processes, and a real file of commits.

The demo only watches: it starts the services (docs/examples/demo), reads what they have written down, and asks
the broker what is waiting. What should have been handled it works out from the file by itself.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import Any

import amqp.exceptions
import attrs
import click

import lightbus
from lightbus import errors
from lightbus.connection.diagnosis import LOST
from lightbus.connection.dial import BrokerAddresses
from lightbus.transport import Connection
from lightbus.wire.topology import Topology

LISTENERS = ("stats", "reviews", "inbox")
PUBLISHER = "forge"
START_LIMIT = 20.0
"""Seconds for the workers to start."""
LIMIT = 50.0
"""Seconds for all of it: what has not been handled then never will be."""
STEADY, STUCK = 0.5, 5.0
"""Seconds without a change and with empty queues, after which all is done: where the columns are equal (so that
what comes too often would show), and where they are not (a busy machine may hold a service up)."""
LARGE, TOO_LONG = 500, 3_000
"""Lines: what reviews.py calls large, and what inbox.py cannot deliver."""


EPILOG = """\b
Examples:
  lightbus demo
  lightbus demo --events 200
  lightbus demo --url amqp://guest:guest@localhost:5672/

\b
Exit codes:
  0    every service handled the expected events
  1    they did not, or the broker is not usable
  2    the command line is invalid
  130  interrupted
"""


@click.command(short_help="Run three services on 2,000 real commits.", epilog=EPILOG)
@click.option(
    "--url",
    metavar="URL",
    help="A broker, for example amqp://localhost. Default: the embedded broker, in a temporary folder.",
)
@click.option(
    "--events", type=click.IntRange(min=1), metavar="N", help="Publish the first N commits only. The file has 2,000."
)
@click.option("--no-color", is_flag=True, help="No colors. Output to a file or a pipe never has colors.")
def demo(url: str | None, events: int | None, no_color: bool) -> None:
    """Run three services on 2,000 real commits.

    forge publishes commit.pushed; stats counts commits; reviews publishes review.requested for large commits, and inbox
    handles it. Each runs in its own `lightbus worker` process. inbox fails on purpose for some events, to show retries
    and dead letters.

    The demo ends with a table that compares the handled events with the expected ones.

    With --url, the demo's queues and exchanges have names unique to this run, and are deleted at the end. (The bus
    exchange, `lightbus`, stays. Apps on that virtual host that subscribe to `#` receive the demo's events, too.)
    """
    if url is not None and url.startswith("memory:"):
        raise click.UsageError("memory:// works within one process; the demo has four. Omit --url, or use RabbitMQ.")
    lines = (_services() / "commits.jsonl").read_bytes().splitlines(keepends=True)
    screen = Screen(terminal=sys.stdout.isatty(), color=False if no_color or "NO_COLOR" in os.environ else None)
    with Stopping() as stopping, _temporary_folder() as folder:
        run = Run(
            folder=folder,
            url=url or f"sqlite:///{folder}/bus.db",
            prefix=f"demo-{uuid.uuid4().hex[:6]}-" if url else "",
            lines=lines[:events],
            screen=screen,
            stopping=stopping,
        )
        try:
            equal = run.play()
        except Stopped:
            screen.keep()
            screen.say("Stopped.")
            sys.exit(130)
        except (Failed, errors.LightbusError) as error:
            screen.keep()
            screen.say(f"The demo failed: {error}", fg="red")
            sys.exit(1)
    sys.exit(0 if equal else 1)


def _services() -> Path:
    """The folder of the services: docs/examples/demo in a clone, which the wheel has as lightbus/_demo."""
    package = Path(lightbus.__file__).parent
    installed = package / "_demo"
    return installed if installed.exists() else package.parent / "docs" / "examples" / "demo"


@contextlib.contextmanager
def _temporary_folder() -> Generator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="lightbus-demo-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Stopped(Exception):
    """Somebody pressed Ctrl-C."""


class Failed(Exception):
    """The demo cannot go on."""


class Stopping:
    """Ctrl-C, SIGTERM and a closed terminal are noted, and acted on between two looks: so that none leaves a mess."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Stopping:
        self._before = {one: signal.signal(one, self._note) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        return self

    def __exit__(self, *_: object) -> None:
        for one, before in self._before.items():
            signal.signal(one, before)

    def _note(self, *_: object) -> None:
        self.asked = True

    def pause(self, seconds: float) -> None:
        """
        Raises:
            Stopped: it was asked for.
        """
        deadline = time.monotonic() + seconds
        while not self.asked and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, 0.05))
        if self.asked:
            raise Stopped


# --- what to show -----------------------------------------------------------------------------


class Screen:
    """On a terminal a few lines that change in place; elsewhere the same lines now and then."""

    def __init__(self, *, terminal: bool, color: bool | None) -> None:
        self.terminal = terminal
        self.color = color
        self._live: list[str] = []
        self._shown_at = 0.0
        self._shown: Sequence[str] = ()

    def say(self, text: str = "", **style: Any) -> None:
        """A line that stays."""
        self._erase()
        self._echo(text, **style)
        self._draw()

    def show(self, lines: Sequence[str], *, last: bool = False) -> None:
        """Lines that the next call replaces, except for the last one's."""
        if self.terminal:
            self._erase()
            self._live = list(lines)
            self._draw()
        elif (last and lines != self._shown) or time.monotonic() > self._shown_at + 2:
            self._shown, self._shown_at = lines, time.monotonic()
            self._echo(" | ".join(lines))
        if last:
            self.keep()

    def keep(self) -> None:
        """Let the lines that changed stay as they are now."""
        self._live = []

    def _erase(self) -> None:
        if self._live:
            click.echo(f"\x1b[{len(self._live)}A\x1b[J", nl=False)

    def _draw(self) -> None:
        width = shutil.get_terminal_size().columns - 1
        for line in self._live:
            self._echo(line[:width], fg="cyan")

    def _echo(self, text: str, **style: Any) -> None:
        click.secho(text, color=self.color, **style)
        sys.stdout.flush()


@attrs.frozen
class Row:
    """One line of the closing table."""

    service: str
    what: str
    handled: int
    expected: int


def _table(rows: Iterable[Row], screen: Screen) -> None:
    screen.say(f"{'':9}{'':42}{'handled':>10}{'expected':>14}", bold=True)
    before = ""
    for row in rows:
        equal = row.handled == row.expected
        name = "" if row.service == before else row.service
        before = row.service
        mark = "" if equal else "  <- differs"
        screen.say(f"{name:9}{row.what:42}{row.handled:>10,}{row.expected:>14,}{mark}", fg=None if equal else "red")


# --- what happened ----------------------------------------------------------------------------

Entries = dict[str, list[tuple[str, int]]]
"""For each service what it has noted down: (what, lines)."""


def _should_be(lines: Sequence[bytes]) -> list[tuple[str, str, int]]:
    """(service, what, how many), from the file and nothing else."""
    commits = [json.loads(line) for line in lines]
    sizes = [commit["insertions"] + commit["deletions"] for commit in commits]
    large = [size for size in sizes if size > LARGE]
    too_long = sum(size > TOO_LONG for size in large)
    busy_once = sum(size <= TOO_LONG and size % 5 == 0 for size in large)
    expected: list[tuple[str, str, int]] = []
    for repository in sorted({commit["repository"] for commit in commits}):
        own = [size for commit, size in zip(commits, sizes, strict=True) if commit["repository"] == repository]
        expected += [("stats", f"{repository}: commits", len(own)), ("stats", f"{repository}: lines", sum(own))]
    return [
        *expected,
        ("reviews", "commits checked", len(commits)),
        ("reviews", f"of more than {LARGE} lines: review.requested", len(large)),
        ("inbox", "review.requested received", len(large)),
        ("inbox", "second attempts", busy_once + too_long),
        ("inbox", "third attempts", too_long),
        ("inbox", "delivered", len(large) - too_long),
        ("inbox", "dead letters, kept in inbox.dead", too_long),
    ]


def _was(entries: Entries, dead: int) -> dict[tuple[str, str], int]:
    """How many of each, from what the services wrote down and what the broker keeps."""
    commits = Counter(what for what, _ in entries["stats"])
    lines: Counter[str] = Counter()
    for what, size in entries["stats"]:
        lines[what] += size
    looked_at = Counter(what for what, _ in entries["reviews"])
    mails = Counter(what for what, _ in entries["inbox"])
    return {
        **{("stats", f"{repository}: commits"): count for repository, count in commits.items()},
        **{("stats", f"{repository}: lines"): count for repository, count in lines.items()},
        ("reviews", "commits checked"): looked_at.total(),
        ("reviews", f"of more than {LARGE} lines: review.requested"): looked_at["large"],
        ("inbox", "review.requested received"): mails["attempt 1"],
        ("inbox", "second attempts"): mails["attempt 2"],
        ("inbox", "third attempts"): mails["attempt 3"],
        ("inbox", "delivered"): mails["delivered"],
        ("inbox", "dead letters, kept in inbox.dead"): dead,
    }


# --- the run ----------------------------------------------------------------------------------


@attrs.define(kw_only=True)
class Run:
    """One performance, from the first process to the last deleted queue."""

    folder: Path
    url: str
    prefix: str
    lines: list[bytes]
    screen: Screen
    stopping: Stopping
    processes: dict[str, subprocess.Popen[bytes]] = attrs.field(factory=dict, init=False)
    connection: Connection = attrs.field(init=False)
    expected: list[tuple[str, str, int]] = attrs.field(init=False)
    dead: int = attrs.field(default=0, init=False)
    failures_seen: int = attrs.field(default=0, init=False)
    topologies: dict[str, Topology] = attrs.field(factory=dict, init=False)

    def play(self) -> bool:
        """Run it to its end; says whether everything was handled as the file says."""
        broker = BrokerAddresses.parse(self.url)
        self.expected = _should_be(self.lines)
        began = time.monotonic()
        self.connection = broker.connect("lightbus demo")
        try:
            self.screen.say(f"Broker:     {broker.masked}" + ("" if self.prefix else "  (embedded: no server)"))
            self.topologies = {name: self._topology(name) for name in (*LISTENERS, PUBLISHER)}
            self._start_services()
            self._publish()
            self._watch(began + LIMIT)
            self._stop_services()
            self._count_dead()
            took = time.monotonic() - began
            return self._report(took)
        finally:
            self._stop_services()
            with contextlib.suppress(*LOST, errors.LightbusError):
                self._clean_up(broker)

    def _topology(self, service: str) -> Topology:
        """What the service declares, from its own source, so that all of it can be deleted."""
        os.environ["DEMO_PREFIX"] = self.prefix
        sys.path.insert(0, str(_services()))
        try:
            spec = importlib.util.spec_from_file_location(f"lightbus_demo_{service}", _services() / f"{service}.py")
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # where annotations are looked up
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(_services()))
        topology: Topology = module.app.topology()
        return topology

    # processes

    def _start_services(self) -> None:
        for name in LISTENERS:
            self._start(name, "-m", "lightbus", "worker", f"{name}:app")
        self.screen.say(
            "Services:   " + ", ".join(f"{name} (process {self.processes[name].pid})" for name in LISTENERS)
        )
        deadline = time.monotonic() + START_LIMIT
        while not all(self._consumers(name) for name in LISTENERS):
            self._check_alive()
            if time.monotonic() > deadline:
                raise Failed(f"the services did not start within {START_LIMIT:g} s.\n{self._last_words()}")
            self.stopping.pause(0.1)

    def _publish(self) -> None:
        data = self.folder / "commits.jsonl"
        data.write_bytes(b"".join(self.lines))
        with data.open("rb") as lines:
            self._start(PUBLISHER, str(_services() / "forge.py"), stdin=lines)
        self.screen.say(
            f"Publishing: {len(self.lines):,} commits as commit.pushed (forge, process {self.processes[PUBLISHER].pid})"
        )
        self.screen.say()

    def _start(self, name: str, *arguments: str, stdin: Any = subprocess.DEVNULL) -> None:
        roots = [str(_services()), str(Path(lightbus.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "LIGHTBUS_URL": self.url,
            "DEMO_PREFIX": self.prefix,
            "PYTHONPATH": os.pathsep.join(filter(None, roots)),
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        with self._output(name).open("wb") as output, (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=self.folder,
                env=environment,
                stdin=stdin,
                stdout=output,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the demo, which then stops them in order
            )

    def _output(self, name: str) -> Path:
        return self.folder / f"{name}.out"

    def _check_alive(self) -> None:
        """
        Raises:
            Failed: one of the processes ended that should not have.
        """
        for name, process in self.processes.items():
            status = process.poll()
            if status is not None and (name != PUBLISHER or status != 0):
                raise Failed(f"{name} ended with status {status}.\n{self._log(name)[-2000:]}")

    def _last_words(self) -> str:
        return "\n".join(f"{name}: {self._log(name)[-500:]}" for name in self.processes)

    def _log(self, name: str) -> str:
        both = (self._output(name), self.folder / f"{name}.log")
        return "".join(file.read_text(errors="replace") for file in both if file.exists())

    def _stop_services(self) -> None:
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        deadline = time.monotonic() + 10
        for process in self.processes.values():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    # watching

    def _watch(self, deadline: float) -> None:
        """Until nothing is waiting and nothing has changed for a moment. The columns are compared after that."""
        seen: object = None
        changed_at = time.monotonic()
        while True:
            entries = {name: self._entries(name) for name in LISTENERS}
            published = sum(int(line) for line in self._output(PUBLISHER).read_text().split())
            waiting = self._waiting()
            self._count_dead()
            self._show_failures()
            self.screen.show(self._progress(published, entries))
            now = ({name: len(rows) for name, rows in entries.items()}, published, waiting, self.dead)
            if now != seen or waiting or self.processes[PUBLISHER].poll() is None:
                seen, changed_at = now, time.monotonic()
            if time.monotonic() > changed_at + (STEADY if self._equal(entries) else STUCK):
                break
            if time.monotonic() > deadline:
                self.screen.say(f"Not done after {LIMIT:g} s: {waiting:,} events are still waiting.", fg="red")
                break
            self._check_alive()
            self.stopping.pause(0.1)
        self._check_alive()
        self.screen.show(self._progress(published, entries), last=True)

    def _progress(self, published: int, entries: Entries) -> list[str]:
        mails = Counter(what for what, _ in entries["inbox"])
        retries = mails["attempt 2"] + mails["attempt 3"]
        large = sum(what == "large" for what, _ in entries["reviews"])
        return [
            f"forge   published {published:>6,} of {len(self.lines):,}",
            f"stats   counted   {len(entries['stats']):>6,}",
            f"reviews checked   {len(entries['reviews']):>6,}, requested {large}",
            f"inbox   delivered {mails['delivered']:>6,}, retried {retries}, gave up on {self.dead}",
        ]

    def _show_failures(self) -> None:
        """The first failure of each attempt, as the worker logs it: what a retry looks like."""
        if self.failures_seen >= 3:
            return
        sign = f"attempt {self.failures_seen + 1}: MailTooLong"
        found = next((line for line in self._log("inbox").splitlines() if sign in line), None)
        if found is not None:
            self.failures_seen += 1
            self.screen.say(f"inbox logs: {found.strip()}", fg="yellow")
            self._show_failures()

    def _rows(self, entries: Entries) -> list[Row]:
        was = _was(entries, self.dead)
        return [Row(service, what, was.get((service, what), 0), count) for service, what, count in self.expected]

    def _equal(self, entries: Entries) -> bool:
        return all(row.handled == row.expected for row in self._rows(entries))

    def _report(self, took: float) -> bool:
        rows = self._rows({name: self._entries(name) for name in LISTENERS})
        rows.append(Row("broker", "events still waiting in a queue", self._waiting(), 0))
        equal = all(row.handled == row.expected for row in rows)
        self.screen.say()
        _table(rows, self.screen)
        self.screen.say()
        if equal:
            self.screen.say(f"All events were handled as expected, in {took:.1f} s.", fg="green")
        else:
            self.screen.say("The columns differ. The last log lines of the services:", fg="red")
            self.screen.say(self._last_words())
        return equal

    # what the services and the broker know

    def _entries(self, service: str) -> list[tuple[str, int]]:
        file = self.folder / f"{service}.db"
        if not file.exists():
            return []
        with contextlib.closing(sqlite3.connect(file, timeout=10)) as database:
            try:
                return list(database.execute("SELECT what, lines FROM entries"))
            except sqlite3.OperationalError:  # not created yet
                return []

    def _queue(self, name: str) -> tuple[int, int]:
        """(messages, consumers) of a queue, 0 where it is not there yet."""
        channel = self.connection.channel()
        try:
            found = channel.queue_declare(name, passive=True)
        except amqp.exceptions.NotFound:
            return 0, 0
        channel.close()
        return found.message_count, found.consumer_count

    def _consumers(self, service: str) -> int:
        return self._queue(f"{self.prefix}{service}.main")[1]

    def _waiting(self) -> int:
        """Events in the services' queues, their retry queues included."""
        return sum(
            self._queue(queue.name)[0]
            for service in LISTENERS
            for queue in self.topologies[service].queues
            if not queue.name.endswith(".dead")
        )

    def _count_dead(self) -> None:
        self.dead = self._queue(f"{self.prefix}inbox.dead")[0]

    def _clean_up(self, broker: BrokerAddresses) -> None:
        """Delete what the services declared. Everything of it bears this run's prefix, or is in the folder anyway."""
        with contextlib.suppress(*LOST):
            self.connection.close()
        if not self.prefix:
            return
        connection = broker.connect("lightbus demo")
        for topology in self.topologies.values():
            for queue in topology.queues:
                connection.channel().queue_delete(queue.name)
            for exchange in topology.exchanges:
                connection.channel().exchange_delete(exchange.name)
        connection.close()
