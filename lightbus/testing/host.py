"""What a test bus runs: the apps' workers and publishers, which note what happens."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any

import anyio
import anyio.abc

from lightbus import errors
from lightbus.app import Lightbus
from lightbus.connection.dial import BrokerAddresses
from lightbus.connection.loop_reader import current_loop
from lightbus.consuming.connection import ConsumerConnection
from lightbus.consuming.consumer import Consumer
from lightbus.consuming.dispatcher import Dispatcher
from lightbus.consuming.failure import Failures
from lightbus.consuming.runner import QueueRunner
from lightbus.consuming.subscription import HandlerRun
from lightbus.consuming.timeouts import copied
from lightbus.handler import Handler
from lightbus.publishing.publisher import PendingPublish, Publisher
from lightbus.testing.records import clipped
from lightbus.transport import Delivery, Publication
from lightbus.wire import codec, topology
from lightbus.worker.worker import Worker

GRACE = 1.0
"""Seconds that handlers get to end when the TestBus does. What was not drained is thrown away."""


class NotedPublisher(Publisher):
    """An app's publisher, whose confirmed events are noted."""

    def __init__(
        self,
        app: str,
        broker: BrokerAddresses,
        note: Callable[[Publication, bool], object],
        *,
        timeout: float,
        queue_type: topology.QueueType,
    ) -> None:
        self._note = note
        super().__init__(app, broker, timeout=timeout, queue_type=queue_type)

    @property
    def busy(self) -> bool:
        return self._busy()

    def _finish(self, pending: PendingPublish) -> None:
        publication = pending.publication
        if pending.error is None and publication.exchange != topology.internal_name(self.app):  # no copy for a retry
            self._note(publication, not pending.returned)
        super()._finish(pending)


class NotedRunner(QueueRunner):
    """Runs a queue's handlers, and notes their ends before the broker knows of them: so `drain`, which asks the broker,
    never returns too early.
    """

    notes: NotedConsumer

    def __init__(self, app: str, consumer: Consumer, connection: ConsumerConnection, failures: Failures) -> None:
        super().__init__(app, consumer, connection, failures)
        self._failed: set[int] = set()

    def settle(self, run: HandlerRun, *, accepted: bool = True) -> None:
        delivery, handler, _ = run
        if handler is not None and id(run) not in self._failed:
            self.notes.handled_by(handler, delivery)
        super().settle(run, accepted=accepted)

    async def handle_failure(self, run: HandlerRun, error: BaseException) -> None:
        delivery, handler, _ = run
        self.notes.failed_by(handler, delivery, error)
        self._failed.add(id(run))
        try:
            await super().handle_failure(run, error)
        finally:
            self._failed.discard(id(run))


class NotedConsumer(Dispatcher):
    """An app's consumer, whose handlers' ends are noted."""

    Runner = NotedRunner
    handled_by: Callable[[Handler, Delivery], object]
    failed_by: Callable[[Handler | None, Delivery, BaseException], object]

    def __init__(self, app: Lightbus) -> None:
        super().__init__(
            app=app.name,
            broker=app.broker,
            subscriptions=app.subscriptions(),
            wanted=app.topology(),
            publisher=app.publisher,
            retry=app.retry,
        )
        for runner in self.runners:
            assert isinstance(runner, NotedRunner)
            runner.notes = self

    def running_now(self) -> list[tuple[Handler, Delivery, float]]:
        """The handlers that run now, on what, and for how many seconds. From any thread."""
        runs = [(slot.run, slot.deadline) for runner in self.runners for slot in copied(runner.slots)]
        now = time.monotonic()
        return [
            (run[1], run[0], max(0.0, now - deadline + run[1].timeout))
            for run, deadline in runs
            if run is not None and run[1] is not None and deadline < math.inf
        ]


class HostedWorker(Worker):
    """An app's worker with a consumer that notes, and without the lifespan where it is not wanted."""

    consumer: NotedConsumer

    def __init__(self, app: Lightbus, lifespan: bool) -> None:
        super().__init__(app, grace=GRACE)
        self.consumer = NotedConsumer(app)
        self._with_lifespan = lifespan

    @contextlib.asynccontextmanager
    async def _lifespan(self) -> AsyncGenerator[None]:
        if not self._with_lifespan:
            yield
        else:
            async with super()._lifespan():
                yield


class Host:
    """The workers of a TestBus, in a task of their own: a lifespan must end in the task in which it began, and test
    frameworks enter and leave a fixture in different ones."""

    def __init__(self, workers: Sequence[HostedWorker]) -> None:
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
        self._task = _spawn(self._run)  # kept, since asyncio itself only knows its tasks weakly
        await self._started.wait()
        self.check()

    async def end(self, limit: float) -> None:
        """From any event loop: the workers' own may have ended already.

        Raises:
            errors.TestBusError: they did not end within `limit` seconds.
            BaseException: whatever a lifespan raised at its end.
        """
        deadline = time.monotonic() + limit
        with contextlib.suppress(RuntimeError):
            self._schedule(self._stop.set)
            while not self._ended.is_set():  # it may be set in another event loop
                if time.monotonic() > deadline:
                    raise errors.TestBusError(
                        f"The workers did not end within {limit:g} s. Does a lifespan hang at its end? Or was the "
                        "TestBus started in an event loop that no longer runs? Exit it where it was entered."
                    )
                await anyio.sleep(0.001)
        self.check()

    def check(self) -> None:
        failure, self.failure = self.failure, None  # it is said once
        if failure is not None:
            raise failure

    def running(self) -> list[str]:
        return [
            f"{handler.name} of {worker.app.name}, for {seconds:.1f} s, attempt "
            f"{codec.read_envelope(worker.app.name, delivery).attempt}: "
            f"{codec.read_envelope(worker.app.name, delivery).event} {clipped(delivery.body)}"
            for worker in self.workers
            for handler, delivery, seconds in worker.consumer.running_now()
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
        except Exception as error:  # noqa: BLE001  # raised by the code that waits for it
            self.failure = _only(error)
        finally:
            self._started.set()
            self._ended.set()

    async def _serve(
        self,
        worker: HostedWorker,
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
    """Start a task that is nobody's child, and ends with the event loop at the latest."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        import trio.lowlevel

        return trio.lowlevel.spawn_system_task(function, context=contextvars.copy_context())
    return loop.create_task(function())


def _only(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


class Deadline:
    """When waiting ends, and what there was before it."""

    def __init__(self, seconds: float, attempts_before: int) -> None:
        self.seconds = seconds
        self.ends = time.monotonic() + seconds
        self.attempts_before = attempts_before
