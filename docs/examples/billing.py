"""Retries, rejects, delays and a separate queue. Try it: lightbus worker billing:app"""

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import attrs

from lightbus import Lightbus, Message, Reject, Retry

app = Lightbus("billing", retry=Retry(delays=(1, 5, 30, 120, 600)))


@app.event  # published as "invoice.paid"
@attrs.frozen
class InvoicePaid:
    invoice_id: str
    amount: Decimal


@app.event("invoice.due", version=2)
@attrs.frozen
class ReminderDue:
    invoice_id: str


@attrs.frozen
class Order:
    order_id: str
    amount: Decimal


@app.on("order.placed", source="shop")  # only events of the app `shop`
async def charge(order: Order) -> None:
    if order.amount <= 0:
        raise Reject("nothing to pay")  # becomes a dead letter at once, with this reason
    # Any other exception is retried after 1, 5, 30, 120 and 600 seconds, then the event becomes a dead letter.
    # Events that are published here carry the correlation id of the event that is being handled.
    await app.publish(InvoicePaid(invoice_id=order.order_id, amount=order.amount))
    # The broker holds this event for 14 days, even if everything restarts in the meantime.
    await app.publish(ReminderDue(invoice_id=order.order_id), delay=timedelta(days=14))


# A separate queue (billing.reports), so that slow work delays nothing else, with its own retries and limits.
@app.on("invoice.*", queue="reports", retry=Retry(delays=(60,), never=ValueError), timeout=300, concurrency=2)
def report(invoice: dict[str, Any], message: Message) -> None:  # a sync function runs in a thread
    age = datetime.now(UTC) - message.time
    print(f"{message.event} {invoice} (attempt {message.attempt}, {age.total_seconds():.0f} s old)", flush=True)
