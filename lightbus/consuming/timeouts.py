"""Handlers that exceed their timeout: cancelled, left behind if they do not end, and logged."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Collection, Sequence

import anyio
import anyio.lowlevel

from lightbus.consuming.runner import QueueRunner
from lightbus.consuming.slots import Late, TaskSlot, ThreadSlot
from lightbus.consuming.stall import LOG_AGAIN
from lightbus.consuming.subscription import HandlerRun, Subscription
from lightbus.consuming.tasks import HandlerTasks

logger = logging.getLogger("lightbus")

STUCK = 10.0
"""Seconds after its timeout for which an async handler may go on cleaning up before it is left behind."""


class Timeouts:
    """Looks at all slots several times per second, which costs less than a timer per event."""

    def __init__(self, runners: Sequence[QueueRunner]) -> None:
        self._runners = runners
        self.beat: float | None = None
        """When the event loop last ran, within the last second unless a handler blocks it (monotonic clock)."""
        timeouts = [one.timeout for runner in runners for one in runner.subscription.config.handlers.values()]
        self._tick = max(0.02, min(1.0, min(timeouts, default=60.0) / 10))

    def begin(self) -> None:
        """The worker starts."""
        self.beat = time.monotonic()

    def running(self) -> tuple[Subscription, HandlerRun, float] | None:
        """What the event loop is running right now, and for how many seconds so far (0 while it decodes). From another
        thread.
        """
        for runner in self._runners:
            for slot in copied(runner.slots):
                run = slot.run
                if run is None or isinstance(slot, ThreadSlot):
                    continue
                seconds = slot.elapsed()
                if seconds is None or getattr(slot.coroutine, "cr_running", False):
                    return slot.subscription, run, seconds or 0.0
        return None

    async def watch(self, tasks: HandlerTasks) -> None:
        """Runs until it is cancelled."""
        while True:
            await anyio.sleep(self._tick)
            self.beat = now = time.monotonic()
            for runner in self._runners:
                runner.collect()
            for runner in self._runners:
                late = [slot for slot in runner.slots if slot.exceeded(now)]
                if late or runner.pool.left_behind:
                    await self._end(runner, late, now, tasks)

    async def _end(self, runner: QueueRunner, late: list[TaskSlot], now: float, tasks: HandlerTasks) -> None:
        in_the_loop: list[TaskSlot] = []
        for slot in late:
            if isinstance(slot, ThreadSlot):
                slot.cancel(now)
                runner.pool.leave_behind(slot)
            else:
                in_the_loop.append(slot)
        left_behind = [slot for slot in copied(runner.pool.left_behind) if not isinstance(slot, ThreadSlot)]
        await _cancel(in_the_loop + left_behind, now)
        if tasks.stopping:
            return
        for slot in in_the_loop:
            if slot.run is not None and slot.late is not None and now - slot.late.since > STUCK:
                runner.leave_behind(slot)
                _log_stuck(runner, slot, slot.late, now)
        for slot, since in list(runner.pool.left_behind.items()):
            if now - since.since > STUCK:
                _log_stuck(runner, slot, since, now)


async def _cancel(slots: list[TaskSlot], now: float) -> None:
    """Cancel them for one round of the event loop; without a limit, it would do so in each round until they end."""
    cancelled = [slot for slot in slots if slot.cancel(now)]
    if cancelled:
        await anyio.lowlevel.checkpoint()
        for slot in cancelled:
            slot.stop_cancelling()


def _log_stuck(runner: QueueRunner, slot: TaskSlot, late: Late, now: float) -> None:
    if now - late.logged_at < LOG_AGAIN:
        return
    late.logged_at = now
    if not slot.left_behind:
        became = (
            "Its event stays unacknowledged and it still counts towards the worker's concurrency, because "
            f"{runner.pool.limit} handlers of this queue already run past their timeout"
        )
    elif isinstance(slot, ThreadSlot):
        became = "Its event has failed; the thread cannot be stopped"
    else:
        became = "Its event has failed; the handler did not end when it was cancelled"
    logger.error(
        "The %s exceeded its timeout of %g s and is still running %.0f s later. %s. It is at:\n%s",
        late.what,
        late.timeout,
        now - late.since,
        became,
        slot.stack() or "  (unknown)",
        extra=late.extra,
    )


def copied(slots: Collection[TaskSlot]) -> list[TaskSlot]:
    """For another thread than the event loop's."""
    while True:
        with contextlib.suppress(RuntimeError):  # the loop changed it meanwhile: look again
            return list(slots)
