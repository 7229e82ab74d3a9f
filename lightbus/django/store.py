"""A `Store` for Django's ORM. A batch belongs to one thread from its claim to its commit, as connections do."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import anyio
import attrs
from django.db import Error, OperationalError, ProgrammingError, connections, transaction
from django.db.models import Count, F, Min, Q

from lightbus import errors
from lightbus.django.database import DatabaseThread, atomic, model
from lightbus.outbox.rows import DELETE_ON_MARIADB, OUTBOX, SET_ASIDE, WAITING, Row
from lightbus.outbox.store import CHANNEL, LEASE, Batch, Depth, Problem, Refused

ALIVE = 30.0
"""Seconds without a notification after which the listening connection is checked."""
FAR = 600.0
"""Seconds: no retry and no lease is due later."""

_COLUMNS = [field.name for field in attrs.fields(Row)]


class DjangoStore:
    """The outbox of one app in one database of the setting DATABASES."""

    def __init__(self, app: str, using: str) -> None:
        self.app = app
        self.using = using
        self.name = f"Django's database {using!r}"
        self._idle: list[DatabaseThread] = []
        """With open connections, which the next calls use."""
        self._keep = 0
        """How many of them to keep: one for each `connected` block."""

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncGenerator[None]:
        """Within this block, calls do not each open and close a connection. There may be several at once."""
        self._keep += 1
        try:
            yield
        finally:
            self._keep -= 1
            while len(self._idle) > self._keep:
                await self._idle.pop().close()

    @contextlib.asynccontextmanager
    async def _thread(self) -> AsyncGenerator[DatabaseThread]:
        thread = self._idle.pop() if self._idle else DatabaseThread(self.using)
        try:
            yield thread
        finally:
            if len(self._idle) < self._keep:
                self._idle.append(thread)
            else:
                await thread.close()

    @contextlib.asynccontextmanager
    async def claim(self, limit: int, after: int) -> AsyncGenerator[Batch]:
        async with self._thread() as thread:
            claim = _Claim(self.app, self.using)
            try:
                rows = await thread.run(claim.take, limit, after)
                yield _Batch(thread, claim, rows)
            finally:
                with anyio.CancelScope(shield=True):
                    await thread.run(claim.end)

    async def depth(self) -> Depth:
        async with self._thread() as thread:
            return await thread.run(self._depth)

    async def problems(self, limit: int) -> list[Problem]:
        async with self._thread() as thread:
            return await thread.run(self._problems, limit)

    async def retry(self, ids: Sequence[int] | None) -> int:
        async with self._thread() as thread:
            return await thread.run(lambda: self._set_aside(ids).update(state=WAITING, due=0, attempts=0, error=None))

    async def purge(self, ids: Sequence[int] | None) -> int:
        async with self._thread() as thread:
            return await thread.run(lambda: self._set_aside(ids).delete()[0])

    # --- in the thread

    def _rows(self) -> Any:
        return model("OutboxRow").objects.using(self.using).filter(app=self.app)

    def _depth(self) -> Depth:
        counted = self._rows().values_list("state").annotate(Count("id"), Min("added_at"))
        found = {state: (count, oldest) for state, count, oldest in counted}
        waiting, oldest = found.get(WAITING, (0, None))
        return Depth(
            waiting=waiting,
            oldest_seconds=0.0 if oldest is None else max(0.0, time.time() - oldest),
            set_aside=found.get(SET_ASIDE, (0, None))[0],
        )

    def _problems(self, limit: int) -> list[Problem]:
        return [
            Problem(
                id=row.id,
                event=row.event,
                message_id=row.message_id,
                added_at=row.added_at,
                attempts=row.attempts,
                error=row.error,
                set_aside=row.state == SET_ASIDE,
                body=bytes(row.body),
                retry_at=None if row.state == SET_ASIDE else row.due,
            )
            for row in self._rows().filter(error__isnull=False).order_by("id")[:limit]
        ]

    def _set_aside(self, ids: Sequence[int] | None) -> Any:
        rows = self._rows().filter(state=SET_ASIDE)
        return rows if ids is None else rows.filter(id__in=ids)

    # --- LISTEN

    async def notifications(self) -> AsyncGenerator[None]:
        if connections[self.using].vendor != "postgresql":
            return
        async with DatabaseThread(self.using) as thread:
            driver = await thread.run(self._listen)
            try:
                yield
                while True:
                    arrived = False
                    with anyio.move_on_after(ALIVE):
                        await anyio.wait_readable(driver.fileno())
                        arrived = True
                    await thread.run(self._read_notifications, driver)
                    if arrived:
                        yield
            finally:
                with anyio.CancelScope(shield=True), contextlib.suppress(Error):
                    await thread.run(self._unlisten, driver)

    def _listen(self) -> Any:
        """Returns the driver's connection: of psycopg, 3 or 2."""
        connection = connections[self.using]
        with connection.cursor() as cursor:
            cursor.execute(f"LISTEN {CHANNEL}")
        driver = connection.connection
        if hasattr(driver, "add_notify_handler"):  # else psycopg 3 collects them
            driver.add_notify_handler(_ignore)
        return driver

    def _read_notifications(self, driver: Any) -> None:
        """The answer to any statement brings them along."""
        with connections[self.using].cursor() as cursor:
            cursor.execute("SELECT 1")
        if not hasattr(driver, "add_notify_handler"):  # psycopg 2 collects them
            driver.notifies.clear()

    def _unlisten(self, driver: Any) -> None:
        """The connection may go back to a pool."""
        if hasattr(driver, "remove_notify_handler"):
            driver.remove_notify_handler(_ignore)
        with connections[self.using].cursor() as cursor:
            cursor.execute(f"UNLISTEN {CHANNEL}")

    # --- errors

    def is_temporary(self, error: BaseException) -> bool:
        return isinstance(error, (Error, OSError))

    def describe(self, error: BaseException) -> str:
        if isinstance(error, Error):
            text = errors.summary(error.__cause__ or error).strip().partition("\n")[0]
            if isinstance(error, (ProgrammingError, OperationalError)) and OUTBOX in text:
                return f"{text}. Create the tables: manage.py migrate lightbus --database {self.using}"
            return text
        return errors.summary(error)


def _ignore(_notification: object) -> None:
    pass


class _Batch:
    """Rows that were claimed."""

    def __init__(self, thread: DatabaseThread, claim: _Claim, rows: Sequence[Row]) -> None:
        self.rows = rows
        self._thread = thread
        self._claim = claim

    async def settle(self, sent: Sequence[int], refused: Mapping[int, Refused]) -> None:
        await self._thread.run(self._claim.settle, sent, refused)


class _Claim:
    """Rows that no other relay has. All of its methods run in one thread.

    The claim is a lock on the rows (SKIP LOCKED), which ends with the transaction. On a database without that, it is a
    lease in the rows, so that others can write while the broker confirms.
    """

    def __init__(self, app: str, using: str) -> None:
        self._using = using
        self._rows: Any = model("OutboxRow").objects.using(using)
        self._mine = self._rows.filter(app=app, state=WAITING)
        self._transaction: Any = None
        self._leased: list[int] = []

    def take(self, limit: int, after: int) -> list[Row]:
        """First those whose retry is due, then new ones with an id over `after`."""
        now = time.time()
        # The latter if the clock was set back: a retry is due within minutes, and would wait for hours.
        again = self._mine.filter(Q(due__lte=now) | Q(due__gt=now + FAR), due__gt=0).order_by("due")
        new = self._mine.filter(due=0, id__gt=after).order_by("id")
        features = connections[self._using].features
        if features.has_select_for_update_skip_locked:
            self._begin()
            return self._read(limit, again.select_for_update(skip_locked=True), new.select_for_update(skip_locked=True))
        if not (again.exists() or new.exists()):  # a lease is a write, which waits for other writers
            return []
        with atomic(using=self._using):
            if features.has_select_for_update:
                again, new = again.select_for_update(), new.select_for_update()
            else:  # SQLite: a write, so that no other relay reads the rows in between
                self._rows.filter(id=-1).update(due=0)
            rows = self._read(limit, again, new)
            self._rows.filter(id__in=[row.id for row in rows]).update(due=now + LEASE)
        self._leased = [row.id for row in rows]
        return rows

    def _read(self, limit: int, again: Any, new: Any) -> list[Row]:
        """Retries are half of them at most, so that new rows do not wait for a full queue."""
        rows: list[Row] = []
        for query, most in ((again, max(1, limit // 2)), (new, limit)):
            found = [Row(**row) for row in query[: min(most, limit - len(rows))].values(*_COLUMNS)]
            rows += sorted(found, key=lambda row: row.id)
            if len(rows) >= limit:
                break
        return [attrs.evolve(row, body=bytes(row.body), properties=bytes(row.properties)) for row in rows]

    def settle(self, sent: Sequence[int], refused: Mapping[int, Refused]) -> None:
        if self._transaction is None:
            self._begin()
        if sent and connections[self._using].vendor == "mysql":  # MariaDB too
            with connections[self._using].cursor() as cursor:
                cursor.execute(DELETE_ON_MARIADB.format(ids="%s"), [json.dumps([*sent])])
        elif sent:
            self._rows.filter(id__in=sent).delete()
        for id_, one in refused.items():
            self._rows.filter(id=id_).update(
                error=one.error.replace("\0", ""),  # PostgreSQL's text has none
                attempts=F("attempts") + 1,
                state=SET_ASIDE if one.retry_at is None else WAITING,
                due=one.retry_at or 0,
            )
        self._release({*self._leased} - refused.keys() - {*sent})
        self._commit()
        self._leased = []

    def end(self) -> None:
        """Release what was not settled."""
        if self._transaction is not None:
            self._rollback()
        self._release(self._leased)

    def _release(self, ids: Any) -> None:
        if ids:
            self._rows.filter(id__in=[*ids]).update(due=0)

    # A transaction that begins in one method and ends in another.

    def _begin(self) -> None:
        self._transaction = atomic(using=self._using)
        self._transaction.__enter__()

    def _commit(self) -> None:
        ending, self._transaction = self._transaction, None
        ending.__exit__(None, None, None)

    def _rollback(self) -> None:
        ending, self._transaction = self._transaction, None
        transaction.set_rollback(True, using=self._using)
        ending.__exit__(None, None, None)
