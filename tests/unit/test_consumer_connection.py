"""How the consuming connection ends, and when it wakes its thread."""

from __future__ import annotations

import time
from typing import Any, cast

import amqp.exceptions
import pytest

from lightbus.connection.dial import BrokerAddresses
from lightbus.consuming.connection import ConsumerConnection, EpochEnded
from lightbus.consuming.consumer import Consumer
from lightbus.consuming.subscription import Subscription, SubscriptionConfig
from lightbus.transport import Channel, Connection, Delivery


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
        """Nothing waits."""


def delivery(channel: Channel, tag: int) -> Delivery:
    return Delivery(channel, tag, False, "", "", {}, b"")


def new_connection(kind: type[ConsumerConnection] = ConsumerConnection) -> tuple[ConsumerConnection, Consumer]:
    config = SubscriptionConfig(name="billing.main", suffix="main", handlers={}, prefetch=200, concurrency=32)
    connection = kind(BrokerAddresses.parse("memory://"), "consumer", cast(Any, None), [Subscription(config)])
    (consumer,) = connection.consumers
    return connection, consumer


def three_of_which_two_are_settled(consumer: Consumer, channel: Channel) -> None:
    """The first is still being handled."""
    consumer.begin(channel, on_probation=False)
    consumer.deliveries.settlements.hold = 50  # as with a prefetch of 200
    consumer.deliveries.arrived.extend(delivery(channel, tag) for tag in (1, 2, 3))
    consumer.take()
    for tag in (2, 3):
        consumer.subscription.settled.append((delivery(channel, tag), True))


def test_at_the_end_no_ack_waits_for_a_handler_that_did_not_end() -> None:
    connection, consumer = new_connection()
    notes = Notes()
    three_of_which_two_are_settled(consumer, cast(Channel, notes))
    connection.closing()
    assert notes.done == [(2, False), (3, False)]


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
def test_what_is_settled_is_acked_before_a_connection_is_replaced_that_works(
    error: Exception, expected: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = Notes()

    class FailsAtOnce(ConsumerConnection):
        def opened(self, connection: Connection) -> None:
            three_of_which_two_are_settled(self.consumers[0], cast(Channel, notes))

        def work(self) -> float:
            self.stopping = True
            raise error

    monkeypatch.setattr(BrokerAddresses, "connect", lambda *_, **__: notes)
    connection, _ = new_connection(FailsAtOnce)
    connection.ensure_started()
    connection.stop(20.0)
    assert not connection.alive
    assert notes.done == expected


class Loop:
    """The event loop's side of a connection, on which one more delivery arrives each time it is read."""

    def __init__(self, consumer: Consumer) -> None:
        self.consumer = consumer
        self.connection = self

    def drain_nowait(self) -> None:
        assert self.consumer.channel is not None
        self.consumer.deliveries.arrived.append(delivery(self.consumer.channel, 1))


def test_an_arrival_wakes_the_thread_unless_it_will_look_at_the_prefetch_by_itself() -> None:
    """Also in a pause between two looks: with nothing in hand, the thread has planned none."""
    woken: list[bool] = []

    class Woken(ConsumerConnection):
        def wake(self) -> None:
            woken.append(self.consumers[0].look_planned)

    connection, consumer = new_connection(Woken)
    consumer.hand_over_here = lambda *_: None
    consumer.begin(cast(Channel, Notes()), on_probation=False)
    connection.reading.loop_reader = cast(Any, Loop(consumer))
    consumer.credit.postpone(time.monotonic())
    connection.read_in_loop()
    assert woken == [False]
    consumer.look_planned = True
    connection.read_in_loop()
    assert woken == [False]
