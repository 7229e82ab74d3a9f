"""A worker: consumes an app's queues within its lifespan, and stops gracefully.

`serve` is for other programs and tests. `lightbus worker` runs a `Worker` with `lightbus.worker.process`.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator, Sequence

import anyio
import anyio.to_thread

from lightbus import errors
from lightbus.app import Lightbus
from lightbus.worker.loop_watch import BLOCKED_AFTER, LoopWatch

GRACE = 30.0
"""Seconds that running handlers get to finish. Kubernetes waits 30 seconds by default: give it more than the worker."""
LAST_STEPS = 10.0
"""Seconds for what follows the handlers: acks, the end of the lifespan, disconnecting."""


async def serve(
    app: Lightbus,
    *,
    queues: Sequence[str] = (),
    prefetch: int | None = None,
    concurrency: int | None = None,
    grace: float = GRACE,
    blocked_after: float = BLOCKED_AFTER,
    stop: anyio.Event | None = None,
    on_started: Callable[[], object] | None = None,
) -> bool:
    """Consume the app's queues within its lifespan, until `stop` is set or the task is cancelled.

    While the broker does not answer, the worker tries to connect again. If the task is cancelled or the lifespan fails,
    the events of running handlers are redelivered. Set `stop` to let the handlers finish first.

    Args:
        queues: suffixes of the queues to consume ("main" is the app's default queue). Default: all queues.
        prefetch: maximum number of unacknowledged events, for each queue. Default: the app's.
        concurrency: maximum number of concurrent handlers, for each queue. Default: the app's.
        grace: seconds that running handlers get to finish after `stop` is set.
        blocked_after: seconds after which code that blocks the event loop is logged, with its stack; 0: never.
        stop: set it to stop consuming, finish the running handlers, ack, and return.
        on_started: called when all queues are subscribed.

    Returns:
        Whether all handlers finished within `grace`. The events of those that did not are redelivered.

    Raises:
        errors.BrokerError: the broker is not usable, and another attempt would not help.
        errors.WorkerError: the worker receives nothing although events are waiting, and a new connection did not help;
            or a handler has cancelled the worker's task.
        errors.InvalidOption: the app has no such queue, or a number is out of range.
        errors.IncludeError: a module of the app's `include=` cannot be imported.
    """
    worker = Worker(
        app, queues=queues, prefetch=prefetch, concurrency=concurrency, grace=grace, blocked_after=blocked_after
    )
    return await worker.serve(anyio.Event() if stop is None else stop, on_started)


@contextlib.asynccontextmanager
async def lifespan_of(app: Lightbus) -> AsyncGenerator[None]:
    """Around what an app runs: what its lifespan yields is there for handlers."""
    if app.lifespan is None:
        yield
    else:
        async with app.lifespan(app) as state:
            with app.with_state(state):
                yield


class Worker:
    """Consumes the queues of one app within its lifespan."""

    noun = "worker"
    """For the log."""

    def __init__(
        self,
        app: Lightbus,
        *,
        queues: Sequence[str] = (),
        prefetch: int | None = None,
        concurrency: int | None = None,
        grace: float = GRACE,
        blocked_after: float = BLOCKED_AFTER,
        lifespan: bool = True,
    ) -> None:
        """
        Args:
            blocked_after: seconds after which code that blocks the event loop is logged and counted; 0: never.
            lifespan: whether the app's lifespan surrounds the worker; a test may do without.
        """
        if not 0 <= grace < math.inf:
            raise errors.InvalidOption(f"worker: grace={grace!r}: use seconds, 0 or more.")
        if not 0 <= blocked_after < math.inf:
            raise errors.InvalidOption(f"worker: blocked_after={blocked_after!r}: use seconds, or 0 for never.")
        self.app = app
        self.grace = float(grace)
        self.consumer = app.consumer(queues=queues, prefetch=prefetch, concurrency=concurrency)
        self._with_lifespan = lifespan
        self.started = False
        self.unfinished: list[str] | None = None
        """The handlers that were still running at the end of the grace period. None until the worker has stopped."""
        self.blocked: Counter[str] = Counter()
        """How often code has blocked the event loop for more than `blocked_after` seconds, by the handler's name;
        "(lifespan)" is the app's lifespan, "(other)" any other code. Works from any thread: read `blocked.copy()`."""
        self._blocked_after = float(blocked_after)
        self._watch: LoopWatch | None = None

    async def serve(self, stop: anyio.Event, on_started: Callable[[], object] | None = None) -> bool:
        """Like the function `serve`."""
        failure: Exception | None = None
        if self._blocked_after:
            self._watch = LoopWatch(self.app.name, self.consumer, self.blocked, self._blocked_after)
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._stop_when_asked, stop, tasks.cancel_scope)
                try:
                    with self._in_lifespan():
                        async with lifespan_of(self.app) if self._with_lifespan else contextlib.nullcontext():
                            with self._in_lifespan(False):
                                await self._consume(on_started)
                except Exception as error:  # noqa: BLE001 - raised again below, outside of the task group, which would wrap it
                    failure = error
                tasks.cancel_scope.cancel()
        finally:
            if self._watch is not None:
                self._watch.stop()
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(self.app.publisher.close, LAST_STEPS / 2)
        if failure is not None:
            raise failure
        return not self.unfinished

    @contextlib.contextmanager
    def _in_lifespan(self, now: bool = True) -> Generator[None]:
        """Let the log name the lifespan where its start or end blocks the event loop."""
        if self._watch is None:
            yield
            return
        before, self._watch.in_lifespan = self._watch.in_lifespan, now
        try:
            yield
        finally:
            self._watch.in_lifespan = before

    async def _consume(self, on_started: Callable[[], object] | None) -> None:
        try:
            async with self._services(), anyio.create_task_group() as tasks:
                await tasks.start(self.consumer.run)
                self.started = True
                if on_started is not None:
                    on_started()
        except BaseExceptionGroup as group:
            raise errors.without_groups(group) from None

    @contextlib.asynccontextmanager
    async def _services(self) -> AsyncGenerator[None]:
        """Run the app's services: from before the first event until after the last handler."""
        if not self.app.services:
            yield
            return
        stopping = anyio.Event()
        async with anyio.create_task_group() as tasks:
            for service in self.app.services:
                tasks.start_soon(service.run, stopping, name=service.name)
            yield
            stopping.set()
            tasks.cancel_scope.deadline = anyio.current_time() + LAST_STEPS / 2

    async def _stop_when_asked(self, stop: anyio.Event, starting: anyio.CancelScope) -> None:
        await stop.wait()
        if not self.started:  # no handler is running. Do not wait for the lifespan or a broker that is down
            self.unfinished = []
            starting.cancel()
            return
        all_ended = await self.consumer.stop(self.grace)
        self.unfinished = [] if all_ended else self.consumer.in_flight

    def misspelt(self) -> list[str]:
        """Hints about handlers whose pattern is similar to the name of an event of this app: probably a typo."""
        app = self.app
        return [
            f"{one.name} subscribes to {pattern!r}. This app publishes {near!r}: did you mean that? Pass the "
            "event's class instead of its name to avoid typos; if another app publishes it, set source=."
            for one in app.handlers.values()
            for pattern in one.patterns
            if one.source in (None, app.name)
            and pattern not in app.events
            and "*" not in pattern
            and "#" not in pattern
            and (near := errors.nearest(pattern, app.events, cutoff=0.85))
        ]

    def left_behind(self) -> list[str]:
        """The names of the handlers that exceeded their timeout and still run. Their events are settled."""
        return [late.handler for runner in self.consumer.runners for late in self.consumer.late(runner)[1]]

    def pending(self) -> str:
        """What a stop waits for; empty if for nothing. Works from any thread."""
        count = len(self.in_flight())
        return f"{count} handler{'s' if count != 1 else ''} in flight" if count else ""

    def consequence(self, unfinished: Sequence[str]) -> str:
        """What happens to the events of handlers that did not finish."""
        return f"{'Its event' if len(unfinished) == 1 else 'Their events'} will be redelivered."

    def in_flight(self) -> list[str]:
        """The names of the running handlers. Works from any thread, even if the event loop is blocked."""
        return self.consumer.in_flight
