"""How many messages and consumers a queue has, as far as the broker knows.

RabbitMQ (verified on 3.10.8) gives the leader of a quorum queue 250 ms to answer. After that it says 0 messages and 0
consumers, which is the answer of an empty queue, too: a busy broker, or an election of a leader, looks like a queue
that nobody consumes. Only the time that the answer took tells them apart.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from lightbus.transport import Channel

LEADER_TIMEOUT = 0.24
"""Seconds. RabbitMQ waits 250 ms for the leader; the clocks of two programs need not agree to the millisecond."""
TRIES = 4
"""How often a command asks before it takes 0 for an answer. A distant broker needs 250 ms for each answer, too."""


class Counts(NamedTuple):
    """What the broker answered about a queue."""

    ready: int
    """Messages that wait in the queue, and are with no consumer."""
    consumers: int
    """Of all connections."""
    known: bool
    """False if both are 0 because the queue may not have answered."""


def queue_counts(channel: Channel, queue: str, *, tries: int = 1) -> Counts:
    """Ask the broker, up to `tries` times if the queue may not have answered.

    Raises:
        amqp.exceptions.NotFound: there is no such queue. The channel is closed.
    """
    while True:
        began = time.monotonic()
        _, ready, consumers = channel.queue_declare(queue, passive=True)
        known = ready > 0 or consumers > 0 or time.monotonic() - began < LEADER_TIMEOUT
        tries -= 1
        if known or tries <= 0:
            return Counts(int(ready), int(consumers), known)
