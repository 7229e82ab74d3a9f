"""Pydantic models as events and as payloads of handlers, on every broker."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, Literal

import attrs
import pytest
from pydantic import BaseModel, ConfigDict, Field

from lightbus import Lightbus, errors
from tests.bus import dead_letters, eventually, left_in, reason, running

pytestmark = pytest.mark.anyio

MakeApp = Callable[..., Lightbus]


class Line(BaseModel):
    article: str
    price: Decimal


class CardPaid(BaseModel):
    model_config = ConfigDict(frozen=True)

    kind: Literal["card"] = "card"
    order_id: int = Field(alias="orderId")
    lines: list[Line]
    at: datetime


class CashPaid(BaseModel):
    kind: Literal["cash"] = "cash"
    order_id: int = Field(alias="orderId")


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    kind: str
    order_id: int = Field(alias="orderId")


@attrs.frozen
class AttrsPaid:
    orderId: int  # the alias


@pytest.fixture
def shop(make_app: MakeApp) -> Lightbus:
    app = make_app("shop")
    app.event(CardPaid)
    app.event(CashPaid)
    return app


CARD = CardPaid(orderId=7, lines=[Line(article="pen", price=Decimal("1.50"))], at=datetime(2026, 1, 1, tzinfo=UTC))
CASH = CashPaid(orderId=8)


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_a_model_arrives_as_it_was_published(shop: Lightbus, billing: Lightbus) -> None:
    received: list[Any] = []

    @billing.on(CardPaid)
    async def in_the_loop(paid: CardPaid) -> None:
        received.append(paid)

    @billing.on(CardPaid)
    def in_a_thread(paid: CardPaid) -> None:
        received.append(paid)

    async with running(shop, billing):
        await shop.publish(CARD)
        await eventually(lambda: received, [CARD, CARD])
    assert await left_in(billing, "billing.dead") == []


async def test_one_handler_takes_a_union_of_models(shop: Lightbus, billing: Lightbus) -> None:
    received: list[Any] = []

    @billing.on("*.paid")
    async def note(paid: Annotated[CardPaid | CashPaid, Field(discriminator="kind")]) -> None:
        received.append(paid)

    async with running(shop, billing):
        await shop.publish_many([CARD, CASH])
        await eventually(lambda: len(received) == 2)
    assert CARD in received
    assert CASH in received


async def test_classes_of_other_kinds_read_what_a_model_wrote(shop: Lightbus, billing: Lightbus) -> None:
    received: list[Any] = []

    @billing.on("cash.paid")
    async def as_attrs(paid: AttrsPaid) -> None:
        received.append(paid.orderId)

    @billing.on("cash.paid")
    async def as_dict(paid: dict[str, Any]) -> None:
        received.append(paid["orderId"])

    async with running(shop, billing):
        await shop.publish(CASH)
        await eventually(lambda: received, [8, 8])


async def test_a_model_that_does_not_fit_becomes_a_readable_dead_letter(shop: Lightbus, billing: Lightbus) -> None:
    handled: list[Any] = []

    @billing.on("*.paid")
    async def charge(paid: Strict) -> None:
        handled.append(paid)

    async with running(shop, billing):
        await shop.publish(CARD)
        (letter,) = await dead_letters(billing)
    assert reason(letter) == (
        "lightbus.errors.DecodeError: the body cannot be read as Strict: 2 errors (lines, at):\n"
        "  lines: Extra inputs are not permitted\n"
        "  at: Extra inputs are not permitted"
    )
    assert handled == []


async def test_a_handler_gets_the_other_events_although_one_cannot_be_read(shop: Lightbus, billing: Lightbus) -> None:
    received: list[int] = []

    @billing.on("*.paid")
    async def charge(paid: Strict) -> None:
        received.append(paid.order_id)

    async with running(shop, billing):
        await shop.publish_many([CARD, CASH, CARD, CASH])
        await eventually(lambda: received, [8, 8])
        assert len(await dead_letters(billing, 2)) == 2


async def test_an_invalid_instance_is_not_sent(shop: Lightbus, billing: Lightbus) -> None:
    received: list[Any] = []

    @billing.on("*.paid")
    async def note(paid: dict[str, Any]) -> None:
        received.append(paid["orderId"])

    wrong = CashPaid(orderId=1)
    wrong.order_id = "9"  # type: ignore[assignment]
    async with running(shop, billing):
        with pytest.raises(errors.InvalidPayload, match="orderId: Input should be a valid integer"):
            await shop.publish(wrong)
        with pytest.raises(errors.InvalidPayload, match="orderId: Field required"):
            await shop.publish_many([CASH, CashPaid.model_construct()])
        await shop.publish(CASH)
        await eventually(lambda: received, [8])


async def test_inherited_fields_arrive(make_app: MakeApp, billing: Lightbus) -> None:
    shop = make_app("shop")
    received: list[Any] = []

    @shop.event
    class OrderShipped(Tenanted):
        number: int

    @billing.on(OrderShipped)
    async def note(shipped: OrderShipped) -> None:
        received.append(shipped)

    event = OrderShipped(tenant="acme", number=7)  # type: ignore[call-arg]
    async with running(shop, billing):
        await shop.publish(event)
        await eventually(lambda: received, [event])


class Tenanted:
    tenant: str
    region: str = "eu"
