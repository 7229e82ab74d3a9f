"""Sentry: a scope for each event, and a report of each failure. Needs SENTRY_DSN. Try it: lightbus worker sentry:app"""

import contextlib
from collections.abc import AsyncGenerator, Generator

import attrs
import sentry_sdk
from sentry_sdk.integrations.logging import ignore_logger

from lightbus import Lightbus, Message, Next, NextSync, Outcome


@contextlib.asynccontextmanager
async def lifespan(app: Lightbus) -> AsyncGenerator[None]:
    sentry_sdk.init()  # reads SENTRY_DSN
    ignore_logger("lightbus")  # else the worker's log line reports each dead letter a second time
    yield
    sentry_sdk.flush(timeout=2)


app = Lightbus("billing", lifespan=lifespan)


@app.middleware
class Scope:
    """What the handler reports itself (`sentry_sdk.capture_message`, `logger.error`) has the tags of its event."""

    async def handle(self, message: Message, call_next: Next) -> None:
        with scope_of(message):
            await call_next()

    def handle_sync(self, message: Message, call_next: NextSync) -> None:
        with scope_of(message):
            call_next()


@contextlib.contextmanager
def scope_of(message: Message) -> Generator[None]:
    with sentry_sdk.isolation_scope() as scope:
        tag(scope, message)
        yield


def tag(scope: sentry_sdk.Scope, message: Message) -> None:
    scope.set_tags({"event": message.event, "event_id": message.id, "correlation_id": message.correlation_id})


@app.observe
def report(outcome: Outcome) -> None:
    """Also timeouts, and events that no handler matches: middleware does not see those as errors."""
    if outcome.kind not in ("retried", "dead", "redelivered") or outcome.error is None:
        return
    with sentry_sdk.new_scope() as scope:
        tag(scope, outcome.message)
        scope.set_tags({"handler": outcome.handler, "attempt": outcome.attempt})
        scope.set_level("error" if outcome.kind == "dead" else "warning")
        sentry_sdk.capture_exception(outcome.error)


@attrs.frozen
class Order:
    order_id: int
    amount: int


@app.on("order.placed")
async def charge(order: Order) -> None:
    if order.amount > 1000:
        sentry_sdk.capture_message("A large order")
    if order.amount <= 0:
        raise ValueError("nothing to pay")


@app.on("order.placed")
def print_label(order: Order) -> None:
    if order.amount > 1000:
        sentry_sdk.capture_message("A large label")
