"""Tests of billing.py, with pytest-asyncio. Try it: pytest test_billing.py"""

from decimal import Decimal

import pytest
from billing import InvoicePaid, ReminderDue, charge

from lightbus.testing import TestBus

pytestmark = pytest.mark.asyncio
TWO_WEEKS = 14 * 24 * 3600


async def place_order(bus: TestBus, amount: str) -> None:
    await bus.publish("order.placed", {"order_id": "o-1", "amount": amount}, source="shop")
    await bus.drain()


async def test_an_order_is_charged(lightbus_bus: TestBus) -> None:
    await place_order(lightbus_bus, "9.50")
    assert lightbus_bus.published(InvoicePaid) == [InvoicePaid(invoice_id="o-1", amount=Decimal("9.50"))]


async def test_a_reminder_is_due_after_two_weeks(lightbus_bus: TestBus) -> None:
    await place_order(lightbus_bus, "9.50")
    assert lightbus_bus.published(ReminderDue) == [ReminderDue(invoice_id="o-1")]
    assert lightbus_bus.handled(ReminderDue) == []  # it was published with a delay
    await lightbus_bus.advance(TWO_WEEKS)
    assert [one.handler for one in lightbus_bus.handled(ReminderDue)] == ["report"]


async def test_zero_amount_is_rejected(lightbus_bus: TestBus) -> None:
    await place_order(lightbus_bus, "0")
    [dead] = lightbus_bus.dead(charge)
    assert dead.error == "Reject: nothing to pay"
    assert lightbus_bus.published(InvoicePaid) == []
