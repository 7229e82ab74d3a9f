"""The plan of one run, and the meter that the handler calls."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import operator
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from benchmarks import payload


@dataclasses.dataclass(frozen=True)
class Plan:
    url: str
    name: str
    """The name of the queue, or of its app."""
    role: str = "consume"
    kind: str = "order"
    size: int = 0
    handler: str = "async"
    """`async`, `sync`, `wait` (10 ms), `reject` (to the dead letters) or `hold` (until the end); for the limit `read`,
    `read-ack` or `write`; for the outbox `schema`, `add` or `relay`."""
    around: str = ""
    """Around the handler: `middleware` (one, empty), `depends` (one dependency, an async generator), `metrics`,
    `traces` or `inbox`."""
    additions: str = ""
    """What is measured around the handler: see `around.ADDITIONS`."""
    multiprocess: bool = False
    """Whether metrics are kept in files, for several processes."""
    queue_type: str = "quorum"
    prefetch: int | None = None
    """None: the contestant's default."""
    concurrency: int | None = None
    """Concurrent handlers, or threads; None: the contestant's default."""
    handlers: int = 1
    one_class: bool = False
    """Whether all handlers use the same class; otherwise each has its own."""
    apps: int = 1
    count: int = 1
    """Events to measure."""
    warm: int = 0
    """Events before the measured ones, so that the contestant is warmed up."""
    tail: int = 0
    """Events after the measured ones, so that the queue is not empty before the end of the measurement."""
    in_flight: int = 500
    threads: int = 0
    """Threads that publish with the synchronous call; 0: one event loop publishes."""
    greet: int = 20
    """Events that are published before the measured ones, to connect and import everything."""
    rate: float = 0.0
    """Events/s; 0: as fast as possible."""
    phases: tuple[int, ...] = ()
    database: str = ""
    """The outbox's, for SQLAlchemy."""
    waiting: int = 0
    """Rows of the outbox that are added at once; 0: the suite has added them."""

    @property
    def total(self) -> int:
        return self.warm + self.count + self.tail

    def names(self) -> list[str]:
        """The names of the apps or queues that receive the same event."""
        return [self.name] if self.apps == 1 else [f"{self.name}-{index}" for index in range(self.apps)]

    def event_name(self, index: int = 0) -> str:
        base = {"order": "order.placed", "commit": "commit.recorded", "blob": "blob.stored"}[self.kind]
        return base if self.handlers == 1 else f"{base}.{index}"


def cpu_seconds() -> float:
    """CPU time of this process with all its threads, and of its finished children."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


class Meter:
    """Counts handled events, and records the time at the start and the end of the measured part."""

    def __init__(self, plan: Plan) -> None:
        self.values: list[int] = []
        self.finished = threading.Event()
        self.marks: dict[int, tuple[float, float]] = {}
        self.stamps: list[tuple[int, float, float]] = []
        self.more: dict[str, Any] = {}
        """What else a contestant has measured."""
        self._plan = plan
        self._numbers = itertools.count(1)  # its next() is atomic: handlers may run in threads
        self._watched = {plan.warm, plan.warm + plan.count, plan.total}
        self._every = 50 if plan.role == "share" else 0

    def begin(self) -> None:
        """Call this right before the contestant starts to consume."""
        if self._plan.warm == 0:
            self.marks[0] = (time.perf_counter(), cpu_seconds())

    def __call__(self, value: int) -> None:
        self.values.append(value)
        number = next(self._numbers)
        if number in self._watched:
            self._mark(number)
        elif self._every and number % self._every == 0:
            self.stamps.append((number, time.monotonic(), cpu_seconds()))

    def _mark(self, number: int) -> None:
        self.marks.setdefault(number, (time.perf_counter(), cpu_seconds()))
        if number == self._plan.total and self._plan.role != "share":
            self.finished.set()

    async def until_finished(self) -> None:
        while not self.finished.is_set():  # noqa: ASYNC110 - handlers may run in threads
            await asyncio.sleep(0.05)

    def result(self) -> dict[str, Any]:
        warm, end = self.marks[self._plan.warm], self.marks[self._plan.warm + self._plan.count]
        wanted = payload.expected(self._plan.kind, self._plan.total // self._plan.apps) * self._plan.apps
        handled = sorted(self.values)
        return {
            "events": self._plan.count,
            "wall": end[0] - warm[0],
            "cpu": end[1] - warm[1],
            "handled": len(handled),
            "right": handled[: len(wanted)] == sorted(wanted),
            **self.more,
        }


class Latencies:
    """Measures the time from the publish call to the handler, on the monotonic clock that all processes share."""

    def __init__(self, plan: Plan) -> None:
        self.finished = threading.Event()
        self.lines: list[dict[str, Any]] = []
        self._phases = list(plan.phases)
        self._taken: list[tuple[int, int]] = []
        self._lock = threading.Lock()

    def begin(self) -> None: ...

    def __call__(self, value: int) -> None:
        now = time.monotonic_ns()
        with self._lock:
            self._taken.append((now - value, now))
            if len(self._taken) == self._phases[0]:
                self._phases.pop(0)
                self._report()
                if not self._phases:
                    self.finished.set()

    def _report(self) -> None:
        from benchmarks.contestant import emit  # between two phases: nothing is measured here

        taken, self._taken = self._taken, []
        sorted_ns = sorted(latency for latency, _ in taken)
        first = min(now - latency for latency, now in taken)
        last = max(now for _, now in taken)
        emit(
            events=len(taken),
            wall=(last - first) / 1e9,
            p50_ms=_percentile(sorted_ns, 0.50) / 1e6,
            p99_ms=_percentile(sorted_ns, 0.99) / 1e6,
        )

    async def until_finished(self) -> None:
        while not self.finished.is_set():  # noqa: ASYNC110 - handlers may run in threads
            await asyncio.sleep(0.05)


def _percentile(ordered: list[int], share: float) -> int:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Session:
    """What the dependency yields."""


async def open_session() -> AsyncIterator[Session]:
    """The dependency of all contestants that have dependencies."""
    yield Session()


def handler(plan: Plan, meter: Callable[[int], None], annotation: Any, session: Any = None) -> Callable[..., Any]:
    """The handler of all contestants: it passes the number of the event to the meter.

    Args:
        session: the annotation of the parameter that the dependency fills, if the plan has one.
    """
    field = payload.NUMBER[plan.kind]
    number = operator.itemgetter(field) if annotation is dict else operator.attrgetter(field)
    function: Callable[..., Any]
    if plan.handler == "sync":

        def handle_sync(event):  # type: ignore[no-untyped-def]
            meter(number(event))

        function = handle_sync
    elif plan.handler == "wait":

        async def handle_wait(event):  # type: ignore[no-untyped-def]
            await asyncio.sleep(0.01)
            meter(number(event))

        function = handle_wait
    elif plan.handler == "wait-sync":

        def handle_wait_sync(event):  # type: ignore[no-untyped-def]
            time.sleep(0.01)
            meter(number(event))

        function = handle_wait_sync
    elif plan.handler == "hold":

        async def handle_hold(event):  # type: ignore[no-untyped-def]
            meter(number(event))
            await asyncio.Event().wait()

        function = handle_hold
    elif plan.handler == "hold-sync":

        def handle_hold_sync(event):  # type: ignore[no-untyped-def]
            meter(number(event))
            threading.Event().wait()

        function = handle_hold_sync
    elif plan.around == "depends":

        async def handle_with_session(event, session):  # type: ignore[no-untyped-def]
            meter(number(event))

        function = handle_with_session
        function.__annotations__["session"] = session
    else:

        async def handle(event):  # type: ignore[no-untyped-def]
            meter(number(event))

        function = handle
    function.__annotations__["event"] = annotation
    function.__name__ = "handle"
    return function
