"""Retry schedules, errors without retries, and time limits. Try it: lightbus worker retries:app"""

import attrs

from lightbus import Lightbus, Message, Reject, Retry

app = Lightbus("billing", retry=Retry(delays=(1, 5, 30, 120, 600)))  # for handlers without their own; the default


@attrs.frozen
class Order:
    order_id: str
    amount: int


class CardDeclined(Exception):
    """A permanent error: a retry does not help."""


# The bank may be down for an hour: seven attempts within two hours. Jitter shortens each delay by up to 20 %.
@app.on("order.placed", retry=Retry(delays=(10, 60, 300, 900, 1800, 3600), never=CardDeclined, jitter=0.2))
async def charge(order: Order) -> None:
    if order.amount <= 0:
        raise Reject(f"nothing to pay for {order.order_id}")


# Retry network errors only. Any other exception, such as a bug, makes the event a dead letter at once.
@app.on("order.placed", retry=Retry(delays=(5, 30), on=OSError), timeout=20)
async def notify_warehouse(order: Order) -> None: ...


# No retries: a text message that arrives late is worse than none.
@app.on("order.placed", retry=Retry.none())
async def send_text_message(order: Order) -> None: ...


@app.on("order.placed")
async def print_label(order: Order, message: Message) -> None:
    if message.attempt == 3:
        print(f"{order.order_id}: the printer may be out of paper", flush=True)
