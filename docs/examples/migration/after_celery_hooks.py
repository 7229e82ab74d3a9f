"""After: the same with on_publish, a middleware and an observer. Try it: lightbus worker after_celery_hooks:app"""

from collections import Counter
from contextvars import ContextVar
from typing import Any

import attrs

from lightbus import Lightbus, Message, NextSync, Outcome

app = Lightbus("billing")
current_tenant: ContextVar[str | None] = ContextVar("current_tenant", default=None)
failures: Counter[str | None] = Counter()


@app.on_publish
def add_tenant(event: object, headers: dict[str, Any]) -> None:
    if (tenant := current_tenant.get()) is not None:
        headers.setdefault("tenant", tenant)


@app.middleware
def with_tenant(message: Message, call_next: NextSync) -> None:
    token = current_tenant.set(message.headers.get("tenant"))
    try:
        call_next()
    finally:
        current_tenant.reset(token)


@app.observe
def count_failure(outcome: Outcome) -> None:
    if outcome.kind == "dead":
        failures[outcome.handler] += 1


@attrs.frozen
class Order:
    order_id: int


@app.on("order.placed")
def charge(order: Order) -> None:
    print(f"{current_tenant.get()}: order {order.order_id}")
