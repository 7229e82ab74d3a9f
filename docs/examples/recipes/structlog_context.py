"""structlog: each line of a handler's log names its event. Try it: lightbus worker structlog_context:app"""

import contextlib
from collections.abc import AsyncGenerator

import attrs
import structlog

from lightbus import Lightbus, Message, Next, NextSync

logger = structlog.get_logger()


@contextlib.asynccontextmanager
async def lifespan(app: Lightbus) -> AsyncGenerator[None]:
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.JSONRenderer(),
        ]
    )
    yield


app = Lightbus("billing", lifespan=lifespan)


def bound(message: Message) -> contextlib.AbstractContextManager[None]:
    # Not `event=`: structlog stores the text of the log line under that name.
    return structlog.contextvars.bound_contextvars(
        event_name=message.event, event_id=message.id, attempt=message.attempt
    )


@app.middleware
class LogContext:
    async def handle(self, message: Message, call_next: Next) -> None:
        with bound(message):
            await call_next()

    def handle_sync(self, message: Message, call_next: NextSync) -> None:
        with bound(message):
            call_next()


@attrs.frozen
class Order:
    order_id: int


@app.on("order.placed")
async def charge(order: Order) -> None:
    logger.info("Charged", order_id=order.order_id)


@app.on("order.placed")
def print_label(order: Order) -> None:  # in a thread
    logger.info("Printed", order_id=order.order_id)
