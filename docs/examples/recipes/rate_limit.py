"""At most so many runs of a handler per second. Try it: lightbus worker rate_limit:app"""

import threading
import time

import anyio
import attrs

from lightbus import Lightbus, Message, Next, NextSync

app = Lightbus("notifications")


class RateLimit:
    """At most `per_second` runs, evenly spaced, of the handlers that share this object, in each worker process."""

    def __init__(self, per_second: float) -> None:
        self._interval = 1 / per_second
        self._next = 0.0
        self._lock = threading.Lock()

    def _seconds_to_wait(self) -> float:
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._interval
        return turn - now

    async def handle(self, message: Message, call_next: Next) -> None:
        await anyio.sleep(self._seconds_to_wait())
        await call_next()

    def handle_sync(self, message: Message, call_next: NextSync) -> None:
        time.sleep(self._seconds_to_wait())
        call_next()


@attrs.frozen
class Order:
    order_id: int


sent: list[int] = []


# A separate queue: events that wait for their turn delay no other handler. Four runs wait at most 4 / 20 s each.
@app.on("order.placed", queue="texts", concurrency=4, middleware=[RateLimit(per_second=20)])
async def send_text_message(order: Order) -> None:
    sent.append(order.order_id)


@app.on("order.placed", queue="mails", concurrency=4, middleware=[RateLimit(per_second=20)])
def send_mail(order: Order) -> None:
    sent.append(order.order_id)
