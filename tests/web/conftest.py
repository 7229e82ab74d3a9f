"""A browser, and `lightbus web` as a process."""

from __future__ import annotations

import contextlib
import http.client
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import attrs
import pytest

from tests import browser
from tests.browser import Browser
from tests.integrations.example import MISSING, NO_NETWORK
from tests.integrations.test_asyncapi import find_node
from tests.patience import LIMIT
from tests.processes import ROOT, Program

CHECK = """axe.run().then((found) => found.violations.map((one) =>
  `${one.impact}: ${one.id}: ${one.nodes.map((node) => node.html).join(" ")}`))"""
AXE = ROOT / "tests" / "web" / "axe"


@attrs.frozen
class Answer:
    """What the server answers to one request."""

    status: int
    headers: dict[str, str]
    """With names in lower case."""
    text: str


def ask(url: str, *, method: str = "GET", body: str = "", host: str | None = None, **headers: str) -> Answer:
    """One request, without following redirects.

    Args:
        headers: with `_` in the place of `-`.
    """
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=LIMIT)
    try:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if host is not None:
            sent["Host"] = host
        connection.request(
            method, (parts.path or "/") + (f"?{parts.query}" if parts.query else ""), body.encode() or None, sent
        )
        answer = connection.getresponse()
        received = {name.lower(): value for name, value in answer.getheaders()}
        return Answer(answer.status, received, answer.read().decode())
    finally:
        connection.close()


@contextlib.contextmanager
def serving(*options: str, folder: Path, url: str = "memory://", **extra: str) -> Iterator[str]:
    """`lightbus web` on a free port; gives its address."""
    with Program("web", "--port", "0", *options, folder=folder, url=url, extra=extra) as program:
        yield program.wait_for(r"^Lightbus web: (http://\S+)$")[1].rstrip("/")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = browser.find()
    if program is None:
        pytest.skip(f"THE PAGES OF LIGHTBUS WEB ARE NOT TESTED IN A BROWSER. {browser.INSTALL}")
    with browser.start(program, tmp_path_factory.mktemp("chromium")) as found:
        yield found


Faults = Callable[[Browser], list[str]]


@pytest.fixture(scope="session")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Faults:
    """`faults(browser)`: the accessibility faults that axe-core finds on the page, of any impact, in light and dark."""
    found = find_node()
    if found is None:
        pytest.skip(f"Node.js {MISSING} axe-core. `make setup` installs it.")
    folder = tmp_path_factory.mktemp("axe")
    for name in ("package.json", "package-lock.json"):
        shutil.copy(AXE / name, folder)
    command = [*found[1], "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=4 * LIMIT, check=False)
    if done.returncode and NO_NETWORK.search(done.stderr):
        pytest.skip(f"axe-core {MISSING} the pages: npm does not reach its registry.")
    assert done.returncode == 0, done.stderr
    script = (folder / "node_modules" / "axe-core" / "axe.min.js").read_text()

    def run(page: Browser) -> list[str]:
        page.evaluate(f"{script}; undefined")
        violations: list[str] = []
        for scheme in ("dark", "light"):
            page.prefer(scheme)
            answer = page.call("Runtime.evaluate", expression=CHECK, awaitPromise=True, returnByValue=True)
            assert "exceptionDetails" not in answer, answer
            violations += [f"{scheme}: {one}" for one in answer["result"]["value"]]
        return violations

    return run
