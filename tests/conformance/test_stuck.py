"""Handlers that run on after their timeout, and handlers that block the event loop: reported, and held up by few."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import anyio
import anyio.to_thread
import pytest

from lightbus import Lightbus, Retry
from lightbus.consuming import threads, timeouts
from lightbus.worker import health
from lightbus.worker.worker import Worker
from tests.bus import OrderCancelled, OrderPlaced, dead_letters, eventually, left_in, order_numbers, running
from tests.patience import LIMIT

pytestmark = pytest.mark.anyio

MakeApp = Callable[..., Lightbus]

BOTH_LOOPS = pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])


@pytest.fixture(autouse=True)
def soon_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeouts, "STUCK", 0.2)
    monkeypatch.setattr(health, "STUCK", 0.2)
    monkeypatch.setattr(threads, "LEFT_BEHIND", 2)


@BOTH_LOOPS
async def test_a_handler_that_does_not_end_when_it_is_cancelled_fails_and_holds_nobody_up(
    shop: Lightbus, billing: Lightbus, caplog: pytest.LogCaptureFixture
) -> None:
    received: list[int] = []
    cancelled = 0
    go_on = anyio.Event()

    @billing.on("order.placed", timeout=0.1, retry=Retry.none())
    async def stick() -> None:
        nonlocal cancelled
        while not go_on.is_set():
            try:
                await go_on.wait()
            except anyio.get_cancelled_exc_class():
                cancelled += 1

    @billing.on("order.cancelled")
    async def handle(order: OrderCancelled) -> None:
        received.append(order.number)

    async with running(shop, billing, concurrency=1):
        await shop.publish(OrderPlaced(number=1))
        await shop.publish(OrderCancelled(number=2))
        await eventually(lambda: received, [2])
        dead = await eventually_dead(billing)
        assert dead == [1]
        assert 1 <= cancelled < 100  # once a second, not in each round of the event loop
        go_on.set()
        await eventually(lambda: " s after its timeout" in caplog.text)
    (logged,) = [record.getMessage() for record in caplog.records if "still running" in record.getMessage()]
    assert logged.startswith("The handler 'stick' on 'order.placed' (")
    assert "in 'billing.main' exceeded its timeout of 0.1 s and is still running" in logged
    assert "Its event has failed" in logged
    assert "in stick\n    await go_on.wait()" in logged
    assert await left_in(billing) == []


async def test_handlers_that_do_not_end_are_few_and_the_worker_is_not_ready_for_they_hold_all(
    shop: Lightbus, billing: Lightbus, caplog: pytest.LogCaptureFixture
) -> None:
    go_on, stop = anyio.Event(), anyio.Event()
    received: list[int] = []

    @billing.on("order.placed", timeout=0.1, retry=Retry.none())
    async def stick() -> None:
        with anyio.CancelScope(shield=True):
            await go_on.wait()

    @billing.on("order.cancelled")
    async def handle(order: OrderCancelled) -> None:
        received.append(order.number)

    async with running(shop):
        worker = Worker(billing, concurrency=1)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(worker.serve, stop)
            await eventually(lambda: worker.started)
            await shop.publish_many([OrderPlaced(number=number) for number in range(3)])
            await shop.publish(OrderCancelled(number=4))
            problem = (
                "nothing of 'billing.main' is handled: handlers that exceeded their timeout do not stop: stick (3)"
            )
            await eventually(lambda: health.report(worker).problems, [problem])
            now = time.monotonic()
            found = health.report(worker, now)
            assert (found.live, found.ready) == (True, False)
            over_timeout = found.body["handlers"]["over_timeout"]
            assert (over_timeout["count"], over_timeout["oldest"]["handler"]) == (3, "stick")
            assert not health.report(worker, now + health.STUCK_LOOP).live
            await eventually(lambda: "Its event stays unacknowledged" in caplog.text)
            assert received == []
            go_on.set()
            await eventually(lambda: received, [4])
            await eventually(lambda: health.report(worker).ready)
            stop.set()
    assert len(await eventually_dead(billing, 2)) == 2  # the third ended well before its event was decided on
    assert await left_in(billing) == []


@BOTH_LOOPS
async def test_threads_of_handlers_that_do_not_end_are_few_and_reported(
    shop: Lightbus, billing: Lightbus, caplog: pytest.LogCaptureFixture
) -> None:
    go_on, stop = threading.Event(), anyio.Event()
    began: list[int] = []

    @billing.on("order.placed", timeout=0.1, retry=Retry.none())
    def block(order: OrderPlaced) -> None:
        began.append(order.number)
        go_on.wait(LIMIT)

    async with running(shop):
        worker = Worker(billing, concurrency=2)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(worker.serve, stop)
            await eventually(lambda: worker.started)
            await shop.publish_many([OrderPlaced(number=number) for number in range(20)])
            await eventually(
                lambda: (
                    bool(health.report(worker).problems)
                    and health.report(worker).problems[0].startswith("sync handlers of 'billing.main' get no thread")
                )
            )
            await eventually(lambda: "the thread cannot be stopped" in caplog.text)
            assert 2 <= len(began) <= 3  # left behind: 2, and what ran beside the last of them
            go_on.set()
            await eventually(lambda: sorted(began), list(range(20)))
            await eventually(lambda: health.report(worker).ready)
            stop.set()
    assert "in block\n    go_on.wait(LIMIT)" in caplog.text
    logged = next(record for record in caplog.records if "the thread cannot be stopped" in record.getMessage())
    fields = logged.lightbus  # type: ignore[attr-defined]
    assert (fields["app"], fields["event"], fields["handler"]) == ("billing", "order.placed", "block")
    assert await left_in(billing) == []


@BOTH_LOOPS
async def test_a_handler_that_blocks_the_event_loop_is_named_with_where_it_is_and_has_handled_its_event(
    shop: Lightbus, billing: Lightbus, caplog: pytest.LogCaptureFixture
) -> None:
    @billing.on("order.placed", timeout=0.1)
    async def block() -> None:
        deadline = time.monotonic() + LIMIT
        while "blocked the event loop" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.02)  # noqa: ASYNC251

    worker, stop = Worker(billing), anyio.Event()
    async with running(shop), anyio.create_task_group() as tasks:
        tasks.start_soon(worker.serve, stop)
        await eventually(lambda: worker.started)
        await shop.publish(OrderPlaced(number=1))
        await eventually(lambda: worker.consumer.handled, 1)
        stop.set()
    assert worker.blocked == {"block": 1}
    (logged,) = [record.getMessage() for record in caplog.records if "blocked the event loop" in record.getMessage()]
    assert logged.startswith("The handler 'block' on 'order.placed' (")
    assert "time.sleep(0.02)" in logged or "in block" in logged
    assert await left_in(billing) == []
    assert await left_in(billing, "billing.dead") == []


async def eventually_dead(app: Lightbus, count: int = 1) -> list[int]:
    return order_numbers(await dead_letters(app, count))


async def test_where_no_thread_can_be_started_plain_handlers_run_later(
    shop: Lightbus, billing: Lightbus, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start, refused = threading.Thread.start, threading.Event()
    received: list[int] = []

    def start_or_refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("AnyIO worker") and not refused.is_set():
            refused.set()
            raise RuntimeError("can't start new thread")
        start(thread)

    @billing.on("order.placed")
    def handle(order: OrderPlaced) -> None:
        received.append(order.number)

    async with running(shop, billing):
        monkeypatch.setattr(threading.Thread, "start", start_or_refuse)
        await shop.publish_many([OrderPlaced(number=number) for number in range(5)])
        await eventually(lambda: sorted(received), list(range(5)))
    if refused.is_set():  # anyio may have had a thread left
        assert "Cannot start a thread for the sync handlers of 'billing.main': can't start new thread" in caplog.text
    assert await left_in(billing) == []
