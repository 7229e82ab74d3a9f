"""One delivery's whole story: arrived, decoded, handled, decided, settled.

`QueueRunner` runs the handlers of one queue in the event loop. Deliveries come from `consumer.Consumer`; what is
settled goes back to `connection.ConsumerConnection`, which acks it.
"""

from __future__ import annotations

import contextvars
import logging
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import attrs

from lightbus import errors
from lightbus.consuming.connection import ConsumerConnection
from lightbus.consuming.consumer import Consumer
from lightbus.consuming.coroutines import (
    TaskClosed,
    cancel_requests,
    forget_cancellation,
    is_interrupt,
    make_loop_known_in,
    run_in_context,
)
from lightbus.consuming.failure import Failures, Result
from lightbus.consuming.routes import Routes
from lightbus.consuming.slots import TaskSlot, ThreadSlot, cancelled_error, described, fields, timeout_error
from lightbus.consuming.subscription import HandlerRun, PendingHandlers
from lightbus.consuming.tasks import HandlerTasks
from lightbus.consuming.threads import Pool
from lightbus.consuming.turns import Turns
from lightbus.transport import Delivery
from lightbus.wire import codec

logger = logging.getLogger("lightbus")

CHECKPOINT_EVERY = 16
"""Deliveries that one task handles before it lets others run, though no handler ever waited."""
NO_THREAD_PAUSE = 1.0
"""Seconds until a thread is tried again, where none could be started."""


class QueueRunner:
    """Runs the handlers of one queue, and settles each delivery with what becomes of it. Owned by the event loop."""

    def __init__(self, app: str, consumer: Consumer, connection: ConsumerConnection, failures: Failures) -> None:
        self.consumer = consumer
        self.subscription = consumer.subscription
        self.routes = Routes(app, self.subscription.config)
        self.turns = Turns(self.subscription)
        self.pool = Pool(self.subscription, self.turns, self)
        self.slots: set[TaskSlot] = set()
        """What runs now. Other threads read it: see `timeouts.copied`."""
        self.handled = 0
        """Deliveries that a handler ended with, successfully or not, since the start."""
        self._concurrency = self.subscription.config.concurrency
        self._connection = connection
        self.failures = failures

    def begin(self, tasks: HandlerTasks) -> None:
        """The worker starts: handlers run in these tasks."""
        self.tasks = tasks
        self._context = tasks.context

    # --- what arrives

    def receive(self, batch: list[Delivery]) -> None:
        """Find each delivery's handlers, and let a task, or a thread, handle what is ready."""
        if self.tasks.stopping:
            return
        turns, known, find = self.turns, self.routes.known, self.routes.find
        for delivery in batch:
            handlers = known.get((delivery.exchange, delivery.routing_key)) or find(delivery)
            if not handlers:
                turns.ready.append((delivery, None, None))
                continue
            pending = PendingHandlers(len(handlers)) if len(handlers) > 1 else None
            for handler in handlers:
                run = (delivery, handler, pending)
                if handler.is_async:
                    turns.ready.append(run)
                elif handler.concurrency is None or turns.take(handler, run):
                    turns.plain.append(run)
        self.pool.call()
        self.start_tasks(1)

    def start_tasks(self, most: int | None = None) -> None:
        """One task handles what is ready, one after the other, until a handler has to wait: then the others come, as
        many as there is work and room for. So handlers that never wait cost one task per batch: a third of the CPU
        less (`make bench CASE=consume`), since a task costs more than an event.
        """
        ready = len(self.turns.ready)
        if ready:
            for _ in range(self.pool.take_room(min(most or self._concurrency, ready))):
                self.tasks.start(self._work)

    # --- tasks

    async def _work(self, left: TaskSlot | None = None) -> None:
        """Handle what is ready until there is nothing left; before that, what another task has left."""
        ready, tasks, handled, cancelled = self.turns.ready, self.tasks, 0, cancel_requests()
        shield = anyio.CancelScope()
        slot = TaskSlot(self.subscription, anyio.CancelScope(), shield=shield)
        handed_on = False
        try:
            if left is not None and not left.again:
                self.start_tasks()
                await self._decide(left)  # out here, where no timeout can cut it short
            self.slots.add(slot)
            try:
                with slot.scope, shield:
                    if left is not None and left.again and left.run is not None and not tasks.ends():
                        slot.run, handled = left.run, 1
                        await self.process(slot, left.run, left.context)
                    # Not after its time was over, though that handler ended well: the next one would be cancelled.
                    while ready and slot.run is None and not slot.scope.cancel_called and not cancelled():
                        run = ready.popleft()
                        if not self.turns.may_run(run):
                            continue
                        slot.run = run
                        handled += 1
                        await self.process(slot, run)
                        if handled % CHECKPOINT_EVERY == 0:
                            await anyio.lowlevel.checkpoint()
            except anyio.get_cancelled_exc_class() as error:
                if tasks.ends():
                    raise
                slot.error = error
            finally:
                self.slots.discard(slot)
            if slot.run is not None and not tasks.ends():
                self._judge(slot, cancelled=cancelled() > 0, first=handled == 1)
            while cancelled() and not tasks.ends():
                await forget_cancellation()
            handed_on = self._hand_on(slot)
        finally:
            if not handed_on:
                self.pool.give_room()
                tasks.one_less()

    async def process(self, slot: TaskSlot, run: HandlerRun, context: contextvars.Context | None = None) -> None:
        """Decode, handle, settle; a failure stays in the slot, to be decided on."""
        delivery, handler, _ = run
        try:
            if handler is None:
                raise self.routes.why_none(delivery)
            arguments = handler.arguments(delivery)
            if context is None:
                context = self._context.copy()
            context.run(codec.current_run.set, run)
            slot.deadline = time.monotonic() + handler.timeout
            slot.coroutine = handler.function(*arguments)
            await run_in_context(context, slot.coroutine, self.start_tasks)
        except (anyio.get_cancelled_exc_class(), TaskClosed):
            slot.seconds = slot.elapsed()
            raise  # what cancelled it can be seen outside of the slot's scope
        except BaseException as error:
            if is_interrupt(error):
                raise
            slot.error, slot.seconds = error, slot.elapsed()
        else:
            if not slot.left_behind:
                slot.run = None
                self.accept(run)
        finally:
            slot.deadline = math.inf

    def _hand_on(self, slot: TaskSlot) -> bool:
        """Whether another task gets this one's room. The task itself is not used any further where anything is left:
        its handler may have cancelled it, now or for later.
        """
        if slot.left_behind:  # another task got the room when that was decided
            self.pool.ended(slot, slot.error)
            return True
        if (slot.run is None and not self.turns.ready) or self.tasks.ends():
            return False
        self.tasks.group.start_soon(self._work, None if slot.run is None else slot)
        return True

    def _judge(self, slot: TaskSlot, *, cancelled: bool, first: bool) -> None:
        """What left a run unfinished: its handler, or an earlier handler that has cancelled the task that they share.
        In that case a new task starts the run again, which only the handler itself can cancel.
        """
        assert slot.run is not None
        if slot.late is not None:
            slot.error = None
        elif cancelled and not first:
            slot.again = True
            logger.warning(
                "The %s was interrupted: its task was cancelled, most likely by a timer of an earlier handler in the "
                "same task. The handler runs again.",
                described(self.subscription, slot.run),
                extra=fields(self.subscription, slot.run),
            )
        elif slot.error is not None and errors.is_a(slot.error, anyio.get_cancelled_exc_class()):
            slot.error = cancelled_error(slot, cancelled, slot.error)

    # --- threads, for sync handlers

    def start_thread(self) -> None:
        """From any thread, as the two below: see `threads.PoolOwner`."""
        self.tasks.from_thread(self._start_thread)

    def collect_done(self) -> None:
        self.tasks.from_thread(self.collect)

    def room_is_free(self) -> None:
        self.tasks.from_thread(self._use_room)

    def _start_thread(self) -> None:
        if not self.tasks.stopping:
            self.tasks.start(self._work_in_thread)

    def _use_room(self) -> None:
        if not self.tasks.stopping:
            self.start_tasks(1)

    def collect(self) -> None:
        """Settle what the threads are done with."""
        pool = self.pool
        pool.collecting = False  # first: what is done after this asks again
        while pool.done:
            run, begun = pool.done.popleft()
            if begun:
                self.accept(run)
            else:
                self._release(run)

    async def _work_in_thread(self) -> None:
        """Lend a thread to the pool until it closes; what the thread leaves in its slot is decided on here."""
        pool, tasks = self.pool, self.tasks
        called, handed_on = True, False
        try:
            while not pool.closed:
                slot = ThreadSlot(self.subscription, anyio.CancelScope(), called=called)
                self.slots.add(slot)
                try:
                    with slot.scope:
                        await anyio.to_thread.run_sync(
                            pool.serve, slot, abandon_on_cancel=True, limiter=_thread_limiter()
                        )
                except RuntimeError as error:
                    if slot.thread:
                        raise
                    logger.error(
                        "Cannot start a thread for the sync handlers of %r: %s. Trying again.",
                        self.subscription.name,
                        error,
                    )
                    await anyio.sleep(NO_THREAD_PAUSE)
                    continue
                finally:
                    self.slots.discard(slot)
                    self.collect()
                called = False
                if slot.returned is not None and slot.late is None:
                    # With this one's room.
                    tasks.group.start_soon(self._work, _left_to_await(slot))
                    handed_on = not pool.take_room(1)
                    if handed_on:
                        break
                    tasks.running += 1
                elif slot.run is not None:
                    await self._decide(slot)
                    if pool.full:  # then no further thread is available
                        break
        finally:
            if not handed_on:
                pool.give_room()
                tasks.one_less()
            if not tasks.stopping:
                self.start_tasks(1)

    # --- failures, and the end of a run

    def leave_behind(self, slot: TaskSlot) -> None:
        """Decide on the event of a handler that does not end, in another task, which gets its room."""
        if not self.pool.leave_behind(slot):
            return
        left = TaskSlot(self.subscription, slot.scope, run=slot.run, seconds=slot.elapsed())
        slot.left_behind, slot.run = True, None
        self.slots.discard(slot)
        self.tasks.group.start_soon(self._work, left)

    async def _decide(self, left: TaskSlot) -> None:
        """Act on a failure."""
        if self.tasks.ends():
            return
        assert left.run is not None
        seconds = left.elapsed() if left.seconds is None else left.seconds
        with self.tasks.deciding():
            await self.handle_failure(left.run, left.error or timeout_error(left.run), seconds)

    async def handle_failure(self, run: HandlerRun, error: BaseException, seconds: float | None) -> None:
        """Keep a copy of a failed delivery where it belongs, then settle it.

        Args:
            seconds: how long the handler ran; None where none did.
        """
        result, _ = await self.failures.handle(self.subscription, self.routes, run, error, self.tasks, seconds)
        self.conclude(run, result)

    def conclude(self, run: HandlerRun, result: Result) -> None:
        """Settle the delivery of a failed run."""
        if result is Result.REDELIVERED:
            self._release(run)
        else:
            self.settle(run, accepted=result is Result.KEPT)

    def settle(self, run: HandlerRun, *, accepted: bool = True) -> None:
        """This handler has ended with this delivery; when all have, it is acked (or rejected to the dead letters)."""
        delivery, handler, pending = run
        self.handled += 1
        if handler is not None and handler.concurrency is not None:
            self._release(run)
        if pending is not None:
            pending.unended -= 1
            pending.accepted &= accepted
            if pending.unended:
                return
            accepted = pending.accepted
        settled = self.subscription.settled
        settled.append((delivery, accepted))
        # Acks go in batches: when a part of the prefetch is settled, or nothing is left to do (else within a second).
        if len(settled) > self.subscription.ack_batch:
            self._connection.settle(self.consumer)
        elif not (self.turns.ready or self.pool.done):
            self._connection.settle_soon()

    accept = settle
    """The same where the handler has returned."""

    def _release(self, run: HandlerRun) -> None:
        """This run has ended: one that was parked for its handler's `concurrency` may start."""
        handler = run[1]
        if handler is not None and handler.concurrency is not None and self.turns.release(handler):
            self.pool.call()

    def let_go(self) -> None:
        """The worker ends now, for whatever reason: start nothing more, and let every handler be cancelled."""
        self.close()
        for slot in (*self.slots, *self.pool.left_behind):
            if slot.shield is not None:
                slot.shield.shield = False

    def close(self) -> None:
        """Start nothing more. What waits is delivered again."""
        self.turns.clear()
        self.pool.close()


def _left_to_await(slot: ThreadSlot) -> TaskSlot:
    """A plain function around an async one (mostly a decorator's) returns an awaitable: a task runs it."""
    assert slot.run is not None
    delivery, handler, pending = slot.run
    assert handler is not None
    assert slot.context is not None
    make_loop_known_in(slot.context)
    rest = attrs.evolve(
        handler,
        function=_awaits(slot.returned),
        arguments=_no_arguments,
        timeout=slot.deadline - time.monotonic(),
    )
    return TaskSlot(slot.subscription, slot.scope, run=(delivery, rest, pending), again=True, context=slot.context)


def _awaits(returned: Awaitable[Any]) -> Callable[[], Any]:
    async def rest() -> None:
        await returned

    return rest


def _no_arguments(delivery: Delivery) -> tuple[Any, ...]:
    return ()


_threads: anyio.lowlevel.RunVar[anyio.CapacityLimiter] = anyio.lowlevel.RunVar("lightbus_threads")


def _thread_limiter() -> anyio.CapacityLimiter:
    """anyio allows 40 threads by default; here a worker's `concurrency` limits them."""
    try:
        return _threads.get()
    except LookupError:
        limiter = anyio.CapacityLimiter(10_000)
        _threads.set(limiter)
        return limiter
