"""`Outbox`: events that are published if, and only if, a database transaction commits."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

import attrs
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session
from sqlalchemy.pool import SingletonThreadPool, StaticPool

from lightbus import errors
from lightbus.app import Lightbus
from lightbus.outbox.engine import EngineStore
from lightbus.outbox.relay import Relay
from lightbus.outbox.rows import check_app, new_row
from lightbus.outbox.tables import DIALECTS, OutboxRow, outbox

Where = Session | AsyncSession | scoped_session[Any] | async_scoped_session[Any] | sa.Connection


class Outbox:
    """The outbox of an app, in a database that SQLAlchemy reaches.

    With an engine, each worker of the app also runs a relay, which sends the events. Without one, run it alone:
    `lightbus relay MODULE:ATTR` in a process that has the engine.
    """

    def __init__(self, app: Lightbus, engine: sa.Engine | AsyncEngine | None = None) -> None:
        """
        Args:
            engine: where the relay finds the events: a SQLAlchemy Engine or AsyncEngine. An AsyncEngine belongs to the
                event loop of the worker, which then is asyncio.

        Raises:
            errors.InvalidOption: not a Lightbus app, or not an engine.
        """
        check_app(app, "Outbox", "engine")
        if engine is not None:
            _check_engine(app.name, engine)
        self.app = app
        self._relay: Relay | None = None
        if engine is not None:
            self._relay = Relay(app, EngineStore(app.name, engine))
            app.services.append(self._relay)

    @property
    def relay(self) -> Relay:
        """Sends the events: `await outbox.relay.drain()` sends those that wait now.

        Raises:
            errors.InvalidOption: the outbox has no engine.
        """
        if self._relay is None:
            raise errors.InvalidOption(
                f"app {self.app.name!r}: this outbox has no engine, so it has no relay. Pass one: Outbox(app, engine)."
            )
        return self._relay

    def add(
        self,
        where: Where,
        event: object,
        *,
        delay: float | timedelta | None = None,
        headers: Mapping[str, Any] | None = None,
        id: str | None = None,
        correlation_id: str | None = None,
        time: datetime | None = None,
    ) -> str:
        """Publish an event once the transaction commits; if it rolls back, never.

        Args:
            where: the Session or AsyncSession of the transaction, or its Connection. With an AsyncConnection:
                `await connection.run_sync(outbox.add, event)`. A session inserts it with its next flush.
            event, headers, id, correlation_id, time: as for `app.publish`.
            delay: as for `app.publish`; counted from now, not from the commit.

        Returns:
            The event's id, `Message.id` where it is handled.

        Raises:
            errors.UnknownEvent, errors.InvalidPayload, errors.InvalidOption: as `app.publish`. Nothing was added.
        """
        given: Any = where
        if not isinstance(given, _USABLE):
            raise errors.InvalidOption(_not_usable(given))
        options = {"headers": headers, "id": id, "correlation_id": correlation_id, "time": time}
        row = attrs.asdict(new_row(self.app, event, delay, options))
        if isinstance(where, sa.Connection):
            where.execute(_insert, row)
        else:
            where.add(OutboxRow(**row))
        message_id: str = row["message_id"]
        return message_id


def _check_engine(app: str, engine: object) -> None:
    """
    Raises:
        errors.InvalidOption: it is no engine.
    """
    if not isinstance(engine, sa.Engine | AsyncEngine):
        raise errors.InvalidOption(
            f"Outbox({app!r}): engine={engine!r} is not an Engine or AsyncEngine. Pass what create_engine() or "
            "create_async_engine() returned."
        )
    if engine.dialect.name not in DIALECTS:
        raise errors.InvalidOption(
            f"Outbox({app!r}): the relay does not know the database {engine.dialect.name!r}. It knows "
            f"{', '.join(DIALECTS)}."
        )
    if isinstance(engine.pool, SingletonThreadPool | StaticPool):
        raise errors.InvalidOption(
            f"Outbox({app!r}): the relay needs a connection of its own, and the pool of {str(engine.url)!r} is a "
            f"{type(engine.pool).__name__}: SQLite in memory has one database a connection. Use a file."
        )


_USABLE: Any = (Session, AsyncSession, scoped_session, async_scoped_session, sa.Connection)
_insert = sa.insert(outbox)


def _not_usable(where: object) -> str:
    if isinstance(where, AsyncConnection):
        return "outbox.add() with an AsyncConnection: write `await connection.run_sync(outbox.add, event)`."
    if isinstance(where, sa.Engine | AsyncEngine):
        return "outbox.add() needs the transaction that the event belongs to, not an engine. Pass its session."
    return f"outbox.add({where!r}, ...): pass the transaction's Session, AsyncSession or Connection, then the event."
