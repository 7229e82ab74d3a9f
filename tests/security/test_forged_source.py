"""What an app can do, with only its own permissions, to impersonate another app or to disturb its subscribers."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio
import pytest

from lightbus import Lightbus, Message, Retry
from lightbus.connection.declare import declare
from lightbus.transport import Channel, Connection, Publication
from lightbus.wire.topology import Topology, bus_exchange, publishing
from tests import rabbitmq as nodes
from tests.bus import (
    OrderPlaced,
    connected,
    dead_letters,
    eventually,
    publish_confirmed,
    publish_plainly,
    reason,
    running,
)

pytestmark = [pytest.mark.rabbitmq, pytest.mark.anyio]

PASSWORD = "s3cr3t"
APPS = ("shop", "billing", "mallory")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def apps(rabbitmq: nodes.Node, rabbitmq_url: str) -> Iterator[dict[str, Lightbus]]:
    """Each with a user that has the permissions of docs/operations.md. billing may read the exchange `mallory`."""
    vhost = rabbitmq_url.rpartition("/")[2]
    with connected(rabbitmq_url) as connection:
        declare(connection, Topology(exchanges=(bus_exchange(),)))
        declare(connection, publishing("mallory"))
    for name in APPS:
        rabbitmq.ctl("add_user", f"{name}-{vhost}", PASSWORD)
        own, more = rf"{name}(\..+)?", "|mallory" if name == "billing" else ""
        permissions = (rf"^{own}$", rf"^({own}|lightbus(\.catalog)?)$", rf"^({own}|lightbus(\.catalog)?{more})$")
        rabbitmq.ctl("set_permissions", "-p", vhost, f"{name}-{vhost}", *permissions)
    yield {
        name: Lightbus(
            name, url=rabbitmq.vhost_url(vhost, f"{name}-{vhost}", PASSWORD), retry=Retry(delays=(0.05, 0.1))
        )
        for name in APPS
    }
    for name in APPS:
        rabbitmq.ctl("delete_user", f"{name}-{vhost}")


@contextlib.asynccontextmanager
async def mallory_does(apps: dict[str, Lightbus], *steps: Callable[[Channel], object]) -> AsyncIterator[None]:
    def do() -> None:
        with connected(apps["mallory"]) as connection:
            channel = connection.channel()
            for step in steps:
                step(channel)

    await anyio.to_thread.run_sync(do)
    yield


def trick(channel: Channel) -> None:
    """One of mallory's queues dead-letters to the bus exchange, to which no client can publish."""
    arguments = {
        "x-dead-letter-exchange": "lightbus",
        "x-dead-letter-routing-key": "order.placed",
        "x-message-ttl": 0,
    }
    channel.queue_declare("mallory.trick", durable=True, auto_delete=False, arguments=arguments)
    channel.queue_bind("mallory.trick", "mallory", "trick")
    forged = {"lightbus-source": "shop", "lightbus-handler": "charge", "lightbus-error-type": "forged"}
    death = {"queue": "shop.main", "exchange": "shop", "reason": "expired", "routing-keys": ["order.placed"]}
    headers = {**forged, "x-death": [death]}
    publish_plainly(channel, "mallory", "trick", b'{"number": 1}', {"headers": headers, "message_id": "m-1"})


async def test_no_handler_gets_what_a_queue_dead_letters_to_the_bus(apps: dict[str, Lightbus]) -> None:
    billing, handled = apps["billing"], list[str]()

    @billing.on("order.#")
    async def charge(message: Message) -> None:
        handled.append(message.source)

    async with running(billing) as bus:
        async with mallory_does(apps, trick):
            (dead,) = await dead_letters(billing)
        await bus.quiet(billing)
    assert reason(dead).startswith(
        "lightbus.errors.UnverifiedOrigin: it reached 'billing.main' through the bus exchange, to which no client "
        "can publish: the queue 'mallory.trick' dead-lettered it there."
    )
    assert dead.properties["headers"]["lightbus-source"] == ""
    assert "lightbus-handler" not in dead.properties["headers"]
    assert handled == []


async def test_an_alternate_exchange_does_not_change_the_source(apps: dict[str, Lightbus]) -> None:
    billing, sources = apps["billing"], list[str]()

    @billing.on("order.placed")
    async def charge(message: Message) -> None:
        sources.append(message.source)

    def publish(channel: Channel) -> None:
        channel.exchange_declare(
            "mallory.trick", "fanout", durable=True, auto_delete=False, arguments={"alternate-exchange": "lightbus"}
        )
        publish_plainly_to_fanout(channel)

    async with running(billing), mallory_does(apps, publish):
        await eventually(lambda: sources, ["mallory"])


def publish_plainly_to_fanout(channel: Channel) -> None:
    connection: Connection = channel.connection
    publish_confirmed(connection, Publication("mallory.trick", "order.placed", b"{}", {}, mandatory=False))


def bind_the_bus(channel: Channel) -> None:
    """The alternate exchange is mallory's own exchange: there, a binding of billing gets all events."""
    channel.exchange_bind("mallory", "lightbus", "#")


async def test_a_queue_for_one_app_gets_no_dead_letters_of_other_apps(
    apps: dict[str, Lightbus], caplog: pytest.LogCaptureFixture
) -> None:
    shop, billing, handled = apps["shop"], apps["billing"], list[str]()
    shop.event(OrderPlaced)

    @billing.on("order.placed", source="mallory")
    async def note(message: Message) -> None:
        handled.append(message.source)

    async with running(shop), running(billing, queues=("main",)) as bus:  # no handler without source=
        async with mallory_does(apps, bind_the_bus):
            for number in (1, 2):
                await shop.publish(OrderPlaced(number=number))
            (consumer,) = bus.consumers["billing"]
            with caplog.at_level(logging.WARNING, "lightbus"):
                await eventually(lambda: consumer.handled, 6)  # each is retried twice before
            await eventually(lambda: waiting(billing), {"billing.main": 0, "billing.dead": 0})
        async with mallory_does(apps, lambda channel: publish_plainly(channel, "mallory", "order.placed", b"{}")):
            await eventually(lambda: handled, ["mallory"])
    (logged,) = [one.getMessage() for one in caplog.records if "acknowledged without" in one.getMessage()]
    assert "'order.placed' from 'shop' was acknowledged without a handler (1 so far)" in logged


async def test_a_queue_that_is_also_bound_to_the_bus_gets_dead_letters_of_other_apps(apps: dict[str, Lightbus]) -> None:
    """They cannot be distinguished from events whose handler is missing by mistake, or during a deployment."""
    shop, billing = apps["shop"], apps["billing"]
    shop.event(OrderPlaced)
    billing.on("order.placed", source="mallory")(lambda order: None)
    async with running(shop, billing), mallory_does(apps, bind_the_bus):
        await shop.publish(OrderPlaced(number=1))
        (dead,) = await dead_letters(billing)
    assert "NoHandler" in reason(dead)


def waiting(app: Lightbus) -> dict[str, int]:
    with connected(app) as connection:
        channel = connection.channel()
        return {
            queue: int(channel.queue_declare(queue, passive=True).message_count)
            for queue in (f"{app.name}.main", f"{app.name}.dead")
        }


async def test_what_any_app_can_read_of_another_apps_queues(apps: dict[str, Lightbus]) -> None:
    """RabbitMQ requires no permission for a passive declare."""
    billing = apps["billing"]
    billing.on("order.placed")(lambda order: None)
    seen: list[Any] = []

    def look(channel: Channel) -> None:
        channel.exchange_declare("billing", "topic", passive=True)
        seen.append(channel.queue_declare("billing.main", passive=True)[:3])

    async with running(billing), mallory_does(apps, look):
        assert seen == [("billing.main", 0, 1)]
