"""What the shop does about events. Plain functions: Lightbus runs them in threads, where Django's ORM works."""

import functools
from collections.abc import Callable
from typing import Any

from django.db import close_old_connections

from lightbus import Message
from orders.bus import OrderPlaced, bus
from orders.models import Order


def with_database(function: Callable[..., None]) -> Callable[..., None]:
    """Do for a handler what Django does for a request: give back its thread's connections, before and after."""

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
    if changed:  # an event may come twice; the second one changes nothing
        print(f"A mail to {placed.email}: we have your order {placed.order_id}.", flush=True)
