"""Tests of billing/handlers/payments.py."""

from decimal import Decimal

from billing import invoices
from billing.events import InvoicePaid
from billing.handlers.payments import settle_invoice

from lightbus.testing import TestBus


def test_a_payment_settles_its_invoice(lightbus_bus: TestBus) -> None:
    invoice = invoices.create("o-3", Decimal("9.50"))
    lightbus_bus.publish_sync("payment.received", {"invoice_id": "o-3"}, source="bank")
    lightbus_bus.drain_sync()
    assert invoice.paid
    assert lightbus_bus.published(InvoicePaid) == [InvoicePaid(invoice_id="o-3")]


def test_a_payment_without_an_invoice_is_a_dead_letter(lightbus_bus: TestBus) -> None:
    lightbus_bus.publish_sync("payment.received", {"invoice_id": "unknown"}, source="bank")
    lightbus_bus.drain_sync()
    [dead] = lightbus_bus.dead(settle_invoice)
    assert dead.error == "Reject: no invoice unknown"
