"""A publish returns when the broker has confirmed; its receipt shows whether a queue got the event."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import anyio
import anyio.to_thread
import attrs
import pytest

from lightbus import Lightbus, Message, errors
from tests.bus import (
    InBackground,
    OrderCancelled,
    OrderPlaced,
    declare,
    eventually,
    left_in,
    order_numbers,
    running,
    stranger,
)

pytestmark = pytest.mark.anyio

MakeApp = Callable[..., Lightbus]


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_a_receipt_is_routed_if_a_queue_is_bound(shop: Lightbus, billing: Lightbus) -> None:
    received: list[tuple[str, int]] = []

    @billing.on("order.placed")
    async def note(order: OrderPlaced, message: Message) -> None:
        received.append((message.id, order.number))

    async with running(shop, billing):
        receipt = await shop.publish(OrderPlaced(number=7))
        assert receipt.routed
        assert uuid.UUID(receipt.id).version == 7
        await eventually(lambda: received, [(receipt.id, 7)])


@pytest.mark.impossible_on_artemis("the broker confirms an event also when no queue takes it")
async def test_an_event_without_a_queue_is_confirmed_and_not_routed(shop: Lightbus, billing: Lightbus) -> None:
    billing.on("order.cancelled")(lambda: None)
    async with running(shop, billing):
        assert not (await shop.publish(OrderPlaced(number=1))).routed
        assert (await shop.publish(OrderCancelled(number=1))).routed


@pytest.mark.impossible_on_artemis("the broker confirms an event also when no queue takes it")
async def test_publish_many_returns_a_receipt_for_each_event(shop: Lightbus, billing: Lightbus) -> None:
    billing.on("order.cancelled")(lambda: None)
    async with running(shop, billing):
        receipts = await shop.publish_many([OrderPlaced(number=1), OrderCancelled(number=2), OrderPlaced(number=3)])
    assert [receipt.routed for receipt in receipts] == [False, True, False]
    assert len({receipt.id for receipt in receipts}) == 3


def test_code_without_an_event_loop_can_publish(shop: Lightbus, billing: Lightbus) -> None:
    billing.on("order.placed")(lambda: None)
    with InBackground(billing), shop:
        assert shop.publish_sync(OrderPlaced(number=1)).routed
        receipts = shop.publish_many_sync([OrderPlaced(number=n) for n in range(5)])
    assert [receipt.routed for receipt in receipts] == [True] * 5


async def test_publish_many_keeps_its_order(shop: Lightbus, billing: Lightbus) -> None:
    billing.on("order.placed")(lambda: None)
    await declare(shop, billing)
    await shop.publish_many([OrderPlaced(number=n) for n in range(2500)])
    assert order_numbers(await left_in(billing)) == list(range(2500))


async def test_many_tasks_and_threads_publish_at_once(shop: Lightbus, billing: Lightbus) -> None:
    received: list[int] = []
    billing.on("order.placed")(_collects(received))

    def publish_from_a_thread(start: int) -> bool:
        return all(shop.publish_sync(OrderPlaced(number=start + n)).routed for n in range(20))

    async def publish_from_a_task(number: int) -> None:
        assert (await shop.publish(OrderPlaced(number=number))).routed

    async with running(shop, billing), anyio.create_task_group() as tasks:
        for number in range(200):
            tasks.start_soon(publish_from_a_task, number)
        for thread in range(5):
            tasks.start_soon(anyio.to_thread.run_sync, publish_from_a_thread, 1000 + 100 * thread)
        wanted = set(range(200)) | {1000 + 100 * thread + n for thread in range(5) for n in range(20)}
        await eventually(lambda: len(received), 300)
    assert set(received) == wanted


def test_the_first_publish_of_many_threads_at_once_opens_one_connection(shop: Lightbus) -> None:
    together = threading.Barrier(8)

    def connections() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name == "lightbus shop publisher"}

    before = connections()  # apps of other tests have connections, too

    def publish() -> str:
        together.wait()
        return shop.publish_sync(OrderPlaced(number=1)).id

    with ThreadPoolExecutor(8) as threads:
        ids = {future.result() for future in [threads.submit(publish) for _ in range(8)]}
    assert len(ids) == 8
    assert len(connections() - before) == 1


async def test_publish_sync_in_an_event_loop_suggests_publish(shop: Lightbus) -> None:
    with pytest.raises(errors.PublishInEventLoop, match=r"await app\.publish\(") as refused:
        shop.publish_sync(OrderPlaced(number=1))
    assert "event loop" in str(refused.value)
    with pytest.raises(errors.PublishInEventLoop, match=r"await app\.publish_many\("):
        shop.publish_many_sync([OrderPlaced(number=1)])


async def test_a_wrong_value_is_refused_before_anything_is_sent(shop: Lightbus, billing: Lightbus) -> None:
    billing.on("order.placed")(lambda: None)
    await declare(shop, billing)
    with pytest.raises(errors.InvalidPayload, match=r"order\.placed.*not sent.*`\$\.number`") as refused:
        await shop.publish(OrderPlaced(number="seven"))  # type: ignore[arg-type]
    assert "OrderPlaced" in str(refused.value)
    with pytest.raises(errors.InvalidPayload):
        await shop.publish_many([OrderPlaced(number=1), OrderPlaced(number=None)])  # type: ignore[arg-type]
    assert await left_in(billing) == []


async def test_an_undeclared_event_is_refused_with_a_suggestion(shop: Lightbus, billing: Lightbus) -> None:
    @attrs.frozen
    class OrderPlacd:
        number: int

    with pytest.raises(errors.UnknownEvent, match=r"OrderPlacd is not declared on app 'shop'.*'order\.placed'"):
        await shop.publish(OrderPlacd(number=1))
    with pytest.raises(errors.UnknownEvent, match=r"declares no events yet.*@app\.event"):
        await billing.publish(OrderPlacd(number=1))
    with pytest.raises(errors.UnknownEvent, match=r"OrderPlaced is an event of another app.*@app\.event"):
        await billing.publish(OrderPlaced(number=1))
    with pytest.raises(errors.UnknownEvent, match=r"is a class.*OrderPlaced\(\.\.\.\)"):
        await shop.publish(OrderPlaced)


async def test_an_app_publishes_again_after_it_was_closed(shop: Lightbus, billing: Lightbus) -> None:
    billing.on("order.placed")(lambda: None)
    await declare(shop, billing)
    async with shop:
        await shop.publish(OrderPlaced(number=1))
    await shop.publish(OrderPlaced(number=2))
    async with shop:
        await shop.publish(OrderPlaced(number=3))
    assert len(await left_in(billing)) == 3


async def test_opening_declares_the_exchange_and_the_bus(shop: Lightbus) -> None:
    async with shop, stranger(shop) as channel:
        for exchange in ("shop", "lightbus"):
            await anyio.to_thread.run_sync(_declare_passively, channel, exchange)


async def test_a_publish_that_was_cancelled_leaves_the_publisher_usable(shop: Lightbus, billing: Lightbus) -> None:
    received: list[int] = []
    billing.on("order.placed")(_collects(received))
    async with running(shop, billing):
        for number in range(20):
            with anyio.CancelScope() as scope:
                scope.cancel()
                await shop.publish(OrderPlaced(number=number))
        await shop.publish(OrderPlaced(number=100))
        await eventually(lambda: 100 in received)


def _collects(received: list[int]) -> Callable[[OrderPlaced], None]:
    def collect(order: OrderPlaced) -> None:
        received.append(order.number)

    return collect


def _declare_passively(channel: object, exchange: str) -> None:
    channel.exchange_declare(exchange, "topic", passive=True)  # type: ignore[attr-defined]
