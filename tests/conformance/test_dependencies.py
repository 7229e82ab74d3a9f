"""Dependencies run around a handler: set-up before it, tear-down after it and before the ack."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator
from typing import Annotated

import anyio
import anyio.abc
import anyio.lowlevel
import attrs
import pytest

from lightbus import Depends, Lightbus, Message, Reject, Retry, State, errors
from lightbus.middleware import Next
from lightbus.transport import Delivery
from lightbus.worker import serve
from tests import bus
from tests.bus import LIMIT, OrderPlaced, dead_letters, eventually, left_in, order_numbers, returned, running

pytestmark = pytest.mark.anyio

MakeApp = Callable[..., Lightbus]
BOTH_LOOPS = pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
ONCE = Retry.none()

log: list[str] = []


@pytest.fixture(autouse=True)
def _empty_log() -> None:
    log.clear()


def reason(dead_letter: Delivery) -> str:
    return bus.reason(dead_letter).removeprefix("lightbus.errors.")


class Session:
    """Notes what becomes of it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.thread = threading.get_ident()


@contextlib.contextmanager
def noted(kind: str) -> Generator[Session]:
    log.append("open")
    try:
        yield Session(kind)
    except BaseException as error:
        log.append(f"roll back: {type(error).__name__}")
        raise
    else:
        log.append("commit")
    finally:
        log.append("close")


async def open_async() -> AsyncGenerator[Session]:
    with noted("async generator") as session:
        await anyio.lowlevel.checkpoint()
        yield session


def open_sync() -> Generator[Session]:
    with noted("generator") as session:
        yield session


async def make_async() -> Session:
    await anyio.lowlevel.checkpoint()
    return Session("async function")


def make_sync() -> Session:
    return Session("function")


AsyncSession = Annotated[Session, Depends(open_async)]
SyncSession = Annotated[Session, Depends(open_sync)]


# --- which functions, and when they run -------------------------------------------------------


@BOTH_LOOPS
async def test_an_async_handler_gets_dependencies_of_all_four_kinds(shop: Lightbus, billing: Lightbus) -> None:
    received: list[object] = []
    loop = threading.get_ident()

    @billing.on("order.placed")
    async def handle(
        one: AsyncSession,
        order: OrderPlaced,
        two: SyncSession,
        three: Annotated[Session, Depends(make_async)],
        message: Message,
        *,
        four: Annotated[Session, Depends(make_sync)],
    ) -> None:
        sessions = [one, two, three, four]
        assert {session.thread for session in sessions} == {loop}
        received.extend([order, message.event, *(session.kind for session in sessions)])

    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1))
        await eventually(lambda: log, ["open", "open", "commit", "close", "commit", "close"])
    kinds = ["async generator", "generator", "async function", "function"]
    assert received == [OrderPlaced(number=1), "order.placed", *kinds]
    assert await left_in(billing) == []


@BOTH_LOOPS
async def test_a_sync_handler_gets_sync_dependencies_in_its_thread(shop: Lightbus, billing: Lightbus) -> None:
    received: list[object] = []

    @billing.on("order.placed")
    def handle(
        order: OrderPlaced, one: SyncSession, message: Message, *, two: Annotated[Session, Depends(make_sync)]
    ) -> None:
        log.append("handle")
        assert one.thread == two.thread == threading.get_ident()
        received.extend([order, message.event, one.kind, two.kind])

    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1))
        await eventually(lambda: log, ["open", "handle", "commit", "close"])
    assert received == [OrderPlaced(number=1), "order.placed", "generator", "function"]
    assert await left_in(billing) == []


async def test_an_event_is_acked_only_after_the_tear_down(shop: Lightbus, billing: Lightbus) -> None:
    async def close_slowly() -> AsyncGenerator[None]:
        yield
        log.append("tear-down")
        await anyio.sleep_forever()

    @billing.on("order.placed")
    async def handle(order: OrderPlaced, slow: Annotated[None, Depends(close_slowly)]) -> None:
        log.append("handled")

    async with running(shop, billing) as both:
        await shop.publish(OrderPlaced(number=1))
        await eventually(lambda: log, ["handled", "tear-down"])
        assert not await both.stop(billing, grace=0)
    assert order_numbers(await returned(billing)) == [1]


async def test_each_of_many_events_has_its_own_dependencies(shop: Lightbus, billing: Lightbus) -> None:
    opened, closed, seen = Counter[str](), Counter[str](), Counter[str]()

    async def open_for(message: Message) -> AsyncGenerator[str]:
        opened[message.id] += 1
        yield message.id
        closed[message.id] += 1

    @billing.on("order.placed")
    async def handle(order: OrderPlaced, mine: Annotated[str, Depends(open_for)], message: Message) -> None:
        if order.number % 3:
            await anyio.lowlevel.checkpoint()
        assert mine == message.id
        seen[mine] += 1

    async with running(shop, billing):
        await shop.publish_many([OrderPlaced(number=n) for n in range(300)])
        await eventually(lambda: len(closed), 300)
    assert opened == closed == seen
    assert set(opened.values()) == {1}
    assert await left_in(billing) == []
    assert await left_in(billing, "billing.dead") == []


@pytest.mark.parametrize("is_async", [True, False])
async def test_a_dependency_is_made_once_for_an_event_however_often_it_is_asked_for(
    shop: Lightbus, billing: Lightbus, is_async: bool
) -> None:
    received: list[tuple[object, ...]] = []

    def repository(session: SyncSession, message: Message) -> tuple[str, Session, str]:
        return "repository", session, message.event

    def service(session: SyncSession, repository: Annotated[object, Depends(repository)]) -> tuple[object, ...]:
        return session, repository

    def handle_plainly(
        session: SyncSession,
        service: Annotated[tuple[object, ...], Depends(service)],
        repository: Annotated[object, Depends(repository)],
    ) -> None:
        received.append((session, repository, service))

    async def handle(
        session: SyncSession,
        service: Annotated[tuple[object, ...], Depends(service)],
        repository: Annotated[object, Depends(repository)],
    ) -> None:
        handle_plainly(session, service, repository)

    billing.on("order.placed", concurrency=1)(handle if is_async else handle_plainly)  # both runs use one log
    async with running(shop, billing):
        for number in range(2):
            await shop.publish(OrderPlaced(number=number))
        await eventually(lambda: log, ["open", "commit", "close"] * 2)
    for session, made, rest in received:
        assert made == ("repository", session, "order.placed")
        assert rest == (session, made)
    assert received[0][0] is not received[1][0]


async def test_dependencies_run_inside_of_the_middleware(shop: Lightbus, billing: Lightbus) -> None:
    async def around(message: Message, call_next: Next) -> None:
        log.append("middleware")
        await call_next()
        log.append("end of the middleware")

    @billing.on("order.placed", middleware=[around])
    async def handle(order: OrderPlaced, session: AsyncSession) -> None:
        log.append("handle")

    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1))
        await eventually(lambda: log, ["middleware", "open", "handle", "commit", "close", "end of the middleware"])


@pytest.mark.parametrize("resets", [True, False])
@pytest.mark.parametrize("is_async", [True, False])
async def test_a_context_variable_that_a_dependency_sets_is_seen_by_the_handler_alone(
    shop: Lightbus, billing: Lightbus, is_async: bool, resets: bool
) -> None:
    tenant = contextvars.ContextVar("tenant", default="nobody")

    def set_tenant(message: Message) -> Generator[None]:
        log.append(tenant.get())
        token = tenant.set("somebody")
        yield
        if resets:
            tenant.reset(token)

    async def handle(set_: Annotated[None, Depends(set_tenant)]) -> None:
        log.append(tenant.get())

    def handle_plainly(set_: Annotated[None, Depends(set_tenant)]) -> None:
        log.append(tenant.get())

    billing.on("order.placed", concurrency=1)(handle if is_async else handle_plainly)  # both runs use one log
    async with running(shop, billing):
        for number in range(2):
            await shop.publish(OrderPlaced(number=number))
        await eventually(lambda: log, ["nobody", "somebody"] * 2)
    assert await left_in(billing, "billing.dead") == []


@BOTH_LOOPS
async def test_a_dependency_may_be_a_task_group_that_ends_before_the_ack(shop: Lightbus, billing: Lightbus) -> None:
    async def open_group() -> AsyncGenerator[anyio.abc.TaskGroup]:
        async with anyio.create_task_group() as group:
            yield group

    async def work(number: int) -> None:
        await anyio.lowlevel.checkpoint()
        log.append(str(number))
        if number == 7:
            await anyio.sleep_forever()

    @billing.on("order.placed")
    async def handle(order: OrderPlaced, group: Annotated[anyio.abc.TaskGroup, Depends(open_group)]) -> None:
        group.start_soon(work, order.number)

    async with running(shop, billing) as both:
        (consumer,) = both.consumers["billing"]
        await shop.publish_many([OrderPlaced(number=n) for n in range(30)])
        await eventually(lambda: sorted(map(int, log)), [*range(30)])
        await eventually(lambda: consumer.handled, 29)
        assert not await both.stop(billing, grace=0)
    assert order_numbers(await returned(billing)) == [7]
    assert await left_in(billing, "billing.dead") == []


# --- failures ---------------------------------------------------------------------------------


@BOTH_LOOPS
async def test_the_generator_sees_the_error_of_an_async_handler_at_each_attempt(
    shop: Lightbus, billing: Lightbus
) -> None:
    @billing.on("order.placed")
    async def handle(order: OrderPlaced, session: AsyncSession) -> None:
        raise ValueError("no stock")

    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1))
        [dead] = await dead_letters(billing)
    assert log == ["open", "roll back: ValueError", "close"] * 3
    assert reason(dead) == "ValueError: no stock"
    trace = dead.properties["headers"]["lightbus-error-traceback"]
    assert 'raise ValueError("no stock")' in trace
    assert "yield" not in trace


async def test_the_generator_sees_the_error_of_a_sync_handler_at_each_attempt(
    shop: Lightbus, billing: Lightbus
) -> None:
    @billing.on("order.placed")
    def handle(order: OrderPlaced, session: SyncSession) -> None:
        raise ValueError("no stock")

    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1))
        [dead] = await dead_letters(billing)
    assert log == ["open", "roll back: ValueError", "close"] * 3
    assert reason(dead) == "ValueError: no stock"


def swallow_sync() -> Generator[None]:
    with contextlib.suppress(BaseException):
        yield


async def swallow_async() -> AsyncGenerator[None]:
    with contextlib.suppress(BaseException):
        yield


@pytest.mark.parametrize("error", [ValueError("lost?"), StopIteration(), StopAsyncIteration(), Reject("lost?")])
@pytest.mark.parametrize("kind", ["sync", "async", "sync in async"])
async def test_a_generator_that_hides_the_handlers_error_does_not_make_the_event_handled(
    shop: Lightbus, billing: Lightbus, kind: str, error: Exception
) -> None:
    def fail_plainly(session: SyncSession, swallow: Annotated[None, Depends(swallow_sync)]) -> None:
        raise error

    async def fail(session: AsyncSession, swallow: Annotated[None, Depends(swallow_async)]) -> None:
        raise error

    async def fail_mixed(session: AsyncSession, swallow: Annotated[None, Depends(swallow_sync)]) -> None:
        raise error

    functions = {"sync": fail_plainly, "async": fail, "sync in async": fail_mixed}
    billing.on("order.placed", retry=ONCE)(functions[kind])
    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1))
        [dead] = await dead_letters(billing)
    # Python turns a StopIteration that leaves a coroutine into a RuntimeError.
    wanted = {type(error).__name__} | ({"RuntimeError"} if isinstance(error, StopIteration) else set())
    assert reason(dead).partition(":")[0] in wanted
    assert [line for line in log if line.startswith("roll back")], "the outer generator sees the error, too"


@pytest.mark.parametrize("is_async", [True, False])
async def test_an_error_in_a_set_up_is_the_handlers_and_what_is_open_is_closed(
    shop: Lightbus, billing: Lightbus, is_async: bool
) -> None:
    def unreachable(session: SyncSession) -> Generator[None]:
        raise ConnectionRefusedError("no database")
        yield

    async def handle(nothing: Annotated[None, Depends(unreachable)]) -> None:
        log.append("handled")

    def handle_plainly(nothing: Annotated[None, Depends(unreachable)]) -> None:
        log.append("handled")

    billing.on("order.placed")(handle if is_async else handle_plainly)
    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1))
        [dead] = await dead_letters(billing)
    assert log == ["open", "roll back: ConnectionRefusedError", "close"] * 3
    assert reason(dead) == "ConnectionRefusedError: no database"


@pytest.mark.parametrize("is_async", [True, False])
async def test_an_error_in_a_tear_down_is_the_handlers_and_the_other_tear_downs_run(
    shop: Lightbus, billing: Lightbus, is_async: bool
) -> None:
    def fails_at_the_end(session: SyncSession) -> Generator[None]:
        yield
        log.append("tear-down")
        raise ConnectionResetError("cannot commit")

    def last(before: Annotated[None, Depends(fails_at_the_end)]) -> Generator[None]:
        yield
        log.append("last opened, first closed")

    async def handle(order: OrderPlaced, last: Annotated[None, Depends(last)]) -> None:
        log.append("handled")

    def handle_plainly(order: OrderPlaced, last: Annotated[None, Depends(last)]) -> None:
        log.append("handled")

    billing.on("order.placed", retry=ONCE)(handle if is_async else handle_plainly)
    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1))
        [dead] = await dead_letters(billing)
    assert log == [
        "open",
        "handled",
        "last opened, first closed",
        "tear-down",
        "roll back: ConnectionResetError",
        "close",
    ]
    assert reason(dead) == "ConnectionResetError: cannot commit"


async def test_a_dependency_may_reject_the_event(shop: Lightbus, billing: Lightbus) -> None:
    def check(message: Message) -> None:
        log.append("check")
        raise Reject("unknown tenant")

    @billing.on("order.placed")
    async def handle(checked: Annotated[None, Depends(check)]) -> None:
        log.append("handled")

    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1))
        [dead] = await dead_letters(billing)
    assert reason(dead) == "Reject: unknown tenant"
    assert log == ["check"]


async def test_nothing_is_set_up_for_an_event_that_cannot_be_decoded(shop: Lightbus, billing: Lightbus) -> None:
    @attrs.frozen
    class WithAddress:
        address: str

    @billing.on("order.placed")
    async def handle(order: WithAddress, session: AsyncSession) -> None:
        log.append("handled")

    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1))
        [dead] = await dead_letters(billing)
    assert reason(dead).startswith("DecodeError:")
    assert log == []


# --- time limits and cancellation -------------------------------------------------------------


async def hangs_in_its_set_up() -> AsyncGenerator[None]:
    await anyio.sleep_forever()
    yield


async def hangs_in_its_tear_down() -> AsyncGenerator[None]:
    yield
    await anyio.sleep_forever()


async def hangs() -> None:
    await anyio.sleep_forever()


@BOTH_LOOPS
@pytest.mark.parametrize("hanging", [hangs_in_its_set_up, hangs_in_its_tear_down, hangs])
async def test_the_handlers_timeout_covers_a_dependency_that_never_ends(
    shop: Lightbus, billing: Lightbus, hanging: Callable[[], object]
) -> None:
    @billing.on("order.placed", timeout=0.1, retry=ONCE)
    async def handle(session: AsyncSession, hanging: Annotated[None, Depends(hanging)]) -> None: ...

    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1))
        [dead] = await dead_letters(billing)
    assert reason(dead).startswith("HandlerTimeout:")
    assert log[0] == "open"
    assert log[1] in ("roll back: CancelledError", "roll back: Cancelled")
    assert log[2:] == ["close"]


@BOTH_LOOPS
async def test_the_generator_sees_that_the_handler_exceeded_its_timeout(shop: Lightbus, billing: Lightbus) -> None:
    @billing.on("order.placed", timeout=0.1, retry=ONCE)
    async def handle(order: OrderPlaced, session: AsyncSession) -> None:
        await anyio.sleep_forever()

    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1))
        [dead] = await dead_letters(billing)
    assert reason(dead).startswith("HandlerTimeout:")
    assert log[1] in ("roll back: CancelledError", "roll back: Cancelled")


@BOTH_LOOPS
async def test_a_tear_down_may_await_after_the_handler_exceeded_its_timeout(shop: Lightbus, billing: Lightbus) -> None:
    async def rolls_back() -> AsyncGenerator[None]:
        try:
            yield
        finally:
            for _ in range(3):
                await anyio.sleep(0.001)
            log.append("rolled back")

    @billing.on("order.placed", timeout=0.1, retry=ONCE)
    async def handle(order: OrderPlaced, opened: Annotated[None, Depends(rolls_back)]) -> None:
        await anyio.sleep_forever()

    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1))
        [dead] = await dead_letters(billing)
    assert reason(dead).startswith("HandlerTimeout:")
    assert log == ["rolled back"]


@BOTH_LOOPS
async def test_a_tear_down_that_never_ends_after_the_timeout_is_cancelled_too(
    shop: Lightbus, billing: Lightbus
) -> None:
    async def hangs_at_the_end() -> AsyncGenerator[None]:
        try:
            yield
        finally:
            log.append("hangs")
            await anyio.sleep_forever()

    @billing.on("order.placed", timeout=0.1, retry=ONCE)
    async def handle(
        order: OrderPlaced, session: AsyncSession, opened: Annotated[None, Depends(hangs_at_the_end)]
    ) -> None:
        await anyio.sleep_forever()

    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1))
        [dead] = await dead_letters(billing)
    assert reason(dead).startswith("HandlerTimeout:")
    assert [log[0], log[1], log[-1]] == ["open", "hangs", "close"]


@BOTH_LOOPS
async def test_a_generator_that_hides_the_timeout_does_not_make_the_event_handled(
    shop: Lightbus, billing: Lightbus
) -> None:
    @billing.on("order.placed", timeout=0.1, retry=ONCE)
    async def handle(order: OrderPlaced, swallow: Annotated[None, Depends(swallow_async)]) -> None:
        await anyio.sleep_forever()

    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1))
        [dead] = await dead_letters(billing)
    assert reason(dead).startswith("HandlerTimeout:")


async def test_the_generator_sees_that_the_handler_cancelled_its_own_task(shop: Lightbus, billing: Lightbus) -> None:
    @billing.on("order.placed", retry=ONCE)
    async def handle(order: OrderPlaced, session: AsyncSession) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)

    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1))
        [dead] = await dead_letters(billing)
    assert reason(dead).startswith("HandlerCancelled:")
    assert log == ["open", "roll back: CancelledError", "close"]


async def test_a_sync_handler_that_exceeds_its_timeout_is_torn_down_when_it_returns(
    shop: Lightbus, billing: Lightbus
) -> None:
    go_on = threading.Event()

    @billing.on("order.placed", timeout=0.1, retry=ONCE)
    def handle(order: OrderPlaced, session: SyncSession) -> None:
        go_on.wait(LIMIT)

    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1))
        [dead] = await dead_letters(billing)
        assert reason(dead).startswith("HandlerTimeout:")
        assert log == ["open"]
        go_on.set()
        await eventually(lambda: log, ["open", "commit", "close"])


# --- generators that do not yield once --------------------------------------------------------


async def never_async() -> AsyncGenerator[None]:
    if log is None:
        yield


def never_sync() -> Generator[None]:
    if log is None:
        yield


async def twice_async() -> AsyncGenerator[None]:
    yield
    yield


def twice_sync() -> Generator[None]:
    yield
    yield


@pytest.mark.parametrize(
    ("dependency", "handler_is_async", "what"),
    [
        (never_async, True, "never_async returned without yielding"),
        (never_sync, True, "never_sync returned without yielding"),
        (never_sync, False, "never_sync returned without yielding"),
        (twice_async, True, "twice_async yielded more than once"),
        (twice_sync, True, "twice_sync yielded more than once"),
        (twice_sync, False, "twice_sync yielded more than once"),
    ],
)
async def test_a_generator_that_does_not_yield_once_fails_the_event(
    shop: Lightbus, billing: Lightbus, dependency: Callable[[], object], handler_is_async: bool, what: str
) -> None:
    async def handle(session: SyncSession, odd: Annotated[None, Depends(dependency)]) -> None: ...

    def handle_plainly(session: SyncSession, odd: Annotated[None, Depends(dependency)]) -> None: ...

    billing.on("order.placed", retry=ONCE, name="handle")(handle if handler_is_async else handle_plainly)
    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1))
        [dead] = await dead_letters(billing)
    assert reason(dead).startswith(f"DependencyError: handler 'handle' of app 'billing': dependency {what}")
    assert log == ["open", "roll back: DependencyError", "close"]


# --- the lifespan's value ---------------------------------------------------------------------


class Pool:
    """What the lifespan yields."""


@contextlib.asynccontextmanager
async def lifespan(app: Lightbus) -> AsyncIterator[Pool]:
    yield Pool()


@BOTH_LOOPS
async def test_handlers_and_dependencies_get_the_value_of_the_lifespan(shop: Lightbus, make_app: MakeApp) -> None:
    billing = make_app("billing", lifespan=lifespan)
    received: list[object] = []
    stop, started = anyio.Event(), anyio.Event()

    def from_pool(pool: State[Pool]) -> Pool:
        return pool

    @billing.on("order.placed")
    async def handle(order: OrderPlaced, pool: State[Pool], same: Annotated[Pool, Depends(from_pool)]) -> None:
        received.append((pool, same, billing.state))

    @billing.on("order.placed")
    def handle_plainly(pool: State[Pool], same: Annotated[Pool, Depends(from_pool)]) -> None:
        received.append((pool, same, billing.state))

    async with anyio.create_task_group() as tasks, running(shop):

        async def work() -> None:
            await serve(billing, stop=stop, on_started=started.set)

        tasks.start_soon(work)
        await started.wait()
        await shop.publish(OrderPlaced(number=1))
        await eventually(lambda: len(received), 2)
        pool = billing.state
        assert isinstance(pool, Pool)
        assert received == [(pool, pool, pool)] * 2
        stop.set()
    with pytest.raises(errors.NoState, match="no worker of it runs"):
        billing.state  # noqa: B018
