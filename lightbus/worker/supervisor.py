"""`--processes` and `--reload`: a process that starts workers, replaces those that exit, and stops them gracefully.

The supervisor does not import the app. It shares a socket pair with each worker: a message on it asks the worker to
stop, and so does its end (also when the supervisor is killed). Signals are for users: the supervisor sends none to a
worker that is ready.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from typing import Protocol

from lightbus.worker.process import END, GIVE_UP, READY, SIGNAL_REPEAT, STOP, WATCH
from lightbus.worker.reload import FileWatcher
from lightbus.worker.worker import LAST_STEPS

logger = logging.getLogger("lightbus")

FIRST_PAUSE = 0.5
LONGEST_PAUSE = 30.0
"""Seconds before a worker that exited is replaced: doubled each time, up to LONGEST_PAUSE."""
HEALTHY = 30.0
"""Seconds after which the pause starts at FIRST_PAUSE again."""
KILL_LIMIT = 1.0
"""Seconds to wait for a worker that is killed, before this process ends, too."""
TICK = 0.5
USAGE_ERROR = 2


class Companion(Protocol):
    """What the workers of a supervisor share, such as a folder for their metrics."""

    environment: Mapping[str, str]
    """Variables for the workers."""

    def ended(self, number: int) -> None:
        """This worker (from 1) has ended, for whatever reason. Another one with its number may follow."""
        ...

    def close(self) -> None:
        """All workers have ended, or are killed now."""
        ...


class Child:
    """One worker: its current process, or the time to start the next one."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.process: subprocess.Popen[bytes] | None = None
        self.socket: socket.socket | None = None
        self.began = 0.0
        self.start_at: float | None = None
        """On the monotonic clock; None if no start is due."""
        self.kill_at: float | None = None
        """When to kill it; None unless it was asked to stop."""
        self.ready = False
        self.fatal = False
        """It reported an error that another process would have, too."""
        self.files: list[str] = []
        """What it asked to watch, and is not watched yet."""
        self._received = b""
        self.pause = FIRST_PAUSE

    def send(self, message: bytes) -> None:
        if self.socket is not None:
            with contextlib.suppress(OSError):  # it has exited, which its exit status shows, too
                self.socket.send(message)

    def forget(self) -> None:
        """Forget the messages of its former process."""
        self.ready = self.fatal = False
        self._received = b""

    def receive(self) -> None:
        """Read its messages, without waiting."""
        if self.socket is None:
            return
        with contextlib.suppress(OSError):
            while more := self.socket.recv(4096, socket.MSG_DONTWAIT):
                self._received += more
        while self._received:
            kind, rest = self._received[:1], self._received[1:]
            if kind == WATCH:
                path, end, rest = rest.partition(END)
                if not end:  # more is to come
                    return
                self.files.append(os.fsdecode(path))
            self.ready |= kind == READY
            self.fatal |= kind == GIVE_UP
            self._received = rest


class Supervisor:
    """Runs `processes` workers, each with the same command line."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        processes: int,
        grace: float,
        reload: str | None = None,
        companion: Companion | None = None,
    ) -> None:
        """
        Args:
            command: the arguments of `lightbus worker`. The supervisor adds `--supervised`.
            grace: seconds that a worker gets to stop.
            reload: the folder whose .py files are watched.
            companion: what the workers share. The caller closes it, unless a second signal ends this process at once.

        Raises:
            errors.WorkerError: watchfiles is not installed.
        """
        self.command = command
        self.children = [Child(number) for number in range(1, processes + 1)]
        self.grace = grace
        self.reload = reload
        self.companion = companion
        self.exit_code = 0
        self.stopping = False
        self.one_is_ready = False
        self._first_signal: float | None = None
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._watcher = None if reload is None else FileWatcher(reload, self._wake_write)

    def run(self) -> int:
        """Run until all workers have exited. Returns the highest of their exit codes."""
        with self._handling_signals(), contextlib.nullcontext() if self._watcher is None else self._watcher:
            # Start the first one alone, so that an error of the app or the broker is logged once.
            self.children[0].start_at = 0.0
            while not (self.stopping and all(child.process is None for child in self.children)):
                self._start_those_due()
                self._wait()
                for child in self.children:
                    self._check(child)
                self._restart_if_changed()
        return self.exit_code

    # --- signals, and waiting

    @contextlib.contextmanager
    def _handling_signals(self) -> Generator[None]:
        before = {
            number: signal.signal(number, lambda _number, _frame: None)  # Python writes its number to the socket
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
        lines = [child.socket for child in self.children if child.socket is not None and not child.ready]
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
        elif now - self._first_signal > SIGNAL_REPEAT:
            logger.warning("Stopped at once (%s). Unfinished events will be redelivered.", number.name)
            for child in self.children:
                if child.process is not None:
                    child.process.kill()
            for child in self.children:
                if child.process is not None:  # what it writes would be left in a folder that is removed now
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        child.process.wait(KILL_LIMIT)
            if self.companion is not None:
                self.companion.close()
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
            child.send(STOP)
            if not child.ready and child.process is not None:  # it may still import the app, and does not read messages
                child.process.terminate()
            child.kill_at = time.monotonic() + self.grace + 2 * LAST_STEPS

    # --- the workers

    def _start_those_due(self) -> None:
        now = time.monotonic()
        for child in self.children:
            if child.process is None and child.start_at is not None and child.start_at <= now:
                self._start(child)

    def _start(self, child: Child) -> None:
        child.socket, theirs = socket.socketpair()
        child.start_at = child.kill_at = None
        child.forget()
        child.began = time.monotonic()
        banner = child.number == 1 and (self.reload is not None or not self.one_is_ready)
        label = child.number if len(self.children) > 1 else 0
        place = f"{theirs.fileno()},{label},{len(self.children) if banner else 0}"
        # A .pyc file is matched by its source's time in whole seconds. Of two changes within a second, the older code
        # could be used.
        flags = [] if self.reload is None else ["-B"]
        if not os.path.samefile(os.path.dirname(os.path.dirname(os.path.dirname(__file__))), os.curdir):
            flags.append("-P")  # a module in this folder must not replace one that Python imports for `-m`
        # Ctrl-C reaches every process of the terminal. Block it until the worker ignores it.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            child.process = subprocess.Popen(
                [sys.executable, *flags, "-m", "lightbus", "worker", *self.command, "--supervised", place],
                pass_fds=[theirs.fileno()],
                env=None if self.companion is None else {**os.environ, **self.companion.environment},
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()

    def _check(self, child: Child) -> None:
        child.receive()
        if self._watcher is not None:
            self._watcher.add(child.files)
        child.files.clear()
        if child.ready and not self.one_is_ready:
            self.one_is_ready = True
            for other in self.children[1:]:
                other.start_at = 0.0
        process = child.process
        if process is None:
            return
        status = process.poll()
        if status is not None:
            child.receive()
            self._handle_exit(child, process.pid, status)
        elif child.kill_at is not None and time.monotonic() > child.kill_at:
            logger.error("Process %d (pid %d) did not stop in time: killed.", child.number, process.pid)
            process.kill()

    def _handle_exit(self, child: Child, pid: int, status: int) -> None:
        asked = child.kill_at is not None
        assert child.socket is not None
        child.socket.close()
        child.socket = child.process = child.kill_at = None
        if self.companion is not None:
            self.companion.ended(child.number)
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

    def _restart_if_changed(self) -> None:
        changed = [] if self._watcher is None else self._watcher.changed()
        if not changed or self.stopping:
            return
        logger.info("%s changed: starting again.", ", ".join(changed))
        for child in self.children:
            if child.process is not None:
                self._ask_to_stop(child)
            elif self.one_is_ready or child.number == 1:
                child.start_at = 0.0


def _shell_code(status: int) -> int:
    return 128 - status if status < 0 else status


def _ended(status: int) -> str:
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"was ended by signal {-status} ({signal.Signals(-status).name})"
        return f"was ended by signal {-status}"
    return f"ended with exit status {status}"
