"""How many deliveries of a channel are in hand."""

from __future__ import annotations

from typing import cast

from lightbus.consuming.deliveries import Deliveries
from lightbus.consuming.retired import MOST, RetiredChannels
from lightbus.transport import Channel, Delivery


def arrive(deliveries: Deliveries, *tags: int) -> None:
    channel = cast(Channel, None)
    deliveries.arrived.extend(Delivery(channel, tag, False, "", "", {}, b"") for tag in tags)


def settle(deliveries: Deliveries, *tags: int) -> None:
    deliveries.settlements.settle(tags)
    deliveries.settlements.take(all_of_them=True)


def test_a_delivery_is_in_hand_from_its_arrival_to_its_ack() -> None:
    deliveries = Deliveries()
    arrive(deliveries, 1, 2, 3)
    assert deliveries.in_hand == 3
    assert len(deliveries.take()) == 3
    assert deliveries.arrived == []
    assert deliveries.in_hand == 3
    settle(deliveries, 1, 3)
    assert deliveries.in_hand == 1


def test_a_consumer_is_full_by_what_arrived_since_it_began() -> None:
    deliveries = Deliveries()
    arrive(deliveries, 1, 2)
    assert deliveries.full(2)
    deliveries.begin_consumer()
    assert not deliveries.full(2)
    arrive(deliveries, 3, 4)
    assert deliveries.full(2)
    settle(deliveries, 1)  # of the consumer before
    assert deliveries.full(2)
    settle(deliveries, 4)
    assert not deliveries.full(2)


def test_a_refused_body_counts_as_in_hand_until_it_is_returned() -> None:
    deliveries = Deliveries()
    arrive(deliveries, 1)
    deliveries.take()
    deliveries.refuse(2)
    assert (deliveries.in_hand, deliveries.returning) == (2, [2])
    deliveries.settlements.already_sent(2)
    assert deliveries.in_hand == 1


def test_what_a_closed_channel_still_appends_goes_nowhere() -> None:
    deliveries = Deliveries()
    append = deliveries.arrived.append
    deliveries.end()
    append(Delivery(cast(Channel, None), 1, False, "", "", {}, b""))
    assert deliveries.take() == []


class Settled:
    """A channel that notes what is settled on it."""

    def __init__(self) -> None:
        self.done: list[object] = []

    def basic_ack(self, delivery_tag: int, multiple: bool = False) -> None:
        self.done.append(delivery_tag)

    def basic_reject(self, delivery_tag: int, *, requeue: bool) -> None:
        self.done.append(-delivery_tag)


def on(channel: object, tag: int) -> Delivery:
    return Delivery(cast(Channel, channel), tag, False, "", "", {}, b"")


def test_a_retired_channel_may_be_closed_once_its_deliveries_are_settled() -> None:
    retired, channel = RetiredChannels(), Settled()
    retired.add(cast(Channel, channel), 2)
    assert retired.closable() == []
    assert [retired.settle(on(channel, 7), True), retired.settle(on(channel, 8), False)] == [False, True]
    assert channel.done == [7, -8]
    assert retired.closable() == [channel]
    retired.forget(cast(Channel, channel))
    assert not retired.settle(on(channel, 9), True)
    assert channel.done == [7, -8]


def test_of_many_retired_channels_the_oldest_is_closed() -> None:
    retired, channels = RetiredChannels(), [Settled() for _ in range(MOST + 1)]
    for channel in channels:
        retired.add(cast(Channel, channel), 1)
    assert retired.closable() == channels[:1]
