"""All that `lightbus.testing` overrides or reads of what other packages keep private. Nothing else in it does.

A test bus needs to know what its apps publish and how each handler run ends. Lightbus has no public hooks for that yet,
so these classes override methods and report to an `Observer`:

| class | member | why |
|---|---|---|
| `ObservedPublisher` | `Publisher.finished` | messages are confirmed, returned or failed |
| `ObservedRunner` | `QueueRunner.settle` | a handler returned: reported before the broker gets the ack |
| | `QueueRunner.handle_failure` | a handler failed: reported before it is retried or dead-lettered |
| `HostedWorker` | `Worker._lifespan` | `TestBus(lifespan=False)` |
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from lightbus.app import Lightbus
from lightbus.connection.dial import BrokerAddresses
from lightbus.consuming.connection import ConsumerConnection
from lightbus.consuming.consumer import Consumer
from lightbus.consuming.dispatcher import Dispatcher
from lightbus.consuming.failure import Failures
from lightbus.consuming.runner import QueueRunner
from lightbus.consuming.subscription import HandlerRun
from lightbus.consuming.timeouts import copied
from lightbus.handler import Handler
from lightbus.publishing.confirms import PendingPublish
from lightbus.publishing.publisher import Publisher
from lightbus.transport import Delivery, Publication
from lightbus.wire import topology
from lightbus.worker.worker import Worker


class Observer(Protocol):
    """Receives what the apps of a test do. Called in the thread or event loop where it happens."""

    def published(self, publication: Publication, routed: bool) -> None:
        """The broker has confirmed a message."""
        ...

    def handled(self, app: Lightbus, handler: Handler, delivery: Delivery) -> None:
        """A handler has returned."""
        ...

    def failed(self, app: Lightbus, handler: Handler | None, delivery: Delivery, error: BaseException) -> None:
        """A handler has failed, or no handler matches (None)."""
        ...


class ObservedPublisher(Publisher):
    """An app's publisher, which reports each confirmed event."""

    def __init__(
        self, app: str, broker: BrokerAddresses, observer: Observer, *, timeout: float, queue_type: topology.QueueType
    ) -> None:
        self._observer = observer
        super().__init__(app, broker, timeout=timeout, queue_type=queue_type)

    def finished(self, messages: Sequence[PendingPublish]) -> None:
        for pending in messages:
            publication = pending.publication
            # A copy for a retry goes to the internal exchange: it is not a new event.
            if pending.error is None and publication.exchange != topology.internal_name(self.app):
                self._observer.published(publication, not pending.returned)


class ObservedRunner(QueueRunner):
    """Runs a queue's handlers, and reports the end of each run.

    It reports before the broker learns of it. So `drain`, which asks the broker, never returns too early.
    """

    observed_app: Lightbus
    observer: Observer

    def __init__(self, app: str, consumer: Consumer, connection: ConsumerConnection, failures: Failures) -> None:
        super().__init__(app, consumer, connection, failures)
        self._failing: set[int] = set()
        """The runs (by identity) that `handle_failure` will settle."""

    def settle(self, run: HandlerRun, *, accepted: bool = True) -> None:
        delivery, handler, _ = run
        if handler is not None and id(run) not in self._failing:
            self.observer.handled(self.observed_app, handler, delivery)
        super().settle(run, accepted=accepted)

    async def handle_failure(self, run: HandlerRun, error: BaseException) -> None:
        delivery, handler, _ = run
        self.observer.failed(self.observed_app, handler, delivery, error)
        self._failing.add(id(run))
        try:
            await super().handle_failure(run, error)
        finally:
            self._failing.discard(id(run))


class ObservedDispatcher(Dispatcher):
    """An app's dispatcher, whose runners report the end of each handler run."""

    Runner = ObservedRunner

    def __init__(self, app: Lightbus, observer: Observer) -> None:
        super().__init__(
            app=app.name,
            broker=app.broker,
            subscriptions=app.subscriptions(),
            wanted=app.topology(),
            publisher=app.publisher,
            retry=app.retry,
        )
        for runner in self.runners:
            assert isinstance(runner, ObservedRunner)
            runner.observed_app, runner.observer = app, observer

    def running_now(self) -> list[tuple[Handler, Delivery, float]]:
        """The running handlers, each with its delivery and for how many seconds it has run. From any thread."""
        runs = [(slot.run, slot.deadline) for runner in self.runners for slot in copied(runner.slots)]
        now = time.monotonic()
        return [
            (run[1], run[0], max(0.0, now - deadline + run[1].timeout))
            for run, deadline in runs
            if run is not None and run[1] is not None and deadline < math.inf
        ]


class HostedWorker(Worker):
    """An app's worker with an observed dispatcher, and without the lifespan if the test does not want it."""

    consumer: ObservedDispatcher

    def __init__(self, app: Lightbus, observer: Observer, *, lifespan: bool, grace: float) -> None:
        super().__init__(app, grace=grace)
        self.consumer = ObservedDispatcher(app, observer)
        self._with_lifespan = lifespan

    @contextlib.asynccontextmanager
    async def _lifespan(self) -> AsyncGenerator[None]:
        if not self._with_lifespan:
            yield
        else:
            async with super()._lifespan():
                yield
