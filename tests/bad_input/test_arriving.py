"""Messages of other programs: any of them is handled, or dead-lettered with a reason, and the next event is handled."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import anyio
import anyio.to_thread
import attrs
import pytest

from lightbus import Lightbus, Message, Retry
from lightbus.transport import Channel, Publication
from lightbus.transport.amqp import wire as wire
from lightbus.wire.codec import MAX_BODY_BYTES
from tests.bus import (
    OrderCancelled,
    OrderPlaced,
    dead_letters,
    eventually,
    publish_plainly,
    reason,
    running,
    stranger,
)
from tests.odd import MESSAGE_ID, ODD_PROPERTIES, odd_properties, publish_raw

pytestmark = pytest.mark.anyio

MakeApp = Callable[..., Lightbus]


@attrs.frozen
class Order:
    number: int
    note: str = ""
    ratio: float = 0.0


BAD_BODIES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "malformed": (b'{"number": 1', ("Order", "Input data was truncated")),
    "not-json": (b"number=1", ("Order", "JSON is malformed")),
    "empty": (b"", ("Order", "Input data was truncated")),
    "trailing": (b'{"number": 1} {"number": 2}', ("trailing characters",)),
    "single-quotes": (b"{'number': 1}", ("JSON is malformed",)),
    "yaml": (b"number: 1\n", ("JSON is malformed",)),
    "a-list": (b"[1, 2]", ("Expected `object`, got `array`",)),
    "a-number": (b"7", ("Expected `object`, got `int`",)),
    "null": (b"null", ("Expected `object`, got `null`",)),
    "wrong-type": (b'{"number": "one"}', ("Expected `int`, got `str`", "$.number")),
    "float-for-int": (b'{"number": 1.5}', ("$.number",)),
    "missing-field": (b'{"note": "x"}', ("missing required field `number`",)),
    "field-is-null": (b'{"number": null}', ("Expected `int`, got `null`", "$.number")),
    "nan": (b'{"number": 1, "ratio": NaN}', ("JSON is malformed",)),
    "infinity": (b'{"number": 1, "ratio": -Infinity}', ("JSON is malformed",)),
    "float-out-of-range": (b'{"number": 1, "ratio": 1e999}', ("out of range", "$.ratio")),
    "huge-int": (b'{"number": 1, "ratio": ' + b"9" * 5000 + b"}", ("out of range",)),
    "not-utf-8": (b'{"number": 1, "note": "\xff\xfe"}', ("utf-8",)),
    "utf-16": ('{"number": 1}'.encode("utf-16"), ("malformed",)),
    "latin-1": ('{"number": 1, "note": "Grüße"}'.encode("latin-1"), ("utf-8",)),
    "lone-surrogate": (b'{"number": 1, "note": "\\ud800"}', ("Order",)),
    "nested": (b'{"number": 1, "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", ("recursion",)),
    "nested-and-cut": (b"[" * 100_000, ("Order",)),
    "pickled": (pickle.dumps({"number": 1}), ("JSON is malformed",)),
    "nul-bytes": (b"\0" * 100, ("JSON is malformed",)),
}


async def test_an_unreadable_body_is_dead_lettered_at_once_with_the_reason(shop: Lightbus, billing: Lightbus) -> None:
    received: list[int] = []

    @billing.on("order.placed")
    async def note(order: Order) -> None:
        received.append(order.number)

    def publish_all(channel: Channel) -> None:
        for name, (body, _) in BAD_BODIES.items():
            kind = "application/x-python-serialize" if name == "pickled" else "application/json"
            publish_plainly(channel, "shop", "order.placed", body, {"message_id": name, "content_type": kind})
        publish_plainly(channel, "shop", "order.placed", b'{"number": 5}')

    async with running(shop, billing), stranger(billing) as channel:
        await anyio.to_thread.run_sync(publish_all, channel)
        dead = await dead_letters(billing, len(BAD_BODIES))
        await eventually(lambda: received, [5])
    letters = {letter.properties["message_id"]: letter for letter in dead}
    assert set(letters) == set(BAD_BODIES)
    for name, (body, words) in BAD_BODIES.items():
        letter = letters[name]
        shown = reason(letter)
        assert shown.startswith("lightbus.errors.DecodeError: the body cannot be read as Order: "), name
        assert all(word.lower() in shown.lower() for word in words), (name, shown)
        assert letter.body == body
        headers = letter.properties["headers"]
        assert (headers["lightbus-attempt"], headers["lightbus-handler"]) == (1, "note")
        assert headers["lightbus-routing-key"] == "order.placed"


async def test_a_pickled_body_is_never_unpickled(shop: Lightbus, billing: Lightbus, tmp_path: Any) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (tmp_path.joinpath("exploded").touch, ())

    billing.on("order.placed")(lambda payload: None)
    body = pickle.dumps(Bomb())
    for content_type in ("application/x-python-serialize", "application/x-pickle", "application/x-yaml"):
        async with running(shop, billing), stranger(billing) as channel:
            properties = {"content_type": content_type, "content_encoding": "binary"}
            await anyio.to_thread.run_sync(publish_plainly, channel, "shop", "order.placed", body, properties)
            (dead,) = await dead_letters(billing)
        assert "JSON is malformed" in reason(dead)
    assert not tmp_path.joinpath("exploded").exists()


async def test_deep_nesting_in_a_dict_payload_is_refused(shop: Lightbus, billing: Lightbus) -> None:
    billing.on("order.placed")(lambda anything: None)
    async with running(shop, billing), stranger(billing) as channel:
        body = b'{"x":' * 100_000 + b"1" + b"}" * 100_000
        await anyio.to_thread.run_sync(publish_plainly, channel, "shop", "order.placed", body)
        (dead,) = await dead_letters(billing)
    assert "recursion" in reason(dead)


async def test_a_body_over_the_limit_is_a_dead_letter(shop: Lightbus, billing: Lightbus) -> None:
    billing.on("order.placed")(lambda anything: None)
    body = b'{"note": "' + b"x" * MAX_BODY_BYTES + b'"}'
    async with running(shop, billing), stranger(billing) as channel:
        await anyio.to_thread.run_sync(publish_plainly, channel, "shop", "order.placed", body)
        (dead,) = await dead_letters(billing)
    assert f"the body has {len(body):,} bytes, the limit is {MAX_BODY_BYTES:,}" in reason(dead)
    assert dead.body == body


async def test_a_handler_with_only_the_envelope_accepts_any_body(shop: Lightbus, billing: Lightbus) -> None:
    received: list[bytes] = []

    @billing.on("order.placed")
    async def note(message: Message) -> None:
        received.append(message.body)

    bodies = [body for body, _ in BAD_BODIES.values()]
    async with running(shop, billing), stranger(billing) as channel:
        for body in bodies:
            await anyio.to_thread.run_sync(publish_plainly, channel, "shop", "order.placed", body)
        await eventually(lambda: received, bodies)


async def test_big_numbers_and_unusual_strings_are_handled(shop: Lightbus, billing: Lightbus) -> None:
    received: list[Any] = []
    billing.on("order.placed")(lambda payload: received.append(payload))
    payload = {"number": 2**53 + 1, "long": 2**64 - 1, "note": "\u0000 \U0001f600 \u202e", "": [], "a": {"b": [None]}}
    async with running(shop, billing), stranger(billing) as channel:
        body = json.dumps(payload).encode()
        await anyio.to_thread.run_sync(publish_plainly, channel, "shop", "order.placed", body)
        await eventually(lambda: received, [payload])


# --- properties -------------------------------------------------------------------------------

HOSTILE_HEADERS: dict[str, dict[str, Any]] = {
    "version-text": {"lightbus-version": "two"},
    "version-negative": {"lightbus-version": -5},
    "version-bool": {"lightbus-version": True},
    "version-table": {"lightbus-version": {"a": 1}},
    "causation-int": {"lightbus-causation": 7},
    "causation-list": {"lightbus-causation": ["x"]},
    "attempt-text": {"lightbus-attempt": "many"},
    "attempt-huge": {"lightbus-attempt": 2**62},
    "handler-int": {"lightbus-handler": 3},
    "source-table": {"lightbus-source": {"x": 1}},
    "key-list": {"lightbus-routing-key": [1]},
    "errors": {"lightbus-error-type": 1, "lightbus-error-message": {"x": 1}, "lightbus-error-time": "never"},
    "x-death-odd": {"x-death": "not a list", "x-first-death-queue": 7, "x-delivery-count": "many"},
    "x-death-cycle": {"x-death": [{"queue": "billing.main", "reason": "expired", "count": 3, "exchange": ""}]},
    "traceparent": {"traceparent": 17},
}


async def test_headers_of_wrong_types_fall_back_to_defaults(shop: Lightbus, billing: Lightbus) -> None:
    received: dict[str, list[Message]] = {name: [] for name in HOSTILE_HEADERS}

    @billing.on("order.placed")
    async def fail(message: Message) -> None:
        received[message.id].append(message)
        raise ValueError("no")

    def publish_all(channel: Channel) -> None:
        for name, headers in HOSTILE_HEADERS.items():
            properties = {"message_id": name, "headers": headers}
            publish_plainly(channel, "shop", "order.placed", b"{}", properties)

    async with running(shop, billing), stranger(billing) as channel:
        await anyio.to_thread.run_sync(publish_all, channel)
        dead = await dead_letters(billing, len(HOSTILE_HEADERS))
    for name, messages in received.items():
        assert [message.attempt for message in messages] == [1, 2, 3], name
        for message in messages:
            assert (message.event, message.source, message.version) == ("order.placed", "shop", 1), name
            assert message.causation_id is None, name
            assert not [key for key in message.headers if key.startswith(("lightbus-", "x-"))], name
    assert {letter.properties["message_id"] for letter in dead} == set(HOSTILE_HEADERS)
    for letter in dead:
        assert letter.properties["headers"]["lightbus-handler"] == "fail"
        assert reason(letter) == "ValueError: no"


async def test_a_timestamp_out_of_range_is_now(shop: Lightbus, billing: Lightbus) -> None:
    received: dict[int, list[datetime]] = {0: [], 2**31: [], 2**40: [], 2**63: [], 2**64 - 1: []}

    @billing.on("order.placed")
    async def note(message: Message) -> None:
        received[int(message.id)].append(message.time)
        if message.attempt == 1:
            raise ValueError("once more")

    def publish_all(channel: Channel) -> None:
        for timestamp in received:
            properties = {"timestamp": timestamp, "message_id": str(timestamp)}
            publish_plainly(channel, "shop", "order.placed", b"{}", properties)

    async with running(shop, billing), stranger(billing) as channel:
        await anyio.to_thread.run_sync(publish_all, channel)
        await eventually(lambda: [len(times) for times in received.values()], [2] * len(received))
    for timestamp, times in received.items():
        if timestamp < 2**40:
            assert times == [datetime.fromtimestamp(timestamp, UTC)] * 2
        else:
            assert all(abs(at - datetime.now(UTC)) < timedelta(seconds=60) for at in times)


async def test_empty_properties_are_like_missing_ones(shop: Lightbus, billing: Lightbus) -> None:
    received: list[Message] = []

    @billing.on("order.placed")
    async def note(message: Message) -> None:
        received.append(message)

    async with running(shop, billing), stranger(billing) as channel:
        empty = {"message_id": "", "correlation_id": "", "type": "", "app_id": "", "headers": {}}
        await anyio.to_thread.run_sync(publish_plainly, channel, "shop", "order.placed", b"{}", empty)
        await eventually(lambda: len(received), 1)
    assert received[0].id
    assert received[0].correlation_id == received[0].id


async def test_headers_that_nearly_fill_a_frame_lose_no_event_and_stop_no_worker(
    shop: Lightbus, billing: Lightbus
) -> None:
    """With the error headers, a copy may be larger than the broker accepts. Then it is sent without the traceback."""
    received: list[int] = []

    @billing.on("order.placed")
    async def fail(message: Message) -> None:
        raise ValueError("x" * 2000)

    @billing.on("order.cancelled")
    async def note(payload: dict[str, int]) -> None:
        received.append(payload["number"])

    async with running(shop, billing), stranger(billing) as channel:
        properties = {"message_id": "large", "headers": {"large": "x" * 130_900}}
        await anyio.to_thread.run_sync(publish_plainly, channel, "shop", "order.placed", b'{"n": 1}', properties)
        (dead,) = await dead_letters(billing)
        await anyio.to_thread.run_sync(publish_plainly, channel, "shop", "order.cancelled", b'{"number": 1}')
        await eventually(lambda: received, [1])
    assert dead.body == b'{"n": 1}'
    assert dead.properties["message_id"] == "large"


FRAME_MAX = 131_072
"""The frame size that RabbitMQ and py-amqp negotiate."""


def _filling_a_frame(message_id: str) -> dict[str, Any]:
    """Properties that just fit a header frame. With the headers of a copy, they do not."""
    empty = len(wire.encode_properties({"message_id": message_id, "headers": {"large": ""}}))
    return {"message_id": message_id, "headers": {"large": "x" * (FRAME_MAX - 20 - empty)}}


@pytest.mark.rabbitmq
async def test_headers_that_fill_a_frame_do_not_disturb_the_apps_own_publishes(
    make_rabbitmq_app: MakeApp,
) -> None:
    """A copy of such an event cannot be sent, so the broker dead-letters the event itself."""
    shop, billing = make_rabbitmq_app("shop"), make_rabbitmq_app("billing")
    shop.event(OrderPlaced)
    billing.event(OrderCancelled)
    handled: list[int] = []

    @billing.on("order.placed")
    async def charge(payload: dict[str, Any]) -> None:
        await billing.publish(
            OrderCancelled(number=payload["number"])
        )  # KeyError: the other program's events have no number
        handled.append(payload["number"])

    async with running(shop, billing), stranger(billing) as channel:
        connections = billing.publisher.epoch
        for number in range(20):
            properties = _filling_a_frame(f"large-{number}")
            await anyio.to_thread.run_sync(publish_plainly, channel, "shop", "order.placed", b"{}", properties)
            await shop.publish(OrderPlaced(number=number))
        await eventually(lambda: sorted(handled), list(range(20)))
        letters = await dead_letters(billing, 20)
        assert billing.publisher.epoch == connections
    assert {letter.properties["message_id"] for letter in letters} == {f"large-{number}" for number in range(20)}


@pytest.mark.rabbitmq
async def test_what_the_broker_adds_to_headers_that_fill_a_frame_can_be_read(make_rabbitmq_app: MakeApp) -> None:
    """x-delivery-count when it is redelivered, x-death when it is dead-lettered."""
    shop, billing = make_rabbitmq_app("shop"), make_rabbitmq_app("billing")
    shop.event(OrderPlaced)
    handled: list[Message] = []

    @billing.on("order.placed")
    async def note(message: Message) -> None:
        handled.append(message)
        if message.id == "fails":
            raise ValueError

    async with running(shop, billing):
        pass
    async with stranger(billing) as channel:
        for message_id in ("works", "fails"):
            properties = _filling_a_frame(message_id)
            await anyio.to_thread.run_sync(publish_plainly, channel, "shop", "order.placed", b"{}", properties)

        def take_and_return() -> None:
            assert [channel.get("billing.main") is not None for _ in range(2)] == [True, True]
            channel.basic_nack(2, multiple=True, requeue=True)

        await anyio.to_thread.run_sync(take_and_return)
    async with running(shop, billing):
        await eventually(lambda: {message.id for message in handled}, {"works", "fails"})
        (dead,) = await dead_letters(billing)
    assert all(message.redelivered for message in handled)
    assert "x-death" in dead.properties["headers"]
    assert len(wire.encode_properties(dead.properties)) > FRAME_MAX


async def test_an_event_through_the_default_exchange_is_unmatched_and_not_lost(billing: Lightbus) -> None:
    """Any program that may publish to the default exchange can put a message directly into a queue."""
    received: list[tuple[str, str]] = []

    @billing.on("order.placed", source="shop")
    async def note(message: Message) -> None:
        received.append((message.source, message.event))

    def publish(channel: Channel) -> None:
        channel.publish([Publication("", "billing.main", b"{}", {"message_id": "m"}, mandatory=False)])
        channel.exchange_declare("billing", "topic", passive=True)

    async with running(billing), stranger(billing) as channel:
        await anyio.to_thread.run_sync(publish, channel)
        (dead,) = await dead_letters(billing)
    assert "NoHandler" in reason(dead)
    assert received == []


# --- bytes that only RabbitMQ lets through ----------------------------------------------------


@pytest.mark.rabbitmq
@pytest.mark.parametrize("odd", ODD_PROPERTIES)
async def test_odd_properties_lose_neither_the_event_nor_other_properties(make_rabbitmq_app: MakeApp, odd: str) -> None:
    _, _, headers = ODD_PROPERTIES[odd]
    shop, billing = make_rabbitmq_app("shop"), make_rabbitmq_app("billing", retry=Retry(delays=(0.05,)))
    received: list[Message] = []

    @billing.on("order.placed")
    async def fail(message: Message) -> None:
        received.append(message)
        raise ValueError("no")

    properties = odd_properties(odd)
    async with running(shop, billing):
        await anyio.to_thread.run_sync(publish_raw, billing, b"order.placed", properties, b'{"number": 1}')
        (dead,) = await dead_letters(billing)
    assert [message.attempt for message in received] == [1, 2]
    for message in received:
        assert (message.id, dict(message.headers)) == ("m-1", headers)
        assert (message.event, message.source, message.correlation_id) == ("order.placed", "shop", "m-1")
    assert dead.properties["message_id"] == "m-1"
    kept = {key: value for key, value in dead.properties["headers"].items() if not key.startswith(("lightbus-", "x-"))}
    assert kept == headers
    if odd == "correlation":
        assert dead.properties["correlation_id"] == b"\xff\xfe"
    if odd == "content-type":
        assert dead.properties["content_type"] == b"a/\xf6"


@pytest.mark.rabbitmq
async def test_an_id_that_is_not_utf_8_is_like_a_missing_one(make_rabbitmq_app: MakeApp) -> None:
    shop, billing = make_rabbitmq_app("shop"), make_rabbitmq_app("billing")
    received: list[str] = []

    @billing.on("order.placed")
    async def fail_once(message: Message) -> None:
        received.append(message.id)
        if message.attempt == 1:
            raise ValueError("once more")

    properties = MESSAGE_ID.to_bytes(2) + b"\x02\xff\xfe"
    async with running(shop, billing):
        await anyio.to_thread.run_sync(publish_raw, billing, b"order.placed", properties, b'{"number": 1}')
        await eventually(lambda: len(received), 2)
    assert received[0] == received[1] != ""


@pytest.mark.rabbitmq
async def test_a_routing_key_that_is_not_utf_8_is_retried_and_dead_lettered_like_any_other(
    make_rabbitmq_app: MakeApp,
) -> None:
    shop = make_rabbitmq_app("shop")
    billing = make_rabbitmq_app("billing", retry=Retry(delays=(0.05,)))
    attempts: list[tuple[int, str]] = []

    @billing.on("#")
    async def fail(message: Message) -> None:
        if message.event.startswith("order."):
            attempts.append((message.attempt, message.source))
            raise ValueError("no")

    async with running(shop, billing):
        await anyio.to_thread.run_sync(publish_raw, billing, b"order.\xff", b"\0\0", b'{"number": 1}')
        (dead,) = await dead_letters(billing)
    assert attempts == [(1, "shop"), (2, "shop")]
    assert reason(dead) == "ValueError: no"
    assert dead.properties["headers"]["lightbus-routing-key"] == b"order.\xff"
