"""The addresses on Artemis of an app's exchanges and queues. Pure.

AMQP 1.0 has no exchanges. An app publishes to the address `lightbus.exchange.<app>`, and the broker diverts all of
these addresses to `lightbus.bus`, where each queue has a selector. The broker notes the address that a message came
from in an annotation that no client can write (`ORIG_ADDRESS`): it proves the source of an event.
"""

from __future__ import annotations

import re

BUS = "lightbus"
"""The bus exchange."""
BUS_ADDRESS = "lightbus.bus"
"""All events arrive here. Its queues are those that apps consume."""
DEAD_ADDRESS = "lightbus.dead"
"""The broker's dead letters of `BUS_ADDRESS` arrive here. Its queues are the apps' dead-letter queues."""
CATALOG = "lightbus.catalog"
"""The address, and its only queue, of the apps' contracts."""
EXCHANGES = "lightbus.exchange."
"""Followed by an app's name: where it publishes events."""
DELAYS = "lightbus.delay."
"""Followed by an app's name: where its delayed events wait. What expires there arrives on `BUS_ADDRESS`."""
CONTRACTS = "lightbus.contract."
"""Followed by an app's name: where it publishes its contract. The broker diverts these addresses to `CATALOG`."""
REPLIES = "lightbus.reply."
"""Followed by a user's name and more: where the broker answers its management requests."""
MANAGEMENT = "activemq.management"

ORIG_ADDRESS = "x-opt-ORIG-ADDRESS"
ORIG_QUEUE = "x-opt-ORIG-QUEUE"
DELAY = "x-opt-delivery-delay"
"""Milliseconds after which the broker delivers a message."""

INTERNAL = ".internal"
DEAD = "dead"
CONTRACT = "contract"

_RETRY = re.compile(r"(?:(?P<suffix>.+)\.)?retry\.(?P<count>[0-9]+)(?P<unit>m?s)")
_DELAYING = re.compile(r"(?P<app>[^.]+)\.delay\.(?:[0-9]+|due|unheard)")


def exchange_address(exchange: str) -> str:
    return EXCHANGES + exchange


def queue_address(queue: str) -> str:
    """The fully qualified name of a queue: `address::queue`."""
    if queue == CATALOG:
        return f"{CATALOG}::{CATALOG}"
    address = DEAD_ADDRESS if queue.endswith(f".{DEAD}") else BUS_ADDRESS
    return f"{address}::{queue}"


def is_queue(address: str) -> bool:
    """Whether an address names a queue, and not an exchange."""
    return "::" in address


def reply_address(user: str) -> str:
    """The beginning of the addresses of answers to a user. Only this user may read and write there."""
    return REPLIES + re.sub(r"[^A-Za-z0-9_-]", lambda found: f"%{ord(found[0]):X}", user)


def source_of(address: str) -> str | None:
    """The exchange that a message was published to, from the address that the broker noted; None for an address of
    other programs."""
    for prefix in (EXCHANGES, DELAYS):
        if address.startswith(prefix):
            return address[len(prefix) :]
    if address.startswith(CONTRACTS):
        return address[len(CONTRACTS) :] + INTERNAL
    return None


def retry_of(key: str) -> tuple[str, int] | None:
    """The queue's suffix and the delay in milliseconds, from the routing key of a retry; None for other keys."""
    found = _RETRY.fullmatch(key)
    if found is None:
        return None
    return found["suffix"] or "main", int(found["count"]) * (1 if found["unit"] == "ms" else 1000)


def retry_queue_of(queue: str) -> tuple[str, int] | None:
    """`billing.retry.5s` -> (`billing.main`, 5000): RabbitMQ has a queue of this name; Artemis holds such a message in
    the queue itself. None for other queues."""
    app, _, key = queue.partition(".")
    found = retry_of(key)
    return None if found is None else (f"{app}.{found[0]}", found[1])


def delaying_app(name: str) -> str | None:
    """The app of an exchange or queue of delayed publishing (`billing.delay.3`); None for other names."""
    found = _DELAYING.fullmatch(name)
    return None if found is None else found["app"]
