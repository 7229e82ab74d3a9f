"""The table itself: which broker a URL's scheme means."""

from __future__ import annotations

from lightbus.connection.brokers.artemis import ARTEMIS
from lightbus.connection.brokers.embedded import EMBEDDED
from lightbus.connection.brokers.rabbitmq import RABBITMQ
from lightbus.connection.brokers.row import Broker, Scheme

BROKERS = (RABBITMQ, ARTEMIS, EMBEDDED)

SCHEMES: dict[str, tuple[Broker, Scheme]] = {one.name: (broker, one) for broker in BROKERS for one in broker.schemes}
"""By the scheme of a URL."""


def choices() -> str:
    """`RabbitMQ (amqp:// or amqps://), ..., or the embedded broker (sqlite:// or memory://)`."""
    listed = [
        f"{broker.name} ({' or '.join(f'{one.name}://' for one in broker.schemes if not one.alias)})"
        for broker in BROKERS
    ]
    return f"{', '.join(listed[:-1])}, or {listed[-1]}"
