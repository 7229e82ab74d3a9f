"""Charges each order. Try it: opentelemetry-instrument lightbus worker billing:app"""

import anyio
import attrs
from opentelemetry import trace

from lightbus import Lightbus, Message, Retry

app = Lightbus("billing", retry=Retry(delays=(0.2, 5, 60)))
tracer = trace.get_tracer("billing")


@app.event
class InvoicePaid:
    order_id: int
    email: str


@attrs.frozen
class Order:
    order_id: int
    email: str


@app.on("order.placed")
async def charge(order: Order, message: Message) -> None:
    trace.get_current_span().set_attribute("shop.order_id", order.order_id)
    with tracer.start_as_current_span("ask the bank"):
        await anyio.sleep(0.1)
        if message.attempt == 1:
            raise ConnectionError("the bank does not answer")
    await app.publish(InvoicePaid(order_id=order.order_id, email=order.email))
