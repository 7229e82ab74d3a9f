"""Cooks each order. Try it: lightbus worker kitchen:app"""

import attrs

from lightbus import Lightbus, Message, Retry

app = Lightbus("kitchen", retry=Retry(delays=(1, 2)))  # short delays, for this tutorial

RECIPES = {
    "margherita": "tomato, mozzarella, basil",
    "marinara": "tomato, garlic, oregano",
}


@attrs.frozen
class Order:  # the kitchen's view of the event: only the fields that it needs
    dish: str


@app.on("order.placed")
async def cook(order: Order, message: Message) -> None:
    print(f"{order.dish}: {RECIPES[order.dish]} (attempt {message.attempt})", flush=True)
