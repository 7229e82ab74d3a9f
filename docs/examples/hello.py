"""Publishes an event and handles it. Try it: lightbus worker hello:app"""

from dataclasses import dataclass

from lightbus import Lightbus

app = Lightbus("hello")


@app.event  # published as "order.placed"
@dataclass
class OrderPlaced:
    order_id: int


@app.on("order.placed")  # in this application, or in any other
async def send_receipt(order: OrderPlaced) -> None:
    print(f"Receipt for order {order.order_id}", flush=True)
