"""Bare aio-pika, as its documentation shows it: json.loads and json.dumps, no types; confirms on."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import aio_pika

from benchmarks import payload
from benchmarks.plan import Plan, handler

OWN_PREFETCH = 100
"""The prefetch of the first example in its documentation."""


@contextlib.asynccontextmanager
async def consuming(plan: Plan, meter: Callable[[int], None]) -> AsyncIterator[None]:
    handle = handler(plan, meter, dict)

    async def on_message(message: aio_pika.abc.AbstractIncomingMessage) -> None:
        async with message.process():
            await handle(json.loads(message.body))

    connection = await aio_pika.connect_robust(plan.url)
    channel = await connection.channel()
    await channel.set_qos(prefetch_count=plan.prefetch or OWN_PREFETCH)
    queue = await _declare(channel, plan)
    tag = await queue.consume(on_message)
    yield
    await queue.cancel(tag)
    await connection.close()


async def _declare(channel: aio_pika.abc.AbstractChannel, plan: Plan) -> aio_pika.abc.AbstractQueue:
    return await channel.declare_queue(plan.name, durable=True, arguments={"x-queue-type": plan.queue_type})


def make(plan: Plan, number: int, index: int) -> Any:
    return payload.make(plan.kind, number, plan.size)


@contextlib.asynccontextmanager
async def publishing(plan: Plan, *, declare: bool) -> AsyncIterator[Any]:
    connection = await aio_pika.connect_robust(plan.url)
    channel = await connection.channel()
    if declare:
        await _declare(channel, plan)

    async def send(event: Any) -> None:
        message = aio_pika.Message(
            json.dumps(event).encode(),
            content_type="application/json",
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        )
        await channel.default_exchange.publish(message, routing_key=plan.name)

    yield send
    await connection.close()
