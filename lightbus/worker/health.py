"""Is this worker well? A report of one moment, and a small HTTP server for probes.

`live` says whether ending this process and starting another one would help; `ready` whether it handles events now.
A handler that runs for long, or a full prefetch, is normal work: it is reported, and changes neither.
"""

from __future__ import annotations

import json
import logging
import os
import selectors
import socket
import threading
import time
from collections import Counter
from http import HTTPStatus
from typing import Any

import attrs

from lightbus import errors
from lightbus.consuming.consumer import Consumer
from lightbus.consuming.dispatcher import Dispatcher
from lightbus.consuming.runner import QueueRunner
from lightbus.consuming.timeouts import STUCK
from lightbus.worker.worker import Worker

logger = logging.getLogger("lightbus")

SLOW_LOOP = 10.0
"""Seconds without a turn of the event loop, after which the worker is not ready: nothing begins or ends meanwhile."""
STUCK_LOOP = 120.0
"""Seconds without a turn of the event loop, or in which handlers that do not end held up all others, after which the
worker is not live either: far beyond a handler's time."""

TIME_LIMIT = 5.0
"""Seconds for a whole request and its answer."""
MOST_CONNECTIONS = 64
"""Connections to the health port at most. A new one closes the oldest."""
MOST_BYTES = 8 * 1024
"""Of a request, which has no body."""
CHUNK = 4096
ACCEPTED_AT_ONCE = 16
NO_ROOM_PAUSE = 0.5
"""Seconds without accepting, where the process has no descriptor left."""
TICK = 0.5


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
    oldest = max(running, key=lambda one: one[1], default=None)
    return {
        "count": len(running),
        "oldest": None if oldest is None else {"handler": oldest[0], "seconds": _rounded(oldest[1])},
    }


def _stuck(consumer: Dispatcher, runner: QueueRunner, now: float) -> tuple[str, float] | None:
    """Why handlers that do not end keep others of their queue from running, and for how many seconds they have."""
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


class HealthServer:
    """`/livez` and `/readyz` over HTTP: 200 or 503, and the report as JSON.

    One thread serves all connections and waits for none of them. A connection gets one answer, and `TIME_LIMIT`
    seconds for all of it. Of more than `MOST_CONNECTIONS` the oldest is closed: a probe sends its request at once and
    is answered, though others keep connections open and send nothing.
    """

    def __init__(self, worker: Worker, host: str, port: int) -> None:
        """
        Raises:
            errors.WorkerError: the port cannot be had.
        """
        self._worker = worker
        try:
            self._listener = _listen(host, port)
            self._selector = selectors.DefaultSelector()
        except (OSError, OverflowError) as error:
            number = getattr(error, "errno", None) or 0  # of an address that cannot be resolved, it is below 0
            raise errors.WorkerError(
                f"--health-port: {host}:{port} is not available: {os.strerror(number) if number > 0 else error}. Does "
                "another worker use it? Choose another port."
            ) from error
        self._connections: dict[_Connection, None] = {}
        """From the oldest to the newest."""
        self._accept_at: float | None = None
        """When to accept again, after there was no descriptor for a connection."""
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="lightbus health", daemon=True)
        self.port = int(self._listener.getsockname()[1])
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closing = True
        self._thread.join()

    def _serve(self) -> None:
        self._selector.register(self._listener, selectors.EVENT_READ)
        try:
            while not self._closing:
                ready = self._selector.select(self._pause())
                for key, _ in ready:  # those that have sent something first: `_accept` may close the oldest
                    if key.data is not None:
                        self._go_on(key.data)
                if any(key.data is None for key, _ in ready):
                    self._accept()
                self._close_the_late()
        finally:
            for connection in [*self._connections]:
                self._close(connection)
            self._selector.close()
            self._listener.close()

    def _pause(self) -> float:
        due = [next(iter(self._connections)).deadline] if self._connections else []
        due += [] if self._accept_at is None else [self._accept_at]
        now = time.monotonic()
        return max(0.0, min([TICK, *(at - now for at in due)]))

    def _close_the_late(self) -> None:
        now = time.monotonic()
        while self._connections and (oldest := next(iter(self._connections))).deadline <= now:
            self._close(oldest)
        if self._accept_at is not None and self._accept_at <= now:
            self._accept_at = None
            self._selector.register(self._listener, selectors.EVENT_READ)

    def _accept(self) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                accepted, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError:
                # The process has no descriptor left. Until it has one, each try would fail at once.
                if self._connections:
                    self._close(next(iter(self._connections)))
                self._selector.unregister(self._listener)
                self._accept_at = time.monotonic() + NO_ROOM_PAUSE
                return
            accepted.setblocking(False)
            connection = _Connection(accepted, time.monotonic() + TIME_LIMIT)
            self._connections[connection] = None
            self._selector.register(accepted, selectors.EVENT_READ, connection)
            if len(self._connections) > MOST_CONNECTIONS:
                self._close(next(iter(self._connections)))

    def _go_on(self, connection: _Connection) -> None:
        """Read or write what is possible now."""
        try:
            if connection.unsent is None:
                if connection.receive():
                    connection.unsent = memoryview(self._answer(connection.received))
                    self._selector.modify(connection.socket, selectors.EVENT_WRITE, connection)
            elif connection.unsent:
                connection.unsent = connection.unsent[connection.socket.send(connection.unsent) :]
                if not connection.unsent:
                    connection.socket.shutdown(socket.SHUT_WR)
                    self._selector.modify(connection.socket, selectors.EVENT_READ, connection)
            elif not connection.socket.recv(CHUNK):
                # Only now that the client has closed: to close with something unread resets the connection, and the
                # answer may be lost.
                self._close(connection)
        except BlockingIOError:
            pass
        except (OSError, EOFError):  # a probe that hung up is no news
            self._close(connection)

    def _close(self, connection: _Connection) -> None:
        del self._connections[connection]
        self._selector.unregister(connection.socket)
        connection.socket.close()

    def _answer(self, request: bytes) -> bytes:
        method, _, rest = request.partition(b"\n")[0].strip().partition(b" ")
        target, _, version = rest.partition(b" ")
        if not _is_whole(request) or len(request) > MOST_BYTES or not version.startswith(b"HTTP/"):
            return _response(400, {"error": f"This is not an HTTP request of at most {MOST_BYTES:,} bytes."})
        if method not in (b"GET", b"HEAD"):
            return _response(405, {"error": "Use GET or HEAD."})
        path = target.partition(b"?")[0]
        if path not in (b"/livez", b"/readyz"):
            return _response(404, {"error": "Use /livez or /readyz."}, head=method == b"HEAD")
        try:
            found = report(self._worker)
        except Exception as error:
            logger.exception("The health report failed.")
            return _response(500, {"error": f"the report failed: {error!r}"}, head=method == b"HEAD")
        well = found.live if path == b"/livez" else found.ready
        return _response(200 if well else 503, found.body, head=method == b"HEAD")


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=MOST_CONNECTIONS)
    listener.setblocking(False)
    return listener


@attrs.define(eq=False)
class _Connection:
    socket: socket.socket
    deadline: float
    """On the monotonic clock."""
    received: bytes = b""
    unsent: memoryview | None = None
    """What is left of the answer, once there is one."""

    def receive(self) -> bool:
        """Whether the request has arrived, or as much of it as there may be.

        Raises:
            EOFError: the client has closed before.
        """
        more = self.socket.recv(CHUNK)
        if not more:
            raise EOFError
        self.received += more
        return _is_whole(self.received) or len(self.received) > MOST_BYTES


def _is_whole(request: bytes) -> bool:
    return b"\n\r\n" in request or b"\n\n" in request


def _response(status: int, body: dict[str, Any], *, head: bool = False) -> bytes:
    content = json.dumps(body, indent=1).encode() + b"\n"
    lines = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        "Server: lightbus",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
        "Cache-Control: no-store",
        "Connection: close",
        *(["Allow: GET, HEAD"] if status == 405 else []),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + (b"" if head else content)
