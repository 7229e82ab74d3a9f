"""Exchanges, queues and bindings: every app declares what it needs, in any order."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import amqp.exceptions
import anyio
import anyio.to_thread
import pytest

from lightbus import Lightbus, Message, Retry, errors
from lightbus.connection.declare import declare as declare_all
from lightbus.transport import Publication
from lightbus.wire import topology
from tests.bus import (
    LIMIT,
    QUICK,
    OrderPlaced,
    connected,
    dead_letters,
    declare,
    eventually,
    left_in,
    running,
    stranger,
)
from tests.conformance.conftest import declare_orders
from tests.rabbitmq import Node

pytestmark = pytest.mark.anyio

MakeApp = Callable[..., Lightbus]


async def test_declaring_again_changes_nothing(shop: Lightbus, make_app: MakeApp) -> None:
    for _ in range(2):
        billing = make_app("billing")
        billing.on("order.placed", name="handle")(lambda: None)
        await declare(shop, billing)
    await shop.publish(OrderPlaced(number=1))
    assert len(await left_in(billing)) == 1


async def test_publisher_and_worker_may_start_in_any_order_and_concurrently(make_app: MakeApp) -> None:
    apps = [make_app(name) for name in ("shop", "billing", "shipping", "stats")]
    for app in apps:
        app.event(OrderPlaced)
        app.on("order.placed", source="shop", name="handle")(lambda: None)
    async with anyio.create_task_group() as tasks:
        for app in apps:
            tasks.start_soon(declare, app)
            tasks.start_soon(app.publish, OrderPlaced(number=1))


async def test_another_retry_schedule_does_not_conflict(shop: Lightbus, make_app: MakeApp) -> None:
    for delays in ((0.05, 1), (0.05, 2, 0.07), ()):
        billing = make_app("billing", retry=Retry(delays=delays))
        billing.on("order.placed", name="handle")(lambda: None)
        await declare(billing)


async def test_a_removed_pattern_leaves_its_binding(shop: Lightbus, make_app: MakeApp) -> None:
    """Workers with the older code may still run, so nothing is unbound."""
    older, newer = make_app("billing"), make_app("billing")
    older.on("order.placed", name="handle")(lambda: None)
    newer.on("order.shipped", name="handle")(lambda: None)
    await declare(older)
    await declare(newer)
    assert (await shop.publish(OrderPlaced(number=1))).routed


@pytest.mark.parametrize("queue_type", ["quorum", "classic"])
async def test_both_types_of_queue_retry_and_keep_dead_letters(
    shop: Lightbus, make_app: MakeApp, queue_type: str
) -> None:
    billing = make_app("billing", queue_type=queue_type)
    attempts: list[int] = []

    @billing.on("order.placed")
    async def fail(order: OrderPlaced) -> None:
        attempts.append(order.number)
        raise ValueError("no")

    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1))
        await dead_letters(billing)
    assert attempts == [1, 1, 1]


def way_out(app: Lightbus, amqp: str) -> str:
    """The next step for an object with other arguments, on the broker of the app."""
    ways = {"memory": "restart this program", "sqlite": re.escape("delete that file (its messages are lost)")}
    return ways.get(app.broker.addresses[0].scheme, amqp)


async def test_a_queue_with_other_arguments_is_a_conflict_with_the_difference_and_the_next_step(
    billing: Lightbus,
) -> None:
    billing.on("order.placed")(lambda: None)
    async with stranger(billing) as channel:
        arguments = {"x-queue-type": "classic", "x-max-length": 10}
        await anyio.to_thread.run_sync(
            lambda: channel.queue_declare("billing.main", durable=True, auto_delete=False, arguments=arguments)
        )
    with pytest.raises(errors.TopologyConflict) as conflict:
        await billing.consumer().run()
    text = str(conflict.value)
    assert "inequivalent arg" in text
    assert "queue 'billing.main'" in text
    assert "other arguments than this app declares" in text
    assert re.search(way_out(billing, amqp=r"rabbitmqctl delete_queue --vhost \S+ billing.main,"), text)
    assert ("rabbitmqctl" in text) == (billing.broker.addresses[0].broker.name == "RabbitMQ")


async def test_an_exchange_of_another_type_is_a_conflict_for_the_publisher(shop: Lightbus) -> None:
    async with stranger(shop) as channel:
        await anyio.to_thread.run_sync(
            lambda: channel.exchange_declare("shop", "fanout", durable=True, auto_delete=False)
        )
    with anyio.fail_after(LIMIT), pytest.raises(errors.PublishRefused) as refused:
        await shop.publish(OrderPlaced(number=1))
    assert isinstance(refused.value.__cause__, errors.TopologyConflict)
    assert "inequivalent arg 'type' for exchange 'shop'" in str(refused.value)
    assert re.search(way_out(shop, amqp="delete the exchange"), str(refused.value))
    assert "rabbitmqctl" not in str(refused.value)
    assert "was not sent" in str(refused.value)


async def test_a_queue_that_is_deleted_while_it_is_consumed_is_declared_again(
    shop: Lightbus, billing: Lightbus
) -> None:
    received: list[int] = []

    @billing.on("order.placed")
    async def note(order: OrderPlaced) -> None:
        received.append(order.number)

    async with running(shop, billing) as bus:
        await shop.publish(OrderPlaced(number=1))
        await eventually(lambda: received, [1])
        (consumer,) = bus.consumers["billing"]
        async with stranger(billing) as channel:
            await anyio.to_thread.run_sync(channel.queue_delete, "billing.main")
        with anyio.fail_after(LIMIT):
            for number in itertools.count(2):
                if (await shop.publish(OrderPlaced(number=number))).routed:
                    break
                await anyio.sleep(0.02)
        await eventually(lambda: received, [1, number])
        assert consumer.connected


@pytest.mark.parametrize("exchange", ["shop", "lightbus"])
async def test_a_publish_after_its_exchange_was_deleted_declares_it_again(
    shop: Lightbus, billing: Lightbus, exchange: str
) -> None:
    billing.on("order.placed")(lambda: None)
    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1))
        async with stranger(shop) as channel:
            await anyio.to_thread.run_sync(channel.exchange_delete, exchange)
        receipt = await shop.publish(OrderPlaced(number=2))
        assert receipt.id


async def test_a_retry_whose_queue_was_deleted_is_not_lost(shop: Lightbus, billing: Lightbus) -> None:
    attempts: list[bool] = []

    @billing.on("order.placed")
    async def fail(order: OrderPlaced) -> None:
        attempts.append(True)
        raise ValueError("no")

    async with running(shop, billing):
        async with stranger(billing) as channel:
            await anyio.to_thread.run_sync(channel.queue_delete, "billing.retry.50ms")
            await anyio.to_thread.run_sync(channel.queue_delete, "billing.dead")
        await shop.publish(OrderPlaced(number=1))
        (dead,) = await dead_letters(billing)
    assert len(attempts) >= 3
    assert dead.properties["headers"]["lightbus-attempt"] == 3


async def test_no_client_can_publish_to_the_bus_exchange(shop: Lightbus) -> None:
    await declare(shop)

    def publish() -> None:
        with connected(shop) as connection:
            channel = connection.channel()
            channel.publish([Publication("lightbus", "order.placed", b"{}", {"message_id": "m"})])
            channel.exchange_declare("lightbus", "topic", passive=True)

    with pytest.raises(amqp.exceptions.AccessRefused, match="internal exchange"):
        await anyio.to_thread.run_sync(publish)


@pytest.mark.rabbitmq
async def test_each_app_can_run_as_a_user_with_permissions_for_its_own_names_only(
    rabbitmq: Node, rabbitmq_url: str
) -> None:
    """Configure, write and read its own names; read and write the bus, to which no client can publish."""
    vhost = rabbitmq_url.rpartition("/")[2]
    async with Lightbus("admin", url=rabbitmq_url):  # a user with permission has declared the bus exchange
        pass
    statements = []
    for user in ("shop", "billing"):
        own, both = rf"^{user}(\\..+)?$", rf"^({user}(\\..+)?|lightbus)$"
        statements.append(f'catch rabbit_auth_backend_internal:add_user(<<"{user}">>, <<"{user}">>, <<>>)')
        statements.append(
            f'rabbit_auth_backend_internal:set_permissions(<<"{user}">>, <<"{vhost}">>, '
            f'<<"{own}">>, <<"{both}">>, <<"{both}">>, <<>>)'
        )
    await anyio.to_thread.run_sync(rabbitmq.ctl, "eval", ", ".join([*statements, "ok."]))
    shop = declare_orders(Lightbus("shop", url=rabbitmq.vhost_url(vhost, "shop", "shop")))
    billing = Lightbus("billing", url=rabbitmq.vhost_url(vhost, "billing", "billing"), retry=QUICK)
    received: list[tuple[int, int]] = []

    @billing.on("order.#", queue="slow")
    async def fail(order: OrderPlaced, message: Message) -> None:
        received.append((order.number, message.attempt))
        raise ValueError("no")

    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1))
        await shop.publish(OrderPlaced(number=2), delay=1)
        await dead_letters(billing, 2)
    assert sorted(received) == [(number, attempt) for number in (1, 2) for attempt in (1, 2, 3)]

    def publish_as_billing_to(exchange: str, routing_key: str) -> None:
        with connected(billing) as connection:
            channel = connection.channel()
            channel.confirm_select()
            channel.publish([Publication(exchange, routing_key, b"{}", {"message_id": "m"})])
            channel.exchange_declare("billing", "topic", durable=True, auto_delete=False)

    for exchange, routing_key in (("shop", "order.placed"), ("lightbus", "order.placed"), ("", "billing.main")):
        with pytest.raises(amqp.exceptions.AccessRefused):
            await anyio.to_thread.run_sync(publish_as_billing_to, exchange, routing_key)
    with pytest.raises(amqp.exceptions.AccessRefused):
        await left_in(billing, "shop.main")


MAKE_FILES_AT_ONCE = """
import multiprocessing, sys
from lightbus.connection.dial import BrokerAddresses

def connect(together):
    for number in range(40):
        together.wait()
        BrokerAddresses.parse(f"sqlite:///{sys.argv[1]}/{number}.db").connect("tests").close()

if __name__ == "__main__":
    fork = multiprocessing.get_context("fork")
    together = fork.Barrier(5, timeout=60)
    processes = [fork.Process(target=connect, args=(together,)) for _ in range(5)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(process.exitcode for process in processes))
"""


def test_several_processes_may_create_the_file_of_the_embedded_broker_concurrently(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MAKE_FILES_AT_ONCE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * LIMIT)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["a" * 100, "amq-1"])
def test_the_broker_accepts_every_name_that_an_app_derives(broker_url: str, name: str) -> None:
    """The longest names of an app and a queue, the longest delays, and a name that begins almost like 'amq.'."""
    app = Lightbus(name, url=broker_url, retry=Retry(delays=(2_591_999.999, 30 * 24 * 3600)))
    suffix = "b" * 100
    app.on("#", queue=suffix)(lambda: None)
    wanted = [app.topology(), topology.delaying(name, topology.DELAY_LEVELS - 1, "classic")]
    with connected(broker_url) as connection:
        for one in wanted:
            declare_all(connection, one)
        channel = connection.channel()
        for queue in (queue for one in wanted for queue in one.queues):
            assert len(queue.name) <= 255
            channel.queue_declare(queue.name, passive=True)
    assert f"{name}.{suffix}.retry.2591999999ms" in {queue.name for queue in wanted[0].queues}
