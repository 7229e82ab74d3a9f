"""After: the same with a middleware and on_publish. Try it: lightbus worker after_faststream_middleware:app"""

from contextvars import ContextVar
from typing import Any

import attrs

from lightbus import Lightbus, Message, Next

app = Lightbus("billing")
current_tenant: ContextVar[str | None] = ContextVar("current_tenant", default=None)


@app.middleware
async def with_tenant(message: Message, call_next: Next) -> None:
    token = current_tenant.set(message.headers.get("tenant"))
    try:
        await call_next()
    finally:
        current_tenant.reset(token)


@app.on_publish
def add_tenant(event: object, headers: dict[str, Any]) -> None:
    if (tenant := current_tenant.get()) is not None:
        headers.setdefault("tenant", tenant)


@app.event
@attrs.frozen
class OrderCharged:
    order_id: int


@attrs.frozen
class Order:
    order_id: int


@app.on("order.placed")
async def charge(order: Order) -> None:
    await app.publish(OrderCharged(order_id=order.order_id))
