"""A header on each publish, and a count of what happens. Try it: lightbus worker hooks:app"""

import os
from collections import Counter
from typing import Any

import attrs

from lightbus import Lightbus, Outcome

app = Lightbus("billing")
counts: Counter[tuple[str, str | None]] = Counter()


@app.on_publish
def add_release(event: object, headers: dict[str, Any]) -> None:
    headers.setdefault("release", os.environ.get("RELEASE", "unknown"))


@app.observe
def count(outcome: Outcome) -> None:
    counts[outcome.kind, outcome.handler] += 1


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
