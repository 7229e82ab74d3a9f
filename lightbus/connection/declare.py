"""Declare exchanges, queues and bindings on the broker, as described by `wire.topology`."""

# kombu has no types:
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import logging

import amqp.exceptions
import kombu.entity

from lightbus import errors
from lightbus.transport import Channel, Connection
from lightbus.wire.topology import BUS, Exchange, Topology

logger = logging.getLogger("lightbus")

CANDIDATES = 60
"""Names at most that are tried when a name may have a typo."""


def declare(connection: Connection, wanted: Topology) -> None:
    """Declare all of it. What exists with the same arguments stays as it is.

    Raises:
        amqp.exceptions.PreconditionFailed: something exists with other arguments.
        amqp.exceptions.AccessRefused: a permission is missing.
    """
    for exchange in wanted.shared:
        _declare_shared(connection, exchange)
    channel = connection.channel()
    for exchange in wanted.exchanges:
        _declare_exchange(channel, exchange)
    for queue in wanted.queues:
        kombu.entity.Queue(queue.name, durable=True, queue_arguments=queue.arguments).queue_declare(channel=channel)
    for binding in wanted.bindings:
        bind = channel.queue_bind if binding.to_queue else channel.exchange_bind
        bind(binding.destination, binding.source, binding.key, arguments=binding.arguments)
    channel.close()


def _declare_exchange(channel: Channel, exchange: Exchange, *, passive: bool = False) -> None:
    if exchange.internal:  # kombu's entity does not support that
        channel.exchange_declare(exchange.name, exchange.type, passive, durable=True, auto_delete=False, internal=True)
    else:
        entity = kombu.entity.Exchange(exchange.name, exchange.type, durable=True, arguments=exchange.arguments)
        entity.declare(passive=passive, channel=channel)


def _declare_shared(connection: Connection, exchange: Exchange) -> None:
    """Declare it passively first: a user may have permission to use another app's exchange, but not to declare it.

    Raises:
        errors.TopologyMissing: another app's exchange does not exist, and this user may not declare it.
    """
    probe = connection.channel()
    try:
        _declare_exchange(probe, exchange, passive=True)
    except amqp.exceptions.NotFound:
        channel = connection.channel()
        try:
            _declare_exchange(channel, exchange)
        except amqp.exceptions.AccessRefused as error:
            if exchange.internal:
                raise
            raise errors.TopologyMissing(
                f"The exchange {exchange.name!r}, which a handler names with source=, does not exist, and this user "
                f"may not declare it. Check the app's name. The exchange is created when {exchange.name!r} first "
                "starts."
            ) from error
        channel.close()
        if not exchange.internal:
            near = near_exchange(connection, exchange.name)
            logger.warning(
                "No app %r has run on this broker yet: a handler names it with source=, and nothing arrives until it "
                "publishes. %s",
                exchange.name,
                f"Did you mean {near!r}, which exists?" if near else "Is it the right name?",
            )
    else:
        probe.close()


def exchange_exists(connection: Connection, name: str) -> bool:
    channel = connection.channel()
    try:
        channel.exchange_declare(name, "topic", passive=True)
    except amqp.exceptions.NotFound:
        return False
    channel.close()
    return True


def near_exchange(connection: Connection, name: str) -> str | None:
    """An existing exchange whose name differs from this one by a single typo.

    AMQP cannot list exchanges, so each likely name is tried.
    """
    candidates = [name[:at] + name[at + 1] + name[at] + name[at + 2 :] for at in range(len(name) - 1)]
    candidates += [name[:at] + name[at + 1 :] for at in range(len(name))]
    candidates += [name[:at] + name[at] + name[at:] for at in range(len(name))] + [f"{name}s"]
    candidates += [name.replace("_", "-"), name.replace("-", "_")]
    likely = [candidate for candidate in dict.fromkeys(candidates) if candidate not in ("", name, BUS)]
    return next((candidate for candidate in likely[:CANDIDATES] if exchange_exists(connection, candidate)), None)
