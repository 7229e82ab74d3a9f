"""A worker that is connected but receives nothing subscribes again, and ends with an error if that does not help."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import amqp
import anyio
import pytest

from lightbus import Lightbus, errors
from lightbus.connection.counts import queue_counts
from lightbus.connection.declare import declare
from lightbus.consuming.consumer import SUSPECT
from lightbus.consuming.dispatcher import Dispatcher
from lightbus.consuming.watchdog import REBUILDS
from lightbus.dead_letters.queue import DeadQueue
from tests.bus import LIMIT, QUICK, OrderPlaced, connected, eventually, running
from tests.bus import declare as declare_app
from tests.processes import Program
from tests.rabbitmq import Node

SOON = 0.15


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def billing(rabbitmq_url: str) -> Iterator[Lightbus]:
    app = Lightbus("billing", url=rabbitmq_url, retry=QUICK)
    app.event(OrderPlaced)
    yield app
    app.__exit__(None, None, None)


def look_often(*consumers: Dispatcher) -> None:
    for consumer in consumers:
        for queue_consumer in consumer.consumers:
            queue_consumer.watch.interval = queue_consumer.watch.next_look = SOON


def delete_and_declare_again(app: Lightbus) -> None:
    """What an operator's script may do. RabbitMQ 3.10.8 does not cancel the queue's consumers over it."""
    with connected(app) as connection:
        connection.channel().queue_delete(f"{app.name}.main")
        declare(connection, app.topology())


def errors_logged(caplog: pytest.LogCaptureFixture, words: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if words in record.getMessage()]


pytestmark = [pytest.mark.anyio]


@pytest.mark.rabbitmq
async def test_a_queue_that_is_deleted_and_declared_again_at_once_is_consumed_again(
    billing: Lightbus, caplog: pytest.LogCaptureFixture
) -> None:
    received: list[int] = []
    billing.on(OrderPlaced, name="handle")(lambda order: received.append(order["number"]))
    async with running(billing) as bus:
        (consumer,) = bus.consumers["billing"]
        await billing.publish(OrderPlaced(number=1))
        await eventually(lambda: received, [1])
        await anyio.to_thread.run_sync(delete_and_declare_again, billing)
        look_often(consumer)
        for number in (2, 3):  # RabbitMQ 3.10.8 gives these to a consumer that does not handle them
            await billing.publish(OrderPlaced(number=number))
        await eventually(lambda: sorted(received), [1, 2, 3])
        await eventually(lambda: consumer.consumers[0].watch.proven)
        assert consumer.consumers[0].watch.rebuilds == 0


@pytest.mark.rabbitmq
async def test_a_stalled_consumer_is_logged_with_the_reason_and_the_next_step(
    billing: Lightbus, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(billing) as bus:
        (consumer,) = bus.consumers["billing"]
        cancel_behind_its_back(consumer)
        look_often(consumer)
        await eventually(lambda: errors_logged(caplog, "stalled"))
        assert errors_logged(caplog, "stalled") == [
            "lightbus billing consumer: connected but stalled: the broker lists no consumer on the queue "
            f"'billing.main'. Subscribing again on a new channel (attempt 1 of {REBUILDS})."
        ]
        await eventually(lambda: consumer.consumers[0].watch.proven)


def cancel_behind_its_back(consumer: Dispatcher) -> None:
    """The broker forgets the consumer, and the consumer does not know."""
    (queue_consumer,) = consumer.consumers
    connection: Any = consumer.connection
    work = connection.work

    def cancel_then_work() -> float:
        connection.work = work
        queue_consumer.channel.basic_cancel(queue_consumer.consumer_tag)  # type: ignore[union-attr]
        return float(work())

    connection.work = cancel_then_work
    connection.wake()


@pytest.mark.rabbitmq
async def test_a_queue_whose_leader_does_not_answer_in_time_is_not_stalled(
    billing: Lightbus, rabbitmq: Node, caplog: pytest.LogCaptureFixture
) -> None:
    """RabbitMQ then answers 0 messages and 0 consumers, as for a queue that nobody consumes."""
    received: list[int] = []
    billing.on(OrderPlaced, name="handle")(lambda order: received.append(order["number"]))
    async with running(billing) as bus:
        (consumer,) = bus.consumers["billing"]
        with leader_suspended(rabbitmq, billing, "billing.main"):
            looks = count_calls(consumer.consumers[0], "look")
            look_often(consumer)
            await eventually(lambda: len(looks) >= 4)
        assert consumer.consumers[0].watch.rebuilds == 0
        await billing.publish(OrderPlaced(number=1))
        await eventually(lambda: received, [1])
    assert errors_logged(caplog, "stalled") == []


@pytest.mark.rabbitmq
async def test_dead_letters_are_counted_although_the_queue_does_not_answer_at_first(
    billing: Lightbus, rabbitmq: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightbus.dead_letters.queue.TRIES", 1000)
    await declare_app(billing)
    with connected(billing) as connection:
        channel = connection.channel()
        channel.basic_publish(amqp.Message("{}"), routing_key="billing.dead")
        await eventually(lambda: queue_counts(channel, "billing.dead").ready)
        with leader_suspended(rabbitmq, billing, "billing.dead") as resume:
            assert queue_counts(channel, "billing.dead") == (0, 0, False)
            later = threading.Thread(target=resume)
            later.start()
            assert DeadQueue(billing, connection).count == 1
            later.join()


def count_calls(owner: object, method: str) -> list[None]:
    calls: list[None] = []
    call = getattr(owner, method)

    def counted() -> Any:
        calls.append(None)
        return call()

    setattr(owner, method, counted)
    return calls


@contextlib.contextmanager
def leader_suspended(node: Node, app: Lightbus, queue: str) -> Iterator[Callable[[], object]]:
    """Suspend the Erlang process of the queue's leader. Gives the function that resumes it."""
    virtual_host = app.broker.addresses[0].plain.rpartition("/")[2]
    leader = f"whereis('{virtual_host}_{queue}')"
    node.ctl("eval", f"sys:suspend({leader}).")
    resume = functools.partial(node.ctl, "eval", f"sys:resume({leader}).")
    try:
        yield resume
    finally:
        resume()


@pytest.mark.rabbitmq
async def test_every_worker_of_a_queue_that_was_declared_again_receives_again(billing: Lightbus) -> None:
    """The first one to subscribe again receives everything, and nothing waits: the other one still subscribes again."""
    async with running(billing, billing) as bus:
        first, second = bus.consumers["billing"]
        look_often(first, second)
        await eventually(lambda: first.consumers[0].watch.proven and second.consumers[0].watch.proven)
        await anyio.to_thread.run_sync(delete_and_declare_again, billing)
        await eventually(lambda: consumers_of(billing), 2)


def consumers_of(app: Lightbus) -> int:
    with connected(app) as connection:
        return int(connection.channel().queue_declare(f"{app.name}.main", passive=True).consumer_count)


@pytest.mark.rabbitmq
async def test_full_prefetches_and_slow_handlers_do_not_count_as_stalled(
    billing: Lightbus, caplog: pytest.LogCaptureFixture
) -> None:
    go_on = anyio.Event()
    handled: list[int] = []

    @billing.on(OrderPlaced)
    async def slow(order: OrderPlaced) -> None:
        await go_on.wait()
        handled.append(order.number)

    async with running(billing, prefetch=2) as bus:
        (consumer,) = bus.consumers["billing"]
        for number in range(6):
            await billing.publish(OrderPlaced(number=number))
        looks = count_looks(consumer)
        look_often(consumer)
        await eventually(lambda: len(looks) >= 4)
        go_on.set()
        await eventually(lambda: sorted(handled), list(range(6)))
    assert not errors_logged(caplog, "stalled")


@pytest.mark.rabbitmq
async def test_a_worker_that_takes_one_event_at_a_time_does_not_count_as_stalled(
    billing: Lightbus, caplog: pytest.LogCaptureFixture
) -> None:
    go_on = anyio.Event()
    handled: list[int] = []

    @billing.on(OrderPlaced)
    async def slow(order: OrderPlaced) -> None:
        await go_on.wait()
        handled.append(order.number)

    await declare_app(billing)
    await billing.publish_many([OrderPlaced(number=number) for number in range(6)])
    for _ in range(SUSPECT):
        await eventually(lambda: waiting_in(billing), 6)
        with connected(billing) as connection:  # as a worker would that dies
            channel = connection.channel()
            assert all(channel.get("billing.main") is not None for _ in range(6))
    async with running(billing, prefetch=4) as bus:
        (consumer,) = bus.consumers["billing"]
        await eventually(lambda: len(consumer.in_flight), 1)
        looks = count_looks(consumer)
        look_often(consumer)
        await eventually(lambda: len(looks) >= 4)
        assert [look["room"] for look in looks[:4]] == [False] * 4
        go_on.set()
        await eventually(lambda: sorted(handled), list(range(6)))
    assert not errors_logged(caplog, "stalled")


def waiting_in(app: Lightbus) -> int:
    with connected(app) as connection:
        return int(connection.channel().queue_declare(f"{app.name}.main", passive=True).message_count)


def count_looks(consumer: Dispatcher) -> list[dict[str, Any]]:
    (queue_consumer,) = consumer.consumers
    looks: list[dict[str, Any]] = []
    look = queue_consumer.watch.look

    def counted(now: float, **seen: Any) -> Any:
        looks.append(seen)
        return look(now, **seen)

    queue_consumer.watch.look = counted  # type: ignore[method-assign, assignment]
    return looks


@pytest.mark.rabbitmq
async def test_a_consumer_that_stays_stalled_ends_with_the_reason(billing: Lightbus) -> None:
    consumer = billing.consumer()
    look_often(consumer)
    (queue_consumer,) = consumer.consumers
    subscribe = queue_consumer.subscribe

    def subscribe_in_vain(*arguments: Any, **options: Any) -> None:
        subscribe(*arguments, **options)
        queue_consumer.channel.basic_cancel(queue_consumer.consumer_tag)  # type: ignore[union-attr]

    queue_consumer.subscribe = subscribe_in_vain  # type: ignore[method-assign]
    with pytest.raises(ExceptionGroup) as raised, anyio.fail_after(LIMIT):
        async with anyio.create_task_group() as tasks:
            await tasks.start(consumer.run)
    (error,) = raised.value.exceptions
    assert isinstance(error, errors.WorkerError)
    assert "the broker lists no consumer on the queue 'billing.main', even after reconnecting" in str(error)
    assert consumer.connection.epoch == REBUILDS  # the first rebuild is of the channel alone


async def test_the_embedded_broker_is_watched_as_well(caplog: pytest.LogCaptureFixture, tmp_path: Any) -> None:
    app = Lightbus("billing", url=f"sqlite:///{tmp_path}/bus.db", retry=QUICK)
    async with running(app) as bus:
        (consumer,) = bus.consumers["billing"]
        looks = count_looks(consumer)
        look_often(consumer)
        await eventually(lambda: len(looks) >= 3)
        assert consumer.consumers[0].watch.proven
        cancel_behind_its_back(consumer)
        await eventually(lambda: errors_logged(caplog, "stalled"))
        await eventually(lambda: consumer.connected)


STALLED = """\
from lightbus import Lightbus
from lightbus.consuming.consumer import Consumer
from lightbus.consuming.watchdog import Watch

app = Lightbus("billing")
subscribe = Consumer.subscribe

def subscribe_in_vain(self, connection, **options):
    subscribe(self, connection, **options)
    self.channel.basic_cancel(self.consumer_tag)

Consumer.subscribe = subscribe_in_vain
Watch.__init__.__defaults__ = (0.1,)
"""


def test_a_worker_that_stays_stalled_ends_with_exit_code_1_and_the_reason(tmp_path: Path) -> None:
    (tmp_path / "billing.py").write_text(STALLED)
    with Program("worker", "billing:app", folder=tmp_path, url=f"sqlite:///{tmp_path}/bus.db") as worker:
        assert worker.end() == 1
    assert "Connected but stalled: the broker lists no consumer on the queue 'billing.main'" in worker.output
    assert "Exiting, so that the supervisor of this worker notices." in worker.output
