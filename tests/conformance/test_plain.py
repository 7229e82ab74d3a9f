"""Sync handlers run in a thread pool, with the same guarantees as async handlers."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import pytest

from lightbus import Lightbus, Message, Reject, Retry
from tests.bus import OrderCancelled, OrderPlaced, dead_letters, eventually, left_in, reason, running
from tests.patience import LIMIT

pytestmark = pytest.mark.anyio

MakeApp = Callable[..., Lightbus]

BOTH_LOOPS = pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])


class AtOnce:
    """Counts the concurrent users of the block, and their maximum."""

    def __init__(self) -> None:
        self.now = self.most = self.all = 0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.now -= 1
            self.all += 1


@BOTH_LOOPS
async def test_the_concurrency_limits_concurrent_sync_handlers(shop: Lightbus, billing: Lightbus) -> None:
    together = threading.Barrier(8)
    at_once = AtOnce()

    @billing.on("order.placed")
    def meet() -> None:
        with at_once:
            together.wait(LIMIT)  # fails if fewer than 8 run concurrently

    async with running(shop, billing, concurrency=8):
        await shop.publish_many([OrderPlaced(number=n) for n in range(32)])
        await eventually(lambda: at_once.all, 32)
    assert at_once.most == 8
    assert await left_in(billing, "billing.dead") == []


async def test_sync_and_async_handlers_share_the_workers_concurrency(shop: Lightbus, billing: Lightbus) -> None:
    at_once = AtOnce()

    @billing.on("order.placed")
    def plain() -> None:
        with at_once:
            time.sleep(0.002)

    @billing.on("order.placed")
    async def in_the_loop() -> None:
        with at_once:
            await anyio.sleep(0.002)

    async with running(shop, billing, concurrency=3):
        await shop.publish_many([OrderPlaced(number=n) for n in range(100)])
        await eventually(lambda: at_once.all, 200)
    assert at_once.most <= 3
    assert await left_in(billing) == []


async def test_the_concurrency_of_a_sync_handler_is_respected_while_others_run(
    shop: Lightbus, billing: Lightbus
) -> None:
    few, many = AtOnce(), AtOnce()
    together = threading.Barrier(3)

    @billing.on("order.placed", concurrency=2, retry=Retry(delays=(0.05,)))
    def limited(order: OrderPlaced, message: Message) -> None:
        with few:
            time.sleep(0.002)
            if order.number % 7 == 0 and message.attempt == 1:
                raise ValueError("once more")

    @billing.on("order.placed")
    def free() -> None:
        with many:
            together.wait(LIMIT)  # fails if the other handler uses all threads

    async with running(shop, billing, concurrency=8):
        await shop.publish_many([OrderPlaced(number=n) for n in range(72)])
        await eventually(lambda: (few.all, many.all), (83, 72))
    assert few.most == 2
    assert await left_in(billing) == []
    assert await left_in(billing, "billing.dead") == []


@BOTH_LOOPS
async def test_each_run_has_its_own_copy_of_the_context_of_the_lifespan(make_app: MakeApp, shop: Lightbus) -> None:
    tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="unset")
    seen: list[str] = []

    @contextlib.asynccontextmanager
    async def lifespan(app: Lightbus) -> AsyncIterator[None]:
        tenant.set("set by the lifespan")
        yield

    billing = make_app("billing", lifespan=lifespan)

    @billing.on("order.placed")
    def note(order: OrderPlaced) -> None:
        seen.append(tenant.get())
        tenant.set(f"set by order {order.number}")

    async with contextlib.AsyncExitStack() as stack:
        assert billing.lifespan is not None
        await stack.enter_async_context(billing.lifespan(billing))
        await stack.enter_async_context(running(shop, billing, concurrency=1))
        await shop.publish_many([OrderPlaced(number=n) for n in range(5)])
        await eventually(lambda: seen, ["set by the lifespan"] * 5)


@BOTH_LOOPS
async def test_a_coroutine_that_a_sync_handler_returns_is_awaited(shop: Lightbus, billing: Lightbus) -> None:
    main = threading.get_ident()
    received: list[int] = []

    def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*arguments: Any) -> Any:
            return function(*arguments)

        return wrapper

    @billing.on("order.placed")
    @decorated
    async def note(order: OrderPlaced) -> None:
        await anyio.lowlevel.checkpoint()
        assert threading.get_ident() == main
        received.append(order.number)

    @billing.on("order.cancelled", retry=Retry.none(), timeout=1)
    @decorated
    async def fail(order: OrderCancelled) -> None:
        if order.number:
            raise Reject("no")
        await anyio.sleep(LIMIT)

    async with running(shop, billing):
        await shop.publish_many([OrderPlaced(number=n) for n in range(10)])
        await shop.publish_many([OrderCancelled(number=n) for n in range(2)])
        dead = await dead_letters(billing, 2)
        await eventually(lambda: sorted(received), list(range(10)))
    assert sorted(reason(one).partition(":")[0] for one in dead) == [
        "lightbus.errors.HandlerTimeout",
        "lightbus.errors.Reject",
    ]
    assert await left_in(billing) == []


@BOTH_LOOPS
async def test_a_decorated_async_handler_gets_the_context_of_its_decorator(shop: Lightbus, billing: Lightbus) -> None:
    tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="unset")
    seen: list[tuple[str, str, str, str | None]] = []

    def with_tenant(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(order: OrderPlaced, message: Message) -> Any:
            token = tenant.set(f"tenant {order.number}")

            async def rest() -> None:
                try:
                    await function(order, message)
                finally:
                    tenant.reset(token)  # only possible in the very same context

            return rest()

        return wrapper

    @billing.on("order.placed", retry=Retry.none())
    @with_tenant
    async def note(order: OrderPlaced, message: Message) -> None:
        before = tenant.get()
        with anyio.move_on_after(LIMIT):  # anyio finds its event loop here
            await anyio.sleep(0.001)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.lowlevel.checkpoint)
        await shop.publish(OrderCancelled(number=order.number))
        seen.append((before, tenant.get(), f"tenant {order.number}", message.id))

    caused: list[str | None] = []

    @billing.on("order.cancelled")
    async def handle(message: Message) -> None:
        caused.append(message.causation_id)

    async with running(shop, billing):
        await shop.publish_many([OrderPlaced(number=n) for n in range(20)])
        await eventually(lambda: (len(seen), len(caused)), (20, 20))
    assert all(before == after == expected for before, after, expected, _ in seen)
    assert sorted(map(str, caused)) == sorted(str(one) for *_, one in seen)
    assert await left_in(billing, "billing.dead") == []


@BOTH_LOOPS
async def test_a_sync_handler_can_use_the_event_loop_and_detect_its_timeout(shop: Lightbus, billing: Lightbus) -> None:
    main = threading.get_ident()
    cancelled = threading.Event()
    attempts: list[int] = []

    @billing.on("order.placed", timeout=1, retry=Retry(delays=(0.05,)))
    def work(message: Message) -> None:
        assert anyio.from_thread.run_sync(threading.get_ident) == main
        attempts.append(message.attempt)
        deadline = time.monotonic() + LIMIT
        while message.attempt == 1 and time.monotonic() < deadline:
            try:
                anyio.from_thread.check_cancelled()
            except BaseException:
                cancelled.set()
                raise
            time.sleep(0.01)

    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1))
        await eventually(cancelled.is_set)
        await eventually(lambda: attempts, [1, 2])
    assert await left_in(billing) == []
    assert await left_in(billing, "billing.dead") == []


async def test_a_handler_that_ends_after_its_timeout_neither_settles_nor_fails_again(
    shop: Lightbus, billing: Lightbus
) -> None:
    late = threading.Event()
    ended: list[tuple[int, int]] = []

    @billing.on("order.placed", timeout=1, retry=Retry(delays=(0.05,)))
    def work(order: OrderPlaced, message: Message) -> None:
        if message.attempt == 1:
            assert late.wait(LIMIT)
        ended.append((order.number, message.attempt))
        if message.attempt == 1 and order.number % 2:
            raise ValueError("late")

    async with running(shop, billing, concurrency=2) as bus:
        (consumer,) = bus.consumers["billing"]
        await shop.publish_many([OrderPlaced(number=n) for n in range(6)])
        await eventually(lambda: sorted(ended), [(n, 2) for n in range(6)])
        await eventually(lambda: consumer.handled, 12)  # each event: abandoned once, handled once
        late.set()
        await eventually(lambda: len(ended), 12)
        await bus.quiet(billing)
        await eventually(lambda: consumer.handled, 13)  # the sentinel event
    assert await left_in(billing) == []
    assert await left_in(billing, "billing.dead") == []


@pytest.mark.parametrize(
    "error", [SystemExit(3), asyncio.CancelledError(), ExceptionGroup("two", [ValueError(), OSError()])]
)
async def test_any_exception_of_a_sync_handler_fails_only_its_event(
    shop: Lightbus, billing: Lightbus, error: BaseException
) -> None:
    received: list[int] = []

    @billing.on("order.placed", retry=Retry.none())
    def fail(order: OrderPlaced) -> None:
        if order.number == 1:
            raise error
        received.append(order.number)

    async with running(shop, billing):
        await shop.publish_many([OrderPlaced(number=n) for n in range(3)])
        (dead,) = await dead_letters(billing)
        await eventually(lambda: sorted(received), [0, 2])
    assert type(error).__name__ in reason(dead).partition(":")[0]


async def test_idle_threads_do_not_delay_a_stop(shop: Lightbus, billing: Lightbus) -> None:
    together = threading.Barrier(4)
    names: set[str] = set()

    @billing.on("order.placed")
    def meet() -> None:
        names.add(threading.current_thread().name)
        together.wait(LIMIT)

    async with running(shop, billing, concurrency=4) as bus:
        (consumer,) = bus.consumers["billing"]
        await shop.publish_many([OrderPlaced(number=n) for n in range(4)])
        await eventually(lambda: consumer.handled, 4)
        assert consumer.in_flight == []
        with anyio.fail_after(LIMIT / 2):
            assert await bus.stop(billing, grace=LIMIT)
    assert names == {"lightbus handler of billing.main"}
    assert await left_in(billing) == []


async def test_publishing_from_many_sync_handlers_passes_the_correlation_on(
    shop: Lightbus, billing: Lightbus, make_app: MakeApp
) -> None:
    stats = make_app("stats")
    correlations: dict[int, str] = {}
    received: dict[int, str] = {}

    @billing.event
    class InvoiceSent:
        number: int

    @billing.on("order.placed")
    def answer(order: OrderPlaced, message: Message) -> None:
        correlations[order.number] = message.correlation_id
        billing.publish_sync(InvoiceSent(number=order.number))

    @stats.on("invoice.sent")
    def note(invoice: dict[str, Any], message: Message) -> None:
        received[invoice["number"]] = message.correlation_id

    async with running(shop, billing, stats):
        await shop.publish_many([OrderPlaced(number=n) for n in range(40)])
        await eventually(lambda: len(received), 40)
    assert received == correlations
    assert len(set(received.values())) == 40
