"""What the shop says."""

from uuid import UUID

from django.conf import settings

from lightbus import Lightbus

bus = Lightbus("shop", url=settings.LIGHTBUS_URL, publish_timeout=3)  # seconds: an HTTP client waits for it


@bus.event  # -> "order.placed"
class OrderPlaced:
    order_id: UUID
    email: str


@bus.event  # -> "order.seen"
class OrderSeen:
    order_id: UUID
