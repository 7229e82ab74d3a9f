"""FastStream: a pydantic model on both sides, its default channel (confirms on), ack after the handler."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any

from faststream import BaseMiddleware, Depends
from faststream.rabbit import (
    Channel,
    ExchangeType,
    QueueType,
    RabbitBroker,
    RabbitExchange,
    RabbitQueue,
    TestRabbitBroker,
)
from faststream.rabbit.testing import build_message
from pydantic import BaseModel

from benchmarks import payload
from benchmarks.around import Block, Span
from benchmarks.plan import Plan, Session, handler, open_session

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
"""Of a publisher whose trace is sampled."""


class Order(BaseModel):
    order_id: str
    customer_id: int
    email: str
    total: float
    currency: str
    items: list[str]
    paid: bool


class Commit(BaseModel):
    repository: str
    sha: str
    committed_at: datetime.datetime
    files: int
    insertions: int
    deletions: int


class Blob(BaseModel):
    number: int
    data: str


class Empty(BaseMiddleware):  # type: ignore[misc]
    async def consume_scope(self, call_next: Callable[[Any], Awaitable[Any]], msg: Any) -> Any:
        return await call_next(msg)


MODELS = {"order": Order, "commit": Commit, "blob": Blob}


def _queue(plan: Plan, name: str) -> RabbitQueue:
    key = {"routing_key": plan.event_name()} if plan.apps > 1 else {}
    return RabbitQueue(name, queue_type=QueueType(plan.queue_type), durable=True, **key)  # type: ignore[call-overload,no-any-return]


def _exchange(plan: Plan) -> RabbitExchange | None:
    return RabbitExchange(plan.name, type=ExchangeType.TOPIC, durable=True) if plan.apps > 1 else None


def _broker(plan: Plan) -> RabbitBroker:
    middlewares: list[Any] = [Empty] if plan.around == "middleware" else []
    if plan.around == "metrics":
        from faststream.rabbit.prometheus import RabbitPrometheusMiddleware
        from prometheus_client import CollectorRegistry

        middlewares = [RabbitPrometheusMiddleware(registry=CollectorRegistry(), app_name=plan.name)]
    if plan.around == "traces":
        from faststream.rabbit.opentelemetry import RabbitTelemetryMiddleware

        from benchmarks import spans

        middlewares.append(RabbitTelemetryMiddleware(tracer_provider=spans.provider()))
    channel = Channel(prefetch_count=plan.prefetch)
    return RabbitBroker(plan.url, default_channel=channel, middlewares=middlewares, logger=None)


@contextlib.asynccontextmanager
async def consuming(plan: Plan, meter: Callable[[int], None]) -> AsyncIterator[None]:
    broker = _broker(plan)
    session = Annotated[Session, Depends(open_session)]
    for name in plan.names():
        broker.subscriber(_queue(plan, name), _exchange(plan))(handler(plan, meter, MODELS[plan.kind], session))
    await broker.start()
    yield
    await broker.stop()


@contextlib.asynccontextmanager
async def around(plan: Plan, span: Span) -> AsyncIterator[Block]:
    broker = _broker(plan)
    session = Annotated[Session, Depends(open_session)]
    subscriber = broker.subscriber(plan.name)
    subscriber(handler(plan, span, MODELS[plan.kind], session))
    headers = {"traceparent": TRACEPARENT} if plan.around == "traces" else {}
    message = await build_message(payload.make(plan.kind, payload.FIRST), plan.name, headers=headers)

    async def block() -> None:
        """As aio-pika calls it for each message. The message of their test broker has nothing to ack."""
        for _ in range(plan.warm + plan.count):
            await subscriber.consume(message)

    async with TestRabbitBroker(broker):
        yield block


def make(plan: Plan, number: int, index: int) -> Any:
    return MODELS[plan.kind](**payload.make(plan.kind, number, plan.size))


@contextlib.asynccontextmanager
async def publishing(plan: Plan, *, declare: bool) -> AsyncIterator[Any]:
    if declare:
        async with consuming(plan, lambda number: None):
            pass
    broker = _broker(plan)
    await broker.connect()
    exchange = _exchange(plan)
    if exchange is not None:
        await broker.declare_exchange(exchange)
        yield lambda event: broker.publish(event, exchange=exchange, routing_key=plan.event_name(), persist=True)
    else:
        queue = _queue(plan, plan.name)
        yield lambda event: broker.publish(event, queue, persist=True)
    await broker.stop()
