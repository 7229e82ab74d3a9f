"""A worker's life in one process: start, serve, stop in good order. Signals, and what asks for a stop.

`serve` is for other programs and tests. `run` is the process of `lightbus worker`: it stays in charge while a
handler blocks the event loop, which is why a thread, not the loop, brings the worker to its end.
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
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from types import FrameType
from typing import Any, NoReturn

import anyio
import anyio.to_thread

from lightbus import errors
from lightbus.app import Lightbus
from lightbus.connection.diagnosis import FATAL
from lightbus.connection.loop_reader import Schedule, current_loop

logger = logging.getLogger("lightbus")

GRACE = 30.0
"""Seconds. As long as Kubernetes waits by default; give it more than the worker."""
LAST_STEPS = 10.0
"""Seconds for what follows the handlers: acks, the lifespan's end, disconnecting."""
FLUSH_LIMIT = 2.0
"""Seconds at the end for what is left of logs and of stdout."""
ECHO = 0.3
"""Seconds within which a second signal is an echo of the first: `timeout` and `make` send two at once."""

LAST_WORDS = "Stopped at once. Unfinished events will be redelivered.\n"

STOP, READY, GIVE_UP = b"S", b"R", b"F"
"""What a supervisor and its worker say to each other; the end of the stream says that the other one has gone."""


async def serve(
    app: Lightbus,
    *,
    queues: Sequence[str] = (),
    prefetch: int | None = None,
    concurrency: int | None = None,
    grace: float = GRACE,
    stop: anyio.Event | None = None,
    on_started: Callable[[], object] | None = None,
) -> bool:
    """Consume the app's queues within its lifespan, until `stop` is set or the task is cancelled.

    A broker that does not answer is tried again until it does. Where the task is cancelled, or the lifespan fails, the
    events of running handlers are delivered again; to let the handlers end first, set `stop`.

    Args:
        queues: suffixes of the queues to consume ("main" is the app's own); all of them by default.
        prefetch: deliveries in hand at most, for each queue; else the app's.
        concurrency: handlers that run at once at most, for each queue; else the app's.
        grace: seconds that handlers in flight get to end, once `stop` is set.
        stop: set it to take no more events, finish those in flight, settle, and return.
        on_started: called once the queues are subscribed.

    Returns:
        Whether all handlers ended within `grace`. The events of those that did not are delivered again.

    Raises:
        errors.BrokerError: the broker cannot be used as it is, and trying again will not mend that.
        errors.WorkerError: nothing arrives though events wait, and connecting again did not help; or a handler has
            cancelled the worker around it.
        errors.InvalidOption: a queue that the app does not have, or a number outside of what it can be.
    """
    worker = Worker(app, queues=queues, prefetch=prefetch, concurrency=concurrency, grace=grace)
    return await worker.serve(anyio.Event() if stop is None else stop, on_started)


class Worker:
    """One app's consumer within its lifespan."""

    def __init__(
        self,
        app: Lightbus,
        *,
        queues: Sequence[str] = (),
        prefetch: int | None = None,
        concurrency: int | None = None,
        grace: float = GRACE,
    ) -> None:
        if not 0 <= grace < math.inf:
            raise errors.InvalidOption(f"worker: grace={grace!r}: use seconds, 0 or more.")
        self.app = app
        self.grace = float(grace)
        self.consumer = app.consumer(queues=queues, prefetch=prefetch, concurrency=concurrency)
        self.started = False
        self.unfinished: list[str] | None = None
        """The handlers that were still running when the grace time ended; None until that is known."""

    async def serve(self, stop: anyio.Event, on_started: Callable[[], object] | None = None) -> bool:
        """As the function `serve`."""
        failure: Exception | None = None
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._stop_when_asked, stop, tasks.cancel_scope)
                try:
                    async with self._lifespan():
                        await self._consume(on_started)
                except Exception as error:  # noqa: BLE001 - carried out of the task group as it is, not in a group of one
                    failure = error
                tasks.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(self.app.publisher.close, LAST_STEPS / 2)
        if failure is not None:
            raise failure
        return not self.unfinished

    @contextlib.asynccontextmanager
    async def _lifespan(self) -> AsyncGenerator[None]:
        if self.app.lifespan is None:
            yield
        else:
            async with self.app.lifespan(self.app):
                yield

    async def _consume(self, on_started: Callable[[], object] | None) -> None:
        try:
            async with anyio.create_task_group() as tasks:
                await tasks.start(self.consumer.run)
                self.started = True
                if on_started is not None:
                    on_started()
        except BaseExceptionGroup as group:
            raise _only(group) from None

    async def _stop_when_asked(self, stop: anyio.Event, starting: anyio.CancelScope) -> None:
        await stop.wait()
        if not self.started:  # nothing is in flight: a lifespan that hangs or a broker that is down must not hold us
            self.unfinished = []
            starting.cancel()
            return
        all_ended = await self.consumer.stop(self.grace)
        self.unfinished = [] if all_ended else self.consumer.in_flight

    def misspelt(self) -> list[str]:
        """What this app's handlers hear that is almost, but not quite, what the app says: typing errors, mostly."""
        app = self.app
        return [
            f"{one.name} subscribes to {pattern!r}. This app publishes {near!r}: did you mean that? Pass the "
            "event's class instead of its name to avoid typos; if another app publishes it, set source=."
            for one in app.handlers.values()
            for pattern in one.patterns
            if one.source in (None, app.name)
            and pattern not in app.events
            and "*" not in pattern
            and "#" not in pattern
            and (near := errors.nearest(pattern, app.events, cutoff=0.85))
        ]

    def left_behind(self) -> list[str]:
        """The names of the handlers that run on though their time is over and their event is decided on."""
        return [late.handler for runner in self.consumer.runners for late in self.consumer.late(runner)[1]]

    def in_flight(self) -> list[str]:
        """The names of the running handlers. From any thread, also while the event loop is blocked."""
        return self.consumer.in_flight


def _only(error: BaseException) -> BaseException:
    """The one exception within groups of one; else the group."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


# --- the process ---------------------------------------------------------------------


def run(
    worker: Worker,
    *,
    backend: str = "asyncio",
    supervisor: socket.socket | None = None,
    on_started: Callable[[], object] | None = None,
    last_words: str = LAST_WORDS,
) -> int:
    """Serve until SIGTERM or SIGINT; then finish, settle, and return the process's exit code. For the main thread.

    A second signal ends the process at once, with 128 plus the signal's number, as a shell would say it. So does
    a blocked event loop (or a handler in a thread) when the grace time is over, with 1.

    Args:
        backend: "asyncio" (uvloop where it is installed) or "trio".
        supervisor: the connection to the process that started this one; see `STOP`.
        on_started: called once the queues are subscribed.
        last_words: written to stderr when a second signal arrives.
    """
    end = _End(worker, supervisor, last_words)

    async def main() -> bool:
        stop = anyio.Event()
        end.loop_runs(current_loop().soon_from_thread, stop)
        return await worker.serve(stop, started)

    def started() -> None:
        end.tell(READY)
        if on_started is not None:
            on_started()

    with end.listening():
        try:
            all_ended = anyio.run(main, backend=backend, backend_options=_backend_options(backend))
        except (errors.BrokerError, errors.WorkerError) as error:
            if isinstance(error, FATAL):
                end.tell(GIVE_UP)
            logger.error("%s", error)
            return 1
        except BaseException as error:  # also a SystemExit(0) of a user's task: nobody asked for an end
            when = "while it ran" if worker.started else "at its start"
            exc_info, frames = errors.for_log(errors.without_machinery(_only(error)))
            logger.error("The worker failed %s.%s", when, frames, exc_info=exc_info)
            return 1
    if not all_ended:
        end.leave(worker.unfinished or [])
    return 0


def _backend_options(backend: str) -> dict[str, Any]:
    return {"use_uvloop": True} if backend == "asyncio" and importlib.util.find_spec("uvloop") else {}


class _End:
    """Brings the worker to its end: when a signal or the supervisor asks for it, and when time is up."""

    def __init__(self, worker: Worker, supervisor: socket.socket | None, last_words: str) -> None:
        self.worker = worker
        self.supervisor = supervisor
        self.last_words = ("\n" + last_words).encode() if last_words else b""
        self._asked: queue.SimpleQueue[str] = queue.SimpleQueue()  # its put() may be called in a signal handler
        self._first_signal = math.inf
        self._schedule: Schedule | None = None
        self._stop: anyio.Event | None = None
        self._stopping = False
        self._ended = threading.Event()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def listening(self) -> Generator[None]:
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        threading.Thread(target=self._watch, name="lightbus end", daemon=True).start()
        if self.supervisor is not None:
            # Ctrl-C reaches every process of the terminal; the supervisor says what it means.
            signal.signal(signal.SIGINT, lambda number, frame: None)
            threading.Thread(target=self._listen, name="lightbus supervisor", daemon=True).start()
        try:
            yield
        finally:
            self._ended.set()
            for number, handler in before.items():
                signal.signal(number, handler)

    def loop_runs(self, schedule: Schedule, stop: anyio.Event) -> None:
        with self._lock:
            self._schedule, self._stop = schedule, stop
            if self._stopping:
                stop.set()

    def tell(self, word: bytes) -> None:
        if self.supervisor is not None:
            with contextlib.suppress(OSError):  # it has gone, which `_listen` notices as well
                self.supervisor.send(word)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        # In the main thread, between any two instructions of it: no logging in here, its locks may be held.
        now = time.monotonic()
        if self._first_signal == math.inf:
            self._first_signal = now
            self._asked.put(signal.Signals(number).name)
        elif now - self._first_signal > ECHO:
            with contextlib.suppress(OSError):
                if select.select([], [2], [], 0)[1]:  # else it would wait for who reads it
                    os.write(2, self.last_words)
            os._exit(128 + number)

    def _listen(self) -> None:
        assert self.supervisor is not None
        try:
            word = self.supervisor.recv(1)
        except OSError:
            word = b""
        self._asked.put("asked by the supervisor" if word == STOP else "the supervisor has exited")

    def _watch(self) -> None:
        """Ask the loop to stop; where it does not answer in time, end the process."""
        who = self._asked.get()
        running = self.worker.in_flight()
        waiting = f"{_count(running)} in flight, up to {self.worker.grace:g} s" if running else "no events in flight"
        again = "" if self.supervisor is not None else " Press Ctrl-C again to stop at once."
        logger.info("Stopping (%s): %s.%s", who, waiting, again if running else "")
        with self._lock:
            self._stopping = True
            if self._schedule is not None and self._stop is not None:
                with contextlib.suppress(RuntimeError):  # the loop has ended already
                    self._schedule(self._stop.set)
        deadline = time.monotonic() + self.worker.grace
        while self.worker.unfinished is None and (time.monotonic() < deadline or self._loop_answers()):
            if time.monotonic() > deadline + LAST_STEPS:
                break
            if self._ended.wait(0.05):
                return
        if self.worker.unfinished is None:
            self.leave(self.worker.in_flight())
        if self._ended.wait(LAST_STEPS):
            return
        if not self.worker.unfinished:
            late = self.worker.left_behind()
            if late:
                logger.error("Handlers that exceeded their timeout do not stop: %s.", _named(late))
            else:
                logger.error(
                    "The handlers have finished, but the lifespan or the connection did not close within %g s.",
                    LAST_STEPS,
                )
        self.leave(self.worker.unfinished or [])

    def _loop_answers(self) -> bool:
        answered = threading.Event()
        try:
            assert self._schedule is not None
            self._schedule(answered.set)
        except RuntimeError:
            return False
        return answered.wait(1.0)

    def leave(self, unfinished: Sequence[str]) -> None:
        """End the process without waiting for threads that run handlers: nothing can stop those."""
        if unfinished:
            logger.error(
                "Not finished within %g s: %s. %s redelivered.",
                self.worker.grace,
                _named(unfinished),
                "Its event will be" if len(unfinished) == 1 else "Their events will be",
            )
        _flush()
        os._exit(1)


def leave_process(code: int) -> NoReturn:
    """End the process with this code, whatever threads still run: a plain handler that ran over its timeout was given
    up, but its thread may never end, and the interpreter would wait for it."""

    def cut_short() -> None:
        time.sleep(LAST_STEPS / 2)
        names = ", ".join(thread.name for thread in threading.enumerate() if _holds_up_exit(thread))
        logger.warning("Not waiting for threads that do not stop: %s.", names or "unknown")
        _flush()
        os._exit(code)

    threading.Thread(target=cut_short, name="lightbus exit", daemon=True).start()
    if not _flush():  # the interpreter would wait for it
        os._exit(code)
    sys.exit(code)


def _flush() -> bool:
    """Write what is left of logs and of stdout. Returns False where that does not end, as nobody reads it."""

    def flush() -> None:
        logging.shutdown()
        try:
            sys.stdout.flush()
        except OSError:  # what stays in its buffer, the interpreter writes at its end, and fails with 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        except ValueError:  # it is closed
            pass

    flushing = threading.Thread(target=flush, name="lightbus flush", daemon=True)
    flushing.start()
    flushing.join(FLUSH_LIMIT)
    return not flushing.is_alive()


def _holds_up_exit(thread: threading.Thread) -> bool:
    return not thread.daemon and thread is not threading.main_thread()


def _named(handlers: Sequence[str]) -> str:
    return ", ".join(f"{name} ({handlers.count(name)})" for name in sorted(set(handlers)))


def _count(handlers: Sequence[str]) -> str:
    return f"{len(handlers)} handler{'s' if len(handlers) != 1 else ''}"
