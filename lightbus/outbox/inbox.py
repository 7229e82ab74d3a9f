"""`Inbox`: what a handler does to the database happens once, however often its event is delivered."""

from __future__ import annotations

import contextlib
import inspect
import time
import typing
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

import anyio
import anyio.to_thread
import attrs
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from lightbus import errors
from lightbus.app import Lightbus
from lightbus.dependencies import Depends, let_cancellation_pass
from lightbus.handler import Handler, Injected
from lightbus.middleware import SKIPPED, the_delivery
from lightbus.outbox import statements
from lightbus.outbox.rows import check_app, message_id_of
from lightbus.outbox.sweep import KEEP, SWEPT, Sweep
from lightbus.outbox.tables import DIALECTS, inbox
from lightbus.transport import Delivery

ROLLBACK = 10.0
"""Seconds for the rollback of an async handler that has failed, at most. After it, the connection is closed."""

_current: ContextVar[tuple[Any, Any]] = ContextVar("lightbus_inbox_session")
"""The inbox of the handler that runs, and its session."""


class Inbox(Sweep):
    """The inbox of an app: `@app.on("order.placed", inbox=inbox)`.

    The handler runs in a transaction that begins with the id of the event, in the table `lightbus_inbox`, and is
    committed when the handler has returned; then the event is acknowledged. If the id is there already, the event is
    acknowledged, and the handler does not run. If the handler fails, nothing of it stays, and its retry is no
    duplicate.

    A parameter of the handler that is annotated with Session or AsyncSession gets the session of this transaction; a
    dependency gets it with `Annotated[AsyncSession, Depends(inbox.session)]`.
    """

    def __init__(
        self,
        app: Lightbus,
        sessions: sessionmaker[Any] | async_sessionmaker[Any],
        *,
        keep: timedelta = KEEP,
    ) -> None:
        """
        Args:
            sessions: makes the session of each event: a sessionmaker for sync handlers, an async_sessionmaker for async
                ones.
            keep: for how long ids are kept. A duplicate that comes later is handled again.

        Raises:
            errors.InvalidOption: not a Lightbus app, not a sessionmaker, or `keep` is not positive.
        """
        check_app(app, "Inbox", "sessions")
        _check_sessions(app.name, sessions)
        super().__init__(app, keep)
        self.is_async = isinstance(sessions, async_sessionmaker)
        self._sessions: Any = sessions
        self._depends = Depends(self.session)
        app.services.append(self)

    def session(self) -> Any:
        """The session of the event that is being handled: `Depends(inbox.session)`.

        Raises:
            errors.DependencyError: no handler with this inbox runs.
        """
        inbox, session = _current.get((None, None))
        if inbox is not self:
            raise errors.DependencyError(
                f"app {self.app.name!r}: this inbox has no session here. Its handlers have: @app.on(..., inbox=inbox)."
            )
        return session

    # --- what `@app.on` calls

    def check(self, app: str, handler: Handler) -> None:
        """
        Raises:
            errors.InvalidHandler: it is of another app, or its kind does not fit the sessions.
        """
        owner = f"handler {handler.name!r} of app {app!r}"
        if app != self.app.name:
            raise errors.InvalidHandler(
                f"{owner}: inbox= is of app {self.app.name!r}. Pass one that was made for {app!r}."
            )
        if handler.is_async and not self.is_async:
            raise errors.InvalidHandler(
                f"{owner} is async, and the sessions of its inbox are not: they would block the event loop. Pass an "
                "async_sessionmaker to Inbox(), or make the handler `def`."
            )
        if self.is_async and not handler.is_async:
            raise errors.InvalidHandler(
                f"{owner} is a sync function, and the sessions of its inbox are async. Pass a sessionmaker to Inbox(), "
                "or make the handler `async def`."
            )
        wanted, other = (AsyncSession, Session) if self.is_async else (Session, AsyncSession)
        for parameter in handler.parameters:
            if self._depends in typing.get_args(parameter.annotation) and _is_a(parameter.annotation, other):
                raise errors.InvalidHandler(
                    f"{owner}: the parameter {parameter.name!r} is annotated with {other.__name__}, and the sessions "
                    f"of the inbox are of type {wanted.__name__}. Annotate it with {wanted.__name__}."
                )

    def injected(self, annotation: Any) -> Injected | None:
        return self._depends if _is_a(annotation, (Session, AsyncSession)) else None  # `check` refuses one of them

    def around(self, handler: Handler) -> Handler:
        around = self._around if handler.is_async else self._around_sync
        return attrs.evolve(handler, function=around(handler), arguments=the_delivery)

    def _around(self, handler: Handler) -> Callable[[Delivery], Awaitable[Any]]:
        arguments, function, key = handler.arguments, handler.function, f"{self.app.name}.{handler.name}"

        async def run(delivery: Delivery) -> Any:
            async with self._sessions() as session, _transaction(session):
                _refuse_its_end(session.sync_session)
                statement, row = _claim(session, key, delivery)
                if not (await session.execute(statement, row)).rowcount:
                    return SKIPPED
                before = _current.set((self, session))
                try:
                    return await function(*arguments(delivery))
                finally:
                    _current.reset(before)

        return run

    def _around_sync(self, handler: Handler) -> Callable[[Delivery], Any]:
        arguments, function, key = handler.arguments, handler.function, f"{self.app.name}.{handler.name}"
        name = handler.name

        def run(delivery: Delivery) -> Any:
            with self._sessions() as session, session.begin():
                _refuse_its_end(session)
                statement, row = _claim(session, key, delivery)
                if not session.execute(statement, row).rowcount:
                    return SKIPPED
                before = _current.set((self, session))
                try:
                    returned = function(*arguments(delivery))
                finally:
                    _current.reset(before)
                if inspect.isawaitable(returned):
                    if inspect.iscoroutine(returned):
                        returned.close()
                    raise errors.DependencyError(
                        f"handler {name!r} is a sync function that returns an awaitable, which would run after its "
                        "transaction. Make it `async def`."
                    )
                return returned

        return run

    async def delete_oldest(self, before: float) -> tuple[int, bool]:
        if self.is_async:
            async with self._sessions() as session, session.begin():
                found: tuple[int, bool] = await session.run_sync(_delete_oldest, self.app.name, before)
                return found
        return await anyio.to_thread.run_sync(self._delete_oldest, before)

    def _delete_oldest(self, before: float) -> tuple[int, bool]:
        with self._sessions() as session, session.begin():
            return _delete_oldest(session, self.app.name, before)


def _check_sessions(app: str, sessions: object) -> None:
    """
    Raises:
        errors.InvalidOption: it is no sessionmaker.
    """
    if not isinstance(sessions, sessionmaker | async_sessionmaker):
        raise errors.InvalidOption(
            f"Inbox({app!r}): sessions={sessions!r} is not a sessionmaker. Pass sessionmaker(engine) for sync "
            "handlers, or async_sessionmaker(engine) for async handlers."
        )
    dialect = getattr(getattr(sessions.kw.get("bind"), "dialect", None), "name", DIALECTS[0])
    if dialect not in DIALECTS:
        raise errors.InvalidOption(
            f"Inbox({app!r}): the inbox does not know the database {dialect!r}. It knows {', '.join(DIALECTS)}."
        )


def _is_a(annotation: Any, types: Any) -> bool:
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    return isinstance(annotation, type) and issubclass(annotation, types)


def _refuse_its_end(session: Any) -> None:
    """The handler must not end the transaction: what follows would not be done again, or would be done twice."""
    session.commit = session.rollback = _not_in_a_handler


def _not_in_a_handler() -> None:
    raise errors.DependencyError(
        "session.commit() and session.rollback() do not work in a handler with inbox=: its transaction is committed "
        "when the handler has returned. Use session.flush() to send statements to the database, and `with "
        "session.begin_nested():` (`async with` for an AsyncSession) to undo a part."
    )


@contextlib.asynccontextmanager
async def _transaction(session: Any) -> AsyncGenerator[None]:
    """`session.begin()`, whose rollback also runs where the handler was cancelled."""
    transaction = await session.begin()
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception):
            await let_cancellation_pass()
        with anyio.move_on_after(ROLLBACK, shield=True):
            await transaction.rollback()
        raise
    await transaction.commit()


_TABLE: Any = inbox  # of type FromClause, for type checkers
_KEPT: Any = {"preserve_rowcount": True}  # of an INSERT, psycopg does not keep it
_insert = {
    "postgresql": postgresql.insert(_TABLE).on_conflict_do_nothing().execution_options(**_KEPT),
    "sqlite": sqlite.insert(_TABLE).on_conflict_do_nothing().execution_options(**_KEPT),
    "mysql": sa.insert(_TABLE).prefix_with("IGNORE").execution_options(**_KEPT),
    "mariadb": sa.insert(_TABLE).prefix_with("IGNORE").execution_options(**_KEPT),
}


def _claim(session: Any, key: str, delivery: Delivery) -> tuple[Any, dict[str, Any]]:
    """A statement that inserts the id, and changes no row if it is there. A second transaction waits for the first."""
    dialect = session.get_bind().dialect.name
    try:
        statement = _insert[dialect]
    except KeyError:
        raise errors.DependencyError(
            f"the inbox does not know the database {dialect!r}. It knows {', '.join(_insert)}."
        ) from None
    return statement, {"handler": key, "message_id": message_id_of(delivery), "handled_at": time.time()}


def _delete_oldest(session: Session, app: str, before: float) -> tuple[int, bool]:
    """Delete about `SWEPT` of the ids that were handled before. Returns how many, and whether there are more."""
    statements.leave_gaps(session.connection())
    handled_at = inbox.c.handled_at
    old = sa.and_(inbox.c.handler.startswith(f"{app}.", autoescape=True), handled_at < before)
    last = session.execute(sa.select(handled_at).where(old).order_by(handled_at).offset(SWEPT).limit(1)).scalar()
    deleted: Any = session.execute(sa.delete(inbox).where(old if last is None else sa.and_(old, handled_at <= last)))
    return deleted.rowcount, last is not None
