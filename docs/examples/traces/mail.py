"""Sends receipts. Try it: opentelemetry-instrument lightbus worker mail:app"""

import time

import attrs

from lightbus import Lightbus

app = Lightbus("mail")


@attrs.frozen
class Invoice:
    order_id: int
    email: str


@app.on("invoice.paid")
def send_receipt(invoice: Invoice) -> None:
    time.sleep(0.06)  # as a mail server takes
    print(f"A receipt to {invoice.email} for order {invoice.order_id}.", flush=True)
