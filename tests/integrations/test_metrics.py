"""docs/examples/monitoring: web apps that publish, and serve their own metrics."""

from __future__ import annotations

import re
import signal
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integrations.example import PYTHON, SERVES, UVICORN, Example, put
from tests.patience import LIMIT, wait_until

GUNICORN = (*PYTHON, "-m", "gunicorn", "--bind", "127.0.0.1:0", "--no-control-socket")


def scraped(server: str, series: str) -> float:
    """Of all processes."""
    with urllib.request.urlopen(f"{server}/metrics/", timeout=LIMIT) as answer:
        text = answer.read().decode()
    found = re.search(rf"^{re.escape(series)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


UNROUTED = 'lightbus_published_total{app="shop",event="order.placed",outcome="unrouted"}'
SECONDS = 'lightbus_publish_seconds_count{app="shop"}'


def test_a_fastapi_app_serves_its_metrics(example: Callable[[str], Example], tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/bus.db"
    with example("monitoring").start("web_fastapi:api", program=UVICORN, url=url) as server:
        root = server.wait_for(SERVES)[1]
        for number in range(3):
            assert put(f"{root}/orders/{number}", {}).status == 202
        assert scraped(root, UNROUTED) == 3
        assert scraped(root, SECONDS) == 3
        with urllib.request.urlopen(f"{root}/metrics/", timeout=LIMIT) as answer:
            text = answer.read().decode()
        assert 'lightbus_connected{app="shop",connection="publisher"} 1.0' in text
        assert "lightbus_queue" not in text


@pytest.mark.parametrize("preload", [(), ("--preload",)])
def test_the_processes_of_gunicorn_count_together(
    example: Callable[[str], Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preload: tuple[str, ...]
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    url = f"sqlite:///{tmp_path}/bus.db"
    with example("monitoring").start(
        *preload, "--config", "gunicorn.conf.py", "web_flask:app", program=GUNICORN, url=url
    ) as server:
        root = server.wait_for(SERVES)[1]
        for number in range(20):
            assert put(f"{root}/orders/{number}", {}).status == 202
        failed: list[int] = []

        def shows(series: str) -> bool:
            """prometheus_client fails while another process creates its file (its issue 1199): scrape again."""
            try:
                return scraped(root, series) == 20
            except urllib.error.HTTPError as error:
                failed.append(error.code)
                return False

        wait_until(lambda: shows(UNROUTED), "the counter")
        wait_until(lambda: shows(SECONDS), "the histograms, which are written once a second")
        server.end(signal.SIGTERM)
        assert set(failed) <= {500}
        assert failed or "Traceback" not in server.output
