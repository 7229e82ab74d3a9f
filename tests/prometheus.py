"""A private Prometheus for tests: with its own folder and port, on 127.0.0.1 only.

with Prometheus(["127.0.0.1:8080"]) as prometheus:
    prometheus.query("lightbus_ready")
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.patience import LIMIT, wait_until
from tests.rabbitmq import free_port

INSTALL = (
    "Prometheus is not installed: `apt-get install prometheus` (Debian, Ubuntu) or `brew install prometheus`. "
    "No service needs to run: the tests start their own server."
)

FOLDERS = (
    *filter(None, [os.environ.get("LIGHTBUS_PROMETHEUS")]),  # another version than the installed one
    *os.get_exec_path(),
    "/opt/homebrew/bin",
    "/usr/local/bin",
)


def find(program: str = "prometheus") -> str | None:
    """The full path of `prometheus` or `promtool`, or None if Prometheus is not installed."""
    return shutil.which(program, path=os.pathsep.join(FOLDERS))


class Prometheus:
    """A server that scrapes these targets and evaluates these rules, five times per second or in another interval."""

    def __init__(self, targets: Sequence[str], rules: Sequence[Path] = (), *, interval: str = "200ms") -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.folder = Path(tempfile.mkdtemp(prefix="lightbus-prometheus-"))
        self.output = self.folder / "output"
        self.owner = os.getpid()
        self.process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        config = {
            "global": {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval},
            "rule_files": [str(path) for path in rules],
            "scrape_configs": [
                {"job_name": "lightbus", "scrape_timeout": interval, "static_configs": [{"targets": [*targets]}]}
            ],
        }
        (self.folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML

    def start(self) -> None:
        """Start it, and return when it answers.

        Raises:
            RuntimeError: Prometheus is not installed.
        """
        program = find()
        if program is None:
            raise RuntimeError(INSTALL)
        atexit.register(self.close)
        command = [
            program,
            f"--config.file={self.folder}/prometheus.yml",
            f"--storage.tsdb.path={self.folder}/data",
            f"--web.listen-address=127.0.0.1:{self.port}",
        ]
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C goes to the tests, which then stop it.
            )
        # Kills it if this process is killed (SIGKILL), because its end of the pipe is closed then.
        ends = f"read -r _; kill -9 {self.process.pid}; rm -rf '{self.folder}'"
        self._guard = subprocess.Popen(["sh", "-c", ends], stdin=subprocess.PIPE, start_new_session=True)
        wait_until(self._is_ready, "Prometheus is ready")

    def _is_ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.output.read_text()
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/-/ready", timeout=LIMIT) as answer:
            return bool(answer.status == 200)
        return False

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The result of an expression now.

        Raises:
            ValueError: the expression is invalid; the message is Prometheus' own.
        """
        found: list[dict[str, Any]] = self.ask("query", query=expression)["result"]
        return found

    def ask(self, path: str, **parameters: str) -> Any:
        """The data of an answer of the HTTP API."""
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=LIMIT) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            with error:
                raise ValueError(json.load(error)["error"]) from None

    def close(self) -> None:
        """Kill it, and delete its folder."""
        if os.getpid() != self.owner:  # a forked child of a test that runs the exit handlers
            return
        for process in (self._guard, self.process):
            if process is not None:
                process.kill()
                process.communicate()
        self._guard = self.process = None
        shutil.rmtree(self.folder, ignore_errors=True)
        atexit.unregister(self.close)

    def __enter__(self) -> Prometheus:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
