"""Every app gets its own copy, the workers of one app share a queue, and nothing is lost while no worker runs."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

import anyio
import pytest

from lightbus import Lightbus, Message, Retry, errors
from tests.bus import (
    LIMIT,
    OrderCancelled,
    OrderPlaced,
    dead_letters,
    declare,
    eventually,
    left_in,
    order_numbers,
    running,
    take_all,
)
from tests.patience import within

pytestmark = pytest.mark.anyio

MakeApp = Callable[..., Lightbus]


async def test_every_app_gets_its_own_copy(shop: Lightbus, make_app: MakeApp) -> None:
    received: dict[str, list[int]] = {"billing": [], "shipping": [], "stats": []}
    apps = [make_app(name) for name in received]
    for app in apps:
        app.on("order.placed")(_collects(received[app.name]))
    async with running(shop, *apps):
        await shop.publish_many([OrderPlaced(number=n) for n in range(50)])
        await eventually(
            lambda: {name: sorted(got) for name, got in received.items()}, {name: [*range(50)] for name in received}
        )


async def test_an_app_may_subscribe_to_its_own_events(shop: Lightbus) -> None:
    received: list[int] = []
    shop.on(OrderPlaced)(_collects(received))
    async with running(shop):
        await shop.publish(OrderPlaced(number=1))
        await eventually(lambda: received, [1])


async def test_an_event_that_matches_several_patterns_of_a_handler_is_handled_once(
    shop: Lightbus, billing: Lightbus
) -> None:
    received: list[int] = []
    billing.on("order.placed", "order.*", "*.placed", "order.#")(_collects(received))
    async with running(shop, billing) as bus:
        await shop.publish(OrderPlaced(number=1))
        await bus.quiet(billing)
    assert received == [1]


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_workers_of_one_app_share_its_events(shop: Lightbus, make_app: MakeApp) -> None:
    received: dict[str, list[int]] = {"first": [], "second": []}
    begun = {"first": 0, "second": 0}
    both_are_full = anyio.Event()
    first, second = make_app("billing"), make_app("billing")

    def handle_in(worker: str) -> Callable[[OrderPlaced], object]:
        async def handle(order: OrderPlaced) -> None:
            begun[worker] += 1
            if min(begun.values()) >= 10:  # a prefetch
                both_are_full.set()
            await both_are_full.wait()
            await anyio.sleep(0.001)
            received[worker].append(order.number)

        return handle

    first.on("order.placed", name="handle")(handle_in("first"))
    second.on("order.placed", name="handle")(handle_in("second"))
    async with running(shop, first, second, prefetch=10):
        await shop.publish_many([OrderPlaced(number=n) for n in range(400)])
        await eventually(lambda: len(received["first"]) + len(received["second"]), 400)
    assert Counter(received["first"] + received["second"]) == Counter(range(400))
    assert min(map(len, received.values())) >= 10


async def test_a_subscriber_that_was_stopped_gets_the_events_that_it_missed(shop: Lightbus, billing: Lightbus) -> None:
    received: list[int] = []
    billing.on("order.placed")(_collects(received))
    async with running(shop, billing) as bus:
        await shop.publish(OrderPlaced(number=1))
        await eventually(lambda: received, [1])
        await bus.stop(billing)
        receipts = await shop.publish_many([OrderPlaced(number=n) for n in range(2, 30)])
        assert all(receipt.routed for receipt in receipts)
        assert received == [1]
        async with running(billing):
            await eventually(lambda: received, [*range(1, 30)])


async def test_a_graceful_stop_finishes_running_handlers_and_leaves_the_rest_in_the_queue(
    shop: Lightbus, billing: Lightbus
) -> None:
    begun: list[int] = []
    ended: list[int] = []
    go_on = anyio.Event()

    @billing.on("order.placed")
    async def slow(order: OrderPlaced) -> None:
        begun.append(order.number)
        await go_on.wait()
        ended.append(order.number)

    async with running(shop, billing, concurrency=3, prefetch=8) as bus:
        await shop.publish_many([OrderPlaced(number=n) for n in range(20)])
        await eventually(lambda: begun, [0, 1, 2])
        async with anyio.create_task_group() as tasks:

            @tasks.start_soon
            async def stop() -> None:
                assert await bus.stop(billing, grace=LIMIT)

            await anyio.sleep(0.1)
            go_on.set()
    assert (begun, ended) == ([0, 1, 2], [0, 1, 2])
    assert sorted(order_numbers(await left_in(billing))) == list(range(3, 20))


async def test_a_handler_that_exceeds_the_grace_time_is_redelivered(shop: Lightbus, billing: Lightbus) -> None:
    begun: list[tuple[int, bool]] = []

    @billing.on("order.placed")
    async def hang(message: Message) -> None:
        begun.append((message.attempt, message.redelivered))
        if not message.redelivered:
            await anyio.sleep(600)

    async with running(shop, billing) as bus:
        await shop.publish(OrderPlaced(number=1))
        await eventually(lambda: begun, [(1, False)])
        with within(0.1):
            assert not await bus.stop(billing, grace=0.1)
    async with running(billing):
        await eventually(lambda: begun, [(1, False), (1, True)])
    assert await left_in(billing) == []


async def test_a_stop_waits_for_running_sync_functions(shop: Lightbus, billing: Lightbus) -> None:
    begun, go_on = threading.Event(), threading.Event()
    ended: list[int] = []

    @billing.on("order.placed")
    def slow(order: OrderPlaced) -> None:
        begun.set()
        go_on.wait(LIMIT)
        ended.append(order.number)

    async with running(shop, billing) as bus:
        await shop.publish(OrderPlaced(number=1))
        await eventually(begun.is_set)
        threading.Timer(0.1, go_on.set).start()
        assert await bus.stop(billing, grace=LIMIT)
    assert ended == [1]
    assert await left_in(billing) == []


async def test_a_failure_during_the_stop_is_still_dead_lettered(shop: Lightbus, billing: Lightbus) -> None:
    begun = anyio.Event()

    @billing.on("order.placed", retry=Retry.none())
    async def fail_slowly() -> None:
        begun.set()
        await anyio.sleep(0.2)
        raise ValueError("late")

    async with running(shop, billing) as bus:
        await shop.publish(OrderPlaced(number=1))
        await begun.wait()
        assert await bus.stop(billing, grace=LIMIT)
        assert len(await dead_letters(billing)) == 1
    assert await left_in(billing) == []


async def test_stopping_an_idle_worker_is_quick(shop: Lightbus, billing: Lightbus) -> None:
    billing.on("order.placed")(lambda: None)
    async with running(shop, billing) as bus:
        with within(0):
            assert await bus.stop(billing, grace=LIMIT)


# --- concurrency and separate queues -----------------------------------------------------------


async def test_a_concurrency_of_one_is_respected_while_other_handlers_run(shop: Lightbus, billing: Lightbus) -> None:
    running_now = {"one": 0, "many": 0}
    most = {"one": 0, "many": 0}
    done: list[str] = []
    two_of_many = anyio.Event()

    def handle_as(name: str) -> Callable[[], object]:
        async def handle() -> None:
            running_now[name] += 1
            most[name] = max(most[name], running_now[name])
            if running_now["many"] == 2:
                two_of_many.set()
            if name == "many":
                await two_of_many.wait()
            await anyio.sleep(0.005)
            running_now[name] -= 1
            done.append(name)

        return handle

    billing.on("order.placed", name="one", concurrency=1)(handle_as("one"))
    billing.on("order.placed", name="many")(handle_as("many"))
    async with running(shop, billing):
        await shop.publish_many([OrderPlaced(number=n) for n in range(40)])
        await eventually(lambda: (done.count("one"), done.count("many")), (40, 40))
    assert most["one"] == 1
    assert most["many"] > 1
    assert await left_in(billing) == []


async def test_a_failing_handler_with_a_concurrency_of_one_lets_the_next_run_start(
    shop: Lightbus, billing: Lightbus
) -> None:
    attempts: Counter[int] = Counter()

    @billing.on("order.placed", concurrency=1)
    async def fail(order: OrderPlaced) -> None:
        attempts[order.number] += 1
        raise ValueError("no")

    async with running(shop, billing):
        await shop.publish_many([OrderPlaced(number=n) for n in range(5)])
        await dead_letters(billing, 5)
    assert attempts == Counter(dict.fromkeys(range(5), 3))


async def test_a_waiting_handler_lets_all_others_start(shop: Lightbus, billing: Lightbus) -> None:
    begun: list[int] = []
    all_here = anyio.Event()

    @billing.on("order.placed")
    async def meet(order: OrderPlaced) -> None:
        begun.append(order.number)
        if len(begun) == 20:
            all_here.set()
        await all_here.wait()

    async with running(shop, billing):
        await shop.publish_many([OrderPlaced(number=n) for n in range(20)])
        await eventually(lambda: sorted(begun), [*range(20)])
        await eventually(lambda: all_here.is_set(), True)


async def test_the_concurrency_of_the_worker_limits_concurrent_handlers(shop: Lightbus, billing: Lightbus) -> None:
    now, most, done = 0, 0, 0
    full = anyio.Event()

    @billing.on("order.placed")
    async def handle() -> None:
        nonlocal now, most, done
        now += 1
        most = max(most, now)
        if now == 4:
            full.set()
        await full.wait()
        await anyio.sleep(0.005)
        now -= 1
        done += 1

    async with running(shop, billing, concurrency=4):
        await shop.publish_many([OrderPlaced(number=n) for n in range(60)])
        await eventually(lambda: done, 60)
    assert most == 4


async def test_a_separate_queue_does_not_delay_the_main_queue(shop: Lightbus, billing: Lightbus) -> None:
    quick: list[int] = []
    slow: list[int] = []
    go_on = anyio.Event()

    @billing.on("order.placed", queue="slow")
    async def handle_slowly(order: OrderPlaced) -> None:
        await go_on.wait()
        slow.append(order.number)

    billing.on("order.placed")(_collects(quick))
    async with running(shop, billing, concurrency=2, prefetch=2):
        await shop.publish_many([OrderPlaced(number=n) for n in range(20)])
        await eventually(lambda: quick, [*range(20)])
        assert slow == []
        go_on.set()
        await eventually(lambda: sorted(slow), [*range(20)])


async def test_a_worker_with_one_queue_consumes_only_that_queue(shop: Lightbus, billing: Lightbus) -> None:
    received: dict[str, list[int]] = {"main": [], "slow": []}
    billing.on("order.placed", name="main")(_collects(received["main"]))
    billing.on("order.placed", name="slow", queue="slow")(_collects(received["slow"]))
    async with running(billing, queues=["slow"]):
        await shop.publish(OrderPlaced(number=1))
        await eventually(lambda: received, {"main": [], "slow": [1]})
    async with running(billing, queues=["main"]):
        await shop.publish(OrderPlaced(number=2))
        await eventually(lambda: received, {"main": [1, 2], "slow": [1]})
    assert order_numbers(await left_in(billing, "billing.slow")) == [2]


async def test_retries_return_to_their_queue(shop: Lightbus, billing: Lightbus) -> None:
    attempts: list[int] = []

    @billing.on("order.placed", queue="slow")
    async def fail(message: Message) -> None:
        attempts.append(message.attempt)
        raise ValueError("no")

    async with running(billing, queues=["slow"]):
        await shop.publish(OrderPlaced(number=1))
        (dead,) = await dead_letters(billing)
    assert attempts == [1, 2, 3]
    assert dead.properties["headers"]["lightbus-queue"] == "billing.slow"


async def test_an_unknown_queue_is_refused_with_a_list_of_the_queues(billing: Lightbus) -> None:
    billing.on("order.placed", queue="slow")(lambda: None)
    with pytest.raises(errors.InvalidOption, match=r"'billing' has no queue 'quick'\. It has: main, slow"):
        billing.consumer(queues=["quick"])


async def test_prefetch_limits_what_a_worker_holds(shop: Lightbus, billing: Lightbus) -> None:
    go_on = anyio.Event()
    handled: list[int] = []

    @billing.on("order.placed")
    async def wait(order: OrderPlaced) -> None:
        if order.number:
            await go_on.wait()
        handled.append(order.number)

    await declare(billing)
    await shop.publish_many([OrderPlaced(number=n) for n in range(21)])
    async with running(billing, prefetch=5, concurrency=50) as bus:
        (consumer,) = bus.consumers["billing"]
        await eventually(lambda: (handled, len(consumer.in_flight)), ([0], 5))
        others = await anyio.to_thread.run_sync(take_all, billing, "billing.main")
        assert len(others) == 15
        assert len(consumer.in_flight) == 5
        go_on.set()


async def test_two_event_names_of_one_app_do_not_mix(shop: Lightbus, billing: Lightbus) -> None:
    placed: list[int] = []
    cancelled: list[int] = []
    billing.on("order.placed")(_collects(placed))

    @billing.on("order.cancelled")
    async def note(order: OrderCancelled) -> None:
        cancelled.append(order.number)

    async with running(shop, billing):
        await shop.publish_many(
            [OrderPlaced(number=n) if n % 2 else OrderCancelled(number=n) for n in range(20)],
        )
        await eventually(lambda: (placed, cancelled), ([*range(1, 20, 2)], [*range(0, 20, 2)]))


def _collects(received: list[int]) -> Callable[[OrderPlaced], object]:
    async def collect(order: OrderPlaced) -> None:
        received.append(order.number)

    return collect
