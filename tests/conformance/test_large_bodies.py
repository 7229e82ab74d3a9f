"""What a worker holds is bounded in bytes too, and what there is no room for is handled later."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from lightbus import Lightbus, Message
from lightbus.consuming.consumer import Consumer
from lightbus.consuming.dispatcher import Dispatcher
from lightbus.wire.codec import MAX_BODY_BYTES
from tests.bus import OrderPlaced, connected, dead_letters, declare, eventually, left_in, running

pytestmark = pytest.mark.anyio

MakeApp = Callable[..., Lightbus]

MEGABYTE = 1024 * 1024
BUDGET = 8 * MEGABYTE
LARGE = "x" * MEGABYTE
MANY = 40


class Bytes:
    """The bytes of bodies that a queue's handlers hold, and those that wait for them in the worker."""

    def __init__(self, consumer: Dispatcher) -> None:
        (self.queue_consumer,), (self.runner,) = consumer.consumers, consumer.runners
        self.queue_consumer.credit.budget = BUDGET
        self.now = self.most = 0

    def take(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)

    def waiting(self) -> int:
        arrived: Any = [*self.queue_consumer.deliveries.arrived, *(run[0] for run in self.runner.turns.ready)]
        return sum(len(delivery.body) for delivery in arrived)


@pytest.mark.parametrize("warm", [True, False])
async def test_a_flood_of_large_events_is_held_within_the_budget_and_each_is_handled_once(
    warm: bool, make_app: MakeApp, shop: Lightbus
) -> None:
    billing = make_app("billing")
    go_on = anyio.Event()
    begun: Counter[int] = Counter()
    seen: list[int] = []

    @billing.on("order.placed")
    async def hold(order: OrderPlaced) -> None:
        begun[order.number] += 1
        if order.note:
            held.take(len(order.note))
            seen.append(held.now + held.waiting())
            await go_on.wait()
            held.take(-len(order.note))

    async with running(shop, billing) as bus:
        (consumer,) = bus.consumers["billing"]
        (queue_consumer,) = consumer.consumers
        held = Bytes(consumer)
        if warm:
            await open_the_whole_prefetch(shop, queue_consumer, begun)
        await shop.publish_many([OrderPlaced(number=number, note=LARGE) for number in range(MANY)])
        await eventually(lambda: sum(1 for number in begun if number >= 0) >= 2)
        # Nothing more arrives until a handler ends, and the rest is in the queue.
        await eventually(
            lambda: (waiting_in(billing) + queue_consumer.in_hand, queue_consumer.deliveries.returning), (MANY, [])
        )
        assert queue_consumer.in_hand * MEGABYTE <= 1.5 * BUDGET + 2 * MEGABYTE
        go_on.set()
        await eventually(lambda: sum(begun.values()) - (200 if warm else 0), MANY)
        await bus.quiet(billing)
    assert set(begun.values()) == {1}
    assert max(seen) <= 1.5 * BUDGET + 2 * MEGABYTE
    assert await left_in(billing) == []
    assert await dead_letters(billing, 0) == []


async def open_the_whole_prefetch(shop: Lightbus, queue_consumer: Consumer, begun: Counter[int]) -> None:
    """As after a second of fast handlers."""
    queue_consumer.credit.window = queue_consumer.prefetch
    await shop.publish_many([OrderPlaced(number=-number) for number in range(1, 201)])
    await eventually(lambda: len(begun), 200)
    await eventually(
        lambda: (queue_consumer.prefetch_now >= queue_consumer.prefetch - 4, queue_consumer.in_hand), (True, 0)
    )


def waiting_in(app: Lightbus) -> int:
    with connected(app) as connection:
        return int(connection.channel().queue_declare(f"{app.name}.main", passive=True).message_count)


async def test_an_event_larger_than_the_budget_is_handled_alone(make_app: MakeApp, shop: Lightbus) -> None:
    billing = make_app("billing")
    handled: list[int] = []
    most = 0

    @billing.on("order.placed")
    async def handle(order: OrderPlaced) -> None:
        nonlocal most
        most = max(most, queue_consumer.in_hand)
        await anyio.lowlevel.checkpoint()
        handled.append(order.number)

    await declare(billing)
    await shop.publish_many([OrderPlaced(number=number, note=LARGE) for number in range(10)])
    consumer = billing.consumer()
    (queue_consumer,) = consumer.consumers
    queue_consumer.credit.budget = MEGABYTE // 2
    async with anyio.create_task_group() as tasks:
        await tasks.start(consumer.run)
        await eventually(lambda: sorted(handled), [*range(10)])
        await consumer.stop(5)
        tasks.cancel_scope.cancel()
    assert most == 1


async def test_the_largest_body_arrives_unchanged(make_app: MakeApp, shop: Lightbus) -> None:
    billing = make_app("billing")
    room = MAX_BODY_BYTES - len(b'{"number":1,"note":""}')
    note = "".join(f"{number:07d} " for number in range(room // 8 + 1))[:room]
    handled: list[tuple[int, int, bool]] = []

    @billing.on("order.placed")
    async def handle(order: OrderPlaced, message: Message) -> None:
        handled.append((order.number, len(message.body), order.note == note))

    async with running(shop, billing) as bus:
        for number in (1, 2):
            await shop.publish(OrderPlaced(number=number, note=note))
        await eventually(lambda: len(handled), 2)
        await bus.quiet(billing)
    assert sorted(handled) == [(1, 16 * MEGABYTE, True), (2, 16 * MEGABYTE, True)]
    assert await left_in(billing) == []
    assert await dead_letters(billing, 0) == []
