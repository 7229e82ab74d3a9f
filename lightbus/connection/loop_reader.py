"""The event loop, seen from a connection's thread: how to run something soon in it, and how it attends to a connection
in the thread's place, so that what arrives pays for no change of threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import socket
import threading
from collections.abc import Callable
from typing import Any, Protocol

import anyio.lowlevel

from lightbus.transport import WatchedConnection

Schedule = Callable[..., object]


class Wait(Protocol):
    """For one task to wait until something has happened, for a while."""

    def set(self) -> None:
        """It has happened. Called in the loop."""
        ...

    async def over(self, seconds: float) -> bool:
        """Wait for so long at most; says whether it has happened."""
        ...


class _AnyWait:
    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event = anyio.Event()

    def set(self) -> None:
        self._event.set()

    async def over(self, seconds: float) -> bool:
        if not self._event.is_set():
            with anyio.move_on_after(seconds):
                await self._event.wait()
        return self._event.is_set()


class _AsyncioWait:
    """Bare, since each published event has one: an anyio.Event and a cancel scope took a third of its CPU."""

    __slots__ = ("_future", "_happened", "_native")

    def __init__(self, native: asyncio.AbstractEventLoop) -> None:
        self._native = native
        self._happened = False
        self._future: asyncio.Future[None] = native.create_future()

    def set(self) -> None:
        self._happened = True
        if not self._future.done():
            self._future.set_result(None)

    async def over(self, seconds: float) -> bool:
        if not self._happened:
            timer = self._native.call_later(max(0.0, seconds), self._give_up)
            try:
                await self._future
            finally:
                timer.cancel()
        return self._happened

    def _give_up(self) -> None:
        if not self._future.done():
            self._future.set_result(None)


class Loop:
    """How to run something soon in an event loop: asyncio's or trio's."""

    __slots__ = ("native", "new_wait", "soon", "soon_from_thread")

    def __init__(self, native: Any, soon: Schedule, soon_from_thread: Schedule) -> None:
        self.native = native
        self.soon = soon
        """For the loop's own thread: in this round of the loop's, where it can be."""
        self.soon_from_thread = soon_from_thread
        """For any other thread; it never waits. Raises RuntimeError where the loop has ended."""
        self.new_wait: Callable[[], Wait] = functools.partial(_AsyncioWait, native) if self.can_watch else _AnyWait

    @property
    def can_watch(self) -> bool:
        """Whether it calls functions when a socket is readable: asyncio (and uvloop) does."""
        return hasattr(self.native, "add_reader")

    @property
    def ended(self) -> bool:
        return self.can_watch and bool(self.native.is_closed())


_last = threading.local()


def current_loop() -> Loop:
    """The event loop that runs in this thread. The same object each time, as long as it does not change."""
    try:
        native: Any = asyncio.get_running_loop()
    except RuntimeError:
        native = anyio.lowlevel.current_token().native_token
    loop: Loop | None = getattr(_last, "loop", None)
    if loop is None or loop.native is not native:
        if isinstance(native, asyncio.AbstractEventLoop):
            loop = Loop(native, native.call_soon, native.call_soon_threadsafe)
        else:
            loop = Loop(native, native.run_sync_soon, native.run_sync_soon)
        _last.loop = loop
    return loop


class LoopReader:
    """An event loop's attention to one connection. While it lasts, the loop reads, and the thread stands by.

    The user of the connection holds `using`; the thread lets go of it only to stand by, and the loop never waits for
    it. About once a second the thread looks whether the loop still comes: a handler may block it, or it may have ended.
    Then the thread reads, until the loop is seen again.
    """

    def __init__(
        self,
        loop: Loop,
        connection: WatchedConnection,
        *,
        using: threading.Lock,
        read: Callable[[], object],
        wake: Callable[[], object],
    ) -> None:
        """
        Args:
            read: reads and hands on what has arrived. Called in the loop, with `using` held.
            wake: wakes the connection's thread, from any thread.
        """
        self.loop = loop
        self.error: Exception | None = None
        """What went wrong in the loop. The thread is to end the epoch over it."""
        self.comes = False
        """The loop was seen, and has not been missed since."""
        self.visits = 0
        self.connection = connection
        self._using = using
        self._read = read
        self._wake = wake
        self._ended = False
        self._watching = False
        self._invited = False
        # A separate descriptor: the connection's may be closed while the loop still watches it, and its number would
        # be that of somebody else's socket next.
        self._socket = socket.socket(fileno=os.dup(connection.fileno()))

    # --- in the connection's thread

    def invite(self) -> None:
        """Let the loop watch the connection, as soon as it can.

        Raises:
            RuntimeError: the loop has ended.
        """
        if not (self._watching and self.comes) and not self._invited:
            self._invited = True
            self.loop.soon_from_thread(self._come)

    def resume(self) -> None:
        """After an error that the connection outlived: the loop may read again, once it is invited."""
        self.error = None
        self.comes = False

    def end(self) -> None:
        """Let go of the connection, which is closed, or is about to be."""
        self._ended = True
        # The loop's descriptor would keep it open for the peer until the loop comes next.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        try:
            self.loop.soon_from_thread(self._leave)
        except RuntimeError:  # it has ended, and watches nothing any more
            self._socket.close()

    def forget(self) -> None:
        """The loop has ended, or is the parent's (in a forked child). The connection is left alone."""
        self._ended = True
        self._socket.close()

    # --- in the event loop

    def take(self) -> bool:
        """Begin to use the connection, up to `give_back`. False: the thread uses it."""
        if not self._using.acquire(blocking=False):
            return False
        if self._ended or self.error is not None:
            self._using.release()
            return False
        self.connection.may_wait = False
        return True

    def give_back(self) -> None:
        self.connection.may_wait = True
        self._using.release()

    def fail(self, error: BaseException) -> None:
        """Tell the thread, which ends the epoch. Only between `take` and `give_back`."""
        # Ctrl-C, say, between any two instructions: nobody knows what was read or sent.
        self.error = error if isinstance(error, Exception) else InterruptedError(f"interrupted by {error!r}")
        self._stop_watching()
        self._wake()

    def _come(self) -> None:
        self._invited = False
        if self._ended or self.error is not None:
            return
        self.visits += 1
        if not self._watching:
            self._watching = True
            self.loop.native.add_reader(self._socket.fileno(), self._readable)
        if not self.comes:
            self.comes = True
            self._wake()

    def _readable(self) -> None:
        if not self.take():
            # The thread uses it, and invites the loop again when it stands by. (Or it has ended.)
            self._stop_watching()
            self._wake()
            return
        try:
            self.visits += 1
            self._read()
        except BaseException as error:  # the thread ends the epoch over any, as it does over its own
            self.fail(error)
            if not isinstance(error, Exception):  # a signal's handler raised it, Ctrl-C's for one
                raise
        finally:
            self.give_back()

    def _stop_watching(self) -> None:
        if self._watching:
            self._watching = False
            self.loop.native.remove_reader(self._socket.fileno())

    def _leave(self) -> None:
        self._stop_watching()
        self._socket.close()
