"""A queue's handlers, observed: an `Outcome` per attempt, for apps that have called `app.observe`."""

from __future__ import annotations

import inspect
import time
from collections.abc import Awaitable
from typing import Any, cast

import attrs

from lightbus.consuming.connection import ConsumerConnection
from lightbus.consuming.consumer import Consumer
from lightbus.consuming.failure import Failures, Result
from lightbus.consuming.runner import QueueRunner
from lightbus.consuming.subscription import HandlerRun, SubscriptionConfig
from lightbus.handler import Handler
from lightbus.middleware import SKIPPED, the_delivery
from lightbus.outcome import Kind, Observe, Outcome
from lightbus.retry import RetryIn
from lightbus.transport import Delivery
from lightbus.wire import codec

Runs = dict[int, float]
"""By the `id` of the delivery. Negative while it runs: when it began (monotonic clock). Then its seconds."""


class Stopwatch:
    """How long each handler run took, and whether its handler was skipped; from its start until it is reported."""

    def __init__(self) -> None:
        self._runs: dict[str, Runs] = {}
        """By handler."""
        self._skipped: set[tuple[int, str]] = set()

    def around(self, config: SubscriptionConfig) -> SubscriptionConfig:
        """The same queue with its handlers timed."""
        handlers = {name: self._timed(handler) for name, handler in config.handlers.items()}
        return attrs.evolve(config, handlers=handlers)

    def take(self, delivery: Delivery, handler: Handler | None) -> tuple[float, bool]:
        """(seconds, skipped) of a run; so far, if its handler runs on after its timeout. (0, False) if none began."""
        if handler is None:
            return 0.0, False
        seconds = self._runs[handler.name].pop(id(delivery), 0.0)
        if seconds < 0:
            seconds += time.monotonic()
        skipped = self._skipped
        if skipped and (key := (id(delivery), handler.name)) in skipped:
            skipped.remove(key)
            return seconds, True
        return seconds, False

    def _timed(self, handler: Handler) -> Handler:
        # Without functions for beginning and end: they are called for each event.
        function, arguments, name = handler.function, handler.arguments, handler.name
        now, skipped = time.monotonic, self._skipped
        runs = self._runs[name] = {}

        async def timed(delivery: Delivery) -> None:
            key, returned = id(delivery), None
            before = runs[key] = -now()
            try:
                returned = await function(*arguments(delivery))
            finally:
                if key in runs:  # not reported meanwhile
                    runs[key] = before + now()
                    if returned is SKIPPED:
                        skipped.add((key, name))

        async def rest(key: int, before: float, returned: Awaitable[Any]) -> None:
            try:
                await returned
            finally:
                if key in runs:
                    runs[key] = before + now()

        def timed_sync(delivery: Delivery) -> Any:
            key, awaited = id(delivery), False
            returned: Any = None
            before = runs[key] = -now()
            try:
                returned = function(*arguments(delivery))
                awaited = returned is not None and inspect.isawaitable(returned)
            finally:
                if not awaited and key in runs:
                    runs[key] = before + now()
                    if returned is SKIPPED:
                        skipped.add((key, name))
            return rest(key, before, cast("Awaitable[Any]", returned)) if awaited else None

        return attrs.evolve(handler, function=timed if handler.is_async else timed_sync, arguments=the_delivery)


class ObservedRunner(QueueRunner):
    """Reports the outcome of each run before its delivery is settled: who then asks the broker misses nothing."""

    def __init__(
        self,
        app: str,
        consumer: Consumer,
        connection: ConsumerConnection,
        failures: Failures,
        *,
        observe: Observe,
        stopwatch: Stopwatch,
    ) -> None:
        super().__init__(app, consumer, connection, failures)
        self._app = app
        self._observe = observe
        self._stopwatch = stopwatch
        self._queue = self.subscription.name

    def accept(self, run: HandlerRun, *, accepted: bool = True) -> None:
        delivery, handler, _ = run
        seconds, skipped = self._stopwatch.take(delivery, handler)
        # Not by `_report`: this is called for nearly each event.
        self._observe(
            Outcome(
                kind="skipped" if skipped else "handled",
                app=self._app,
                message=codec.message_of(self._app, delivery),
                handler=None if handler is None else handler.name,
                queue=self._queue,
                attempt=codec.attempt_of(self._app, delivery),
                seconds=seconds,
            )
        )
        self.settle(run, accepted=accepted)

    async def handle_failure(self, run: HandlerRun, error: BaseException, seconds: float | None) -> None:
        delivery, handler, _ = run
        ran, (seconds, _skipped) = seconds, self._stopwatch.take(delivery, handler)
        try:
            result, failure = await self.failures.handle(self.subscription, self.routes, run, error, self.tasks, ran)
        except BaseException:  # the worker ends before a copy was confirmed
            self._report(run, "redelivered", seconds, error=error)
            raise
        if failure is None:
            self._report(run, "skipped", seconds)
        elif result is Result.REDELIVERED:
            self._report(run, "redelivered", seconds, error=failure.error)
        elif result is Result.KEPT and isinstance(failure.decision, RetryIn):
            self._report(run, "retried", seconds, error=failure.error, delay=failure.decision.delay)
        else:
            self._report(run, "dead", seconds, error=failure.error)
        self.conclude(run, result)

    def _report(
        self,
        run: HandlerRun,
        kind: Kind,
        seconds: float,
        *,
        error: BaseException | None = None,
        delay: float | None = None,
    ) -> None:
        delivery, handler, _ = run
        self._observe(
            Outcome(
                kind=kind,
                app=self._app,
                message=codec.message_of(self._app, delivery),
                handler=None if handler is None else handler.name,
                queue=self._queue,
                attempt=codec.attempt_of(self._app, delivery),
                seconds=seconds,
                error=error,
                delay=delay,
            )
        )
