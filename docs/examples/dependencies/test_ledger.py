"""Tests of ledger.py. Try it: pytest test_ledger.py"""

import sqlite3
from contextlib import closing
from pathlib import Path

import ledger
import pytest

from lightbus.testing import TestBus

CREATE = "CREATE TABLE ledger (invoice_id TEXT PRIMARY KEY, cents INTEGER)"


def rows(database: str | Path) -> list[tuple[str, int]]:
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute("SELECT * FROM ledger").fetchall()


def pay(bus: TestBus, cents: int) -> None:
    bus.publish_sync("invoice.paid", {"invoice_id": "i-1", "cents": cents}, source="billing")
    bus.drain_sync()


def test_a_payment_is_entered_in_a_fake_database() -> None:
    with closing(sqlite3.connect(":memory:", check_same_thread=False)) as database:
        database.execute(CREATE)
        with TestBus(ledger.app, lifespan=False) as bus:
            bus.override(ledger.open_database, lambda: database)
            pay(bus, 950)
        assert database.execute("SELECT * FROM ledger").fetchall() == [("i-1", 950)]


def test_nothing_is_entered_when_the_handler_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEDGER_DB", str(tmp_path / "ledger.sqlite3"))
    with TestBus(ledger.app) as bus:
        pay(bus, 0)
        [dead] = bus.dead(ledger.enter)
        assert dead.error == "Reject: nothing was paid"
    assert rows(tmp_path / "ledger.sqlite3") == []


def test_a_payment_that_was_entered_is_committed(tmp_path: Path) -> None:
    settings = ledger.Settings(database=str(tmp_path / "ledger.sqlite3"))
    with closing(sqlite3.connect(settings.database)) as database:
        database.execute(CREATE)
    with ledger.app.with_state(settings), TestBus(ledger.app, lifespan=False) as bus:
        pay(bus, 950)
    assert rows(settings.database) == [("i-1", 950)]
