"""The health of a worker process.

`live` is False if a restart of the process would help. `ready` is False if it handles no events now. A handler that
runs for a long time, or a full prefetch, is normal: it is reported, and changes neither.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import attrs

from lightbus.consuming.consumer import Consumer
from lightbus.consuming.dispatcher import Dispatcher
from lightbus.consuming.runner import QueueRunner
from lightbus.consuming.timeouts import STUCK
from lightbus.worker.services import ServiceRunner
from lightbus.worker.worker import Worker

SLOW_LOOP = 10.0
"""Seconds without an iteration of the event loop, after which the worker is not ready: no handler starts or ends."""
STUCK_LOOP = 120.0
"""Seconds without an iteration of the event loop, or in which handlers that do not end block all others, after which
the worker is not live. Much longer than the default timeout of a handler."""


@attrs.frozen
class Report:
    """What a probe receives."""

    live: bool
    ready: bool
    problems: list[str]
    """Why it is not ready."""
    body: dict[str, Any]


def report(worker: Worker | ServiceRunner, now: float | None = None) -> Report:
    """Report the health of a worker or a relay. Works from any thread, even if the event loop is blocked."""
    now = time.monotonic() if now is None else now
    if isinstance(worker, ServiceRunner):
        return _of_services(worker, now)
    consumer = worker.consumer
    problems: list[str] = []
    live = True
    loop_age = None if consumer.beat is None else max(0.0, now - consumer.beat)
    if loop_age is not None and loop_age > SLOW_LOOP:
        problems.append(f"the event loop has not run for {loop_age:.0f} s: a handler blocks it")
        live = loop_age < STUCK_LOOP
    connection, error = consumer.connection_state
    if not worker.started and connection != "connected":
        problems.append("it has not started yet")
    if connection != "connected":
        problems.append(f"not connected: {error or 'no answer so far'}")
    elif not consumer.connected:
        problems.append("not subscribed to every queue: still starting, or stopping")
    if worker.started and not consumer.reading:
        problems.append("the thread that reads from the broker has ended")
        live = False
    queues = [_queue(one, now) for one in consumer.consumers]
    for runner in consumer.runners:
        stuck = _stuck(consumer, runner, now)
        if stuck is not None:
            problem, seconds = stuck
            problems.append(problem)
            live = live and seconds < STUCK_LOOP
    problems += [
        f"connected but possibly stalled: {one.watch.suspicion}"
        for one in consumer.consumers
        if one.watch.suspicion is not None
    ]
    publisher, why = _publisher(worker)
    blocked = worker.blocked.copy()
    if publisher in ("unreachable", "blocked", "refused"):
        problems.append(f"publishing is not possible, so nothing can be retried: {why}")
    body = {
        "live": live,
        "ready": not problems,
        "problems": problems,
        "app": worker.app.name,
        "connection": {"state": connection, "error": error},
        "queues": queues,
        "event_loop": {
            "last_turn_seconds_ago": _rounded(loop_age),
            "blocked": blocked.total(),
            "blocked_by": dict(blocked),
        },
        "publisher": {"state": publisher, "error": why},
        "handlers": {
            "running": _running(worker, now),
            "over_timeout": _over_timeout(consumer, now),
            "ended": consumer.handled,
        },
    }
    body |= {service.name: dict(service.health()) for service in worker.app.services}
    return Report(live, not problems, problems, body)


def _of_services(runner: ServiceRunner, now: float) -> Report:
    """A relay is not ready while it cannot send."""
    problems: list[str] = []
    loop_age = None if runner.beat is None else max(0.0, now - runner.beat)
    if loop_age is not None and loop_age > SLOW_LOOP:
        problems.append(f"the event loop has not run for {loop_age:.0f} s: a call blocks it")
    if not runner.started:
        problems.append("it has not started yet")
    services = {service.name: dict(service.health()) for service in runner.app.services}
    problems += [f"{name}: {health['error']}" for name, health in services.items() if health.get("error")]
    live = loop_age is None or loop_age < STUCK_LOOP
    body = {
        "live": live,
        "ready": not problems,
        "problems": problems,
        "app": runner.app.name,
        "event_loop": {"last_turn_seconds_ago": _rounded(loop_age)},
        **services,
    }
    return Report(live, not problems, problems, body)


def _queue(consumer: Consumer, now: float) -> dict[str, Any]:
    watch = consumer.watch
    return {
        "name": consumer.name,
        "subscribed": bool(consumer.consumer_tag),
        "in_hand": consumer.in_hand,
        "prefetch": consumer.prefetch,
        "prefetch_full": not consumer.room,
        "consumption_proven_seconds_ago": None if watch.proven is None else _rounded(now - watch.proven),
        "checked_every_seconds": watch.interval,
        "suspicion": watch.suspicion,
        "rebuilds_in_a_row": watch.rebuilds,
    }


def _publisher(worker: Worker) -> tuple[str, str | None]:
    publisher = worker.app.publisher
    connection, error = publisher.connection, publisher.error
    unkept, why = worker.consumer.unkept
    if connection is not None and connection.blocked:
        return "blocked", "the broker accepts no messages (a memory or disk alarm)"
    if error is not None and (unkept or publisher.wanted()):
        return "unreachable", str(error)
    if unkept:
        return "refused", f"{unkept} failed event{'s' if unkept > 1 else ''} cannot be stored for a retry: {why}"
    return ("idle" if connection is None else "connected"), None


def _running(worker: Worker, now: float) -> dict[str, Any]:
    running = worker.consumer.running(now)
    oldest = max(running, key=lambda one: one[2], default=None)
    return {
        "count": len(running),
        "oldest": None if oldest is None else {"handler": oldest[0].name, "seconds": _rounded(oldest[2])},
    }


def _stuck(consumer: Dispatcher, runner: QueueRunner, now: float) -> tuple[str, float] | None:
    """If handlers that do not end block all others of their queue: a description, and for how many seconds."""
    config = runner.subscription.config
    holding, left_behind = consumer.late(runner)
    holding = [late for late in holding if now - late.since > STUCK]
    if len(holding) >= config.concurrency:
        late = holding + left_behind
        what = f"nothing of {config.name!r} is handled"
    elif runner.pool.short:
        late = left_behind
        what = f"sync handlers of {config.name!r} get no thread"
    else:
        return None
    names = Counter(one.handler for one in late)
    shown = ", ".join(f"{name} ({count})" for name, count in sorted(names.items()))
    return f"{what}: handlers that exceeded their timeout do not stop: {shown}", min(now - one.since for one in late)


def _over_timeout(consumer: Dispatcher, now: float) -> dict[str, Any]:
    late = [one for runner in consumer.runners for some in consumer.late(runner) for one in some]
    oldest = min(late, key=lambda one: one.since, default=None)
    return {
        "count": len(late),
        "oldest": None if oldest is None else {"handler": oldest.handler, "seconds": _rounded(now - oldest.since)},
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(max(0.0, seconds), 1)
