"""A handler is a function; its annotations decide what it gets."""

from __future__ import annotations

import dataclasses
import enum
import functools
import threading
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any, TypedDict

import anyio
import attrs
import msgspec
import pytest

from lightbus import Lightbus, Message
from tests.bus import OrderCancelled, OrderPlaced, dead_letters, eventually, left_in, running

pytestmark = pytest.mark.anyio

MakeApp = Callable[..., Lightbus]


@attrs.frozen
class AttrsOrder:
    number: int


@dataclasses.dataclass
class DataclassOrder:
    number: int


class StructOrder(msgspec.Struct):
    number: int


class TypedDictOrder(TypedDict):
    number: int


class Colour(enum.Enum):
    RED = "red"


@attrs.frozen
class Line:
    name: str
    price: Decimal


class Till:
    """A service object whose methods are handlers."""

    def __init__(self) -> None:
        self.rung: list[int] = []

    async def ring(self, order: AttrsOrder) -> None:
        self.rung.append(order.number)

    def ring_loudly(self, order: AttrsOrder) -> None:
        self.rung.append(order.number * 10)


class Callable_:
    def __init__(self) -> None:
        self.called: list[int] = []

    async def __call__(self, order: AttrsOrder) -> None:
        self.called.append(order.number)


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_async_and_sync_functions_both_handle(shop: Lightbus, billing: Lightbus) -> None:
    received: set[str] = set()
    main = threading.get_ident()

    @billing.on("order.placed")
    async def in_the_loop(order: OrderPlaced) -> None:
        await anyio.lowlevel.checkpoint()
        assert threading.get_ident() == main
        received.add("async")

    @billing.on("order.placed")
    def in_a_thread(order: OrderPlaced) -> None:
        assert threading.get_ident() != main
        received.add("plain")

    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1))
        await eventually(lambda: received, {"async", "plain"})
    assert await left_in(billing, "billing.dead") == []


async def test_a_sync_function_that_blocks_does_not_delay_others(shop: Lightbus, billing: Lightbus) -> None:
    go_on = threading.Event()
    received: list[int] = []

    @billing.on("order.placed")
    def block(order: OrderPlaced) -> None:
        assert go_on.wait(60)

    @billing.on("order.cancelled")
    async def note(order: OrderCancelled) -> None:
        received.append(order.number)

    async with running(shop, billing):
        await shop.publish_many([OrderPlaced(number=n) for n in range(5)])
        await shop.publish(OrderCancelled(number=6))
        await eventually(lambda: received, [6])
        go_on.set()


async def test_methods_partials_and_callable_objects_handle(shop: Lightbus, billing: Lightbus) -> None:
    till, called, partly = Till(), Callable_(), []

    async def note(where: list[int], order: AttrsOrder) -> None:
        where.append(order.number)

    billing.on("order.placed")(till.ring)
    billing.on("order.placed")(till.ring_loudly)
    billing.on("order.placed")(called)
    billing.on("order.placed", name="partial")(functools.partial(note, partly))
    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=4))
        await eventually(lambda: (sorted(till.rung), called.called, partly), ([4, 40], [4], [4]))
    assert {"ring", "ring_loudly", "Callable_", "partial"} < set(billing.handlers)


ANNOTATIONS: dict[str, tuple[Any, Callable[[Any], int]]] = {
    "attrs": (AttrsOrder, lambda payload: payload.number),
    "dataclass": (DataclassOrder, lambda payload: payload.number),
    "struct": (StructOrder, lambda payload: payload.number),
    "typed dict": (TypedDictOrder, lambda payload: payload["number"]),
    "dict": (dict, lambda payload: payload["number"]),
    "dict of types": (dict[str, Any], lambda payload: payload["number"]),
    "mapping": (Mapping[str, Any], lambda payload: payload["number"]),
    "any": (Any, lambda payload: payload["number"]),
    "optional": (AttrsOrder | None, lambda payload: payload.number),
    "annotated": (Annotated[AttrsOrder, "the view of billing"], lambda payload: payload.number),
}


async def test_the_payload_has_the_annotated_type(shop: Lightbus, billing: Lightbus) -> None:
    received: dict[str, Any] = {}

    def handle_as(name: str, annotation: Any) -> None:
        async def note(payload: Any) -> None:
            received[name] = payload

        note.__annotations__["payload"] = annotation
        billing.on("order.placed", name=name)(note)

    for name, (annotation, _) in ANNOTATIONS.items():
        handle_as(name, annotation)
    async with running(shop, billing):
        # `note` is a field that AttrsOrder and the others do not have: it is ignored.
        await shop.publish(OrderPlaced(number=3, note="unknown to the subscriber"))
        await eventually(lambda: received.keys(), ANNOTATIONS.keys())
    assert [number_of(received[name]) for name, (_, number_of) in ANNOTATIONS.items()] == [3] * len(ANNOTATIONS)
    kinds = {name: type(received[name]) for name in ("attrs", "dataclass", "struct", "typed dict", "optional")}
    assert list(kinds.values()) == [AttrsOrder, DataclassOrder, StructOrder, dict, AttrsOrder]


async def test_without_annotation_the_payload_is_a_dict(shop: Lightbus, billing: Lightbus) -> None:
    received: list[Any] = []
    billing.on("order.placed")(lambda anything: received.append(anything))
    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=3, note="Grüße"))
        await eventually(lambda: received, [{"number": 3, "note": "Grüße"}])


async def test_a_handler_may_take_no_parameters_or_the_payload_and_the_message_in_any_order(
    shop: Lightbus, billing: Lightbus
) -> None:
    received: dict[str, Any] = {}

    @billing.on("order.placed")
    async def nothing() -> None:
        received["nothing"] = True

    @billing.on("order.placed")
    async def only_the_message(message: Message) -> None:
        received["message"] = message.event

    @billing.on("order.placed")
    async def message_first(message: Message, order: AttrsOrder, extra: int = 5, *, more: int = 6) -> None:
        received["both"] = (message.event, order.number, extra, more)

    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=3))
        wanted = {"nothing": True, "message": "order.placed", "both": ("order.placed", 3, 5, 6)}
        await eventually(lambda: received, wanted)


async def test_an_event_class_can_replace_its_name(make_app: MakeApp) -> None:
    shop = make_app("shop")
    received: list[Any] = []

    @shop.event("order.shipped", version=3)
    class Shipped:
        number: int

    @shop.on(Shipped)
    async def note(event: Shipped, message: Message) -> None:
        received.append((event, message.event, message.version))

    async with running(shop):
        await shop.publish(Shipped(number=1))
        await eventually(lambda: received, [(Shipped(number=1), "order.shipped", 3)])


async def test_the_message_has_every_field(shop: Lightbus, billing: Lightbus) -> None:
    received: list[Message] = []

    @billing.on("order.placed")
    async def note(message: Message) -> None:
        received.append(message)

    async with running(shop, billing):
        before = datetime.now(UTC).replace(microsecond=0)
        receipt = await shop.publish(OrderPlaced(number=1), headers={"tenant": "acme"})
        await eventually(lambda: received)
    (message,) = received
    assert message == Message(
        id=receipt.id,
        event="order.placed",
        source="shop",
        time=message.time,
        version=1,
        attempt=1,
        correlation_id=receipt.id,
        causation_id=None,
        headers={"tenant": "acme"},
        body=message.body,
        redelivered=False,
    )
    assert msgspec.json.decode(message.body) == {"number": 1, "note": ""}
    assert before <= message.time <= before + timedelta(seconds=30)
    assert message.time.tzinfo is UTC


async def test_a_message_cannot_be_changed(shop: Lightbus, billing: Lightbus) -> None:
    received: list[type[BaseException]] = []

    @billing.on("order.placed")
    async def change(message: Message) -> None:
        try:
            message.attempt = 7  # type: ignore[misc]
        except AttributeError as error:
            received.append(type(error))

    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1))
        await eventually(lambda: received, [attrs.exceptions.FrozenInstanceError])


async def test_rich_types_arrive_unchanged(make_app: MakeApp) -> None:
    app = make_app("shop")

    @app.event
    class BasketFilled:
        id: uuid.UUID
        at: datetime
        after: timedelta
        total: Decimal
        colour: Colour
        lines: list[Line]
        by_name: dict[str, Line | None]
        raw: bytes
        maybe: int | None = None

    received: list[Any] = []

    @app.on("basket.filled")
    async def note(basket: BasketFilled) -> None:
        received.append(basket)

    line = Line("pen", Decimal("1.10"))
    basket = BasketFilled(
        id=uuid.uuid4(),
        at=datetime.now(UTC),
        after=timedelta(seconds=90),
        total=Decimal("1.10"),
        colour=Colour.RED,
        lines=[line],
        by_name={"pen": line, "none": None},
        raw=b"\x00\xff",
    )
    async with running(app):
        await app.publish(basket)
        await eventually(lambda: received, [basket])


async def test_a_payload_that_does_not_match_the_class_is_reported_with_its_field(
    shop: Lightbus, billing: Lightbus
) -> None:
    @attrs.frozen
    class OlderOrder:
        customer: str

    @billing.on("order.placed")
    async def note(order: OlderOrder) -> None:
        raise AssertionError("never called")

    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1))
        (dead,) = await dead_letters(billing)
    headers = dead.properties["headers"]
    assert headers["lightbus-error-type"] == "lightbus.errors.DecodeError"
    assert "OlderOrder" in headers["lightbus-error-message"]
    assert "missing required field `customer`" in headers["lightbus-error-message"]
    assert headers["lightbus-error-traceback"] == ""  # only Lightbus code: the message is sufficient
    assert headers["lightbus-attempt"] == 1
