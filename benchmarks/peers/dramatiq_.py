"""Dramatiq: one actor per event, its default worker of 8 threads, confirms on; it acks after the actor."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import payload
from benchmarks.plan import Plan, handler


def _new(plan: Plan) -> Any:
    if plan.prefetch is not None:
        os.environ["dramatiq_queue_prefetch"] = str(plan.prefetch)  # noqa: SIM112 - read at import
    import dramatiq
    from dramatiq.brokers.rabbitmq import RabbitmqBroker
    from dramatiq.middleware import AsyncIO

    class BrokerAddresses(RabbitmqBroker):
        def _build_queue_arguments(self, queue_name: str) -> dict[str, Any]:  # the only way to a quorum queue
            arguments: dict[str, Any] = super()._build_queue_arguments(queue_name)
            return {**arguments, "x-queue-type": plan.queue_type}

    broker = BrokerAddresses(url=plan.url, confirm_delivery=True)
    if not plan.handler.endswith("sync"):
        broker.add_middleware(AsyncIO())
    dramatiq.set_broker(broker)
    return dramatiq, broker


def _actor(plan: Plan, dramatiq: Any, function: Callable[..., Any]) -> Any:
    return dramatiq.actor(function, actor_name=plan.event_name(), queue_name=plan.name)


@contextlib.contextmanager
def consuming(plan: Plan, meter: Callable[[int], None]) -> Iterator[None]:
    dramatiq, broker = _new(plan)
    _actor(plan, dramatiq, handler(plan, meter, dict))
    logging.disable(logging.INFO)
    worker = dramatiq.Worker(broker, worker_threads=plan.concurrency or 8)
    worker.start()
    yield
    worker.stop(timeout=5000)


def make(plan: Plan, number: int, index: int) -> Any:
    return payload.make(plan.kind, number, plan.size)


@contextlib.contextmanager
def publishing_sync(plan: Plan, *, declare: bool) -> Iterator[Any]:
    dramatiq, _ = _new(plan)

    def ignore(event: Any) -> None: ...

    yield _actor(plan, dramatiq, ignore).send  # the first send declares the queue
