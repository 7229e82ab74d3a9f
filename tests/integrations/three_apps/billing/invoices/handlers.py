import attrs
import crash
from billing.bus import InvoiceWritten, app, inbox, outbox
from django.db import transaction

from invoices.models import Invoice


@attrs.frozen
class Order:
    """The fields of order.placed that this service reads. It ignores all others."""

    id: str
    cents: int


@app.on("order.placed", inbox=inbox)
def bill(order: Order) -> None:
    invoice = Invoice.objects.create(order=order.id, cents=order.cents)
    outbox.add(InvoiceWritten(id=order.id, number=invoice.number, cents=order.cents))
    crash.once("billing, before the commit")
    transaction.on_commit(lambda: crash.once("billing, after the commit, before the ack"))
