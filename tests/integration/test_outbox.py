"""The outbox: what a transaction commits is published, what it rolls back is not. On each database and driver."""

from __future__ import annotations

import contextlib
import gc
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import anyio
import anyio.abc
import anyio.lowlevel
import anyio.to_thread
import asyncpg
import attrs
import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, async_scoped_session, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.pool import StaticPool

from lightbus import Lightbus, Outcome, errors
from lightbus.outbox import Outbox, Relay, metadata, statements
from lightbus.outbox import relay as relays
from lightbus.outbox.engine import EngineStore
from lightbus.testing import TestBus
from lightbus.transport import Delivery
from lightbus.wire import codec
from lightbus.worker.worker import serve
from tests.bus import OrderCancelled, OrderPlaced, declare, eventually, left_in, order_numbers, stranger
from tests.conftest import need_postgres
from tests.databases import POSTGRES, Database, checked_out, dispose, lost_connections_reported, opened
from tests.patience import LIMIT, sometimes_within
from tests.postgres import Postgres
from tests.rabbitmq import Node, free_port

pytestmark = pytest.mark.anyio

LONG = 3600.0
"""Seconds: a poll or a backoff that a test would not survive."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def url() -> str:
    return f"memory://{uuid.uuid4().hex}"


@attrs.frozen
class Shop:
    """An app with an outbox, and the queue of another app that receives its events."""

    app: Lightbus
    billing: Lightbus
    database: Database
    engine: Any
    outbox: Outbox

    @property
    def relay(self) -> Relay:
        return self.outbox.relay

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncGenerator[Any]:
        async with self.database.transaction(self.engine) as session:
            yield session

    async def add(self, *numbers: int, **options: Any) -> list[str]:
        async with self.transaction() as session:
            return [self.outbox.add(session, OrderPlaced(number=number), **options) for number in numbers]

    async def published(self) -> list[Delivery]:
        return await left_in(self.billing)

    async def numbers(self) -> list[int]:
        return order_numbers(await self.published())


def make_app(name: str, url: str, **options: Any) -> Lightbus:
    app = Lightbus(name, url=url, **options)
    app.event(OrderPlaced)
    return app


@contextlib.asynccontextmanager
async def open_shop(database: Database, url: str, **options: Any) -> AsyncGenerator[Shop]:
    app, billing = make_app("shop", url), Lightbus("billing", url=url)
    billing.on("order.placed")(lambda: None)
    await declare(app, billing)
    engine = database.engine(**options)
    async with app:
        yield Shop(app, billing, database, engine, Outbox(app, engine))
    await dispose(engine)


@pytest.fixture
async def shop(database: Database, url: str) -> AsyncGenerator[Shop]:
    async with open_shop(database, url) as shop:
        yield shop


@contextlib.asynccontextmanager
async def relaying(*relays: Relay) -> AsyncGenerator[Callable[[], None]]:
    """Relays that run, and are stopped at the end, or by the function."""
    stopping = anyio.Event()
    async with anyio.create_task_group() as tasks:
        for relay in relays:
            tasks.start_soon(relay.run, stopping)
        yield stopping.set
        stopping.set()


@attrs.frozen(kw_only=True)
class Basket:
    number: int


# --- add --------------------------------------------------------------------------------------


async def test_a_commit_publishes(shop: Shop) -> None:
    async with shop.transaction() as session:
        shop.outbox.add(session, OrderPlaced(number=1))
        assert shop.database.is_sqlite or shop.database.waiting() == 0
    assert shop.database.waiting() == 1
    assert await shop.numbers() == []
    assert await shop.relay.drain() == 1
    assert await shop.numbers() == [1]
    assert shop.database.waiting() == 0
    assert await shop.relay.drain() == 0


async def test_a_rollback_publishes_nothing(shop: Shop) -> None:
    with contextlib.suppress(LookupError):
        async with shop.transaction() as session:
            shop.outbox.add(session, OrderPlaced(number=1))
            await _flush(session)
            shop.outbox.add(session, OrderPlaced(number=2))
            raise LookupError("no such customer")
    assert await shop.relay.drain() == 0
    assert shop.database.waiting() == 0


async def test_what_a_savepoint_rolls_back_is_not_published(shop: Shop) -> None:
    async with shop.transaction() as session:
        shop.outbox.add(session, OrderPlaced(number=1))
        await _flush(session)
        if shop.database.is_async:
            savepoint = await session.begin_nested()
            shop.outbox.add(session, OrderPlaced(number=2))
            await session.flush()
            await savepoint.rollback()
        else:
            savepoint = session.begin_nested()
            shop.outbox.add(session, OrderPlaced(number=2))
            session.flush()
            savepoint.rollback()
        shop.outbox.add(session, OrderPlaced(number=3))
    await shop.relay.drain()
    assert await shop.numbers() == [1, 3]


async def _flush(session: Any) -> None:
    flushed = session.flush()
    if flushed is not None:
        await flushed


async def test_the_events_of_one_transaction_are_sent_in_their_order(shop: Shop) -> None:
    async with shop.transaction() as session:
        for number in range(1200):  # more than a batch, and than one INSERT of the session
            shop.outbox.add(session, OrderPlaced(number=number))
            if number == 700:
                await _flush(session)
    assert await shop.relay.drain() == 1200
    assert await shop.numbers() == [*range(1200)]


async def test_whatever_has_the_transaction_takes_events(shop: Shop) -> None:
    engine, outbox = shop.engine, shop.outbox
    if isinstance(engine, AsyncEngine):
        async with shop.transaction() as session:
            outbox.add(session, OrderPlaced(number=1))
            await session.run_sync(outbox.add, OrderPlaced(number=2))
        scoped = async_scoped_session(shop.database.sessions(engine), scopefunc=lambda: 1)
        outbox.add(scoped, OrderPlaced(number=3))
        await scoped.commit()
        await scoped.remove()
        async with engine.begin() as connection:
            await connection.run_sync(outbox.add, OrderPlaced(number=4))
            with pytest.raises(errors.InvalidOption, match=r"await connection\.run_sync\(outbox\.add, event\)"):
                outbox.add(connection, OrderPlaced(number=5))  # type: ignore[arg-type]
    else:
        async with shop.transaction() as session:
            outbox.add(session, OrderPlaced(number=1))
        with engine.begin() as connection:
            outbox.add(connection, OrderPlaced(number=2))
            with Session(connection, join_transaction_mode="create_savepoint") as inner, inner.begin():
                outbox.add(inner, OrderPlaced(number=3))
        scoped_sync = scoped_session(sessionmaker(engine))
        outbox.add(scoped_sync, OrderPlaced(number=4))
        scoped_sync.commit()
        scoped_sync.remove()
    await shop.relay.drain()
    assert await shop.numbers() == [1, 2, 3, 4]


async def test_the_event_has_the_options_of_publish(shop: Shop) -> None:
    seen: list[str] = []

    @shop.app.on_publish
    def tag(event: object, headers: dict[str, Any]) -> None:
        seen.append(repr(event))
        headers["by"] = "hook"

    async with shop.transaction() as session:
        returned = shop.outbox.add(
            session, OrderPlaced(number=1), headers={"tenant": "a"}, id="own-id", correlation_id="chain"
        )
        assert len(seen) == 1
    await shop.relay.drain()
    assert len(seen) == 1
    (delivery,) = await shop.published()
    message = codec.read_message("billing", delivery)
    assert (returned, message.id, message.correlation_id) == ("own-id", "own-id", "chain")
    assert (message.headers["tenant"], message.headers["by"]) == ("a", "hook")


async def test_a_refused_event_adds_nothing(shop: Shop) -> None:
    async with shop.transaction() as session:
        with pytest.raises(errors.UnknownEvent):
            shop.outbox.add(session, "order.plcaed")
        for delay in (-1, "soon", timedelta(days=31)):
            with pytest.raises(errors.InvalidOption, match="delay="):
                shop.outbox.add(session, OrderPlaced(number=1), delay=delay)  # type: ignore[arg-type]
        with pytest.raises(errors.InvalidOption, match="needs the transaction that the event belongs to"):
            shop.outbox.add(shop.engine, OrderPlaced(number=1))
        with pytest.raises(errors.InvalidOption, match="pass the transaction's Session"):
            shop.outbox.add(OrderPlaced(number=1), session)
    assert shop.database.waiting() == 0


async def test_a_large_body_is_sent_whole(shop: Shop) -> None:
    async with shop.transaction() as session:
        shop.outbox.add(session, OrderPlaced(number=1, note="x" * 300_000))
    await shop.relay.drain()
    (delivery,) = await shop.published()
    assert len(delivery.body) > 300_000


async def test_what_is_left_of_a_delay_counts_from_add(shop: Shop) -> None:
    await shop.add(1, delay=timedelta(hours=1))
    await shop.add(2, delay=1000)
    shop.database.execute("UPDATE lightbus_outbox SET added_at = added_at - 600")
    await shop.add(3, delay=5)
    shop.database.execute("UPDATE lightbus_outbox SET added_at = added_at - 60 WHERE delay = 5")
    await shop.add(4, delay=0)
    assert await shop.relay.drain() == 4
    assert sorted(await shop.numbers()) == [3, 4]
    delayed: list[float] = []
    for level in (11, 8):  # 2^11 s of the 3,000 s that are left, and 2^8 s of the 400 s
        delayed += [
            sum(2 ** int(name.rpartition("-")[2]) for name in one.properties["headers"] if "delay" in name)
            for one in await left_in(shop.app, f"shop.delay.{level}")
        ]
    assert delayed == [pytest.approx(3000, abs=DELAY), pytest.approx(400, abs=DELAY)]


DELAY = 60
"""Seconds that a busy machine may take."""


# --- the relay --------------------------------------------------------------------------------


async def test_only_the_rows_of_the_own_app_are_sent(shop: Shop, url: str) -> None:
    other = make_app("market", url)
    outbox = Outbox(other)
    with pytest.raises(errors.InvalidOption, match=r"no engine, so it has no relay. Pass one: Outbox\(app, engine\)"):
        _ = outbox.relay
    async with shop.transaction() as session:
        outbox.add(session, OrderPlaced(number=1))
    await shop.add(2)
    assert await shop.relay.drain() == 1
    assert await shop.numbers() == [2]
    depth = await shop.relay.store.depth()
    assert (depth.waiting, shop.database.waiting()) == (0, 1)


async def test_a_worker_sends_what_its_handlers_add_and_what_is_left_when_it_stops(
    database: Database, url: str
) -> None:
    app, received = make_app("shop", url), list[int]()
    engine = database.engine()
    outbox = Outbox(app, engine)
    stop, started, last = anyio.Event(), anyio.Event(), anyio.Event()

    @app.on("basket.ordered", source="web")
    async def order(event: dict[str, int]) -> None:
        if event["number"] == 2:
            stop.set()
            await anyio.sleep(0.2)  # the last handler still runs while the worker stops
        async with database.transaction(engine) as session:
            outbox.add(session, OrderPlaced(number=event["number"]))

    @app.on(OrderPlaced)
    async def see(event: OrderPlaced) -> None:
        received.append(event.number)
        last.set()

    billing = Lightbus("billing", url=url)
    billing.on("order.placed")(lambda: None)
    await declare(billing)
    web = Lightbus("web", url=url)
    web.event("basket.ordered")(Basket)
    async with anyio.create_task_group() as tasks, web:

        async def work() -> None:
            assert await serve(app, stop=stop, on_started=started.set)

        tasks.start_soon(work)
        with anyio.fail_after(LIMIT):
            await started.wait()
            await web.publish(Basket(number=1))
            await last.wait()
            await web.publish(Basket(number=2))
    assert received[:1] == [1]
    assert order_numbers(await left_in(billing)) == [1, 2]
    assert database.waiting() == 0
    assert checked_out(engine) == 0
    await dispose(engine)


async def test_a_relay_that_is_stopped_while_it_works_does_not_wait(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`stopping` is set after the relay has looked, and before it waits."""
    relay = Relay(shop.app, shop.relay.store, poll=LONG)
    monkeypatch.setattr(relays, "FIRST_BACKOFF", LONG)
    for fails in (False, True):
        stopping = anyio.Event()

        async def measure(stopping: anyio.Event = stopping, fails: bool = fails) -> None:
            stopping.set()
            if fails:
                raise OSError("the database does not answer")

        monkeypatch.setattr(relay, "_measure", measure)
        with anyio.fail_after(LIMIT):
            await relay.run(stopping)


async def test_a_relay_looks_at_each_poll_although_a_sweep_takes_long(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relays, "SHARE", 1e-9)  # after the first sweep, the next one is in years
    monkeypatch.setattr(shop.relay.store, "notifications", _no_notifications)
    async with relaying(shop.relay):
        await eventually(lambda: shop.relay.depth)
        await shop.add(1)
        await eventually(lambda: shop.relay.sent, 1)


async def _no_notifications() -> AsyncGenerator[None]:
    return
    yield


async def test_a_row_that_cannot_be_read_is_set_aside(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    ids = await shop.add(1, 2, 3, 4)
    for id_, properties in zip(ids, (b"\xc1", b"\x80", b"\x90"), strict=False):
        shop.database.execute(
            "UPDATE lightbus_outbox SET properties = :properties WHERE message_id = :id", properties=properties, id=id_
        )
    assert await shop.relay.drain() == 1
    assert await shop.numbers() == [4]
    depth = await shop.relay.store.depth()
    assert (depth.waiting, depth.set_aside) == (0, 3)
    problems = await shop.relay.store.problems(10)
    assert [one.message_id for one in problems] == ids[:3]
    assert all("its properties cannot be read" in one.error and one.set_aside for one in problems)
    assert "is set aside in the outbox" in caplog.text
    assert await shop.relay.store.retry([problems[0].id]) == 1
    assert await shop.relay.drain() == 0
    assert await shop.relay.store.purge([problems[1].id]) == 1
    assert await shop.relay.store.purge(None) == 2
    assert shop.database.waiting() == 0


async def test_two_relays_share_the_rows(shop: Shop) -> None:
    for first in range(0, 2000, 200):
        await shop.add(*range(first, first + 200))
    other_engine = shop.database.engine()
    mine = [Relay(shop.app, EngineStore("shop", engine), batch=37) for engine in (shop.engine, other_engine)]
    publish, publishing, both = shop.app.publisher.publish_many, 0, anyio.Event()

    async def publish_together(*given: Any, **options: Any) -> Any:
        """The first to have a batch waits for the other: else it may send all while the other starts."""
        nonlocal publishing
        publishing += 1
        if publishing == len(mine):
            both.set()
        with anyio.fail_after(LIMIT):
            await both.wait()
        return await publish(*given, **options)

    with mock.patch.object(shop.app.publisher, "publish_many", publish_together):
        async with relaying(*mine):
            await eventually(lambda: sum(one.sent for one in mine), 2000)
    assert sorted(await shop.numbers()) == [*range(2000)]
    assert all(one.sent >= 37 for one in mine)
    assert shop.database.waiting() == 0
    await dispose(other_engine)


async def test_a_late_commit_with_a_lower_id_is_sent(shop: Shop) -> None:
    if shop.database.is_sqlite:
        pytest.skip("SQLite has one transaction that writes at a time")
    async with relaying(Relay(shop.app, shop.relay.store, poll=0.05)):
        async with shop.transaction() as early:
            shop.outbox.add(early, OrderPlaced(number=1))
            await _flush(early)
            await shop.add(2)
            await shop.add(3)
            await eventually(shop.database.waiting, 0)
        await eventually(shop.database.waiting, 0)
    assert sorted(await shop.numbers()) == [1, 2, 3]


async def test_a_cancelled_relay_loses_nothing_and_keeps_nothing(shop: Shop) -> None:
    """Cancelled after 0, 1, 2, ... rounds of the event loop, in each `await`."""
    added = 0
    with lost_connections_reported():
        for rounds in range(60):
            await shop.add(added, added + 1)
            added += 2
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(shop.relay.step)
                for _ in range(rounds):
                    await anyio.lowlevel.checkpoint()
                if rounds % 3 == 2:
                    await anyio.sleep(0.0005 * rounds)  # and where threads and the broker take time
                tasks.cancel_scope.cancel()
            await eventually(lambda: checked_out(shop.engine), 0)
            leased = shop.database.rows("SELECT count(*) FROM lightbus_outbox WHERE due <> 0")
            assert leased == [(0,)], f"after {rounds} rounds"
        await eventually_drained(shop)
    assert {*await shop.numbers()} == {*range(added)}
    assert checked_out(shop.engine) == 0


async def eventually_drained(shop: Shop) -> None:
    """Connections that were cut off hold their rows until the server has noticed."""
    deadline = time.monotonic() + LIMIT
    while shop.database.waiting():
        assert time.monotonic() < deadline
        await shop.relay.drain()


async def test_a_killed_relay_holds_rows_for_the_lease_at_most(shop: Shop) -> None:
    await shop.add(1, 2)
    store = shop.relay.store
    engine = shop.database.engine()
    if not shop.database.is_sqlite:
        claim = EngineStore("shop", engine).claim(10, 0)
        batch = await claim.__aenter__()
        assert len(batch.rows) == 2
        assert await shop.relay.drain() == 0
        shop.database.cut_connections("idle in transaction")
        await eventually_drained(shop)
        with contextlib.suppress(Exception):
            await claim.__aexit__(None, None, None)
    else:
        claim = EngineStore("shop", engine).claim(10, 0)
        assert len((await claim.__aenter__()).rows) == 2
        assert await shop.relay.drain() == 0
        assert (await store.depth()).waiting == 2
        shop.database.execute("UPDATE lightbus_outbox SET due = due - 59.5")  # a minute later
        await eventually_drained(shop)
        await claim.__aexit__(None, None, None)  # it was not killed, only slow: it finds nothing
    assert await shop.numbers() == [1, 2]
    assert shop.database.waiting() == 0
    await dispose(engine)


async def test_a_clock_that_was_set_back_strands_no_row(shop: Shop) -> None:
    await shop.add(1, 2)
    first = "id = (SELECT min(id) FROM lightbus_outbox)"
    shop.database.execute(f"UPDATE lightbus_outbox SET due = :due WHERE {first}", due=time.time() + 86_400)
    shop.database.execute("UPDATE lightbus_outbox SET due = :due WHERE due = 0", due=time.time() + 300)
    assert await shop.relay.drain() == 1
    assert await shop.numbers() == [1]
    assert shop.database.waiting() == 1


async def test_a_missing_table_is_named_with_the_next_step(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    metadata.drop_all(shop.database.admin)
    async with relaying(shop.relay):
        await eventually(lambda: shop.relay.trouble)
        assert "lightbus outbox sql" in str(shop.relay.trouble)
        assert "lightbus_outbox" in str(shop.relay.trouble)
        assert "\n" not in str(shop.relay.trouble)
        assert shop.relay.health()["error"] == shop.relay.trouble
        metadata.create_all(shop.database.admin)
        await shop.add(1)
        await eventually(lambda: shop.relay.sent, 1)
        await eventually(lambda: shop.relay.trouble, None)
    assert await shop.numbers() == [1]
    assert caplog.text.count("is not sent") == 1
    assert "is sent again" in caplog.text


async def test_a_pool_of_one_connection_is_enough_for_the_relay(database: Database, url: str) -> None:
    async with open_shop(database, url, pool_size=1, max_overflow=0, pool_timeout=LIMIT) as shop:
        async with relaying(shop.relay):
            for number in range(20):
                await shop.add(number)
            await eventually(lambda: shop.relay.sent, 20)
            assert shop.relay.trouble is None
        assert checked_out(shop.engine) == 0


async def test_a_pool_without_a_free_connection_passes(database: Database, url: str) -> None:
    async with open_shop(database, url, pool_size=1, max_overflow=0, pool_timeout=0.1) as shop:
        await shop.add(1)
        held = shop.engine.connect()
        if database.is_async:
            held = await held
        async with relaying(shop.relay):
            await eventually(lambda: shop.relay.trouble)
            assert "QueuePool limit" in str(shop.relay.trouble)
            closed = held.close()
            if closed is not None:
                await closed
            await eventually(lambda: shop.relay.sent, 1)


async def test_in_a_testbus_drain_sends_what_was_added(database: Database) -> None:
    app = make_app("shop", "memory://")
    received: list[int] = []
    app.on(OrderPlaced)(lambda event: received.append(event["number"]))
    engine = database.engine()
    outbox = Outbox(app, engine)
    async with TestBus(app) as bus:
        for number in range(20):
            async with database.transaction(engine) as session:
                outbox.add(session, OrderPlaced(number=number))
            await outbox.relay.drain()  # the relay of the bus's worker may have it: then it waits for that
            assert database.waiting() == 0
            await bus.drain()
            assert received == [*range(number + 1)]
    await dispose(engine)


# --- a broker that refuses, or does not answer ---------------------------------------------------


@pytest.fixture
def file_database(tmp_path: Path) -> Iterator[Database]:
    with opened("pysqlite", f"sqlite:///{tmp_path}/data.db") as database:
        yield database


async def test_an_outcome_says_how_long_the_event_waited(file_database: Database, url: str) -> None:
    app, outcomes = make_app("shop", url), list[Outcome]()
    app.observe(outcomes.append)
    engine = file_database.engine()
    outbox = Outbox(app, engine)
    async with app:
        with Session(engine) as session, session.begin():
            ids = [outbox.add(session, OrderPlaced(number=number), delay=7200 * number) for number in (0, 1)]
        file_database.execute("UPDATE lightbus_outbox SET added_at = added_at - 600")
        await outbox.relay.drain()
        ids.append((await app.publish(OrderPlaced(number=2))).id)
    engine.dispose()
    waited = {one.message.id: one.waited for one in outcomes}
    ten_minutes = pytest.approx(600 + DELAY / 2, abs=DELAY / 2)
    assert waited == {ids[0]: ten_minutes, ids[1]: ten_minutes, ids[2]: None}


@pytest.mark.rabbitmq
async def test_an_event_that_the_broker_refuses_is_set_aside(
    file_database: Database, rabbitmq_node: Callable[..., Node], caplog: pytest.LogCaptureFixture
) -> None:
    node = rabbitmq_node("max_message_size = 100000\n")
    async with open_shop(file_database, node.url) as shop:
        async with shop.transaction() as session:
            for number in range(5):
                shop.outbox.add(session, OrderPlaced(number=number, note="x" * (200_000 if number == 2 else 1)))
        async with relaying(shop.relay):
            await eventually(lambda: shop.relay.sent, 4)
            await eventually(lambda: shop.relay.depth and shop.relay.depth.set_aside, 1)
        assert {*await shop.numbers()} == {0, 1, 3, 4}  # those in flight are published again
        (problem,) = await shop.relay.store.problems(10)
        assert (problem.set_aside, problem.attempts, problem.event) == (True, 1, "order.placed")
        assert "larger than" in problem.error
        assert caplog.text.count("is set aside in the outbox") == 1
        health = shop.relay.health()
        assert (health["waiting"], health["set_aside"], health["error"]) == (0, 1, None)


async def test_a_full_queue_does_not_block_other_events(
    file_database: Database, url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relays, "LAST_RETRY", 0.05)
    monkeypatch.setattr(relays, "REPEAT", LONG)
    async with open_shop(file_database, url) as shop, stranger(shop.app) as channel:
        shop.app.event(OrderCancelled)

        def bind_a_small_queue() -> None:
            arguments = {"x-max-length": 1, "x-overflow": "reject-publish"}
            channel.queue_declare("small", durable=True, auto_delete=False, arguments=arguments)
            channel.queue_bind("small", "shop", "order.cancelled")

        await anyio.to_thread.run_sync(bind_a_small_queue)
        relay = Relay(shop.app, shop.relay.store, batch=4, poll=0.05)
        async with shop.transaction() as session:
            ids = [shop.outbox.add(session, OrderCancelled(number=number)) for number in range(8)]
        async with relaying(relay):
            await eventually(lambda: len(file_database.rows("SELECT id FROM lightbus_outbox WHERE attempts > 2")), 7)
            await shop.add(*range(20))
            await eventually(lambda: relay.sent, 21)  # with the one that the small queue took
            assert relay.trouble is None
            problems = await relay.store.problems(10)
            assert [one.message_id for one in problems] == ids[1:]
            assert not any(one.set_aside for one in problems)
            assert await shop.numbers() == [*range(20)]
            taken = [0]
            while len(taken) < 8:
                taken = sorted({*taken, *order_numbers(await left_in(shop.app, "small"))})
                await anyio.sleep(0.005)
            await eventually(file_database.waiting, 0)
        assert taken == [*range(8)]
        assert caplog.text.count("does not take event") == 1


async def test_an_unreachable_broker_is_logged_once_and_the_events_arrive_once_it_is_there(
    file_database: Database, rabbitmq_url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relays, "FIRST_BACKOFF", 0.05)
    monkeypatch.setattr(relays, "LAST_BACKOFF", 0.1)
    monkeypatch.setattr(relays, "MEASURE", 0.01)
    monkeypatch.setattr(relays, "REPEAT", LONG)
    port, virtual_host = free_port(), rabbitmq_url.rpartition("/")[2]
    billing = Lightbus("billing", url=rabbitmq_url)
    billing.on("order.placed")(lambda: None)
    await declare(make_app("shop", rabbitmq_url), billing)
    app = make_app("shop", f"amqp://guest:guest@127.0.0.1:{port}/{virtual_host}", publish_timeout=0.2)
    engine = file_database.engine()
    outbox = Outbox(app, engine)
    relay = outbox.relay
    tries = 0
    step = relay.step

    async def count(**options: Any) -> bool:
        nonlocal tries
        tries += 1
        return await step(**options)

    monkeypatch.setattr(relay, "step", count)
    async with file_database.transaction(engine) as session:
        outbox.add(session, OrderPlaced(number=1))
    target = int(rabbitmq_url.rpartition("@")[2].partition("/")[0].rpartition(":")[2])
    async with relaying(relay), anyio.create_task_group() as tasks:
        await eventually(lambda: tries > 4)
        assert file_database.rows("SELECT state, attempts, error FROM lightbus_outbox") == [(0, 0, None)]
        await eventually(lambda: (relay.health()["oldest_seconds"] or 0) > 0.3)  # for the alert
        assert relay.health()["waiting"] == 1
        assert "was not sent" in str(relay.health()["error"])
        assert caplog.text.count("The outbox in") == 1
        forwarder = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=port)
        tasks.start_soon(forwarder.serve, lambda client: forward(client, target))
        await eventually(lambda: relay.sent, 1)
        await eventually(lambda: relay.trouble, None)
        await anyio.to_thread.run_sync(app.publisher.close)
        tasks.cancel_scope.cancel()
    await forwarder.aclose()
    assert {*order_numbers(await left_in(billing))} == {1}
    assert file_database.waiting() == 0
    await dispose(engine)


async def forward(client: anyio.abc.SocketStream, port: int) -> None:
    async with client, await anyio.connect_tcp("127.0.0.1", port) as server, anyio.create_task_group() as tasks:

        async def copy(source: anyio.abc.SocketStream, target: anyio.abc.SocketStream) -> None:
            with contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
                async for data in source:
                    await target.send(data)
            tasks.cancel_scope.cancel()

        tasks.start_soon(copy, client, server)
        tasks.start_soon(copy, server, client)


async def test_a_copy_that_is_sent_again_has_the_same_id(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The relay has sent them, and could not note that."""
    ids = await shop.add(1, 2, 3)

    def fails(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(statements, "settle", fails)
        with pytest.raises(OSError, match="no space left"):
            await shop.relay.step()
    await shop.relay.drain()
    sent = [codec.read_message("billing", one).id for one in await shop.published()]
    assert sorted(sent) == sorted(ids * 2)


# --- a database that does not answer -------------------------------------------------------------


@pytest.mark.postgres
@pytest.mark.parametrize("driver", POSTGRES)
async def test_a_database_that_was_down_is_used_again(
    driver: str, url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_postgres()
    monkeypatch.setattr(relays, "LAST_BACKOFF", 0.5)
    with Postgres() as cluster, opened(driver, cluster.url(cluster.create_database())) as database:
        async with open_shop(database, url) as shop, relaying(shop.relay):
            for number, stop in enumerate((cluster.kill, cluster.stop)):
                await shop.add(number)
                await eventually(lambda number=number: shop.relay.sent, number + 1)
                await anyio.to_thread.run_sync(stop)
                await eventually(lambda: shop.relay.trouble)
                assert "\n" not in str(shop.relay.trouble)
                await anyio.to_thread.run_sync(cluster.start)
                await eventually(lambda: shop.relay.trouble, None)
                database.admin.dispose()
                await dispose(shop.engine)
            await shop.add(2)
            await eventually(lambda: shop.relay.sent, 3)
            assert {*await shop.numbers()} == {0, 1, 2}
    assert "is not sent" in caplog.text


async def test_a_relay_whose_connections_are_cut_goes_on(
    database: Database, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if database.is_sqlite:
        pytest.skip("SQLite has no connections that could be cut")
    monkeypatch.setattr(relays, "FIRST_BACKOFF", 0.05)
    other = database.engine(pool_pre_ping=True)
    async with open_shop(database, url) as shop, relaying(shop.relay):
        for number in range(20):
            async with database.transaction(other) as session:
                shop.outbox.add(session, OrderPlaced(number=number))
            database.cut_connections()
        await eventually(database.waiting, 0)
        await eventually(lambda: shop.relay.trouble, None)
        assert {*await shop.numbers()} == {*range(20)}
    await dispose(other)


def test_errors_that_may_pass(tmp_path: Path) -> None:
    engine = create_async_engine("postgresql+asyncpg://127.0.0.1/shop")
    store = EngineStore("shop", engine)
    for error in (
        asyncpg.exceptions.CannotConnectNowError("the database system is starting up"),
        asyncpg.exceptions.TooManyConnectionsError("sorry, too many clients already"),
        asyncpg.exceptions.ConnectionDoesNotExistError("connection was closed"),
        asyncpg.exceptions.InterfaceError("the underlying connection is closed"),
        sa.exc.ResourceClosedError("This Connection is closed"),
        sa.exc.PendingRollbackError("Can't reconnect until invalid transaction is rolled back"),
        sa.exc.InterfaceError("SELECT 1", (), OSError("closed")),
        sa.exc.TimeoutError("QueuePool limit of size 1 overflow 0 reached"),
        ConnectionRefusedError(111, "Connection refused"),
        TimeoutError(),
    ):
        assert store.is_temporary(error), error
    for mistake in (TypeError("unexpected"), AttributeError("none"), KeyError("id")):
        assert not store.is_temporary(mistake)


# --- NOTIFY --------------------------------------------------------------------------------------


def listening(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows with each connection that listens."""
    began: list[None] = []
    notifications = relay.store.notifications

    async def counted() -> AsyncGenerator[None]:
        async with contextlib.aclosing(notifications()) as found:
            began.append(await anext(found))
            yield
            async for _ in found:
                yield

    monkeypatch.setattr(relay.store, "notifications", counted)
    return began


async def test_a_commit_wakes_the_relay(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    if not shop.database.is_postgres:
        pytest.skip("only PostgreSQL notifies")
    relay = Relay(shop.app, shop.relay.store, poll=LONG)
    began = listening(relay, monkeypatch)
    async with relaying(relay):
        await eventually(lambda: began and relay.depth)
        for number in range(20):
            await shop.add(number)
            await eventually(lambda number=number: relay.sent, number + 1)
        await eventually(lambda: checked_out(shop.engine), 0)  # the connection that listens is none of the pool's
    connections = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    await dispose(shop.engine)
    await eventually(lambda: shop.database.rows(f"SELECT count(*) {connections}"), [(0,)])
    assert await shop.numbers() == [*range(20)]


async def test_a_relay_listens_again_when_its_connection_was_cut(
    database: Database, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not database.is_postgres:
        pytest.skip("only PostgreSQL notifies")
    monkeypatch.setattr(relays, "FIRST_BACKOFF", 0.05)
    async with open_shop(database, url, pool_pre_ping=True) as shop:
        relay = Relay(shop.app, shop.relay.store, poll=LONG)
        began = listening(relay, monkeypatch)
        async with relaying(relay):
            for number in range(4):
                await eventually(lambda number=number: len(began), number + 1)
                await shop.add(number)
                await eventually(lambda number=number: relay.sent, number + 1)
                shop.database.cut_connections()
        assert await shop.numbers() == [*range(4)]


async def test_notifications_that_were_read_are_not_kept(shop: Shop) -> None:
    """psycopg keeps them for its own `notifies()`, unless they have a handler."""
    if not shop.database.driver.startswith("psycopg"):
        pytest.skip("only psycopg does")
    async with contextlib.aclosing(shop.relay.store.notifications()) as notifications:
        await anext(notifications)
        gc.collect()
        (connection,) = [
            one
            for one in gc.get_objects()
            if issubclass(type(one), psycopg.Connection | psycopg.AsyncConnection)  # not what others' proxies claim
            and not one.closed
            and one.info.dbname == shop.database.url.database
            and one._notify_handlers
        ]
        for number in range(3):
            await shop.add(number)
            await anext(notifications)
        assert not connection._notifies_backlog


# --- event loops ---------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", ["pysqlite", pytest.param("psycopg", marks=pytest.mark.postgres)])
def test_one_outbox_serves_several_event_loops(
    driver: str, url: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Trio too: a sync Engine runs in threads."""
    address = request.getfixturevalue("postgres_url") if driver in POSTGRES else f"sqlite:///{tmp_path}/data.db"
    app = make_app("shop", url)
    billing = Lightbus("billing", url=url)
    billing.on("order.placed")(lambda: None)
    with opened(driver, address) as database:
        engine = database.engine()
        outbox = Outbox(app, engine)
        relay = outbox.relay

        async def main(number: int) -> list[int]:
            await declare(app, billing)
            async with relaying(relay):
                await eventually(lambda: relay.sent, number)
                with database.sessions(engine).begin() as session:
                    outbox.add(session, OrderPlaced(number=number))
                await eventually(lambda: relay.sent, number + 1)
            async with app:
                with database.sessions(engine).begin() as session:
                    outbox.add(session, OrderPlaced(number=number))
                async with anyio.create_task_group() as tasks:
                    for _ in range(5):  # they wait for each other
                        tasks.start_soon(relay.drain)
                relay.sent -= 1
            return order_numbers(await left_in(billing))

        for number, backend in enumerate(("trio", "asyncio", "asyncio", "trio")):
            assert anyio.run(main, number, backend=backend) == [number, number]
        engine.dispose()


# --- declarations --------------------------------------------------------------------------------


def test_what_is_no_engine_is_refused(tmp_path: Path, url: str) -> None:
    app = make_app("shop", url)
    with pytest.raises(errors.InvalidOption, match="is not an Engine or AsyncEngine"):
        Outbox(app, "sqlite:///data.db")  # type: ignore[arg-type]
    with pytest.raises(errors.InvalidOption, match="pass the app, as in Outbox"):
        Outbox("shop")  # type: ignore[arg-type]
    for memory in (
        sa.create_engine("sqlite://"),
        sa.create_engine("sqlite://", poolclass=StaticPool),
        create_async_engine("sqlite+aiosqlite://"),
    ):
        with pytest.raises(errors.InvalidOption, match="Use a file"):
            Outbox(app, memory)
    oracle = sa.create_engine("oracle://", module=mock.MagicMock(paramstyle="named", version="8.3"))
    with pytest.raises(errors.InvalidOption, match=r"the relay does not know the database 'oracle'. It knows postgres"):
        Outbox(app, oracle)
    assert app.services == []


def test_each_service_has_its_own_name(tmp_path: Path, url: str) -> None:
    app = make_app("shop", url)
    for name in ("first", "second", "third"):
        Outbox(app, sa.create_engine(f"sqlite:///{tmp_path}/{name}.db"))
    assert [one.name for one in app.services] == ["outbox", "outbox-2", "outbox-3"]


def test_add_takes_less_than_60_microseconds(url: str) -> None:
    """Process time, on a session that does not flush: twice what was measured, for slower machines."""
    app = make_app("shop", url)
    outbox, event = Outbox(app), OrderPlaced(number=1)

    def attempt() -> float:
        session = Session()
        began = time.process_time()
        for _ in range(1000):
            outbox.add(session, event)
        return (time.process_time() - began) * 1000

    sometimes_within(60, attempt)
