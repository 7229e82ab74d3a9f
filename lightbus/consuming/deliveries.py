"""What has arrived on one channel, and how much of it the broker knows to be settled. Pure."""

from __future__ import annotations

from lightbus.consuming.acks import Settlements
from lightbus.transport import Delivery


class Deliveries:
    """The deliveries of one channel. A new channel starts with a new object, since delivery tags start at 1 again."""

    def __init__(self) -> None:
        self.arrived: list[Delivery] = []
        """Not handed over to the event loop yet."""
        self.settlements = Settlements(hold=0)
        self.large: dict[int, int] = {}
        """The sizes of large bodies in hand, by delivery tag."""
        self.returning: list[int] = []
        """The tags of deliveries that there is no room for: they go back to the queue."""
        self._taken = 0
        self._before_consumer = 0

    @property
    def count(self) -> int:
        """How many have arrived."""
        return self._taken + len(self.arrived)

    @property
    def in_hand(self) -> int:
        """How many are not settled on the broker."""
        return max(0, self.count - self.settlements.sent)

    def full(self, prefetch: int) -> bool:
        """Whether the present consumer holds all that it may, so that nothing is on its way to it."""
        before = self._before_consumer
        return self.count - before - self.settlements.sent_after(before) >= prefetch

    def begin_consumer(self) -> None:
        """A new consumer begins on the channel: what arrived before does not count for its prefetch."""
        self._before_consumer = self.count

    def take(self) -> list[Delivery]:
        """What has arrived, to be handed over."""
        batch = self.arrived[:]
        self.arrived.clear()
        self._taken += len(batch)
        return batch

    def refuse(self, delivery_tag: int) -> None:
        """It has arrived, and there is no room for its body."""
        self.returning.append(delivery_tag)
        self._taken += 1

    def end(self) -> None:
        """The channel takes no more: what was not handed over is delivered again."""
        # A new list: the channel may still append to the old one.
        self.arrived, self.large, self.returning = [], {}, []
