"""The metadata of an event: headers, correlation, a source that the broker verifies; also events of other clients."""

from __future__ import annotations

import contextvars
import enum
import json
import logging
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import amqp
import anyio
import anyio.lowlevel
import anyio.to_thread
import attrs
import pika
import pytest

from lightbus import Lightbus, Message
from tests.bus import (
    OrderCancelled,
    OrderPlaced,
    dead_letters,
    eventually,
    left_in,
    publish_plainly,
    running,
    stranger,
)
from tests.conformance.conftest import declare_orders

pytestmark = pytest.mark.anyio

MakeApp = Callable[..., Lightbus]

MEGABYTE = 1_000_000


# --- headers and bodies -----------------------------------------------------------------------


async def test_headers_arrive_unchanged(shop: Lightbus, billing: Lightbus) -> None:
    received: list[Any] = []
    billing.on("order.placed")(_messages(received))
    headers = {
        "text": "Grüße, 世界",
        "empty": "",
        "number": 42,
        "negative": -(2**62),
        "yes": True,
        "no": False,
        "nothing": None,
        "at": datetime(2024, 5, 17, 8, 30, tzinfo=UTC),
        "ratio": 0.25,
    }
    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1), headers=headers)
        await eventually(lambda: len(received), 1)
    got = dict(received[0].headers)
    assert got == headers
    assert [type(value) for value in got.values()] == [type(headers[key]) for key in got]


async def test_headers_of_a_subclass_of_str_arrive_as_str(shop: Lightbus, billing: Lightbus) -> None:
    class Tier(enum.StrEnum):
        GOLD = "gold"

    class Markup(str):
        __slots__ = ()

    received: list[Message] = []
    billing.on("order.placed")(_messages(received))
    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1), headers={"tier": Tier.GOLD, "text": Markup("<b>")})
        await eventually(lambda: len(received), 1)
    got = dict(received[0].headers)
    assert got == {"tier": "gold", "text": "<b>"}
    assert [type(value) for value in got.values()] == [str, str]


async def test_headers_survive_retries(shop: Lightbus, billing: Lightbus) -> None:
    received: list[Any] = []

    @billing.on("order.placed")
    async def fail(message: Message) -> None:
        received.append(dict(message.headers))
        raise ValueError("no")

    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1), headers={"tenant": "acme", "n": 3})
        (dead,) = await dead_letters(billing)
    assert received == [{"tenant": "acme", "n": 3}] * 3
    assert dead.properties["headers"]["tenant"] == "acme"


async def test_a_body_of_ten_megabytes_arrives_and_survives_a_retry(shop: Lightbus, billing: Lightbus) -> None:
    received: list[tuple[int, int]] = []
    note = "x" * (10 * MEGABYTE)

    @billing.on("order.placed")
    async def fail_once(order: OrderPlaced, message: Message) -> None:
        assert order.note == note
        received.append((message.attempt, len(message.body)))
        if message.attempt == 1:
            raise ValueError("once more")

    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1, note=note))
        size = 10 * MEGABYTE + len('{"note":"","number":1}')
        await eventually(lambda: received, [(1, size), (2, size)])


async def test_small_events_pass_between_large_ones(shop: Lightbus, billing: Lightbus) -> None:
    received: list[int] = []

    @billing.on("order.placed")
    async def note(order: OrderPlaced) -> None:
        received.append(order.number)

    events = [OrderPlaced(number=n, note="x" * (MEGABYTE if n % 5 == 0 else 10)) for n in range(20)]
    async with running(shop, billing):
        await shop.publish_many(events)
        await eventually(lambda: received, [*range(20)])


# --- correlation ------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class InvoiceSent:
    number: int


@attrs.frozen(kw_only=True)
class LetterPosted:
    number: int


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_publishing_in_a_handler_passes_correlation_and_causation_on(
    shop: Lightbus, billing: Lightbus, make_app: MakeApp
) -> None:
    post = make_app("post")
    billing.event(InvoiceSent)
    post.event(LetterPosted)
    received: dict[str, Message] = {}

    @billing.on("order.placed")
    async def bill(order: OrderPlaced, message: Message) -> None:
        received["order"] = message
        await billing.publish(InvoiceSent(number=order.number))

    @post.on("invoice.sent")
    def send(invoice: InvoiceSent, message: Message) -> None:  # in a thread
        received["invoice"] = message
        post.publish_sync(LetterPosted(number=invoice.number))

    @billing.on("letter.posted")
    async def note(message: Message) -> None:
        received["letter"] = message

    async with running(shop, billing, post):
        receipt = await shop.publish(OrderPlaced(number=1))
        await eventually(lambda: set(received), {"order", "invoice", "letter"})
    order, invoice, letter = received["order"], received["invoice"], received["letter"]
    assert (order.id, order.correlation_id, order.causation_id) == (receipt.id, receipt.id, None)
    assert (invoice.correlation_id, invoice.causation_id) == (receipt.id, order.id)
    assert (letter.correlation_id, letter.causation_id) == (receipt.id, invoice.id)
    assert len({order.id, invoice.id, letter.id}) == 3


async def test_tasks_and_threads_of_a_handler_pass_correlation_on(shop: Lightbus, billing: Lightbus) -> None:
    billing.event(InvoiceSent)
    causes: dict[int, str | None] = {}

    @billing.on("order.placed")
    async def bill(message: Message) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(billing.publish, InvoiceSent(number=1))
        await anyio.to_thread.run_sync(billing.publish_sync, InvoiceSent(number=2))
        await billing.publish_many([InvoiceSent(number=3)])
        await billing.publish(InvoiceSent(number=4), delay=1)

    @billing.on("invoice.sent")
    async def note(invoice: InvoiceSent, message: Message) -> None:
        causes[invoice.number] = message.causation_id

    async with running(shop, billing):
        receipt = await shop.publish(OrderPlaced(number=0))
        await eventually(lambda: causes, dict.fromkeys((1, 2, 3, 4), receipt.id))


async def test_concurrent_handlers_do_not_mix_their_causation_ids(shop: Lightbus, billing: Lightbus) -> None:
    billing.event(InvoiceSent)
    caused: dict[int, str] = {}
    received: dict[int, str | None] = {}

    @billing.on("order.placed")
    async def bill(order: OrderPlaced, message: Message) -> None:
        caused[order.number] = message.id
        await anyio.sleep(0.01)
        await billing.publish(InvoiceSent(number=order.number))

    @billing.on("invoice.sent")
    async def note(invoice: InvoiceSent, message: Message) -> None:
        received[invoice.number] = message.causation_id

    async with running(shop, billing):
        await shop.publish_many([OrderPlaced(number=n) for n in range(50)])
        await eventually(lambda: len(received), 50)
    assert received == caused


async def test_an_event_published_outside_of_handlers_has_no_causation_id(shop: Lightbus, billing: Lightbus) -> None:
    received: list[Message] = []
    billing.on("order.placed")(_messages(received))
    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1))
        await shop.publish(OrderPlaced(number=2))
        await eventually(lambda: len(received), 2)
    assert [message.causation_id for message in received] == [None, None]
    assert len({message.correlation_id for message in received}) == 2


async def test_each_handler_run_has_its_own_context_variables(shop: Lightbus, billing: Lightbus) -> None:
    variable = contextvars.ContextVar("variable", default="unset")
    seen: list[str] = []

    @billing.on("order.placed")
    async def change(order: OrderPlaced) -> None:
        seen.append(variable.get())
        variable.set(f"set by {order.number}")
        await anyio.lowlevel.checkpoint()
        assert variable.get() == f"set by {order.number}"

    async with running(shop, billing, concurrency=1):
        await shop.publish_many([OrderPlaced(number=n) for n in range(5)])
        await eventually(lambda: seen, ["unset"] * 5)


# --- source -----------------------------------------------------------------------------------


async def test_source_matches_only_events_of_that_app(billing: Lightbus, make_app: MakeApp) -> None:
    shop, market = declare_orders(make_app("shop")), declare_orders(make_app("market"))
    received: dict[str, list[str]] = {"from_shop": [], "from_any_app": []}

    @billing.on("order.placed", source="shop", queue="picky")
    async def from_shop(message: Message) -> None:
        received["from_shop"].append(message.source)

    async with running(shop, market, billing):
        await market.publish(OrderPlaced(number=1))
        await shop.publish(OrderPlaced(number=2))
        await eventually(lambda: received["from_shop"], ["shop"])


async def test_source_selects_between_handlers_of_one_queue(billing: Lightbus, make_app: MakeApp) -> None:
    shop, market = declare_orders(make_app("shop")), declare_orders(make_app("market"))
    received: list[tuple[str, str]] = []

    def handle_as(name: str, source: str | None) -> None:
        @billing.on("order.placed", source=source, name=name)
        async def note(message: Message) -> None:
            received.append((name, message.source))

    handle_as("only_shop", "shop")
    handle_as("only_market", "market")
    handle_as("any_app", None)
    async with running(shop, market, billing) as bus:
        await shop.publish(OrderPlaced(number=1))
        await market.publish(OrderPlaced(number=1))
        await bus.quiet(billing)
    assert sorted(received) == [
        ("any_app", "market"),
        ("any_app", "shop"),
        ("only_market", "market"),
        ("only_shop", "shop"),
    ]


async def test_a_subscriber_with_source_may_start_before_that_app(shop: Lightbus, billing: Lightbus) -> None:
    received: list[str] = []

    @billing.on("order.placed", source="shop")
    async def note(message: Message) -> None:
        received.append(message.source)

    async with running(billing), running(shop):
        assert (await shop.publish(OrderPlaced(number=1))).routed
        await eventually(lambda: received, ["shop"])


async def test_forged_headers_of_another_client_are_ignored(shop: Lightbus, billing: Lightbus) -> None:
    received: list[tuple[str, Message]] = []

    @billing.on("order.placed")
    async def meant(message: Message) -> None:
        received.append(("meant", message))
        raise ValueError("no")

    @billing.on("order.cancelled")
    async def not_meant(message: Message) -> None:
        received.append(("not_meant", message))

    forged = {
        "lightbus-source": "bank",
        "lightbus-attempt": 99,
        "lightbus-handler": "not_meant",
        "lightbus-routing-key": "order.cancelled",
        "lightbus-queue": "other",
        "mine": "kept",
    }
    async with running(shop, billing), stranger(billing) as channel:
        properties = {"headers": forged, "app_id": "bank", "type": "order.cancelled"}
        body = b'{"number": 1}'
        await anyio.to_thread.run_sync(publish_plainly, channel, "shop", "order.placed", body, properties)
        (dead,) = await dead_letters(billing)
    assert [(name, m.source, m.event, m.attempt) for name, m in received] == [
        ("meant", "shop", "order.placed", attempt) for attempt in (1, 2, 3)
    ]
    assert dict(received[0][1].headers) == {"mine": "kept"}
    headers = dead.properties["headers"]
    assert (headers["lightbus-source"], headers["lightbus-routing-key"]) == ("shop", "order.placed")
    assert (headers["lightbus-attempt"], headers["lightbus-handler"]) == (3, "meant")
    assert headers["lightbus-queue"] == "billing.main"


# --- programs without Lightbus ----------------------------------------------------------------


async def test_json_with_only_a_routing_key_is_handled(shop: Lightbus, billing: Lightbus) -> None:
    received: list[tuple[OrderPlaced, Message]] = []

    @billing.on("order.placed")
    async def note(order: OrderPlaced, message: Message) -> None:
        received.append((order, message))

    before = datetime.now(UTC).replace(microsecond=0)
    async with running(shop, billing), stranger(billing) as channel:
        await anyio.to_thread.run_sync(publish_plainly, channel, "shop", "order.placed", b'{"number": 5}')
        await eventually(lambda: len(received), 1)
    ((order, message),) = received
    assert order == OrderPlaced(number=5)
    assert message.id
    assert (message.event, message.source, message.version, message.attempt) == ("order.placed", "shop", 1, 1)
    assert (message.correlation_id, message.causation_id, dict(message.headers)) == (message.id, None, {})
    assert before <= message.time <= datetime.now(UTC)
    assert message.body == b'{"number": 5}'


async def test_an_event_of_another_client_keeps_its_generated_id_over_retries(
    shop: Lightbus, billing: Lightbus
) -> None:
    ids: list[str] = []
    others: list[str] = []

    @billing.on("order.placed")
    async def fail(message: Message) -> None:
        ids.append(message.id)
        raise ValueError("no")

    @billing.on("order.placed")
    async def note(message: Message) -> None:
        others.append(message.id)

    async with running(shop, billing), stranger(billing) as channel:
        await anyio.to_thread.run_sync(publish_plainly, channel, "shop", "order.placed", b'{"number": 5}')
        (dead,) = await dead_letters(billing)
    assert len(ids) == 3
    assert {*ids, *others} == {dead.properties["message_id"]}


@pytest.mark.parametrize("content_type", ["text/plain", "", "application/octet-stream", "application/vnd.acme+json"])
async def test_json_is_read_with_any_content_type(shop: Lightbus, billing: Lightbus, content_type: str) -> None:
    received: list[int] = []

    @billing.on("order.placed")
    async def note(order: OrderPlaced) -> None:
        received.append(order.number)

    async with running(shop, billing), stranger(billing) as channel:
        properties = {"content_type": content_type, "content_encoding": "binary"}
        await anyio.to_thread.run_sync(publish_plainly, channel, "shop", "order.placed", b'{"number": 5}', properties)
        await eventually(lambda: received, [5])


async def test_all_properties_of_another_client_are_passed_on(shop: Lightbus, billing: Lightbus) -> None:
    received: list[Message] = []
    billing.on("order.placed")(_messages(received))
    properties = {
        "message_id": "m-1",
        "correlation_id": "c-1",
        "timestamp": 1_700_000_000,
        "app_id": "elsewhere",
        "type": "anything",
        "priority": 3,
        "reply_to": "nobody",
        "expiration": "600000",
        "delivery_mode": 1,
        "headers": {"k": "v", "lightbus-version": 4, "lightbus-causation": "p-1", "lists": [1, "two"], "t": {"x": 1}},
    }
    async with running(shop, billing), stranger(billing) as channel:
        await anyio.to_thread.run_sync(publish_plainly, channel, "shop", "order.placed", b"{}", properties)
        await eventually(lambda: len(received), 1)
    assert received[0] == Message(
        id="m-1",
        event="order.placed",
        source="shop",
        time=datetime.fromtimestamp(1_700_000_000, UTC),
        version=4,
        attempt=1,
        correlation_id="c-1",
        causation_id="p-1",
        headers={"k": "v", "lists": [1, "two"], "t": {"x": 1}},
        body=b"{}",
        redelivered=False,
    )


@pytest.mark.rabbitmq
class TestForeignClients:
    """Programs with py-amqp and pika, on RabbitMQ."""

    async def _received(self, make_app: MakeApp, publish: Callable[[str], None], url: str) -> list[tuple[int, str]]:
        shop, billing = make_app("shop"), make_app("billing")
        received: list[tuple[int, str]] = []

        @billing.on("order.placed")
        async def fail_first(order: OrderPlaced, message: Message) -> None:
            received.append((order.number, message.event))
            if message.attempt == 1:
                raise ValueError("once more")

        async with running(shop, billing):
            await anyio.to_thread.run_sync(publish, url)
            await eventually(lambda: len(received), 4)
        assert await left_in(billing, "billing.dead") == []
        return sorted(received)

    async def test_py_amqp(self, make_rabbitmq_app: MakeApp, rabbitmq_url: str) -> None:
        def publish(url: str) -> None:
            host, _, vhost = url.rpartition("@")[2].partition("/")
            with amqp.Connection(host, virtual_host=vhost, confirm_publish=True) as connection:
                channel = connection.channel()
                for number in (1, 2):
                    message = amqp.Message(json.dumps({"number": number}))
                    channel.basic_publish(message, exchange="shop", routing_key="order.placed")

        received = await self._received(make_rabbitmq_app, publish, rabbitmq_url)
        assert received == [(1, "order.placed")] * 2 + [(2, "order.placed")] * 2

    async def test_pika(self, make_rabbitmq_app: MakeApp, rabbitmq_url: str) -> None:
        logging.getLogger("pika").setLevel(logging.ERROR)

        def publish(url: str) -> None:
            with pika.BlockingConnection(pika.URLParameters(url)) as connection:
                channel = connection.channel()
                channel.confirm_delivery()
                for number in (1, 2):
                    channel.basic_publish("shop", "order.placed", json.dumps({"number": number}), mandatory=True)

        received = await self._received(make_rabbitmq_app, publish, rabbitmq_url)
        assert received == [(1, "order.placed")] * 2 + [(2, "order.placed")] * 2

    async def test_another_client_reads_events_of_lightbus(self, make_rabbitmq_app: MakeApp, rabbitmq_url: str) -> None:
        shop = declare_orders(make_rabbitmq_app("shop"))
        got: list[Any] = []
        ready, over = threading.Event(), threading.Event()

        def listen() -> None:
            with pika.BlockingConnection(pika.URLParameters(rabbitmq_url)) as connection:
                channel = connection.channel()
                queue = channel.queue_declare("", exclusive=True).method.queue
                channel.queue_bind(queue, "lightbus", "order.#")
                ready.set()
                for method, properties, body in channel.consume(queue, auto_ack=True, inactivity_timeout=0.05):
                    if method is not None:
                        got.append((method, properties, body))
                    if over.is_set():
                        break

        async with shop:
            thread = threading.Thread(target=listen)
            thread.start()
            await anyio.to_thread.run_sync(ready.wait)
            receipt = await shop.publish(OrderCancelled(number=3), headers={"tenant": "acme"})
            await eventually(lambda: len(got), 1)
            over.set()
            await anyio.to_thread.run_sync(thread.join)
        ((method, properties, body),) = got
        assert json.loads(body) == {"number": 3}
        assert (method.exchange, method.routing_key) == ("shop", "order.cancelled")
        assert properties.content_type == "application/json"
        assert properties.delivery_mode == 2
        assert properties.message_id == properties.correlation_id == receipt.id
        assert (properties.type, properties.app_id) == ("order.cancelled", "shop")
        assert datetime.fromtimestamp(properties.timestamp, UTC) - datetime.now(UTC) < timedelta(seconds=30)
        assert properties.headers == {"tenant": "acme", "lightbus-version": 1}


def _messages(received: list[Any]) -> Callable[[Message], object]:
    async def note(message: Message) -> None:
        received.append(message)

    return note
