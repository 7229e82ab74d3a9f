"""docs/tutorial.md, followed from an empty folder: each command is run, and prints what the page shows."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.patience import LIMIT

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "tutorial.md"
FILES = ROOT / "docs" / "examples" / "tutorial"
BLOCK = re.compile(r"^(?:<!-- (?P<file>\S+) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
SETS_UP = ("mkdir ", "cd ", "python3 -m venv ", ". ", "pip install ", "docker run ")
"""What a test's environment has done already."""

WHAT_DIFFERS = {
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d{3})?": "TIME",
    r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}": "ID",
    r"\d+s ago": "AGE ago",
    r" +\d+s  ": " AGE  ",
    r" in \d+\.\d\ds": " in SECONDS",
    r'File ".*/': 'File ".../',
    r"(?m)^  broker .*$": "  broker",
    r"(?m)^# .*\n": "",
    r"(?m)^.*LIGHTBUS_URL is not set: .*\n?": "",
}


def as_shown(text: str) -> str:
    for pattern, instead in WHAT_DIFFERS.items():
        text = re.sub(pattern, instead, text)
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


class Reader:
    """Somebody with two terminals who does what the page says, block by block."""

    def __init__(self, folder: Path, url: str | None) -> None:
        self.folder = folder
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("LIGHTBUS_", "PYTEST_"))}
        self.environment = kept | {
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "XDG_STATE_HOME": f"{folder}/state",
        }
        self.environment["PYTEST_ADDOPTS"] = "-p no:asyncio"  # a plug-in that the reader does not have
        if url is not None:
            self.environment["LIGHTBUS_URL"] = url
        self.url = url
        self.worker: subprocess.Popen[str] | None = None
        self.said = ""
        """By the worker, and not yet shown on the page."""
        self.newest_id = ""
        self.commands = 0

    def follow(self, page: str) -> None:
        position = 0
        for block in BLOCK.finditer(page):
            if "with Ctrl-C" in page[position : block.start()] or "Stop the kitchen." in page[position : block.start()]:
                self.stop_worker()
            position = block.end()
            if block["file"] is not None:
                self.write(ROOT / block["file"])
            elif block["language"] == "console" and not self.do(block["text"]):
                return

    def write(self, example: Path) -> None:
        shutil.copy(example, self.folder / example.name)

    def do(self, block: str) -> bool:
        """Run the block's commands, and compare what they print; False where the rest is for RabbitMQ."""
        if not block.startswith("$ "):
            self.worker_says(block)
            return True
        for command, output in re.findall(r"^\$ (.+)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE):
            if command.startswith(SETS_UP):
                assert not output
            elif command.startswith("export LIGHTBUS_URL="):
                if self.url is None:
                    return False
            elif " worker " in command:
                self.start_worker(shlex.split(command))
                shown = output.removeprefix("...\n")
                self.worker_says(shown, "Ready:", whole=shown == output)
            else:
                self.run(command, output)
        return True

    def run(self, command: str, output: str) -> None:
        if command.startswith("lightbus dead show"):
            command = f"{command.rpartition(' ')[0]} {self.newest_id[:13]}"
        done = subprocess.run(
            self.program(shlex.split(command)),
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT,
            check=False,
        )
        assert as_shown(done.stdout) == as_shown(output), f"$ {command}\n{done.stdout}"
        assert done.returncode == 0
        found = re.search(r"[0-9a-f]{8}-[-0-9a-f]{27}", done.stdout)
        self.newest_id = found[0] if found else self.newest_id
        self.commands += 1

    def program(self, words: list[str]) -> list[str]:
        name, *arguments = words
        return [sys.executable, *([] if name == "python" else ["-m", name]), *arguments]

    # --- the first terminal

    def start_worker(self, words: list[str]) -> None:
        assert self.worker is None
        self.said = ""
        self.worker = subprocess.Popen(
            self.program(words),
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reading = threading.Thread(target=self._read, args=(self.worker,), daemon=True)
        self._reading.start()

    def _read(self, worker: subprocess.Popen[str]) -> None:
        assert worker.stdout is not None
        for line in worker.stdout:
            self.said += line

    def worker_says(self, text: str, too: str = "", *, whole: bool = True) -> None:
        """Wait until the worker has said this: nothing else since the last time, where it is the whole."""
        wanted, deadline = as_shown(text), time.monotonic() + LIMIT
        while wanted not in as_shown(self.said) or too not in self.said:
            assert time.monotonic() < deadline, f"the worker did not say:\n{wanted}\nbut:\n{as_shown(self.said)}"
            time.sleep(0.05)
        if whole:
            assert as_shown(self.said) == wanted
        self.said = ""

    def stop_worker(self) -> None:
        if self.worker is not None:
            worker, self.worker = self.worker, None
            worker.send_signal(signal.SIGINT)
            assert worker.wait(LIMIT) == 0
            self._reading.join(LIMIT)

    def leave(self) -> None:
        if self.worker is not None:
            self.worker.kill()
            self.worker.wait()


@pytest.fixture(params=["embedded", pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)])
def url(request: pytest.FixtureRequest) -> str | None:
    """None is what the page begins with: the embedded broker, without a word."""
    return request.getfixturevalue("rabbitmq_url") if request.param == "rabbitmq" else None


def test_the_tutorial_does_what_it_says(url: str | None, tmp_path: Path) -> None:
    reader = Reader(tmp_path, url)
    try:
        reader.follow(PAGE.read_text())
    finally:
        reader.leave()
    assert reader.commands == (8 if url is None else 9), "commands that ran to their end"


def test_each_file_of_the_tutorial_is_shown_or_is_the_step_after_one_that_is() -> None:
    page = PAGE.read_text()
    for path in FILES.rglob("*.py"):
        shown = path.read_text() in page
        assert shown or (path.parent.name == "fixed" and f"<!-- docs/examples/tutorial/fixed/{path.name} -->" in page)
