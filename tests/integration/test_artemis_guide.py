"""docs/howto/activemq.md: what it says works on Artemis, with users that have their printed permissions only."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import artemis as brokers
from tests.conftest import need_artemis
from tests.processes import Program, lightbus, working

pytestmark = pytest.mark.artemis

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


@pytest.fixture(scope="module")
def broker() -> Iterator[brokers.Artemis]:
    need_artemis()
    printed = [
        lightbus(
            *("topology", "permissions", f"{app}:app", "--format", "artemis", "--admin-role", brokers.ADMIN),
            folder=EXAMPLES,
            url="memory://",
        )
        for app in ("auth", "welcome")
    ]
    assert all(each.returncode == 0 for each in printed)
    with brokers.Artemis(brokers.default_settings(*(each.stdout for each in printed))) as broker:
        broker.add_users({app: ["lightbus", f"lightbus.{app}"] for app in ("auth", "welcome")})
        yield broker


@pytest.fixture
def worker(broker: brokers.Artemis) -> Iterator[Program]:
    with working("welcome:app", folder=EXAMPLES, url=broker.url("welcome")) as running:
        yield running


def test_the_two_files_of_the_readme_run_with_another_url_only(broker: brokers.Artemis, worker: Program) -> None:
    with Program("auth.py", folder=EXAMPLES, url=broker.url("auth"), program=[sys.executable]) as publisher:
        publisher.wait_for("Confirmed.")
    worker.wait_for(r"Welcome, someone@example.com! \(user.registered from auth\)")


def test_a_program_without_lightbus_publishes_over_amqp_1_0(broker: brokers.Artemis, worker: Program) -> None:
    from proton import Message
    from proton.utils import BlockingConnection

    connection = BlockingConnection(broker.url("auth", scheme="amqp"), timeout=30, allowed_mechs="PLAIN")
    body = b'{"user_id": 3, "email": "another@example.com"}'
    event: Any = Message(body=body, durable=True)
    event.subject = "user.registered"
    connection.create_sender("lightbus.exchange.auth").send(event)
    connection.close()
    worker.wait_for(r"Welcome, another@example.com! \(user.registered from auth\)")
