"""The threads of sync handlers. Each handles one event after the other, and calls the event loop once per batch.

A switch to a thread and back costs more per event than everything else. So a thread stays, takes the next run by
itself, and calls the event loop only for what must be decided: a failure, or a handler that has exceeded its timeout.
"""

from __future__ import annotations

import contextvars
import inspect
import logging
import math
import threading
import time
from collections import deque
from typing import Protocol

from lightbus import errors
from lightbus.consuming.slots import Late, TaskSlot, ThreadSlot
from lightbus.consuming.subscription import HandlerRun, Subscription
from lightbus.consuming.turns import Turns
from lightbus.handler import Handler
from lightbus.wire import codec

logger = logging.getLogger("lightbus")

LEFT_BEHIND = 10
"""Handlers of a queue that may be left behind, running on; more where its `concurrency` is higher."""


class PoolOwner(Protocol):
    """The event loop's side. Each method may be called in any thread."""

    def start_thread(self) -> None:
        """Give one more thread a slot."""
        ...

    def collect_done(self) -> None:
        """Settle what is in `Pool.done`."""
        ...

    def room_is_free(self) -> None:
        """A thread has left its room to a task of an async handler."""
        ...


class Pool:
    """The threads for one queue: started on demand, as many as its `concurrency` has room for, and kept.

    One thread is called at a time. When it has taken a run and more are waiting, it calls the next one. With short
    handlers it does not come to that: Python switches threads only where one waits, or every 5 ms.
    """

    def __init__(self, subscription: Subscription, turns: Turns, owner: PoolOwner) -> None:
        self.subscription = subscription
        self.concurrency = subscription.config.concurrency
        self.running = 0
        """Tasks and threads that have a slot, and are not idle."""
        self.limit = max(LEFT_BEHIND, self.concurrency)
        """Of handlers that are left behind."""
        self.done: deque[tuple[HandlerRun, bool]] = deque()
        """Runs that have ended; False where they were not begun, since their epoch is over."""
        self.collecting = False
        """Whether `collect_done` has been asked for, and has not begun."""
        self.closed = False
        self.left_behind: dict[TaskSlot, Late] = {}
        """Handlers, sync and async, that run on although their timeout is over and their event is decided on. They
        take no room; their number has a limit (`full`)."""
        self._turns = turns
        self._owner = owner
        self._called = False
        self._idle: list[ThreadSlot] = []
        self._lock = threading.Lock()
        """Guards the fields above."""

    # --- from any thread

    def take_room(self, wanted: int) -> int:
        """For how many of so many tasks there is room, beside what runs already. They count as running from here on."""
        with self._lock:
            granted = max(0, min(wanted, self.concurrency - self.running))
            self.running += granted
            return granted

    def give_room(self) -> None:
        """A task or a thread has ended."""
        with self._lock:
            self.running -= 1
        self.call()

    def call(self) -> None:
        """Let one more thread come, where there is work and room for it."""
        with self._lock:
            if self._called or not self._turns.plain or self.closed or self.running >= self.concurrency:
                return
            slot = self._idle.pop() if self._idle else None  # the last one to go: it is the warmest
            if slot is None and self.full:  # `ended` calls again
                return
            self._called = True
            self.running += 1
        if slot is None:
            self._owner.start_thread()
        else:
            slot.wake.release()

    @property
    def short(self) -> bool:
        """Whether runs wait because all threads are left behind."""
        return bool(self.full and self._turns.plain)

    def close(self) -> None:
        """Take no more; idle threads end."""
        with self._lock:
            self.closed = True
            self._turns.plain.clear()
            idle, self._idle = self._idle, []
            self.running += len(idle)
        for slot in idle:
            slot.wake.release()

    # --- handlers that do not end

    @property
    def full(self) -> bool:
        """Whether so many handlers are left behind that no further one may be. Then no further thread is started."""
        return len(self.left_behind) >= self.limit

    def leave_behind(self, slot: TaskSlot) -> bool:
        """A handler runs on, without its room. Returns whether it may; a thread may, since it cannot be stopped."""
        assert slot.late is not None
        is_thread = isinstance(slot, ThreadSlot)
        with self._lock:
            if (isinstance(slot, ThreadSlot) and slot.gone) or (self.full and not is_thread):
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
        if late.logged_at > -math.inf or error is not None:
            how = "" if error is None else f", with {type(error).__name__}: {errors.message_of(error)}"
            after = time.monotonic() - late.since
            logger.warning("The %s finished %.0f s after its timeout%s.", late.what, after, how, extra=late.extra)
        self.call()

    def all_left_behind(self) -> list[Late]:
        with self._lock:
            return list(self.left_behind.values())

    # --- in the thread

    def serve(self, slot: ThreadSlot) -> None:
        """Run handlers, until the event loop must decide on one (it stays in the slot) or the pool is closed."""
        thread = threading.current_thread()
        name, thread.name = thread.name, f"lightbus handler of {self.subscription.name}"
        slot.thread = threading.get_ident()
        late_error: BaseException | None = None
        try:
            late_error = self._handle(slot)
        finally:
            thread.name = name
            self.ended(slot, late_error)

    def _handle(self, slot: ThreadSlot) -> BaseException | None:
        """Returns what a handler raised after its timeout."""
        subscription = self.subscription
        while (run := self._next(slot)) is not None:
            delivery, handler, _ = run
            assert handler is not None
            if delivery.channel not in subscription.channels:  # its epoch has ended, and it comes again
                self._report(run, handler, begun=False)
                continue
            slot.begin(run, handler.timeout)
            try:
                context = contextvars.copy_context()
                context.run(codec.current_run.set, run)
                returned = context.run(handler.function, *handler.arguments(delivery))
                if returned is not None and inspect.isawaitable(returned):
                    slot.returned, slot.context = returned, context
                    return None
            except BaseException as error:  # noqa: BLE001  # the task that waits for this thread decides
                return None if slot.fail(error) else error
            if not slot.end():
                return None
            self._report(run, handler, begun=True)
        return None

    def _next(self, slot: ThreadSlot) -> HandlerRun | None:
        """The next run, as soon as there is one; None when the pool is closed."""
        while not self.closed:
            try:
                run = self._turns.plain.popleft()
            except IndexError:
                self._wait(slot)
            else:
                if slot.called:
                    slot.called = self._called = False
                    self.call()
                return run
        return None

    def _wait(self, slot: ThreadSlot) -> None:
        with self._lock:
            if self._turns.plain or self.closed:  # still called: it calls the next one when it has a run
                return
            if slot.called:
                slot.called = self._called = False
            self._idle.append(slot)
            self.running -= 1
        if self._turns.ready:
            self._owner.room_is_free()
        slot.wake.acquire()
        slot.called = True

    def _report(self, run: HandlerRun, handler: Handler, *, begun: bool) -> None:
        self.done.append((run, begun))
        if self.collecting:
            return
        # In batches, as acks go: when a part of the prefetch is done, or nothing is left to do (else within a second);
        # at once where another run is parked, whose turn it is now.
        if (
            not self._turns.plain
            or len(self.done) > self.subscription.ack_batch
            or (handler.concurrency is not None and self._turns.parked(handler))
        ):
            self.collecting = True
            self._owner.collect_done()
