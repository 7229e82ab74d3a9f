"""Tests of billing/handlers/orders.py. Try it: pytest"""

from decimal import Decimal

from billing import invoices
from billing.cancel import cancel
from billing.events import InvoiceSent

from lightbus.testing import TestBus


def test_an_order_gets_an_invoice(lightbus_bus: TestBus) -> None:
    lightbus_bus.publish_sync("order.placed", {"order_id": "o-1", "amount": "9.50"}, source="shop")
    lightbus_bus.drain_sync()
    assert lightbus_bus.published(InvoiceSent) == [InvoiceSent(invoice_id="o-1", amount=Decimal("9.50"))]


def test_a_cancelled_invoice_is_forgotten(lightbus_bus: TestBus) -> None:
    invoices.create("o-2", Decimal("1"))
    cancel("o-2")
    lightbus_bus.drain_sync()
    assert invoices.find("o-2") is None
