"""The handlers of the shop. They are sync functions: Lightbus runs them in threads, where Django's ORM works."""

from lightbus import Message
from orders.bus import OrderPlaced, bus
from orders.middleware import in_transaction
from orders.models import Order

bus.middleware(in_transaction)


@bus.on(OrderPlaced)
def confirm(placed: OrderPlaced, message: Message) -> None:
    changed = Order.objects.filter(id=placed.order_id, confirmed=False).update(confirmed=True)
    if changed:  # a duplicate changes nothing
        print(f"A mail to {placed.email}: we have your order {placed.order_id}.", flush=True)
