"""docs/examples/node and shell: programs without Lightbus publish and handle events."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import kombu
import pytest

from tests.integrations.example import EXAMPLES, MISSING, NO_NETWORK, PYTHON, Example, need
from tests.patience import LIMIT, wait_until
from tests.processes import LIGHTBUS

NODE = "Install Node.js 18 or newer (apt-get install nodejs npm)."
AMQP_TOOLS = "On Debian and Ubuntu: apt-get install amqp-tools."

pytestmark = pytest.mark.rabbitmq


@pytest.fixture(scope="module")
def node_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages of package-lock.json, installed once."""
    for program in ("node", "npm"):
        need(program, "docs/examples/node", NODE)
    folder = tmp_path_factory.mktemp("npm")
    for name in ("package.json", "package-lock.json"):
        shutil.copy(EXAMPLES / "node" / name, folder)
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=4 * LIMIT, check=False)
    if done.returncode and NO_NETWORK.search(done.stderr):
        pytest.skip(f"amqplib {MISSING} docs/examples/node: npm does not reach its registry.")
    assert done.returncode == 0, done.stderr
    return folder / "node_modules"


@pytest.fixture
def node(example: Callable[[str], Example], node_modules: Path) -> Example:
    folder = example("node")
    (folder.folder / "node_modules").symlink_to(node_modules)
    return folder


def test_an_event_from_node_is_confirmed_and_handled(node: Example, rabbitmq_url: str) -> None:
    """On an empty broker, and then with a subscribed app."""
    early = node.run("node", "publish.js", rabbitmq_url, "3", "early@example.com", url=rabbitmq_url)
    assert (early.returncode, early.stderr) == (0, "")
    assert early.stdout == "Not routed: no queue is bound for it.\nConfirmed.\n"
    with node.audit(rabbitmq_url) as audit:
        done = node.run("node", "publish.js", rabbitmq_url, "3", "a@example.com", url=rabbitmq_url)
        assert (done.returncode, done.stdout, done.stderr) == (0, "Confirmed.\n", "")
        audit.wait_for(r'user.registered from web: {"email": "a@example.com", "user_id": 3} \([-0-9a-f]{36}\)')


def test_node_without_a_broker_fails(node: Example) -> None:
    done = node.run("node", "publish.js", "amqp://guest:guest@127.0.0.1:1/", "3", "a@example.com", url="memory://")
    assert done.returncode == 1
    assert "ECONNREFUSED" in done.stderr


def test_node_handles_events_of_lightbus_and_dead_letters_invalid_ones(node: Example, rabbitmq_url: str) -> None:
    shutil.copy(EXAMPLES / "auth.py", node.folder)
    with node.start("subscribe.js", rabbitmq_url, program=("node",), url=rabbitmq_url) as subscriber:
        subscriber.wait_for("Ready.")
        assert node.run(*PYTHON, "auth.py", url=rabbitmq_url).stdout == "Confirmed.\n"
        subscriber.wait_for("user.registered from auth: someone@example.com")
        with kombu.Connection(rabbitmq_url) as connection:
            kombu.Producer(connection).publish(b"not JSON", exchange="auth", routing_key="user.registered")
        subscriber.wait_for("undefined: Unexpected token")
        assert subscriber.end(signal.SIGTERM) == 0
    dead: list[bytes] = []

    def is_dead() -> bool:  # a quorum queue dead-letters at least once, and later
        with kombu.Connection(rabbitmq_url) as connection:
            found = connection.default_channel.basic_get("newsletter.dead", no_ack=True)
        dead.extend([] if found is None else [bytes(found.body)])
        return found is not None

    wait_until(is_dead, "it is dead-lettered")
    assert dead == [b"not JSON"]


def test_node_ends_when_its_queue_is_deleted(node: Example, rabbitmq_url: str) -> None:
    with node.start("subscribe.js", rabbitmq_url, program=("node",), url=rabbitmq_url) as subscriber:
        subscriber.wait_for("Ready.")
        with kombu.Connection(rabbitmq_url) as connection:
            connection.default_channel.queue_delete("newsletter")
        assert subscriber.end() == 1
    assert "The queue was deleted." in subscriber.output


def test_the_lock_file_contains_no_registry() -> None:
    text = (EXAMPLES / "node" / "package-lock.json").read_text()
    assert "resolved" not in text
    assert "://" not in text
    lock = json.loads(text)
    assert all("integrity" in package for path, package in lock["packages"].items() if path)


def test_a_shell_publishes_an_event(example: Callable[[str], Example], rabbitmq_url: str) -> None:
    need("amqp-publish", "docs/examples/shell", AMQP_TOOLS)
    shell = example("shell")
    shutil.copy(EXAMPLES / "auth.py", shell.folder)
    with shell.audit(rabbitmq_url) as audit:
        missing = shell.run("sh", "publish.sh", rabbitmq_url, "{}", url=rabbitmq_url)
        assert missing.returncode != 0  # the exchange of `auth` does not exist yet
        done = shell.run(
            *LIGHTBUS, "publish", "auth:app", "user.registered", "user_id=2", "email=b@example.com", url=rabbitmq_url
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith(": confirmed, routed.\n")
        audit.wait_for(r'user.registered from auth: {"email": "b@example.com", "user_id": 2}')
        body = '{"user_id": 3, "email": "someone@example.com"}'
        done = shell.run("sh", "publish.sh", rabbitmq_url, body, url=rabbitmq_url)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        audit.wait_for(r'user.registered from auth: {"email": "someone@example.com", "user_id": 3}')


def test_the_script_can_be_run() -> None:
    assert os.access(EXAMPLES / "shell" / "publish.sh", os.X_OK)
