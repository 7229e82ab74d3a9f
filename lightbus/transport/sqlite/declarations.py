"""What clients declare: exchanges, queues, bindings and consumers, and RabbitMQ's rules for each."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from amqp import exceptions as amqp_errors

from lightbus.transport.kombu_calls import amqp_error
from lightbus.transport.sqlite.answers import (
    Arguments,
    Kind,
    access_refused,
    assert_same,
    check_queue_arguments,
    not_found,
    precondition_failed,
    resource_locked,
)
from lightbus.transport.sqlite.dead_letters import DeadLetters
from lightbus.transport.sqlite.entries import Entries
from lightbus.transport.sqlite.schema import PREDECLARED
from lightbus.transport.sqlite.session import Session
from lightbus.transport.sqlite.tables import encode_arguments
from lightbus.transport.sqlite.topology import MATCHES, Exchange, Queue


class Declarations:
    """Declares and deletes, inside the session's transaction.

    All methods raise `amqp.exceptions` with RabbitMQ's messages.
    """

    def __init__(self, session: Session, entries: Entries, dead_letters: DeadLetters) -> None:
        self._session = session
        self._entries = entries
        self._dead_letters = dead_letters

    # --- exchanges ------------------------------------------------------------------------

    def exchange(self, name: str) -> Exchange:
        try:
            return self._session.topology.exchanges[name]
        except KeyError:
            raise not_found("exchange", name) from None

    def declare_exchange(self, wanted: Exchange) -> None:
        current = self._session.topology.exchanges.get(wanted.name)
        if current is not None:
            assert_same("exchange", wanted.name, _exchange_facts(current), _exchange_facts(wanted))
            return
        if wanted.name.startswith("amq."):
            raise access_refused(f"exchange name '{wanted.name}' contains reserved prefix 'amq.*'")
        if wanted.type not in MATCHES:
            raise amqp_error(amqp_errors.InvalidCommand, f"COMMAND_INVALID - unknown exchange type '{wanted.type}'")
        self._session.sql(
            "INSERT INTO exchanges VALUES (?, ?, ?, ?, ?, ?)",
            wanted.name,
            wanted.type,
            wanted.durable,
            wanted.auto_delete,
            wanted.internal,
            encode_arguments(wanted.arguments),
        )
        self._session.topology_changed()

    def delete_exchange(self, name: str, if_unused: bool) -> None:
        exchange = self._session.topology.exchanges.get(name)
        if name == "" or name in PREDECLARED:
            raise access_refused(f"operation not permitted on the exchange '{name}'")
        if exchange is None:
            return
        if if_unused and exchange.bindings:
            raise precondition_failed(f"exchange '{name}' in vhost '/' in use")
        self._session.sql("DELETE FROM exchanges WHERE name = ?", name)
        self._session.sql("DELETE FROM bindings WHERE source = ?", name)
        self._unbind_destination("exchange", name)
        self._session.topology_changed()

    # --- bindings -------------------------------------------------------------------------

    def bind(self, kind: Kind, destination: str, source: str, routing_key: str, arguments: Arguments | None) -> None:
        if source == "" or (kind == "exchange" and destination == ""):
            raise access_refused("operation not permitted on the default exchange")
        if kind == "queue":
            self.queue(destination)
        else:
            self.exchange(destination)
        self.exchange(source)
        row = (source, kind, destination, routing_key, encode_arguments(arguments))
        if self._session.sql("INSERT OR IGNORE INTO bindings VALUES (?, ?, ?, ?, ?)", *row).rowcount:
            self._session.topology_changed()
            self._dead_letters.release_held()

    def unbind(self, kind: Kind, destination: str, source: str, routing_key: str, arguments: Arguments | None) -> None:
        row = (source, kind, destination, routing_key, encode_arguments(arguments))
        where = "source = ? AND kind = ? AND destination = ? AND routing_key = ? AND arguments = ?"
        if self._session.sql(f"DELETE FROM bindings WHERE {where}", *row).rowcount:
            self._remove_unused_exchanges([source])
            self._session.topology_changed()

    def _unbind_destination(self, kind: Kind, name: str) -> None:
        sql, where = self._session.sql, "kind = ? AND destination = ?"
        sources = [row[0] for row in sql(f"SELECT DISTINCT source FROM bindings WHERE {where}", kind, name)]
        sql(f"DELETE FROM bindings WHERE {where}", kind, name)
        self._remove_unused_exchanges(sources)

    def _remove_unused_exchanges(self, names: Sequence[str]) -> None:
        for name in names:
            unused = """auto_delete AND NOT EXISTS (SELECT 1 FROM bindings WHERE source = name)"""
            if self._session.sql(f"DELETE FROM exchanges WHERE name = ? AND {unused}", name).rowcount:
                self._unbind_destination("exchange", name)

    # --- queues ---------------------------------------------------------------------------

    def queue(self, name: str) -> Queue:
        """The queue, if this client may use it."""
        try:
            queue = self._session.topology.queues[name]
        except KeyError:
            raise not_found("queue", name) from None
        if queue.exclusive_to not in (None, self._session.client):
            raise resource_locked(name)
        return queue

    def declare_queue(self, name: str, durable: bool, exclusive: bool, auto_delete: bool, arguments: Arguments) -> str:
        """Declare a queue and return its name: a new one for ""."""
        name = name or f"amq.gen-{uuid.uuid4().hex}"
        owner = self._session.client if exclusive else None
        check_queue_arguments(name, arguments)
        wanted = Queue(0, name, durable, owner, auto_delete, dict(arguments))
        if name in self._session.topology.queues:
            current = self.queue(name)
            if exclusive and current.exclusive_to is None:
                raise resource_locked(name)
            assert_same("queue", name, _queue_facts(current), _queue_facts(wanted))
            return name
        self._session.sql(
            "INSERT INTO queues (name, durable, exclusive_to, auto_delete, arguments) VALUES (?, ?, ?, ?, ?)",
            name,
            durable,
            owner,
            auto_delete,
            encode_arguments(arguments),
        )
        self._session.topology_changed()
        self._dead_letters.release_held()
        return name

    def count(self, queue: Queue) -> tuple[int, int]:
        """(ready messages, consumers)"""
        ready = self._entries.count_ready(queue)
        consumers = self._session.sql("SELECT count(*) FROM consumers WHERE queue = ?", queue.id).fetchone()[0]
        return ready, consumers

    def delete_queue(self, name: str, if_unused: bool, if_empty: bool) -> int:
        """Delete a queue, and return how many ready messages it had. 0 for an unknown queue."""
        if name not in self._session.topology.queues:
            return 0
        queue = self.queue(name)
        ready, consumers = self.count(queue)
        if if_unused and consumers:
            raise precondition_failed(f"queue '{name}' in vhost '/' in use")
        if if_empty and ready:
            raise precondition_failed(f"queue '{name}' in vhost '/' is not empty")
        self.remove_queue(queue)
        return ready

    def remove_queue(self, queue: Queue) -> None:
        """Delete a queue, whatever it holds."""
        session = self._session
        session.to_wake |= queue.clients  # they cancel its consumers
        session.sql("DELETE FROM queues WHERE id = ?", queue.id)
        session.sql("DELETE FROM consumers WHERE queue = ?", queue.id)
        session.sql("DELETE FROM entries WHERE queue = ?", queue.id)
        self._unbind_destination("queue", queue.name)
        session.topology_changed()

    # --- consumers ------------------------------------------------------------------------

    def add_consumer(self, tag: str, queue: Queue, exclusive: bool) -> None:
        others = self._session.sql("SELECT exclusive FROM consumers WHERE queue = ?", queue.id).fetchall()
        if (exclusive and others) or any(other for (other,) in others):
            raise access_refused(f"queue '{queue.name}' in vhost '/' in exclusive use")
        self._session.sql("INSERT INTO consumers VALUES (?, ?, ?, ?)", self._session.client, tag, queue.id, exclusive)
        self._session.topology_changed()

    def remove_consumer(self, tag: str, *, client: int | None = None) -> None:
        """Remove a consumer of a client: of this one unless `client` is given.

        An auto-delete queue is deleted with its last consumer.
        """
        session = self._session
        client = session.client if client is None else client
        row = session.sql("SELECT queue FROM consumers WHERE client = ? AND tag = ?", client, tag).fetchone()
        if row is None:
            return
        session.sql("DELETE FROM consumers WHERE client = ? AND tag = ?", client, tag)
        queue = session.topology.queues_by_id[row[0]]
        if queue.auto_delete and self.count(queue)[1] == 0:
            self.remove_queue(queue)
        else:
            session.topology_changed()


def _exchange_facts(exchange: Exchange) -> dict[str, Any]:
    facts = {name: getattr(exchange, name) for name in ("type", "durable", "auto_delete", "internal")}
    checked = {k: v for k, v in exchange.arguments.items() if k == "alternate-exchange"}
    return facts | checked


_CHECKED = frozenset(
    {
        "x-dead-letter-exchange",
        "x-dead-letter-routing-key",
        "x-dead-letter-strategy",
        "x-delivery-limit",
        "x-expires",
        "x-max-length",
        "x-max-length-bytes",
        "x-message-ttl",
        "x-overflow",
        "x-queue-type",
    }
)


def _queue_facts(queue: Queue) -> dict[str, Any]:
    facts = {"durable": queue.durable, "exclusive": queue.exclusive_to is not None, "auto_delete": queue.auto_delete}
    return facts | {k: v for k, v in queue.arguments.items() if k in _CHECKED}
