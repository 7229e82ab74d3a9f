"""docs/howto/activemq.md: what it says works on an Artemis that is set up in the same way: the printed parts added to
what `artemis create` writes, and users that have their printed permissions only.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import artemis as brokers
from tests.conftest import need_artemis
from tests.processes import Program, lightbus, working

pytestmark = pytest.mark.artemis

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
PAGE = ROOT / "docs" / "howto" / "activemq.md"
OPERATOR = "operator"


def artemis(*arguments: str) -> str:
    """Run a command of the broker's script `artemis`."""
    home = brokers.find()
    assert home is not None
    done = subprocess.run([home / "bin" / "artemis", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def printed(*arguments: str) -> str:
    done = lightbus("topology", *arguments, folder=EXAMPLES, url="memory://")
    assert done.returncode == 0, done.stderr
    return done.stdout


def added(written: str, new: str) -> str:
    """The elements of `new`, with the children of the same elements of a broker.xml."""
    for name in ("security-settings", "address-settings", "addresses"):
        found = re.search(rf"<{name}>(.*?)</{name}>", written, re.DOTALL)
        assert found, name
        new = new.replace(f"</{name}>", f"{found[1]}</{name}>")
    return new


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[brokers.Artemis]:
    need_artemis()
    instance = tmp_path_factory.mktemp("artemis")
    artemis("create", str(instance), "--silent", "--user=admin", "--password=admin", "--require-login", "--no-autotune")
    end = "</security-settings>"
    apps = [printed("permissions", f"{app}:app", "--format", "artemis") for app in ("auth", "welcome")]
    settings = added(
        (instance / "etc" / "broker.xml").read_text(), printed("artemis").replace(end, "".join([*apps, end]))
    )
    with brokers.Artemis(settings, options="protocols=AMQP,CORE") as broker:
        broker.add_users({app: ["lightbus", f"lightbus.{app}"] for app in ("auth", "welcome")})
        broker.add_users({OPERATOR: ["amq"]})
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


def test_an_operator_has_the_role_that_artemis_create_has_made(broker: brokers.Artemis, worker: Program) -> None:
    arguments = ("unbind", "welcome:app", "user.registered", "--force")
    refused = lightbus(*arguments, folder=EXAMPLES, url=broker.url("welcome"))
    assert refused.returncode == 1
    assert "may be changed by an operator only" in refused.stderr
    done = lightbus(*arguments, folder=EXAMPLES, url=broker.url(OPERATOR))
    assert done.returncode == 0, done.stderr
    with working("welcome:app", folder=EXAMPLES, url=broker.url(OPERATOR)):
        pass  # which binds it again
    with Program("auth.py", folder=EXAMPLES, url=broker.url("auth"), program=[sys.executable]) as publisher:
        publisher.wait_for("Confirmed.")
    worker.wait_for(r"Welcome, someone@example.com! \(user.registered from auth\)")


def test_the_brokers_own_command_shows_the_queues_and_columns_of_the_page(
    broker: brokers.Artemis, worker: Program
) -> None:
    name, password = f"--user={OPERATOR}", f"--password={broker.users[OPERATOR][0]}"
    shown = artemis("queue", "stat", name, password, f"--url=tcp://127.0.0.1:{broker.port}")
    first, second, *rows = [
        [cell.strip() for cell in line.split("|")] for line in shown.splitlines() if line.startswith("|")
    ]
    columns = [" ".join(filter(None, pair)) for pair in zip(first, second, strict=True)]
    assert set(re.findall(r"`([A-Z]+ COUNT)`", PAGE.read_text())) <= set(columns)
    queues = {row[1]: dict(zip(columns, row, strict=True)) for row in rows}
    assert queues["welcome.main"]["CONSUMER COUNT"] == "1"
    assert queues["welcome.dead"]["ADDRESS"] == "lightbus.dead"
    assert "lightbus.catalog" in queues
