"""What the private servers of tests have in common: a folder, a free port on 127.0.0.1, and an end in any case."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Self

from tests.rabbitmq import free_port


class PrivateServer:
    """A server process. `close` ends it, and deletes its folder."""

    def __init__(self, name: str) -> None:
        """
        Args:
            name: for messages, and for the folder in lower case.
        """
        self.name = name
        self.port = free_port()
        self.folder = Path(tempfile.mkdtemp(prefix=f"lightbus-{name.lower()}-"))
        self.output = self.folder / "output"
        self.owner = os.getpid()
        self.process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server, and return when it answers."""
        raise NotImplementedError

    def answers(self) -> bool:
        """Whether the server accepts clients."""
        raise NotImplementedError

    def kill(self) -> None:
        """Stop like a crash: SIGKILL."""
        self.stop_guard()
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def end(self) -> None:
        """End the server, for `close`."""
        self.kill()

    def close(self) -> None:
        """End the server, and delete its folder."""
        if os.getpid() != self.owner:  # a forked child of a test that runs the exit handlers
            return
        self.end()
        shutil.rmtree(self.folder, ignore_errors=True)
        atexit.unregister(self.close)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- for subclasses

    def launch(self, *command: str, timeout: float, ends: str | None = None) -> None:
        """Start the server's process, and wait until it answers.

        Args:
            ends: what ends the server, in shell, if this process is killed; `$pid` is the server's process.

        Raises:
            RuntimeError: it did not answer within `timeout` seconds, or has ended.
        """
        atexit.register(self.close)
        self.process = self.spawn(*command)
        # Runs when this process is killed (SIGKILL), because its end of the pipe is closed then.
        ends = ends or "kill -KILL $pid; while kill -0 $pid 2>/dev/null; do sleep 0.1; done"
        script = f"pid={self.process.pid}; read -r _; {ends}; rm -rf '{self.folder}'"
        self._guard = subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE, start_new_session=True)
        deadline = time.monotonic() + timeout
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.end()
                raise RuntimeError(f"{self.name} did not start on port {self.port}. Its log ends:\n{self.tail()}")
            time.sleep(0.05)

    def spawn(self, *command: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start a process that writes to `output`."""
        with self.output.open("ab") as output:
            return subprocess.Popen(
                command,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C goes to the tests, which then stop the server.
                **options,
            )

    def tail(self) -> str:
        return self.output.read_text(errors="replace")[-3000:] if self.output.exists() else ""

    def stop_guard(self) -> None:
        if self._guard is not None:
            self._guard.kill()
            self._guard.communicate()
            self._guard = None
