"""Expiry and dead-lettering: what moves a message on without a consumer."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, cast

from lightbus.transport.sqlite.answers import Arguments
from lightbus.transport.sqlite.entries import Entries, Message, Row
from lightbus.transport.sqlite.schema import CONTENT, DUE, EXPIRE_BATCH, HELD, HOLD, MAKE_DUE, NEXT_DUE, RETRY_HELD
from lightbus.transport.sqlite.session import Session
from lightbus.transport.sqlite.tables import decode_table
from lightbus.transport.sqlite.topology import Queue


class DeadLetters:
    """Dead-letters messages that expired, were rejected, came back too often or are too many for their queue."""

    def __init__(self, session: Session, entries: Entries) -> None:
        self._session = session
        self._entries = entries

    # --- expiry ---------------------------------------------------------------------------

    def next_due(self) -> float | None:
        """When (by the session's `now`) the first message expires or is tried again. Outside of a transaction."""
        return cast("float | None", self._session.read(NEXT_DUE)[0][0])

    def expire(self) -> bool:
        """Dead-letter what is due, up to a limit. False: more is due, for another transaction."""
        session = self._session
        due = session.sql(DUE, session.now(), EXPIRE_BATCH).fetchall()
        for id, queue, held_for in due:
            self.dead_letter(id, session.topology.queues_by_id[queue], held_for or "expired")
        return len(due) < EXPIRE_BATCH

    def make_due(self, queues: Sequence[str], until: float) -> None:
        """Let messages of these queues that would expire until then (by `now`) expire now."""
        session = self._session
        with session.transaction():
            known = session.topology.queues
            session.many(MAKE_DUE, [(session.now(), known[name].id, until) for name in queues if name in known])
            session.wake_everyone = True

    # --- dead-lettering -------------------------------------------------------------------

    def dead_letter(self, id: int, queue: Queue, reason: str) -> None:
        """Move a message to its queue's dead-letter exchange. Without one, delete it."""
        if queue.dead_letter_exchange is None:
            self._entries.delete([id])
            return
        dead = self._dead_copy(id, queue, reason)
        targets = self._session.topology.route(dead.exchange, dead.routing_key, dead.properties["headers"])
        rows = list(self._entries.rows(dead, _outside_cycles(targets, dead, reason)))
        full = [row for row in rows if not self._entries.has_room(row.queue)]
        if queue.keeps_dead_letters and (full or not targets):
            self._hold(id, reason)
            return
        kept = [row for row in rows if row not in full]
        self._entries.insert(kept)
        self._entries.delete([id])
        self.trim(kept)

    def trim(self, rows: Sequence[Row]) -> None:
        """After an insert of these rows: dead-letter the oldest messages of queues that are over their length."""
        for queue in {row.queue for row in rows if row.queue.max_length is not None}:
            excess = self._entries.count_ready(queue) - (queue.max_length or 0)
            if excess > 0 and not queue.refuses_overflow:
                oldest = "SELECT id FROM entries WHERE queue = ? AND owner IS NULL ORDER BY id LIMIT ?"
                for (id,) in self._session.sql(oldest, queue.id, excess).fetchall():
                    self.dead_letter(id, queue, "maxlen")

    def _hold(self, id: int, reason: str) -> None:
        """Hold a message back that no queue takes now. It blocks no message behind it, and is tried again later."""
        shortest, longest = RETRY_HELD
        times = {"now": self._session.now(), "shortest": shortest, "longest": longest}
        self._session.sql_named(HOLD, {"held": HELD, "reason": reason, "id": id, **times})
        self._session.wake_everyone = True

    def release_held(self) -> None:
        """Try the held messages again: a queue or a binding was added."""
        session = self._session
        if session.sql("UPDATE entries SET due = ? WHERE owner = ?", session.now(), HELD).rowcount:
            session.wake_everyone = True

    def _dead_copy(self, id: int, queue: Queue, reason: str) -> Message:
        exchange, routing_key, data, body = self._session.sql(CONTENT, id).fetchone()
        properties = decode_table(data)
        expiration = properties.pop("expiration", None)
        death: dict[str, Any] = {
            "count": 1,
            "reason": reason,
            "queue": queue.name,
            "time": datetime.fromtimestamp(self._session.wall_clock(), tz=UTC),
            "exchange": exchange,
            "routing-keys": [routing_key],
        }
        if expiration is not None:
            death["original-expiration"] = expiration
        properties["headers"] = _with_death(properties.get("headers") or {}, death)
        new_key = queue.dead_letter_routing_key
        return Message(queue.dead_letter_exchange or "", routing_key if new_key is None else new_key, properties, body)


def _with_death(headers: Arguments, death: dict[str, Any]) -> dict[str, Any]:
    """The headers with RabbitMQ's `x-death`: the new death first. A death of the same queue and reason is counted."""
    earlier = list(headers.get("x-death") or [])
    for known in earlier:
        if (known.get("queue"), known.get("reason")) == (death["queue"], death["reason"]):
            earlier.remove(known)
            death = known | {"count": known.get("count", 1) + 1}
            break
    first = {f"x-first-death-{what}": death[what] for what in ("reason", "queue", "exchange")}
    last = {f"x-last-death-{what}": death[what] for what in ("reason", "queue", "exchange")}
    return {**first, **headers, **last, "x-death": [death, *earlier]}


def _outside_cycles(queues: Sequence[Queue], message: Message, reason: str) -> list[Queue]:
    """Leave out queues that the message has been in since its last rejection, as RabbitMQ does. Otherwise it would be
    dead-lettered in a circle for ever."""
    if reason == "rejected":
        return list(queues)
    deaths = message.properties["headers"]["x-death"]
    return [queue for queue in queues if not _is_cycle(queue.name, deaths)]


def _is_cycle(queue: str, deaths: Sequence[Arguments]) -> bool:
    at = next((index for index, death in enumerate(deaths) if death.get("queue") == queue), None)
    return at is not None and all(death.get("reason") != "rejected" for death in deaths[: at + 1])
