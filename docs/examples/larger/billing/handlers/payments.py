"""What billing does about payments."""

import attrs

from billing import invoices
from billing.bus import app
from billing.events import InvoicePaid
from lightbus import Reject


@attrs.frozen
class Payment:
    invoice_id: str


@app.on("payment.received", source="bank")
async def settle_invoice(payment: Payment) -> None:
    invoice = invoices.find(payment.invoice_id)
    if invoice is None:
        raise Reject(f"no invoice {payment.invoice_id}")
    invoice.paid = True
    await app.publish(InvoicePaid(invoice_id=invoice.id))
    print(f"Invoice {invoice.id} paid.", flush=True)
