"""A copy of a folder of docs/examples, in which programs are run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.patience import LIMIT
from tests.processes import LIGHTBUS, ROOT, Program, environment

EXAMPLES = ROOT / "docs" / "examples"
PYTHON = (sys.executable,)
GUNICORN = (*PYTHON, "-m", "gunicorn", "--bind", "127.0.0.1:0", "--no-control-socket", "--workers", "2")
UVICORN = (*PYTHON, "-m", "uvicorn", "--port", "0")
SERVES = r"(?:Listening at:|running on) (http://127.0.0.1:\d+)"
"""Printed by both when they accept requests."""
NO_BROKER = "amqp://guest:guest@127.0.0.1:1/"
"""A URL without a broker."""
ORDER = "3f6c0f0e-8f5a-4a51-9a3b-0d9a3c1e7b10"
MAIL = f"A mail to a@example.com: we have your order {ORDER}."

AUDIT = """\
import json

from lightbus import Lightbus, Message

app = Lightbus("audit")

@app.on("#")
async def note(event: dict, message: Message) -> None:
    print(f"{message.event} from {message.source}: {json.dumps(event, sort_keys=True)} ({message.id})", flush=True)
"""
"""An app that handles all events."""


NO_NETWORK = re.compile(r"E(NOTFOUND|AI_AGAIN|CONNREFUSED|CONNRESET|NETUNREACH|HOSTUNREACH|TIMEDOUT)\b")
"""In the output of npm: its registry cannot be reached."""
MISSING = "IS NOT INSTALLED, SO THERE IS NO TEST OF"


def need(program: str, example: str, install: str) -> None:
    """Skip the test, with a notice, if the program is missing.

    Also with CI=true: not every build machine has these programs, and no other test needs them.
    """
    if shutil.which(program) is None:
        pytest.skip(f"{program} {MISSING} {example}. {install}")


class Example:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(
        self,
        *arguments: str,
        url: str,
        program: Sequence[str] = LIGHTBUS,
        extra: Mapping[str, str] | None = None,
    ) -> Program:
        """Start a command in the background."""
        return Program(*arguments, folder=self.folder, url=url, program=program, extra=extra)

    def audit(self, url: str) -> Program:
        """Start a worker that prints every event, and wait until it is ready."""
        (self.folder / "audit.py").write_text(AUDIT)
        worker = self.start("worker", "audit:app", url=url)
        worker.wait_for("Ready")
        return worker

    def run(self, *command: str, url: str, extra: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command until it ends."""
        return subprocess.run(
            command,
            cwd=self.folder,
            env=environment({"LIGHTBUS_URL": url, **(extra or {})}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=2 * LIMIT,
            check=False,
        )

    def run_its_tests(self, *command: str) -> str:
        """Run the tests of the example, which need no broker. Return their output."""
        done = self.run(*PYTHON, *command, url=NO_BROKER)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr


class Answer:
    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body: Any = json.loads(body)


def put(url: str, body: Mapping[str, Any]) -> Answer:
    """Send JSON with PUT."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="PUT")
    try:
        with urllib.request.urlopen(request, timeout=LIMIT) as response:
            return Answer(response.status, response.headers, response.read())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, error.headers, error.read())


def place_order(server: str, order_id: str = ORDER) -> Answer:
    return put(f"{server}/orders/{order_id}", {"email": "a@example.com"})
