"""A responsive event loop reads its own connections; if it is blocked, the connection's thread reads."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import pytest
import uvloop

from lightbus import Lightbus, Receipt
from lightbus.connection.thread import ConnectionThread
from lightbus.consuming.connection import ConsumerConnection
from tests.bus import LIMIT, QUICK, Bus, OrderPlaced, dead_letters, eventually, left_in, running

pytestmark = pytest.mark.rabbitmq

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


@pytest.fixture
def shop(rabbitmq_url: str) -> Iterator[Lightbus]:
    app = new_app(rabbitmq_url)
    yield app
    app.__exit__(None, None, None)


def new_app(url: str) -> Lightbus:
    app = Lightbus("shop", url=url, publish_timeout=LIMIT)
    app.event(OrderPlaced)
    return app


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Callable[[Awaitable[Any]], Any]:
    """Runs a coroutine in a new event loop, as `asyncio.run` does."""

    def run(main: Any) -> Any:
        with asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:
            return runner.run(main)

    return run


async def publish(app: Lightbus, *numbers: int) -> list[Receipt]:
    return await asyncio.gather(*[app.publish(OrderPlaced(number=number)) for number in numbers])


async def until_read_by_loop(app: Lightbus) -> None:
    await app.publish(OrderPlaced(number=0))
    await eventually(lambda: app.publisher.read_by_loop)


def break_connection(thread: ConnectionThread) -> None:
    """As a network failure: both sides see that the other one has closed it."""
    connection: Any = thread.connection
    with contextlib.suppress(OSError, AttributeError), socket.socket(fileno=os.dup(connection.fileno())) as other:
        other.shutdown(socket.SHUT_RDWR)


# --- publishing -------------------------------------------------------------------------------


def test_the_loop_that_publishes_reads_its_own_confirms(shop: Lightbus, run: Callable[..., Any]) -> None:
    async def main() -> None:
        await until_read_by_loop(shop)
        loop_reader = shop.publisher.reading.loop_reader
        assert loop_reader is not None
        reads = loop_reader.reads
        for number in range(20):
            await shop.publish(OrderPlaced(number=number))
        assert loop_reader.reads >= reads + 20
        assert len(await publish(shop, *range(3000))) == 3000

    run(main())


def test_under_trio_the_thread_reads(shop: Lightbus) -> None:
    async def main() -> None:
        for number in range(20):
            await shop.publish(OrderPlaced(number=number))
        assert len(await shop.publish_many([OrderPlaced(number=number) for number in range(2000)])) == 2000
        assert not shop.publisher.read_by_loop

    anyio.run(main, backend="trio")


def test_a_loop_that_is_blocked_for_four_heartbeats_keeps_its_connection(
    rabbitmq_url: str, run: Callable[..., Any]
) -> None:
    shop = new_app(f"{rabbitmq_url}?heartbeat=2")

    async def main() -> None:
        async with shop:
            await until_read_by_loop(shop)
            time.sleep(8)  # noqa: ASYNC251 - what is not to be done
            await shop.publish(OrderPlaced(number=1))
            await eventually(lambda: shop.publisher.read_by_loop)
            assert shop.publisher.epoch == 1

    run(main())


def test_a_blocked_loop_does_not_delay_a_thread_that_publishes(shop: Lightbus, run: Callable[..., Any]) -> None:
    took: list[float] = []

    def publish_ten() -> None:
        for number in range(10):
            began = time.monotonic()
            shop.publish_sync(OrderPlaced(number=number))
            took.append(time.monotonic() - began)

    async def main() -> None:
        await until_read_by_loop(shop)
        publishing = threading.Thread(target=publish_ten)
        publishing.start()
        publishing.join(LIMIT)  # which blocks the loop

    run(main())
    assert len(took) == 10
    assert sorted(took)[5] < 0.5  # without waiting for the once-a-second check


def test_a_loop_that_ends_leaves_the_connection_to_the_next_one(shop: Lightbus, run: Callable[..., Any]) -> None:
    for _ in range(3):
        run(until_read_by_loop(shop))
    shop.publish_sync(OrderPlaced(number=1))
    run(until_read_by_loop(shop))
    assert shop.publisher.epoch == 1


def test_confirms_that_an_ended_loop_waited_for_are_read_by_the_thread(shop: Lightbus) -> None:
    async def give_up_at_once() -> None:
        await until_read_by_loop(shop)
        tasks = [asyncio.ensure_future(shop.publish(OrderPlaced(number=number))) for number in range(200)]
        await asyncio.sleep(0)
        del tasks

    for _ in range(3):
        asyncio.run(give_up_at_once())
    shop.publisher.close()
    assert not shop.publisher.window.unconfirmed


def test_loops_in_several_threads_publish_through_one_app(shop: Lightbus, run: Callable[..., Any]) -> None:
    async def main(number: int) -> int:
        receipts = []
        for start in range(0, 500, 50):
            receipts += await publish(shop, *range(start, start + 50))
            receipts.append(await shop.publish(OrderPlaced(number=number)))
        return len(receipts)

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda number: run(main(number)), range(3))) == [510] * 3
    assert shop.publisher.epoch == 1


def test_a_connection_that_is_lost_while_the_loop_reads_is_replaced(shop: Lightbus, run: Callable[..., Any]) -> None:
    async def main() -> None:
        for epoch in range(1, 5):
            await until_read_by_loop(shop)
            assert shop.publisher.epoch == epoch
            pending = asyncio.ensure_future(publish(shop, *range(100)))
            await asyncio.sleep(0)
            break_connection(shop.publisher)
            assert len(await pending) == 100
            await eventually(lambda epoch=epoch: shop.publisher.epoch, epoch + 1)

    run(main())


def test_the_descriptor_of_a_lost_connection_is_not_reused_while_the_loop_watches_it(shop: Lightbus) -> None:
    """The loop is blocked while the connection is closed, and opens other sockets right afterwards."""

    async def main() -> None:
        await until_read_by_loop(shop)
        break_connection(shop.publisher)
        deadline = time.monotonic() + LIMIT
        # Until the thread notices that the loop is blocked, and reads that the connection was lost.
        while shop.publisher.connection is not None and time.monotonic() < deadline:
            time.sleep(0.01)  # noqa: ASYNC251
        assert shop.publisher.connection is None
        pairs = [socket.socketpair() for _ in range(8)]  # they get the numbers that are free
        for pair in pairs:
            for here, there in (pair, pair[::-1]):
                here.setblocking(False)
                receiving = asyncio.ensure_future(asyncio.get_running_loop().sock_recv(here, 100))
                await asyncio.sleep(0)  # it has found nothing, and waits for the descriptor
                there.send(b"hello")
                assert await asyncio.wait_for(receiving, LIMIT) == b"hello"
        for one in sum(pairs, ()):
            one.close()
        await until_read_by_loop(shop)

    asyncio.run(main())


def test_loops_threads_and_faults_at_once_lose_nothing(shop: Lightbus) -> None:
    """Loops and threads publish while connections break and a loop is blocked: each event is confirmed, and in time."""
    stop = threading.Event()

    async def from_loop(block: float) -> int:
        count = 0
        while True:  # once at least, however late it begins
            count += len(await publish(shop, *range(30)))
            if block:
                time.sleep(block)  # noqa: ASYNC251
            count += len(await shop.publish_many([OrderPlaced(number=number) for number in range(30)]))
            if stop.is_set():
                return count

    def from_thread(_: int) -> int:
        count = 0
        while True:
            shop.publish_sync(OrderPlaced(number=count))
            count += 1
            if stop.is_set():
                return count

    with ThreadPoolExecutor(8) as pool:
        working = [pool.submit(asyncio.run, from_loop(block)) for block in (0.0, 0.05, 1.5)]
        working += [pool.submit(from_thread, number) for number in range(3)]
        for _ in range(6):
            epoch, deadline = shop.publisher.epoch, time.monotonic() + LIMIT
            break_connection(shop.publisher)
            while shop.publisher.epoch == epoch and time.monotonic() < deadline:
                stop.wait(0.2)
                if shop.publisher.connection is not None and shop.publisher.epoch == epoch:
                    break_connection(shop.publisher)
        stop.set()
        assert all(work.result(3 * LIMIT) > 0 for work in working)
    assert shop.publisher.epoch >= 6


# --- consuming --------------------------------------------------------------------------------


@pytest.fixture
def billing(rabbitmq_url: str) -> Iterator[Lightbus]:
    app = Lightbus("billing", url=rabbitmq_url, retry=QUICK)
    yield app
    app.__exit__(None, None, None)


def subscriber(bus: Bus) -> ConsumerConnection:
    (consumer,) = bus.consumers["billing"]
    return consumer.connection


def all_acked(bus: Bus) -> bool:
    return not any(queue_consumer.in_hand for queue_consumer in subscriber(bus).consumers)


def test_the_loop_that_handles_reads_its_deliveries_and_acks_them(
    shop: Lightbus, billing: Lightbus, run: Callable[..., Any]
) -> None:
    handled: list[int] = []

    @billing.on("order.placed")
    async def handle(order: OrderPlaced) -> None:
        handled.append(order.number)

    async def main() -> None:
        async with running(billing) as bus:
            await shop.publish_many([OrderPlaced(number=number) for number in range(3000)])
            await eventually(lambda: handled == [*range(3000)])
            await eventually(lambda: all_acked(bus))
            await eventually(lambda: subscriber(bus).read_by_loop)
            for number in range(20):
                await shop.publish(OrderPlaced(number=number))
            await eventually(lambda: handled[3000:] == [*range(20)])
            await eventually(lambda: all_acked(bus))
            assert subscriber(bus).epoch == 1
        assert await left_in(billing) == []

    run(main())


def test_acks_out_of_order_are_sent_by_the_loop_too(shop: Lightbus, billing: Lightbus, run: Callable[..., Any]) -> None:
    go_on: list[anyio.Event] = []
    handled: list[int] = []

    @billing.on("order.placed")
    async def handle(order: OrderPlaced) -> None:
        if order.number == 0:
            await go_on[0].wait()
        handled.append(order.number)

    async def main() -> None:
        go_on.append(anyio.Event())
        async with running(billing, prefetch=50) as bus:
            await shop.publish(OrderPlaced(number=-1))  # the probation is over
            await eventually(lambda: handled == [-1] and subscriber(bus).read_by_loop)
            for number in range(200):
                await shop.publish(OrderPlaced(number=number))
            await eventually(lambda: sorted(handled[1:]) == [*range(1, 200)])
            (queue_consumer,) = subscriber(bus).consumers
            await eventually(lambda: queue_consumer.in_hand, 1)
            go_on[0].set()
            await eventually(lambda: all_acked(bus))
        assert await left_in(billing) == []

    run(main())


def test_a_handler_that_blocks_the_loop_for_four_heartbeats_keeps_the_connection(
    shop: Lightbus, rabbitmq_url: str, run: Callable[..., Any]
) -> None:
    billing = Lightbus("billing", url=f"{rabbitmq_url}?heartbeat=2", retry=QUICK)
    handled: list[int] = []

    @billing.on("order.placed")
    async def block(order: OrderPlaced) -> None:
        if order.number == 1:
            time.sleep(8)  # noqa: ASYNC251
        handled.append(order.number)

    async def main() -> None:
        async with running(billing) as bus:
            for number in range(4):
                await shop.publish(OrderPlaced(number=number))
            await eventually(lambda: handled, [*range(4)])
            await eventually(lambda: all_acked(bus))
            assert subscriber(bus).epoch == 1
            await eventually(lambda: subscriber(bus).read_by_loop)

    run(main())


def test_a_loop_that_was_closed_in_the_middle_leaves_its_events_to_others(shop: Lightbus, billing: Lightbus) -> None:
    handled: list[int] = []

    @billing.on("order.placed")
    async def handle(order: OrderPlaced) -> None:
        handled.append(order.number)
        if len(handled) <= 5:
            await anyio.sleep(LIMIT)

    forgotten = billing.consumer()

    async def begin() -> asyncio.Task[None]:
        task = asyncio.ensure_future(forgotten.run())
        await eventually(lambda: forgotten.connected)
        await publish(shop, *range(5))
        await eventually(lambda: len(handled) == 5 and forgotten.read_by_loop)
        return task

    loop = asyncio.new_event_loop()
    task = loop.run_until_complete(begin())
    loop.close()

    async def go_on() -> None:
        async with running(billing):
            await eventually(lambda: sorted(handled[5:]) == [*range(5)])

    asyncio.run(go_on())
    assert not task.done()


def test_an_epoch_that_ends_while_the_loop_reads_loses_nothing(
    shop: Lightbus, billing: Lightbus, run: Callable[..., Any]
) -> None:
    """Connections break, the loop is blocked at times, handlers wait and fail: each event is handled in the end."""
    handled: Counter[int] = Counter()
    failed: set[int] = set()

    @billing.on("order.placed")
    async def handle(order: OrderPlaced) -> None:
        if order.number % 3 == 0:
            await anyio.sleep(0.002)
        if order.number % 97 == 0 and order.number not in failed:
            failed.add(order.number)
            raise ValueError("the first time")
        if order.number % 1000 == 500:
            time.sleep(1.5)  # noqa: ASYNC251
        handled[order.number] += 1

    async def main() -> None:
        async with running(billing, prefetch=40) as bus:
            await eventually(lambda: subscriber(bus).read_by_loop)
            for epoch in range(1, 6):
                first = 800 * epoch
                publishing = asyncio.ensure_future(
                    shop.publish_many([OrderPlaced(number=number) for number in range(first, first + 800)])
                )
                await eventually(lambda first=first: handled[first + 50])
                break_connection(subscriber(bus))
                await publishing
                await eventually(lambda epoch=epoch: subscriber(bus).epoch > epoch)
            await eventually(lambda: len(handled) == 4000, limit=3 * LIMIT)
            await eventually(lambda: all_acked(bus))
        assert await left_in(billing) == []
        assert await dead_letters(billing, 0) == []

    run(main())
