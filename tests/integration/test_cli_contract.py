"""`lightbus contract`, and the contract that a worker publishes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from lightbus.catalog import storage
from lightbus.connection.dial import BrokerAddresses
from tests.patience import wait_until
from tests.processes import Program, children_of, lightbus, working
from tests.rabbitmq import Node

FILES = {
    "billing.py": """
from lightbus import Lightbus
app = Lightbus("billing")

@app.event("invoice.paid")
class InvoicePaid:
    number: int

@app.on("order.placed")
def invoice(order: dict): ...
"""
}


def releases(url: str) -> dict[str, str]:
    return {one.app: one.release for one in storage.read(BrokerAddresses.parse(url)).contracts}


def test_a_contract_is_shown_published_and_withdrawn(folder: Path, sqlite_url: str) -> None:
    shown = lightbus("contract", "show", "billing:app", "--release", "7", folder=folder, url="amqp://127.0.0.1:1")
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert (found["app"], found["release"], found["events"][0]["name"]) == ("billing", "7", "invoice.paid")
    done = lightbus(
        "contract", "publish", "billing:app", folder=folder, url=sqlite_url, extra={"LIGHTBUS_RELEASE": "8"}
    )
    assert (done.returncode, done.stdout) == (0, "Published the contract of billing: 1 event, 1 handler.\n"), (
        done.stderr
    )
    assert releases(sqlite_url) == {"billing": "8"}
    done = lightbus("contract", "withdraw", "billing:app", folder=folder, url=sqlite_url)
    assert (done.returncode, done.stdout) == (0, "Withdrew the contract of billing. Its queues are unchanged.\n")
    assert releases(sqlite_url) == {}


def test_a_broker_that_is_down_is_an_error(folder: Path) -> None:
    done = lightbus("contract", "publish", "billing:app", folder=folder, url="amqp://127.0.0.1:1")
    assert done.returncode == 1
    assert "Connection refused" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("options", [(), ("--processes", "2")])
def test_a_worker_publishes_its_contract(folder: Path, sqlite_url: str, options: tuple[str, ...]) -> None:
    with Program(
        "worker", "billing:app", *options, folder=folder, url=sqlite_url, extra={"LIGHTBUS_RELEASE": "9"}
    ) as worker:
        for _ in range(2 if options else 1):
            worker.wait_for("Ready")
        wait_until(lambda: releases(sqlite_url) == {"billing": "9"}, "it is in the catalogue")
        assert worker.end(signal.SIGTERM) == 0
    assert "contract" not in worker.output


def test_a_worker_process_that_replaces_another_publishes_the_contract(folder: Path, sqlite_url: str) -> None:
    with Program("worker", "billing:app", "--processes", "2", folder=folder, url=sqlite_url) as worker:
        wait_until(lambda: releases(sqlite_url), "it is in the catalogue")
        worker.wait_for("Ready")
        worker.wait_for("Ready")
        done = lightbus("contract", "withdraw", "billing:app", folder=folder, url=sqlite_url)
        assert done.returncode == 0, done.stderr
        for process in children_of(worker.process.pid):
            os.kill(process, signal.SIGKILL)
        wait_until(lambda: releases(sqlite_url), "it is in the catalogue again")
        assert worker.end(signal.SIGTERM) == 0


@pytest.mark.rabbitmq
def test_a_worker_without_access_to_the_catalogue_logs_that_and_works(
    folder: Path, rabbitmq_url: str, rabbitmq: Node
) -> None:
    vhost = rabbitmq_url.rpartition("/")[2]
    with working("billing:app", "--no-contract", folder=folder, url=rabbitmq_url) as worker:  # creates the bus exchange
        assert worker.end(signal.SIGTERM) == 0
    user, own = f"billing-{vhost}", r"billing(\..+)?"
    rabbitmq.add_users(vhost, {user: (rf"^{own}$", rf"^({own}|lightbus)$", rf"^({own}|lightbus)$")}, "pw")
    with working("billing:app", folder=folder, url=rabbitmq.vhost_url(vhost, user, "pw")) as worker:
        worker.wait_for(
            "INFO     The contract of app 'billing' is not in the catalogue of the bus: The stream lightbus"
        )
        assert worker.end(signal.SIGTERM) == 0
