"""After: the same service with Lightbus. Try it: lightbus worker after_faststream:app"""

import attrs

from lightbus import Lightbus

app = Lightbus("billing")


@attrs.frozen
class Order:
    order_id: int
    amount: int


@app.event
@attrs.frozen
class OrderCharged:
    order_id: int


@app.on("order.placed")
async def charge(order: Order) -> None:
    await app.publish(OrderCharged(order_id=order.order_id))
