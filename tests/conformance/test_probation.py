"""What came back again and again is taken one at a time: an event that kills its workers takes no others with it."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

import anyio
import anyio.to_thread
import pytest

from lightbus import Lightbus
from lightbus.transport import Connection, Publication
from tests.bus import OrderPlaced, connected, declare, eventually, left_in, running
from tests.patience import LIMIT

pytestmark = pytest.mark.anyio

MakeApp = Callable[..., Lightbus]


class Gate:
    """A handler of `app` for orders: each waits until `go_on` is set; those with `through` do not."""

    def __init__(self, app: Lightbus, *, through: Callable[[int], bool] = lambda number: False) -> None:
        self.go_on = anyio.Event()
        self.handled: list[int] = []

        @app.on("order.placed")
        async def wait(order: OrderPlaced) -> None:
            if not through(order.number):
                await self.go_on.wait()
            self.handled.append(order.number)


def ready(app: Lightbus) -> int:
    """How many wait in the app's queue, with no consumer."""
    with connected(app) as connection:
        return int(connection.channel().queue_declare(f"{app.name}.main", passive=True).message_count)


async def let_come_back(app: Lightbus, count: int, times: int) -> None:
    """Do to all that waits what a worker does that dies: take it, and go without a word."""

    def take_all_and_go() -> None:
        with connected(app) as connection:
            channel = connection.channel()
            for _ in range(count):
                assert channel.get(f"{app.name}.main") is not None

    for _ in range(times):
        await eventually_in_thread(ready, app, count)
        await anyio.to_thread.run_sync(take_all_and_go)
    await eventually_in_thread(ready, app, count)


async def eventually_in_thread(look: Callable[[Lightbus], int], app: Lightbus, wanted: int) -> None:
    with anyio.fail_after(LIMIT):
        while await anyio.to_thread.run_sync(look, app) != wanted:  # noqa: ASYNC110 - the broker has no event for it
            await anyio.sleep(0.01)


async def test_what_came_back_twice_is_taken_one_at_a_time_and_what_did_not_all_at_once(
    shop: Lightbus, billing: Lightbus, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate(billing, through=lambda number: 0 < number < 5)
    await declare(billing)
    await shop.publish_many([OrderPlaced(number=n) for n in range(5)])
    await let_come_back(billing, 5, times=2)
    async with running(shop, billing, prefetch=8) as bus:
        (consumer,) = bus.consumers["billing"]
        await eventually(lambda: len(consumer.in_flight), 1)
        await eventually_in_thread(ready, billing, 4)
        assert gate.handled == []
        gate.go_on.set()
        await eventually(lambda: gate.handled, [0, 1, 2, 3, 4])
        gate.go_on = anyio.Event()
        await shop.publish_many([OrderPlaced(number=n) for n in range(5, 12)])
        await eventually(lambda: len(consumer.in_flight), 7)
        gate.go_on.set()
        await eventually(lambda: sorted(gate.handled), [*range(12)])
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    (logged,) = [words for words in warnings if "one event at a time" in words]
    assert "in 'billing.main' was redelivered 2 times" in logged


async def test_what_came_back_once_is_no_reason_to_be_careful(shop: Lightbus, billing: Lightbus) -> None:
    gate = Gate(billing)
    await declare(billing)
    await shop.publish_many([OrderPlaced(number=n) for n in range(5)])
    await let_come_back(billing, 5, times=1)
    async with running(shop, billing, prefetch=8) as bus:
        (consumer,) = bus.consumers["billing"]
        await eventually(lambda: len(consumer.in_flight), 5)
        gate.go_on.set()
        await eventually(lambda: sorted(gate.handled), [*range(5)])


async def test_the_first_event_may_end_after_all_others_and_is_settled_on_the_same_connection(
    shop: Lightbus, billing: Lightbus
) -> None:
    """It came to a consumer that another one has replaced since."""
    gate = Gate(billing, through=lambda number: number > 0)
    await declare(billing)
    await shop.publish_many([OrderPlaced(number=n) for n in range(100)])
    async with running(shop, billing, prefetch=10) as bus:
        (consumer,) = bus.consumers["billing"]
        await eventually(lambda: len(gate.handled), 99)
        gate.go_on.set()
        await eventually(lambda: gate.handled[-1], 0)
        await eventually(lambda: consumer.consumers[0].in_hand, 0)
        assert consumer.connection.epoch == 1
        assert len(gate.handled) == 100
    assert await left_in(billing) == []


async def test_a_queue_has_one_consumer_for_each_worker(shop: Lightbus, billing: Lightbus) -> None:
    gate = Gate(billing, through=lambda number: True)

    def consumers(app: Lightbus) -> int:
        with connected(app) as connection:
            return int(connection.channel().queue_declare(f"{app.name}.main", passive=True).consumer_count)

    async with running(shop, billing, billing):
        assert await anyio.to_thread.run_sync(consumers, billing) == 2
        await shop.publish_many([OrderPlaced(number=n) for n in range(20)])
        await eventually(lambda: len(gate.handled), 20)
        await eventually_in_thread(consumers, billing, 2)
    await eventually_in_thread(consumers, billing, 0)


async def test_a_prefetch_of_one_stays_one(shop: Lightbus, billing: Lightbus) -> None:
    gate = Gate(billing)
    await declare(billing)
    await shop.publish_many([OrderPlaced(number=n) for n in range(3)])
    async with running(shop, billing, prefetch=1) as bus:
        (consumer,) = bus.consumers["billing"]
        await eventually(lambda: len(consumer.in_flight), 1)
        assert await anyio.to_thread.run_sync(ready, billing) == 2
        gate.go_on.set()
        await eventually(lambda: gate.handled, [0, 1, 2])


# --- forged counts ----------------------------------------------------------------------------

FORGED: list[Any] = [2**62, 7, -5, True, "many", 2.5, None, [9], {"x": 1}]


def publish_forged(connection: Connection) -> None:
    """As any program may that can publish. With confirms: a quorum queue that is still electing its first leader may
    lose what it was sent when the channel closes before.
    """
    channel = connection.channel()
    unconfirmed = set(range(1, len(FORGED) + 1))

    def on_ack(tag: int, multiple: bool) -> None:
        unconfirmed.difference_update(range(1, tag + 1) if multiple else (tag,))

    channel.on_ack = on_ack
    channel.confirm_select()
    for number, count in enumerate(FORGED):
        headers = {"headers": {"x-delivery-count": count}}
        channel.publish([Publication("shop", "order.placed", b'{"number": %d}' % number, headers)])
    deadline = time.monotonic() + LIMIT
    while unconfirmed:
        assert time.monotonic() < deadline, f"not confirmed: {unconfirmed}"
        with contextlib.suppress(TimeoutError):
            connection.drain_events(1)


@pytest.mark.parametrize("times", [0, 1])
@pytest.mark.parametrize("queue_type", ["quorum", "classic"])
async def test_a_forged_count_loses_and_stops_nothing(queue_type: str, times: int, make_app: MakeApp) -> None:
    shop, billing = make_app("shop"), make_app("billing", queue_type=queue_type)
    handled: list[int] = []
    billing.on("order.placed")(lambda order: handled.append(order["number"]))
    await declare(shop, billing)
    with connected(shop) as connection:
        publish_forged(connection)
    await let_come_back(billing, len(FORGED), times)
    async with running(billing, prefetch=4) as bus:
        await eventually(lambda: sorted(handled), [*range(len(FORGED))])
        assert bus.consumers["billing"][0].connection.epoch == 1


@pytest.mark.rabbitmq
async def test_a_quorum_queue_writes_its_own_count_over_a_forged_one(make_rabbitmq_app: MakeApp) -> None:
    shop, billing = make_rabbitmq_app("shop"), make_rabbitmq_app("billing")
    billing.on("order.placed")(lambda: None)
    await declare(shop, billing)
    with connected(shop) as connection:
        publish_forged(connection)
    await let_come_back(billing, len(FORGED), times=1)
    counts = [delivery.properties["headers"]["x-delivery-count"] for delivery in await left_in(billing)]
    assert counts == [1] * len(FORGED)
