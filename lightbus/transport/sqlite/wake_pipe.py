"""How the clients of one file wake each other, and how they find out that one has died.

A client is alive as long as its named pipe in the folder `<file>.clients` is open for reading: the kernel closes it
when the process ends, for whatever reason, and keeps it open while the process is stopped. One byte in the pipe wakes
the client.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import threading
import weakref
from pathlib import Path

wake_pipes: weakref.WeakSet[WakePipe] = weakref.WeakSet()


class WakePipe:
    """A client's named pipe. While it is open, the client is alive; others write to it to wake the client."""

    _reader = _writer = -1

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()  # a write after the close might go to another file of that number
        os.mkfifo(path, 0o600)
        self._reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        # A writer in this process, too: without one, the pipe reports its end after each wake-up by another client.
        self._writer = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        self._poll = select.poll()
        self._poll.register(self._reader, select.POLLIN)
        wake_pipes.add(self)

    def wake(self) -> None:
        """Wake this client. From any thread, also after `close`."""
        with self._lock, contextlib.suppress(BlockingIOError):  # a full pipe wakes as well
            if self._writer >= 0:
                os.write(self._writer, b"!")

    def wait(self, seconds: float) -> bool:
        """Wait to be woken, up to `seconds`. Returns whether it was."""
        # Rounded up: if poll returned too early, the caller would call it again and again until the time has come.
        if not self._poll.poll(int(seconds * 1000 + 0.999) if seconds > 0 else 0):
            return False
        with contextlib.suppress(BlockingIOError):
            os.read(self._reader, 65536)
        return True

    def remove(self) -> None:
        """Remove the pipe, unless the path now has the pipe of another client: of a file that replaced this one."""
        with self._lock, contextlib.suppress(FileNotFoundError):
            if self._reader >= 0 and os.path.samestat(os.fstat(self._reader), os.stat(self.path)):
                self.path.unlink()

    def close(self) -> None:
        with self._lock:
            for fd in (self._reader, self._writer):
                if fd >= 0:
                    os.close(fd)
            self._reader = self._writer = -1

    def close_in_child(self) -> None:
        """Close in a forked child, where the lock may be held by a thread that exists only in the parent."""
        self._lock = threading.RLock()
        self.close()

    def __del__(self) -> None:
        self.close()  # a connection that was never closed must not look alive


def wake_client(path: Path) -> None:
    """Wake another client. If that fails, the client is dead, or looks by itself at its next tick."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        try:
            os.write(fd, b"!")
        finally:
            os.close(fd)


def is_alive(path: Path) -> bool:
    """Whether the client with this pipe is alive."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    except OSError as error:
        # ENXIO: nothing has it open for reading. ENOENT: it was removed. Other errors (no free file descriptor) prove
        # nothing.
        return error.errno not in (errno.ENXIO, errno.ENOENT)
    return True
