"""A `Store` for SQLAlchemy: on an Engine, whose calls run in threads, or on an AsyncEngine, in its event loop."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import anyio
import anyio.to_thread
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, InvalidRequestError, OperationalError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from lightbus import errors
from lightbus.outbox import statements
from lightbus.outbox.rows import OUTBOX, Row
from lightbus.outbox.store import CHANNEL, Batch, Depth, PerLoop, Problem, Refused

P = ParamSpec("P")
T = TypeVar("T")

ALIVE = 30.0
"""Seconds without a notification after which the listening connection is checked."""
STATEMENT = 60.0
"""Seconds for a statement on an AsyncEngine, at most: its driver may have no limit of its own."""
CLOSE = 10.0
"""Seconds for closing a connection of an AsyncEngine, at most, where its task was cancelled."""


class _Connection:
    """One connection with one transaction, whichever kind of engine it comes from."""

    def __init__(self, engine: sa.Engine | AsyncEngine, threads: anyio.CapacityLimiter) -> None:
        self._engine = engine
        self._threads = threads
        self._sync: sa.Connection | None = None
        self._async: AsyncConnection | None = None
        self._detached: Any = None

    async def __aenter__(self) -> _Connection:
        if isinstance(self._engine, AsyncEngine):
            self._async = await self._engine.connect()
        else:
            self._sync = await self._in_thread(self._engine.connect)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Roll back what was not committed."""
        with anyio.move_on_after(CLOSE, shield=True):
            if self._async is not None:
                await self._async.close()
                if self._detached is not None:  # of psycopg's, SQLAlchemy closes none that has left its pool
                    await self._detached.close()
            elif self._sync is not None:
                await self._in_thread(self._sync.close)

    async def _in_thread(self, function: Callable[[], T]) -> T:
        # It ends within the database's own limits: abandoned, it would use the connection beside `close`.
        return await anyio.to_thread.run_sync(function, limiter=self._threads)

    async def run(self, function: Callable[Concatenate[sa.Connection, P], T], *args: P.args, **named: P.kwargs) -> T:
        if self._async is not None:
            # As in a thread, it ends before the task is cancelled: aiosqlite would execute the statement nevertheless,
            # and keep the file locked; others would leave the connection to the garbage collector.
            with anyio.fail_after(STATEMENT, shield=True):
                return await self._async.run_sync(function, *args, **named)
        connection = self._sync
        assert connection is not None
        return await self._in_thread(lambda: function(connection, *args, **named))

    async def commit(self) -> None:
        await self.run(sa.Connection.commit)

    async def driver(self) -> Any:
        """The driver's own connection."""
        if self._async is not None:
            return (await self._async.get_raw_connection()).driver_connection
        assert self._sync is not None
        return self._sync.connection.driver_connection

    async def leave_pool(self) -> Any:
        """Let the pool forget it: it listens, and is closed at the end. Returns the driver's own connection."""
        driver = await self.driver()
        if self._async is not None:
            assert self._async.sync_connection is not None
            self._detached = driver
            self._async.sync_connection.detach()
        elif self._sync is not None:
            self._sync.detach()
        return driver


class _Batch:
    """Rows within the transaction that has claimed them."""

    def __init__(self, connection: _Connection, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.settled = False
        self._connection = connection

    async def settle(self, sent: Sequence[int], refused: Mapping[int, Refused]) -> None:
        await self._connection.run(_settle, [row.id for row in self.rows], sent, refused)
        self.settled = True


class EngineStore:
    """The outbox of one app in the database of an engine."""

    def __init__(self, app: str, engine: sa.Engine | AsyncEngine) -> None:
        self.app = app
        self.engine = engine
        self.name = repr(engine.url.render_as_string(hide_password=True))
        self._threads = PerLoop(lambda: anyio.CapacityLimiter(3))  # the relay, its notifications, a command

    def _connect(self) -> _Connection:
        return _Connection(self.engine, self._threads.get())

    @contextlib.asynccontextmanager
    async def claim(self, limit: int, after: int) -> AsyncGenerator[Batch]:
        async with self._connect() as connection:
            rows = await connection.run(_claim, self.app, limit, after)
            batch = _Batch(connection, rows)
            leased = bool(rows) and not statements.skips_locked(self.engine.dialect.name)
            try:
                yield batch
            finally:
                if leased and not batch.settled:
                    with anyio.move_on_after(CLOSE, shield=True):
                        await connection.run(_release, [row.id for row in rows])

    async def depth(self) -> Depth:
        async with self._connect() as connection:
            return await connection.run(statements.depth, self.app)

    async def problems(self, limit: int) -> list[Problem]:
        async with self._connect() as connection:
            return await connection.run(statements.problems, self.app, limit)

    async def retry(self, ids: Sequence[int] | None) -> int:
        async with self._connect() as connection:
            count = await connection.run(statements.retry, self.app, ids)
            await connection.commit()
            return count

    async def purge(self, ids: Sequence[int] | None) -> int:
        async with self._connect() as connection:
            count = await connection.run(statements.purge, self.app, ids)
            await connection.commit()
            return count

    # --- LISTEN

    async def notifications(self) -> AsyncGenerator[None]:
        if self.engine.dialect.name != "postgresql":
            return
        async with self._connect() as connection:
            driver = await connection.leave_pool()
            add_listener = getattr(driver, "add_listener", None)
            if add_listener is not None:  # asyncpg
                news = anyio.Event()

                def notified(*_: object) -> None:
                    news.set()

                driver.add_termination_listener(notified)
                await add_listener(CHANNEL, notified)
                yield
                while True:
                    with anyio.move_on_after(ALIVE):
                        await news.wait()
                    if driver.is_closed():
                        raise ConnectionError("the listening connection was closed")
                    if news.is_set():
                        news = anyio.Event()
                        yield
                    else:
                        await self._ask(connection)
            fileno = getattr(driver, "fileno", None)
            if fileno is None:
                return
            # psycopg (2 and 3): the answer to any statement brings the notifications along. They are not kept.
            add_notify_handler = getattr(driver, "add_notify_handler", None)
            if add_notify_handler is not None:
                add_notify_handler(_ignore)
            kept = getattr(driver, "notifies", None)
            await connection.run(lambda one: one.exec_driver_sql(f"LISTEN {CHANNEL}"))
            await connection.commit()
            yield
            while True:
                arrived = False
                with anyio.move_on_after(ALIVE):
                    await anyio.wait_readable(fileno())
                    arrived = True
                await self._ask(connection)
                if isinstance(kept, list):
                    kept.clear()
                if arrived:
                    yield

    async def _ask(self, connection: _Connection) -> None:
        await connection.run(lambda one: one.exec_driver_sql("SELECT 1"))
        await connection.commit()

    # --- errors

    def is_temporary(self, error: BaseException) -> bool:
        if isinstance(error, (DBAPIError, PoolTimeout, InvalidRequestError, OSError, EOFError)):
            return True
        # Some drivers raise their own errors while they connect: SQLAlchemy 2.0 does not wrap those of asyncpg.
        driver = self.engine.dialect.driver
        return any(one.__module__.partition(".")[0] == driver for one in type(error).__mro__)

    def describe(self, error: BaseException) -> str:
        if isinstance(error, DBAPIError) and error.orig is not None:
            text = errors.summary(error.orig).strip().partition("\n")[0]
            if self.engine.dialect.name in ("mysql", "mariadb") and "'SKIP LOCKED'" in text:
                return f"{text}. The relay needs SKIP LOCKED: MariaDB 10.6 or later, MySQL 8.0.4 or later"
            if isinstance(error, (ProgrammingError, OperationalError)) and _is_missing_table(text):
                return f"{text}. Create the tables with a migration: lightbus outbox sql prints the statements"
            return text
        return errors.summary(error).strip().partition("\n")[0]


# Each to its commit in one call. In between, a sync session in the event loop's thread would wait for SQLite's lock,
# and the commit for the event loop.


def _claim(connection: sa.Connection, app: str, limit: int, after: int) -> list[Row]:
    rows = statements.claim(connection, app, limit, after)
    if not statements.skips_locked(connection.dialect.name):
        connection.commit()  # a lock would keep all others from writing while the broker confirms
    return rows


def _settle(
    connection: sa.Connection, claimed: Sequence[int], sent: Sequence[int], refused: Mapping[int, Refused]
) -> None:
    statements.settle(connection, claimed, sent, refused)
    connection.commit()


def _release(connection: sa.Connection, ids: Sequence[int]) -> None:
    connection.rollback()
    statements.release(connection, ids)
    connection.commit()


def _ignore(_: object) -> None:
    """Without a handler, psycopg 3 keeps all notifications."""


def _is_missing_table(text: str) -> bool:
    return OUTBOX in text and any(words in text for words in ("no such table", "does not exist", "doesn't exist"))
