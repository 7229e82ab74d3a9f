"""Cooks what was ordered anywhere. Try it: lightbus worker kitchen:app"""

import attrs

from lightbus import Lightbus, Message, Retry

app = Lightbus("kitchen", retry=Retry(delays=(1, 2)))  # short pauses, for this tutorial

RECIPES = {
    "margherita": "tomato, mozzarella, basil",
    "marinara": "tomato, garlic, oregano",
    "calzone": "tomato, ham, mushrooms",
}


@attrs.frozen
class Order:  # what the kitchen needs of an order; it ignores the other fields
    dish: str


@app.on("order.placed")
async def cook(order: Order, message: Message) -> None:
    print(f"{order.dish}: {RECIPES[order.dish]} (attempt {message.attempt})", flush=True)
