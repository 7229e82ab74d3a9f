"""The pictures of `lightbus web` in docs/pictures: `make pictures` runs `lightbus demo --web`, and Chromium photographs
its pages.

They differ from run to run, so no test compares them with another run. `PYTHONPATH` is the root of the repository,
because the browser and the process are those of the tests.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from pathlib import Path

from pictures import FOLDER

from tests import browser
from tests.patience import wait_until
from tests.processes import Program

WIDTH = 1200
READY = "MailTooLong"
PAGES = (
    ("web-map", "light", "/", "commit.pushed"),
    ("web-app", "dark", "/apps/inbox", "1 consumer"),
    ("web-dead-letters", "light", "/dead/inbox", READY),
    ("web-live-events", "dark", "/tail", "commit.pushed"),
)
"""The picture, the scheme, the page, and what it shows when it is ready."""
HIGHEST = 760
"""Pixels."""


def photograph(page: browser.Browser, address: str, folder: Path) -> None:
    """Take all pictures."""
    for name, scheme, path, text in PAGES:
        page.resize(WIDTH)
        page.prefer(scheme)
        page.visit(address + path)

        def is_ready(path: str = path, text: str = text) -> bool:
            if text in page.text():
                return True
            if path != "/tail":
                page.visit(address + path)
            return False

        wait_until(is_ready, f"{text} on {path}")
        if path == "/tail":
            time.sleep(1.5)  # for a few events
        # The footer has the path of a temporary file.
        page.evaluate("document.querySelector('footer').hidden = true")
        height = page.evaluate("document.querySelector('main').getBoundingClientRect().bottom")
        page.resize(WIDTH, min(HIGHEST, round(height)))
        page.screenshot(folder / f"{name}.png")


def main() -> None:
    program = browser.find()
    if program is None:
        sys.exit(browser.INSTALL)
    with tempfile.TemporaryDirectory() as folder, Program("demo", "--web", folder=Path(folder), url="") as demo:
        address = demo.wait_for(r"^Page: +(http://\S+)/ ")[1]
        with browser.start(program, Path(folder) / "chromium") as page:
            photograph(page, address, FOLDER)
        demo.end(signal.SIGINT)


if __name__ == "__main__":
    main()
