"""A worker on RabbitMQ. Skipped unless TEST_RABBITMQ_URL is set, as in CI."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

URL = os.environ.get("TEST_RABBITMQ_URL", "")
LIGHTBUS = [sys.executable, "-m", "lightbus"]
APP = "{{ cookiecutter.__module }}.bus:app"
EVENT = "{{ cookiecutter.consumes }}"
LIMIT = 60.0
"""Seconds."""


@pytest.mark.skipif(not URL, reason="TEST_RABBITMQ_URL is not set")
def test_a_worker_handles_an_event(tmp_path: Path) -> None:
    environment = {**os.environ, "LIGHTBUS_URL": URL}
    path = tmp_path / "log"
    with path.open("w") as log:
        worker = subprocess.Popen([*LIGHTBUS, "worker", APP], env=environment, stdout=log, stderr=log)
    try:
        wait_for("Ready", path)
        publish = [*LIGHTBUS, "publish", "tests.elsewhere:app", EVENT, "id=1"]
        subprocess.run(publish, env=environment, check=True, timeout=LIMIT)
        wait_for(f"handled {EVENT} 1", path)
        worker.terminate()
        assert worker.wait(LIMIT) == 0
    finally:
        worker.kill()
        worker.wait()


def wait_for(text: str, path: Path) -> None:
    deadline = time.monotonic() + LIMIT
    while text not in path.read_text():
        assert time.monotonic() < deadline, f"no {text!r} within {LIMIT:g} s in:\n{path.read_text()}"
        time.sleep(0.1)
