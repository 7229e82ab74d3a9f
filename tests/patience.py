"""How long tests wait. The limits are long, because the machine may be busy: they only end a hang."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

LIMIT = 60.0
"""Seconds after which a test fails. Far more than anything takes."""

DELAY = 15.0
"""Seconds that a busy machine may add to a limit in the code."""


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Call the condition until it is true."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, f"not within {LIMIT:g} s: {what}"
        time.sleep(0.02)


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """The block ends within its own limit of so many seconds, plus DELAY for a busy machine."""
    began = time.monotonic()
    try:
        yield
    finally:
        took = time.monotonic() - began
        assert took < seconds + DELAY, f"it took {took:.1f} s, where {seconds:g} s is the limit"


@contextlib.contextmanager
def silent_server() -> Iterator[socket.socket]:
    """A server that accepts connections and never answers. Its `accept` waits for at most LIMIT."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(LIMIT)
        yield server


def sometimes_within(seconds: float, attempt: Callable[[], float]) -> None:
    """Repeat until an attempt takes less than so many seconds: on a busy machine, not each one does."""
    deadline, took = time.monotonic() + LIMIT, [attempt()]
    while took[-1] >= seconds:
        assert time.monotonic() < deadline, f"never within {seconds:g} s, but {min(took):.3f} s at best"
        took.append(attempt())


def until_stopped(pid: int) -> None:
    """Wait until SIGSTOP has stopped a process. (Where there is no /proc, it is assumed to.)"""
    state = Path(f"/proc/{pid}/stat")
    if state.exists():
        wait_until(lambda: state.read_text().rpartition(")")[2].split()[0] == "T", f"process {pid} is stopped")


def until_listening(port: int) -> None:
    """Wait until a server accepts connections on a loopback port."""

    def listens() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=LIMIT):
            return True
        return False

    wait_until(listens, f"port {port} opens")
