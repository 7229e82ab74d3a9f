"""What the consuming connection's thread does at its end."""

from __future__ import annotations

import time
from typing import Any, cast

import amqp.exceptions
import pytest

from lightbus.connection.dial import BrokerAddresses
from lightbus.consuming.acks import Settlements
from lightbus.consuming.connection import ConsumerConnection, EpochEnded, Subscription
from lightbus.transport import Channel, Connection, Delivery


class AckedChannel:
    def __init__(self) -> None:
        self.acks: list[tuple[int, bool]] = []

    def basic_ack(self, delivery_tag: int, multiple: bool = False) -> None:
        self.acks.append((delivery_tag, multiple))


def test_at_the_end_no_ack_waits_for_a_handler_that_did_not_end() -> None:
    subscription = Subscription("billing", "main", [], prefetch=200, concurrency=32)
    channel = AckedChannel()
    subscription.channel = cast(Channel, channel)
    subscription.settlements = Settlements(hold=50)
    subscriber = ConsumerConnection(
        BrokerAddresses.parse("memory://"), "consumer", cast(Any, None), [subscription], cast(Any, None)
    )
    for tag in (2, 3):  # 1 is still being handled
        subscription.settled.append((Delivery(subscription.channel, tag, False, "", "", {}, b""), True))
    subscriber.closing()
    assert channel.acks == [(2, False), (3, False)]


class Notes:
    """A connection and its only channel, which note what is done to them."""

    def __init__(self) -> None:
        self.done: list[object] = []

    def basic_ack(self, delivery_tag: int, multiple: bool = False) -> None:
        self.done.append((delivery_tag, multiple))

    def close(self) -> None:
        self.done.append("closed")

    def collect(self) -> None:
        self.done.append("dropped")

    def interrupt(self) -> None:
        """Nobody waits."""


ACKED = [(2, False), (3, False), "closed", "dropped"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (EpochEnded("stalled"), ACKED),
        (amqp.exceptions.NotFound("no queue"), ACKED),
        (amqp.exceptions.PreconditionFailed("inequivalent arg"), ACKED),
        (TimeoutError("the broker did not complete queue.declare"), ACKED),
        (ConnectionResetError("the broker closed the connection"), ["dropped"]),
        (amqp.exceptions.ConnectionForced("Too many heartbeats missed"), ["dropped"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_settled_is_acked_before_a_connection_is_replaced_that_is_well(
    error: Exception, expected: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    subscription = Subscription("billing", "main", [], prefetch=200, concurrency=32)
    notes = Notes()

    class FailsAtOnce(ConsumerConnection):
        def opened(self, connection: Connection) -> None:
            channel = cast(Channel, notes)
            subscription.begin(channel, on_probation=False)
            subscription.taken = 3
            for tag in (2, 3):  # 1 is still being handled
                subscription.settled.append((Delivery(channel, tag, False, "", "", {}, b""), True))

        def work(self) -> float:
            self.stopping = True
            raise error

    monkeypatch.setattr(BrokerAddresses, "connect", lambda *_, **__: notes)
    FailsAtOnce(BrokerAddresses.parse("memory://"), "consumer", cast(Any, None), [subscription], cast(Any, None)).run()
    assert notes.done == expected


class Loop:
    """The event loop's side of a connection, on which one more delivery arrives each time it is read."""

    def __init__(self, subscription: Subscription) -> None:
        self.subscription = subscription
        self.connection = self

    def drain_nowait(self) -> None:
        assert self.subscription.channel is not None
        self.subscription.arrived.append(Delivery(self.subscription.channel, 1, False, "", "", {}, b""))


def test_an_arrival_wakes_the_thread_unless_it_will_look_at_the_prefetch_by_itself() -> None:
    """Also in a pause between two looks: with nothing in hand, the thread has planned none."""
    subscription = Subscription("billing", "main", [], prefetch=200, concurrency=32)
    woken: list[bool] = []

    class Woken(ConsumerConnection):
        def wake(self) -> None:
            woken.append(subscription.look_planned)

    subscriber = Woken(BrokerAddresses.parse("memory://"), "consumer", cast(Any, None), [subscription], cast(Any, None))
    subscriber.hand_over_here = lambda *_: None
    subscription.begin(cast(Channel, Notes()), on_probation=False)
    subscriber.reading.loop_reader = cast(Any, Loop(subscription))
    subscription.credit.postpone(time.monotonic())
    subscriber.read_in_loop()
    assert woken == [False]
    subscription.look_planned = True
    subscriber.read_in_loop()
    assert woken == [False]
