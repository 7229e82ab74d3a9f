"""A private Prometheus for tests: with its own folder and port, on 127.0.0.1 only.

with Prometheus(["127.0.0.1:8080"]) as prometheus:
    prometheus.query("lightbus_ready")
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.patience import LIMIT
from tests.server import PrivateServer

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


class Prometheus(PrivateServer):
    """A server that scrapes these targets and evaluates these rules, five times per second or in another interval."""

    def __init__(self, targets: Sequence[str], rules: Sequence[Path] = (), *, interval: str = "200ms") -> None:
        super().__init__("Prometheus")
        self.url = f"http://127.0.0.1:{self.port}"
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
            RuntimeError: Prometheus is not installed, or did not come up.
        """
        program = find()
        if program is None:
            raise RuntimeError(INSTALL)
        self.launch(
            program,
            f"--config.file={self.folder}/prometheus.yml",
            f"--storage.tsdb.path={self.folder}/data",
            f"--web.listen-address=127.0.0.1:{self.port}",
            timeout=LIMIT,
        )

    def answers(self) -> bool:
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
