"""Declare exchanges, queues and bindings on the broker, from the pure values of `wire.topology`."""

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

SLIPS = 60
"""Names at most that are tried in place of one that may have a typing error."""


def declare(connection: Connection, wanted: Topology) -> None:
    """Declare all of it; what is there already and equal stays as it is.

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
    if exchange.internal:  # which kombu's entity knows nothing of
        channel.exchange_declare(exchange.name, exchange.type, passive, durable=True, auto_delete=False, internal=True)
    else:
        entity = kombu.entity.Exchange(exchange.name, exchange.type, durable=True, arguments=exchange.arguments)
        entity.declare(passive=passive, channel=channel)


def _declare_shared(connection: Connection, exchange: Exchange) -> None:
    """Passively first: a user with few permissions may use others' exchanges, but not declare them.

    Raises:
        errors.TopologyMissing: another app's is not there, and is not ours to declare. It comes when that app starts.
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
    """An exchange that is there, and may be what was meant by this name: the same but for one slip of the hand.

    AMQP cannot list exchanges, so each of the few is asked for.
    """
    slips = [name[:at] + name[at + 1] + name[at] + name[at + 2 :] for at in range(len(name) - 1)]
    slips += [name[:at] + name[at + 1 :] for at in range(len(name))]
    slips += [name[:at] + name[at] + name[at:] for at in range(len(name))] + [f"{name}s"]
    slips += [name.replace("_", "-"), name.replace("-", "_")]
    likely = [slip for slip in dict.fromkeys(slips) if slip not in ("", name, BUS)]
    return next((slip for slip in likely[:SLIPS] if exchange_exists(connection, slip)), None)
