"""Is this worker well? The truth of one moment, and a small HTTP server that tells it to whoever probes.

`live` says whether ending this process and starting another one would help; `ready` whether it handles events now.
A handler that runs for long, or a full prefetch, is work and no illness: it is told, and changes neither.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import attrs

from lightbus import errors
from lightbus.consumer import Consumer
from lightbus.pool import STUCK
from lightbus.subscriber import Lane
from lightbus.worker import Worker

SLOW_LOOP = 10.0
"""Seconds without a turn of the event loop, after which the worker is not ready: nothing begins or ends meanwhile."""
STUCK_LOOP = 120.0
"""Seconds without a turn of the event loop, or in which handlers that do not end held up all others, after which the
worker is not live either: far beyond a handler's time."""
REQUEST_LIMIT = 5.0


@attrs.frozen
class Report:
    """What a probe gets."""

    live: bool
    ready: bool
    problems: list[str]
    """Why it is not."""
    body: dict[str, Any]


def report(worker: Worker, now: float | None = None) -> Report:
    """How a worker is, from any thread, also while its event loop is blocked."""
    now = time.monotonic() if now is None else now
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
        problems.append("not subscribed to every queue (yet, or because it is stopping)")
    if worker.started and not consumer.reading:
        problems.append("the thread that reads from the broker has ended")
        live = False
    queues = [_queue(lane, now) for lane in consumer.lanes]
    for lane in consumer.lanes:
        stuck = _stuck(consumer, lane, now)
        if stuck is not None:
            problem, seconds = stuck
            problems.append(problem)
            live = live and seconds < STUCK_LOOP
    problems += [
        f"connected but perhaps deaf: {lane.watch.suspicion}"
        for lane in consumer.lanes
        if lane.watch.suspicion is not None
    ]
    publisher, why = _publisher(worker)
    if publisher in ("unreachable", "blocked", "refused"):
        problems.append(f"publishing is not possible, so nothing can be retried: {why}")
    body = {
        "live": live,
        "ready": not problems,
        "problems": problems,
        "app": worker.app.name,
        "connection": {"state": connection, "error": error},
        "queues": queues,
        "event_loop": {"last_turn_seconds_ago": _rounded(loop_age)},
        "publisher": {"state": publisher, "error": why},
        "handlers": {
            "running": _running(worker, now),
            "over_timeout": _over_timeout(consumer, now),
            "ended": consumer.handled,
        },
    }
    return Report(live, not problems, problems, body)


def _queue(lane: Any, now: float) -> dict[str, Any]:
    watch = lane.watch
    in_hand = lane.in_hand
    return {
        "name": lane.name,
        "subscribed": bool(lane.consumer_tag),
        "in_hand": in_hand,
        "prefetch": lane.prefetch,
        "prefetch_full": not lane.room,
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
        return "blocked", "the broker takes no messages (a memory or disk alarm)"
    if error is not None and (unkept or publisher.wanted()):
        return "unreachable", str(error)
    if unkept:
        return "refused", f"{unkept} failed event{'s' if unkept > 1 else ''} cannot be kept for a retry: {why}"
    return ("idle" if connection is None else "connected"), None


def _running(worker: Worker, now: float) -> dict[str, Any]:
    running = worker.consumer.running(now)
    oldest = max(running, key=lambda one: one[1], default=None)
    return {
        "count": len(running),
        "oldest": None if oldest is None else {"handler": oldest[0], "seconds": _rounded(oldest[1])},
    }


def _stuck(consumer: Consumer, lane: Lane, now: float) -> tuple[str, float] | None:
    """Why handlers that do not end keep others of their queue from running, and for how many seconds they have."""
    holding, left_behind = consumer.late(lane)
    holding = [late for late in holding if now - late.since > STUCK]
    if len(holding) >= lane.concurrency:
        late = holding + left_behind
        what = f"nothing of {lane.name!r} is handled"
    elif consumer.threads_are_short(lane):
        late = left_behind
        what = f"plain handlers of {lane.name!r} get no thread"
    else:
        return None
    names = Counter(one.handler for one in late)
    shown = ", ".join(f"{name} ({count})" for name, count in sorted(names.items()))
    return f"{what}: handlers over their timeout do not end: {shown}", min(now - one.since for one in late)


def _over_timeout(consumer: Consumer, now: float) -> dict[str, Any]:
    late = [one for lane in consumer.lanes for some in consumer.late(lane) for one in some]
    oldest = min(late, key=lambda one: one.since, default=None)
    return {
        "count": len(late),
        "oldest": None if oldest is None else {"handler": oldest.handler, "seconds": _rounded(now - oldest.since)},
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(max(0.0, seconds), 1)


class HealthServer:
    """`/livez` and `/readyz` over HTTP, from a thread of its own: 200 or 503, and the report as JSON."""

    def __init__(self, worker: Worker, host: str, port: int) -> None:
        """
        Raises:
            errors.WorkerError: the port cannot be had.
        """

        class Handler(_Handler):
            reported = worker

        try:
            self._server = _Server((host, port), Handler)
        except (OSError, OverflowError) as error:
            raise errors.WorkerError(
                f"--health-port: {host}:{port} cannot be had: {getattr(error, 'strerror', None) or error}. "
                "Does another worker use it? Choose another port."
            ) from error
        self.port = int(self._server.server_address[1])
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def start(self) -> None:
        threading.Thread(target=self._server.serve_forever, name="lightbus health", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A probe that hung up is no news."""


class _Handler(BaseHTTPRequestHandler):
    reported: Worker
    timeout = REQUEST_LIMIT
    server_version = "lightbus"
    sys_version = ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path not in ("/livez", "/readyz"):
            self._answer(404, {"error": "There are /livez and /readyz."})
            return
        found = report(self.reported)
        well = found.live if path == "/livez" else found.ready
        self._answer(200 if well else 503, found.body)

    do_HEAD = do_GET

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body, indent=1).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Probes come every few seconds: not into the worker's log."""
