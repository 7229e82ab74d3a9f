"""A tenant header on each publish, and the tenant of the event that is handled. Try it: lightbus worker tenant:app"""

from contextvars import ContextVar
from typing import Any

import attrs

from lightbus import Lightbus, Message, Next, NextSync, Reject

app = Lightbus("billing")
current_tenant: ContextVar[str | None] = ContextVar("current_tenant", default=None)
"""Set by the web framework's middleware for a request, and by `Tenant` for an event."""


@app.on_publish
def add_tenant(event: object, headers: dict[str, Any]) -> None:
    tenant = current_tenant.get()
    if tenant is None and "tenant" not in headers:
        raise RuntimeError(
            f"{type(event).__name__} has no tenant: set current_tenant, or pass headers={{'tenant': ...}}"
        )
    headers.setdefault("tenant", tenant)


def tenant_of(message: Message) -> str:
    tenant = message.headers.get("tenant")
    if not isinstance(tenant, str):
        raise Reject(f"{message.event} from {message.source} has no tenant header")  # a retry would not help
    return tenant


@app.middleware
class Tenant:
    async def handle(self, message: Message, call_next: Next) -> None:
        token = current_tenant.set(tenant_of(message))
        try:
            await call_next()
        finally:
            current_tenant.reset(token)

    def handle_sync(self, message: Message, call_next: NextSync) -> None:
        token = current_tenant.set(tenant_of(message))
        try:
            call_next()
        finally:
            current_tenant.reset(token)


@app.event
@attrs.frozen
class InvoiceSent:
    order_id: int


@app.event
@attrs.frozen
class LabelPrinted:
    order_id: int


@attrs.frozen
class Order:
    order_id: int


@app.on("order.placed")
async def send_invoice(order: Order) -> None:
    await app.publish(InvoiceSent(order_id=order.order_id))  # for the tenant of the order


@app.on("order.placed")
def print_label(order: Order) -> None:
    app.publish_sync(LabelPrinted(order_id=order.order_id))
