"""How long tests wait: long enough for a busy machine. A limit only ends a hang."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator

LIMIT = 60.0
"""Maximum seconds of a wait, far above the usual time."""

DELAY = 15.0
"""Seconds that a busy machine may add to a limit of the code."""


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Wait until the condition is true."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, f"not within {LIMIT:g} s: {what}"
        time.sleep(0.02)


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """The code in the block has a time limit of `seconds`; a busy machine may add `DELAY`."""
    began = time.monotonic()
    try:
        yield
    finally:
        took = time.monotonic() - began
        assert took < seconds + DELAY, f"it took {took:.1f} s; the limit is {seconds:g} s"


def sometimes_within(seconds: float, attempt: Callable[[], float]) -> None:
    """Repeat until an attempt returns less than `seconds`: on a busy machine, some attempts take longer."""
    deadline, took = time.monotonic() + LIMIT, [attempt()]
    while took[-1] >= seconds:
        assert time.monotonic() < deadline, f"never within {seconds:g} s, but {min(took):.3f} s at best"
        took.append(attempt())


def until_listening(port: int) -> None:
    """Wait until a loopback port accepts connections."""

    def listens() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=LIMIT):
            return True
        return False

    wait_until(listens, f"port {port} opens")
