"""Exchanges, queues and bindings of the embedded broker, and which queues a message goes to."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any

import attrs

from lightbus.pattern import topic_matches
from lightbus.transport.sqlite.answers import Arguments, Kind, same
from lightbus.transport.sqlite.schema import CACHED_ROUTES, STREAM_LENGTH
from lightbus.transport.sqlite.tables import decode_table


@attrs.define(eq=False)
class Queue:
    id: int
    name: str
    durable: bool
    exclusive_to: int | None
    auto_delete: bool
    arguments: dict[str, Any]
    clients: set[int] = attrs.Factory(set)  # that consume from it

    ttl: float | None = None
    dead_letter_exchange: str | None = None
    dead_letter_routing_key: str | None = None
    keeps_dead_letters: bool = False
    max_length: int | None = None
    refuses_overflow: bool = False
    delivery_limit: int | None = None
    is_stream: bool = False

    def __attrs_post_init__(self) -> None:
        get = self.arguments.get
        ttl = get("x-message-ttl")
        self.ttl = None if ttl is None else ttl / 1000
        self.dead_letter_exchange = get("x-dead-letter-exchange")
        self.dead_letter_routing_key = get("x-dead-letter-routing-key")
        self.keeps_dead_letters = get("x-dead-letter-strategy") == "at-least-once"
        self.max_length = get("x-max-length")
        self.refuses_overflow = get("x-overflow") in ("reject-publish", "reject-publish-dlx")
        limit = get("x-delivery-limit")
        self.delivery_limit = limit if limit is not None and limit >= 0 else None
        self.is_stream = get("x-queue-type") == "stream"
        if self.is_stream:
            self.max_length = STREAM_LENGTH
            self.ttl = _seconds_of(get("x-max-age"))


_UNITS = {"s": 1, "m": 60, "h": 3600, "D": 86400, "M": 2592000, "Y": 31536000}


def _seconds_of(age: object) -> float | None:
    """RabbitMQ's `x-max-age`: "90D"."""
    return None if not isinstance(age, str) else int(age[:-1]) * float(_UNITS[age[-1]])


@attrs.define(eq=False)
class Exchange:
    name: str
    type: str
    durable: bool
    auto_delete: bool
    internal: bool
    arguments: dict[str, Any]
    bindings: list[Binding] = attrs.Factory(list)


@attrs.define(eq=False)
class Binding:
    kind: Kind
    destination: str
    routing_key: str
    arguments: dict[str, Any]


class Topology:
    """What is declared, as read from the file at one moment. Routes without SQL."""

    def __init__(self, exchanges: dict[str, Exchange], queues: dict[str, Queue]) -> None:
        self.exchanges = exchanges
        self.queues = queues
        self.queues_by_id = {queue.id: queue for queue in queues.values()}
        self._routes: dict[tuple[str, str], list[Queue]] = {}

    def route(self, exchange: str, routing_key: str, headers: Arguments) -> list[Queue]:
        """The queues that get the message, each once, even if several bindings lead there."""
        known = self._routes.get((exchange, routing_key))
        if known is not None:
            return known
        route, by_headers = self._walk(exchange, routing_key, headers)
        if not by_headers and len(self._routes) < CACHED_ROUTES:
            self._routes[exchange, routing_key] = route
        return route

    def _walk(self, start: str, routing_key: str, headers: Arguments) -> tuple[list[Queue], bool]:
        if start == "":
            queue = self.queues.get(routing_key)
            return ([queue] if queue else []), False
        queues: dict[str, Queue] = {}
        seen, ahead = {start}, [start]
        by_headers = False
        while ahead:
            exchange = self.exchanges.get(ahead.pop())
            if exchange is None:
                continue
            by_headers = by_headers or exchange.type == "headers"
            for kind, name in self._next(exchange, routing_key, headers):
                if kind == "queue":
                    queues[name] = self.queues[name]
                elif name not in seen:
                    seen.add(name)
                    ahead.append(name)
        return list(queues.values()), by_headers

    def _next(self, exchange: Exchange, routing_key: str, headers: Arguments) -> set[tuple[Kind, str]]:
        match = MATCHES[exchange.type]
        found: set[tuple[Kind, str]] = {
            (b.kind, b.destination) for b in exchange.bindings if match(b, routing_key, headers)
        }
        alternate = exchange.arguments.get("alternate-exchange")
        if not found and alternate is not None:
            return {("exchange", alternate)}
        return found


def load_topology(sql: Callable[..., sqlite3.Cursor]) -> Topology:
    """Read what is declared.

    Args:
        sql: executes a statement.
    """
    exchanges = {
        name: Exchange(name, kind, bool(durable), bool(auto_delete), bool(internal), decode_table(arguments))
        for name, kind, durable, auto_delete, internal, arguments in sql("SELECT * FROM exchanges")
    }
    queues = {
        name: Queue(id, name, bool(durable), owner, bool(auto_delete), decode_table(arguments))
        for id, name, durable, owner, auto_delete, arguments in sql("SELECT * FROM queues")
    }
    for source, kind, destination, routing_key, arguments in sql("SELECT * FROM bindings"):
        exchanges[source].bindings.append(Binding(kind, destination, routing_key, decode_table(arguments)))
    topology = Topology(exchanges, queues)
    for client, queue in sql("SELECT client, queue FROM consumers"):
        topology.queues_by_id[queue].clients.add(client)
    return topology


def _headers_match(binding: Binding, _: str, headers: Arguments) -> bool:
    mode = binding.arguments.get("x-match", "all")
    wanted = {k: v for k, v in binding.arguments.items() if not k.startswith("x-") or (mode.endswith("-with-x"))}
    wanted.pop("x-match", None)
    hits = (key in headers and (value is None or same(value, headers[key])) for key, value in wanted.items())
    return any(hits) if mode.startswith("any") else all(hits)


MATCHES: dict[str, Callable[[Binding, str, Arguments], bool]] = {
    "direct": lambda binding, key, _: binding.routing_key == key,
    "topic": lambda binding, key, _: topic_matches(binding.routing_key, key),
    "fanout": lambda binding, key, _: True,
    "headers": _headers_match,
}
