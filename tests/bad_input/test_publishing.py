"""Invalid arguments of a publish are refused before anything is sent."""

from __future__ import annotations

import math
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any

import attrs
import msgspec
import pytest

from lightbus import Lightbus, Message, Retry, errors
from lightbus.wire.codec import MAX_BODY_BYTES, MAX_HEADERS_BYTES
from tests.bus import OrderPlaced, dead_letters, declare, eventually, left_in, reason, running
from tests.conformance.conftest import declare_orders

pytestmark = pytest.mark.anyio

MakeApp = Callable[..., Lightbus]

NEVER_REACHED = "memory://never-reached"


@pytest.fixture
def unconnected() -> Iterator[Lightbus]:
    """An app that never connects: so nothing was sent."""
    app = declare_orders(Lightbus("unconnected", url=NEVER_REACHED))
    yield app
    assert not any(thread.name == "lightbus unconnected publisher" for thread in threading.enumerate())


@attrs.frozen(kw_only=True)
class Measured:
    value: float = 0.0
    count: int = 0
    text: str = ""
    tags: list[str] = attrs.field(factory=list)
    extra: dict[str, Any] = attrs.field(factory=dict)
    tree: list[Any] = attrs.field(factory=list)


class Opaque:
    pass


def _deep(levels: int) -> list[Any]:
    tree: list[Any] = []
    for _ in range(levels):
        tree = [tree]
    return tree


def _endless() -> list[Any]:
    tree: list[Any] = []
    tree.append(tree)
    return tree


BAD_VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "text-for-float": ({"value": "warm"}, r"Expected `float`, got `str` - at `\$\.value`"),
    "nan": ({"value": math.nan}, r"Expected `float`, got `null` - at `\$\.value`"),
    "infinity": ({"value": math.inf}, r"Expected `float`, got `null` - at `\$\.value`"),
    "float-for-int": ({"count": 1.5}, r"Expected `int`, got `float` - at `\$\.count`"),
    "none": ({"text": None}, r"Expected `str`, got `null` - at `\$\.text`"),
    "bytes-for-list": ({"tags": b"abc"}, r"Expected `array`, got `str` - at `\$\.tags`"),
    "in-a-list": ({"tags": ["good", 7]}, r"Expected `str`, got `int` - at `\$\.tags\[1\]`"),
    "lone-surrogate": ({"text": "\ud800"}, r"surrogates not allowed"),
    "opaque": ({"extra": {"x": Opaque()}}, r"Opaque is unsupported"),
    "key-of-a-dict": ({"extra": {(1, 2): 1}}, r"dict.*keys"),
    "too-deep": ({"tree": _deep(100_000)}, r"recursion"),
    "endless": ({"tree": _endless()}, r"recursion"),
}


@pytest.mark.parametrize("case", BAD_VALUES)
async def test_a_value_that_does_not_fit_is_refused_with_event_field_and_next_step(case: str) -> None:
    values, words = BAD_VALUES[case]
    app = Lightbus("lab", url=NEVER_REACHED)
    app.event(Measured)
    with pytest.raises(errors.InvalidPayload, match=rf"(?s)event 'measured' was not sent: .*{words}") as refused:
        await app.publish(Measured(**values))
    assert "Set the fields of Measured to values of their declared types" in str(refused.value)
    assert not any(thread.name == "lightbus lab publisher" for thread in threading.enumerate())


async def test_integers_of_any_size_and_all_of_unicode_are_sent(make_app: MakeApp) -> None:
    app = make_app("lab")
    app.event(Measured)
    app.on(Measured)(lambda: None)
    await declare(app)
    sent = [Measured(count=count) for count in (2**63, 2**64 - 1, -(2**63))] + [Measured(text="\0\U0001f600\u202e")]
    await app.publish_many(sent)
    assert [msgspec.json.decode(one.body, type=Measured) for one in await left_in(app)] == sent


async def test_a_body_over_the_limit_is_refused_with_both_sizes_and_a_way_out(
    shop: Lightbus, billing: Lightbus
) -> None:
    billing.on("order.placed")(lambda: None)
    await declare(billing)
    event = OrderPlaced(number=1, note="x" * MAX_BODY_BYTES)
    with pytest.raises(
        errors.BodyTooLarge, match=r"event 'order\.placed' was not sent: its body has 16,777,2"
    ) as large:
        await shop.publish(event)
    assert "the limit is 16,777,216" in str(large.value)
    assert "Store the data elsewhere" in str(large.value)
    assert await left_in(billing) == []
    # The largest body, to the byte, is accepted.
    overhead = len(b'{"note":"","number":1}')
    await shop.publish(OrderPlaced(number=1, note="x" * (MAX_BODY_BYTES - overhead)))
    assert [len(delivery.body) for delivery in await left_in(billing)] == [MAX_BODY_BYTES]


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({"tenant": ["a"]}, r"the header 'tenant' is a list\. Headers take str, int"),
        ({"tenant": {"a": 1}}, r"the header 'tenant' is a dict"),
        ({"tenant": b"a"}, r"the header 'tenant' is a bytes"),
        ({"tenant": Opaque()}, r"the header 'tenant' is a Opaque"),
        ({7: "x"}, r"the header 7 is not a string"),
        ({"x" * 256: "x"}, r"not a string of up to 255 bytes"),
        ({"ü" * 128: "x"}, r"not a string of up to 255 bytes"),
        ({"lightbus-source": "bank"}, r"'lightbus-source' begins with 'lightbus-' or 'x-'.*Choose another name"),
        ({"x-death": "x"}, r"'x-death' begins with 'lightbus-' or 'x-'"),
        ({"n": 2**63}, r"the header 'n' does not fit 64 bits"),
        ({"n": -(2**63) - 1}, r"the header 'n' does not fit 64 bits"),
        ({"text": "\ud800"}, r"the header 'text'"),
        ({"\ud800": "text"}, r"the header"),
        ({"score": float("nan")}, r"the header 'score' is nan, which RabbitMQ does not accept"),
        ({"score": -math.inf}, r"the header 'score' is -inf, which RabbitMQ does not accept"),
    ],
)
async def test_a_header_that_amqp_cannot_represent_is_refused_by_name(
    unconnected: Lightbus, headers: dict[Any, Any], words: str
) -> None:
    with pytest.raises(errors.InvalidPayload, match=rf"event 'order\.placed' was not sent: .*{words}"):
        await unconnected.publish(OrderPlaced(number=1), headers=headers)


async def test_headers_that_would_not_fit_a_frame_are_refused_with_their_size(unconnected: Lightbus) -> None:
    words = r"event 'order\.placed' was not sent: its headers have 1,000,005 bytes, the limit is 65,536"
    with pytest.raises(errors.InvalidPayload, match=words) as refused:
        await unconnected.publish(OrderPlaced(number=1), headers={"large": "x" * 1_000_000})
    assert "Put the data into the event" in str(refused.value)


async def test_headers_of_the_limit_are_taken_and_survive_a_dead_letter(shop: Lightbus, billing: Lightbus) -> None:
    @billing.on("order.placed")
    async def fail() -> None:
        raise ValueError("x" * 5000)

    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1), headers={"large": "x" * (MAX_HEADERS_BYTES - len("large"))})
        (dead,) = await dead_letters(billing)
    assert len(dead.properties["headers"]["large"]) == MAX_HEADERS_BYTES - len("large")
    assert reason(dead).startswith("ValueError: xxx")


@pytest.mark.parametrize("thing", ["order.placed", {"number": 1}, None, 7, Opaque(), object, OrderPlaced])
async def test_values_that_are_not_events_are_refused_with_a_hint(unconnected: Lightbus, thing: object) -> None:
    words = (
        r"not declared on app 'unconnected'|is (not an event|a class|only the event's name)\. Publish an instance of"
    )
    with pytest.raises(errors.UnknownEvent, match=words):
        await unconnected.publish(thing)


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf, "5", 3601, True], ids=str)
async def test_an_invalid_timeout_is_refused(unconnected: Lightbus, seconds: float) -> None:
    with pytest.raises(errors.InvalidOption, match=r"timeout.*more than 0 and up to 3,600"):
        await unconnected.publish(OrderPlaced(number=1), timeout=seconds)


async def test_one_bad_event_of_many_stops_all_before_the_first_is_sent(shop: Lightbus, billing: Lightbus) -> None:
    billing.on("order.placed")(lambda: None)
    await declare(billing)
    for bad, error in ((OrderPlaced(number="x"), errors.InvalidPayload), (Opaque(), errors.UnknownEvent)):  # type: ignore[arg-type]
        with pytest.raises(error):
            await shop.publish_many([OrderPlaced(number=1), bad])
    assert await left_in(billing) == []
    assert await shop.publish_many([]) == []


# --- id, correlation id, time -----------------------------------------------------------------


@pytest.mark.parametrize("option", ["id", "correlation_id"])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (7, "it is a int. Pass a string"),
        (b"a", "it is a bytes. Pass a string"),
        (uuid.UUID(int=1), "it is a UUID. Pass a string: {option}=str(...)"),
        ("", "it is empty. Pass a string of 1 to 255 bytes, or leave it out"),
        ("a\nb", "it has characters that cannot be printed. Remove them"),
        ("a\x00", "it has characters that cannot be printed. Remove them"),
        ("\ud800", "it has characters that cannot be printed. Remove them"),
        ("x" * 256, "it has 256 bytes, the limit is 255. Pass a hash of it"),
        ("ü" * 128, "it has 256 bytes, the limit is 255. Pass a hash of it"),
    ],
    ids=lambda value: repr(value)[:12],
)
async def test_an_id_that_cannot_be_sent_is_refused(unconnected: Lightbus, option: str, value: Any, words: str) -> None:
    pattern = f"event 'order.placed' was not sent: {option}=.*" + re.escape(words.format(option=option))
    with pytest.raises(errors.InvalidOption, match=pattern):
        await unconnected.publish(OrderPlaced(number=1), **{option: value})


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (datetime(2026, 5, 4), "it has no timezone. Pass datetime.now(UTC), or value.replace(tzinfo=UTC)"),
        (1_777_000_000, "it is not a datetime. Pass one with a timezone: datetime.now(UTC)"),
        ("2026-05-04T12:00:00Z", "it is not a datetime"),
        (date(2026, 5, 4), "it is not a datetime"),
        (datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC), "use a time from 1970-01-01 to 9999-12-31 in UTC"),
        (datetime(9999, 12, 31, 23, tzinfo=timezone(-timedelta(hours=2))), "use a time from 1970-01-01 to 9999-12-31"),
    ],
    ids=str,
)
async def test_a_time_that_cannot_be_sent_is_refused(unconnected: Lightbus, value: Any, words: str) -> None:
    with pytest.raises(errors.InvalidOption, match=re.escape(words)):
        await unconnected.publish(OrderPlaced(number=1), time=value)


@pytest.mark.parametrize("value", [datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)])
async def test_the_first_and_the_last_time_arrive(shop: Lightbus, billing: Lightbus, value: datetime) -> None:
    received: list[Message] = []

    @billing.on("order.placed")
    async def note(message: Message) -> None:
        received.append(message)

    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1), id="ü" * 127, time=value)
        await eventually(lambda: [(one.id, one.time) for one in received], [("ü" * 127, value)])


async def test_publish_many_takes_no_id_since_each_event_has_its_own(unconnected: Lightbus) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'id'"):
        await unconnected.publish_many([OrderPlaced(number=1)], id="a")  # type: ignore[call-arg]
    with pytest.raises(errors.InvalidOption, match="correlation_id='': it is empty"):
        await unconnected.publish_many([OrderPlaced(number=1)], correlation_id="")


@pytest.mark.parametrize("delay", [timedelta(days=31), timedelta(seconds=-1)], ids=str)
async def test_a_timedelta_out_of_range_is_refused(unconnected: Lightbus, delay: timedelta) -> None:
    with pytest.raises(errors.InvalidOption, match=r"delay=datetime.*: use seconds or a timedelta, more than 0"):
        await unconnected.publish(OrderPlaced(number=1), delay=delay)
    with pytest.raises(errors.InvalidOption, match=r"a publish timeout of datetime.*: use seconds"):
        await unconnected.publish(OrderPlaced(number=1), timeout=delay)
    with pytest.raises(errors.InvalidOption, match=r"Retry: the delay .* is not in the range"):
        Retry(delays=(delay,))
