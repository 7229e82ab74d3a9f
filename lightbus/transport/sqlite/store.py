"""The AMQP model in an SQLite file, as one client uses it.

A `Store` puts the parts together. `Connection` and `Channel` add channels, prefetch and waiting.

| part | subject |
|---|---|
| `session` | SQL, transactions, waking other clients, the clock |
| `entries` | messages in queues, and the queues' length limits |
| `dead_letters` | expiry and dead-lettering |
| `deliveries` | messages that clients hold: claim, requeue, reject |
| `declarations` | exchanges, queues, bindings, consumers |
| `clients` | clients that leave or die |
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from enum import Enum

from lightbus.transport import Publication, Unencodable
from lightbus.transport.sqlite.answers import access_refused, precondition_failed
from lightbus.transport.sqlite.clients import Clients
from lightbus.transport.sqlite.dead_letters import DeadLetters
from lightbus.transport.sqlite.declarations import Declarations
from lightbus.transport.sqlite.deliveries import Deliveries
from lightbus.transport.sqlite.entries import Entries, Message, Row
from lightbus.transport.sqlite.file import cannot_open, explain
from lightbus.transport.sqlite.place import Place
from lightbus.transport.sqlite.schema import (
    CLOSE_TIMEOUT,
    GIVE_BACK,
    HOLDINGS,
    INCREMENTAL,
    MAX_BODY,
    SPARE_PAGES,
)
from lightbus.transport.sqlite.session import Session


class Outcome(Enum):
    """What happened to a publication."""

    ROUTED = "routed"
    UNROUTED = "unrouted"  # no queue is bound for it
    REFUSED = "refused"  # a queue with x-overflow=reject-publish is full


class Store:
    """One client's open file: its parts, publishing, and closing."""

    def __init__(self, place: Place) -> None:
        self.session = session = Session(place)
        self.entries = Entries(session)
        self.dead_letters = DeadLetters(session, self.entries)
        self.deliveries = Deliveries(session, self.dead_letters)
        self.declarations = Declarations(session, self.entries, self.dead_letters)
        self.clients = Clients(session, self.declarations, self.deliveries)
        self._shrinks: bool | None = None
        try:
            self.clients.reap()
        except BaseException as error:
            session.drop()
            if isinstance(error, OSError):
                raise cannot_open(session.folder, error) from error
            raise

    def close(self, acked: Sequence[int]) -> None:
        """Leave: delete `acked`, requeue everything else that this client holds, delete its exclusive queues."""
        session = self.session
        if session.file.closed:
            return
        try:
            with session.file.lock:
                session.sql(f"PRAGMA busy_timeout = {CLOSE_TIMEOUT * 1000:.0f}")
                with session.transaction():
                    self.entries.delete(acked)
                    self.clients.remove(session.client)
        finally:
            session.wake_pipe.remove()
            session.drop()

    # --- publishing -----------------------------------------------------------------------

    def publish(self, publications: Sequence[Publication]) -> list[Outcome]:
        """In a transaction: store each message in every queue that its route leads to.

        Raises:
            Unencodable: a message cannot be stored as it is.
        """
        rows: list[Row] = []
        outcomes: list[Outcome] = []
        for publication in publications:
            try:
                outcomes.append(self._route(publication, rows))
            except ValueError as error:
                raise Unencodable(str(error), publication) from error
        self.entries.insert(rows)
        self.dead_letters.trim(rows)
        return outcomes

    def _route(self, publication: Publication, rows: list[Row]) -> Outcome:
        """Add one row for each queue that takes the message."""
        if len(publication.body) > MAX_BODY:
            raise precondition_failed(
                f"message size {len(publication.body)} is larger than configured max size {MAX_BODY}"
            )
        name, properties = publication.exchange, publication.properties
        if len(publication.routing_key.encode()) > 255:
            raise ValueError(f"the routing key {publication.routing_key!r} is longer than 255 bytes")
        if name and self.declarations.exchange(name).internal:
            raise access_refused(f"cannot publish to internal exchange '{name}' in vhost '/'")
        topology = self.session.topology
        queues = topology.route(name, publication.routing_key, properties.get("headers") or {})
        open_queues = [queue for queue in queues if self.entries.has_room(queue)]
        message = Message(name, publication.routing_key, properties, bytes(publication.body))
        rows.extend(self.entries.rows(message, open_queues))
        if not queues:
            return Outcome.UNROUTED
        return Outcome.ROUTED if len(open_queues) == len(queues) else Outcome.REFUSED

    # --- the file -------------------------------------------------------------------------

    def holdings(self) -> list[tuple[str, int, int, float | None]]:
        """For each queue that is not empty: (name, ready messages, other messages, when the first is due)."""
        self.session.refresh()
        return self.session.read(HOLDINGS)

    def shrink(self) -> None:
        """Make the file a little smaller, if it is mostly empty after a backlog.

        A file that an early version of Lightbus created keeps its size until a `VACUUM`.
        """
        session = self.session
        if self._shrinks is None:
            self._shrinks = session.read("PRAGMA auto_vacuum")[0][0] == INCREMENTAL
        if not self._shrinks:
            return
        free, pages = session.read("PRAGMA freelist_count")[0][0], session.read("PRAGMA page_count")[0][0]
        if free <= SPARE_PAGES or 2 * free < pages:
            return
        freed = min(GIVE_BACK, free - SPARE_PAGES // 2)
        try:
            with session.file.lock:  # as a script, since `execute` would run one step of it: one page
                session.file.get().executescript(f"PRAGMA incremental_vacuum({freed})")
        except sqlite3.Error as error:
            raise explain(session.path, error) from error
        session.read("PRAGMA wal_checkpoint(PASSIVE)")  # which truncates the file
