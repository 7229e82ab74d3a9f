"""Writes to stdout and stderr, even if their reader has exited, the disk is full, or they are closed.

stderr is for messages and logs. What a command does, and its exit code, never depends on it. A worker never waits for
it: otherwise a full pipe without a reader would stop all handlers, and the shutdown.
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
"""Maximum number of texts that wait for stderr. Further ones are dropped and counted."""
FLUSH_LIMIT = 1.0
"""Seconds that a flush waits. It does not wait if the one before timed out."""


def write(text: str, *, nl: bool = True) -> bool:
    """Write to stdout. Returns False if its reader has exited, as with `| head -1`.

    An OSError of stdout must not be taken for a lost connection.

    Raises:
        click.ClickException: the text cannot be written, for example because the disk is full.
    """
    try:
        return _written(text, nl=nl)
    except OSError as error:
        raise click.ClickException(f"the output cannot be written: {error.strerror}. It is incomplete.") from error


def report(text: str) -> None:
    """Report what was done. If stdout cannot be written to, report it on stderr."""
    try:
        _written(text)
    except OSError as error:
        with contextlib.suppress(OSError):  # it may be the same file
            _written(f"Not written to stdout ({error.strerror}): {text}", err=True)


def _written(text: str, *, nl: bool = True, err: bool = False) -> bool:
    try:
        click.echo(text, nl=nl, err=err)
    except OSError as error:
        # At its exit, Python writes the buffer. That would fail, too, and change the exit code.
        os.dup2(os.open(os.devnull, os.O_WRONLY), (sys.stderr if err else sys.stdout).fileno())
        if not isinstance(error, BrokenPipeError):
            raise
        return False
    return True


# --- stderr itself ----------------------------------------------------------------------------


class Stderr(io.TextIOBase):
    """stderr, written by a separate thread, so that nothing else waits for its reader. Errors (its reader has exited,
    or the disk is full) are ignored.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.lost = 0
        """The number of dropped texts. `logs.Handler` reports them and resets it to 0."""
        self._ended = False
        self._begin()
        os.register_at_fork(after_in_child=self._begin)  # a child has no such thread
        atexit.register(self._end)

    def _begin(self) -> None:
        self._waiting: queue.SimpleQueue[str | threading.Event] = queue.SimpleQueue()  # reentrant, for signal handlers
        self._starting = threading.Lock()
        self._started = False
        self.stuck = False
        """The last flush timed out, and nothing was read since."""

    @property
    def has_room(self) -> bool:
        return self._waiting.qsize() < MOST_WAITING

    def write(self, text: str) -> int:
        # click tries bytes, to find out what a stream accepts
        if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        if not self._ended:
            if self.has_room:
                self._put(text)
            else:
                self.lost += 1
        elif not self.stuck:
            self._write(text)
        return len(text)

    def flush(self) -> None:
        if self._ended or self.stuck:
            return
        written = threading.Event()
        self._put(written)
        self.stuck = not written.wait(FLUSH_LIMIT)

    def _put(self, what: str | threading.Event) -> None:
        self._waiting.put(what)
        if not self._started and self._starting.acquire(blocking=False):
            try:
                threading.Thread(target=self._work, args=(self._waiting,), name="lightbus stderr", daemon=True).start()
                self._started = True
            except RuntimeError:  # no thread can be started now: the next write tries again
                self._starting.release()

    def _work(self, waiting: queue.SimpleQueue[str | threading.Event]) -> None:
        while True:
            what = waiting.get()
            if isinstance(what, str):
                self._write(what)
            else:
                what.set()
            self.stuck = False

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)
            self.stream.flush()

    def _end(self) -> None:
        """At the exit of the interpreter, threads no longer run: write directly from then on."""
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
