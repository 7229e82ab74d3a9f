"""lightbus worker benchmarks.peers.cold.lightbus_:app"""

from lightbus import Lightbus

from .report import NAME, URL, handled

app = Lightbus(NAME, url=URL)


@app.event(f"order.placed.{NAME}")
class Order:
    order_id: str
    customer_id: int
    email: str
    total: float
    currency: str
    items: list[str]
    paid: bool


@app.on(Order)
async def handle(order: Order) -> None:
    handled(order.customer_id)
