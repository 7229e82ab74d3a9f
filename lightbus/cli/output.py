"""What commands write, where nobody may read it, and where there may be no room for it, or no stdout or stderr at all.

stderr is for people and logs: what a command does, and its exit code, never depends on it. Nor does a worker ever wait
for it: with a pipe that is full and not read, it would handle nothing, and could not be stopped.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import queue
import sys
import threading
from typing import Any, TextIO

import click

MOST_WAITING = 1_000
"""Texts that wait for stderr at most; what is written then is lost, and counted."""
FLUSH_LIMIT = 1.0
"""Seconds that a flush waits, unless an earlier one has waited in vain."""


def write(text: str, *, nl: bool = True) -> bool:
    """Write it to stdout; False where nobody reads that any more, as after `| head -1`.

    No error of stdout's must pass for a lost connection.

    Raises:
        click.ClickException: it cannot be written, as on a full disk.
    """
    try:
        return _written(text, nl=nl)
    except OSError as error:
        raise click.ClickException(f"the output cannot be written: {error.strerror}. It is incomplete.") from error


def report(text: str) -> None:
    """Say what has been done. That stays done where stdout cannot take it: then stderr says it."""
    try:
        _written(text)
    except OSError as error:
        with contextlib.suppress(OSError):  # it may be the same file
            _written(f"Not written to stdout ({error.strerror}): {text}", err=True)


def _written(text: str, *, nl: bool = True, err: bool = False) -> bool:
    try:
        click.echo(text, nl=nl, err=err)
    except OSError as error:
        # What is in its buffer, Python writes at its end: that would fail too, and decide the exit code.
        os.dup2(os.open(os.devnull, os.O_WRONLY), (sys.stderr if err else sys.stdout).fileno())
        if not isinstance(error, BrokenPipeError):
            raise
        return False
    return True


# --- stderr itself ----------------------------------------------------------------------------


class Stderr(io.TextIOBase):
    """stderr that a separate thread writes, so that nothing else waits for what reads it. Its errors are not the
    program's: nobody reads it any more, or its disk is full.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.lost = 0
        """Texts that there was no room for, since somebody set this to 0."""
        self._ended = False
        self._begin()
        os.register_at_fork(after_in_child=self._begin)  # which has no such thread
        atexit.register(self._end)

    def _begin(self) -> None:
        self._waiting: queue.SimpleQueue[str | threading.Event] = queue.SimpleQueue()  # a signal handler may write too
        self._starting = threading.Lock()
        self._started = False
        self._stuck = False

    @property
    def has_room(self) -> bool:
        return self._waiting.qsize() < MOST_WAITING

    def write(self, text: str) -> int:
        # click tries bytes, to learn what a stream takes
        if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        if not self._ended:
            if self.has_room:
                self._put(text)
            else:
                self.lost += 1
        elif not self._stuck:
            self._write(text)
        return len(text)

    def flush(self) -> None:
        if self._ended or self._stuck:
            return
        written = threading.Event()
        self._put(written)
        self._stuck = not written.wait(FLUSH_LIMIT)

    def _put(self, what: str | threading.Event) -> None:
        self._waiting.put(what)
        if not self._started and self._starting.acquire(blocking=False):
            try:
                threading.Thread(target=self._work, args=(self._waiting,), name="lightbus stderr", daemon=True).start()
                self._started = True
            except RuntimeError:  # no thread can be had now: what waits is written once there is one
                self._starting.release()

    def _work(self, waiting: queue.SimpleQueue[str | threading.Event]) -> None:
        while True:
            what = waiting.get()
            if isinstance(what, str):
                self._write(what)
            else:
                what.set()
            self._stuck = False

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)
            self.stream.flush()

    def _end(self) -> None:
        """Threads do not run any more while the interpreter ends."""
        self.flush()
        self._ended = True

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.stream.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return self.stream.errors

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
