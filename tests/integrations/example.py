"""A folder of docs/examples, and what is done in it."""

from __future__ import annotations

import json
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
"""What either of them says once it can be asked."""
NOBODY = "amqp://guest:guest@127.0.0.1:1/"
"""A broker that is not there."""
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
"""An app that hears all."""


MISSING = "IS NOT INSTALLED HERE, SO NOTHING IS KNOWN OF"


def need(program: str, example: str, install: str) -> None:
    """Skip the test, loudly, where the program is missing.

    Also where CI=true: not every machine that builds this has each of these programs, and nothing else rests on them.
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
        """A command that runs beside the test."""
        return Program(*arguments, folder=self.folder, url=url, program=program, extra=extra)

    def audit(self, url: str) -> Program:
        """A worker that prints every event; returns once it hears."""
        (self.folder / "audit.py").write_text(AUDIT)
        worker = self.start("worker", "audit:app", url=url)
        worker.wait_for("Ready")
        return worker

    def run(self, *command: str, url: str, extra: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """A command, to its end."""
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

    def own_tests_pass(self, *command: str) -> str:
        """Run the tests that the example has of its own; nothing of it may need a broker. Returns what they printed."""
        done = self.run(*PYTHON, *command, url=NOBODY)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr


class Answer:
    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body: Any = json.loads(body)


def put(url: str, body: Mapping[str, Any]) -> Answer:
    """PUT JSON."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="PUT")
    try:
        with urllib.request.urlopen(request, timeout=LIMIT) as response:
            return Answer(response.status, response.headers, response.read())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, error.headers, error.read())


def place_order(server: str, order_id: str = ORDER) -> Answer:
    return put(f"{server}/orders/{order_id}", {"email": "a@example.com"})
