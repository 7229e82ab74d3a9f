"""Messages in queues: one row (an entry) for each message in each queue, and the queues' length limits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import attrs

from lightbus.transport import Properties
from lightbus.transport.sqlite.answers import precondition_failed
from lightbus.transport.sqlite.schema import (
    ALL_READY,
    COUNT_READY,
    FIRST_PROPERTIES,
    FIRST_READY,
    INSERT_CONTENT,
    INSERT_ENTRY,
    NEXT_DUE,
)
from lightbus.transport.sqlite.session import Session
from lightbus.transport.sqlite.tables import encode_properties
from lightbus.transport.sqlite.topology import Queue


@attrs.frozen(eq=False)
class Message:
    """A message on its way into queues."""

    exchange: str
    routing_key: str
    properties: Properties
    body: bytes


@attrs.frozen(eq=False)
class Row:
    """A message in one queue, before it is stored."""

    id: int
    queue: Queue
    due: float | None
    message: Message
    data: bytes
    """The encoded properties."""


class Entries:
    """Puts messages into queues, and removes them."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def rows(self, message: Message, queues: Sequence[Queue]) -> Iterator[Row]:
        """The message as one row for each queue, to be given to `insert`.

        Raises:
            ValueError: its properties cannot be encoded.
            amqp.exceptions.PreconditionFailed: its expiration is not valid.
        """
        data = encode_properties(message.properties)
        session = self._session
        for queue in queues:
            session.last_entry += 1
            to_live = _seconds_to_live(queue, message.properties)
            due = None if to_live is None else session.now() + to_live
            yield Row(session.last_entry, queue, due, message, data)

    def insert(self, rows: Sequence[Row]) -> None:
        session = self._session
        first_due = min((row.due for row in rows if row.due is not None), default=None)
        if first_due is not None:
            session.note_clock()
            next_due = self.next_due()
            # Clients that wait may have to wake up earlier.
            session.wake_everyone = session.wake_everyone or next_due is None or first_due < next_due
        session.many(INSERT_ENTRY, [(row.id, row.queue.id, row.due, row.due) for row in rows])
        session.many(
            INSERT_CONTENT,
            [(row.id, row.message.exchange, row.message.routing_key, row.data, row.message.body) for row in rows],
        )
        for queue in {row.queue for row in rows}:
            session.to_wake |= queue.clients

    def delete(self, ids: Sequence[int]) -> None:
        """Remove messages: they were acked, or copies of them are elsewhere."""
        self._session.many("DELETE FROM entries WHERE id = ?", [(id,) for id in ids])

    def purge(self, queue: Queue) -> int:
        """Remove all ready messages of a queue, and return how many there were."""
        return self._session.sql("DELETE FROM entries WHERE queue = ? AND owner IS NULL", queue.id).rowcount

    def has_room(self, queue: Queue) -> bool:
        """Whether a queue that refuses messages over its length takes one more. Counts that one."""
        if queue.max_length is None or not queue.refuses_overflow:
            return True
        room = self._session.room
        if queue.id not in room:
            room[queue.id] = queue.max_length - self.count_ready(queue)
        room[queue.id] -= 1
        return room[queue.id] >= 0

    def count_ready(self, queue: Queue) -> int:
        return cast("int", self._session.sql(COUNT_READY, queue.id).fetchone()[0])

    def has_ready(self, queue: Queue) -> bool:
        """Whether a queue has a ready message. Outside of a transaction, too."""
        return bool(self._session.read(FIRST_READY, queue.id))

    def first_ready(self, queue: Queue) -> bytes | None:
        """The properties of the first ready message."""
        found = self._session.sql(FIRST_PROPERTIES, queue.id).fetchone()
        return None if found is None else cast("bytes", found[0])

    def all_ready(self, queue: Queue) -> list[tuple[str, str, bytes, bytes]]:
        """(exchange, routing key, properties, body) of all ready messages, the oldest first."""
        return self._session.sql(ALL_READY, queue.id).fetchall()

    def next_due(self) -> float | None:
        """In a transaction: when (by the session's `now`) the first message expires or is tried again."""
        return cast("float | None", self._session.sql(NEXT_DUE).fetchone()[0])


def _seconds_to_live(queue: Queue, properties: Properties) -> float | None:
    own = properties.get("expiration")
    if own is None:
        return queue.ttl
    try:
        seconds = int(own) / 1000
    except ValueError:
        raise precondition_failed(f"invalid expiration '{own}': no_integer") from None
    if seconds < 0:
        raise precondition_failed(f"invalid expiration '{own}': value_negative")
    return seconds if queue.ttl is None else min(seconds, queue.ttl)
