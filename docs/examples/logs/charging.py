"""A handler that logs. Try it: lightbus worker charging:app --json-logs"""

import logging

from lightbus import Lightbus, Retry

app = Lightbus("billing", retry=Retry(delays=(5, 30)))
logger = logging.getLogger("billing")


@app.event
class OrderPlaced:
    order_id: int
    amount: float


@app.on(OrderPlaced)
async def charge(order: OrderPlaced) -> None:
    logger.info("Charging", extra={"order_id": order.order_id})
    if order.amount <= 0:
        raise ValueError("nothing to charge")
