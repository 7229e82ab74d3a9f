"""What differs on MariaDB: its locks, its comparison of text. test_outbox.py and test_inbox.py run on it too."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

import anyio
import anyio.to_thread
import attrs
import pytest
import sqlalchemy as sa
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.orm import Session, sessionmaker

from lightbus import Lightbus, Outcome
from lightbus.outbox import Inbox, Outbox, inbox
from lightbus.outbox import relay as relays
from lightbus.outbox.engine import EngineStore
from lightbus.outbox.store import Refused
from tests.bus import OrderPlaced, declare, eventually, left_in, order_numbers, publish_plainly, running, stranger
from tests.conftest import need_mariadb
from tests.databases import MARIADB, PYMYSQL, Database, dispose, entries, opened
from tests.mariadb import MariaDB

pytestmark = [pytest.mark.anyio, pytest.mark.mariadb]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def database(mariadb_url: str) -> Iterator[Database]:
    """Its default character set is latin1, as on servers that were set up long ago."""
    with opened(PYMYSQL, mariadb_url) as database:
        yield database


@attrs.frozen
class Shop:
    app: Lightbus
    billing: Lightbus
    engine: Any
    outbox: Outbox

    def add(self, *numbers: int) -> list[str]:
        with Session(self.engine) as session, session.begin():
            return [self.outbox.add(session, OrderPlaced(number=number)) for number in numbers]


@pytest.fixture
def shop(database: Database) -> Iterator[Shop]:
    url = f"memory://{uuid.uuid4().hex}"
    app, billing = Lightbus("shop", url=url), Lightbus("billing", url=url)
    app.event(OrderPlaced)
    billing.on("order.placed")(lambda: None)
    engine = impatient(database)
    yield Shop(app, billing, engine, Outbox(app, engine))
    engine.dispose()


def impatient(database: Database) -> Any:
    """An engine whose statements fail after a second where they wait for a lock: by default, after 50."""
    return sa.create_engine(database.url, connect_args={"init_command": "SET innodb_lock_wait_timeout = 1"})


async def test_events_can_be_added_while_a_batch_is_being_sent(shop: Shop) -> None:
    """By default, the relay would lock the gap behind the last row, too."""
    shop.add(*range(20))
    async with EngineStore("shop", shop.engine).claim(500, 0) as batch:
        assert len(batch.rows) == 20
        await anyio.to_thread.run_sync(shop.add, 20)
        await batch.settle([row.id for row in batch.rows], {})


async def test_a_relay_that_deletes_its_rows_does_not_wait_for_those_of_another(shop: Shop) -> None:
    """`WHERE id IN (...)` would read the whole table, since it is small."""
    shop.add(*range(20))
    stores = [EngineStore("shop", shop.engine) for _ in range(2)]
    async with stores[0].claim(8, 0) as first, stores[1].claim(8, 0) as second:
        assert not {row.id for row in first.rows} & {row.id for row in second.rows}
        await second.settle(
            [row.id for row in second.rows[:6]], {second.rows[7].id: Refused("full \N{SLICE OF PIZZA}", None)}
        )
        await first.settle([row.id for row in first.rows], {})
    (problem,) = await stores[0].problems(10)
    assert (problem.id, problem.error) == (second.rows[7].id, "full \N{SLICE OF PIZZA}")
    assert (await stores[0].depth()).waiting == 20 - 8 - 6 - 1


async def test_ids_that_differ_in_case_or_in_a_space_are_different(shop: Shop, database: Database) -> None:
    received: list[str] = []

    @shop.billing.on("order.placed", inbox=Inbox(shop.billing, sessionmaker(shop.engine)), name="bill")
    def bill(session: Session) -> None:
        session.execute(sa.insert(entries).values(name="invoice"))

    @shop.billing.observe
    def note(outcome: Outcome) -> None:
        if outcome.handler == "bill":
            received.append(f"{outcome.kind} {outcome.message.id}")

    accented = "\N{LATIN SMALL LETTER A WITH ACUTE}"
    ids = ["a", "A", "a ", accented, "\N{SLICE OF PIZZA}", "\N{BIRD}", "a" * 254 + " ", "\x07" * 255]
    async with running(shop.app, shop.billing), stranger(shop.app) as channel:
        for times in (1, 2):
            for one in ids:
                properties = {"message_id": one}
                await anyio.to_thread.run_sync(
                    publish_plainly, channel, "shop", "order.placed", b'{"number": 1}', properties
                )
            await eventually(lambda times=times: len(received), len(ids) * times)
    assert sorted(received) == sorted(f"{kind} {one}" for kind in ("handled", "skipped") for one in ids)
    assert database.entries() == ["invoice"] * 8


async def test_events_are_handled_while_a_sweep_deletes(shop: Shop, database: Database) -> None:
    for number in range(30):
        database.execute("INSERT INTO lightbus_inbox VALUES ('billing.bill', :id, 1)", id=f"old-{number}")
    insert = sa.text("INSERT INTO lightbus_inbox VALUES ('billing.bill', :id, :now)")
    with Session(shop.engine) as session, session.begin():
        assert inbox._delete_oldest(session, "billing", time.time() - 60) == (30, False)
        with shop.engine.begin() as connection:
            for one in ("new", "old-3x"):
                connection.execute(insert, {"id": one, "now": time.time()})
    assert [one for _, one in database.handled()] == ["new", "old-3x"]


@pytest.mark.parametrize("driver", MARIADB)
async def test_a_server_that_was_killed_is_used_again(driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need_mariadb()
    monkeypatch.setattr(relays, "LAST_BACKOFF", 0.5)
    url = f"memory://{uuid.uuid4().hex}"
    app, billing = Lightbus("shop", url=url), Lightbus("billing", url=url)
    app.event(OrderPlaced)
    billing.on("order.placed")(lambda: None)
    await declare(app, billing)
    with MariaDB() as server, opened(driver, server.url(server.create_database())) as database:
        engine = database.engine()
        outbox = Outbox(app, engine)
        relay, stopping = outbox.relay, anyio.Event()
        async with app, anyio.create_task_group() as tasks:
            tasks.start_soon(relay.run, stopping)
            for number in range(2):
                async with database.transaction(engine) as session:
                    outbox.add(session, OrderPlaced(number=number))
                await eventually(lambda number=number: relay.sent, number + 1)
                if number == 0:
                    await anyio.to_thread.run_sync(server.kill)
                    await eventually(lambda: relay.trouble)
                    await anyio.to_thread.run_sync(server.start)
                    await eventually(lambda: relay.trouble, None)
                    database.admin.dispose()
                    await dispose(engine)
            stopping.set()
        await dispose(engine)
    assert {*order_numbers(await left_in(billing))} == {0, 1}


def test_a_server_without_skip_locked_is_named_with_the_next_step(database: Database) -> None:
    engine = database.engine()
    store = EngineStore("shop", engine)
    syntax = "You have an error in your SQL syntax; check the manual ... near 'SKIP LOCKED' at line 1"
    described = store.describe(ProgrammingError("SELECT", (), Exception(1064, syntax)))
    assert described.endswith("The relay needs SKIP LOCKED: MariaDB 10.6 or later, MySQL 8.0.4 or later")
    engine.dispose()
