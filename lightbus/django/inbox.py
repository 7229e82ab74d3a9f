"""`Inbox`: what a handler does to the database happens once, however often its event is delivered."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import anyio
import anyio.to_thread
import attrs
from django.db import Error, connections
from django.db.models.constants import OnConflict

from lightbus import errors
from lightbus.app import Lightbus
from lightbus.django.database import as_in_a_request, atomic, check_database, model
from lightbus.handler import Handler, Injected
from lightbus.middleware import SKIPPED, the_delivery
from lightbus.outbox.rows import INBOX, check_app, message_id_of
from lightbus.outbox.sweep import KEEP, SWEPT, Sweep
from lightbus.transport import Delivery


class _ConnectionLost(Exception):
    """Before the handler ran, on a connection that an earlier event has left open."""


class Inbox(Sweep):
    """The inbox of an app: `@app.on("order.placed", inbox=inbox)`, for sync handlers.

    The handler runs in `transaction.atomic`, which begins with the id of the event, in the table `lightbus_inbox`, and
    is committed when the handler has returned; then the event is acknowledged. If the id is there already, the event
    is acknowledged, and the handler does not run. If the handler fails, nothing of it stays, and its retry is no
    duplicate.

    Before and after each event, connections are closed as around a request of Django: see CONN_MAX_AGE.
    """

    def __init__(self, app: Lightbus, using: str = "default", *, keep: timedelta = KEEP) -> None:
        """
        Args:
            using: the name of the database in DATABASES.
            keep: for how long ids are kept. A duplicate that comes later is handled again.

        Raises:
            errors.InvalidOption: not a Lightbus app, no such database, `lightbus.django` is not installed, or `keep` is
                not positive.
        """
        check_app(app, "Inbox", 'using="default"')
        check_database(f"Inbox({app.name!r})", using)
        super().__init__(app, keep)
        self.using = using
        app.services.append(self)

    # --- what `@app.on` calls

    def check(self, app: str, handler: Handler) -> None:
        """
        Raises:
            errors.InvalidHandler: it is of another app, or async.
        """
        owner = f"handler {handler.name!r} of app {app!r}"
        if app != self.app.name:
            raise errors.InvalidHandler(
                f"{owner}: inbox= is of app {self.app.name!r}. Pass one that was made for {app!r}."
            )
        if handler.is_async:
            raise errors.InvalidHandler(
                f"{owner} is async, and Django has no transactions in async code. Make it `def`: it runs in a thread."
            )

    def injected(self, annotation: Any) -> Injected | None:
        return None

    def around(self, handler: Handler) -> Handler:
        return attrs.evolve(handler, function=self._around(handler), arguments=the_delivery)

    def _around(self, handler: Handler) -> Callable[[Delivery], Any]:
        arguments, function, name = handler.arguments, handler.function, handler.name
        key = f"{self.app.name}.{name}"

        def once(delivery: Delivery, kept: bool) -> Any:
            with atomic(using=self.using):
                try:
                    is_new = self._insert(key, message_id_of(delivery))
                except Error as error:
                    if kept and not connections[self.using].is_usable():
                        raise _ConnectionLost from error
                    raise
                if not is_new:
                    return SKIPPED
                returned = function(*arguments(delivery))
                if inspect.isawaitable(returned):
                    if inspect.iscoroutine(returned):
                        returned.close()
                    raise errors.DependencyError(
                        f"handler {name!r} is a sync function that returns an awaitable, which would run after its "
                        "transaction. Use sync functions."
                    )
                return returned

        def run(delivery: Delivery) -> Any:
            with as_in_a_request():
                connection = connections[self.using]
                kept = connection.connection is not None and not connection.in_atomic_block
                try:
                    return once(delivery, kept)
                except _ConnectionLost:
                    # With CONN_MAX_AGE: each thread has such a connection after a restart of the database. Retries of
                    # the event would use up its attempts.
                    connection.close()
                return once(delivery, False)

        return run

    def _insert(self, key: str, message_id: str) -> bool:
        """Insert the id. False if it is there. A second transaction waits for the first."""
        connection = connections[self.using]
        ignore = OnConflict.IGNORE
        statement = (
            f"{connection.ops.insert_statement(on_conflict=ignore)} {INBOX} (handler, message_id, handled_at) "
            f"VALUES (%s, %s, %s) {connection.ops.on_conflict_suffix_sql([], ignore, [], [])}"
        )
        with connection.cursor() as cursor:
            cursor.execute(statement, (key, message_id, time.time()))
            return bool(cursor.rowcount)

    # --- the sweep

    async def delete_oldest(self, before: float) -> tuple[int, bool]:
        return await anyio.to_thread.run_sync(self._delete_oldest, before)

    def _delete_oldest(self, before: float) -> tuple[int, bool]:
        try:
            ours = model("InboxRow").objects.using(self.using).filter(handler__startswith=f"{self.app.name}.")
            old = ours.filter(handled_at__lt=before)
            last = old.order_by("handled_at").values_list("handled_at", flat=True)[SWEPT : SWEPT + 1].first()
            count, _ = (old if last is None else old.filter(handled_at__lte=last)).delete()
            return count, last is not None
        finally:
            connections[self.using].close()
