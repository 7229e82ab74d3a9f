"""A fault of one queue, or of one channel, is that queue's alone: nothing that others have in hand runs twice."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import amqp.exceptions
import anyio
import anyio.to_thread
import pytest

from lightbus import Lightbus, Message, Retry
from lightbus.consuming import connection as consuming_connection
from tests.bus import QUICK, Bus, OrderCancelled, OrderPlaced, connected, eventually, left_in, running
from tests.conformance.conftest import declare_orders

pytestmark = pytest.mark.anyio

MakeApp = Callable[..., Lightbus]

MANY = 24


class Busy:
    """An app whose main queue's handler holds all its events until `go_on`, and has another queue, which fails."""

    def __init__(self, make_app: MakeApp) -> None:
        self.shop = declare_orders(make_app("shop"))
        self.billing = make_app("billing", retry=QUICK)
        self.go_on = anyio.Event()
        self.begun: Counter[int] = Counter()
        self.attempts: list[int] = []
        self.cancelled: list[int] = []

        @self.billing.on("order.placed")
        async def hold(order: OrderPlaced) -> None:
            self.begun[order.number] += 1
            if order.number >= 0:
                await self.go_on.wait()

        @self.billing.on("order.cancelled", queue="other", retry=Retry(delays=(0.05, 0.1)))
        async def fail_first(order: OrderCancelled, message: Message) -> None:
            self.attempts.append(message.attempt)
            if order.number == 0 and message.attempt == 1:
                raise ValueError("the first time")
            self.cancelled.append(order.number)

    @contextlib.asynccontextmanager
    async def with_hands_full(self) -> Any:
        async with running(self.shop, self.billing) as bus:
            await self.shop.publish(OrderPlaced(number=-1))
            await eventually(lambda: self.begun[-1], 1)
            await self.shop.publish_many([OrderPlaced(number=number) for number in range(MANY)])
            await eventually(lambda: sum(self.begun.values()), MANY + 1)
            (consumer,) = bus.consumers["billing"]
            # From here on the prefetch does not change: a consumer is replaced only while it is full.
            await eventually(lambda: [queue_consumer.full for queue_consumer in consumer.consumers], [False, False])
            yield bus

    async def end_all(self, bus: Bus) -> None:
        (consumer,) = bus.consumers["billing"]
        self.go_on.set()
        await eventually(lambda: [queue_consumer.in_hand for queue_consumer in consumer.consumers], [0, 0])
        await eventually(lambda: [len(queue_consumer.retired) for queue_consumer in consumer.consumers], [0, 0])
        await bus.quiet(self.billing)
        assert set(self.begun.values()) == {1}, self.begun
        assert consumer.connection.epoch == 1


@pytest.fixture
def busy(make_app: MakeApp) -> Busy:
    return Busy(make_app)


def on_the_broker(app: Lightbus, do: Callable[[Any], object]) -> None:
    with connected(app) as connection:
        do(connection.channel())


@pytest.mark.impossible_on_artemis("there are no retry queues")
async def test_a_retry_queue_that_is_gone_is_declared_again_and_nothing_runs_twice(
    busy: Busy, caplog: pytest.LogCaptureFixture
) -> None:
    async with busy.with_hands_full() as bus:
        await anyio.to_thread.run_sync(
            on_the_broker, busy.billing, lambda channel: channel.queue_delete("billing.other.retry.50ms")
        )
        await busy.shop.publish(OrderCancelled(number=0))
        await eventually(lambda: busy.cancelled, [0])
        assert busy.attempts == [1, 2]
        await busy.end_all(bus)
    assert await left_in(busy.billing) == []
    warnings = [one for one in caplog.messages if "Declaring it again" in one]
    assert warnings  # several, if declaring takes longer than the pause until the next copy
    assert all("the queue billing.other.retry.50ms no longer exists" in one for one in warnings)


async def test_a_queue_that_is_deleted_is_consumed_again_and_other_queues_go_on(busy: Busy) -> None:
    async with busy.with_hands_full() as bus:
        (consumer,) = bus.consumers["billing"]
        channel = consumer.consumers[1].channel
        await anyio.to_thread.run_sync(
            on_the_broker, busy.billing, lambda channel: channel.queue_delete("billing.other")
        )
        await eventually(lambda: consumer.connected and consumer.consumers[1].channel is not channel)
        await busy.shop.publish(OrderCancelled(number=7))
        await eventually(lambda: busy.cancelled, [7])
        await busy.end_all(bus)


@pytest.mark.parametrize("step", ["declare", "subscribe"])
async def test_a_queue_that_is_still_being_deleted_is_declared_again_after_a_moment(
    busy: Busy, step: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """RabbitMQ 4.0.5 answers 404 to the binding of a queue that it has just declared, where its deletion had begun."""
    async with busy.with_hands_full() as bus:
        (consumer,) = bus.consumers["billing"]
        channel = consumer.consumers[1].channel
        target, name = (consuming_connection, "declare") if step == "declare" else (consumer.consumers[1], "subscribe")
        as_before, failed = getattr(target, name), anyio.Event()

        def fail_once(*arguments: Any, **options: Any) -> None:
            if not failed.is_set():
                failed.set()
                if step == "subscribe":
                    as_before(*arguments, **options)
                raise amqp.exceptions.NotFound("NOT_FOUND - no queue 'billing.other' in vhost '/'")
            as_before(*arguments, **options)

        monkeypatch.setattr(target, name, fail_once)
        await anyio.to_thread.run_sync(
            on_the_broker, busy.billing, lambda channel: channel.queue_delete("billing.other")
        )
        await eventually(
            lambda: failed.is_set() and consumer.connected and consumer.consumers[1].channel is not channel
        )
        await busy.shop.publish(OrderCancelled(number=7))
        await eventually(lambda: busy.cancelled, [7])
        await busy.end_all(bus)
    assert any("something is being deleted" in one for one in caplog.messages)


async def test_what_is_in_hand_of_a_deleted_queue_is_handled_once(busy: Busy, caplog: pytest.LogCaptureFixture) -> None:
    async with busy.with_hands_full() as bus:
        (consumer,) = bus.consumers["billing"]
        channel = consumer.consumers[0].channel
        await anyio.to_thread.run_sync(
            on_the_broker, busy.billing, lambda channel: channel.queue_delete("billing.main")
        )
        await eventually(lambda: consumer.connected and consumer.consumers[0].channel is not channel)
        assert consumer.consumers[0].retired
        await busy.shop.publish(OrderPlaced(number=-2))
        await eventually(lambda: busy.begun[-2], 1)
        await busy.end_all(bus)
    lost = [one for one in caplog.messages if "lost" in one]
    assert len(lost) == 1
    assert "subscription to 'billing.main' lost (the broker cancelled the consumer" in lost[0]
    assert "Events in progress are not affected." in lost[0]


@pytest.mark.rabbitmq
async def test_a_channel_that_the_broker_closes_costs_its_own_queue_only(
    make_rabbitmq_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    busy = Busy(make_rabbitmq_app)
    wrong = anyio.Event()

    @busy.billing.on("order.wrong", queue="other", name="ack_wrongly")
    async def ack_wrongly() -> None:
        (consumer,) = bus.consumers["billing"]
        channel = consumer.consumers[1].channel
        assert channel is not None
        if not wrong.is_set():
            wrong.set()
            channel.basic_ack(9999)

    @busy.shop.event("order.wrong")
    class OrderWrong:
        number: int

    async with busy.with_hands_full() as bus:
        await busy.shop.publish(OrderWrong(number=1))
        await wrong.wait()
        await eventually(lambda: any("unknown delivery tag 9999" in one for one in caplog.messages))
        (consumer,) = bus.consumers["billing"]
        await eventually(lambda: consumer.connected)
        await busy.shop.publish(OrderCancelled(number=7))
        await eventually(lambda: busy.cancelled, [7])
        await busy.end_all(bus)
    assert await left_in(busy.billing) == []
    assert "connection lost" not in caplog.text


@pytest.mark.rabbitmq
async def test_what_is_handled_is_settled_before_a_healthy_connection_is_replaced(
    make_rabbitmq_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    """The declaration is refused, which ends the connection. The acks that wait for the first event's are sent."""
    shop, billing = declare_orders(make_rabbitmq_app("shop")), make_rabbitmq_app("billing", retry=QUICK)
    handled: Counter[int] = Counter()
    begun: Counter[int] = Counter()
    go_on = anyio.Event()

    @billing.on("order.placed")
    async def hold_the_first(order: OrderPlaced) -> None:
        begun[order.number] += 1
        if order.number == 0:
            await go_on.wait()
        handled[order.number] += 1

    @billing.on("order.cancelled", queue="other")
    async def fail() -> None:
        raise ValueError("always")

    def make_declaring_impossible(channel: Any) -> None:
        channel.queue_delete("billing.other.retry.50ms")
        channel.queue_declare("billing.other.retry.50ms", durable=True, auto_delete=False)

    async with running(shop, billing) as bus:
        (consumer,) = bus.consumers["billing"]
        await shop.publish(OrderPlaced(number=-1))
        await eventually(lambda: handled[-1], 1)
        await shop.publish_many([OrderPlaced(number=number) for number in range(60)])
        await eventually(lambda: len(handled), 60)
        await anyio.to_thread.run_sync(on_the_broker, billing, make_declaring_impossible)
        await shop.publish(OrderCancelled(number=1))
        await eventually(lambda: "Declare it as it exists" in caplog.text)
        await anyio.to_thread.run_sync(
            on_the_broker, billing, lambda channel: channel.queue_delete("billing.other.retry.50ms")
        )
        await eventually(lambda: consumer.connected)
        await eventually(lambda: begun[0], 2)  # it was in hand, and its connection is gone
        go_on.set()
        await bus.quiet(billing)
    assert {number: times for number, times in begun.items() if times > 1} == {0: 2}


async def test_a_fault_while_the_worker_stops_does_not_repeat_what_ends_in_time(
    busy: Busy, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with busy.with_hands_full() as bus:
        (consumer,) = bus.consumers["billing"]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(consumer.stop, 60)
            await eventually(lambda: not any(queue_consumer.consumer_tag for queue_consumer in consumer.consumers))
            await anyio.to_thread.run_sync(
                on_the_broker, busy.billing, lambda channel: channel.queue_delete("billing.other")
            )
            busy.go_on.set()
        bus.consumers.pop("billing")
    assert set(busy.begun.values()) == {1}
    assert await left_in(busy.billing, "billing.main") == []
