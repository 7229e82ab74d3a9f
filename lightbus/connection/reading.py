"""Who reads a connection: its own thread, or an event loop. This decides between the two, and switches."""

from __future__ import annotations

import contextlib
import threading
import time

from lightbus.connection.loop_reader import Loop, LoopReader, ReadingOwner
from lightbus.connection.wake_up import WakeUp
from lightbus.transport import Connection

TICK = 1.0
"""Seconds between two checks of whether the loop still reads; also the time for which `suspend` holds."""


class SharedReading:
    """One reader at a time for a connection: the thread that owns it, or an event loop in its place.

    An event loop offers to read (`offer`). The thread then creates a `LoopReader`, and stands by as soon as the loop
    reads (`stand_by`). Once a second it checks whether the loop still does (`check`), and if not, reads itself.
    """

    def __init__(self, wake_up: WakeUp) -> None:
        """
        Args:
            wake_up: what wakes the connection's thread while it stands by.
        """
        self.loop: Loop | None = None
        """The event loop that reads, or would read."""
        self.loop_reader: LoopReader | None = None
        self.using = threading.Lock()
        """Its holder uses the connection: the owner's thread, or the event loop that reads."""
        self.standing_by = False
        """Whether the event loop reads now, and the thread does not."""
        self._wake_up = wake_up
        self._reads_seen = 0
        self._thread_reads_until = 0.0

    # --- from any thread

    def offer(self, loop: Loop) -> bool:
        """From the loop's own thread: it can read, unless another loop does already. Returns whether to wake the
        connection's thread, which starts it.
        """
        if not loop.can_watch or (self.loop is not None and not self.loop.ended):
            return False
        self.loop = loop
        return True

    def suspend(self) -> bool:
        """For one second from now only the thread reads. Returns whether to wake it."""
        if self.loop_reader is None:
            return False
        self._thread_reads_until = time.monotonic() + TICK
        return self.standing_by

    # --- in the connection's thread

    def present_reader(self, connection: Connection, owner: ReadingOwner) -> LoopReader | None:
        """The loop's reader if the loop reads now. If it does not but could, it is started."""
        if self.loop is None or time.monotonic() < self._thread_reads_until:
            return None
        loop_reader = self.loop_reader
        if loop_reader is not None and loop_reader.loop.ended:
            self.forget()
            loop_reader = None
        if self.loop.ended:
            return None
        if loop_reader is None:
            watched = connection.watched()
            if watched is None:
                return None
            watched.on_unsent = owner.wake
            loop_reader = LoopReader(self.loop, watched, self.using, owner)
            self.loop_reader, self._reads_seen = loop_reader, -1
        if loop_reader.active:
            return loop_reader
        try:
            loop_reader.start_soon()
        except RuntimeError:
            self.forget()
        return None

    def stand_by(self, loop_reader: LoopReader, timeout: float, owner: ReadingOwner) -> None:
        """Let the loop read, until this thread is woken or `timeout` seconds have passed.

        Raises:
            Exception: the loop's reading failed with it.
        """
        self.standing_by = True
        self.using.release()
        try:
            with contextlib.suppress(RuntimeError):  # the loop has ended, which `check` notices
                loop_reader.start_soon()
            if not owner.stopping:
                self._wake_up.wait(timeout)
        finally:
            self.using.acquire()
            self.standing_by = False
        if loop_reader.error is not None:
            raise loop_reader.error

    def check(self, connection: Connection) -> None:
        """Once a second: does the loop still read? If it has not, the thread reads until the loop is back."""
        loop_reader = self.loop_reader
        if loop_reader is None or not loop_reader.active or time.monotonic() < self._thread_reads_until:
            return
        if loop_reader.reads == self._reads_seen:
            # Either nothing has arrived, or it was not read.
            with contextlib.suppress(TimeoutError):
                connection.drain_events(0)
                loop_reader.active = False
        self._reads_seen = loop_reader.reads

    def resume(self) -> None:
        """After an error that the connection survived: let the loop read again."""
        if self.loop_reader is not None:
            self.loop_reader.resume()

    def forget(self) -> None:
        """The loop has ended, or this is a forked child. The connection itself is left alone."""
        loop_reader, self.loop_reader = self.loop_reader, None
        if loop_reader is not None:
            loop_reader.forget()

    def end(self) -> None:
        """The connection is closed."""
        loop_reader, self.loop_reader = self.loop_reader, None
        if loop_reader is not None:
            loop_reader.end()
