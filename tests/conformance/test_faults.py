"""Publishers and consumers during faults of the broker or of their own process, on RabbitMQ."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from lightbus import Lightbus, errors
from lightbus.message import new_id
from lightbus.transport import Publication
from tests.bus import (
    QUICK,
    InBackground,
    OrderPlaced,
    declare,
    eventually,
    left_in,
    order_numbers,
    running,
    stranger,
    take_all,
)
from tests.conformance.conftest import declare_orders
from tests.patience import LIMIT, wait_until, within
from tests.rabbitmq import Node, free_port

pytestmark = pytest.mark.anyio

MakeApp = Callable[..., Lightbus]

LARGE = "x" * 100_000
"""More than the limit of the node of these tests."""

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def frail_node() -> Iterator[Node]:
    """A node that the tests here may stop, alarm and configure, one after the other."""
    from tests.conftest import need_rabbitmq

    need_rabbitmq()
    with Node(f"max_message_size = {len(LARGE) - 1}\n") as node:
        yield node


@pytest.fixture
def frail(frail_node: Node) -> Iterator[tuple[Node, Lightbus, Lightbus, list[int]]]:
    """The node, an app that publishes, an app that subscribes, and the numbers that it received."""
    vhost = f"frail-{next(_numbers)}"
    frail_node.add_vhosts([vhost])
    url = frail_node.vhost_url(vhost)
    shop, billing = declare_orders(Lightbus("shop", url=url)), Lightbus("billing", url=url, retry=QUICK)
    received: list[int] = []

    @billing.on("order.placed")
    async def note(order: OrderPlaced) -> None:
        received.append(order.number)

    yield frail_node, shop, billing, received
    for app in (shop, billing):
        app.__exit__(None, None, None)


# --- the broker is away -----------------------------------------------------------------------


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_a_publish_without_a_broker_fails_within_its_timeout() -> None:
    url = f"amqp://guest:secret@127.0.0.1:{free_port()}/"
    shop = declare_orders(Lightbus("shop", url=url, publish_timeout=0.5))
    with within(0.5), pytest.raises(errors.PublishUnreachable) as unreachable:
        await shop.publish(OrderPlaced(number=1))
    assert isinstance(unreachable.value, errors.PublishError)
    words = str(unreachable.value)
    assert "'order.placed'" in words
    assert "was not sent within 0.5 s" in words
    assert "amqp://guest:**@127.0.0.1" in words
    assert "Is the broker running there?" in words
    assert "secret" not in words
    await anyio.to_thread.run_sync(shop.__exit__, None, None, None)


def test_code_without_an_event_loop_gets_the_same_error_in_the_same_time() -> None:
    shop = declare_orders(Lightbus("shop", url=f"amqp://127.0.0.1:{free_port()}", publish_timeout=0.5))
    with within(0.3), pytest.raises(errors.PublishUnreachable):
        shop.publish_sync(OrderPlaced(number=1), timeout=0.3)
    many = "2 of 2 events were not confirmed, the first at index 0"
    with within(0.5), pytest.raises(errors.PublishManyError, match=many):
        shop.publish_many_sync([OrderPlaced(number=1), OrderPlaced(number=2)])
    with within(0.5), pytest.raises(errors.BrokerUnreachable), shop:
        pass
    shop.__exit__(None, None, None)


@pytest.mark.rabbitmq
async def test_publishing_and_consuming_continue_after_a_restart_of_the_broker(
    frail: tuple[Node, Lightbus, Lightbus, list[int]],
) -> None:
    node, shop, billing, received = frail
    async with running(shop, billing) as bus:
        (consumer,) = bus.consumers["billing"]
        await shop.publish(OrderPlaced(number=1))
        await anyio.to_thread.run_sync(node.stop)
        await eventually(lambda: shop.publisher.channel is None)
        with pytest.raises(errors.PublishUnreachable):
            await shop.publish(OrderPlaced(number=2), timeout=0.5)
        await eventually(lambda: not consumer.connected)
        async with anyio.create_task_group() as tasks:  # this publish waits for the broker, and succeeds
            tasks.start_soon(lambda: shop.publish(OrderPlaced(number=3), timeout=60))
            await anyio.to_thread.run_sync(node.start)
        await shop.publish(OrderPlaced(number=4))
        await eventually(lambda: {1, 3, 4} <= set(received))
        await eventually(lambda: consumer.connected)
    assert 2 not in received  # an event that timed out before it was sent is not sent later


@pytest.mark.rabbitmq
async def test_a_publish_to_a_frozen_broker_times_out_with_an_unknown_outcome(
    frail: tuple[Node, Lightbus, Lightbus, list[int]],
) -> None:
    node, shop, billing, received = frail

    async def publish_until_it_hangs() -> None:
        for number in itertools.count(10):  # stopping every thread of the node takes some time
            with within(0.5):
                await shop.publish(OrderPlaced(number=number), timeout=0.5)

    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1))
        node.suspend()
        try:
            with pytest.raises(errors.PublishTimeout, match="outcome is unknown") as timeout:
                await publish_until_it_hangs()
            assert "order.placed" in str(timeout.value)
        finally:
            node.resume()
        await shop.publish(OrderPlaced(number=3))
        await eventually(lambda: {1, 3} <= set(received))


@pytest.mark.rabbitmq
async def test_a_delayed_event_survives_a_restart_of_the_broker(
    frail: tuple[Node, Lightbus, Lightbus, list[int]],
) -> None:
    node, shop, billing, received = frail
    await declare(billing)
    async with shop:
        await shop.publish(OrderPlaced(number=1), delay=2)
        await shop.publish(OrderPlaced(number=2), delay=3)
    await anyio.to_thread.run_sync(node.restart)
    async with running(billing):
        await eventually(lambda: set(received), {1, 2})  # a quorum queue dead-letters at least once


# --- the broker says no -----------------------------------------------------------------------


@pytest.mark.rabbitmq
async def test_a_memory_alarm_blocks_publishing_but_not_handling(
    frail: tuple[Node, Lightbus, Lightbus, list[int]],
) -> None:
    node, shop, billing, received = frail
    await declare(billing)
    await shop.publish_many([OrderPlaced(number=n) for n in range(50)])
    await anyio.to_thread.run_sync(node.ctl, "set_vm_memory_high_watermark", "0.0000001")
    try:
        with pytest.raises(errors.PublishTimeout):  # the first publish after an alarm detects it
            await shop.publish(OrderPlaced(number=100), timeout=0.5)
        await eventually(lambda: shop.publisher.connection is not None and shop.publisher.connection.blocked)
        with within(0.5), pytest.raises(errors.PublishBlocked, match="memory or disk alarm") as blocked:
            await shop.publish(OrderPlaced(number=101), timeout=0.5)
        assert "was not sent" in str(blocked.value)
        assert "resumes automatically" in str(blocked.value)
        consumer = billing.consumer()
        async with anyio.create_task_group() as tasks:
            await tasks.start(consumer.run)
            await eventually(lambda: sorted(received), [*range(50)])
            await consumer.stop(5)
        assert await left_in(billing) == []
    finally:
        await anyio.to_thread.run_sync(node.ctl, "set_vm_memory_high_watermark", "0.6")
    await shop.publish(OrderPlaced(number=102))
    assert 102 in order_numbers(await left_in(billing))


@pytest.mark.impossible_on_artemis("a queue cannot be full and refuse what others take")
async def test_a_full_queue_causes_a_nack(shop: Lightbus, billing: Lightbus) -> None:
    arguments = {"x-max-length": 3, "x-overflow": "reject-publish"}
    async with shop, stranger(shop) as channel:

        def bind_a_small_queue() -> None:
            channel.queue_declare("small", durable=True, auto_delete=False, arguments=arguments)
            channel.queue_bind("small", "lightbus", "order.placed")

        await anyio.to_thread.run_sync(bind_a_small_queue)
        for number in range(3):
            assert (await shop.publish(OrderPlaced(number=number))).routed
        with pytest.raises(errors.PublishNacked, match=r"order\.placed.*is full, or has no quorum") as nacked:
            await shop.publish(OrderPlaced(number=4))
        assert "Publish it again later" in str(nacked.value)
        with pytest.raises(errors.PublishManyError, match="2 of 2 events were not confirmed") as many:
            await shop.publish_many([OrderPlaced(number=5), OrderPlaced(number=6)])
        assert [type(outcome) for outcome in many.value.outcomes] == [errors.PublishNacked] * 2


@pytest.mark.rabbitmq
async def test_only_the_event_that_the_broker_refuses_fails(
    frail: tuple[Node, Lightbus, Lightbus, list[int]],
) -> None:
    _, shop, billing, received = frail
    outcomes: dict[int, object] = {}

    async def publish(number: int) -> None:
        try:
            outcomes[number] = await shop.publish(
                OrderPlaced(number=number, note="x" * (200_000 if number == 7 else 1))
            )
        except errors.PublishError as error:
            outcomes[number] = error

    async with running(shop, billing):
        async with anyio.create_task_group() as tasks:
            for number in range(20):
                tasks.start_soon(publish, number)
        refused = outcomes.pop(7)
        assert isinstance(refused, errors.PublishRefused)
        assert "larger than" in str(refused)
        assert "order.placed" in str(refused)
        assert all(outcome.routed for outcome in outcomes.values())  # type: ignore[attr-defined]
        # Events in flight were published again: duplicates are allowed, losses are not.
        await eventually(lambda: set(received), set(range(20)) - {7})
        many = [OrderPlaced(number=n, note=LARGE if n == 103 else "") for n in range(100, 110)]
        with pytest.raises(errors.PublishManyError, match="1 of 10 events were not confirmed, the first at index 3"):
            await shop.publish_many(many)
        await eventually(lambda: set(received) - set(range(20)), set(range(100, 110)) - {103})


@pytest.mark.rabbitmq
async def test_refused_events_affect_neither_the_connection_nor_other_events(
    frail: tuple[Node, Lightbus, Lightbus, list[int]],
) -> None:
    _, shop, billing, received = frail
    refused: list[str] = []

    async def publish_too_large(number: int) -> None:
        with pytest.raises(errors.PublishRefused, match="larger than") as caught:
            await shop.publish(OrderPlaced(number=number, note=LARGE))
        refused.append(str(caught.value))

    async def publish_with_a_header(number: int) -> None:
        publication = Publication("shop", "order.placed", b"{}", {"message_id": new_id(), "headers": {"CC": "boss"}})
        with pytest.raises(errors.PublishRefused, match="CC") as caught:
            await shop.publisher.publish(publication)
        refused.append(str(caught.value))

    async with running(shop, billing):
        connections = shop.publisher.epoch
        for number in range(0, 100, 10):
            async with anyio.create_task_group() as tasks:
                for good in range(number, number + 9):
                    tasks.start_soon(shop.publish, OrderPlaced(number=good))
                tasks.start_soon(publish_too_large if number % 20 else publish_with_a_header, number)
        assert len(refused) == 10
        assert shop.publisher.epoch == connections
        await eventually(lambda: set(received), {number for number in range(100) if number % 10 != 9})


@pytest.mark.rabbitmq
async def test_a_worker_starts_before_its_broker(rabbitmq_url: str) -> None:
    """A worker waits for its first connection, but not after a wrong password."""
    port = free_port()
    billing = Lightbus("billing", url=f"amqp://guest:guest@127.0.0.1:{port}/{rabbitmq_url.rpartition('/')[2]}")
    billing.on("order.placed")(lambda: None)
    consumer = billing.consumer()
    target = int(rabbitmq_url.rpartition("@")[2].partition("/")[0].rpartition(":")[2])
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(consumer.run)
        await anyio.sleep(0.3)
        assert not consumer.connected
        forwarder = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=port)
        tasks.start_soon(forwarder.serve, lambda client: _forward(client, target))
        await eventually(lambda: consumer.connected)
        await consumer.stop(1)
        tasks.cancel_scope.cancel()


async def _forward(client: anyio.abc.SocketStream, port: int) -> None:
    async def copy(source: anyio.abc.SocketStream, sink: anyio.abc.SocketStream) -> None:
        try:
            async for data in source:
                await sink.send(data)
        except (anyio.ClosedResourceError, anyio.BrokenResourceError):
            pass
        tasks.cancel_scope.cancel()

    async with client, await anyio.connect_tcp("127.0.0.1", port) as server, anyio.create_task_group() as tasks:
        tasks.start_soon(copy, client, server)
        tasks.start_soon(copy, server, client)


# --- processes --------------------------------------------------------------------------------


@pytest.fixture(params=["sqlite", pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)])
def outlasting_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A broker that outlives a process."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/bus.db"
    url: str = request.getfixturevalue("rabbitmq_url")
    return url


def test_a_forked_child_can_publish_without_affecting_the_parent(outlasting_url: str) -> None:
    shop, billing = declare_orders(Lightbus("shop", url=outlasting_url)), Lightbus("billing", url=outlasting_url)
    billing.on("order.placed")(lambda: None)
    anyio.run(declare, billing)
    with shop:
        shop.publish_sync(OrderPlaced(number=1))
        children = []
        for number in (10, 20):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    shop.publish_sync(OrderPlaced(number=number))
                    shop.publish_sync(OrderPlaced(number=number + 1))
                    status = 0
                finally:
                    os._exit(status)
            children.append(child)
        for number in range(2, 10):
            shop.publish_sync(OrderPlaced(number=number))
        assert [_status(child) for child in children] == [0, 0]
        shop.publish_sync(OrderPlaced(number=100))
    assert sorted(order_numbers(take_all(billing, "billing.main"))) == [*range(1, 10), 10, 11, 20, 21, 100]


def _status(child: int) -> int:
    ended = (0, 0)

    def has_ended() -> bool:
        nonlocal ended
        ended = os.waitpid(child, os.WNOHANG)
        return ended != (0, 0)

    try:
        wait_until(has_ended, "the child has published")
    finally:
        if ended == (0, 0):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(ended[1])


def _program(url: str, body: str) -> str:
    head = f"""
        import threading
        from lightbus import Lightbus
        from tests.bus import OrderPlaced
        from tests.conformance.conftest import declare_orders
        shop = declare_orders(Lightbus("shop", url={url!r}))
    """
    return textwrap.dedent(head) + textwrap.dedent(body)


def test_a_thread_that_publishes_while_the_main_thread_ends_gets_its_confirms(outlasting_url: str) -> None:
    billing = Lightbus("billing", url=outlasting_url)
    billing.on("order.placed")(lambda: None)
    anyio.run(declare, billing)
    program = _program(
        outlasting_url,
        """
        begun = threading.Event()
        def publish():
            for number in range(200):
                shop.publish_sync(OrderPlaced(number=number))
                begun.set()
            print("confirmed", flush=True)
        threading.Thread(target=publish).start()
        begun.wait()
        """,
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=LIMIT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "confirmed\n", "")
    assert order_numbers(take_all(billing, "billing.main")) == [*range(200)]


def test_a_program_that_publishes_and_ends_loses_nothing(outlasting_url: str) -> None:
    billing = Lightbus("billing", url=outlasting_url)
    billing.on("order.placed")(lambda: None)
    anyio.run(declare, billing)
    program = _program(outlasting_url, "shop.publish_many_sync([OrderPlaced(number=n) for n in range(1000)])")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=LIMIT)
    assert (done.returncode, done.stderr) == (0, "")
    assert order_numbers(take_all(billing, "billing.main")) == [*range(1000)]


def test_a_killed_subscriber_loses_nothing(outlasting_url: str) -> None:
    program = _program(
        outlasting_url,
        """
        import anyio
        billing = Lightbus("billing", url=shop.broker.addresses[0].url)
        @billing.on("order.placed")
        async def hang(order: OrderPlaced) -> None:
            print("begun", flush=True)
            await anyio.sleep(600)
        anyio.run(billing.consumer().run)
        """,
    )
    shop, billing = declare_orders(Lightbus("shop", url=outlasting_url)), Lightbus("billing", url=outlasting_url)
    received: list[int] = []

    @billing.on("order.placed", name="hang")
    async def note(order: OrderPlaced) -> None:
        received.append(order.number)

    anyio.run(declare, billing)
    with shop:
        shop.publish_many_sync([OrderPlaced(number=n) for n in range(200)])
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"begun\n"
        child.kill()
    with InBackground(billing):
        wait_until(lambda: len(received) >= 200, "all that it left is handled")
    assert sorted(received) == [*range(200)]
