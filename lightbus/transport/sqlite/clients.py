"""Clients that leave or die: what they held returns to its queues, and their exclusive queues are deleted."""

from __future__ import annotations

from lightbus.transport.sqlite.declarations import Declarations
from lightbus.transport.sqlite.deliveries import Deliveries
from lightbus.transport.sqlite.session import Session
from lightbus.transport.sqlite.wake_pipe import is_alive


class Clients:
    """Removes clients from the file."""

    def __init__(self, session: Session, declarations: Declarations, deliveries: Deliveries) -> None:
        self._session = session
        self._declarations = declarations
        self._deliveries = deliveries

    def reap(self) -> None:
        """Find clients that died, and remove them."""
        session = self._session
        clients = [row[0] for row in session.read("SELECT id FROM clients")]
        dead = [client for client in clients if client != session.client and not is_alive(session.pipe_path(client))]
        if not dead:
            return
        with session.transaction():
            for client in dead:
                if session.sql("SELECT 1 FROM clients WHERE id = ?", client).fetchone():
                    self.remove(client)
        for client in dead:
            session.pipe_path(client).unlink(missing_ok=True)

    def remove(self, client: int) -> None:
        """In a transaction: requeue what the client holds, remove its consumers, delete its exclusive queues."""
        session = self._session
        owned = [row[0] for row in session.sql("SELECT id FROM entries WHERE owner = ? ORDER BY id", client)]
        self._deliveries.requeue(owned)
        for (tag,) in session.sql("SELECT tag FROM consumers WHERE client = ?", client).fetchall():
            self._declarations.remove_consumer(tag, client=client)
        for (name,) in session.sql("SELECT name FROM queues WHERE exclusive_to = ?", client).fetchall():
            self._declarations.remove_queue(session.topology.queues[name])
        session.sql("DELETE FROM clients WHERE id = ?", client)
