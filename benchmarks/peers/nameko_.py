"""Nameko: an event handler in green threads (eventlet), confirms on; its queues can only be classic ones."""

from __future__ import annotations

import eventlet

eventlet.monkey_patch()

import contextlib  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from typing import Any  # noqa: E402

from nameko.containers import ServiceContainer  # type: ignore[import-not-found] # noqa: E402
from nameko.events import event_handler  # type: ignore[import-not-found] # noqa: E402
from nameko.standalone.events import event_dispatcher  # type: ignore[import-not-found] # noqa: E402

from benchmarks import payload  # noqa: E402
from benchmarks.plan import Plan, handler  # noqa: E402


def _config(plan: Plan) -> dict[str, Any]:
    return {"AMQP_URI": plan.url, "max_workers": plan.prefetch or 10}


def _container(plan: Plan, meter: Callable[[int], None]) -> ServiceContainer:
    handle = handler(plan, meter, dict)

    class Service:
        name = plan.name

        @event_handler("source", plan.event_name())  # type: ignore[untyped-decorator]
        def handle(self, event: Any) -> None:
            handle(event)

    return ServiceContainer(Service, _config(plan))


def queue_name(plan: Plan) -> str:
    return f"evt-source-{plan.event_name()}--{plan.name}.handle"


@contextlib.contextmanager
def consuming(plan: Plan, meter: Callable[[int], None]) -> Iterator[None]:
    container = _container(plan, meter)
    container.start()
    yield
    container.stop()


def make(plan: Plan, number: int, index: int) -> Any:
    return payload.make(plan.kind, number, plan.size)


@contextlib.contextmanager
def publishing_sync(plan: Plan, *, declare: bool) -> Iterator[Any]:
    if declare:
        with consuming(plan, lambda number: None):
            pass
    dispatch = event_dispatcher(_config(plan))
    yield lambda event: dispatch("source", plan.event_name(), event)
