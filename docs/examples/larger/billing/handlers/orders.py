"""What billing does about orders."""

from decimal import Decimal

import attrs

from billing import invoices
from billing.bus import app
from billing.events import InvoiceCancelled, InvoiceSent


@attrs.frozen
class Order:
    """The fields of the shop's event that billing reads."""

    order_id: str
    amount: Decimal


@app.on("order.placed", source="shop")
async def send_invoice(order: Order) -> None:
    invoice = invoices.create(order.order_id, order.amount)
    await app.publish(InvoiceSent(invoice_id=invoice.id, amount=invoice.amount))
    print(f"Invoice {invoice.id} over {invoice.amount} sent.", flush=True)


@app.on(InvoiceCancelled)
async def forget_invoice(cancelled: InvoiceCancelled) -> None:
    invoices.remove(cancelled.invoice_id)
    print(f"Invoice {cancelled.invoice_id} cancelled.", flush=True)
