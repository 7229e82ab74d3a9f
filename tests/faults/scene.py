"""A scene: worker and publisher processes on one broker, the times of the faults, and the result."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import amqp.exceptions
import attrs

from lightbus import errors
from lightbus.connection.diagnosis import LOST
from lightbus.connection.dial import BrokerAddresses
from lightbus.transport import Delivery
from tests.faults.events import ThingHappened, shop
from tests.faults.ledger import CONFIRMED, FAILED, HANDLED, TRIED, UNROUTED, Ledger

LIMIT = 90.0
"""Maximum seconds of every wait, far above the usual times, even on a busy machine."""

QUEUES = ("billing.main", "billing.retry.200ms", "billing.retry.500ms", "billing.dead")
ROOT = Path(__file__).parents[2]


@attrs.frozen
class Row:
    """The result of one scenario."""

    fault: str
    times: int
    tried: int
    confirmed: int
    handled: int
    dead: int
    queued: int
    failed: int
    """Publishes that raised an error: the outcome is unknown, or the event was not sent."""
    unrouted: int
    duplicates: Counter[str]
    """Events that were handled more than once, by reason."""
    lost: set[str]
    recoveries: list[float]
    note: str = ""

    @property
    def unexplained(self) -> int:
        return self.duplicates["unexplained"]

    @property
    def recovery(self) -> str:
        return recovery(self.recoveries)

    def check(self) -> None:
        assert not self.lost, f"{self.fault}: LOST {len(self.lost)} confirmed events: {sorted(self.lost)[:20]}"
        assert not self.unexplained, f"{self.fault}: {self.unexplained} unexplained duplicates"
        assert self.confirmed, f"{self.fault}: nothing was confirmed, so nothing was tested"


def recovery(seconds: Sequence[float]) -> str:
    """Median and worst."""
    if not seconds:
        return "-"
    worst = max(seconds)
    if len(seconds) == 1:
        return f"{worst:.1f} s"
    return f"{statistics.median(seconds):.1f} s, worst {worst:.1f} s"


WORKER = ("lightbus", "worker", "tests.faults.handlers:app")


class Process:
    """A process under test. Its output is kept in the scene's folder."""

    def __init__(self, name: str, command: Sequence[str], folder: Path, environment: dict[str, str]) -> None:
        self.name = name
        self.output = folder / f"{name}.log"
        with self.output.open("ab") as output:
            self.popen = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    @property
    def log(self) -> str:
        return self.output.read_text(errors="replace")

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.popen.send_signal(number)

    def kill(self) -> None:
        """Send SIGKILL to it and its child processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()

    def stop(self, limit: float = LIMIT) -> int:
        """Send SIGTERM, and return the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait(limit)

    def wait(self, limit: float = LIMIT) -> int:
        try:
            return self.popen.wait(limit)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} did not end within {limit:g} s. Its log:\n{self.log[-3000:]}") from None


class Scene:
    """`with Scene(url) as scene:` creates a folder, and at the end kills the started processes."""

    def __init__(self, url: str, *, worker_url: str | None = None, publisher_url: str | None = None) -> None:
        """
        Args:
            url: the broker, for reading the queues at the end.
            worker_url, publisher_url: other URLs for the processes.
        """
        self.url = url
        self.worker_url = worker_url or url
        self.publisher_url = publisher_url or url
        self.processes: list[Process] = []
        self.faults: list[tuple[float, float]] = []
        """Start and end of each fault, on the monotonic clock."""
        self._publisher_faults: list[tuple[float, float]] = []
        """Those that may make a publisher publish again."""

    def __enter__(self) -> Scene:
        self._folder = tempfile.TemporaryDirectory(prefix="lightbus-faults-")
        self.folder = Path(self._folder.name)
        self.ledger = Ledger(self.folder)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
        self._folder.cleanup()

    # --- processes

    def _start(self, name: str, command: Sequence[str], environment: dict[str, str]) -> Process:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("LIGHTBUS_", "FAULTS_"))}
        environment = {**inherited, "PYTHONPATH": str(ROOT), "FAULTS_LEDGER": str(self.folder), **environment}
        process = Process(f"{name}-{len(self.processes)}", command, self.folder, environment)
        self.processes.append(process)
        return process

    def worker(self, *options: str, ready: bool = True, work: float = 0.0, program: Sequence[str] = WORKER) -> Process:
        """Start `lightbus worker`, or another program, and wait until it is ready."""
        command = ["-m", *program, *options]
        worker = self._start("worker", command, {"LIGHTBUS_URL": self.worker_url, "FAULTS_WORK": str(work)})
        if ready:
            self.until(lambda: "Ready:" in worker.log, "the worker is ready", worker)
        return worker

    def publisher(self, *options: str) -> Process:
        prefix = f"p{len(self.processes)}"
        command = ["-m", "tests.faults.publish", self.publisher_url, str(self.folder), "--prefix", prefix, *options]
        return self._start("publisher", command, {})

    def publish(self, id: str, do: str = "") -> None:
        """Publish one event from this process; `do` is for the handler."""
        self.publish_all([(id, do)])

    def publish_all(self, things: Sequence[tuple[str, str]]) -> None:
        app = shop(self.url)
        for id, _ in things:
            self.ledger.write(TRIED, id)
        with app:
            receipts = app.publish_many_sync([ThingHappened(id=id, do=do) for id, do in things], timeout=60)
        for (id, _), receipt in zip(things, receipts, strict=True):
            self.ledger.write(CONFIRMED if receipt.routed else UNROUTED, id)

    def declare(self) -> None:
        """Declare the queues of the worker, by starting and stopping it."""
        assert self.worker().stop() == 0

    # --- waiting

    def until(
        self, look: Callable[[], object], what: str, process: Process | None = None, limit: float = LIMIT
    ) -> None:
        deadline = time.monotonic() + limit
        while not look():
            if process is not None and not process.alive:
                raise AssertionError(f"Not so: {what}. {process.name} has ended. Its log:\n{process.log[-3000:]}")
            if time.monotonic() > deadline:
                logs = "\n\n".join(f"--- {one.name}:\n{one.log[-1500:]}" for one in self.processes[-4:])
                raise AssertionError(f"Not so after {limit:g} s: {what}.\n{logs}")
            time.sleep(0.02)

    def until_handled(self, more: int = 1, *, limit: float = LIMIT) -> None:
        """Wait until this number of further events has been handled."""
        goal = len(self.ledger.entries(HANDLED)) + more
        self.until(lambda: len(self.ledger.entries(HANDLED)) >= goal, f"{more} more events are handled", limit=limit)

    def until_recovered(self, since: float, *, limit: float = LIMIT) -> None:
        """Wait until an event that was published after this time has been handled."""

        def recovered() -> bool:
            tried = {entry.id for entry in self.ledger.entries(TRIED) if entry.time > since}
            return any(entry.id in tried for entry in reversed(self.ledger.entries(HANDLED)) if entry.time > since)

        self.until(recovered, "an event that was published after the fault is handled", limit=limit)

    # --- faults

    @contextlib.contextmanager
    def fault(self, *, recovers: bool = True, only_workers: bool = False) -> Iterator[None]:
        """The fault lasts as long as the block. Then wait until an event is published and handled.

        Args:
            only_workers: it does not affect the publishers.
        """
        begin = time.monotonic()
        yield
        end = time.monotonic()
        self.faults.append((begin, end))
        if not only_workers:
            self._publisher_faults.append((begin, end))
        if recovers:
            self.until_recovered(end)

    def recoveries(self) -> list[float]:
        """Seconds from the end of each fault to the first handled event."""
        times = [entry.time for entry in self.ledger.entries(HANDLED)]
        found = []
        for _, end in self.faults:
            after = [when - end for when in times if when > end]
            if after:
                found.append(min(after))
        return found

    def until_begun(self, process: Process, letter: str) -> None:
        """Wait until it has tried something. Earlier, a signal may end it: it has no handler yet."""
        prefix = f"{letter}{process.name.rpartition('-')[2]}"
        begins = (f"{prefix}-", f"{prefix}.")
        self.until(
            lambda: any(entry.id.startswith(begins) for entry in self.ledger.entries(TRIED)), f"{process.name} begins"
        )

    # --- the result

    def settle(self, *, dead: int = 0, events: int = 0, limit: float = LIMIT) -> None:
        """Stop the publishers when `events` are confirmed, and wait until all confirmed events are handled, except for
        `dead` of them.
        """
        self.until(lambda: len(self.ledger.entries(CONFIRMED)) >= events, f"{events} events are confirmed")
        for process in self.processes:
            if process.name.startswith("publisher") and process.alive:
                self.until_begun(process, "p")
                code = process.stop()
                assert code == 0, f"{process.name} ended with {code}:\n{process.log[-3000:]}"

        def missing() -> set[str]:
            return self.ledger.ids(CONFIRMED) - self.ledger.ids(HANDLED)

        # If an event is lost, stop waiting after 30 s without progress; the row reports the loss.
        deadline = time.monotonic() + limit
        last, progress = len(missing()), time.monotonic()
        while len(missing()) > dead and time.monotonic() < deadline:
            if (left := len(missing())) != last:
                last, progress = left, time.monotonic()
            if time.monotonic() - progress > 30:
                break
            time.sleep(0.05)

    def row(self, fault: str, times: int, *, note: str = "", recoveries: list[float] | None = None) -> Row:
        """Stop all processes, read the queues, and compute the result."""
        for process in self.processes:
            if process.alive:
                process.stop()
        tried = {entry.id: entry.time for entry in self.ledger.entries(TRIED)}
        confirmed = {entry.id: entry.time for entry in self.ledger.entries(CONFIRMED)}
        handled = self.ledger.ids(HANDLED)
        left = {queue: {id_of(delivery) for delivery in self.take_all(queue)} for queue in QUEUES}
        dead = left.pop("billing.dead")
        queued: set[str] = set().union(*left.values())
        assert tried.keys() >= confirmed.keys() | handled, "bug in the harness: an event that was never tried"
        return Row(
            fault=fault,
            times=times,
            tried=len(tried),
            confirmed=len(confirmed),
            handled=len(handled),
            dead=len(dead),
            queued=len(queued),
            failed=len(self.ledger.ids(FAILED)),
            unrouted=len(self.ledger.ids(UNROUTED)),
            duplicates=self._duplicates(tried, confirmed),
            lost=confirmed.keys() - handled - dead - queued,
            recoveries=self.recoveries() if recoveries is None else recoveries,
            note=note,
        )

    def _duplicates(self, tried: dict[str, float], confirmed: dict[str, float]) -> Counter[str]:
        """Count the additional times that events were handled, by reason."""
        reasons: Counter[str] = Counter()
        seen: dict[str, float] = {}
        # The redelivered one may end first, while the handler of the original delivery is still running.
        redelivered = {entry.id for entry in self.ledger.entries(HANDLED) if entry.fields[1] == "1"}
        for entry in self.ledger.entries(HANDLED):
            if entry.id not in seen:
                seen[entry.id] = entry.time
            elif entry.id in redelivered:
                reasons["redelivered"] += 1
            elif self._in_flight_at_a_fault(tried[entry.id], confirmed.get(entry.id)):
                reasons["published again"] += 1
            elif self.url.startswith("activemq:") and self._in_hand_at_a_fault(seen[entry.id], entry.time):
                reasons["redelivered without the flag"] += 1
            else:
                reasons["unexplained"] += 1
        return reasons

    def _in_flight_at_a_fault(self, tried: float, confirmed: float | None) -> bool:
        """Whether a fault happened between the publish and its confirm, so that the publisher had to publish again."""
        faults = self._publisher_faults
        return any(tried <= end + 15 and (confirmed is None or confirmed >= begin) for begin, end in faults)

    def _in_hand_at_a_fault(self, handled: float, again: float) -> bool:
        """Whether a fault happened when a worker had just handled it, or was about to, and may have lost its ack.

        Artemis does not count every delivery that a lost connection returns, so its flag may be missing.
        """
        return any(begin - 2 <= handled <= end + 15 and again >= begin for begin, end in self.faults)

    def take_all(self, queue: str) -> list[Delivery]:
        """Read all messages of a queue. Closing the connection returns them to the queue."""
        deadline = time.monotonic() + LIMIT
        while True:
            try:
                connection = BrokerAddresses.parse(self.url).connect("tests: reading the queues")
            except errors.BrokerUnreachable:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
                continue
            try:
                channel = connection.channel()
                taken = []
                while (delivery := channel.get(queue)) is not None:
                    taken.append(delivery)
            except amqp.exceptions.NotFound:
                return []
            except LOST:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
            else:
                return taken
            finally:
                connection.close()


def id_of(delivery: Delivery) -> str:
    return str(json.loads(delivery.body)["id"])
