"""A worker that is ended fails nothing that it has in hand; a handler that cancels harms its own event at most."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest

from lightbus import Lightbus, Message, Receipt, Retry, errors
from lightbus.worker.worker import Worker
from tests.bus import (
    OrderCancelled,
    OrderPlaced,
    dead_letters,
    eventually,
    left_in,
    order_numbers,
    reason,
    returned,
    running,
)
from tests.patience import LIMIT

pytestmark = pytest.mark.anyio

MakeApp = Callable[..., Lightbus]

BOTH_LOOPS = pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])


# --- the worker is ended ----------------------------------------------------------------------


class Crash(Exception):
    """Of a task of the lifespan."""


async def cancel_the_scope(worker: Worker, crash: anyio.Event) -> None:
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(worker.serve, anyio.Event())
            await crash.wait()
            scope.cancel()


async def cancel_the_task(worker: Worker, crash: anyio.Event) -> None:
    task = asyncio.create_task(worker.serve(anyio.Event()))
    await crash.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def cancel_all_tasks(worker: Worker, crash: anyio.Event) -> None:
    """As asyncio.run does at its end."""
    before = asyncio.all_tasks()
    task = asyncio.create_task(worker.serve(anyio.Event()))
    await crash.wait()
    for one in sorted(asyncio.all_tasks() - before, key=lambda one: one is task):  # the worker's own comes last
        one.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def crash_in_the_lifespan(worker: Worker, crash: anyio.Event) -> None:
    async def fail() -> None:
        await crash.wait()
        raise Crash

    @contextlib.asynccontextmanager
    async def lifespan(app: Lightbus) -> AsyncIterator[None]:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(fail)
            yield

    worker.app.lifespan = lifespan
    with pytest.raises(BaseExceptionGroup) as caught:
        await worker.serve(anyio.Event())
    assert caught.group_contains(Crash)


async def give_up(worker: Worker, crash: anyio.Event) -> None:
    """As the watchdog does."""

    async def stalled() -> None:
        await crash.wait()
        worker.consumer.give_up(errors.WorkerError("stalled"))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stalled)
        with pytest.raises(errors.WorkerError, match="stalled"):
            await worker.serve(anyio.Event())


ENDS = [
    pytest.param(end, backend, id=f"{end.__name__}-{backend}")
    for end, backends in {
        cancel_the_scope: ("asyncio", "trio"),
        cancel_the_task: ("asyncio",),
        cancel_all_tasks: ("asyncio",),
        crash_in_the_lifespan: ("asyncio", "trio"),
        give_up: ("asyncio", "trio"),
    }.items()
    for backend in backends
]


@pytest.mark.parametrize(("end", "anyio_backend"), ENDS)
async def test_what_runs_when_the_worker_is_ended_is_delivered_again_and_has_not_failed(
    shop: Lightbus, billing: Lightbus, end: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    runs: list[str] = []
    crash, go_on = anyio.Event(), threading.Event()

    def begin(what: str) -> None:
        runs.append(what)
        if len(runs) == 4:
            crash.set()

    @billing.on("order.placed")
    async def wait() -> None:
        begin("waits")
        await anyio.sleep(LIMIT)

    @billing.on("order.placed")
    async def object_to_a_cancellation() -> None:
        begin("objects")
        try:
            await anyio.sleep(LIMIT)
        finally:
            raise ValueError("interrupted")

    @billing.on("order.placed")
    async def group() -> None:
        begin("waits in a group")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.sleep, LIMIT)

    @billing.on("order.placed")
    async def plain() -> None:
        await anyio.to_thread.run_sync(lambda: anyio.from_thread.run_sync(begin, "plain"))
        await anyio.sleep(LIMIT)

    @billing.on("order.cancelled")
    def block() -> None:
        go_on.wait(LIMIT)

    async with running(shop):
        worker = Worker(billing)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(end, worker, crash)
            await eventually(lambda: worker.started)
            await shop.publish(OrderCancelled(number=2))
            await shop.publish(OrderPlaced(number=1))
        go_on.set()
        assert sorted(runs) == ["objects", "plain", "waits", "waits in a group"]
        assert sorted(order_numbers(await returned(billing, 2))) == [1, 2]
        assert await left_in(billing, "billing.dead") == []
    assert "failed on" not in caplog.text


@BOTH_LOOPS
async def test_a_failure_whose_copy_is_on_its_way_when_the_worker_is_ended_does_not_come_twice(
    shop: Lightbus, billing: Lightbus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightbus.consuming.tasks.LAST_COPIES", LIMIT)
    publish, on_its_way = billing.publisher.publish, anyio.Event()

    async def publish_slowly(*arguments: Any) -> Receipt:
        on_its_way.set()
        await anyio.sleep(0.1)  # it takes time, in which the worker is cancelled
        return await publish(*arguments)

    monkeypatch.setattr(billing.publisher, "publish", publish_slowly)

    @billing.on("order.placed", retry=Retry.none())
    async def fail() -> None:
        raise ValueError("no")

    async with running(shop):
        worker = Worker(billing)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(cancel_the_scope, worker, on_its_way)
            await eventually(lambda: worker.started)
            await shop.publish(OrderPlaced(number=1))
        assert order_numbers(await left_in(billing, "billing.dead")) == [1]
        assert await left_in(billing) == []


# --- a handler cancels ------------------------------------------------------------------------


async def test_a_handler_that_cancels_its_own_task_fails_alone(shop: Lightbus, billing: Lightbus) -> None:
    received: list[int] = []

    @billing.on("order.placed")
    async def handle(order: OrderPlaced) -> None:
        if order.number == 3:
            _current_task().cancel()
        await anyio.sleep(0.01)
        received.append(order.number)

    async with running(shop, billing):
        await shop.publish_many([OrderPlaced(number=number) for number in range(40)])
        (dead,) = await dead_letters(billing)
        await shop.publish(OrderPlaced(number=40))
        await eventually(lambda: sorted(received), [number for number in range(41) if number != 3])
    assert reason(dead).startswith("lightbus.errors.HandlerCancelled: handler 'handle' cancelled its own task")
    assert dead.properties["headers"]["lightbus-attempt"] == 3
    assert await left_in(billing) == []


@pytest.mark.parametrize("ending", ["returns", "raises"])
async def test_a_handler_that_cancels_its_own_task_and_ends_harms_no_other(
    shop: Lightbus, billing: Lightbus, ending: str
) -> None:
    attempts: list[tuple[int, int]] = []

    @billing.on("order.placed")
    async def handle(order: OrderPlaced, message: Message) -> None:
        attempts.append((order.number, message.attempt))
        if order.number % 2 and message.attempt == 1:
            _current_task().cancel()
            if ending == "raises":
                raise ValueError("once")
        elif order.number % 3 == 0:
            await anyio.sleep(0.01)

    async with running(shop, billing, concurrency=2) as bus:
        (consumer,) = bus.consumers["billing"]
        await shop.publish_many([OrderPlaced(number=number) for number in range(20)])
        await eventually(lambda: {number for number, _ in attempts}, set(range(20)))
        ends = 20 if ending == "returns" else 30  # each failure is one more
        await eventually(lambda: consumer.handled, ends)
    assert [number for number, attempt in attempts if attempt > 1 and not number % 2] == []
    assert await left_in(billing) == []
    assert await left_in(billing, "billing.dead") == []


async def test_a_cancellation_that_comes_too_late_costs_the_next_event_a_second_run_at_most(
    shop: Lightbus, billing: Lightbus, caplog: pytest.LogCaptureFixture
) -> None:
    runs: list[tuple[int, int]] = []
    all_are_here = anyio.Event()

    @billing.on("order.cancelled")
    async def hold_the_task() -> None:
        await all_are_here.wait()

    @billing.on("order.placed")
    async def handle(order: OrderPlaced, message: Message) -> None:
        if order.number == 0:  # a hand-made timeout, whose timer is forgotten; the task goes on with the next event
            asyncio.get_running_loop().call_soon(_current_task().cancel)
            return
        runs.append((order.number, message.attempt))
        if len(runs) == 1:
            await anyio.sleep(LIMIT)

    async with running(shop, billing, concurrency=1) as bus:
        (consumer,) = bus.consumers["billing"]
        consumer.consumers[0].credit.floor = 4  # so that more are taken ahead than may run at once
        await shop.publish(OrderCancelled(number=9))
        await shop.publish_many([OrderPlaced(number=number) for number in range(3)])
        await eventually(lambda: len(consumer.runners[0].turns.ready), 3)
        all_are_here.set()
        await eventually(lambda: consumer.handled, 4)
    assert runs == [(1, 1), (1, 1), (2, 1)]
    assert "The handler 'handle' on 'order.placed'" in caplog.text
    assert "was interrupted: its task was cancelled" in caplog.text
    assert "failed on" not in caplog.text
    assert await left_in(billing) == []
    assert await left_in(billing, "billing.dead") == []


async def test_a_handler_that_awaits_what_was_cancelled_is_tried_again(shop: Lightbus, billing: Lightbus) -> None:
    attempts: list[int] = []

    @billing.on("order.placed")
    async def handle(message: Message) -> None:
        attempts.append(message.attempt)
        task = asyncio.ensure_future(asyncio.sleep(LIMIT))
        if message.attempt < 3:
            asyncio.get_running_loop().call_soon(task.cancel)
            await task
        task.cancel()

    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1))
        await eventually(lambda: attempts, [1, 2, 3])
    assert await left_in(billing, "billing.dead") == []


@pytest.mark.parametrize("limit", [asyncio.timeout, anyio.fail_after])
async def test_a_time_limit_inside_of_a_handler_is_its_own_failure_and_interrupts_no_other(
    shop: Lightbus, billing: Lightbus, limit: Callable[[float], Any]
) -> None:
    runs: list[int] = []

    async def wait() -> None:
        scope = limit(0.01)
        if isinstance(scope, asyncio.Timeout):
            async with scope:
                await anyio.sleep(LIMIT)
        with scope:
            await anyio.sleep(LIMIT)

    @billing.on("order.placed", retry=Retry.none())
    async def handle(order: OrderPlaced) -> None:
        runs.append(order.number)
        await anyio.lowlevel.checkpoint()
        if order.number % 5 == 0:
            await wait()

    async with running(shop, billing, concurrency=2):
        await shop.publish_many([OrderPlaced(number=number) for number in range(20)])
        dead = await dead_letters(billing, 4)
        await eventually(lambda: sorted(runs), list(range(20)))
    assert {reason(one).partition(":")[0] for one in dead} == {"TimeoutError"}
    assert sorted(order_numbers(dead)) == [0, 5, 10, 15]


async def test_a_worker_that_a_handler_cancels_from_inside_ends_with_an_error(
    shop: Lightbus, billing: Lightbus
) -> None:
    @billing.on("order.placed")
    async def cancel_what_is_around_it() -> None:
        for task in asyncio.all_tasks() - others:
            if "Timeouts.watch" in repr(task):
                task.cancel()
        await anyio.sleep(LIMIT)

    async with running(shop):
        others = asyncio.all_tasks()
        worker = Worker(billing)
        async with anyio.create_task_group() as tasks:

            async def serve() -> None:
                with pytest.raises(errors.WorkerError, match="The worker of 'billing' was cancelled from inside"):
                    await worker.serve(anyio.Event())

            tasks.start_soon(serve)
            await eventually(lambda: worker.started)
            await shop.publish(OrderPlaced(number=1))
        assert order_numbers(await returned(billing)) == [1]


def _current_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task
