"""`--processes` and `--reload`: a process that starts workers, replaces those that die, and stops them in good order.

It never loads the app itself. Each worker holds one end of a socket pair: a word on it asks the worker to stop, and
its end (also when this process is killed) means the same. So signals are for people: a worker counts none from here.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Sequence

from lightbus import errors
from lightbus.worker.worker import ECHO, GIVE_UP, LAST_STEPS, READY, STOP

logger = logging.getLogger("lightbus")

FIRST_PAUSE = 0.5
LONGEST_PAUSE = 30.0
"""Seconds before a worker that died is replaced: doubled each time, up to this."""
HEALTHY = 30.0
"""Seconds after which a worker's death is not put down to the one before it."""
TICK = 0.5
USAGE_ERROR = 2


class Child:
    """One worker's place: its process now, or when to start the next one."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.process: subprocess.Popen[bytes] | None = None
        self.line: socket.socket | None = None
        self.began = 0.0
        self.start_at: float | None = None
        """On the monotonic clock; None where none is due."""
        self.kill_at: float | None = None
        """When its time to stop is over, once it was asked to."""
        self.ready = False
        self.fatal = False
        """It said that another one would fare no better."""
        self.pause = FIRST_PAUSE

    def tell(self, word: bytes) -> None:
        if self.line is not None:
            with contextlib.suppress(OSError):  # it has gone, which its exit status says as well
                self.line.send(word)

    def hear(self) -> None:
        if self.line is None:
            return
        with contextlib.suppress(OSError):
            words = self.line.recv(16, socket.MSG_DONTWAIT)
            self.ready |= READY in words
            self.fatal |= GIVE_UP in words


class Supervisor:
    """Runs `processes` workers, each by the same command line."""

    def __init__(self, command: Sequence[str], *, processes: int, grace: float, reload: str | None = None) -> None:
        """
        Args:
            command: the arguments of `lightbus worker`; what tells a worker its place is added.
            grace: seconds that a worker gets to finish.
            reload: the folder whose .py files are watched.

        Raises:
            errors.WorkerError: watchfiles is not installed.
        """
        self.command = command
        self.children = [Child(number) for number in range(1, processes + 1)]
        self.grace = grace
        self.reload = reload
        self.exit_code = 0
        self.stopping = False
        self.one_is_ready = False
        self._changes: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._first_signal: float | None = None
        if reload is not None:
            _need_watchfiles()

    def run(self) -> int:
        """Until all have ended. Returns the worst of their exit codes."""
        with self._awake(), self._watching():
            # The first one alone: what is wrong with the app or the broker is said once.
            self.children[0].start_at = 0.0
            while not (self.stopping and all(child.process is None for child in self.children)):
                self._start_those_due()
                self._wait()
                for child in self.children:
                    self._look_after(child)
                self._start_over_if_changed()
        return self.exit_code

    # --- what wakes it

    @contextlib.contextmanager
    def _awake(self) -> Generator[None]:
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        before = {
            number: signal.signal(number, lambda _number, _frame: None)  # the wake-up socket gets its number
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
        }
        signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _wait(self) -> None:
        now = time.monotonic()
        due = [at - now for child in self.children for at in (child.start_at, child.kill_at) if at is not None]
        lines = [child.line for child in self.children if child.line is not None and not child.ready]
        readable, _, _ = select.select([self._wake_read, *lines], [], [], max(0.0, min([TICK, *due])))
        if self._wake_read in readable:
            with contextlib.suppress(OSError):
                for number in self._wake_read.recv(4096):
                    if number in (signal.SIGTERM, signal.SIGINT):
                        self._on_signal(signal.Signals(number))

    def _on_signal(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self._first_signal is None:
            self._first_signal = now
            self._stop(f"{number.name}")
        elif now - self._first_signal > ECHO:
            logger.warning("Stopped at once (%s). Unfinished events will be redelivered.", number.name)
            for child in self.children:
                if child.process is not None:
                    child.process.kill()
            os._exit(128 + number)

    def _stop(self, why: str) -> None:
        if self.stopping:
            return
        self.stopping = True
        living = [child for child in self.children if child.process is not None]
        for child in self.children:
            child.start_at = None
        if living and self._first_signal is not None:
            logger.info(
                "Stopping (%s): %s, up to %g s. Press Ctrl-C again to stop at once.",
                why,
                "1 process" if len(living) == 1 else f"{len(living)} processes",
                self.grace,
            )
        for child in living:
            self._ask_to_stop(child)

    def _ask_to_stop(self, child: Child) -> None:
        if child.kill_at is None:
            child.tell(STOP)
            if not child.ready and child.process is not None:  # it may be busy for long yet with importing the app
                child.process.terminate()
            child.kill_at = time.monotonic() + self.grace + 2 * LAST_STEPS

    # --- the workers

    def _start_those_due(self) -> None:
        now = time.monotonic()
        for child in self.children:
            if child.process is None and child.start_at is not None and child.start_at <= now:
                self._start(child)

    def _start(self, child: Child) -> None:
        child.line, theirs = socket.socketpair()
        child.start_at = child.kill_at = None
        child.ready = child.fatal = False
        child.began = time.monotonic()
        banner = child.number == 1 and (self.reload is not None or not self.one_is_ready)
        label = child.number if len(self.children) > 1 else 0
        place = f"{theirs.fileno()},{label},{len(self.children) if banner else 0}"
        # Compiled files are told by their second: two changes within one could bring the older code back.
        flags = [] if self.reload is None else ["-B"]
        if not os.path.samefile(os.path.dirname(os.path.dirname(os.path.dirname(__file__))), os.curdir):
            flags.append("-P")  # what is in this folder must not take the place of what Python imports for `-m`
        # Until the worker says that it does not care, Ctrl-C must not break it off: it reaches all of a terminal.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            child.process = subprocess.Popen(
                [sys.executable, *flags, "-m", "lightbus", "worker", *self.command, "--supervised", place],
                pass_fds=[theirs.fileno()],
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()

    def _look_after(self, child: Child) -> None:
        child.hear()
        if child.ready and not self.one_is_ready:
            self.one_is_ready = True
            for other in self.children[1:]:
                other.start_at = 0.0
        process = child.process
        if process is None:
            return
        status = process.poll()
        if status is not None:
            child.hear()  # its last words
            self._remove_client(child, process.pid, status)
        elif child.kill_at is not None and time.monotonic() > child.kill_at:
            logger.error("Process %d (pid %d) did not stop in time: killed.", child.number, process.pid)
            process.kill()

    def _remove_client(self, child: Child, pid: int, status: int) -> None:
        asked = child.kill_at is not None
        assert child.line is not None
        child.line.close()
        child.line = child.process = child.kill_at = None
        if self.stopping:
            early = status in (-signal.SIGTERM, 128 + signal.SIGTERM) and not child.ready
            self.exit_code = max(self.exit_code, 0 if early else _shell_code(status))
        elif self.reload is not None:
            self._wait_for_change(child, asked, pid, status)
        elif child.fatal or status == USAGE_ERROR:
            self.exit_code = _shell_code(status)
            self._stop("a worker cannot run")
        else:
            if time.monotonic() - child.began > HEALTHY:
                child.pause = FIRST_PAUSE
            logger.error(
                "Process %d (pid %d) %s; starting another one in %g s.", child.number, pid, _ended(status), child.pause
            )
            child.start_at = time.monotonic() + child.pause
            child.pause = min(LONGEST_PAUSE, child.pause * 2)

    # --- reload

    def _wait_for_change(self, child: Child, asked: bool, pid: int, status: int) -> None:
        if asked:
            child.start_at = 0.0
        else:
            logger.error(
                "Process %d (pid %d) %s; waiting for a change in %s.", child.number, pid, _ended(status), self.reload
            )

    def _start_over_if_changed(self) -> None:
        changed = []
        while not self._changes.empty():
            changed.append(self._changes.get())
        if not changed or self.stopping:
            return
        logger.info("%s changed: starting again.", ", ".join(dict.fromkeys(changed)))
        for child in self.children:
            if child.process is not None:
                self._ask_to_stop(child)
            elif self.one_is_ready or child.number == 1:
                child.start_at = 0.0

    @contextlib.contextmanager
    def _watching(self) -> Generator[None]:
        if self.reload is None:
            yield
            return
        ended = threading.Event()
        threading.Thread(target=self._watch, args=(self.reload, ended), name="lightbus reload", daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def _watch(self, folder: str, ended: threading.Event) -> None:
        import watchfiles

        try:
            for changes in watchfiles.watch(
                folder,
                watch_filter=watchfiles.PythonFilter(),
                debounce=400,
                stop_event=ended,
                raise_interrupt=False,
                ignore_permission_denied=True,
            ):
                for _, path in sorted(changes):
                    self._changes.put(os.path.relpath(path, folder))
                with contextlib.suppress(OSError):
                    self._wake_write.send(b"\0")
        except Exception as error:  # noqa: BLE001 - watchfiles raises what its Rust side says, as OSError or RuntimeError
            logger.error("%s is no longer watched, so changes are not noticed: %s", folder, error)


def _need_watchfiles() -> None:
    try:
        importlib.import_module("watchfiles")
    except ImportError:
        raise errors.WorkerError("--reload needs watchfiles: pip install watchfiles") from None


def _shell_code(status: int) -> int:
    return 128 - status if status < 0 else status


def _ended(status: int) -> str:
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"was ended by signal {-status} ({signal.Signals(-status).name})"
        return f"was ended by signal {-status}"
    return f"ended with exit status {status}"
