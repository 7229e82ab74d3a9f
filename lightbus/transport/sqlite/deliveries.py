"""Messages that clients hold: claimed for a consumer, and not settled yet."""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs

from lightbus.transport.sqlite.dead_letters import DeadLetters
from lightbus.transport.sqlite.schema import (
    CLAIM_BYTES,
    CLAIM_MESSAGES,
    COUNT_OWNED,
    COUNT_SOME_READY,
    DROP_READY,
    OWN_READY,
    READY,
    REQUEUE,
)
from lightbus.transport.sqlite.session import Session
from lightbus.transport.sqlite.topology import Queue


@attrs.frozen
class Claim:
    """A message that a client has taken from a queue."""

    id: int
    returns: int
    exchange: str
    routing_key: str
    properties: bytes
    body: bytes


class Deliveries:
    """Gives ready messages to this client, and takes them back. (An ack deletes the entry: `Entries.delete`.)"""

    def __init__(self, session: Session, dead_letters: DeadLetters) -> None:
        self._session = session
        self._dead_letters = dead_letters

    def fair_share(self, queue: Queue, limit: int) -> int:
        """How many of the ready messages to claim, up to `limit`, so that each client that consumes the queue holds
        about the same number.
        """
        clients = len(queue.clients)
        if clients < 2:
            return limit
        session = self._session
        held: dict[int, int] = {
            client: session.sql(COUNT_OWNED, client, queue.id).fetchone()[0] for client in queue.clients
        }
        mine, all_held = held.get(session.client, 0), sum(held.values())
        # With this many ready messages, this client's share is the limit: no need to count more.
        enough = max(0, clients * (mine + limit) - all_held)
        ready: int = session.sql(COUNT_SOME_READY, queue.id, enough).fetchone()[0]
        return min(limit, max(0, math.ceil((all_held + ready) / clients) - mine))

    def claim(self, queue: Queue, limit: int, *, settled: bool = False, room: float = CLAIM_BYTES) -> list[Claim]:
        """Take the oldest ready messages, up to `limit`, and up to the one that fills `room` (bytes).

        Args:
            settled: delete them from the queue, as for a consumer with `no_ack`.
        """
        session = self._session
        claims: list[Claim] = []
        size = 0
        cursor = session.sql(READY, queue.id, min(limit, CLAIM_MESSAGES))
        for row in cursor:
            claims.append(Claim(*row))
            size += len(row[5])
            if size >= min(room, CLAIM_BYTES):
                break
        cursor.close()
        if claims and settled:
            session.sql(DROP_READY, queue.id, claims[-1].id)
        elif claims:
            session.sql(OWN_READY, session.client, queue.id, claims[-1].id)
        return claims

    def requeue(self, entries: Sequence[int]) -> None:
        """Return messages to their old places. Dead-letter those over the queue's delivery limit."""
        session = self._session
        for id in entries:
            row = session.sql("SELECT queue, returns, expires FROM entries WHERE id = ?", id).fetchone()
            if row is None:  # its queue was deleted
                continue
            queue = session.topology.queues_by_id[row[0]]
            session.sql(REQUEUE, id)
            session.to_wake |= queue.clients
            if queue.delivery_limit is not None and row[1] + 1 > queue.delivery_limit:
                self._dead_letters.dead_letter(id, queue, "delivery_limit")
            elif row[2] is not None:
                session.wake_everyone = True

    def reject(self, entries: Sequence[int]) -> None:
        """Dead-letter messages."""
        for id in entries:
            row = self._session.sql("SELECT queue FROM entries WHERE id = ?", id).fetchone()
            if row is not None:
                self._dead_letters.dead_letter(id, self._session.topology.queues_by_id[row[0]], "rejected")
