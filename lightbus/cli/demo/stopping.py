"""How the demo ends early: after a signal, or a failure."""

from __future__ import annotations

import signal
import time


class Stopped(Exception):
    """The demo was asked to stop."""


class Failed(Exception):
    """The demo cannot continue."""


class Stopping:
    """Records Ctrl-C, SIGTERM and SIGHUP. `pause` raises Stopped, so that the demo cleans up before it exits."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Stopping:
        self._before = {one: signal.signal(one, self._record) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        return self

    def __exit__(self, *_: object) -> None:
        for one, before in self._before.items():
            signal.signal(one, before)

    def _record(self, *_: object) -> None:
        self.asked = True

    def pause(self, seconds: float) -> None:
        """
        Raises:
            Stopped: a signal has arrived.
        """
        deadline = time.monotonic() + seconds
        while not self.asked and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, 0.05))
        if self.asked:
            raise Stopped
