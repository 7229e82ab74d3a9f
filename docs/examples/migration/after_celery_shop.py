"""After, in the shop: it says what happened, and does not know who acts on it."""

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
