"""The events that billing publishes."""

from decimal import Decimal

import attrs

from billing.bus import app


@app.event  # published as "invoice.sent"
@attrs.frozen
class InvoiceSent:
    invoice_id: str
    amount: Decimal


@app.event
@attrs.frozen
class InvoicePaid:
    invoice_id: str


@app.event
@attrs.frozen
class InvoiceCancelled:
    invoice_id: str
