"""The events of the shop, and their handlers. Start the worker: lightbus worker shop.bus:bus"""

from uuid import UUID

import attrs

from lightbus import Lightbus

bus = Lightbus("shop", publish_timeout=3)  # seconds: an HTTP client waits for the publish


@bus.event  # published as "order.placed"
@attrs.frozen
class OrderPlaced:
    order_id: UUID
    email: str


@bus.on(OrderPlaced)
async def confirm_by_mail(order: OrderPlaced) -> None:
    print(f"A mail to {order.email}: we have your order {order.order_id}.", flush=True)
