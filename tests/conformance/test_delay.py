"""The broker holds a delayed event: it is never early, and arrives soon after it is due, also after restarts."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from lightbus import Lightbus, Message, errors
from tests.bus import (
    QUICK,
    OrderCancelled,
    OrderPlaced,
    connected,
    declare,
    eventually,
    left_in,
    running,
)
from tests.conformance.conftest import declare_orders
from tests.patience import DELAY, LIMIT, wait_until, within

pytestmark = pytest.mark.anyio

MakeApp = Callable[..., Lightbus]


async def test_delayed_events_are_not_early_and_do_not_wait_for_each_other(shop: Lightbus, billing: Lightbus) -> None:
    received: dict[int, float] = {}

    @billing.on("order.placed")
    async def note(order: OrderPlaced) -> None:
        received[order.number] = time.monotonic()

    async with running(shop, billing):
        start = time.monotonic()
        for delay in (7, 1, 2, 0.5, 1):  # the longest first; 0.5 is rounded up to 1
            assert (await shop.publish(OrderPlaced(number=round(delay * 10)), delay=delay)).routed
        await eventually(lambda: set(received), {5, 10, 20, 70})
    for number, earliest in {5: 1, 10: 1, 20: 2, 70: 7}.items():
        assert earliest <= received[number] - start < earliest + DELAY
    assert max(received[number] for number in (5, 10, 20)) < received[70]


async def test_a_delay_of_zero_is_no_delay(shop: Lightbus, billing: Lightbus) -> None:
    received: list[int] = []

    @billing.on("order.placed")
    async def note(order: OrderPlaced) -> None:
        received.append(order.number)

    async with running(shop, billing):
        for number in range(50):  # a busy machine may take a second for some of them, not for all
            start = time.monotonic()
            await shop.publish(OrderPlaced(number=number), delay=0)
            await eventually(lambda: received, [*range(number + 1)])
            if time.monotonic() - start < 1:
                return
    pytest.fail("no event was received within a second")


async def test_a_delayed_event_is_the_same_event(shop: Lightbus, billing: Lightbus) -> None:
    received: list[Message] = []

    @billing.on("order.placed", source="shop")
    async def note(message: Message) -> None:
        received.append(message)
        if message.attempt == 1:
            raise ValueError("once more")

    async with running(shop, billing):
        receipt = await shop.publish(OrderPlaced(number=1), delay=1, headers={"tenant": "acme"})
        await eventually(lambda: len(received), 2)
    for attempt, message in enumerate(received, 1):
        assert (message.id, message.event, message.source) == (receipt.id, "order.placed", "shop")
        assert (message.attempt, message.redelivered) == (attempt, False)
        assert dict(message.headers) == {"tenant": "acme"}
        assert message.delay == (1 if attempt == 1 else 0)
        assert (message.correlation_id, message.causation_id) == (receipt.id, None)
    assert await left_in(billing, "billing.dead") == []


def test_code_without_an_event_loop_can_delay(shop: Lightbus, billing: Lightbus) -> None:
    billing.on("order.placed")(lambda: None)
    anyio.run(declare, billing)
    start = time.monotonic()
    with shop, connected(billing) as connection:
        shop.publish_sync(OrderPlaced(number=1), delay=1)
        channel, deliveries = connection.channel(), []

        def has_arrived() -> bool:
            deliveries.append(channel.get("billing.main"))
            return deliveries[-1] is not None

        with within(1):
            wait_until(has_arrived, "the event")
    assert time.monotonic() - start >= 1
    assert deliveries[-1].routing_key == "order.placed"


async def test_a_subscriber_that_starts_after_the_publish_gets_the_event(shop: Lightbus, billing: Lightbus) -> None:
    received: list[int] = []

    @billing.on("order.placed")
    async def note(order: OrderPlaced) -> None:
        received.append(order.number)

    await shop.publish(OrderPlaced(number=1), delay=1)
    async with running(billing):
        await eventually(lambda: received, [1])


async def test_delayed_events_without_subscribers_do_not_block_others(shop: Lightbus, billing: Lightbus) -> None:
    received: list[int] = []

    @billing.on("order.placed")
    async def note(order: OrderPlaced) -> None:
        received.append(order.number)

    async with running(shop, billing), anyio.create_task_group() as tasks:
        for number in range(60):  # RabbitMQ's dead-lettering keeps 32 messages that no queue accepts, and then stops
            tasks.start_soon(lambda n=number: shop.publish(OrderCancelled(number=n), delay=1))
        await anyio.sleep(0.3)
        await shop.publish(OrderPlaced(number=1), delay=1)
        await eventually(lambda: received, [1])


async def test_many_delayed_events_all_arrive(shop: Lightbus, billing: Lightbus) -> None:
    received: list[int] = []

    @billing.on("order.placed")
    async def note(order: OrderPlaced) -> None:
        received.append(order.number)

    async with running(shop, billing):
        async with anyio.create_task_group() as tasks:
            for number in range(200):
                tasks.start_soon(lambda n=number: shop.publish(OrderPlaced(number=n), delay=1 + n % 3))
        await eventually(lambda: sorted(received), [*range(200)])


@pytest.mark.parametrize("delay", [-1, -0.001, float("nan"), float("inf"), 30 * 24 * 3600 + 1, "5", True], ids=str)
async def test_an_invalid_delay_is_refused_with_its_limits(delay: float) -> None:
    shop = declare_orders(Lightbus("shop", url="memory://never-reached"))
    with pytest.raises(errors.InvalidOption, match=r"delay=.*more than 0 and up to 2,592,000 \(30 days\)"):
        await shop.publish(OrderPlaced(number=1), delay=delay)


async def test_a_delay_that_the_broker_cannot_hold_is_refused_at_once_and_alone(make_rabbitmq_app: MakeApp) -> None:
    """Its queues already exist with other arguments, for example after a change of `queue_type`."""
    before = declare_orders(make_rabbitmq_app("shop", queue_type="classic"))
    await before.publish(OrderPlaced(number=0), delay=1)
    shop = declare_orders(make_rabbitmq_app("shop", queue_type="quorum"))
    async with shop, anyio.create_task_group() as tasks:

        async def publish_until_it_is_over() -> None:
            while shop.publisher.epoch == 1:
                await shop.publish(OrderPlaced(number=1))

        tasks.start_soon(publish_until_it_is_over)
        for _ in range(10):
            with pytest.raises(errors.PublishRefused, match="x-queue-type"):
                await shop.publish(OrderPlaced(number=2), delay=1)
        assert shop.publisher.epoch == 1  # the connection was not replaced
        tasks.cancel_scope.cancel()


async def test_the_longest_delay_is_accepted(shop: Lightbus) -> None:
    receipt = await shop.publish(OrderPlaced(number=1), delay=30 * 24 * 3600)
    assert receipt.routed


def test_a_delayed_event_survives_the_end_of_every_process_on_sqlite(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/bus.db"
    program = (
        "from tests.bus import OrderPlaced; from tests.conformance.conftest import declare_orders\n"
        "from lightbus import Lightbus\n"
        f"shop = declare_orders(Lightbus('shop', url={url!r}))\n"
        "shop.publish_sync(OrderPlaced(number=1), delay=1)\n"
    )
    billing = Lightbus("billing", url=url, retry=QUICK)
    received: list[int] = []

    @billing.on("order.placed")
    async def note(order: OrderPlaced) -> None:
        received.append(order.number)

    async def consume() -> None:
        async with running(billing):
            await eventually(lambda: received, [1])

    anyio.run(declare, billing)  # its queue is there, however long the program takes to end
    subprocess.run([sys.executable, "-c", program], check=True, timeout=LIMIT)
    anyio.run(consume)
