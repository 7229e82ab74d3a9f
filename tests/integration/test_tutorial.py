"""Follows docs/tutorial.md from an empty folder: each command is run, and its output is compared with the page."""

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
"""Commands that the environment of the tests does not need."""

WHAT_DIFFERS = {
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d{3})?": "TIME",
    r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}": "ID",
    r"\d+s ago": "AGE ago",
    r" +\d+s  ": " AGE  ",
    r" in \d+\.\d\ds": " in SECONDS",
    r" oldest for \d+s": " oldest for AGE",
    r" to (embedded|amqp:).*": " to BROKER",
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
    """A reader with two terminals, who follows the page block by block."""

    def __init__(self, folder: Path, url: str | None) -> None:
        self.folder = folder
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("LIGHTBUS_", "PYTEST_"))}
        self.environment = kept | {
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "XDG_STATE_HOME": f"{folder}/state",
        }
        self.environment["PYTEST_ADDOPTS"] = "-p no:asyncio"  # the reader has no such plug-in
        if url is not None:
            self.environment["LIGHTBUS_URL"] = url
        self.url = url
        self.worker: subprocess.Popen[str] | None = None
        self.relay: subprocess.Popen[bytes] | None = None
        self.output = ""
        """Output of the worker that the page has not shown yet."""
        self.newest_id = ""
        self.commands = 0

    def follow(self, page: str) -> None:
        position = 0
        for block in BLOCK.finditer(page):
            if "with Ctrl-C" in page[position : block.start()]:
                self.stop()
            position = block.end()
            if block["file"] is not None:
                self.write(ROOT / block["file"])
            elif block["language"] == "console" and not self.do(block["text"]):
                return

    def write(self, example: Path) -> None:
        shutil.copy(example, self.folder / example.name)

    def do(self, block: str) -> bool:
        """Run the commands of the block and compare their output. Return False if the rest needs RabbitMQ."""
        if not block.startswith("$ "):
            self.wait_for_worker(block)
            return True
        for command, output in re.findall(r"^\$ (.+)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE):
            if command.startswith(SETS_UP):
                assert not output
            elif command.startswith("export LIGHTBUS_URL="):
                if self.url is None:
                    return False
            elif " relay " in command:
                self.start_relay(shlex.split(command), output)
            elif " worker " in command:
                self.start_worker(shlex.split(command))
                shown = output.removeprefix("...\n")
                self.wait_for_worker(shown, "Ready:", whole=shown == output)
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

    def program(self, command: list[str]) -> list[str]:
        name, *arguments = command
        return [sys.executable, *([] if name == "python" else ["-m", name]), *arguments]

    # --- the first terminal

    def start_worker(self, command: list[str]) -> None:
        assert self.worker is None
        self.output = ""
        self.worker = subprocess.Popen(
            self.program(command),
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
            self.output += line

    def wait_for_worker(self, text: str, too: str = "", *, whole: bool = True) -> None:
        """Wait until the worker has printed this text, and (if `whole`) nothing else since the last call."""
        wanted, deadline = as_shown(text), time.monotonic() + LIMIT
        while wanted not in as_shown(self.output) or too not in self.output:
            assert time.monotonic() < deadline, f"the worker did not print:\n{wanted}\nbut:\n{as_shown(self.output)}"
            time.sleep(0.05)
        if whole:
            assert as_shown(self.output) == wanted
        self.output = ""

    # --- the third terminal

    def start_relay(self, command: list[str], output: str) -> None:
        log, deadline = self.folder / "relay.log", time.monotonic() + LIMIT
        with log.open("wb") as file:
            self.relay = subprocess.Popen(
                self.program(command), cwd=self.folder, env=self.environment, stdout=file, stderr=file
            )
        while as_shown(log.read_text()) != as_shown(output):
            assert time.monotonic() < deadline, f"the relay did not print:\n{output}\nbut:\n{log.read_text()}"
            time.sleep(0.05)

    def stop_relay(self) -> None:
        if self.relay is not None:
            relay, self.relay = self.relay, None
            relay.send_signal(signal.SIGINT)
            assert relay.wait(LIMIT) == 0

    # --- both

    def stop(self) -> None:
        self.stop_relay()
        self.stop_worker()

    def stop_worker(self) -> None:
        if self.worker is not None:
            worker, self.worker = self.worker, None
            worker.send_signal(signal.SIGINT)
            assert worker.wait(LIMIT) == 0
            self._reading.join(LIMIT)

    def leave(self) -> None:
        for process in (self.worker, self.relay):
            if process is not None:
                process.kill()
                process.wait()


@pytest.fixture(params=["embedded", pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)])
def url(request: pytest.FixtureRequest) -> str | None:
    """None: the embedded broker without any setting, as at the start of the page."""
    return request.getfixturevalue("rabbitmq_url") if request.param == "rabbitmq" else None


def test_the_tutorial_works_as_shown(url: str | None, tmp_path: Path) -> None:
    reader = Reader(tmp_path, url)
    try:
        reader.follow(PAGE.read_text())
    finally:
        reader.leave()
    assert reader.commands == (14 if url is None else 15), "number of commands that were run"


def test_each_file_of_the_tutorial_is_shown() -> None:
    page = PAGE.read_text()
    for path in FILES.rglob("*.py"):
        shown = path.read_text() in page
        assert shown or (f"<!-- {path.relative_to(ROOT)} -->" in page and path.parent != FILES)
