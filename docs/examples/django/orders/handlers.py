"""The handlers of the shop. They are sync functions: Lightbus runs them in threads, where Django's ORM works."""

import functools
from collections.abc import Callable
from typing import Any

from django.db import close_old_connections

from lightbus import Message
from orders.bus import OrderPlaced, bus
from orders.models import Order


def with_database(function: Callable[..., None]) -> Callable[..., None]:
    """Close unusable database connections before and after the handler, as Django does for a request."""

    @functools.wraps(function)
    def run(*arguments: Any) -> None:
        close_old_connections()
        try:
            function(*arguments)
        finally:
            close_old_connections()

    return run


@bus.on(OrderPlaced)
@with_database
def confirm(placed: OrderPlaced, message: Message) -> None:
    changed = Order.objects.filter(id=placed.order_id, confirmed=False).update(confirmed=True)
    if changed:  # a duplicate changes nothing
        print(f"A mail to {placed.email}: we have your order {placed.order_id}.", flush=True)
