"""`publish(id=, correlation_id=, time=)`: what the publisher gives is what every handler gets, on each copy."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import anyio
import anyio.to_thread
import pytest

from lightbus import Lightbus, Message
from tests.bus import OrderPlaced, dead_letters, eventually, running
from tests.patience import DELAY

pytestmark = pytest.mark.anyio

MakeApp = Callable[..., Lightbus]

TIME = datetime(2026, 5, 4, 12, 30, 15, 999_999, tzinfo=timezone(timedelta(hours=2)))
GIVEN: dict[str, Any] = {"id": "order 4711/grün", "correlation_id": "request-1", "time": TIME}
ARRIVED = ("order 4711/grün", "request-1", datetime(2026, 5, 4, 10, 30, 15, tzinfo=UTC))


def _envelope(message: Message) -> tuple[str, str, datetime]:
    return message.id, message.correlation_id, message.time


def _note(app: Lightbus) -> list[Message]:
    received: list[Message] = []

    @app.on("order.placed")
    async def note(message: Message) -> None:
        received.append(message)

    return received


async def test_the_id_correlation_id_and_time_of_a_publish_arrive(shop: Lightbus, billing: Lightbus) -> None:
    received = _note(billing)
    async with running(shop, billing):
        receipt = await shop.publish(OrderPlaced(number=1), **GIVEN)
        await eventually(lambda: [_envelope(one) for one in received], [ARRIVED])
        assert receipt.id == received[0].id
        await anyio.to_thread.run_sync(lambda: shop.publish_sync(OrderPlaced(number=2), **GIVEN))
        await eventually(lambda: [_envelope(one) for one in received], [ARRIVED, ARRIVED])


async def test_they_arrive_with_a_delayed_event(shop: Lightbus, billing: Lightbus) -> None:
    received = _note(billing)
    async with running(shop, billing):
        began = datetime.now(UTC)
        await shop.publish(OrderPlaced(number=1), delay=timedelta(milliseconds=500), **GIVEN)
        await eventually(lambda: [_envelope(one) for one in received], [ARRIVED])
        assert timedelta(seconds=1) <= datetime.now(UTC) - began < timedelta(seconds=1 + DELAY)


async def test_they_arrive_with_each_retry_and_in_the_dead_letter(shop: Lightbus, billing: Lightbus) -> None:
    attempts: list[tuple[int, tuple[str, str, datetime]]] = []

    @billing.on("order.placed")
    async def fail(message: Message) -> None:
        attempts.append((message.attempt, _envelope(message)))
        raise ValueError("no")

    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1), **GIVEN)
        (dead,) = await dead_letters(billing)
    assert attempts == [(attempt, ARRIVED) for attempt in (1, 2, 3)]
    assert (dead.properties["message_id"], dead.properties["correlation_id"]) == ARRIVED[:2]


async def test_an_event_with_an_id_only_begins_a_chain_with_this_id(shop: Lightbus, billing: Lightbus) -> None:
    received = _note(billing)
    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1), id="o-1")
        await eventually(lambda: [(one.id, one.correlation_id) for one in received], [("o-1", "o-1")])


async def test_a_handler_may_publish_with_another_correlation_id(shop: Lightbus, make_app: MakeApp) -> None:
    billing, audit = make_app("billing"), make_app("audit")
    received: list[Message] = []

    @billing.event("invoice.sent")
    class InvoiceSent:
        number: int

    @billing.on("order.placed")
    async def send(order: OrderPlaced) -> None:
        await billing.publish(InvoiceSent(number=1), id="i-1")
        await billing.publish(InvoiceSent(number=2), correlation_id="of its own")

    @audit.on("invoice.sent")
    async def note(message: Message) -> None:
        received.append(message)

    async with running(shop, billing, audit):
        await shop.publish(OrderPlaced(number=1), id="o-1", correlation_id="c-1")
        await eventually(lambda: len(received), 2)
    first, second = sorted(received, key=lambda message: message.body)
    assert (first.id, first.correlation_id, first.causation_id) == ("i-1", "c-1", "o-1")
    assert (second.correlation_id, second.causation_id) == ("of its own", "o-1")


async def test_events_with_the_same_id_at_once_all_arrive(shop: Lightbus, billing: Lightbus) -> None:
    received: list[tuple[str, int]] = []
    receipts: list[Any] = []

    @billing.on("order.placed")
    async def note(order: OrderPlaced, message: Message) -> None:
        received.append((message.id, order.number))

    async with running(shop, billing):

        async def publish(number: int) -> None:
            receipts.append(await shop.publish(OrderPlaced(number=number), id="same"))

        async with anyio.create_task_group() as tasks:
            for number in range(20):
                tasks.start_soon(publish, number)
        assert [(one.id, one.routed) for one in receipts] == [("same", True)] * 20
        await eventually(lambda: sorted(received), [("same", number) for number in range(20)])


async def test_publish_many_has_one_correlation_id_for_all(shop: Lightbus, billing: Lightbus) -> None:
    received = _note(billing)
    async with running(shop, billing):
        receipts = await shop.publish_many([OrderPlaced(number=n) for n in range(3)], correlation_id="import-7")
        await eventually(lambda: {one.id for one in received}, {one.id for one in receipts})
    assert {one.correlation_id for one in received} == {"import-7"}


async def test_on_publish_functions_still_add_headers(shop: Lightbus, billing: Lightbus) -> None:
    received = _note(billing)

    @shop.on_publish
    def add_tenant(event: object, headers: dict[str, Any]) -> None:
        headers["tenant"] = "acme"

    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1), headers={"a": 1}, **GIVEN)
        await eventually(lambda: [_envelope(one) for one in received], [ARRIVED])
    assert dict(received[0].headers) == {"a": 1, "tenant": "acme"}
