"""The health port with slow, many and invalid clients, and without file descriptors."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import resource
import signal
import socket
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
    options = ("worker", "billing:app", "--health-port", "0")
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
