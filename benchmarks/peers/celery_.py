"""Celery: one task per event, acked late, confirms on, no results, no gossip; the pools `solo` and `threads`."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

from celery import Celery
from celery.worker import WorkController, state
from kombu import Queue

from benchmarks import payload
from benchmarks.plan import Plan, handler

POOL = "solo"


def new_app(plan: Plan) -> Celery:
    app = Celery("bench", broker=plan.url, set_as_current=True)
    concurrency = plan.concurrency or 1
    app.conf.update(
        task_acks_late=True,
        task_ignore_result=True,
        task_default_queue=plan.name,
        task_queues=[Queue(plan.name, durable=True, queue_arguments={"x-queue-type": plan.queue_type})],
        broker_transport_options={"confirm_publish": True},
        # Celery's prefetch is a multiple of the pool's size, 4 by default.
        worker_prefetch_multiplier=4 if plan.prefetch is None else max(1, plan.prefetch // concurrency),
        worker_concurrency=concurrency,
    )
    return app


@contextlib.contextmanager
def consuming(plan: Plan, meter: Callable[[int], None]) -> Iterator[None]:
    app = new_app(plan)
    app.task(handler(plan, meter, dict), name=plan.event_name())
    logging.disable(logging.INFO)
    started = threading.Event()

    class Worker(WorkController):  # type: ignore[misc]
        def on_consumer_ready(self, consumer: Any) -> None:
            started.set()

    # `app` is what `celery -A app worker` would run, without its signal handlers: the main thread is used here.
    pool = "solo" if plan.concurrency is None else "threads"
    worker = Worker(
        app=app,
        pool_cls=pool,
        concurrency=plan.concurrency or 1,
        loglevel="WARNING",
        without_gossip=True,
        without_mingle=True,
        ready_callback=None,
    )
    thread = threading.Thread(target=worker.start, daemon=True)
    thread.start()
    if not started.wait(30):
        raise TimeoutError("the Celery worker was not ready within 30 s")
    yield
    state.should_stop = 0
    thread.join(10)  # stopping sends the acks of the last tasks


def make(plan: Plan, number: int, index: int) -> Any:
    return payload.make(plan.kind, number, plan.size)


@contextlib.contextmanager
def publishing_sync(plan: Plan, *, declare: bool) -> Iterator[Any]:
    app = new_app(plan)

    def ignore(event: Any) -> None: ...

    task = app.task(ignore, name=plan.event_name())
    if declare:
        with app.connection_for_write() as connection:
            app.amqp.queues[plan.name](connection.default_channel).declare()

    yield lambda event: task.delay(event)
