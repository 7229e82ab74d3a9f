"""Slow jobs are shared: a worker takes no more ahead than its handlers settle in about a second."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import anyio
import anyio.to_thread
import pytest

from lightbus import Lightbus, Message
from lightbus.consuming.dispatcher import Dispatcher
from tests.bus import OrderPlaced, connected, eventually, running
from tests.conformance.conftest import declare_orders
from tests.patience import LIMIT

pytestmark = pytest.mark.anyio

MakeApp = Callable[..., Lightbus]

JOBS = 40


class Jobs:
    """Two workers of an app. Their handlers end when `go_on` is set."""

    def __init__(self, make_app: MakeApp) -> None:
        self.shop = declare_orders(make_app("shop"))
        self.workers = [make_app("billing"), make_app("billing")]
        self.go_on = anyio.Event()
        self.begun: Counter[int] = Counter()
        for number, app in enumerate(self.workers):
            app.on("order.placed", name="work")(self._handler(number))

    def _handler(self, worker: int) -> Callable[[OrderPlaced], object]:
        async def work(order: OrderPlaced) -> None:
            self.begun[worker] += 1
            await self.go_on.wait()

        return work

    def waiting(self) -> int:
        with connected(self.shop) as connection:
            return int(connection.channel().queue_declare("billing.main", passive=True).message_count)


async def test_one_long_job_at_a_time_leaves_the_others_in_the_queue(make_app: MakeApp) -> None:
    jobs = Jobs(make_app)
    async with running(jobs.shop, *jobs.workers, concurrency=1) as bus:
        consumers = bus.consumers["billing"]
        await jobs.shop.publish_many([OrderPlaced(number=number) for number in range(JOBS)])
        await eventually(lambda: jobs.begun, {0: 1, 1: 1})
        await anyio.sleep(0.1)  # in which a worker could take more, if it were to
        assert [consumer.consumers[0].in_hand for consumer in consumers] == [1, 1]
        assert await anyio.to_thread.run_sync(jobs.waiting) == JOBS - 2
        jobs.go_on.set()
        await eventually(lambda: sum(jobs.begun.values()), JOBS)


async def test_while_no_job_has_ended_as_many_are_taken_as_may_run_at_once(make_app: MakeApp) -> None:
    jobs = Jobs(make_app)
    async with running(jobs.shop, *jobs.workers, concurrency=8):
        await jobs.shop.publish_many([OrderPlaced(number=number) for number in range(JOBS)])
        await eventually(lambda: jobs.begun, {0: 8, 1: 8})
        await eventually(lambda: jobs.waiting() >= JOBS - 18)  # and the very first ones
        jobs.go_on.set()
        await eventually(lambda: sum(jobs.begun.values()), JOBS)


async def test_while_the_prefetch_grows_nothing_is_returned_and_the_order_stays(make_app: MakeApp) -> None:
    """RabbitMQ returns what is on its way to a consumer that is cancelled, and counts that towards the limit."""
    shop, billing = declare_orders(make_app("shop")), make_app("billing")
    handled: list[tuple[int, bool]] = []
    prefetches: set[int] = set()

    @billing.on("order.placed")
    async def note(order: OrderPlaced, message: Message) -> None:
        handled.append((order.number, message.redelivered))
        prefetches.add(consumer.consumers[0].prefetch_now)

    async with running(shop, billing) as bus:
        (consumer,) = bus.consumers["billing"]
        await shop.publish_many([OrderPlaced(number=number) for number in range(3000)])
        await eventually(lambda: len(handled), 3000)
    # The last one depends on the speed, and on what was held when it was set.
    assert max(prefetches) > 10, prefetches
    assert handled == [(number, False) for number in range(3000)]


async def test_workers_whose_handlers_were_fast_share_the_next_burst(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightbus.transport.sqlite.connection.SHARED_FOR", LIMIT)  # however late one takes its share
    jobs = Jobs(make_app)
    async with running(jobs.shop, *jobs.workers) as bus:
        jobs.go_on.set()
        await use_the_whole_prefetch(jobs, bus.consumers["billing"])
        jobs.go_on, jobs.begun = anyio.Event(), Counter()
        await jobs.shop.publish_many([OrderPlaced(number=number) for number in range(JOBS)])
        await eventually(lambda: sum(jobs.begun.values()), JOBS)
        jobs.go_on.set()
    assert abs(jobs.begun[0] - JOBS / 2) <= 3, jobs.begun


@pytest.mark.rabbitmq
async def test_workers_that_were_idle_for_long_share_the_next_burst(make_rabbitmq_app: MakeApp) -> None:
    """The watchdog subscribes again at each look, and that does not start a new probation."""
    jobs = Jobs(make_rabbitmq_app)
    async with running(jobs.shop, *jobs.workers) as bus:
        consumers = bus.consumers["billing"]
        jobs.go_on.set()
        await use_the_whole_prefetch(jobs, consumers)
        await renew(consumers)
        jobs.go_on, jobs.begun = anyio.Event(), Counter()
        await jobs.shop.publish_many([OrderPlaced(number=number) for number in range(JOBS)])
        await eventually(lambda: sum(jobs.begun.values()), JOBS)
        jobs.go_on.set()
    assert abs(jobs.begun[0] - JOBS / 2) <= 3, jobs.begun


async def use_the_whole_prefetch(jobs: Jobs, consumers: list[Dispatcher]) -> None:
    """As after a second of fast handlers."""
    queue_consumers = [consumer.consumers[0] for consumer in consumers]
    for queue_consumer in queue_consumers:
        queue_consumer.credit.window = queue_consumer.prefetch
    published = 0
    while any(queue_consumer.prefetch_now < queue_consumer.prefetch - 4 for queue_consumer in queue_consumers):
        await jobs.shop.publish_many([OrderPlaced(number=0)] * 4)
        published += 4
        await eventually(lambda: sum(jobs.begun.values()), published)
        await eventually(lambda: not any(queue_consumer.in_hand for queue_consumer in queue_consumers))


async def renew(consumers: list[Dispatcher]) -> None:
    channels = [consumer.consumers[0].channel for consumer in consumers]
    for consumer in consumers:
        consumer.consumers[0].watch.renewal_due = True
        consumer.connection.wake()
    await eventually(
        lambda: (
            consumers[0].connected
            and consumers[1].connected
            and not any(
                consumer.consumers[0].channel is channel for consumer, channel in zip(consumers, channels, strict=True)
            )
        )
    )
