"""The health port with slow, many and invalid clients, and without file descriptors."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightbus import Lightbus
from lightbus.worker import health_server
from lightbus.worker.worker import Worker
from tests.integration.test_health import BUS, probe
from tests.patience import LIMIT, wait_until
from tests.processes import LIGHTBUS, Program, lightbus

FILES = {"billing.py": BUS + '\n@app.event("invoice.paid")\nclass Paid:\n    number: int\n'}


@pytest.fixture
def server() -> Iterator[health_server.HealthServer]:
    app = Lightbus("billing", url="memory://")
    app.on("invoice.*")(lambda invoice: None)
    server = health_server.HealthServer(Worker(app), "127.0.0.1", 0)
    yield server
    server.close()


def ask(port: int, request: bytes) -> bytes:
    """Everything that the server sends, until it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=LIMIT) as client:
        client.sendall(request)
        answer = b""
        while more := client.recv(4096):
            answer += more
    return answer


def is_closed(client: socket.socket) -> bool:
    client.settimeout(0.01)
    try:
        return client.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"GET /livez HTTP/1.1", b"200 OK"),
        (b"GET /readyz HTTP/1.0", b"503 Service Unavailable"),
        (b"HEAD /readyz?verbose HTTP/1.1", b"503 Service Unavailable"),
        (b"GET /other HTTP/1.1", b"404 Not Found"),
        (b"POST /livez HTTP/1.1", b"405 Method Not Allowed"),
        (b"GET /livez", b"400 Bad Request"),
        (b"\x16\x03\x01 TLS", b"400 Bad Request"),
        (b"GET /livez HTTP/1.1\r\nX: " + b"x" * 10_000, b"400 Bad Request"),
    ],
)
def test_each_request_gets_one_response(server: health_server.HealthServer, request_line: bytes, status: bytes) -> None:
    server.start()
    head, _, body = ask(server.port, request_line + b"\r\nHost: billing\r\n\r\n").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 " + status + b"\r\n")
    assert b"\r\nConnection: close" in head
    if request_line.startswith(b"HEAD"):
        assert body == b""
    else:
        assert b"\r\nContent-Length: %d\r\n" % len(body) in head
        assert isinstance(json.loads(body), dict)


def test_a_request_that_never_ends_is_closed_after_the_time_limit(
    server: health_server.HealthServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health_server, "TIME_LIMIT", 0.5)
    server.start()
    with socket.create_connection(("127.0.0.1", server.port), timeout=LIMIT) as slow:
        slow.sendall(b"GET /livez HTTP/1.1\r\n")

        def is_cut_off() -> bool:
            with contextlib.suppress(OSError):
                slow.send(b"X")
                return is_closed(slow)
            return True

        wait_until(is_cut_off, "the server closes the connection")


def test_a_response_that_is_not_read_is_closed_after_the_time_limit(
    server: health_server.HealthServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health_server, "TIME_LIMIT", 0.5)
    server.start()
    with socket.create_connection(("127.0.0.1", server.port), timeout=LIMIT) as idle:
        idle.sendall(b"GET /livez HTTP/1.1\r\n\r\n")
        wait_until(lambda: not server.open_connections and idle.recv(1), "the server closes the connection")


def test_with_too_many_connections_the_oldest_is_closed(server: health_server.HealthServer) -> None:
    server.start()
    with contextlib.ExitStack() as opened:
        clients = [
            opened.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=LIMIT))
            for _ in range(health_server.MOST_CONNECTIONS + 1)
        ]
        wait_until(lambda: is_closed(clients[0]), "the oldest is closed")
        clients[-1].settimeout(LIMIT)
        clients[-1].sendall(b"GET /livez HTTP/1.1\r\n\r\n")
        assert clients[-1].recv(15) == b"HTTP/1.1 200 OK"


def test_without_file_descriptors_it_pauses_and_answers_later(server: health_server.HealthServer) -> None:
    real, tried = server.listener, list[float]()

    class Listener:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def accept(self) -> Any:
            tried.append(time.monotonic())
            if len(tried) < 4:
                raise OSError(errno.EMFILE, "Too many open files")
            return real.accept()

    server.listener = Listener()  # type: ignore[assignment]
    server.start()
    assert ask(server.port, b"GET /livez HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 200 OK")
    assert all(later - earlier >= health_server.NO_ROOM_PAUSE for earlier, later in itertools.pairwise(tried[:4]))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_worker_answers_probes_and_handles_events_with_a_thousand_slow_connections(folder: Path, url: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2000:
        pytest.skip("needs 2,000 descriptors")
    limited = ("/bin/sh", "-c", 'ulimit -n 256; exec "$@"', "sh", *LIGHTBUS)
    # A contract is published by a thread that begins after "Ready".
    options = ("worker", "billing:app", "--health-port", "0", "--no-contract")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2000), hard))
    try:
        with (
            Program(*options, folder=folder, url=url, program=limited) as worker,
            contextlib.ExitStack() as opened,
        ):
            base = worker.wait_for(r"Health: (http://127\.0\.0\.1:\d+)/livez")[1]
            worker.wait_for("Ready")
            wait_until(lambda: probe(f"{base}/readyz")[0] == 200, "ready")
            threads = _count(worker, "task")
            port = int(base.rpartition(":")[2])
            for number in range(1000):
                slow = socket.create_connection(("127.0.0.1", port), timeout=LIMIT)
                opened.enter_context(slow).sendall(b"GET /livez HTTP/1.1\r\nX: ")
                if number % 100 == 99:
                    assert probe(f"{base}/readyz")[0] == 200
            assert _count(worker, "task") <= threads
            assert _count(worker, "fd") < 200
            done = lightbus("publish", "billing:app", "invoice.paid", "number=1", folder=folder, url=url)
            assert done.returncode == 0, done.stderr
            wait_until(lambda: probe(f"{base}/livez")[1]["handlers"]["ended"] >= 1, "the event is handled")
            assert worker.end(signal.SIGTERM) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _count(worker: Program, what: str) -> int:
    return len(list(Path(f"/proc/{worker.process.pid}/{what}").iterdir()))


# --- other pages ------------------------------------------------------------------------------


@pytest.fixture
def paged() -> Iterator[tuple[health_server.HealthServer, threading.Event]]:
    """A server with a page that echoes the Accept header, one that fails, one that counts its requests, and one that
    waits for the event."""
    app = Lightbus("billing", url="memory://")
    app.on("invoice.*")(lambda invoice: None)
    waited = threading.Event()

    def fails(accept: str) -> tuple[str, bytes]:
        raise ValueError("broken")

    def waits(accept: str) -> tuple[str, bytes]:
        assert waited.wait(LIMIT)
        return "text/plain", b"x" * 3_000_000

    made = itertools.count(1)
    pages = {
        "/echo": lambda accept: ("text/plain", accept.encode()),
        "/fails": fails,
        "/made": lambda accept: ("text/plain", b"%d" % next(made)),
        "/waits": waits,
    }
    server = health_server.HealthServer(Worker(app), "127.0.0.1", 0, pages)
    server.start()
    yield server, waited
    waited.set()
    server.close()


def test_a_page_gets_the_accept_header(paged: tuple[health_server.HealthServer, threading.Event]) -> None:
    port = paged[0].port
    head, _, body = ask(
        port, b"GET /echo?x HTTP/1.1\r\nHost: a\r\naccept: text/*\r\nAccept: x/y;q=0.1\r\n\r\n"
    ).partition(b"\r\n\r\n")
    assert b"\r\nContent-Type: text/plain\r\n" in head
    assert body == b"text/*,x/y;q=0.1"
    head, _, body = ask(port, b"HEAD /echo HTTP/1.1\r\nAccept: text/*\r\n\r\n").partition(b"\r\n\r\n")
    assert (head.startswith(b"HTTP/1.1 200 OK"), body) == (True, b"")
    assert b"\r\nContent-Length: 6\r\n" in head
    assert b"Use /livez, /readyz, /echo, /fails, /made or /waits." in ask(port, b"GET / HTTP/1.1\r\n\r\n")
    assert ask(port, b"GET /fails HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 500 ")


def test_a_page_that_takes_long_delays_no_probe(
    paged: tuple[health_server.HealthServer, threading.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health_server, "TIME_LIMIT", LIMIT)
    server, waited = paged
    address = ("127.0.0.1", server.port)
    with (
        socket.create_connection(address, timeout=LIMIT) as slow,
        socket.create_connection(address, timeout=LIMIT) as gone,
    ):
        for client in (slow, gone):
            client.sendall(b"GET /waits HTTP/1.1\r\n\r\n")
        wait_until(lambda: server.open_connections == 2, "both wait")
        assert ask(server.port, b"GET /livez HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 200 OK")
        gone.close()
        waited.set()
        received = 0
        while more := slow.recv(65_536):
            received += len(more)
        assert received > 3_000_000
    wait_until(lambda: not server.open_connections, "both are closed")


def test_a_page_that_takes_too_long_is_closed(
    paged: tuple[health_server.HealthServer, threading.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health_server, "TIME_LIMIT", 0.5)
    server, waited = paged
    assert ask(server.port, b"GET /waits HTTP/1.1\r\n\r\n") == b""
    monkeypatch.setattr(health_server, "TIME_LIMIT", LIMIT)
    waited.set()
    assert ask(server.port, b"GET /echo HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 200 OK")


def test_a_page_is_not_made_for_a_connection_that_is_closed(
    paged: tuple[health_server.HealthServer, threading.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health_server, "TIME_LIMIT", 0.5)
    server, waited = paged
    assert ask(server.port, b"GET /waits HTTP/1.1\r\n\r\n") == b""
    assert ask(server.port, b"GET /made HTTP/1.1\r\n\r\n") == b""  # it has waited for the first page
    monkeypatch.setattr(health_server, "TIME_LIMIT", LIMIT)
    waited.set()
    assert ask(server.port, b"GET /made HTTP/1.1\r\n\r\n").endswith(b"\r\n\r\n1")
