"""Lightbus, with its default settings: confirmed, durable, validated on both sides, acked after the handler."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Annotated, Any

import anyio

from benchmarks import payload
from benchmarks.around import Block, Span
from benchmarks.plan import Plan, Session, handler, open_session
from lightbus import Lightbus, Message, Next, Reject
from lightbus.telemetry import processes


class Order:
    order_id: str
    customer_id: int
    email: str
    total: float
    currency: str
    items: list[str]
    paid: bool


class Commit:
    repository: str
    sha: str
    committed_at: datetime.datetime
    files: int
    insertions: int
    deletions: int


class Blob:
    number: int
    data: str


SHAPES = {"order": Order, "commit": Commit, "blob": Blob}

_classes: list[type[Any]] = []


def event_name(plan: Plan, index: int) -> str:
    """An event name that no other row subscribes to: all apps of a virtual host share a bus."""
    return f"{plan.event_name(index)}.{plan.name}"


def new_app(plan: Plan, name: str) -> Lightbus:
    options: dict[str, Any] = {"url": plan.url, "queue_type": plan.queue_type}
    if plan.prefetch is not None:
        options["prefetch"] = plan.prefetch
    if plan.concurrency is not None:
        options["concurrency"] = plan.concurrency
    app = Lightbus(name, **options)
    shape = SHAPES[plan.kind]
    _classes[:] = []
    for index in range(plan.handlers):
        copy = type(f"{shape.__name__}{index}", (), {"__annotations__": shape.__annotations__, "__module__": __name__})
        _classes.append(app.event(event_name(plan, index))(copy))
    return app


def consuming_app(plan: Plan, name: str, meter: Callable[[int], None]) -> Lightbus:
    app = new_app(plan, name)
    if plan.around == "middleware":
        app.middleware(empty)
    if plan.around == "metrics":
        from lightbus.telemetry.prometheus import Metrics  # an app without metrics does not import it

        Metrics(app)
    if plan.around == "traces":
        _trace(app)
    session = _session() if plan.around == "depends" else None
    for index in range(plan.handlers):
        cls = _classes[0 if plan.one_class else index]
        function = rejecting(meter, cls) if plan.handler == "reject" else handler(plan, meter, cls, session)
        app.on(event_name(plan, index), name=f"handle_{index}")(function)
    return app


async def empty(message: Message, call_next: Next) -> None:
    await call_next()


def _trace(app: Lightbus) -> None:
    from benchmarks import spans  # an app without telemetry does not import it
    from lightbus.telemetry.opentelemetry import LightbusInstrumentor

    LightbusInstrumentor().instrument_app(app, tracer_provider=spans.provider())


def _session() -> Any:
    from lightbus import Depends  # an app without dependencies does not import it

    return Annotated[Session, Depends(open_session)]


def rejecting(meter: Callable[[int], None], cls: type[Any]) -> Callable[..., Any]:
    async def handle(event):  # type: ignore[no-untyped-def]
        meter(event.customer_id)
        raise Reject("for the benchmark")

    handle.__annotations__["event"] = cls
    return handle


@contextlib.asynccontextmanager
async def consuming(plan: Plan, meter: Callable[[int], None]) -> AsyncIterator[None]:
    apps = [consuming_app(plan, name, meter) for name in plan.names()]
    async with contextlib.AsyncExitStack() as stack:
        consumers = [app.consumer() for app in apps]
        for app in apps:
            await stack.enter_async_context(app)
        async with anyio.create_task_group() as tasks:
            for consumer in consumers:
                await tasks.start(consumer.run)
            yield
            for consumer in consumers:
                await consumer.stop(5)


@contextlib.asynccontextmanager
async def around(plan: Plan, span: Span) -> AsyncIterator[Block]:
    if plan.multiprocess and processes.VARIABLE not in os.environ:
        os.environ[processes.VARIABLE] = tempfile.mkdtemp(prefix="lightbus-bench-")
        processes.Membership(1)
    app = consuming_app(dataclasses.replace(plan, url=f"memory://{plan.name}"), plan.name, span)
    event = make(plan, payload.FIRST, 0)

    async def block() -> None:
        """The events wait in the queue before they are consumed."""
        await app.publish_many([event] * (plan.warm + plan.count))
        async with anyio.create_task_group() as tasks:
            consumer = app.consumer()
            await tasks.start(consumer.run)
            await span.finished.wait()
            await consumer.stop(5)

    async with app:
        async with anyio.create_task_group() as tasks:  # declares the queue
            consumer = app.consumer()
            await tasks.start(consumer.run)
            await consumer.stop(5)
        yield block
    if plan.multiprocess:
        shutil.rmtree(os.environ[processes.VARIABLE], ignore_errors=True)


def make(plan: Plan, number: int, index: int) -> Any:
    fields = payload.make(plan.kind, number, plan.size)
    if plan.kind == "commit":
        fields = {**fields, "committed_at": datetime.datetime.fromisoformat(fields["committed_at"])}
    return _classes[index % len(_classes)](**fields)


@contextlib.asynccontextmanager
async def publishing(plan: Plan, *, declare: bool) -> AsyncIterator[Any]:
    if declare:  # a worker does
        async with consuming(plan, lambda number: None):
            pass
    app = new_app(plan, plan.name if plan.apps == 1 else f"{plan.name}-source")
    async with app:
        yield app.publish


async def send_many(publish: Any, events: list[Any]) -> None:
    await publish.__self__.publish_many(events)


@contextlib.contextmanager
def publishing_sync(plan: Plan, *, declare: bool) -> Iterator[Any]:
    app = new_app(plan, plan.name)
    with app:
        yield app.publish_sync
