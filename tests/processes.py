"""Real `lightbus` processes, which are killed at the end of the test."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from tests.patience import LIMIT
from tests.patience import wait_until as wait_until

ROOT = Path(__file__).parent.parent
LIGHTBUS = (sys.executable, "-m", "lightbus")


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("LIGHTBUS_", "NO_COLOR", "FORCE_COLOR"))
    }
    return {**kept, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **(extra or {})}


def lightbus(
    *arguments: str, folder: Path, url: str, given: bytes = b"", extra: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    done = subprocess.run(
        [*LIGHTBUS, *arguments],
        cwd=folder,
        env=environment({"LIGHTBUS_URL": url, **(extra or {})}),
        input=given,
        capture_output=True,
        timeout=LIMIT * 2,
        check=False,
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


class Program:
    """A command in the background. Its output (stdout and stderr) is in `lines`."""

    def __init__(
        self,
        *arguments: str,
        folder: Path,
        url: str,
        extra: Mapping[str, str] | None = None,
        stdin: IO[bytes] | None = None,
        program: Sequence[str] = LIGHTBUS,
    ) -> None:
        self.lines: list[str] = []
        self._more = threading.Condition()
        self._returned: set[int] = set()
        self.process = subprocess.Popen(
            [*program, *arguments],
            cwd=folder,
            env=environment({"LIGHTBUS_URL": url, **(extra or {})}),
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._more:
                self.lines.append(line.rstrip("\n"))
                self._more.notify_all()

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Wait for a line that matches the pattern, the first that no earlier call has returned. Lines of different
        threads or processes come in any order, so one that was printed before the previous call's line counts, too.
        """
        deadline = time.monotonic() + LIMIT
        searched = 0
        with self._more:
            while True:
                for number, line in enumerate(self.lines[searched:], searched):
                    found = re.search(pattern, line)
                    if found and number not in self._returned:
                        self._returned.add(number)
                        return found
                searched = len(self.lines)
                left = deadline - time.monotonic()
                if left <= 0 or not self._more.wait(left):
                    raise AssertionError(f"no {pattern!r} within {LIMIT:g} s in:\n{self.output}")

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self, number: signal.Signals | None = None) -> int:
        """Send the signal, if one is given, wait for the exit, and return its status."""
        if number is not None:
            self.signal(number)
        try:
            status = self.process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it is still running after {LIMIT:g} s:\n{self.output}") from None
        self._reader.join(LIMIT)
        return status

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # including its workers, which are in the same session
        self.process.wait()


@contextlib.contextmanager
def working(target: str, *options: str, folder: Path, url: str) -> Iterator[Program]:
    """A worker that is ready."""
    with Program("worker", target, *options, folder=folder, url=url) as worker:
        worker.wait_for("Ready")
        yield worker


def children_of(pid: int) -> list[int]:
    """The process ids of its child processes, the oldest first."""
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    """Whether a process is running (a zombie is not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self").exists():
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
