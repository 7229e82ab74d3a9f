"""`lightbus.django`: outbox and inbox, on SQLite and PostgreSQL."""

from __future__ import annotations

import contextlib
import functools
import json
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import anyio
import attrs
import pymysql
import pytest
import sqlalchemy as sa
from anyio.from_thread import start_blocking_portal
from django.apps import apps
from django.conf import settings
from django.core.management import call_command
from django.db import OperationalError, connection, connections, transaction
from django.db.backends.signals import connection_created

from lightbus import Lightbus, Message, Outcome, Retry, errors
from lightbus.django import Inbox, Outbox
from lightbus.django import inbox as inbox_module
from lightbus.django.outbox import DjangoRelay
from lightbus.django.store import DjangoStore
from lightbus.outbox import sweep, tables
from lightbus.outbox.store import Refused
from lightbus.worker import worker
from tests.bus import InBackground, OrderPlaced
from tests.conftest import need_postgres
from tests.mariadb import MariaDB
from tests.patience import LIMIT, wait_until
from tests.postgres import Postgres

SOON = Retry(delays=(0.05,) * 5)


# --- databases --------------------------------------------------------------------------------


def use_database(engine: str, **entry: Any) -> None:
    """The database `default`, from now on, in all threads that have no connection yet."""
    if not settings.configured:
        settings.configure(INSTALLED_APPS=["lightbus.django"], USE_TZ=True, DATABASES={})
        import django

        django.setup()
    found = connections.configure_settings({"default": {"ENGINE": f"django.db.backends.{engine}", **entry}})
    connections.settings.clear()
    connections.settings.update(found)
    leave_database()


def leave_database() -> None:
    with contextlib.suppress(AttributeError):
        connections["default"].close()
        del connections["default"]


def on_postgres(cluster: Postgres, name: str, **entry: Any) -> None:
    use_database("postgresql", HOST="127.0.0.1", PORT=str(cluster.port), USER="postgres", NAME=name, **entry)


def migrate(*arguments: str) -> None:
    call_command("migrate", *arguments, verbosity=0)


def create_tables() -> None:
    migrate()
    rows("CREATE TABLE invoice (number integer)")


@pytest.fixture
def postgres_database(postgres: Postgres) -> Iterator[None]:
    name = postgres.create_database()
    on_postgres(postgres, name)
    create_tables()
    yield
    leave_database()
    postgres.drop_database(name)


@pytest.fixture
def sqlite_database(tmp_path: Path) -> Iterator[None]:
    options = {"timeout": 30, "transaction_mode": "IMMEDIATE", "init_command": "PRAGMA journal_mode=WAL"}
    use_database("sqlite3", NAME=str(tmp_path / "shop.sqlite3"), OPTIONS=options)
    create_tables()
    yield
    leave_database()


@pytest.fixture
def mariadb_database(mariadb: MariaDB) -> Iterator[None]:
    pymysql.install_as_MySQLdb()  # Django's own driver, mysqlclient, would need a C compiler
    name = mariadb.create_database()
    use_database("mysql", HOST="127.0.0.1", PORT=str(mariadb.port), USER="root", NAME=name)
    create_tables()
    yield
    leave_database()
    mariadb.drop_database(name)


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest) -> None:
    """The database `default`, migrated and empty. The test runs once for each kind."""
    request.getfixturevalue(f"{request.param}_database")


on_mariadb_too = pytest.mark.parametrize(
    "database", ["sqlite", "postgres", pytest.param("mariadb", marks=pytest.mark.mariadb)], indirect=True
)


def rows(query: str, *values: Any) -> list[Any]:
    with connection.cursor() as cursor:
        cursor.execute(query, values)
        return [*cursor.fetchall()] if cursor.description else []


def numbers() -> list[int]:
    return [number for (number,) in rows("SELECT number FROM invoice ORDER BY number")]


# --- apps -------------------------------------------------------------------------------------


@pytest.fixture
def url() -> str:
    return f"memory://{uuid.uuid4().hex}"


@pytest.fixture
def shop(url: str) -> Lightbus:
    app = Lightbus("shop", url=url, retry=SOON)
    app.event(OrderPlaced)
    return app


class Audit:
    """An app that takes all events of the shop. Its queue exists from the start."""

    def __init__(self, url: str) -> None:
        self.messages: list[Message] = []
        self.numbers: list[int] = []
        self.app = Lightbus("audit", url=url)

        @self.app.on("order.placed")
        def note(order: OrderPlaced, message: Message) -> None:
            self.messages.append(message)
            self.numbers.append(order.number)

    def wait_for(self, wanted: list[int]) -> None:
        wait_until(lambda: sorted(self.numbers) == wanted, f"the events {wanted}, not {self.numbers}")


@pytest.fixture
def audit(url: str) -> Iterator[Audit]:
    audit = Audit(url)
    with InBackground(audit.app):
        yield audit


@contextlib.contextmanager
def working(app: Lightbus, **options: Any) -> Iterator[None]:
    """A worker of the app, in another thread."""
    ready = threading.Event()
    with start_blocking_portal() as portal:
        stop = portal.call(anyio.Event)
        serve = functools.partial(worker.serve, app, stop=stop, on_started=ready.set, grace=5.0, **options)
        ended = portal.start_task_soon(serve)
        wait_until(lambda: ready.is_set() or ended.done(), "the worker is ready")
        try:
            yield
        finally:
            portal.call(stop.set)
            assert ended.result(LIMIT)


def drain(outbox: Outbox) -> int:
    with start_blocking_portal() as portal:
        return portal.call(outbox.relay.drain)


# --- the outbox -------------------------------------------------------------------------------


@on_mariadb_too
def test_an_event_is_published_if_its_transaction_commits(database: None, shop: Lightbus, audit: Audit) -> None:
    outbox = Outbox(shop)
    with transaction.atomic():
        outbox.add(OrderPlaced(number=1))
        with contextlib.suppress(KeyError), transaction.atomic():  # a savepoint
            outbox.add(OrderPlaced(number=2))
            raise KeyError
        with transaction.atomic():
            outbox.add(OrderPlaced(number=3))
    with contextlib.suppress(KeyError), transaction.atomic():
        outbox.add(OrderPlaced(number=4))
        raise KeyError
    outbox.add(OrderPlaced(number=5))  # outside of a transaction
    with working(shop):
        audit.wait_for([1, 3, 5])
    assert rows("SELECT event FROM lightbus_outbox") == []
    assert outbox.relay.health()["sent"] == 3
    assert sorted(audit.numbers) == [1, 3, 5]


def test_the_event_is_what_publish_would_send(database: None, shop: Lightbus, audit: Audit) -> None:
    outbox, at = Outbox(shop), datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    sent = outbox.add(OrderPlaced(number=1), headers={"tenant": "acme"}, id="m-1", correlation_id="c-1", time=at)
    later = outbox.add(OrderPlaced(number=2), delay=timedelta(seconds=1))
    assert sent == "m-1"
    assert drain(outbox) == 2
    audit.wait_for([1, 2])
    first, second = sorted(audit.messages, key=lambda message: message.id != sent)
    assert (first.id, first.correlation_id, first.time, first.headers["tenant"]) == ("m-1", "c-1", at, "acme")
    assert (first.source, second.id) == ("shop", later)


def test_what_publish_refuses_is_not_added(database: None, shop: Lightbus) -> None:
    outbox = Outbox(shop)
    with transaction.atomic():
        with pytest.raises(errors.UnknownEvent):
            outbox.add({"number": 1})
        outbox.add(OrderPlaced(number=2))
    assert rows("SELECT count(*) FROM lightbus_outbox") == [(1,)]


def test_a_failed_insert_rolls_the_transaction_back_even_if_its_error_is_caught(database: None, shop: Lightbus) -> None:
    outbox = Outbox(shop)
    rows("ALTER TABLE lightbus_outbox RENAME TO gone")
    with transaction.atomic():
        rows("INSERT INTO invoice VALUES (1)")
        with pytest.raises(Exception, match="lightbus_outbox"):
            outbox.add(OrderPlaced(number=1))
    assert numbers() == []


def test_in_an_event_loop_add_refuses_to_block(sqlite_database: None, shop: Lightbus) -> None:
    outbox = Outbox(shop)

    async def add() -> None:
        outbox.add(OrderPlaced(number=1))

    with pytest.raises(Exception, match="sync_to_async"):
        anyio.run(add)


@on_mariadb_too
def test_a_relay_does_not_take_what_another_one_has(database: None, shop: Lightbus) -> None:
    outbox = Outbox(shop)
    for number in range(5):
        outbox.add(OrderPlaced(number=number))

    async def both() -> None:
        one, other = DjangoStore("shop", "default"), DjangoStore("shop", "default")
        async with one.claim(3, 0) as first:
            assert len(first.rows) == 3
            async with other.claim(10, 0) as second:
                assert len(second.rows) == 2
                assert {row.id for row in first.rows}.isdisjoint(row.id for row in second.rows)
                await second.settle([row.id for row in second.rows], {})
        async with other.claim(10, 0) as third:  # the first one has not settled its rows
            assert third.rows == first.rows
            await third.settle([third.rows[0].id], {})
        async with one.claim(10, 0) as fourth:  # rows that a batch leaves out are released
            assert fourth.rows == third.rows[1:]
        async with DjangoStore("another", "default").claim(10, 0) as fifth:
            assert fifth.rows == []

    anyio.run(both)


def test_a_batch_may_be_open_when_drain_ends(postgres_database: None, shop: Lightbus) -> None:
    """A relay that runs and its `drain` use the same store at the same time."""
    outbox = Outbox(shop)
    outbox.add(OrderPlaced(number=1))

    async def settle_late() -> None:
        store = DjangoStore("shop", "default")
        async with store.connected():  # the relay that runs
            async with contextlib.AsyncExitStack() as ending:
                async with store.connected():  # drain
                    batch = await ending.enter_async_context(store.claim(10, 0))
                    assert (await store.depth()).waiting == 1
                await batch.settle([row.id for row in batch.rows], {})
            assert (await store.depth()).waiting == 0

    anyio.run(settle_late)
    wait_until(lambda: not rows(OTHERS), "all connections are closed")


@on_mariadb_too
def test_two_workers_send_each_event_once(database: None, shop: Lightbus, audit: Audit, url: str) -> None:
    outbox = Outbox(shop)
    second = Lightbus("shop", url=url)
    other = Outbox(second)
    wanted = [*range(1200)]
    with working(shop), working(second):
        for start in range(0, 1200, 100):
            with transaction.atomic():
                for number in range(start, start + 100):
                    outbox.add(OrderPlaced(number=number))
        audit.wait_for(wanted)
    assert outbox.relay.sent + other.relay.sent == 1200
    assert rows("SELECT count(*) FROM lightbus_outbox") == [(0,)]


def test_a_commit_wakes_the_relay_on_postgresql(postgres_database: None, shop: Lightbus, audit: Audit) -> None:
    relay = DjangoRelay(shop, DjangoStore("shop", "default"), poll=10 * LIMIT)
    outbox = Outbox(shop)
    shop.services[:] = [relay]
    with working(shop):
        wait_until(lambda: rows(LISTENING), "the relay listens")
        for number in range(3):
            outbox.add(OrderPlaced(number=number))
            audit.wait_for([*range(number + 1)])
    wait_until(lambda: not rows(OTHERS), "all connections are closed")


LISTENING = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN%%'"
OTHERS = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"


@on_mariadb_too
def test_rows_that_were_refused_are_listed_retried_and_purged(database: None, shop: Lightbus) -> None:
    outbox = Outbox(shop)
    store = DjangoStore("shop", "default")
    for number in range(3):
        outbox.add(OrderPlaced(number=number))

    async def refuse() -> None:
        async with store.claim(10, 0) as batch:
            one, two, three = (row.id for row in batch.rows)
            later = time.time() + 300
            await batch.settle(
                [], {one: Refused("too large", None), two: Refused("full", later), three: Refused("no", None)}
            )
        depth = await store.depth()
        assert (depth.waiting, depth.set_aside) == (1, 2)
        assert 0 <= depth.oldest_seconds < LIMIT
        found = await store.problems(10)
        assert [(one.error, one.set_aside, one.attempts, one.event) for one in found] == [
            ("too large", True, 1, "order.placed"),
            ("full", False, 1, "order.placed"),
            ("no", True, 1, "order.placed"),
        ]
        assert [one.retry_at for one in found] == [None, later, None]
        assert json.loads(found[0].body) == {"number": 0, "note": ""}
        async with store.claim(10, 0) as batch:
            assert batch.rows == []  # one is due later
        assert await store.retry([one]) == 1
        assert await store.purge(None) == 1
        async with store.claim(10, 0) as batch:
            assert [(row.id, row.attempts) for row in batch.rows] == [(one, 0)]
        assert (await store.depth()).set_aside == 0

    anyio.run(refuse)


def test_a_retry_that_is_due_comes_first(database: None, shop: Lightbus) -> None:
    outbox = Outbox(shop)
    for number in range(2):
        outbox.add(OrderPlaced(number=number))
    [(last,)] = rows("SELECT max(id) FROM lightbus_outbox")
    rows("UPDATE lightbus_outbox SET attempts = 1, due = 1 WHERE id = %s", last)

    async def claim() -> list[int]:
        async with DjangoStore("shop", "default").claim(1, 0) as batch:
            return [row.id for row in batch.rows]

    assert anyio.run(claim) == [last]


def test_without_its_table_the_relay_names_the_command(database: None, shop: Lightbus) -> None:
    outbox = Outbox(shop)
    migrate("lightbus", "zero")
    with working(shop):
        wait_until(lambda: outbox.relay.trouble, "the relay has noticed")
        assert "manage.py migrate lightbus --database default" in str(outbox.relay.trouble)
        migrate()
        wait_until(lambda: outbox.relay.trouble is None, "the relay goes on")


# --- the inbox --------------------------------------------------------------------------------


class Billing:
    """An app that writes an invoice for each order."""

    def __init__(self, url: str, before: Callable[[int, int], None] = lambda number, attempt: None) -> None:
        self.outcomes: list[Outcome] = []
        self.app = Lightbus("billing", url=url, retry=SOON)
        self.inbox = Inbox(self.app)
        self.app.observe(self.outcomes.append)

        @self.app.on("order.placed", inbox=self.inbox)
        def bill(order: OrderPlaced, message: Message) -> None:
            rows("INSERT INTO invoice VALUES (%s)", order.number)
            before(order.number, message.attempt)

    def kinds(self) -> list[str]:
        return [one.kind for one in self.outcomes]

    def wait_for(self, *kinds: str) -> None:
        wait_until(lambda: sorted(self.kinds()) == sorted(kinds), f"{kinds}, not {self.kinds()}")


@on_mariadb_too
def test_a_duplicate_is_handled_once(database: None, shop: Lightbus, url: str) -> None:
    billing = Billing(url)
    with shop, working(billing.app):
        shop.publish_sync(OrderPlaced(number=1), id="m-1")
        billing.wait_for("handled")
        shop.publish_sync(OrderPlaced(number=1), id="m-1")
        billing.wait_for("handled", "skipped")
        shop.publish_sync(OrderPlaced(number=2), id="m-2")
        billing.wait_for("handled", "skipped", "handled")
    assert numbers() == [1, 2]
    assert rows("SELECT handler, message_id FROM lightbus_inbox ORDER BY message_id") == [
        ("billing.bill", "m-1"),
        ("billing.bill", "m-2"),
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_a_duplicate_at_the_same_time_waits(postgres_database: None, shop: Lightbus, url: str, fails: bool) -> None:
    release, entered = threading.Event(), threading.Event()

    def before(number: int, attempt: int) -> None:
        if not entered.is_set():
            entered.set()
            assert release.wait(LIMIT)
            if fails:
                raise ValueError

    billing = Billing(url, before)
    with shop, working(billing.app):
        shop.publish_sync(OrderPlaced(number=1), id="m-1")
        assert entered.wait(LIMIT)
        shop.publish_sync(OrderPlaced(number=1), id="m-1")
        waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        wait_until(lambda: rows(waiting), "the duplicate waits")
        release.set()
        billing.wait_for(*(["retried", "handled", "skipped"] if fails else ["handled", "skipped"]))
    assert numbers() == [1]


def test_nothing_stays_of_a_handler_that_fails_and_its_retry_is_no_duplicate(
    database: None, shop: Lightbus, url: str
) -> None:
    def before(number: int, attempt: int) -> None:
        if attempt == 1:
            raise ValueError

    billing = Billing(url, before)
    with shop, working(billing.app):
        shop.publish_sync(OrderPlaced(number=1))
        billing.wait_for("retried", "handled")
    assert numbers() == [1]


@on_mariadb_too
def test_events_that_a_handler_adds_commit_with_it(database: None, shop: Lightbus, audit: Audit, url: str) -> None:
    accepting = Lightbus("accepting", url=url, retry=SOON)
    outbox, inbox = Outbox(shop), Inbox(shop)

    @shop.on("order.received", inbox=inbox)
    def accept(order: dict[str, int], message: Message) -> None:
        outbox.add(OrderPlaced(number=order["number"] + message.attempt))
        if message.attempt == 1:
            raise ValueError

    @accepting.event
    @attrs.frozen
    class OrderReceived:
        number: int

    with accepting, working(shop):
        accepting.publish_sync(OrderReceived(10))
        audit.wait_for([12])


def test_a_deadlock_is_retried(postgres_database: None, shop: Lightbus, url: str) -> None:
    rows("CREATE TABLE stock (id integer PRIMARY KEY, taken integer)")
    rows("INSERT INTO stock VALUES (1, 0), (2, 0)")
    both = threading.Barrier(2)

    def before(number: int, attempt: int) -> None:
        for position, item in enumerate((number, 3 - number)):
            if position and attempt == 1:
                both.wait(LIMIT)
            rows("UPDATE stock SET taken = taken + 1 WHERE id = %s", item)

    billing = Billing(url, before)
    with shop, working(billing.app):
        shop.publish_sync(OrderPlaced(number=1))
        shop.publish_sync(OrderPlaced(number=2))
        billing.wait_for("handled", "retried", "handled")
    assert numbers() == [1, 2]
    assert rows("SELECT taken FROM stock") == [(2,), (2,)]
    [retried] = [one for one in billing.outcomes if one.kind == "retried"]
    assert isinstance(retried.error, OperationalError)
    assert "deadlock" in str(retried.error)


@pytest.mark.parametrize("max_age", [0, None], ids=["closed after each event", "kept open"])
def test_a_restart_of_the_database_costs_no_attempt(
    shop: Lightbus, audit: Audit, url: str, max_age: int | None
) -> None:
    need_postgres()
    with Postgres() as cluster:
        on_postgres(cluster, cluster.create_database(), CONN_MAX_AGE=max_age)
        create_tables()
        outbox, billing = Outbox(shop), Billing(url)
        with working(shop), working(billing.app, concurrency=1):
            outbox.add(OrderPlaced(number=1))
            billing.wait_for("handled")
            leave_database()
            cluster.restart()
            outbox.add(OrderPlaced(number=2))
            billing.wait_for("handled", "handled")
        assert numbers() == [1, 2]
        leave_database()


def test_connections_are_closed_after_each_event(postgres_database: None, shop: Lightbus, url: str) -> None:
    billing = Billing(url)
    with shop, working(billing.app):
        shop.publish_sync(OrderPlaced(number=1))
        billing.wait_for("handled")
        wait_until(lambda: not rows(OTHERS), "all connections are closed")


def test_the_inbox_adds_one_statement(
    database: None, shop: Lightbus, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "FIRST_SWEEP", sweep.SWEEP)  # which has a statement, too
    logged: list[str] = []

    def note(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        logged.append(sql)
        return execute(sql, params, many, context)

    def watch(connection: Any, **_: Any) -> None:
        connection.execute_wrappers.append(note)

    billing = Billing(url)
    with shop, working(billing.app):
        connection_created.connect(watch)
        try:
            shop.publish_sync(OrderPlaced(number=1))
            billing.wait_for("handled")
        finally:
            connection_created.disconnect(watch)
    inserted, by_handler = (sql for sql in logged if not sql.startswith("BEGIN"))
    assert "lightbus_inbox" in inserted
    assert by_handler == "INSERT INTO invoice VALUES (%s)"


@on_mariadb_too
def test_old_ids_are_swept(database: None, shop: Lightbus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "SWEPT", 2)
    inbox = Inbox(shop, keep=timedelta(hours=1))
    for number in range(7):
        age = 7200 + number if number < 5 else 60
        rows("INSERT INTO lightbus_inbox VALUES ('shop.bill', %s, %s)", str(number), time.time() - age)
    rows("INSERT INTO lightbus_inbox VALUES ('billing.bill', 'of another app', %s)", time.time() - 7200)
    assert anyio.run(inbox.sweep) == 5
    assert rows("SELECT message_id FROM lightbus_inbox ORDER BY message_id") == [("5",), ("6",), ("of another app",)]
    assert inbox.health() == {"error": None, "deleted": 5}


def test_retries_are_half_of_a_batch_at_most(database: None, shop: Lightbus) -> None:
    outbox = Outbox(shop)
    for number in range(8):
        outbox.add(OrderPlaced(number=number))
    rows("UPDATE lightbus_outbox SET due = 1, attempts = 1 WHERE id <= (SELECT min(id) + 5 FROM lightbus_outbox)")

    async def attempts() -> list[int]:
        async with outbox.relay.store.claim(4, 0) as batch:
            return sorted(row.attempts for row in batch.rows)

    assert anyio.run(attempts) == [0, 0, 1, 1]


# --- what is refused --------------------------------------------------------------------------


def test_an_async_handler_is_refused(sqlite_database: None, shop: Lightbus, url: str) -> None:
    inbox = Inbox(shop)
    with pytest.raises(errors.InvalidHandler, match=r"Django has no transactions in async code\. Make it `def`"):

        @shop.on("order.placed", inbox=inbox)
        async def bill(order: OrderPlaced) -> None: ...

    with pytest.raises(errors.InvalidHandler, match=r"inbox= is of app 'shop'\. Pass one that was made for 'other'"):

        @Lightbus("other", url=url).on("order.placed", inbox=inbox)
        def charge(order: OrderPlaced) -> None: ...


def test_a_handler_that_returns_an_awaitable_fails(database: None, shop: Lightbus, url: str) -> None:
    billing = Lightbus("billing", url=url, retry=Retry.none())
    outcomes: list[Outcome] = []
    billing.observe(outcomes.append)

    async def later() -> None: ...

    @billing.on("order.placed", inbox=Inbox(billing))
    def bill(order: OrderPlaced) -> Any:
        rows("INSERT INTO invoice VALUES (1)")
        return later()

    with shop, working(billing):
        shop.publish_sync(OrderPlaced(number=1))
        wait_until(lambda: outcomes, "an outcome")
    assert "returns an awaitable" in str(outcomes[0].error)
    assert numbers() == []


@pytest.mark.parametrize("kind", [Outbox, Inbox])
def test_an_unknown_database_is_refused(sqlite_database: None, shop: Lightbus, kind: Any) -> None:
    with pytest.raises(
        errors.InvalidOption, match="using='orders' is not in the setting DATABASES, which has 'default'"
    ):
        kind(shop, using="orders")
    with pytest.raises(errors.InvalidOption, match="pass the app"):
        kind("shop")
    assert shop.services == []


def test_lightbus_django_must_be_installed(
    sqlite_database: None, shop: Lightbus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apps, "is_installed", lambda name: name != "lightbus.django")
    with pytest.raises(
        errors.InvalidOption, match=r'add "lightbus\.django" to INSTALLED_APPS, then run manage\.py migrate'
    ):
        Outbox(shop)


# --- migrations -------------------------------------------------------------------------------


@on_mariadb_too
def test_the_tables_are_those_of_sqlalchemy(database: None) -> None:
    if connection.vendor == "sqlite":
        engine = sa.create_engine("sqlite:///" + str(connection.settings_dict["NAME"]))
        others = sa.create_engine("sqlite://")
    else:
        place = connection.settings_dict
        kind = "postgresql+psycopg://postgres" if connection.vendor == "postgresql" else "mariadb+pymysql://root"
        engine = sa.create_engine(f"{kind}@127.0.0.1:{place['PORT']}/{place['NAME']}")
        rows("CREATE SCHEMA other")
        others = engine.execution_options(schema_translate_map={None: "other"})
    found = [described(sa.inspect(engine), name, None) for name in ("lightbus_outbox", "lightbus_inbox")]
    with others.begin() as opened:
        for table in (tables.outbox, tables.inbox):
            opened.execute(sa.schema.CreateTable(table))
            for index in table.indexes:
                opened.execute(sa.schema.CreateIndex(index))
        schema = None if connection.vendor == "sqlite" else "other"
        wanted = [described(sa.inspect(opened), name, schema) for name in ("lightbus_outbox", "lightbus_inbox")]
    engine.dispose()
    if connection.vendor == "mysql":
        rows("DROP SCHEMA other")
        assert str(wanted).count("'utf8mb4_bin', 'InnoDB'") == 2
    assert found == wanted


def described(inspector: sa.Inspector, table: str, schema: str | None) -> Any:
    columns = [
        (
            one["name"],
            type(one["type"]).__name__.replace("REAL", "DOUBLE").replace("LONGTEXT", "TEXT"),
            getattr(one["type"], "length", None),
            one["nullable"],
        )
        for one in inspector.get_columns(table, schema)
    ]
    key = inspector.get_pk_constraint(table, schema)["constrained_columns"]
    options: Any = inspector.get_table_options(table, schema)
    collation = options.get("mariadb_collate"), options.get("mariadb_engine")
    return columns, key, {one["name"]: one["column_names"] for one in inspector.get_indexes(table, schema)}, collation


def test_models_and_migrations_match(sqlite_database: None) -> None:
    call_command("makemigrations", "lightbus", check_changes=True, dry_run=True, verbosity=0)


def test_the_migration_goes_back_and_forth(database: None) -> None:
    functions = "SELECT proname FROM pg_proc WHERE proname LIKE 'lightbus%%'"
    for _ in range(2):
        migrate("lightbus", "zero")
        assert not {"lightbus_outbox", "lightbus_inbox"} & {*connection.introspection.table_names()}
        if connection.vendor == "postgresql":
            assert rows(functions) == []
        migrate()
        assert {"lightbus_outbox", "lightbus_inbox"} <= {*connection.introspection.table_names()}
        if connection.vendor == "postgresql":
            assert rows(functions) == [("lightbus_outbox_notify",)]


def test_the_trigger_is_that_of_sqlalchemy(postgres_database: None) -> None:
    out = StringIO()
    call_command("sqlmigrate", "lightbus", "0001", stdout=out)
    for statement in tables.NOTIFY:
        assert statement in out.getvalue()


def test_it_does_without_sqlalchemy() -> None:
    code = (
        "import sys; sys.modules['sqlalchemy'] = None  # as if it was not installed\n"
        "import lightbus.django, lightbus.django.checks, lightbus.django.command"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=LIMIT)
