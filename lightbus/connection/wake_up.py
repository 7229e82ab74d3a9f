"""Wake one waiting thread from any other one, safe against signal handlers that raise."""

from __future__ import annotations

import threading

from lightbus import errors


class WakeUp:
    """One thread waits for it, any other thread sets it; each `wait` clears it.

    A lock, not a `threading.Event`: a signal handler that raises inside an Event's method may leave its inner lock held
    forever.
    """

    __slots__ = ("_unset",)

    def __init__(self) -> None:
        self._unset = threading.Lock()
        self._unset.acquire()

    def set(self) -> None:
        try:
            self._unset.release()
        except RuntimeError as error:  # it is set
            if errors.is_from_deeper(error):
                raise

    def clear(self) -> None:
        self._unset.acquire(blocking=False)

    def wait(self, seconds: float) -> bool:
        """Wait for at most this long, and clear it. Returns whether it was set."""
        return self._unset.acquire(timeout=max(0.0, seconds))
