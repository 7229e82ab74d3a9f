"""Ctrl-C in a command that runs an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Generator


@contextlib.contextmanager
def waking_loop() -> Generator[None]:
    """Within a loop of the main thread: a signal ends its wait, so that Python calls the signal's handler at once.

    In asyncio, a signal that arrives just before the wait, or that the kernel delivers to another thread, would be
    handled at the loop's next event, which may never come.
    """
    loop = asyncio.get_running_loop()
    woken, wake = socket.socketpair()
    with woken, wake:
        woken.setblocking(False)
        wake.setblocking(False)
        before = signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        loop.add_reader(woken, woken.recv, 4096)
        try:
            yield
        finally:
            loop.remove_reader(woken)
            signal.set_wakeup_fd(before)
