"""`Host`: runs the workers of a TestBus in the test's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import anyio
import anyio.abc

from lightbus import errors
from lightbus.connection.loop_reader import current_loop
from lightbus.testing.messages import hide_lightbus_errors
from lightbus.wire import codec
from lightbus.worker.worker import Worker

__tracebackhide__ = hide_lightbus_errors


class Host:
    """Runs the workers of a TestBus in a separate task.

    A lifespan must end in the task in which it began, and test frameworks enter and leave a fixture in different tasks.
    """

    def __init__(self, workers: Sequence[Worker]) -> None:
        self.workers = workers
        self.handlers = {worker.app.name: set(worker.app.handlers) for worker in workers}
        self.failure: BaseException | None = None
        self._ended = threading.Event()

    async def start(self) -> None:
        """
        Raises:
            BaseException: whatever a lifespan raised at its start.
        """
        self._schedule = current_loop().soon_from_thread
        self._started, self._stop = anyio.Event(), anyio.Event()
        self._task = _spawn(self._run)  # kept: asyncio has only weak references to its tasks
        await self._started.wait()
        self.check()

    async def end(self, limit: float) -> None:
        """Stop the workers. From any event loop: the one that they ran in may have ended already.

        Raises:
            errors.TestBusError: they did not end within `limit` seconds.
            BaseException: whatever a lifespan raised at its end.
        """
        deadline = time.monotonic() + limit
        with contextlib.suppress(RuntimeError):
            self._schedule(self._stop.set)
            while not self._ended.is_set():  # another event loop may set it
                if time.monotonic() > deadline:
                    raise errors.TestBusError(
                        f"The workers did not end within {limit:g} s. Does a lifespan hang at its end? Or was the "
                        "TestBus started in an event loop that no longer runs? Exit it where it was entered."
                    )
                await anyio.sleep(0.001)
        self.check()

    def check(self) -> None:
        """
        Raises:
            BaseException: the error that ended the workers, once.
        """
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure

    def running(self) -> list[str]:
        """A line for each running handler."""
        return [
            f"{handler.name} of {worker.app.name}, for {seconds:.1f} s, attempt "
            f"{codec.read_envelope(worker.app.name, delivery).attempt}: "
            f"{codec.read_envelope(worker.app.name, delivery).event} {_clipped(delivery.body)}"
            for worker in self.workers
            for handler, delivery, seconds in worker.consumer.running(time.monotonic())
        ]

    async def _run(self) -> None:
        try:
            async with anyio.create_task_group() as tasks:
                ends: list[tuple[anyio.Event, anyio.Event]] = []
                for worker in self.workers:
                    stop, ended = anyio.Event(), anyio.Event()
                    await tasks.start(self._serve, worker, stop, ended)
                    ends.append((stop, ended))
                self._started.set()
                await self._stop.wait()
                for stop, ended in reversed(ends):
                    stop.set()
                    await ended.wait()
        except Exception as error:  # noqa: BLE001  # `check` raises it
            self.failure = errors.without_groups(error)
        finally:
            self._started.set()
            self._ended.set()

    async def _serve(
        self,
        worker: Worker,
        stop: anyio.Event,
        ended: anyio.Event,
        *,
        task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
    ) -> None:
        try:
            await worker.serve(stop, task_status.started)
        finally:
            ended.set()


def _spawn(function: Callable[[], Coroutine[Any, Any, None]]) -> object:
    """Start a task without a parent. It ends with the event loop at the latest."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        import trio.lowlevel

        return trio.lowlevel.spawn_system_task(function, context=contextvars.copy_context())
    return loop.create_task(function())


def _clipped(body: bytes) -> str:
    text = body[:200].decode(errors="backslashreplace")
    return text if len(body) <= 200 else f"{text} ..."
