"""`Outbox`: events that are published if, and only if, a transaction of Django commits."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

import anyio
from django.db import connections, transaction

from lightbus.app import Lightbus
from lightbus.django.database import check_database
from lightbus.django.store import DjangoStore
from lightbus.outbox.relay import BATCH, POLL, Relay
from lightbus.outbox.rows import OUTBOX, check_app, new_row


class DjangoRelay(Relay):
    """A relay that keeps its database connection open while it runs."""

    def __init__(self, app: Lightbus, store: DjangoStore, *, batch: int = BATCH, poll: float = POLL) -> None:
        super().__init__(app, store, batch=batch, poll=poll)
        self.using = store.using
        self.connected = store.connected

    async def run(self, stopping: anyio.Event) -> None:
        async with self.connected():
            await super().run(stopping)

    async def drain(self) -> int:
        async with self.connected():
            return await super().drain()


class Outbox:
    """The outbox of an app, in a database of the setting DATABASES.

    Each worker of the app also runs a relay, which sends the events; `manage.py lightbus_relay` runs it alone.
    """

    def __init__(self, app: Lightbus, using: str = "default") -> None:
        """
        Args:
            using: the name of the database in DATABASES.

        Raises:
            errors.InvalidOption: not a Lightbus app, no such database, or `lightbus.django` is not installed.
        """
        check_app(app, "Outbox", 'using="default"')
        check_database(f"Outbox({app.name!r})", using)
        self.app = app
        self.using = using
        self.relay = DjangoRelay(app, DjangoStore(app.name, using))
        """Sends the events."""
        app.services.append(self.relay)

    def add(
        self,
        event: object,
        *,
        delay: float | timedelta | None = None,
        headers: Mapping[str, Any] | None = None,
        id: str | None = None,
        correlation_id: str | None = None,
        time: datetime | None = None,
    ) -> str:
        """Publish an event once the transaction commits; if it rolls back (also to a savepoint), never.

        It is one INSERT on the connection of this thread. Outside of `transaction.atomic`, that commits at once. In
        async code, where Django has no transactions, call it within `sync_to_async`.

        Args:
            event, headers, id, correlation_id, time: as for `app.publish`.
            delay: as for `app.publish`; counted from now, not from the commit.

        Returns:
            The event's id, `Message.id` where it is handled.

        Raises:
            errors.UnknownEvent, errors.InvalidPayload, errors.InvalidOption: as `app.publish`. Nothing was added.
            django.db.DatabaseError: the INSERT failed. A transaction around it will be rolled back.
        """
        options = {"headers": headers, "id": id, "correlation_id": correlation_id, "time": time}
        row = new_row(self.app, event, delay, options)
        connection = connections[self.using]
        binary, as_binary = connection.ops.binary_placeholder_sql(row.body), connection.Database.Binary
        statement = (
            f"INSERT INTO {OUTBOX} (app, event, message_id, body, properties, delay, added_at) "
            f"VALUES (%s, %s, %s, {binary}, {binary}, %s, %s)"
        )
        body, properties = as_binary(row.body), as_binary(row.properties)
        values = (row.app, row.event, row.message_id, body, properties, row.delay, row.added_at)
        with transaction.mark_for_rollback_on_error(using=self.using), connection.cursor() as cursor:
            cursor.execute(statement, values)
        return row.message_id
