"""A worker's consuming side: one connection and a runner per queue. `Dispatcher` starts, watches and ends them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import anyio
import anyio.abc
import anyio.to_thread

from lightbus import errors
from lightbus.connection.dial import BrokerAddresses
from lightbus.connection.loop_reader import current_loop
from lightbus.consuming.connection import ConsumerConnection
from lightbus.consuming.consumer import Consumer
from lightbus.consuming.failure import Failures
from lightbus.consuming.runner import QueueRunner
from lightbus.consuming.slots import Late
from lightbus.consuming.subscription import HandlerRun, Subscription, SubscriptionConfig
from lightbus.consuming.tasks import HandlerTasks
from lightbus.consuming.timeouts import Timeouts, copied
from lightbus.handler import Handler
from lightbus.publishing.publisher import Publisher
from lightbus.retry import Retry
from lightbus.transport import Delivery
from lightbus.wire.topology import Topology

if TYPE_CHECKING:
    from lightbus.outcome import Observe


NewRunner = Callable[[str, Consumer, ConsumerConnection, Failures], QueueRunner]


class Dispatcher:
    """Consumes an app's queues and runs its handlers. Belongs to the event loop in which `run` is called."""

    def __init__(
        self,
        *,
        app: str,
        broker: BrokerAddresses,
        subscriptions: Sequence[SubscriptionConfig],
        wanted: Topology,
        publisher: Publisher,
        retry: Retry,
        observe: Observe | None = None,
    ) -> None:
        """
        Args:
            wanted: what is declared on the broker.
            publisher: publishes the copies of failed events.
            retry: the policy for events that no handler matches.
            observe: called with the outcome of each attempt.
        """
        self.app = app
        new_runner: NewRunner = QueueRunner
        if observe is not None:
            from lightbus.consuming.observed import ObservedRunner, Stopwatch

            stopwatch = Stopwatch()
            subscriptions = [stopwatch.around(config) for config in subscriptions]
            new_runner = functools.partial(ObservedRunner, observe=observe, stopwatch=stopwatch)
        self.connection = ConsumerConnection(
            broker, f"lightbus {app} consumer", wanted, [Subscription(config) for config in subscriptions]
        )
        self.subscriptions = subscriptions
        self._failures = Failures(app, publisher, self.connection, retry)
        self.runners = [
            new_runner(app, consumer, self.connection, self._failures) for consumer in self.connection.consumers
        ]
        self._timeouts = Timeouts(self.runners)
        self._failure: errors.LightbusError | None = None

    @property
    def consumers(self) -> list[Consumer]:
        """One for each queue."""
        return self.connection.consumers

    # --- a worker's life

    async def run(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Consume until `stop` has been called. Started (see `TaskGroup.start`) once it is subscribed.

        Raises:
            errors.BrokerError: the first connection failed in a way that another attempt cannot fix.
            errors.WorkerError: nothing arrives though events wait, and connecting again did not help; or a handler has
                cancelled the tasks around its own.
        """
        self._ready = anyio.Event()
        self._drained = anyio.Event()
        try:
            async with anyio.create_task_group() as group:
                self._tasks = tasks = HandlerTasks(self.app, group)
                for runner in self.runners:
                    runner.begin(tasks)
                try:
                    self._timeouts.begin()
                    group.start_soon(self._timeouts.watch, tasks)
                    self.connection.begin(current_loop(), tasks.context, self, self.runners)
                    await self._ready.wait()
                    if self._failure is None:
                        task_status.started()
                        await tasks.ended.wait()
                finally:  # before any handler is cancelled, whatever the reason
                    tasks.let_go()
                    for runner in self.runners:
                        runner.let_go()
                group.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(self.connection.stop, 5.0)
        if self._failure is not None:
            raise self._failure
        if not self._tasks.ended.is_set():
            raise errors.WorkerError(
                f"The worker of {self.app!r} was cancelled from inside, most likely by a handler that cancelled other "
                "tasks. Unacknowledged events will be redelivered."
            )

    async def stop(self, grace: float) -> bool:
        """Take no more, let handlers in flight end for up to `grace` seconds, settle, disconnect.

        Returns whether all of them ended; the others' events are delivered again, to another consumer.
        """
        deadline = anyio.current_time() + grace
        self._tasks.stopping = True
        self.connection.drain()
        with anyio.CancelScope(deadline=min(deadline, anyio.current_time() + 5.0)):
            if self.connection.connection is not None:
                await self._drained.wait()
        for runner in self.runners:
            runner.close()
        all_ended = await self._tasks.wait_until_idle(deadline)
        self._tasks.ended.set()
        return all_ended

    # --- what the connection reports: see `connection.Listener`

    def subscribed(self) -> None:
        self._ready.set()

    def cancelled(self) -> None:
        self._drained.set()

    def give_up(self, error: errors.LightbusError) -> None:
        self._failure = error
        self._ready.set()
        self._tasks.ended.set()

    # --- state, read from any thread

    @property
    def connected(self) -> bool:
        return self.connection.connection is not None and all(
            consumer.consumer_tag for consumer in self.connection.consumers
        )

    @property
    def read_by_loop(self) -> bool:
        """Whether the event loop reads the connection itself now."""
        return self.connection.read_by_loop

    @property
    def connection_state(self) -> tuple[str, str | None]:
        """ "connected", or "disconnected" and why."""
        error = self.connection.error
        if self.connection.connection is not None and error is None:
            return "connected", None
        return "disconnected", None if error is None else str(error)

    @property
    def reading(self) -> bool:
        """Whether the thread lives that owns the connection."""
        return self.connection.alive

    @property
    def beat(self) -> float | None:
        """When the event loop last ran, within the last second unless a handler blocks it (monotonic clock)."""
        return self._timeouts.beat

    @property
    def handled(self) -> int:
        """Deliveries that a handler ended with, successfully or not, since the start."""
        return sum(runner.handled for runner in self.runners)

    @property
    def unkept(self) -> tuple[int, str | None]:
        """How many failed deliveries wait for their copy to be published, after at least one error; the last error."""
        return self._failures.unkept

    @property
    def in_flight(self) -> list[str]:
        """The names of the handlers that are running now."""
        runs = [slot.run for runner in self.runners for slot in copied(runner.slots)]
        return [run[1].name for run in runs if run is not None and run[1] is not None]

    def running_in_loop(self) -> tuple[Subscription, HandlerRun, float] | None:
        """What the event loop is running right now, and for how many seconds so far."""
        return self._timeouts.running()

    def running(self, now: float) -> list[tuple[Handler, Delivery, float]]:
        """The handlers that are running now, on what, and for how many seconds each."""
        runs = [(slot.run, slot.deadline) for runner in self.runners for slot in copied(runner.slots)]
        return [
            (run[1], run[0], max(0.0, now - deadline + run[1].timeout))
            for run, deadline in runs
            if run is not None and run[1] is not None and deadline < math.inf
        ]

    def late(self, runner: QueueRunner) -> tuple[list[Late], list[Late]]:
        """The handlers of a queue that exceeded their timeout: those that hold their room, and those left behind."""
        holding = [slot.late for slot in copied(runner.slots) if slot.late is not None]
        return holding, runner.pool.all_left_behind()
