"""What may become of an event, and the options that decide on it. Try it: lightbus worker billing:app"""

from datetime import UTC, datetime, timedelta
from decimal import Decimal

import attrs

from lightbus import Lightbus, Message, Reject, Retry

app = Lightbus("billing", retry=Retry(delays=(1, 5, 30, 120, 600)))


@app.event  # -> "invoice.paid"
class InvoicePaid:
    invoice_id: str
    amount: Decimal


@app.event("invoice.due", version=2)
class ReminderDue:
    invoice_id: str


@attrs.frozen
class Order:
    order_id: str
    amount: Decimal


@app.on("order.placed", source="shop")  # from the app `shop` only
async def charge(order: Order) -> None:
    if order.amount <= 0:
        raise Reject("nothing to pay")  # a dead letter at once, with this reason
    # Any other error is tried again after 1, 5, 30, 120 and 600 seconds, and is a dead letter then.
    # An event published here carries on the correlation id of the one that is being handled.
    await app.publish(InvoicePaid(invoice_id=order.order_id, amount=order.amount))
    # The broker keeps this one until then, whatever restarts in the meantime.
    await app.publish(ReminderDue(invoice_id=order.order_id), delay=timedelta(days=14).total_seconds())


# A queue of its own (billing.reports), so that slow work delays nothing else; a ladder and a limit of its own.
@app.on("invoice.*", queue="reports", retry=Retry(delays=(60,), never=ValueError), timeout=300, concurrency=2)
def report(invoice: dict, message: Message) -> None:  # a plain function runs in a thread
    age = datetime.now(UTC) - message.time
    print(f"{message.event} {invoice} (attempt {message.attempt}, {age.total_seconds():.0f} s old)", flush=True)
