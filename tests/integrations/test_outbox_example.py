"""docs/examples/outbox: uvicorn and two workers, each service with its own database."""

from __future__ import annotations

import re
import signal
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psycopg
import pytest

from tests.integrations.example import NO_BROKER, ORDER, SERVES, UVICORN, Example, put
from tests.patience import wait_until
from tests.postgres import Postgres
from tests.processes import LIGHTBUS

SHOP = "shop.bus:bus"


class Database:
    """The database of one service: a file in the folder of the example, or on PostgreSQL."""

    def __init__(self, example: Example, service: str, cluster: Postgres | None) -> None:
        self._file = example.folder / f"{service}.db"
        self._name = cluster.create_database() if cluster else ""
        self._cluster = cluster
        self.url = cluster.url(self._name, driver="asyncpg") if cluster else f"sqlite+aiosqlite:///{self._file}"

    def __call__(self, query: str) -> list[tuple[object, ...]]:
        if self._cluster:
            with psycopg.connect(self._cluster.url(self._name, driver=None)) as connection:
                cursor = connection.execute(query.encode())
                return cursor.fetchall() if cursor.description else []
        with closing(sqlite3.connect(self._file, timeout=60)) as file, file:
            return file.execute(query).fetchall()

    def drop(self) -> None:
        if self._cluster:
            self._cluster.drop_database(self._name)


class Services:
    def __init__(self, example: Example, cluster: Postgres | None) -> None:
        self.example = example
        self.shop, self.billing = (Database(example, service, cluster) for service in ("shop", "billing"))


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def services(request: pytest.FixtureRequest, example: Callable[[str], Example]) -> Iterator[Services]:
    found = Services(example("outbox"), request.getfixturevalue("postgres") if request.param == "postgres" else None)
    yield found
    found.shop.drop()
    found.billing.drop()


def test_each_order_has_one_invoice_and_one_event_although_it_is_taken_without_a_broker(
    services: Services, url: str
) -> None:
    example = services.example
    shop, billing = {"DATABASE_URL": services.shop.url}, {"DATABASE_URL": services.billing.url}
    orders = [str(uuid.uuid4()) for _ in range(5)]
    # The API has no broker: only the relay needs one.
    with example.start("shop.main:api", program=UVICORN, url=NO_BROKER, extra=shop) as server:
        root = server.wait_for(SERVES)[1]
        for order in [*orders, *orders]:  # each request is repeated
            assert put(f"{root}/orders/{order}", {"cents": 950}).status == 201
        assert services.shop("SELECT count(*) FROM lightbus_outbox") == [(5,)]
        with (
            example.start("worker", "billing.bus:bus", url=url, extra=billing) as biller,
            example.audit(url) as audit,
        ):
            biller.wait_for("Ready")
            with example.start("worker", "shop.bus:bus", url=url, extra=shop) as relay:
                relay.wait_for("Ready")
                wait_until(
                    lambda: services.billing("SELECT count(*) FROM invoice") == [(5,)], "each order has an invoice"
                )
                for _ in orders:
                    audit.wait_for("invoice.written from billing")
                assert relay.end(signal.SIGTERM) == 0
            assert biller.end(signal.SIGTERM) == 0
    placed = sorted(order.replace("-", "") for order in orders)
    found = services.billing("SELECT CAST(order_id AS text), cents FROM invoice")
    assert sorted((str(order).replace("-", ""), cents) for order, cents in found) == [(order, 950) for order in placed]
    assert services.shop("SELECT count(*) FROM lightbus_outbox") == [(0,)]
    assert services.billing("SELECT count(*) FROM lightbus_inbox") == [(5,)]


def test_the_commands_of_the_pages_work(services: Services, tmp_path: Path) -> None:
    example, url = services.example, f"sqlite:///{tmp_path}/bus.db"
    shop = {"DATABASE_URL": services.shop.url}

    def lightbus(*words: str, status: int = 0) -> str:
        done = example.run(*LIGHTBUS, *words, url=url, extra=shop)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout

    with example.start("shop.main:api", program=UVICORN, url=NO_BROKER, extra=shop) as server:
        assert put(f"{server.wait_for(SERVES)[1]}/orders/{ORDER}", {"cents": 950}).status == 201
    assert re.search(r": 1 waiting, the oldest for \d+s, 0 set aside\nHealthy.\n$", lightbus("outbox", "stats", SHOP))
    services.shop("UPDATE lightbus_outbox SET state = 1, error = 'no such permission'")  # as the relay does
    assert "0 waiting, 1 set aside" in lightbus("outbox", "stats", SHOP, status=1)
    assert "no such permission" in lightbus("outbox", "list", SHOP)
    assert lightbus("outbox", "retry", SHOP, "--all") == "1 event retried. The next relay or worker sends it.\n"
    with (
        example.audit(url) as audit,
        example.start("relay", "shop.bus:outbox", url=url, extra=shop) as relay,
    ):
        audit.wait_for(f"order.placed from shop: .*{ORDER}")
        assert relay.end(signal.SIGTERM) == 0
    assert re.search(": 0 waiting, 0 set aside\nHealthy.\n$", lightbus("outbox", "stats", SHOP))


def test_the_tests_of_the_example_pass(example: Callable[[str], Example]) -> None:
    assert "5 passed" in example("outbox").run_its_tests("-W", "error", "-m", "pytest", "-q", "-p", "no:asyncio")
