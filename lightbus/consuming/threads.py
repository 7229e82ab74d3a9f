"""The threads of plain handlers. Each handles one event after the other, and crosses to the event loop for batches.

To cross to a thread and back for each event costs more than all the rest of its way. So a thread stays, takes the next
job by itself, and goes to the loop only with what there is to decide: a failure, or a handler that is over its time.
"""

from __future__ import annotations

import contextvars
import inspect
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import anyio
import attrs

from lightbus import errors
from lightbus.consuming import stall
from lightbus.consuming.connection import HandlerRun, Subscription
from lightbus.handler import Handler
from lightbus.wire import codec

logger = logging.getLogger("lightbus")

CANCEL_AGAIN = 1.0
"""Seconds until a handler that did not end is cancelled again: it may have waited for something that is shielded."""
STUCK = 10.0
"""Seconds after its timeout, for which an async handler may go on tidying up before it is left behind."""
LEFT_BEHIND = 10
"""Handlers of a queue that may be left behind, running on; more where its `concurrency` is higher."""


@attrs.define(eq=False)
class TaskSlot:
    """One task that handles deliveries one after the other, under one cancel scope (a scope an event costs 5 us)."""

    subscription: Subscription
    scope: anyio.CancelScope
    deadline: float = math.inf
    """On the monotonic clock, while a handler runs."""
    job: HandlerRun | None = None
    error: BaseException | None = None
    """Why the job failed; None where it ran out of time."""
    again: bool = False
    """The job did not fail: something cancelled its task, so another one is to run it."""
    coroutine: Any = None
    """What runs, or ran last."""
    shield: anyio.CancelScope | None = None
    """Inside of `scope`, which would cancel the handler again in each round of the event loop until it ends."""
    late: Late | None = None
    """Once the handler was cancelled, as its time was over."""
    context: contextvars.Context | None = None
    """Where a decorator has left a coroutine: what it was made in, so that the handler sees what is set there."""
    left_behind: bool = False
    """Its event is decided on; whatever the handler comes to does not count any more."""

    def give_up(self, now: float) -> bool:
        """Whether the handler's time is over."""
        return self.deadline < now

    def cancel(self, now: float) -> bool:
        """Cancel the handler, unless that was done just now; then `rest` is to be called a round later."""
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

    def rest(self) -> None:
        assert self.shield is not None
        self.shield.shield = True

    def stack(self) -> str:
        """Where the handler is."""
        return stall.stack_of_coroutine(self.coroutine)


@attrs.define(eq=False)
class Late:
    """What is known of a handler whose time is over."""

    handler: str
    timeout: float
    what: str
    """The handler and its event, for the log."""
    since: float
    """When its time was over, on the monotonic clock."""
    cancel_again_at: float = 0.0
    said_at: float = -math.inf
    """When it was last logged that it still runs."""

    @classmethod
    def of(cls, slot: TaskSlot, now: float) -> Late:
        assert slot.job is not None
        handler = slot.job[1]
        assert handler is not None
        return cls(handler.name, handler.timeout, described(slot.subscription, slot.job), min(slot.deadline, now))


def described(subscription: Subscription, job: HandlerRun) -> str:
    """A handler and its event, for the log."""
    delivery, handler, _ = job
    message_id, _ = codec.read_cause(delivery)
    shown = message_id if message_id.isprintable() else ascii(message_id)
    name = None if handler is None else handler.name
    return f"handler {name!r} on {delivery.routing_key!r} ({shown}) in {subscription.name!r}"


def _rung() -> threading.Lock:
    wake_pipe = threading.Lock()
    wake_pipe.acquire()
    return wake_pipe


@attrs.define(eq=False)
class ThreadSlot(TaskSlot):
    """One thread that handles deliveries one after the other, and the task that waits for what it leaves here."""

    returned: Any = None
    """What the handler returned, where that is yet to be awaited."""
    coming: bool = False
    """Called, and has not taken a job yet."""
    wake_pipe: threading.Lock = attrs.field(factory=_rung)
    """Released to wake the thread, which has no job."""
    thread: int = 0
    """Its identifier, once it serves."""
    gone: bool = False
    """The thread has left the seat."""
    _given_up: bool = False
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

    def give_up(self, now: float) -> bool:
        """Whether the handler's time is over. The thread runs on, but whatever it comes to does not count any more."""
        with self._lock:
            self._given_up |= self.deadline < now
            return self._given_up

    def begin(self, job: HandlerRun, timeout: float) -> None:
        self.job = job
        self.deadline = time.monotonic() + timeout

    def end(self) -> bool:
        """The handler has returned. Says whether that was in time."""
        with self._lock:
            self.deadline = math.inf
            if not self._given_up:
                self.job = None
            return not self._given_up

    def fail(self, error: BaseException) -> bool:
        """The handler has raised this; the job stays in the seat, to be decided on. Says whether that was in time."""
        with self._lock:
            self.deadline = math.inf
            if not self._given_up:
                self.error = error
            return not self._given_up


class Pool:
    """The threads for one subscription: started on demand, as many as its `concurrency` has room for, and kept.

    One thread is called at a time. When it has taken a job and more are waiting, it calls the next one. While the
    handlers are short, it does not come so far: Python lets other threads in only where one waits, or each 5 ms.
    """

    def __init__(
        self,
        subscription: Subscription,
        *,
        start: Callable[[Pool], object],
        collect: Callable[[Pool], object],
        room: Callable[[Subscription], object],
    ) -> None:
        """
        Args:
            start: gives one more thread a seat. This and the others may be called in any thread.
            collect: settles what is `done`.
            room: tells the tasks of async handlers that there is room for one more.
        """
        self.subscription = subscription
        self.limit = max(LEFT_BEHIND, subscription.concurrency)
        """Of handlers that are left behind."""
        self.jobs: deque[HandlerRun] = deque()
        self.done: deque[tuple[HandlerRun, bool]] = deque()
        """Jobs that have ended; False where they were not begun, since their epoch is over."""
        self.collecting = False
        """Whether `collect` has been asked for, and has not begun."""
        self.closed = False
        self._start, self._collect, self._room = start, collect, room
        self._coming = False
        self._waiting: list[ThreadSlot] = []
        self.left_behind: dict[TaskSlot, Late] = {}
        """Handlers, plain and async, that run on though their time is over and their event is decided on. They hold no
        room; there is a limit to them (`full`)."""
        self._lock = threading.Lock()
        """Of the fields above, and of `subscription.running`."""

    # --- from any thread

    def take_room(self, wanted: int) -> int:
        """For how many of so many tasks there is room, beside what runs already. They count as running from here on."""
        with self._lock:
            granted = max(0, min(wanted, self.subscription.concurrency - self.subscription.running))
            self.subscription.running += granted
            return granted

    def give_room(self) -> None:
        """A task or a thread has ended."""
        with self._lock:
            self.subscription.running -= 1
        self.call()

    def call(self) -> None:
        """Let one more thread come, where there is work and room for it."""
        with self._lock:
            if (
                self._coming
                or not self.jobs
                or self.closed
                or self.subscription.running >= self.subscription.concurrency
            ):
                return
            seat = self._waiting.pop() if self._waiting else None  # the last one to go: it is the warmest
            if seat is None and self.full:  # `ended` calls again
                return
            self._coming = True
            self.subscription.running += 1
        if seat is None:
            self._start(self)
        else:
            seat.wake_pipe.release()

    # --- handlers that do not end

    @property
    def full(self) -> bool:
        """Whether so many handlers are left behind that no further one may be: no further thread is started then."""
        return len(self.left_behind) >= self.limit

    def leave_behind(self, slot: TaskSlot) -> bool:
        """A handler runs on, without its room. Says whether there are few enough of them; a thread counts anyway."""
        is_thread = isinstance(slot, ThreadSlot)
        assert slot.late is not None
        with self._lock:
            if isinstance(slot, ThreadSlot) and slot.gone:
                return False
            if self.full and not is_thread:
                return False
            self.left_behind[slot] = slot.late
            return True

    def ended(self, slot: TaskSlot, error: BaseException | None = None) -> None:
        """A handler that was left behind has ended, in any thread."""
        with self._lock:
            late = self.left_behind.pop(slot, None)
            if isinstance(slot, ThreadSlot):
                slot.gone = True
        if late is None:
            return
        if late.said_at > -math.inf or error is not None:
            how = "" if error is None else f", with {type(error).__name__}: {errors.message_of(error)}"
            after = time.monotonic() - late.since
            logger.warning("The %s finished %.0f s after its timeout%s.", late.what, after, how)
        self.call()

    def all_left_behind(self) -> list[Late]:
        with self._lock:
            return list(self.left_behind.values())

    def close(self) -> None:
        """Take no more; threads that have nothing to do end."""
        with self._lock:
            self.closed = True
            self.jobs.clear()
            waiting, self._waiting = self._waiting, []
            self.subscription.running += len(waiting)
        for seat in waiting:
            seat.wake_pipe.release()

    # --- in the thread

    def serve(self, seat: ThreadSlot) -> None:
        """Handle jobs, until one needs the event loop to decide on it (it stays in the seat) or the pool is closed."""
        thread = threading.current_thread()
        name, thread.name = thread.name, f"lightbus handler of {self.subscription.name}"
        seat.thread = threading.get_ident()
        late_error: BaseException | None = None
        try:
            late_error = self._handle(seat)
        finally:
            thread.name = name
            self.ended(seat, late_error)

    def _handle(self, seat: ThreadSlot) -> BaseException | None:
        """Returns what a handler raised after its time was over."""
        subscription = self.subscription
        while (job := self._next(seat)) is not None:
            delivery, handler, _ = job
            assert handler is not None
            if delivery.channel not in subscription.channels:  # its epoch has ended, and it comes again
                self._tell(job, handler, begun=False)
                continue
            seat.begin(job, handler.timeout)
            try:
                context = contextvars.copy_context()
                context.run(codec.current_delivery.set, delivery)
                returned = context.run(handler.function, *handler.arguments(delivery))
                if returned is not None and inspect.isawaitable(returned):
                    seat.returned, seat.context = returned, context
                    return None
            except BaseException as error:  # noqa: BLE001  # the task that waits for this thread knows what to do
                return None if seat.fail(error) else error
            if not seat.end():
                return None
            self._tell(job, handler, begun=True)
        return None

    def _next(self, seat: ThreadSlot) -> HandlerRun | None:
        """The next job, as soon as there is one; None when the pool is closed."""
        while not self.closed:
            try:
                job = self.jobs.popleft()
            except IndexError:
                self._wait(seat)
            else:
                if seat.coming:
                    seat.coming = self._coming = False
                    self.call()
                return job
        return None

    def _wait(self, seat: ThreadSlot) -> None:
        with self._lock:
            if self.jobs or self.closed:  # still coming where it was called: it calls the next one when it has a job
                return
            if seat.coming:
                seat.coming = self._coming = False
            self._waiting.append(seat)
            self.subscription.running -= 1
        if self.subscription.ready:
            self._room(self.subscription)
        seat.wake_pipe.acquire()
        seat.coming = True

    def _tell(self, job: HandlerRun, handler: Handler, *, begun: bool) -> None:
        self.done.append((job, begun))
        if self.collecting:
            return
        # In batches, as acks go: when a part of the prefetch is done, or nothing is left to do (else within a second);
        # at once where another is parked, whose turn it is now.
        subscription = self.subscription
        if not self.jobs or len(self.done) > subscription.ack_batch or subscription.parked.get(handler.name):
            self.collecting = True
            self._collect(self)
