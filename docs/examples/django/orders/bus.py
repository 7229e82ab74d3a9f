"""The events of the shop."""

from uuid import UUID

import attrs
from django.conf import settings

from lightbus import Lightbus

bus = Lightbus(
    "shop",
    url=settings.LIGHTBUS_URL,
    publish_timeout=3,  # seconds: an HTTP client waits for the publish
    include=["orders.handlers"],  # imported by the worker
)


@bus.event  # published as "order.placed"
@attrs.frozen
class OrderPlaced:
    order_id: UUID
    email: str


@bus.event  # published as "order.seen"
@attrs.frozen
class OrderSeen:
    order_id: UUID
