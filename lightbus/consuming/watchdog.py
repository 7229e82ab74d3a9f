"""Is a consumer stalled: subscribed, and receives nothing although events are waiting? Decided from the queue's counts.

Pure: `consumer.Consumer` asks the broker, `connection.ConsumerConnection` acts. Known cases, on RabbitMQ 3.10.8 with a
quorum queue that was deleted and declared again at once: the old consumers are never cancelled, and wait for ever; or
the new queue takes them over, and the old channel drops its first messages as ones that it has seen before. The broker
shows the latter as one consumer and nothing ready, as if all were well. So a subscription with nothing in hand also
subscribes again at each look.
"""

from __future__ import annotations

import math

INTERVAL = 30.0
"""Seconds between two looks at each queue."""
SECOND_LOOK = 2.0
"""Seconds after which a suspicion is looked at again: a message may be on its way, a queue may change its leader.
A stalled consumer is noticed within `INTERVAL + SECOND_LOOK`."""
REBUILDS = 3
"""Rebuilds in a row that did not help, after which the worker ends with an error."""


class Watch:
    """What is known of one queue's consumption, over all epochs of the connection."""

    def __init__(self, queue: str, interval: float = INTERVAL) -> None:
        self.queue = queue
        self.interval = interval
        self.next_look = math.inf
        self.rebuilds = 0
        """In a row, none of which was followed by a proof."""
        self.proven: float | None = None
        """When consumption was last proven, on the monotonic clock."""
        self.suspicion: str | None = None
        self.renewal_due = False
        """Subscribe again on a new channel as soon as nothing is in hand."""

    def subscribed(self, now: float) -> None:
        """A new epoch has begun."""
        self.next_look = now + self.interval
        self.suspicion = None
        self.renewal_due = False

    def ended(self) -> None:
        """There is no subscription until `subscribed` is called."""
        self.next_look = math.inf
        self.renewal_due = False

    def postpone(self, now: float) -> None:
        """The broker did not know: look again, and keep the suspicion."""
        self.next_look = now + min(self.interval, SECOND_LOOK)

    def look(self, now: float, *, ready: int, consumers: int, received: bool, room: bool) -> str | None:
        """Why the consumer is stalled, once two looks in a row say so; else None.

        Args:
            ready: messages that wait in the queue, and are with no consumer.
            consumers: how many the broker knows, of all workers.
            received: something has arrived here since the last look.
            room: fewer deliveries are in hand than the prefetch allows.
        """
        if consumers == 0:
            why = f"the broker lists no consumer on the queue {self.queue!r}"
        elif ready > 0 and room and not received:
            why = f"{ready} events wait in the queue {self.queue!r}, but none is delivered"
        else:
            self.suspicion = None
            self.next_look = now + self.interval
            self.renewal_due = True
            if received:
                self._prove(now)
            return None
        seen_twice, self.suspicion = self.suspicion is not None, why
        self.next_look = now + min(self.interval, SECOND_LOOK)
        return why if seen_twice else None

    def renewed(self, now: float) -> None:
        """Subscribed again after a look at which the broker knew of the consumer: whatever may have become of the old
        subscription, this one receives."""
        self.renewal_due = False
        self._prove(now)

    def _prove(self, now: float) -> None:
        self.proven = now
        self.rebuilds = 0
