"""taskiq-aio-pika: one task per event, arguments parsed by their annotation (pydantic), acked after the task."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from aio_pika import ExchangeType
from pydantic import BaseModel
from taskiq.acks import AcknowledgeType
from taskiq.receiver import Receiver
from taskiq_aio_pika import AioPikaBroker
from taskiq_aio_pika.exchange import Exchange
from taskiq_aio_pika.queue import Queue, QueueType

from benchmarks import payload
from benchmarks.peers.faststream_ import MODELS
from benchmarks.plan import Plan, handler

OWN_PREFETCH = 10


def _broker(plan: Plan) -> AioPikaBroker:
    return AioPikaBroker(
        plan.url,
        qos=plan.prefetch or OWN_PREFETCH,
        exchange=Exchange(name=f"{plan.name}.tasks", type=ExchangeType.TOPIC),
        task_queues=[Queue(name=plan.name, type=QueueType(plan.queue_type))],
        dead_letter_queue=Queue(name=f"{plan.name}.dead"),
    )


@contextlib.asynccontextmanager
async def consuming(plan: Plan, meter: Callable[[int], None]) -> AsyncIterator[None]:
    logging.disable(logging.INFO)
    broker = _broker(plan)
    broker.is_worker_process = True
    broker.task(plan.event_name())(handler(plan, meter, MODELS[plan.kind]))
    await broker.startup()
    # What `taskiq worker` runs in each process: 100 tasks at once.
    receiver = Receiver(
        broker, max_async_tasks=plan.concurrency or 100, ack_type=AcknowledgeType.WHEN_EXECUTED, run_startup=False
    )
    end = asyncio.Event()
    listening = asyncio.ensure_future(receiver.listen(end))
    yield
    end.set()
    await asyncio.wait([listening], timeout=5)
    await asyncio.wait_for(broker.shutdown(), 5)


def make(plan: Plan, number: int, index: int) -> BaseModel:
    return MODELS[plan.kind](**payload.make(plan.kind, number, plan.size))


@contextlib.asynccontextmanager
async def publishing(plan: Plan, *, declare: bool) -> AsyncIterator[Any]:
    broker = _broker(plan)

    async def ignore(event: Any) -> None: ...

    task = broker.task(plan.event_name())(ignore)
    await broker.startup()  # declares
    yield task.kiq
    await broker.shutdown()
