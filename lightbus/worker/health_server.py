"""The HTTP server for health probes, `/livez` and `/readyz`, and for other pages, such as `/metrics`."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

import attrs

from lightbus import errors
from lightbus.worker.health import report
from lightbus.worker.services import ServiceRunner
from lightbus.worker.worker import Worker

logger = logging.getLogger("lightbus")

TIME_LIMIT = 5.0
"""Seconds for a request and its response."""
MOST_CONNECTIONS = 64
"""Maximum number of open connections. A new one closes the oldest."""
MOST_BYTES = 8 * 1024
"""Maximum size of a request, which has no body."""
CHUNK = 4096
ACCEPTED_AT_ONCE = 16
NO_ROOM_PAUSE = 0.5
"""Seconds without accepting connections, if the process has no file descriptor left."""
TICK = 0.5

Page = Callable[[str], tuple[str, bytes]]
"""Called with the request's Accept header; returns the content type and the content. It may take a while."""


class HealthServer:
    """Answers `/livez` and `/readyz` over HTTP with 200 or 503, and the report as JSON.

    One thread serves all connections with non-blocking sockets. A connection gets one response, within `TIME_LIMIT`
    seconds. With more than `MOST_CONNECTIONS`, the oldest is closed: so a probe gets its response even if other clients
    keep connections open and send nothing. A second thread makes the other pages, one after the other: so a probe gets
    its response while one of them takes long.
    """

    def __init__(
        self, worker: Worker | ServiceRunner, host: str, port: int, pages: Mapping[str, Page] | None = None
    ) -> None:
        """
        Args:
            pages: what it serves besides, by path.

        Raises:
            errors.WorkerError: the port is not available.
        """
        self._worker = worker
        self._pages = {path.encode(): page for path, page in (pages or {}).items()}
        self._requested: queue.SimpleQueue[tuple[_Connection, Page, str, bool] | None] = queue.SimpleQueue()
        self._made: queue.SimpleQueue[tuple[_Connection, bytes]] = queue.SimpleQueue()
        try:
            self.listener = _listen(host, port)
            self._selector = selectors.DefaultSelector()
        except (OSError, OverflowError) as error:
            number = getattr(error, "errno", None) or 0  # below 0 if the address cannot be resolved
            raise errors.WorkerError(
                f"--health-port: {host}:{port} is not available: {os.strerror(number) if number > 0 else error}. Does "
                "another worker use it? Choose another port."
            ) from error
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._connections: dict[_Connection, None] = {}
        """From the oldest to the newest."""
        self._accept_at: float | None = None
        """When to accept again, after the process had no file descriptor left."""
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="lightbus health", daemon=True)
        self.port = int(self.listener.getsockname()[1])
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def open_connections(self) -> int:
        return len(self._connections)

    def start(self) -> None:
        self._thread.start()
        if self._pages:
            threading.Thread(target=self._make_pages, name="lightbus health: pages", daemon=True).start()

    def close(self) -> None:
        self._closing = True
        self._requested.put(None)
        self._thread.join()

    def _serve(self) -> None:
        self._selector.register(self.listener, selectors.EVENT_READ)
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._wake_read)
        try:
            while not self._closing:
                ready = self._selector.select(self._pause())
                for key, _ in ready:  # connections with data first: `_accept` may close the oldest
                    if isinstance(key.data, _Connection):
                        self._proceed(key.data)
                    elif key.data is not None:
                        self._send_pages()
                if any(key.data is None for key, _ in ready):
                    self._accept()
                self._close_overdue()
        finally:
            for connection in [*self._connections]:
                self._close(connection)
            self._selector.close()
            self.listener.close()
            self._wake_read.close()
            self._wake_write.close()

    # --- pages

    def _make_pages(self) -> None:
        while (request := self._requested.get()) is not None:
            connection, page, accept, head = request
            if connection not in self._connections:  # closed meanwhile: nobody waits for the page
                continue
            try:
                content_type, content = page(accept)
                answer = _response(200, content, content_type, head=head)
            except Exception as error:
                logger.exception("The page failed.")
                answer = _response(500, {"error": f"the page failed: {error!r}"}, head=head)
            self._made.put((connection, answer))
            with contextlib.suppress(OSError):  # it was woken already, or has ended
                self._wake_write.send(b"\0")

    def _send_pages(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._wake_read.recv(CHUNK):
                pass
        while not self._made.empty():
            connection, answer = self._made.get()
            if connection in self._connections:  # not closed meanwhile
                connection.unsent = memoryview(answer)
                self._selector.register(connection.socket, selectors.EVENT_WRITE, connection)

    def _pause(self) -> float:
        due = [next(iter(self._connections)).deadline] if self._connections else []
        due += [] if self._accept_at is None else [self._accept_at]
        now = time.monotonic()
        return max(0.0, min([TICK, *(at - now for at in due)]))

    def _close_overdue(self) -> None:
        now = time.monotonic()
        while self._connections and (oldest := next(iter(self._connections))).deadline <= now:
            self._close(oldest)
        if self._accept_at is not None and self._accept_at <= now:
            self._accept_at = None
            self._selector.register(self.listener, selectors.EVENT_READ)

    def _accept(self) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                accepted, _ = self.listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError:
                # The process has no file descriptor left. Another attempt would fail at once.
                if self._connections:
                    self._close(next(iter(self._connections)))
                self._selector.unregister(self.listener)
                self._accept_at = time.monotonic() + NO_ROOM_PAUSE
                return
            accepted.setblocking(False)
            connection = _Connection(accepted, time.monotonic() + TIME_LIMIT)
            self._connections[connection] = None
            self._selector.register(accepted, selectors.EVENT_READ, connection)
            if len(self._connections) > MOST_CONNECTIONS:
                self._close(next(iter(self._connections)))

    def _proceed(self, connection: _Connection) -> None:
        """Read or write what is possible without waiting."""
        try:
            if connection.unsent is None:
                if connection.receive():
                    answer = self._answer(connection)
                    if answer is None:  # `_send_pages` goes on
                        self._selector.unregister(connection.socket)
                    else:
                        connection.unsent = memoryview(answer)
                        self._selector.modify(connection.socket, selectors.EVENT_WRITE, connection)
            elif connection.unsent:
                connection.unsent = connection.unsent[connection.socket.send(connection.unsent) :]
                if not connection.unsent:
                    connection.socket.shutdown(socket.SHUT_WR)
                    self._selector.modify(connection.socket, selectors.EVENT_READ, connection)
            elif not connection.socket.recv(CHUNK):
                # Close only after the client has: closing with unread data resets the connection, and the response
                # may be lost.
                self._close(connection)
        except BlockingIOError:
            pass
        except (OSError, EOFError):  # the probe has closed the connection
            self._close(connection)

    def _close(self, connection: _Connection) -> None:
        del self._connections[connection]
        with contextlib.suppress(KeyError):  # it waits for its page
            self._selector.unregister(connection.socket)
        connection.socket.close()

    def _answer(self, connection: _Connection) -> bytes | None:
        """None: a page is made."""
        request = connection.received
        method, _, rest = request.partition(b"\n")[0].strip().partition(b" ")
        target, _, version = rest.partition(b" ")
        if not _is_complete(request) or len(request) > MOST_BYTES or not version.startswith(b"HTTP/"):
            return _response(400, {"error": f"This is not an HTTP request of at most {MOST_BYTES:,} bytes."})
        if method not in (b"GET", b"HEAD"):
            return _response(405, {"error": "Use GET or HEAD."})
        path = target.partition(b"?")[0]
        if path in self._pages:
            self._requested.put((connection, self._pages[path], _accept_header(request), method == b"HEAD"))
            return None
        if path not in (b"/livez", b"/readyz"):
            paths = ["/livez", "/readyz", *(path.decode() for path in self._pages)]
            use = f"Use {', '.join(paths[:-1])} or {paths[-1]}."
            return _response(404, {"error": use}, head=method == b"HEAD")
        try:
            found = report(self._worker)
        except Exception as error:
            logger.exception("The health report failed.")
            return _response(500, {"error": f"the report failed: {error!r}"}, head=method == b"HEAD")
        healthy = found.live if path == b"/livez" else found.ready
        return _response(200 if healthy else 503, found.body, head=method == b"HEAD")


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
    """The rest of the response; None while the request is incomplete."""

    def receive(self) -> bool:
        """Read more of the request. Returns whether it is complete, or too long.

        Raises:
            EOFError: the client has closed the connection.
        """
        more = self.socket.recv(CHUNK)
        if not more:
            raise EOFError
        self.received += more
        return _is_complete(self.received) or len(self.received) > MOST_BYTES


def _is_complete(request: bytes) -> bool:
    return b"\n\r\n" in request or b"\n\n" in request


def _accept_header(request: bytes) -> str:
    values = [
        value.strip()
        for name, _, value in (line.partition(b":") for line in request.split(b"\n")[1:])
        if name.strip().lower() == b"accept"
    ]
    return b",".join(values).decode("latin-1")


def _response(
    status: int, body: dict[str, Any] | bytes, content_type: str = "application/json", *, head: bool = False
) -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body, indent=1).encode() + b"\n"
    lines = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        "Server: lightbus",
        f"Content-Type: {content_type}",
        f"Content-Length: {len(content)}",
        "Cache-Control: no-store",
        "Connection: close",
        *(["Allow: GET, HEAD"] if status == 405 else []),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + (b"" if head else content)
