"""A slot is what runs handlers one after the other: a task, or a thread and the task that waits for it."""

from __future__ import annotations

import contextvars
import math
import threading
import time
from typing import Any

import anyio
import attrs

from lightbus import errors, logs
from lightbus.consuming import stall
from lightbus.consuming.subscription import HandlerRun, Subscription
from lightbus.transport import Delivery
from lightbus.wire import codec

CANCEL_AGAIN = 1.0
"""Seconds until a handler that did not end is cancelled again: it may have waited for something that is shielded."""


@attrs.define(eq=False)
class TaskSlot:
    """One task that handles deliveries one after the other, in one cancel scope (a scope per event costs 5 us)."""

    subscription: Subscription
    scope: anyio.CancelScope
    deadline: float = math.inf
    """On the monotonic clock, while a handler runs."""
    run: HandlerRun | None = None
    """What runs now, or is to be decided on."""
    error: BaseException | None = None
    """Why the run failed; None where it exceeded its timeout."""
    seconds: float | None = None
    """How long the handler ran that failed."""
    again: bool = False
    """The run did not fail: something cancelled its task, so another task starts it again."""
    coroutine: Any = None
    """What runs, or ran last."""
    shield: anyio.CancelScope | None = None
    """Inside of `scope`, which would cancel the handler again in each round of the event loop until it ends."""
    late: Late | None = None
    """Once the handler was cancelled over its timeout."""
    context: contextvars.Context | None = None
    """Where a decorator left a coroutine: the context it was made in, so that the handler sees what is set there."""
    left_behind: bool = False
    """Its event is decided on; the handler's result no longer counts."""

    def elapsed(self) -> float | None:
        """For how many seconds the handler has run; None where none runs."""
        handler, deadline = None if self.run is None else self.run[1], self.deadline
        if handler is None or deadline == math.inf:
            return None
        return max(0.0, time.monotonic() - deadline + handler.timeout)

    def exceeded(self, now: float) -> bool:
        """Whether the handler has exceeded its timeout."""
        return self.deadline < now

    def cancel(self, now: float) -> bool:
        """Cancel the handler, unless that was done just now. If so, call `stop_cancelling` one round later."""
        assert self.shield is not None
        if self.late is None:
            self.late = Late.of(self, now)
            self.scope.cancel()
        elif now < self.late.cancel_again_at:
            return False
        else:
            self.shield.shield = False
        self.late.cancel_again_at = now + CANCEL_AGAIN
        return True

    def stop_cancelling(self) -> None:
        assert self.shield is not None
        self.shield.shield = True

    def stack(self) -> str:
        """Where the handler is."""
        return stall.stack_of_coroutine(self.coroutine)


@attrs.define(eq=False)
class Late:
    """What is known of a handler that has exceeded its timeout."""

    handler: str
    timeout: float
    what: str
    """The handler and its event, for the log."""
    extra: dict[str, Any]
    """The same as fields."""
    since: float
    """When its time was over, on the monotonic clock."""
    cancel_again_at: float = 0.0
    logged_at: float = -math.inf
    """When it was last logged that it still runs."""

    @classmethod
    def of(cls, slot: TaskSlot, now: float) -> Late:
        assert slot.run is not None
        handler = slot.run[1]
        assert handler is not None
        what, extra = described(slot.subscription, slot.run), fields(slot.subscription, slot.run)
        return cls(handler.name, handler.timeout, what, extra, min(slot.deadline, now))


def described(subscription: Subscription, run: HandlerRun) -> str:
    """A handler and its event, for the log."""
    delivery, handler, _ = run
    name = None if handler is None else handler.name
    return f"handler {name!r} on {delivery.routing_key!r} ({shown_id(delivery)}) in {subscription.name!r}"


def fields(subscription: Subscription, run: HandlerRun, **more: Any) -> dict[str, Any]:
    """The same as `extra` of a log record, for `--json-logs`."""
    delivery, handler, _ = run
    app = subscription.name.removesuffix(f".{subscription.config.suffix}")
    name = None if handler is None else handler.name
    return {logs.ATTRIBUTE: logs.fields_of(app, delivery, name, subscription.name, **more)}


def shown_id(delivery: Delivery) -> str:
    """The message id, by which `lightbus dead show` finds the event. A foreign program may have written it: it stays
    on one line.
    """
    message_id, _ = codec.read_cause(delivery)
    return message_id if message_id.isprintable() else ascii(message_id)


def cancelled_error(slot: TaskSlot, cancelled: bool, error: BaseException) -> errors.HandlerCancelled:
    """The failure of a handler that ended with a cancellation that it caused itself."""
    assert slot.run is not None
    assert slot.run[1] is not None
    how = "cancelled its own task" if cancelled else "awaited something that was cancelled"
    made = errors.HandlerCancelled(
        f"handler {slot.run[1].name!r} {how} (CancelledError). "
        "For a time limit of its own, use asyncio.timeout or anyio.fail_after."
    )
    made.__cause__ = error
    return made.with_traceback(error.__traceback__)


def timeout_error(run: HandlerRun) -> errors.HandlerTimeout:
    handler = run[1]
    assert handler is not None
    return errors.HandlerTimeout(
        f"handler {handler.name!r} ran longer than its timeout of {handler.timeout:g} s. "
        "Make it faster, split the work, or give it more time with timeout=SECONDS."
    )


def _held_lock() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock


@attrs.define(eq=False)
class ThreadSlot(TaskSlot):
    """One thread that handles deliveries one after the other, and the task that waits for what it leaves here."""

    returned: Any = None
    """What the handler returned, where that is yet to be awaited."""
    called: bool = False
    """The thread was called, and has not taken a run yet."""
    wake: threading.Lock = attrs.field(factory=_held_lock)
    """Released to wake the thread, which has nothing to do."""
    thread: int = 0
    """Its identifier, once it serves."""
    gone: bool = False
    """The thread has left the slot."""
    _exceeded: bool = False
    _lock: threading.Lock = attrs.field(factory=threading.Lock)

    def cancel(self, now: float) -> bool:
        """The task stops waiting for the thread, which cannot be stopped."""
        if self.late is None:
            self.late = Late.of(self, now)
            self.left_behind = True
            self.scope.cancel()
        return False

    def stack(self) -> str:
        return "" if self.gone else stall.stack_of_thread(self.thread)

    def exceeded(self, now: float) -> bool:
        """Whether the handler has exceeded its timeout. The thread runs on, but its result no longer counts."""
        with self._lock:
            self._exceeded |= self.deadline < now
            return self._exceeded

    def begin(self, run: HandlerRun, timeout: float) -> None:
        self.run = run
        self.deadline = time.monotonic() + timeout

    def end(self) -> bool:
        """The handler has returned. Returns whether that was in time."""
        with self._lock:
            self.deadline = math.inf
            if not self._exceeded:
                self.run = None
            return not self._exceeded

    def fail(self, error: BaseException) -> bool:
        """The handler has raised this; the run stays in the slot, to be decided on. Returns whether it was in time."""
        with self._lock:
            self.seconds, self.deadline = self.elapsed(), math.inf
            if not self._exceeded:
                self.error = error
            return not self._exceeded
