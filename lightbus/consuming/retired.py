"""Channels on which nothing more arrives, and that stay open until what arrived on them is settled: a delivery tag is
valid on its own channel only.
"""

from __future__ import annotations

from collections.abc import Iterator

from lightbus.transport import Channel, Delivery

MOST = 3
"""Of one queue; of more, the oldest is closed, and its deliveries come again."""


class RetiredChannels:
    """The open channels of one queue that a fault has replaced. Owned by the reader of the connection."""

    def __init__(self) -> None:
        self._unsettled: dict[Channel, int] = {}

    def __iter__(self) -> Iterator[Channel]:
        return iter(self._unsettled)

    def __len__(self) -> int:
        return len(self._unsettled)

    def add(self, channel: Channel, unsettled: int) -> None:
        """This channel has so many deliveries left to settle."""
        self._unsettled[channel] = unsettled

    def settle(self, delivery: Delivery, accepted: bool) -> bool:
        """Ack or reject a delivery of a retired channel. Returns whether it was the last one of its channel."""
        channel = delivery.channel
        left = self._unsettled.get(channel)
        if not left:
            return False  # its channel has ended: the broker delivers it again
        if accepted:
            channel.basic_ack(delivery.delivery_tag)
        else:
            channel.basic_reject(delivery.delivery_tag, requeue=False)
        self._unsettled[channel] = left - 1
        return left == 1

    def closable(self) -> list[Channel]:
        """The channels without unsettled deliveries, and the oldest ones where there are more than `MOST`."""
        settled = [channel for channel, left in self._unsettled.items() if not left]
        others = [channel for channel in self._unsettled if channel not in settled]
        return settled + others[: max(0, len(others) - MOST)]

    def forget(self, channel: Channel) -> None:
        """This one is closed."""
        self._unsettled.pop(channel, None)

    def clear(self) -> None:
        """The connection has ended, and every channel with it."""
        self._unsettled.clear()
