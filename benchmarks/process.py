"""Contestant processes: each in its own session, ended by its id, with a limit on every wait."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Failed(Exception):
    """A contestant failed; the message has the reason."""


class Process:
    """One contestant. Its output (lines of JSON) is read by a thread; its log goes to a file."""

    def __init__(self, command: Sequence[str], *, root: Path, log: Path, environment: Mapping[str, str] = {}) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        self.started = time.monotonic()
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=root,
                env={**os.environ, "PYTHONPATH": str(root), "PYTHONUNBUFFERED": "1", **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
            )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.decode(errors="replace"))
        self._lines.put(None)

    def read(self, timeout: float) -> dict[str, Any]:
        """The next line of its output.

        Raises:
            Failed: it ended, or printed nothing in time. The message includes the end of its log.
        """
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            raise Failed(f"nothing within {timeout:g} s. {self._tail()}") from None
        if line is None:
            code = self.process.wait(10)
            raise Failed(f"ended with code {code}. {self._tail()}")
        try:
            values: dict[str, Any] = json.loads(line)
        except ValueError:
            raise Failed(f"printed {line[:200]!r}. {self._tail()}") from None
        return values

    def resume(self) -> None:
        """Continue a contestant that waits for its standard input."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(b"\n")
            self.process.stdin.flush()

    def _tail(self) -> str:
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return " / ".join(lines[-3:])[-400:]

    def end(self, grace: float = 5) -> None:
        """End it and its child processes."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(0 if self.process.poll() is not None else 0.5)
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(grace)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
