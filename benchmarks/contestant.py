"""One run of one contestant, in a separate process: `python -m benchmarks.contestant PEER PLAN`.

Prints its measurements as lines of JSON on standard output.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from benchmarks import around, payload
from benchmarks.plan import Latencies, Meter, Plan, cpu_seconds

ACK_TIME = 0.5
"""Seconds to wait after the last handler, so that pending acks are sent; not measured."""


def emit(**values: Any) -> None:
    """Print one line of JSON for the suite. Nothing else writes to standard output."""
    _output.write(json.dumps(values) + "\n")
    _output.flush()


def _end_with(parent: int) -> None:
    """Exit when the suite has ended, even if it was killed."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def main() -> None:
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    peer: Any = importlib.import_module(f"benchmarks.peers.{sys.argv[1]}")
    values = json.loads(sys.argv[2])
    values["phases"] = tuple(values.get("phases", ()))
    plan = Plan(**values)
    match plan.role:
        case "seed" | "declare":
            _publish(peer, plan, seed=True)
        case "publish":
            _publish(peer, plan, seed=False)
        case "raw":
            emit(**peer.run(plan))
        case "around":
            emit(parts=asyncio.run(around.measure(peer, plan)))
        case _:
            _consume(peer, plan)
    sys.stderr.flush()
    os._exit(0)  # also ends threads that the contestant left running


# --- consuming --------------------------------------------------------------------------------


def _consume(peer: Any, plan: Plan) -> None:
    meter: Any = Latencies(plan) if plan.role == "latency" else Meter(plan)
    if inspect.isasyncgenfunction(inspect.unwrap(peer.consuming)):
        asyncio.run(_consume_async(peer, plan, meter))
    else:
        _consume_sync(peer, plan, meter)


async def _consume_async(peer: Any, plan: Plan, meter: Any) -> None:
    meter.begin()
    async with peer.consuming(plan, meter):
        if plan.role == "memory":
            await asyncio.sleep(1.0)
            emit(rss_mb=rss_mb())
            await asyncio.to_thread(sys.stdin.readline)
            await asyncio.sleep(1.0)
            emit(rss_mb=rss_mb(), in_hand=len(meter.values))
            os._exit(0)
        if plan.role in ("share", "latency"):
            emit(ready=True)
        if plan.role == "share":
            await asyncio.to_thread(sys.stdin.readline)
        else:
            await meter.until_finished()
        await asyncio.sleep(ACK_TIME)
    _report(plan, meter)


def _consume_sync(peer: Any, plan: Plan, meter: Any) -> None:
    meter.begin()
    with peer.consuming(plan, meter):
        if plan.role == "memory":
            time.sleep(2.0)
            emit(rss_mb=rss_mb())
            sys.stdin.readline()
            time.sleep(1.0)
            emit(rss_mb=rss_mb(), in_hand=len(meter.values))
            os._exit(0)
        if plan.role in ("share", "latency"):
            emit(ready=True)
        if plan.role == "share":
            sys.stdin.readline()
        else:
            meter.finished.wait()
        time.sleep(ACK_TIME)
    _report(plan, meter)


def _report(plan: Plan, meter: Any) -> None:
    if plan.role == "share":
        emit(handled=len(meter.values), stamps=meter.stamps, values=meter.values)
    elif plan.role != "latency":
        emit(**meter.result())


def rss_mb() -> float:
    """Resident memory of this process and its children, in megabytes."""
    total = 0.0
    for pid in [os.getpid(), *_children(os.getpid())]:
        status = Path(f"/proc/{pid}/status").read_text()
        total += float(status.split("VmRSS:")[1].split()[0]) / 1024
    return total


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (thread / "children").read_text().split()):
            found += [child, *_children(child)]
    return found


# --- publishing -------------------------------------------------------------------------------


def _publish(peer: Any, plan: Plan, *, seed: bool) -> None:
    if hasattr(peer, "publishing") and plan.threads == 0:
        asyncio.run(_publish_async(peer, plan, seed=seed))
    else:
        _publish_sync(peer, plan, seed=seed)


def _numbers(plan: Plan, seed: bool) -> list[int]:
    if plan.role == "declare":
        return []
    if seed and plan.kind == "commit":
        return list(range(len(payload.commits())))
    if seed:
        return [payload.SEED] * plan.handlers
    return [payload.FIRST + index for index in range(plan.count)]


async def _publish_async(peer: Any, plan: Plan, *, seed: bool) -> None:
    async with peer.publishing(plan, declare=seed) as send:
        if plan.rate:
            return await _publish_at_rate(peer, plan, send)
        events = [peer.make(plan, number, index) for index, number in enumerate(_numbers(plan, seed))]
        if seed:
            for event in events:
                await send(event)
            return emit(sent=len(events))
        for event in events[: plan.greet]:
            await send(event)
        began, cpu = time.perf_counter(), cpu_seconds()
        begun = time.monotonic()
        if plan.in_flight == 0:
            await peer.send_many(send, events)
        elif plan.in_flight == 1:
            for event in events:
                await send(event)
        else:
            for start in range(0, len(events), plan.in_flight):
                await asyncio.gather(*[send(event) for event in events[start : start + plan.in_flight]])
        ended, cpu = time.perf_counter(), cpu_seconds() - cpu
    return emit(
        events=len(events), wall=ended - began, cpu=cpu, begun=begun, sent=len(events) + len(events[: plan.greet])
    )


async def _publish_at_rate(peer: Any, plan: Plan, send: Callable[[Any], Awaitable[object]]) -> None:
    """Each event has the time at which its publish is called, even if the call is late, for all contestants."""
    await asyncio.sleep(0.2)
    tasks: set[asyncio.Task[object]] = set()
    behind = 0
    began = time.monotonic()
    for index in range(plan.count):
        pause = began + index / plan.rate - time.monotonic()
        if pause > 0:
            await asyncio.sleep(pause)
        elif index % 16 == 0:
            behind += pause < -0.1
            await asyncio.sleep(0)
        while len(tasks) >= plan.in_flight:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        task = asyncio.ensure_future(send(peer.make(plan, time.monotonic_ns(), 0)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    while tasks:
        await asyncio.wait(tasks)
    return emit(sent=plan.count, took=time.monotonic() - began, behind=behind)


def _publish_sync(peer: Any, plan: Plan, *, seed: bool) -> None:
    with peer.publishing_sync(plan, declare=seed) as send:
        if plan.rate:
            began = time.monotonic()
            for index in range(plan.count):
                time.sleep(max(0.0, began + index / plan.rate - time.monotonic()))
                send(peer.make(plan, time.monotonic_ns(), 0))
            return emit(sent=plan.count, took=time.monotonic() - began)
        events = [peer.make(plan, number, index) for index, number in enumerate(_numbers(plan, seed))]
        if seed:
            for event in events:
                send(event)
            return emit(sent=len(events))
        count = max(1, plan.threads)
        gate = threading.Barrier(count + 1)

        def work(share: list[Any]) -> None:
            send(share[0])  # connects, if each thread has its own connection
            gate.wait()
            for event in share:
                send(event)

        threads = [threading.Thread(target=work, args=(events[index::count],)) for index in range(count)]
        for thread in threads:
            thread.start()
        gate.wait()
        began, cpu = time.perf_counter(), cpu_seconds()
        for thread in threads:
            thread.join()
        ended, cpu = time.perf_counter(), cpu_seconds() - cpu
    return emit(events=len(events), wall=ended - began, cpu=cpu, sent=len(events) + count)


if __name__ == "__main__":
    _output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of the contestant goes to the log
    sys.modules["benchmarks.contestant"] = sys.modules["__main__"]
    main()
