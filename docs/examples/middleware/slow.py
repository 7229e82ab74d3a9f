"""A middleware for async handlers: it logs slow ones. Try it: lightbus worker slow:app"""

import logging
import time

import attrs

from lightbus import Lightbus, Message, Next

logger = logging.getLogger(__name__)
app = Lightbus("billing")


@app.middleware
async def log_slow_events(message: Message, call_next: Next) -> None:
    began = time.monotonic()
    try:
        await call_next()  # raises what the handler raises
    finally:
        seconds = time.monotonic() - began
        if seconds > 0.5:
            logger.warning("%s %s took %.1f s", message.event, message.id, seconds)


@attrs.frozen
class Order:
    order_id: int


@app.on("order.placed")
async def charge(order: Order) -> None: ...
