"""Copies for a retry or a dead letter: what the broker acts on stays behind; moving one by hand loses nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import anyio
import anyio.to_thread
import pytest

from lightbus import Lightbus, Message, Reject, errors
from lightbus.dead_letters import actions
from lightbus.dead_letters.letter import DeadLetter, Filter
from lightbus.dead_letters.queue import opened
from lightbus.transport import Delivery, Publication
from tests.bus import (
    OrderPlaced,
    connected,
    dead_letters,
    eventually,
    publish_confirmed,
    publish_plainly,
    reason,
    running,
    stranger,
)

pytestmark = pytest.mark.anyio

MakeApp = Callable[..., Lightbus]

# What RabbitMQ acts on, or has acted on, by header.
BROKERS_HEADERS: dict[str, Any] = {
    "CC": ["main", "retry.50ms", "retry.100ms", "dead", "order.placed"],
    "BCC": ["main", "dead"],
    "x-death": [{"queue": "billing.retry.50ms", "reason": "expired", "count": 3, "exchange": "billing.internal"}],
    "x-first-death-queue": "main",
    "x-last-death-reason": "rejected",
    "x-delivery-count": 7,
    "x-delay": 60_000,
    "x-opt-deliver-at": 7,
    "x-stream-offset": 9,
    "x-received-from": [{"exchange": "shop"}],
    "x-routed-by": "rabbit@a",
}
OWN_HEADERS = {"cc": "boss@example.com", "Bcc": "x", "x-request-id": "r-1", "tenant": "acme", "CCC": 1}


async def test_a_message_that_the_broker_sends_to_more_keys_is_retried_and_dead_lettered_once(
    shop: Lightbus, billing: Lightbus
) -> None:
    """Each copy with its CC or BCC header would be routed to those keys too, and each of those copies again."""
    attempts: list[tuple[int, dict[str, Any]]] = []

    @billing.on("order.placed")
    async def fail(message: Message) -> None:
        attempts.append((message.attempt, dict(message.headers)))
        raise ValueError("no")

    async with running(shop, billing) as bus, stranger(billing) as channel:
        properties = {"headers": {**BROKERS_HEADERS, **OWN_HEADERS}, "priority": 9, "reply_to": "answers"}
        await anyio.to_thread.run_sync(publish_plainly, channel, "shop", "order.placed", b"{}", properties)
        (dead,) = await dead_letters(billing)
        await bus.quiet(billing)
        assert await _nothing_more(billing)
    assert attempts == [(attempt, OWN_HEADERS) for attempt in (1, 2, 3)]
    headers = {key for key in dead.properties["headers"] if not key.startswith("lightbus-")}
    assert headers - {"x-delivery-count"} == set(OWN_HEADERS)
    assert dead.properties["headers"].get("x-delivery-count") != 7  # the dead-letter queue counts its own
    assert dead.properties["reply_to"] == "answers"
    assert "priority" not in dead.properties


async def _nothing_more(billing: Lightbus) -> bool:
    """Whether neither the retry queues nor the dead letters have any more."""
    with connected(billing) as connection:
        channel = connection.channel()
        for queue in ("billing.retry.50ms", "billing.retry.100ms", "billing.dead"):
            if channel.queue_declare(queue, passive=True)[1]:
                return False
    return True


async def test_the_retry_of_a_dead_letter_is_not_sent_to_more_keys_either(shop: Lightbus, billing: Lightbus) -> None:
    handled: list[str] = []
    cured = False

    @billing.on("order.placed")
    async def note(message: Message) -> None:
        if not cured:
            raise Reject("not yet")
        handled.append(message.id)

    async with running(shop, billing) as bus, stranger(billing) as channel:
        properties = {"headers": {"CC": ["main"]}, "message_id": "m-1"}
        await anyio.to_thread.run_sync(publish_plainly, channel, "shop", "order.placed", b"{}", properties)
        outcome = actions.Outcome()
        await eventually(lambda: _count(billing), 1)
        cured = True
        await anyio.to_thread.run_sync(_retry, billing, outcome, False)
        await eventually(lambda: handled, ["m-1"])
        await bus.quiet(billing)
    assert (outcome.done, handled) == (1, ["m-1"])


@pytest.mark.parametrize("name", ["CC", "BCC"])
async def test_a_header_that_the_broker_would_route_by_is_refused_at_the_publisher(shop: Lightbus, name: str) -> None:
    shop_headers = {name: "boss@example.com"}
    with pytest.raises(errors.InvalidPayload, match=f"'order.placed' was not sent: .* header '{name}'"):
        await shop.publish(OrderPlaced(number=1), headers=shop_headers)
    with pytest.raises(errors.InvalidPayload, match=name):
        await shop.publish(OrderPlaced(number=1), headers=shop_headers, delay=1)
    with pytest.raises(errors.InvalidPayload, match=name):
        await anyio.to_thread.run_sync(lambda: shop.publish_sync(OrderPlaced(number=1), headers=shop_headers))


async def test_the_same_name_in_other_letters_is_a_header_like_any_other(shop: Lightbus, billing: Lightbus) -> None:
    received: list[Any] = []

    @billing.on("order.placed")
    async def note(message: Message) -> None:
        received.append(dict(message.headers))

    headers = {"cc": "a@example.com", "Cc": "b@example.com", "bcc": "c@example.com", "Bcc": "d@example.com"}
    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1), headers=headers)
        await eventually(lambda: received, [headers])


# --- moved by hand ----------------------------------------------------------------------------


def _move(app: Lightbus, source: str, target: str) -> Delivery:
    """As a shovel or the management UI moves a message: to the default exchange, with the queue's name as the key."""
    with connected(app) as connection:
        channel = connection.channel()
        moved = channel.get(source)
        assert moved is not None
        publication = Publication("", target, moved.body, moved.properties, mandatory=False)
        publish_confirmed(connection, publication)
        channel.basic_ack(moved.delivery_tag)
        channel.close()
    return moved


def _count(app: Lightbus, queue: str = "dead") -> int:
    with connected(app) as connection:
        return int(connection.channel().queue_declare(f"{app.name}.{queue}", passive=True)[1])


def _read(app: Lightbus) -> list[DeadLetter]:
    with opened(app) as queue:
        return list(queue.dead_letters())


def _retry(app: Lightbus, outcome: actions.Outcome, trust_origin: bool) -> None:
    with opened(app) as queue:
        actions.retry(queue, Filter(), outcome, trust_origin=trust_origin)


@pytest.mark.parametrize("target", ["billing.main", "billing.retry.50ms"])
async def test_a_dead_letter_that_was_moved_by_hand_keeps_its_name_and_can_be_retried(
    shop: Lightbus, billing: Lightbus, target: str
) -> None:
    """Any user of the default exchange could have made it up: it is not handled, but nothing of it is lost."""
    handled: list[tuple[str, str, str, int]] = []
    bystander: list[str] = []
    cured = False

    @billing.on("order.placed")
    async def charge(order: OrderPlaced, message: Message) -> None:
        if not cured:
            raise ValueError("a bug")
        handled.append((message.id, message.event, message.source, order.number))

    @billing.on("#")
    async def everything(message: Message) -> None:
        if message.event != "tests-sentinel.all.is.quiet":
            bystander.append(message.event)

    async with running(shop, billing) as bus:
        receipt = await shop.publish(OrderPlaced(number=7))
        await eventually(lambda: _count(billing), 1)
        cured = True
        await anyio.to_thread.run_sync(_move, billing, "billing.dead", target)
        await eventually(lambda: _count(billing), 1)
        await bus.quiet(billing)
        (letter,) = await anyio.to_thread.run_sync(_read, billing)
        assert (letter.event, letter.source, letter.handler) == ("order.placed", "shop", "charge")
        assert (letter.id, letter.queue, letter.attempt) == (receipt.id, "billing.main", 3)
        assert letter.error == "UnverifiedOrigin"
        assert "was moved" in letter.error_message
        assert "ValueError: a bug" in letter.error_message
        assert not letter.proven
        assert handled == []

        outcome = actions.Outcome()
        await anyio.to_thread.run_sync(_retry, billing, outcome, False)
        assert (outcome.done, outcome.unproven) == (0, 1)
        await anyio.to_thread.run_sync(_retry, billing, outcome, True)
        await eventually(lambda: handled, [(receipt.id, "order.placed", "shop", 7)])
        assert bystander == ["order.placed"]


async def test_a_dead_letter_that_was_moved_away_and_back_is_still_the_event_that_it_was(
    shop: Lightbus, billing: Lightbus
) -> None:
    @billing.on("order.placed")
    async def charge(order: OrderPlaced) -> None:
        raise Reject("a bug")

    async with running(shop, billing):
        receipt = await shop.publish(OrderPlaced(number=7))
        await eventually(lambda: _count(billing), 1)
        await anyio.to_thread.run_sync(_move, billing, "billing.dead", "billing.dead")
        (letter,) = await anyio.to_thread.run_sync(_read, billing)
    assert (letter.id, letter.event, letter.source, letter.handler) == (receipt.id, "order.placed", "shop", "charge")
    assert (letter.error, letter.error_message) == ("Reject", "a bug")
    assert not letter.proven


@pytest.mark.impossible_on_artemis("the broker does not record in the message where it was dead-lettered")
async def test_a_letter_of_the_broker_s_that_was_moved_by_hand_keeps_its_name_too(
    shop: Lightbus, billing: Lightbus
) -> None:
    """It has no header of ours, but the broker's record of where it was."""
    death = {"queue": "billing.main", "reason": "delivery_limit", "count": 1, "exchange": "shop"}
    properties = {"message_id": "m-1", "headers": {"x-death": [{**death, "routing-keys": ["order.placed"]}]}}
    handled: list[str] = []
    billing.on("order.placed")(lambda order: handled.append(order))

    def publish(channel: Any) -> None:
        channel.publish([Publication("", "billing.main", b"{}", properties, mandatory=False)])
        channel.exchange_declare("billing", "topic", passive=True)

    async with running(shop, billing), stranger(billing) as channel:
        await anyio.to_thread.run_sync(publish, channel)
        await eventually(lambda: _count(billing), 1)
        (letter,) = await anyio.to_thread.run_sync(_read, billing)
        assert (letter.id, letter.event, letter.source, letter.proven) == ("m-1", "order.placed", "shop", False)
        assert handled == []
        await anyio.to_thread.run_sync(_retry, billing, actions.Outcome(), True)
        await eventually(lambda: handled, [{}])


async def test_headers_of_a_copy_that_came_past_the_exchanges_count_for_nothing(
    shop: Lightbus, billing: Lightbus
) -> None:
    handled: list[str] = []

    @billing.on("order.placed", source="bank")
    async def pay(message: Message) -> None:
        handled.append(message.source)

    def publish(channel: Any) -> None:
        forged = {"lightbus-source": "bank", "lightbus-routing-key": "order.placed", "lightbus-handler": "pay"}
        for queue in ("billing.main", "billing.retry.50ms", "billing.retry.100ms"):
            channel.publish([Publication("", queue, b"{}", {"headers": forged}, mandatory=False)])
        channel.exchange_declare("billing", "topic", passive=True)

    async with running(shop, billing) as bus, stranger(billing) as channel:
        await anyio.to_thread.run_sync(publish, channel)
        dead = await dead_letters(billing, 3)
        await bus.quiet(billing)
    assert all("UnverifiedOrigin" in reason(letter) for letter in dead)
    assert handled == []


async def test_what_nobody_published_to_an_exchange_has_no_source(billing: Lightbus) -> None:
    async with running(billing), stranger(billing) as channel:
        publication = Publication("", "billing.main", b"{}", {"message_id": "m"}, mandatory=False)
        with contextlib.suppress(TimeoutError):
            await anyio.to_thread.run_sync(channel.publish, [publication])
        await eventually(lambda: _count(billing), 1)
        (letter,) = await anyio.to_thread.run_sync(_read, billing)
    assert (letter.event, letter.source) == ("billing.main", "")


@pytest.mark.impossible_on_artemis("a queue cannot dead-letter to an exchange")
async def test_what_a_queue_dead_letters_to_the_bus_is_not_handled_and_can_be_retried(
    shop: Lightbus, billing: Lightbus
) -> None:
    """Nobody can publish to the bus: which app such an event is from, nothing proves."""
    handled: list[tuple[str, str]] = []

    @billing.on("order.placed", source="shop", queue="shops")
    async def charge(message: Message) -> None:
        raise AssertionError("it is not from shop")

    @billing.on("order.placed")
    async def note(message: Message) -> None:
        handled.append((message.source, message.event))

    def publish(channel: Any) -> None:
        arguments = {"x-dead-letter-exchange": "lightbus", "x-dead-letter-routing-key": "order.placed"}
        channel.queue_declare(
            "shop.trick", durable=True, auto_delete=False, arguments={**arguments, "x-message-ttl": 1}
        )
        channel.queue_bind("shop.trick", "shop", "trick")
        forged = {"lightbus-source": "shop", "lightbus-routing-key": "order.placed", "lightbus-handler": "charge"}
        publish_plainly(channel, "shop", "trick", b"{}", {"headers": forged, "message_id": "m-1"})

    async with running(shop, billing) as bus, stranger(billing) as channel:
        await anyio.to_thread.run_sync(publish, channel)
        await eventually(lambda: _count(billing), 1)
        await bus.quiet(billing)
        assert handled == []
        (letter,) = await anyio.to_thread.run_sync(_read, billing)
        assert (letter.id, letter.event, letter.source, letter.handler) == ("m-1", "order.placed", "", None)
        assert (letter.error, letter.proven) == ("UnverifiedOrigin", False)
        assert "the queue 'shop.trick' dead-lettered it there" in letter.error_message
        outcome = actions.Outcome()
        await anyio.to_thread.run_sync(_retry, billing, outcome, False)
        assert (outcome.done, outcome.unproven) == (0, 1)
        await anyio.to_thread.run_sync(_retry, billing, outcome, True)
        await eventually(lambda: handled, [("", "order.placed")])
