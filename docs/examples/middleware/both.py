"""A middleware for both kinds of handlers, and one for a single handler. Try it: lightbus worker both:app"""

import threading

import attrs

from lightbus import Lightbus, Message, Next, NextSync, current_message

app = Lightbus("billing")


class Counter:
    """Counts the handlers that run at the moment."""

    def __init__(self) -> None:
        self.running = 0
        self.lock = threading.Lock()  # handle_sync runs in many threads

    def add(self, number: int) -> None:
        with self.lock:
            self.running += number

    async def handle(self, message: Message, call_next: Next) -> None:
        self.add(1)
        try:
            await call_next()
        finally:
            self.add(-1)

    def handle_sync(self, message: Message, call_next: NextSync) -> None:
        self.add(1)
        try:
            call_next()
        finally:
            self.add(-1)


counter = app.middleware(Counter())


async def only_from_the_shop(message: Message, call_next: Next) -> None:
    if message.source == "shop":
        await call_next()  # else the event is skipped


@attrs.frozen
class Order:
    order_id: int


@app.on("order.placed", middleware=[only_from_the_shop])
async def charge(order: Order) -> None:
    note("charged", order)


@app.on("order.placed")
def print_label(order: Order) -> None:
    note("printed", order)


notes: list[str] = []


def note(done: str, order: Order) -> None:
    message = current_message()  # None outside of a handler
    by = "by hand" if message is None else f"for {message.source}"
    notes.append(f"order {order.order_id}: {done} {by}")
