"""An event loop as other threads use it: run a function in it, wake its tasks, and let it read a connection.

While the loop reads, no event pays for a thread switch.
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


class Waiter(Protocol):
    """One task waits until it is set, or a time has passed."""

    def set(self) -> None:
        """End the wait. Called in the loop."""
        ...

    async def wait(self, seconds: float) -> bool:
        """Wait for at most this long. Returns whether it was set."""
        ...


class _AnyWaiter:
    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event = anyio.Event()

    def set(self) -> None:
        self._event.set()

    async def wait(self, seconds: float) -> bool:
        if not self._event.is_set():
            with anyio.move_on_after(seconds):
                await self._event.wait()
        return self._event.is_set()


class _AsyncioWaiter:
    """A bare future, since each published event has one: an anyio.Event and a cancel scope took a third of its CPU."""

    __slots__ = ("_future", "_is_set", "_native")

    def __init__(self, native: asyncio.AbstractEventLoop) -> None:
        self._native = native
        self._is_set = False
        self._future: asyncio.Future[None] = native.create_future()

    def set(self) -> None:
        self._is_set = True
        if not self._future.done():
            self._future.set_result(None)

    async def wait(self, seconds: float) -> bool:
        if not self._is_set:
            timer = self._native.call_later(max(0.0, seconds), self._give_up)
            try:
                await self._future
            finally:
                timer.cancel()
        return self._is_set

    def _give_up(self) -> None:
        if not self._future.done():
            self._future.set_result(None)


class Loop:
    """An event loop (asyncio's or trio's), and how to run a function in it soon."""

    __slots__ = ("native", "new_waiter", "soon", "soon_from_thread")

    def __init__(self, native: Any, soon: Schedule, soon_from_thread: Schedule) -> None:
        self.native = native
        self.soon = soon
        """From the loop's own thread: in this round of the loop if possible."""
        self.soon_from_thread = soon_from_thread
        """From any other thread. Never blocks; raises RuntimeError if the loop has ended."""
        self.new_waiter: Callable[[], Waiter] = (
            functools.partial(_AsyncioWaiter, native) if self.can_watch else _AnyWaiter
        )

    @property
    def can_watch(self) -> bool:
        """Whether it calls a function when a socket is readable: asyncio and uvloop do, trio does not."""
        return hasattr(self.native, "add_reader")

    @property
    def ended(self) -> bool:
        return self.can_watch and bool(self.native.is_closed())


_last = threading.local()


def current_loop() -> Loop:
    """The event loop that runs in this thread; the same object for the same loop."""
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


class ReadingOwner(Protocol):
    """The connection thread, as its readers see it."""

    stopping: bool

    def wake(self) -> None:
        """Wake the connection's thread. From any thread."""
        ...

    def read_in_loop(self) -> None:
        """Read and pass on what has arrived. Called in the event loop, which must not wait."""
        ...


class LoopReader:
    """Reads one connection in an event loop, while the connection's thread stands by.

    Who holds `using` uses the connection. The thread releases it only to stand by, and the loop never waits for it. See
    `reading.SharedReading` for which of the two reads when.
    """

    def __init__(self, loop: Loop, connection: WatchedConnection, using: threading.Lock, owner: ReadingOwner) -> None:
        self.loop = loop
        self.connection = connection
        self.error: Exception | None = None
        """What failed in the loop. The thread ends the epoch with it."""
        self.active = False
        """The event loop is reading this connection."""
        self.reads = 0
        """How often the loop has read it, or was ready to."""
        self._using = using
        self._owner = owner
        self._ended = False
        self._watching = False
        self._start_planned = False
        # A separate descriptor: the connection may be closed while the loop still watches it, and a new socket could
        # get the same number.
        self._socket = socket.socket(fileno=os.dup(connection.fileno()))

    # --- in the connection's thread

    def start_soon(self) -> None:
        """Let the loop watch the connection, as soon as it can.

        Raises:
            RuntimeError: the loop has ended.
        """
        if not (self._watching and self.active) and not self._start_planned:
            self._start_planned = True
            self.loop.soon_from_thread(self._start)

    def resume(self) -> None:
        """After an error that the connection survived: the loop may read again, after `start_soon`."""
        self.error = None
        self.active = False

    def end(self) -> None:
        """The connection is closed, or is about to be."""
        self._ended = True
        # The loop's descriptor would keep it open for the broker until the loop runs next.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        try:
            self.loop.soon_from_thread(self._close)
        except RuntimeError:  # the loop has ended, and no longer watches it
            self._socket.close()

    def forget(self) -> None:
        """The loop has ended, or belongs to the parent of this forked process. The connection is left alone."""
        self._ended = True
        self._socket.close()

    # --- in the event loop

    def acquire(self) -> bool:
        """Begin to use the connection, until `release`. False: the thread uses it."""
        if not self._using.acquire(blocking=False):
            return False
        if self._ended or self.error is not None:
            self._using.release()
            return False
        self.connection.may_wait = False
        return True

    def release(self) -> None:
        self.connection.may_wait = True
        self._using.release()

    def fail(self, error: BaseException) -> None:
        """Pass an error to the thread, which ends the epoch. Only between `acquire` and `release`."""
        # It may be Ctrl-C, between any two instructions: it is not known what was read or sent.
        self.error = error if isinstance(error, Exception) else InterruptedError(f"interrupted by {error!r}")
        self._stop_watching()
        self._owner.wake()

    def _start(self) -> None:
        self._start_planned = False
        if self._ended or self.error is not None:
            return
        self.reads += 1
        if not self._watching:
            self._watching = True
            self.loop.native.add_reader(self._socket.fileno(), self._readable)
        if not self.active:
            self.active = True
            self._owner.wake()

    def _readable(self) -> None:
        if not self.acquire():
            # The thread uses it, and calls `start_soon` when it stands by. (Or the connection has ended.)
            self._stop_watching()
            self._owner.wake()
            return
        try:
            self.reads += 1
            self._owner.read_in_loop()
        except BaseException as error:  # any error ends the epoch, as in the thread
            self.fail(error)
            if not isinstance(error, Exception):  # a signal handler raised it, such as Ctrl-C's
                raise
        finally:
            self.release()

    def _stop_watching(self) -> None:
        if self._watching:
            self._watching = False
            self.loop.native.remove_reader(self._socket.fileno())

    def _close(self) -> None:
        self._stop_watching()
        self._socket.close()
