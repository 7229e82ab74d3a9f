"""The threads of plain handlers. Each handles one event after the other, and crosses to the event loop for batches.

To cross to a thread and back for each event costs more than all the rest of its way. So a thread stays, takes the next
job by itself, and goes to the loop only with what there is to decide: a failure, or a handler that is over its time.
"""

from __future__ import annotations

import contextvars
import inspect
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import anyio
import attrs

from lightbus import codec
from lightbus.handler import Handler
from lightbus.subscriber import Job, Lane


@attrs.define(eq=False)
class Slot:
    """One task that handles deliveries one after the other, under one cancel scope (a scope an event costs 5 us)."""

    lane: Lane
    scope: anyio.CancelScope
    deadline: float = math.inf
    """On the monotonic clock, while a handler runs."""
    job: Job | None = None
    error: BaseException | None = None
    """Why the job failed; None where it ran out of time."""

    def give_up(self, now: float) -> bool:
        """Whether the handler's time is over."""
        return self.deadline < now


def _rung() -> threading.Lock:
    bell = threading.Lock()
    bell.acquire()
    return bell


@attrs.define(eq=False)
class Seat(Slot):
    """One thread that handles deliveries one after the other, and the task that waits for what it leaves here."""

    returned: Any = None
    """What the handler returned, where that is yet to be awaited."""
    coming: bool = False
    """Called, and has not taken a job yet."""
    bell: threading.Lock = attrs.field(factory=_rung)
    """Released to wake the thread, which has no job."""
    _given_up: bool = False
    _lock: threading.Lock = attrs.field(factory=threading.Lock)

    def give_up(self, now: float) -> bool:
        """Whether the handler's time is over. The thread runs on, but whatever it comes to does not count any more."""
        with self._lock:
            self._given_up |= self.deadline < now
            return self._given_up

    def begin(self, job: Job, timeout: float) -> None:
        self.job = job
        self.deadline = time.monotonic() + timeout

    def end(self) -> bool:
        """The handler has returned. Says whether that was in time."""
        with self._lock:
            self.deadline = math.inf
            if not self._given_up:
                self.job = None
            return not self._given_up

    def fail(self, error: BaseException) -> None:
        """The handler has raised this; the job stays in the seat, to be decided on."""
        with self._lock:
            self.deadline = math.inf
            if not self._given_up:
                self.error = error


class Pool:
    """The threads for one lane: started on demand, as many as its `concurrency` has room for, and kept.

    One thread is called at a time. When it has taken a job and more are waiting, it calls the next one. While the
    handlers are short, it does not come so far: Python lets other threads in only where one waits, or each 5 ms.
    """

    def __init__(
        self,
        lane: Lane,
        *,
        start: Callable[[Pool], object],
        collect: Callable[[Pool], object],
        room: Callable[[Lane], object],
    ) -> None:
        """
        Args:
            start: gives one more thread a seat. This and the others may be called in any thread.
            collect: settles what is `done`.
            room: tells the tasks of async handlers that there is room for one more.
        """
        self.lane = lane
        self.jobs: deque[Job] = deque()
        self.done: deque[tuple[Job, bool]] = deque()
        """Jobs that have ended; False where they were not begun, since their epoch is over."""
        self.collecting = False
        """Whether `collect` has been asked for, and has not begun."""
        self.closed = False
        self._start, self._collect, self._room = start, collect, room
        self._coming = False
        self._waiting: list[Seat] = []
        self._lock = threading.Lock()
        """Of the fields above, and of `lane.running`."""

    # --- from any thread

    def take_room(self, wanted: int) -> int:
        """For how many of so many tasks there is room, beside what runs already. They count as running from here on."""
        with self._lock:
            granted = max(0, min(wanted, self.lane.concurrency - self.lane.running))
            self.lane.running += granted
            return granted

    def give_room(self) -> None:
        """A task or a thread has ended."""
        with self._lock:
            self.lane.running -= 1
        self.call()

    def call(self) -> None:
        """Let one more thread come, where there is work and room for it."""
        with self._lock:
            if self._coming or not self.jobs or self.closed or self.lane.running >= self.lane.concurrency:
                return
            self._coming = True
            self.lane.running += 1
            seat = self._waiting.pop() if self._waiting else None  # the last one to go: it is the warmest
        if seat is None:
            self._start(self)
        else:
            seat.bell.release()

    def close(self) -> None:
        """Take no more; threads that have nothing to do end."""
        with self._lock:
            self.closed = True
            self.jobs.clear()
            waiting, self._waiting = self._waiting, []
            self.lane.running += len(waiting)
        for seat in waiting:
            seat.bell.release()

    # --- in a thread of its own

    def serve(self, seat: Seat) -> None:
        """Handle jobs, until one needs the event loop to decide on it (it stays in the seat) or the pool is closed."""
        thread = threading.current_thread()
        name, thread.name = thread.name, f"lightbus handler of {self.lane.name}"
        try:
            self._handle(seat)
        finally:
            thread.name = name

    def _handle(self, seat: Seat) -> None:
        lane = self.lane
        while (job := self._next(seat)) is not None:
            delivery, handler, _ = job
            assert handler is not None
            if delivery.channel not in lane.channels:  # its epoch has ended, and it comes again
                self._tell(job, handler, begun=False)
                continue
            seat.begin(job, handler.timeout)
            try:
                context = contextvars.copy_context()
                context.run(codec.current_delivery.set, delivery)
                returned = context.run(handler.function, *handler.arguments(delivery))
                if returned is not None and inspect.isawaitable(returned):
                    seat.returned = returned
                    return
            except BaseException as error:  # noqa: BLE001  # the task that waits for this thread knows what to do
                seat.fail(error)
                return
            if not seat.end():
                return
            self._tell(job, handler, begun=True)

    def _next(self, seat: Seat) -> Job | None:
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

    def _wait(self, seat: Seat) -> None:
        with self._lock:
            if seat.coming:
                seat.coming = self._coming = False
            if self.jobs or self.closed:
                return
            self._waiting.append(seat)
            self.lane.running -= 1
        if self.lane.ready:
            self._room(self.lane)
        seat.bell.acquire()
        seat.coming = True

    def _tell(self, job: Job, handler: Handler, *, begun: bool) -> None:
        self.done.append((job, begun))
        if self.collecting:
            return
        # In batches, as acks go: when a part of the prefetch is done, or nothing is left to do (else within a second);
        # at once where another is parked, whose turn it is now.
        lane = self.lane
        if not self.jobs or len(self.done) > lane.ack_batch or lane.parked.get(handler.name):
            self.collecting = True
            self._collect(self)
