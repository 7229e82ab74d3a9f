"""Which handler run of a queue is next. A handler with its own `concurrency` waits its turn, and others go first."""

from __future__ import annotations

from collections import deque

from lightbus.consuming.subscription import HandlerRun, Subscription
from lightbus.handler import Handler


class Turns:
    """The handler runs of one queue that wait. Owned by the event loop; threads only take from `plain`."""

    def __init__(self, subscription: Subscription) -> None:
        self.ready: deque[HandlerRun] = deque()
        """Of async handlers, for tasks; and deliveries that no handler matches."""
        self.plain: deque[HandlerRun] = deque()
        """Of sync handlers, for threads. Each has its turn already."""
        self._subscription = subscription
        self._parked: dict[str, deque[HandlerRun]] = {}
        """By the handler's name: they wait until fewer runs of the same handler are active."""
        self._running: dict[str, int] = {}

    def may_run(self, run: HandlerRun) -> bool:
        """Whether this run, just taken from `ready`, may start. If not, it is parked, or delivered again."""
        delivery, handler, _ = run
        if handler is None or handler.concurrency is None:
            return delivery.channel in self._subscription.channels  # else its epoch has ended, and it comes again
        if delivery.channel not in self._subscription.channels:
            self._unpark(handler)
            return False
        return self.take(handler, run)

    def take(self, handler: Handler, run: HandlerRun) -> bool:
        """Whether the handler's `concurrency` lets this run start now. If not, it is parked."""
        assert handler.concurrency is not None
        running = self._running.get(handler.name, 0)
        if running >= handler.concurrency:
            self._parked.setdefault(handler.name, deque()).append(run)
            return False
        self._running[handler.name] = running + 1
        return True

    def release(self, handler: Handler) -> bool:
        """A run of a handler with its own `concurrency` has ended. Returns whether `plain` has one more run now."""
        self._running[handler.name] -= 1
        return self._unpark(handler)

    def parked(self, handler: Handler) -> bool:
        """Whether runs of this handler are parked. From any thread."""
        return bool(self._parked.get(handler.name))

    def clear(self) -> None:
        """Start none of those that wait for a task: they are delivered again."""
        self.ready.clear()
        self._parked.clear()

    def _unpark(self, handler: Handler) -> bool:
        parked = self._parked.get(handler.name)
        if not parked:
            return False
        if handler.is_async:
            self.ready.appendleft(parked.popleft())
            return False
        self._running[handler.name] += 1
        self.plain.appendleft(parked.popleft())
        return True
