"""Chromium without a window, through its DevTools protocol on two pipes: opens, measures and photographs pages."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.patience import LIMIT

INSTALL = "Chromium is not installed: `apt-get install chromium` (Debian)."
NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")


def find() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One tab."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._number = 0
        self._session = ""
        self._unread = b""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._commands, data) :]
        answer = self._read(lambda one: one.get("id") == self._number)
        assert "error" not in answer, f"{method}: {answer}"
        result: dict[str, Any] = answer["result"]
        return result

    def _read(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        deadline = time.monotonic() + 6 * LIMIT
        while True:
            while b"\0" in self._unread:
                message, _, self._unread = self._unread.partition(b"\0")
                found: dict[str, Any] = json.loads(message)
                if wanted(found):
                    return found
            assert select.select([self._answers], [], [], max(0, deadline - time.monotonic()))[0], "no answer"
            data = os.read(self._answers, 1 << 20)
            assert data, "Chromium has ended"
            self._unread += data

    def open(self, page: Path) -> None:
        self.visit(page.as_uri())

    def visit(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self._loaded()

    def _loaded(self) -> None:
        self._read(lambda one: one.get("method") == "Page.loadEventFired")

    def click(self, text: str, within: str = "body") -> None:
        """Click the link or button with this text, which leads to another page, and wait until that is loaded."""
        found = self.evaluate(
            f"""(() => {{
              const all = document.querySelectorAll({json.dumps(within)} + " :is(a, button)");
              const one = [...all].find((each) => each.textContent.trim() === {json.dumps(text)});
              if (one) one.click();
              return Boolean(one);
            }})()"""
        )
        assert found, f"no {text!r} in {within} of {self.text()}"
        self._loaded()

    def press_tab(self) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)

    def text(self) -> str:
        """What a reader sees."""
        found: str = self.evaluate("document.body.innerText")
        return found

    def without_scripts(self, off: bool = True) -> None:
        self.call("Emulation.setScriptExecutionDisabled", value=off)

    def resize(self, width: int, height: int = 900) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def prefer(self, scheme: str) -> None:
        """`light` or `dark`."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def evaluate(self, script: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, file: Path, *, whole: bool = False) -> None:
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(answer["data"]))


# The browser speaks the protocol on its file descriptors 3 and 4.
RUN = """
import fcntl, os, sys
commands, answers = (fcntl.fcntl(int(one), fcntl.F_DUPFD, 10) for one in sys.argv[1:3])
os.dup2(commands, 3)
os.dup2(answers, 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""


@contextlib.contextmanager
def start(program: str, folder: Path) -> Iterator[Browser]:
    """A browser whose profile is in the folder."""
    to_browser, commands = os.pipe()
    answers, from_browser = os.pipe()
    arguments = [
        program,
        "--headless=new",
        "--remote-debugging-pipe",
        f"--user-data-dir={folder}",
        "--no-sandbox",
        "--no-first-run",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--hide-scrollbars",
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(to_browser), str(from_browser), *arguments],
        pass_fds=(to_browser, from_browser),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_browser)
    os.close(from_browser)
    try:
        yield Browser(commands, answers)
    finally:
        os.close(commands)  # Chromium ends when its pipe does
        try:
            process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(answers)
