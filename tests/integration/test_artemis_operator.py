"""Apps and an operator on an Artemis whose settings are exactly what `lightbus topology` prints."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from tests import artemis as brokers
from tests.patience import wait_until
from tests.processes import Program, lightbus, working

pytestmark = pytest.mark.artemis

SHOP = """\
import attrs
from lightbus import Lightbus

app = Lightbus("shop")

@app.event
@attrs.frozen
class OrderPlaced:
    number: int
"""
BILLING = """\
from lightbus import Lightbus, Retry

app = Lightbus("billing", retry=Retry(delays=(0.1,)))

@app.on("order.placed", source="shop")
async def charge(order: dict) -> None:
    if order["number"] % 2:
        raise ValueError("odd")
    print("charged", order["number"], flush=True)

@app.on("user.*", queue="slow")
def mail(user: dict) -> None:
    print("mailed", user["id"], flush=True)
"""
MORE = """
@app.on("order.cancelled")
async def refund(order: dict) -> None: ...
"""


@attrs.frozen
class Company:
    """A broker with the users `shop` and `billing`, who have their printed permissions, and an administrator."""

    broker: brokers.Artemis
    folder: Path

    def run(self, user: str, *arguments: str) -> tuple[int, str]:
        """Run a command as this user. Returns its exit code, and what it printed."""
        done = lightbus(*arguments, folder=self.folder, url=self.broker.url(user))
        assert "extern" not in done.stderr  # of proton's objects that are freed too late
        return done.returncode, done.stdout + done.stderr

    def dead_letters(self) -> int:
        code, text = self.run("billing", "dead", "list", "billing:app")
        assert code == 0, text
        return text.count("order.placed")


@pytest.fixture(scope="module")
def company(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Company]:
    from tests.conftest import need_artemis

    need_artemis()
    folder = tmp_path_factory.mktemp("company")
    (folder / "shop.py").write_text(SHOP)
    (folder / "billing.py").write_text(BILLING)

    def printed(*arguments: str) -> str:
        done = lightbus("topology", *arguments, folder=folder, url="activemq://localhost")
        assert done.returncode == 0, done.stderr
        return done.stdout

    apps = [
        printed("permissions", f"{app}:app", "--format", "artemis", "--admin-role", "admin")
        for app in ("shop", "billing")
    ]
    administrator = printed("artemis", "--admin-role", "admin")
    settings = administrator.replace("</security-settings>", "".join(apps) + "</security-settings>")
    with brokers.Artemis(settings) as broker:
        broker.add_users({app: ["lightbus", f"lightbus.{app}"] for app in ("shop", "billing")})
        yield Company(broker, folder)


@pytest.fixture
def worker(company: Company) -> Iterator[Program]:
    code, text = company.run("shop", "publish", "shop:app", "order.placed", "number=0")  # declares its exchange
    assert code == 0, text
    with working("billing:app", folder=company.folder, url=company.broker.url("billing")) as running:
        yield running
        assert running.end(signal.SIGTERM) == 0
        assert "extern" not in running.output


def test_an_app_with_its_printed_permissions_handles_retries_and_dead_letters(
    company: Company, worker: Program
) -> None:
    url = company.broker.url("billing")
    with Program("tail", "order.#", folder=company.folder, url=url) as tail:
        tail.wait_for("Listening")
        for number, options in ((2, ()), (3, ()), (4, ("--delay", "1"))):
            code, text = company.run("shop", "publish", "shop:app", "order.placed", f"number={number}", *options)
            assert code == 0, text
        worker.wait_for("charged 2")
        worker.wait_for("charged 4")
        for number in (2, 3, 4):
            tail.wait_for(f'"number": {number}')
        assert tail.end(signal.SIGINT) == 0
    wait_until(lambda: company.dead_letters() == 1, "a dead letter")
    code, text = company.run("billing", "dead", "show", "billing:app", "--all")
    assert code == 0
    assert "order.placed  from shop" in text
    assert company.run("billing", "dead", "retry", "billing:app", "--all")[1].splitlines()[-1] == "1 retried."
    wait_until(lambda: company.dead_letters() == 1, "the dead letter again")
    code, text = company.run("billing", "dead", "purge", "billing:app", "--all", "--yes")
    assert (code, text.strip()) == (0, "1 purged.")


def test_doctor_health_and_the_catalogue_answer_an_apps_own_user(company: Company, worker: Program) -> None:
    code, text = company.run("billing", "doctor", "billing:app")
    assert code == 0, text
    assert "fail" not in re.sub("0 failed", "", text)
    for line in ("ok    topology", "ok    queue", "ok    permissions", "ok    catalog"):
        assert line in text
    code, text = company.run("billing", "health", "billing:app")
    assert (code, text.splitlines()[-1]) == (0, "Healthy.")
    wait_until(lambda: "billing" in company.run("billing", "catalog")[1], "the contract of billing")
    assert "billing.charge" in company.run("billing", "who", "order.placed")[1]
    assert company.run("shop", "doctor", "shop:app")[0] == 0


def test_another_app_is_refused_with_the_next_step(company: Company) -> None:
    code, text = company.run("billing", "publish", "shop:app", "order.placed", "number=1")
    assert code == 1
    assert "does not have permission='SEND' on address lightbus.exchange.shop" in text
    assert "lightbus topology permissions MODULE:ATTR --format artemis" in text
    code, text = company.run("shop", "dead", "list", "billing:app")
    assert code == 1
    assert "permission" in text


def test_doctor_does_not_need_to_read_the_queues_of_a_source(company: Company, worker: Program) -> None:
    (company.folder / "busy.py").write_text(SHOP + '\napp.on("order.paid")(lambda: None)\n')
    with working("busy:app", folder=company.folder, url=company.broker.url("admin")):
        pass  # which declares the dead-letter queue of shop
    code, text = company.run("billing", "doctor", "billing:app")
    assert code == 0, text


def test_a_pattern_that_a_selector_cannot_express_ends_the_worker(company: Company) -> None:
    (company.folder / "odd.py").write_text(BILLING.replace("user.*", "*.paid.#"))
    code, text = company.run("billing", "worker", "odd:app")
    assert code == 1
    assert "'*.paid.#' cannot be used on Artemis" in text
    code, text = company.run("billing", "topology", "artemis", "odd:app")
    assert code == 1
    assert "'*.paid.#' cannot be used on Artemis" in text


def test_only_an_operator_changes_bindings(company: Company, worker: Program) -> None:
    code, text = company.run("billing", "unbind", "billing:app", "user.*", "--queue", "slow", "--force")
    assert code == 1
    assert "may be changed by an operator only" in text
    code, text = company.run("admin", "unbind", "billing:app", "user.*", "--queue", "slow", "--force")
    assert code == 0, text
    with working("billing:app", folder=company.folder, url=company.broker.url("admin")):
        pass  # which binds it again


def test_a_new_binding_needs_an_operator_once(company: Company, worker: Program) -> None:
    (company.folder / "later.py").write_text(BILLING + MORE)
    with Program("worker", "later:app", folder=company.folder, url=company.broker.url("billing")) as refused:
        refused.wait_for("may be changed by an operator only: add JMSType = 'order.cancelled'")
        assert refused.end() == 1
    with working("later:app", folder=company.folder, url=company.broker.url("admin")) as running:
        assert running.end(signal.SIGTERM) == 0
    with working("later:app", folder=company.folder, url=company.broker.url("billing")) as running:
        assert running.end(signal.SIGTERM) == 0
