"""Databases for tests of the outbox and the inbox: each database and driver, behind the same few calls."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import anyio
import anyio.to_thread
import attrs
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

from lightbus.outbox import metadata
from tests.patience import LIMIT

ASYNC = {"aiosqlite", "psycopg_async", "asyncpg", "asyncmy"}
SQLITE = ["pysqlite", "aiosqlite"]
POSTGRES = ["psycopg", "psycopg_async", "asyncpg"]
MARIADB = [PYMYSQL := "pymysql", ASYNCMY := "asyncmy"]
BUSY = {"timeout": 60}
"""Seconds that SQLite waits for another writer, on a busy machine."""

entries = sa.Table("entries", sa.MetaData(), sa.Column("name", sa.String(50), nullable=False))
"""What handlers and transactions of tests write beside the outbox."""


@attrs.frozen
class Database:
    """A database with both tables, and `entries`."""

    driver: str
    url: sa.URL
    """For the driver."""
    admin: sa.Engine
    """A sync engine, for what the test itself looks up."""

    @property
    def is_async(self) -> bool:
        return self.driver in ASYNC

    @property
    def is_postgres(self) -> bool:
        return self.driver in POSTGRES

    @property
    def is_sqlite(self) -> bool:
        """One writer at a time, and no connections that could be cut."""
        return self.driver in SQLITE

    def engine(self, **options: Any) -> Any:
        """An Engine or an AsyncEngine. `dispose` it."""
        if self.is_sqlite:
            options["connect_args"] = BUSY
        return create_async_engine(self.url, **options) if self.is_async else sa.create_engine(self.url, **options)

    def sessions(self, engine: Any) -> Any:
        return async_sessionmaker(engine) if self.is_async else sessionmaker(engine)

    @contextlib.asynccontextmanager
    async def transaction(self, engine: Any, sessions: Any = None) -> AsyncGenerator[Any]:
        """A session in a transaction, which is committed at the end."""
        if self.is_async:
            async with (sessions or self.sessions(engine)).begin() as session:
                yield session
        else:
            with (sessions or self.sessions(engine)).begin() as session:
                yield session

    def rows(self, statement: str, **values: Any) -> list[tuple[Any, ...]]:
        with self.admin.begin() as connection:
            return [tuple(row) for row in connection.execute(sa.text(statement), values)]

    def execute(self, statement: str, **values: Any) -> None:
        with self.admin.begin() as connection:
            connection.execute(sa.text(statement), values)

    def cut_connections(self, state: str = "") -> None:
        """End all connections to this database on the server's side, except for this one.

        Args:
            state: only those in this state: "idle in transaction".
        """
        if self.is_postgres:
            self.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid() AND state LIKE :state",
                state=state or "%",
            )
            return
        found = "SELECT id FROM information_schema.processlist WHERE db = database() AND id <> connection_id()"
        if state:
            found += " AND id IN (SELECT trx_mysql_thread_id FROM information_schema.innodb_trx)"
        for (one,) in self.rows(found):
            with contextlib.suppress(sa.exc.OperationalError):  # it has ended by itself
                self.execute(f"KILL CONNECTION {one}")

    def waiting(self) -> int:
        """How many rows the outbox has."""
        return int(self.rows("SELECT count(*) FROM lightbus_outbox")[0][0])

    def entries(self) -> list[str]:
        return [name for (name,) in self.rows("SELECT name FROM entries ORDER BY name")]

    def handled(self) -> list[tuple[str, str]]:
        """(handler, message id) of the inbox."""
        return [(one, two) for one, two in self.rows("SELECT handler, message_id FROM lightbus_inbox ORDER BY 1, 2")]


@contextlib.contextmanager
def opened(driver: str, url: str) -> Any:
    """
    Args:
        url: of an empty database, for a sync driver.
    """
    admin = sa.create_engine(url, connect_args=BUSY if driver in SQLITE else {})
    metadata.create_all(admin)
    entries.metadata.create_all(admin)
    scheme = {"pysqlite": "sqlite", "psycopg_async": "postgresql+psycopg"}
    parsed = sa.make_url(url)
    parsed = parsed.set(drivername=scheme.get(driver, f"{parsed.get_backend_name()}+{driver}"))
    yield Database(driver, parsed, admin)
    admin.dispose()


async def dispose(*engines: Any) -> None:
    for engine in engines:
        if isinstance(engine, AsyncEngine):
            await engine.dispose()
            await end_closing()
        else:
            engine.dispose()


async def end_closing() -> None:
    """If SQLAlchemy 2.1 is cancelled while it closes a connection of aiosqlite 0.22, it leaves a task that waits for a
    thread that has ended. At its first cancellation, the task may wait for that again, and the end of the event loop
    would wait for the task.
    """
    for task in asyncio.all_tasks():
        closing: Any = task.get_coro()
        if "_terminate_graceful_close" in repr(closing):
            connection = closing.cr_frame.f_locals["self"]._connection
            with anyio.fail_after(LIMIT):
                await anyio.to_thread.run_sync(connection._thread.join, LIMIT)
                while not task.done():
                    task.cancel()
                    await asyncio.sleep(0)


@contextlib.contextmanager
def lost_connections_reported() -> Iterator[None]:
    """asyncpg reports a connection whose `connect` was cancelled to the event loop's handler, and the test would fail:
    "unexpected connection_lost() call".
    """
    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if "unexpected connection_lost()" not in str(context.get("exception")):
            (before or asyncio.AbstractEventLoop.default_exception_handler)(loop, context)

    loop.set_exception_handler(handle)
    try:
        yield
    finally:
        gc.collect()  # it is reported when the future is deleted
        loop.set_exception_handler(before)


def checked_out(engine: Any) -> int:
    """How many connections of its pool are in use."""
    return int(engine.pool.checkedout())
