"""The process of `lightbus worker` and `lightbus relay`: handles signals, the supervisor and the exit.

A thread, not the event loop, ends the worker: a handler may block the event loop.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import os
import queue
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from types import FrameType
from typing import Any, NoReturn, Protocol

import anyio

from lightbus import errors, exit_handlers
from lightbus.connection.diagnosis import FATAL
from lightbus.connection.loop_reader import Schedule, current_loop
from lightbus.worker.worker import LAST_STEPS

logger = logging.getLogger("lightbus")

FLUSH_LIMIT = 2.0
"""Seconds at the end to write the remaining logs and stdout, and before that, for `exit_handlers`."""
SIGNAL_REPEAT = 0.3
"""Seconds within which a second signal is ignored: `timeout` and `make` send two at once."""

STOPPED_AT_ONCE = "Stopped at once. Unfinished events will be redelivered.\n"

STOP, READY, GIVE_UP = b"S", b"R", b"F"
"""Messages between a supervisor and its worker. The end of the stream means that the other process has exited."""
WATCH, END = b"W", b"\0"
"""Around the path of a file that the worker has imported from elsewhere than the current folder: for --reload."""


class Runnable(Protocol):
    """What a process runs: a `Worker`, or a `ServiceRunner`. All but `serve` is called in any thread."""

    noun: str
    grace: float
    started: bool
    unfinished: list[str] | None

    async def serve(self, stop: anyio.Event, on_started: Callable[[], object] | None = None) -> bool: ...
    def pending(self) -> str: ...
    def in_flight(self) -> list[str]: ...
    def left_behind(self) -> list[str]: ...
    def consequence(self, unfinished: Sequence[str]) -> str: ...


def run(
    worker: Runnable,
    *,
    backend: str = "asyncio",
    supervisor: socket.socket | None = None,
    on_started: Callable[[], object] | None = None,
    second_signal_text: str = STOPPED_AT_ONCE,
) -> int:
    """Run the worker until SIGTERM or SIGINT, stop it gracefully, and return the exit code. For the main thread.

    A second signal ends the process at once, with 128 plus the signal's number. If the event loop is blocked, or a
    handler in a thread does not finish, the process exits with 1 at the end of the grace period.

    Args:
        backend: "asyncio" (with uvloop if it is installed) or "trio".
        supervisor: the socket to the supervisor that started this process; see `STOP`.
        on_started: called when all queues are subscribed.
        second_signal_text: written to stderr when a second signal arrives.
    """
    shutdown = _Shutdown(worker, supervisor, second_signal_text)

    async def main() -> bool:
        stop = anyio.Event()
        shutdown.loop_started(current_loop().soon_from_thread, stop)
        return await worker.serve(stop, started)

    def started() -> None:
        shutdown.send(READY)
        if on_started is not None:
            on_started()

    with shutdown.handling():
        try:
            all_ended = anyio.run(main, backend=backend, backend_options=_backend_options(backend))
        except (errors.BrokerError, errors.WorkerError) as error:
            if isinstance(error, FATAL):
                shutdown.send(GIVE_UP)
            logger.error("%s", error)
            return 1
        except BaseException as error:  # including SystemExit(0) of a user's task: the worker was not asked to stop
            when = "while it ran" if worker.started else "at its start"
            exc_info, frames = errors.for_log(errors.without_machinery(errors.without_groups(error)))
            logger.error("The %s failed %s.%s", worker.noun, when, frames, exc_info=exc_info)
            return 1
    if not all_ended:
        shutdown.exit(worker.unfinished or [])
    return 0


def _backend_options(backend: str) -> dict[str, Any]:
    return {"use_uvloop": True} if backend == "asyncio" and importlib.util.find_spec("uvloop") else {}


class _Shutdown:
    """Stops the worker after a signal or a message of the supervisor, and ends the process if that takes too long."""

    def __init__(self, worker: Runnable, supervisor: socket.socket | None, second_signal_text: str) -> None:
        self.worker = worker
        self.supervisor = supervisor
        self.second_signal_text = ("\n" + second_signal_text).encode() if second_signal_text else b""
        self._reasons: queue.SimpleQueue[str] = queue.SimpleQueue()  # its put() is safe in a signal handler
        self._first_signal = math.inf
        self._schedule: Schedule | None = None
        self._stop: anyio.Event | None = None
        self._stopping = False
        self._worker_ended = threading.Event()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def handling(self) -> Generator[None]:
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        threading.Thread(target=self._run, name="lightbus shutdown", daemon=True).start()
        if self.supervisor is not None:
            # Ctrl-C reaches every process of the terminal. Only the supervisor reacts to it.
            signal.signal(signal.SIGINT, lambda number, frame: None)
            threading.Thread(target=self._wait_for_supervisor, name="lightbus supervisor", daemon=True).start()
        try:
            yield
        finally:
            self._worker_ended.set()
            for number, handler in before.items():
                signal.signal(number, handler)

    def loop_started(self, schedule: Schedule, stop: anyio.Event) -> None:
        with self._lock:
            self._schedule, self._stop = schedule, stop
            if self._stopping:
                stop.set()

    def send(self, message: bytes) -> None:
        """Send a message to the supervisor, if there is one."""
        if self.supervisor is not None:
            with contextlib.suppress(OSError):  # it has exited, which `_wait_for_supervisor` notices, too
                self.supervisor.send(message)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        # Runs in the main thread between any two instructions. Do not log here: the locks of logging may be held.
        now = time.monotonic()
        if self._first_signal == math.inf:
            self._first_signal = now
            self._reasons.put(signal.Signals(number).name)
        elif now - self._first_signal > SIGNAL_REPEAT:
            with contextlib.suppress(OSError):
                if select.select([], [2], [], 0)[1]:  # do not wait for a reader of stderr
                    os.write(2, self.second_signal_text)
            os._exit(128 + number)

    def _wait_for_supervisor(self) -> None:
        assert self.supervisor is not None
        try:
            message = self.supervisor.recv(1)
        except OSError:
            message = b""
        self._reasons.put("asked by the supervisor" if message == STOP else "the supervisor has exited")

    def _run(self) -> None:
        """Wait for a reason to stop, and stop the worker. End the process if the event loop does not answer in time."""
        reason = self._reasons.get()
        pending = self.worker.pending()
        waiting = f"{pending}, up to {self.worker.grace:g} s" if pending else "no events in flight"
        again = "" if self.supervisor is not None else " Press Ctrl-C again to stop at once."
        logger.info("Stopping (%s): %s.%s", reason, waiting, again if pending else "")
        with self._lock:
            self._stopping = True
            if self._schedule is not None and self._stop is not None:
                with contextlib.suppress(RuntimeError):  # the event loop is closed
                    self._schedule(self._stop.set)
        deadline = time.monotonic() + self.worker.grace
        while self.worker.unfinished is None and (time.monotonic() < deadline or self._loop_answers()):
            if time.monotonic() > deadline + LAST_STEPS:
                break
            if self._worker_ended.wait(0.05):
                return
        if self.worker.unfinished is None:
            self.exit(self.worker.in_flight())
        if self._worker_ended.wait(LAST_STEPS):
            return
        if not self.worker.unfinished:
            late = self.worker.left_behind()
            if late:
                logger.error("Handlers that exceeded their timeout do not stop: %s.", _named(late))
            else:
                logger.error(
                    "Everything has finished, but the lifespan or the connection did not close within %g s.",
                    LAST_STEPS,
                )
        self.exit(self.worker.unfinished or [])

    def _loop_answers(self) -> bool:
        answered = threading.Event()
        try:
            assert self._schedule is not None
            self._schedule(answered.set)
        except RuntimeError:
            return False
        return answered.wait(1.0)

    def exit(self, unfinished: Sequence[str]) -> None:
        """End the process without waiting for threads that run handlers: a thread cannot be stopped."""
        if unfinished:
            logger.error(
                "Not finished within %g s: %s. %s",
                self.worker.grace,
                _named(unfinished),
                self.worker.consequence(unfinished),
            )
        _call_exit_handlers()
        _flush()
        os._exit(1)


def leave_process(code: int) -> NoReturn:
    """End the process with this exit code, even if threads still run. The interpreter would wait for the thread of a
    sync handler that exceeded its timeout."""

    def force_exit() -> None:
        time.sleep(LAST_STEPS / 2)
        names = ", ".join(thread.name for thread in threading.enumerate() if _holds_up_exit(thread))
        others = "exit handlers of Python (atexit): an exporter, perhaps"
        logger.warning("Not waiting for %s.", f"threads that do not stop: {names}" if names else others)
        _call_exit_handlers()
        _flush()
        os._exit(code)

    threading.Thread(target=force_exit, name="lightbus exit", daemon=True).start()
    if not _flush():  # the interpreter would wait for the flush
        _call_exit_handlers()
        os._exit(code)
    sys.exit(code)


def _flush() -> bool:
    """Write the remaining logs and stdout. False if that takes too long, because their reader does not read."""

    def flush() -> None:
        logging.shutdown()
        try:
            sys.stdout.flush()
        except OSError:  # otherwise the interpreter writes the buffer at its end, fails, and exits with 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        except ValueError:  # it is closed
            pass

    return _ends_in_time(flush, "lightbus flush")


def _call_exit_handlers() -> None:
    def call() -> None:
        for function in exit_handlers.before_exit.copy():
            try:
                function()
            except Exception:
                logger.exception("An exit handler failed: %r", function)

    if exit_handlers.before_exit:
        _ends_in_time(call, "lightbus exit handlers")


def _ends_in_time(function: Callable[[], object], name: str) -> bool:
    """Run it in a thread, for up to `FLUSH_LIMIT` seconds. Returns whether it has ended."""
    thread = threading.Thread(target=function, name=name, daemon=True)
    thread.start()
    thread.join(FLUSH_LIMIT)
    return not thread.is_alive()


def _holds_up_exit(thread: threading.Thread) -> bool:
    return not thread.daemon and thread is not threading.main_thread()


def _named(handlers: Sequence[str]) -> str:
    return ", ".join(f"{name} ({handlers.count(name)})" for name in sorted(set(handlers)))
