"""What middleware, dependencies and telemetry add to the CPU of an event, without a server.

The difference is a few microseconds, which is less than what two runs of a worker on a busy machine differ by. So the
same process handles blocks of events in turns, without and with each addition; CPU is that of the thread that runs the
event loop; and the lowest block counts, because other load on the machine only adds.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Awaitable, Callable
from typing import Any

from benchmarks.plan import Plan

WITHOUT, MIDDLEWARE, DEPENDS = "without", "one empty middleware", "one `Depends` on an async generator"
METRICS, TRACES = "Prometheus metrics", "OpenTelemetry spans"
ADDITIONS = {
    "": {WITHOUT: "", MIDDLEWARE: "middleware", DEPENDS: "depends"},
    "metrics": {WITHOUT: "", METRICS: "metrics"},
    "telemetry": {WITHOUT: "", METRICS: "metrics", TRACES: "traces"},
}
"""By `Plan.additions`: what is added, and its `Plan.around`."""
BLOCKS = 100


class Span:
    """The handler calls it. CPU of its thread between the event with number `warm` and the last one."""

    def __init__(self, plan: Plan) -> None:
        self._warm, self._total = plan.warm, plan.warm + plan.count
        self.restart()

    def restart(self) -> None:
        self._number = 0
        self._began = self.seconds = 0.0
        self.finished = asyncio.Event()

    def __call__(self, _: int) -> None:
        self._number += 1
        if self._number == self._warm:
            self._began = time.thread_time()
        elif self._number == self._total:
            self.seconds = time.thread_time() - self._began
            self.finished.set()


Block = Callable[[], Awaitable[object]]
"""Has `warm + count` events handled."""


async def measure(peer: Any, plan: Plan) -> dict[str, dict[str, float]]:
    """What each addition adds to the CPU of an event, in microseconds.

    `peer.around(plan, span)` is an async context manager that gives a `Block`.
    """
    additions = ADDITIONS[plan.additions]
    async with contextlib.AsyncExitStack() as stack:
        turns: list[tuple[str, Span, Block]] = []
        for number, (name, around) in enumerate(additions.items()):
            span = Span(plan)
            one = dataclasses.replace(plan, name=f"{plan.name}-{number}", around=around)
            turns.append((name, span, await stack.enter_async_context(peer.around(one, span))))
        lowest = dict.fromkeys(additions, float("inf"))
        for _ in range(BLOCKS):
            for name, span, block in turns:
                span.restart()
                await block()
                await span.finished.wait()
                lowest[name] = min(lowest[name], span.seconds / plan.count * 1e6)
    return {name: {"added_us": cpu - lowest[WITHOUT]} for name, cpu in lowest.items() if name != WITHOUT}
