"""After, the shop: it publishes an event, and does not depend on the applications that handle it."""

import attrs

from lightbus import Lightbus

app = Lightbus("shop")


@app.event
@attrs.frozen
class OrderPlaced:
    order_id: int
    email: str


def place_order(order_id: int, email: str) -> None:
    app.publish_sync(OrderPlaced(order_id=order_id, email=email))
