"""What the consuming connection's thread does at its end."""

from __future__ import annotations

from typing import Any, cast

from lightbus.connection import Broker
from lightbus.settlement import Settlements
from lightbus.subscriber import Lane, Subscriber
from lightbus.transport import Channel, Delivery


class AckedChannel:
    def __init__(self) -> None:
        self.acks: list[tuple[int, bool]] = []

    def basic_ack(self, delivery_tag: int, multiple: bool = False) -> None:
        self.acks.append((delivery_tag, multiple))


def test_at_the_end_no_ack_waits_for_a_handler_that_did_not_end() -> None:
    lane = Lane("billing", "main", [], prefetch=200, concurrency=32)
    channel = AckedChannel()
    lane.channel = cast(Channel, channel)
    lane.settlements = Settlements(hold=50)
    subscriber = Subscriber(Broker.parse("memory://"), "consumer", cast(Any, None), [lane], cast(Any, None))
    for tag in (2, 3):  # 1 is still being handled
        lane.settled.append((Delivery(lane.channel, tag, False, "", "", {}, b""), True))
    subscriber.closing()
    assert channel.acks == [(2, False), (3, False)]
