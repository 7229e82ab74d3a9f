"""docs/examples/dependencies: its tests, and both apps in workers."""

from __future__ import annotations

import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing

from lightbus import Lightbus
from tests.integrations.example import Example
from tests.patience import wait_until


def test_its_tests_pass(example: Callable[[str], Example]) -> None:
    output = example("dependencies").run_its_tests("-m", "pytest", "-p", "no:cacheprovider")
    assert "3 passed in" in output


def test_a_worker_commits_a_payment(example: Callable[[str], Example], url: str) -> None:
    billing = Lightbus("billing", url=url)

    @billing.event
    class InvoicePaid:
        invoice_id: str
        cents: int

    ledger = example("dependencies")
    extra = {"LEDGER_DB": "ledger.sqlite3"}  # not the developer's
    with ledger.start("worker", "ledger:app", url=url, extra=extra) as worker, billing:
        worker.wait_for("Ready")
        billing.publish_sync(InvoicePaid(invoice_id="i-1", cents=950))
        with closing(sqlite3.connect(ledger.folder / "ledger.sqlite3")) as database:
            wait_until(lambda: database.execute("SELECT * FROM ledger").fetchall() == [("i-1", 950)], "the payment")
        assert worker.end(signal.SIGTERM) == 0


def test_a_worker_sends_a_mail_of_the_tenant(example: Callable[[str], Example], url: str) -> None:
    auth = Lightbus("auth", url=url)

    @auth.event
    class UserRegistered:
        email: str

    with example("dependencies").start("worker", "tenants:app", url=url) as worker, auth:
        worker.wait_for("Ready")
        auth.publish_sync(UserRegistered(email="a@b.c"), headers={"tenant": "acme"})
        worker.wait_for("hello@acme.example.com to a@b.c: Welcome to acme!")
        auth.publish_sync(UserRegistered(email="a@b.c"))
        worker.wait_for("Reject: the event has no header `tenant`")
        assert worker.end(signal.SIGTERM) == 0
