"""`Metrics`: an app's metrics for Prometheus, with prometheus_client (extra `prometheus`).

`lightbus worker --metrics` serves them beside `/readyz`. In a program of your own, `Metrics(app)` adds them to
prometheus_client's registry, which its `make_asgi_app` and `make_wsgi_app` serve.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from prometheus_client import REGISTRY, CollectorRegistry, Metric, values
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from lightbus import errors
from lightbus.app import Lightbus
from lightbus.living import Living
from lightbus.outcome import Outcome
from lightbus.telemetry import processes
from lightbus.telemetry.families import (
    BLOCKED,
    CONNECTED,
    EVENT_AGE,
    EVENTS,
    FAMILIES,
    HANDLER_SECONDS,
    LOST,
    OUTBOX_OLDEST,
    OUTBOX_ROWS,
    PREFETCHED,
    PUBLISH_SECONDS,
    PUBLISHED,
    READY,
    RUNNING,
    Family,
)
from lightbus.telemetry.queues import QueueStates, Samples
from lightbus.telemetry.series import MOST_WAITING, Histogram, Series, Tally, Value, describe
from lightbus.worker.health import report
from lightbus.worker.services import ServiceRunner
from lightbus.worker.worker import Worker

logger = logging.getLogger("lightbus")

ATTEMPTS: Final = ("handled", "skipped", "retried", "dead", "redelivered")
PUBLISHES: Final = ("published", "unrouted", "failed")
"""Each counter begins at 0: Prometheus' `increase` misses the first event of a series that begins at 1."""
OTHER: Final = "other"
"""The label of events that the app has not declared (an outbox may have them from an earlier release)."""
AGE_PAUSE = 0.01
"""Seconds between two measurements of an event's age in a queue: reading a message's time costs more than all else."""
TICK = 1.0
"""Seconds between two updates of what other processes show of this one."""


class Metrics:
    """Counts what an app publishes and handles.

    Create it where the app is created: before the app's first publish, and before its worker starts. The app's name is
    a label, so several apps of a process share a registry.
    """

    def __init__(self, app: Lightbus, *, registry: CollectorRegistry = REGISTRY, queues: bool = False) -> None:
        """
        Args:
            registry: prometheus_client's, in which the metrics are; by default the one that all libraries use.
            queues: whether the broker is asked about the app's queues when the metrics are read, at most every 10 s.
                `lightbus worker --metrics` and `lightbus relay --metrics` do that.

        Raises:
            errors.InvalidOption: the app has Metrics already, or has published already.
        """
        if id(app) in _metrics_of:
            raise errors.InvalidOption(
                f"app {app.name!r} has Metrics already. Create them once, where the app is created."
            )
        self.app = app
        self.registry = registry
        self._exposition = _Exposition.of(registry)
        self._series = self._exposition.series
        self._attempts: dict[tuple[str | None, str | None, str], _Attempt] = {}
        self._ages: dict[str, _Age] = {}
        self._publishes: dict[tuple[str, str], Value] = {}
        self._publish_seconds = self._series.histogram(PUBLISH_SECONDS, app.name)
        self._worker: Worker | ServiceRunner | None = None
        self._queues = QueueStates(app) if queues else None
        self._totals: dict[tuple[Family, str], int] = {}
        """Of what others count, at the last update: by family and label."""
        self._lock = threading.Lock()
        app.observe(self._observe)
        _metrics_of[id(app)] = self
        self._exposition.add(self)

    @classmethod
    def of(cls, app: Lightbus) -> Metrics:
        """The app's Metrics: those that its code has created, or new ones."""
        return _metrics_of.get(id(app)) or cls(app)

    def renew_lock(self) -> None:
        """In a forked child."""
        self._lock = threading.Lock()

    def forget(self) -> None:
        """In a forked child: the first outcome of each kind makes its tally, and starts the thread."""
        self._attempts.clear()
        self._publishes.clear()

    def watch(self, worker: Worker | ServiceRunner) -> None:
        """Add what is known of this worker of the app: whether it is ready, what runs in it, what its queues hold."""
        self._worker = worker
        if self._queues is None:
            self._queues = QueueStates(self.app)
        if isinstance(worker, Worker):
            for config in worker.consumer.subscriptions:
                for handler in config.handlers:
                    self._count_more(BLOCKED, handler, 0)
                    for kind in ATTEMPTS:
                        self._new_attempt(config.name, handler, kind)
        self._exposition.begin()

    def page(self, accept: str) -> tuple[str, bytes]:
        """The metrics of this process, or of all processes that share a folder, with all others of the registry.

        Args:
            accept: the header of the request, which chooses the format.

        Returns:
            The content type and the text.
        """
        encode, content_type = choose_encoder(accept)
        return content_type, encode(self._exposition.whole(self.registry))

    def close(self) -> None:
        """At the end of the process: leave the last values to the other processes."""
        self._exposition.end()

    # --- what is counted

    def _observe(self, outcome: Outcome) -> None:
        if outcome.queue is None:
            self._count_publish(outcome)
            return
        key = outcome.queue, outcome.handler, outcome.kind
        tally, count, age = self._attempts.get(key) or self._new_attempt(*key)
        waiting = tally.waiting
        waiting.append(outcome.seconds)
        if len(waiting) >= MOST_WAITING:
            tally.flush()
        if count is not None:
            count(1)
        if age is not None and (now := time.monotonic()) >= age.next_at and outcome.attempt == 1:
            age.next_at = now + AGE_PAUSE
            age.measure(outcome)

    def _new_attempt(self, queue: str | None, handler: str | None, kind: str) -> _Attempt:
        name, queue = self.app.name, queue or ""
        histogram = None if handler is None else self._series.histogram(HANDLER_SECONDS, name, queue, handler)
        counter = self._series.value(EVENTS, name, queue, handler or "", kind)
        age = None
        if kind != "redelivered":  # it comes again
            with self._lock:
                age = self._ages.get(queue)
                if age is None:
                    age = self._ages[queue] = _Age(self._series.histogram(EVENT_AGE, name, queue))
        if self._exposition.folder is None:
            made = self._series.tally(counter, histogram), None, age
        else:  # each count is in the file at once: if the process is killed, it is not lost
            made = self._series.tally(None, histogram), counter.inc, age
        self._attempts[queue, handler, kind] = made
        self._exposition.begin()
        return made

    def _count_publish(self, outcome: Outcome) -> None:
        receipt, event = outcome.receipt, outcome.message.event
        key = event, outcome.kind if receipt is None or receipt.routed else "unrouted"
        count = self._publishes.get(key)
        if count is None:
            declared = event in self.app.events
            count = self._series.value(PUBLISHED, self.app.name, event if declared else OTHER, key[1])
            if declared:  # others may have any number of names
                self._publishes[key] = count
            self._exposition.begin()
        count.inc(1)
        self._publish_seconds.observe(outcome.seconds)

    # --- what is so now

    def update(self) -> None:
        """Set the gauges, and the counters of what is not an outcome."""
        app, series = self.app, self._series
        worker = self._worker
        for event in [*app.events]:
            for kind in PUBLISHES:
                series.value(PUBLISHED, app.name, event, kind)
        if isinstance(worker, Worker):
            state, _ = worker.consumer.connection_state
            series.value(CONNECTED, app.name, "consumer").set(state == "connected")
            self._count_losses("consumer", worker.consumer.connection.losses)
            for handler, count in worker.blocked.copy().items():
                self._count_more(BLOCKED, handler, count)
            running = worker.consumer.running(time.monotonic())
            suffixes = [handler.queue for handler, _, _ in running]
            for consumer in worker.consumer.consumers:
                suffix = consumer.subscription.config.suffix
                series.value(RUNNING, app.name, consumer.name).set(suffixes.count(suffix))
                series.value(PREFETCHED, app.name, consumer.name).set(consumer.in_hand)
        if worker is not None:
            series.value(READY, app.name).set(report(worker).ready)
        if app.has_publisher:
            publisher = app.publisher
            if publisher.connection is not None or publisher.error is not None:  # else it was not needed so far
                open_or_idle = publisher.connection is not None or not publisher.wanted()
                series.value(CONNECTED, app.name, "publisher").set(open_or_idle)
            self._count_losses("publisher", publisher.losses)
        self._update_outboxes()

    def _count_losses(self, connection: str, total: int) -> None:
        self._count_more(LOST, connection, total)

    def _count_more(self, family: Family, label: str, total: int) -> None:
        """Add what is new since the last update: the counter of a process, or a worker, that was replaced goes on."""
        before = self._totals.get((family, label), 0)
        new = total - before if total >= before else total
        self._totals[family, label] = total
        self._series.value(family, self.app.name, label).inc(new)

    def _update_outboxes(self) -> None:
        known = [service.health() for service in self.app.services]
        outboxes = [health for health in known if health.get("waiting") is not None and "set_aside" in health]
        if not outboxes:
            return
        now, name = time.time(), self.app.name
        waiting, failed = (sum(health[state] for health in outboxes) for state in ("waiting", "set_aside"))
        self._series.value(OUTBOX_ROWS, name, "waiting").set(waiting, now)
        self._series.value(OUTBOX_ROWS, name, "failed").set(failed, now)
        oldest = max(health["oldest_seconds"] for health in outboxes)
        self._series.value(OUTBOX_OLDEST, name).set(oldest, now)

    def queue_samples(self) -> Samples:
        return [] if self._queues is None else self._queues.samples()


class _Age:
    """The age of the events of one queue, of which some are measured."""

    def __init__(self, histogram: Histogram) -> None:
        self._histogram = histogram
        self.next_at = 0.0
        """When to measure the next one (monotonic clock)."""

    def measure(self, outcome: Outcome) -> None:
        try:
            message = outcome.message
            age = time.time() - message.time.timestamp() - message.delay
        except errors.DecodeError:  # malformed
            return
        self._histogram.observe(max(0.0, age))


class _Exposition(Collector):
    """The metrics of all apps of this process in one registry. prometheus_client reads them with `collect`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.series = Series()
        self.folder = None if values.ValueClass is values.MutexValue else os.environ.get(processes.VARIABLE)
        """Where several processes have their values; None if there is one process."""
        self._metrics: Living[Metrics] = Living()
        self._begin()
        _expositions.add(self)
        registry.register(self)

    @classmethod
    def of(cls, registry: CollectorRegistry) -> _Exposition:
        with _making:
            known = _exposition_of.get(registry)
            found = None if known is None else known()
            if found is None:
                found = cls(registry)  # the registry keeps it
                _exposition_of[registry] = weakref.ref(found)
            return found

    def add(self, metrics: Metrics) -> None:
        self._metrics.add(metrics)

    def describe(self) -> Iterable[Metric]:
        """So that prometheus_client does not have to `collect` in order to know the names."""
        return [describe(family) for family in FAMILIES]

    def collect(self) -> Iterable[Metric]:
        self.update()
        return self.series.metrics(self._queue_samples())

    def whole(self, registry: CollectorRegistry) -> Collector:
        """Of all processes, and of all others in the registry."""
        return registry if self.folder is None else _Collected(self._collect_merged)

    def _collect_merged(self) -> Iterator[Metric]:
        assert self.folder is not None
        self.update()
        yield from processes.merged(self.folder)
        yield from Series().metrics(self._queue_samples())

    def _queue_samples(self) -> Samples:
        return [sample for metrics in self._metrics for sample in metrics.queue_samples()]

    def update(self) -> None:
        with self._updating:
            for metrics in self._metrics:
                try:
                    metrics.update()
                except Exception:
                    logger.exception("Some metrics of app %r cannot be read.", metrics.app.name)
            self.series.flush()

    # --- the thread that other processes need, since they read only files

    def _begin(self) -> None:
        self._updating = threading.Lock()
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()

    def begin(self) -> None:
        if self.folder is None or self._thread is not None or self._ended.is_set():
            return
        with self._updating:
            if self._thread is None:  # no other thread was faster
                atexit.register(self._end_at_exit)
                self._thread = threading.Thread(target=self._update_regularly, name="lightbus metrics", daemon=True)
                self._thread.start()

    def _update_regularly(self) -> None:
        while not self._ended.wait(TICK):
            self.update()

    def end(self) -> None:
        if not self._ended.is_set():
            self._ended.set()
            self.update()

    def _end_at_exit(self) -> None:
        if self._thread is not None:  # else a child that was forked, and has counted nothing
            self.end()

    def forget(self) -> None:
        """In a forked child: it has separate files, and needs a separate thread. Locks may be held by threads that only
        the parent has.
        """
        self._begin()
        self.series.renew_locks()
        for metrics in self._metrics:
            metrics.renew_lock()
        if self.folder is not None:
            self.series.forget()
            for metrics in self._metrics:
                metrics.forget()


class _Collected(Collector):
    """What a function collects."""

    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterable[Metric]:
        return self._collect()


_Attempt = tuple[Tally, Callable[[float], object] | None, _Age | None]
"""What an attempt of one handler with one outcome is added to: its duration, its counter where that is not the tally's,
its age.
"""
_metrics_of: weakref.WeakValueDictionary[int, Metrics] = weakref.WeakValueDictionary()
"""By the id of the app, which lives as long: it observes with its Metrics."""
_exposition_of: weakref.WeakKeyDictionary[CollectorRegistry, weakref.ref[_Exposition]] = weakref.WeakKeyDictionary()
_expositions: Living[_Exposition] = Living()
_making = threading.Lock()


def _forget_after_fork() -> None:
    for exposition in _expositions:
        exposition.forget()


os.register_at_fork(after_in_child=_forget_after_fork)
