"""One delivery's whole story: arrived, decoded, handled, decided, settled.

`Dispatcher` belongs to the event loop and runs handlers. Deliveries come from `connection.ConsumerConnection`, which
owns the connection in a separate thread; their outcomes go back to it to be acked.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dis
import functools
import logging
import math
import signal
import threading
import time
import types
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Collection, Generator, Sequence
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel
import anyio.to_thread
import attrs

from lightbus import errors
from lightbus.connection.dial import BrokerAddresses
from lightbus.connection.loop_reader import current_loop
from lightbus.consuming import threads as pools
from lightbus.consuming.connection import ConsumerConnection, HandlerRun, PendingHandlers, Subscription
from lightbus.consuming.stall import SAY_AGAIN, LoopWatch
from lightbus.consuming.threads import Late, Pool, TaskSlot, ThreadSlot, described
from lightbus.handler import Handler
from lightbus.publishing.publisher import Publisher
from lightbus.retry import DeadLetter, Retry, RetryIn
from lightbus.transport import Delivery, Publication
from lightbus.wire import codec, topology
from lightbus.wire.topology import Topology

logger = logging.getLogger("lightbus")

CHECKPOINT_EVERY = 16
"""Deliveries that one task handles before it lets others run, though no handler ever waited."""
LAST_COPIES = 2.0
"""Seconds that copies of failed events which are on their way get to be confirmed, when the worker is cancelled."""
COPY_PAUSES = (0.2, 1.0, 5.0)
NO_THREAD_PAUSE = 1.0
RAISE = dis.opmap["RAISE_VARARGS"]
ROUTES = 10_000
"""Remembered (exchange, routing key) pairs; forgotten all at once when there are more."""


class Dispatcher:
    """Runs handlers for what arrives, and settles each delivery with what becomes of it."""

    def __init__(
        self,
        *,
        app: str,
        broker: BrokerAddresses,
        subscriptions: Sequence[Subscription],
        wanted: Topology,
        publisher: Publisher,
        retry: Retry,
    ) -> None:
        self.app = app
        self.subscriptions = subscriptions
        self.publisher = publisher
        self.unmatched_retry = retry
        """For events that no handler matches."""
        self._internal = topology.internal_name(app)
        self._connection = ConsumerConnection(broker, f"lightbus {app} consumer", wanted, subscriptions, self)
        for subscription in subscriptions:
            subscription.let_others_begin = functools.partial(self._start_tasks, subscription, subscription.concurrency)
        self._said_of_unmatched: dict[tuple[str, str, int], float] = {}
        self._pools = {
            subscription: Pool(
                subscription,
                start=functools.partial(self.from_thread, self._start_thread),
                collect=functools.partial(self.from_thread, self._collect),
                room=functools.partial(self.from_thread, self._use_room),
            )
            for subscription in subscriptions
        }
        self._slots: set[TaskSlot] = set()
        self._running = 0
        self._deciding: set[anyio.CancelScope] = set()
        self._stopping = False
        self._over = False
        """Handlers are being cancelled with the worker: what they had in hand is delivered again."""
        self._failure: errors.LightbusError | None = None
        self._unkept: dict[int, str] = {}
        """Why copies of failed deliveries could not be published so far, by the copy's identity."""
        self._of_others: Counter[str] = Counter()
        """Events of other apps than the handlers of their queue name, since the start, by the queue's name."""
        self.beat: float | None = None
        """When the event loop last ran, within the last second unless a handler blocks it (monotonic clock)."""
        self.handled = 0
        """Deliveries that a handler ended with, well or not, since the start."""

    # --- a worker's life

    async def run(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Consume until `stop` has been called. Started (see `TaskGroup.start`) once it is subscribed.

        Raises:
            errors.BrokerError: the first connection failed in a way that trying again will not mend.
            errors.WorkerError: nothing arrives though events wait, and connecting again did not help; or a handler has
                cancelled the tasks around its own.
        """
        loop = current_loop()
        self._schedule = loop.soon_from_thread
        self._context = _context_of_callbacks()  # handlers see what the worker's lifespan has set
        # Without another function in between: it is called for each batch.
        self._connection.hand_over = functools.partial(self._schedule, self._context.run, self.receive)
        self._connection.hand_over_here = functools.partial(loop.soon, self._context.run, self.receive)
        self._connection.let_loop_read(loop)
        self._cancelled = _cancel_requests()
        self._cancelled_before = self._cancelled()
        self._ready = anyio.Event()
        self._drained = anyio.Event()
        self._ended = anyio.Event()
        self._idle = anyio.Event()
        timeouts = [one.timeout for subscription in self.subscriptions for one in subscription.handlers.values()]
        self._tick = max(0.02, min(1.0, min(timeouts, default=60.0) / 10))
        self.beat = time.monotonic()
        watch = LoopWatch(self._due, self._handler_that_runs)
        try:
            async with anyio.create_task_group() as self._tasks:
                try:
                    self._tasks.start_soon(self._watch_timeouts)
                    self._connection.ensure_started()
                    await self._ready.wait()
                    if self._failure is None:
                        task_status.started()
                        await self._ended.wait()
                finally:  # before any handler is cancelled, whatever the reason
                    self._let_go()
                self._tasks.cancel_scope.cancel()
        finally:
            watch.stop()
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(self._connection.stop, 5.0)
        if self._failure is not None:
            raise self._failure
        if not self._ended.is_set():
            raise errors.WorkerError(
                f"The worker of {self.app!r} was cancelled from inside, most likely by a handler that cancelled other "
                "tasks. Unacknowledged events will be redelivered."
            )

    def _let_go(self) -> None:
        """Nothing is decided on any more, but for failures whose copies are on their way."""
        self._stopping = self._over = True
        for subscription in self.subscriptions:
            subscription.ready.clear()
            self._pools[subscription].close()
            for slot in (*self._slots, *self._pools[subscription].left_behind):
                if slot.shield is not None:
                    slot.shield.shield = False
        for scope in self._deciding:
            scope.deadline = anyio.current_time() + LAST_COPIES

    def _ends(self) -> bool:
        """Whether the worker itself is being cancelled. To be asked outside of a slot's own scope."""
        return (
            self._over
            or self._cancelled() > self._cancelled_before  # asyncio cancels all tasks: this one notices first
            or anyio.current_effective_deadline() == -math.inf
        )

    async def stop(self, grace: float) -> bool:
        """Take no more, let handlers in flight end for up to `grace` seconds, settle, disconnect.

        Returns whether all of them ended; the others' events are delivered again, to another consumer.
        """
        deadline = anyio.current_time() + grace
        self._stopping = True
        self._connection.draining = True
        self._connection.wake()
        with anyio.CancelScope(deadline=min(deadline, anyio.current_time() + 5.0)):
            if self._connection.connection is not None:
                await self._drained.wait()
        for subscription in self.subscriptions:
            subscription.ready.clear()
            subscription.parked.clear()
            self._pools[subscription].close()
        if not self._running:
            self._idle.set()
        with anyio.CancelScope(deadline=deadline):
            await self._idle.wait()
        all_ended = not self._running
        self._ended.set()
        return all_ended

    @property
    def in_flight(self) -> list[str]:
        """The names of the handlers that are running now."""
        return [slot.job[1].name for slot in self._slots if slot.job is not None and slot.job[1] is not None]

    @property
    def connected(self) -> bool:
        return self._connection.connection is not None and all(
            subscription.consumer_tag for subscription in self.subscriptions
        )

    @property
    def read_by_loop(self) -> bool:
        """Whether the event loop reads the connection itself now."""
        return self._connection.read_by_loop

    # --- state, read from other threads

    @property
    def connection_state(self) -> tuple[str, str | None]:
        """ "connected", or "disconnected" and why."""
        error = self._connection.error
        if self._connection.connection is not None and error is None:
            return "connected", None
        return "disconnected", None if error is None else str(error)

    @property
    def reading(self) -> bool:
        """Whether the thread lives that owns the connection."""
        return self._connection.alive

    @property
    def unkept(self) -> tuple[int, str | None]:
        """How many failed deliveries wait for their copy to be published, after at least one error; the last error."""
        reasons = [*self._unkept.copy().values()]
        return len(reasons), reasons[-1] if reasons else None

    def running(self, now: float) -> list[tuple[str, float]]:
        """The handlers that are running now, and for how many seconds each."""
        jobs = [(slot.job, slot.deadline) for slot in _copied(self._slots)]
        return [
            (job[1].name, max(0.0, now - deadline + job[1].timeout))
            for job, deadline in jobs
            if job is not None and job[1] is not None and deadline < math.inf
        ]

    def late(self, subscription: Subscription) -> tuple[list[Late], list[Late]]:
        """The handlers that run on though their time is over: those that hold their place, and those left behind."""
        holding = [
            slot.late for slot in _copied(self._slots) if slot.subscription is subscription and slot.late is not None
        ]
        return holding, self._pools[subscription].all_left_behind()

    def threads_are_short(self, subscription: Subscription) -> bool:
        """Whether plain handlers wait, as the threads for them are busy with handlers that are left behind."""
        pool = self._pools[subscription]
        return bool(pool.full and pool.jobs)

    # --- called by the subscriber's thread, run in the event loop

    def from_thread(self, function: Callable[..., object], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended: what was in hand is delivered again
            self._schedule(self._context.run, function, *arguments)

    def subscribed(self) -> None:
        self._ready.set()

    def cancelled(self) -> None:
        self._drained.set()

    def give_up(self, error: errors.LightbusError) -> None:
        self._failure = error
        self._ready.set()
        self._ended.set()

    def receive(self, subscription: Subscription, batch: list[Delivery]) -> None:
        """Find each delivery's handlers, and see to it that a task, or a thread, handles what is ready."""
        if self._stopping:
            return
        ready = subscription.ready
        for delivery in batch:
            handlers = subscription.routes.get((delivery.exchange, delivery.routing_key)) or self._route(
                subscription, delivery
            )
            if not handlers:
                ready.append((delivery, None, None))
                continue
            siblings = PendingHandlers(len(handlers)) if len(handlers) > 1 else None
            for handler in handlers:
                if handler.is_async:
                    ready.append((delivery, handler, siblings))
                elif handler.concurrency is None or self._takes_turn(
                    subscription, handler, (delivery, handler, siblings)
                ):
                    self._pools[subscription].jobs.append((delivery, handler, siblings))
        self._pools[subscription].call()
        self._start_tasks(subscription, most=1)

    def _start_tasks(self, subscription: Subscription, most: int) -> None:
        """One task handles what is ready, one after the other, until a handler has to wait: then the others come, as
        many as there is work and room for. So handlers that never wait cost one task a batch: a third of the CPU less
        (`make bench CASE=consume`), since a task costs more than an event.
        """
        if subscription.ready:
            for _ in range(self._pools[subscription].take_room(min(most, len(subscription.ready)))):
                self._running += 1
                self._tasks.start_soon(self._work, subscription)

    def _use_room(self, subscription: Subscription) -> None:
        """A thread has left its room to a task."""
        if not self._stopping:
            self._start_tasks(subscription, most=1)

    def _start_thread(self, pool: Pool) -> None:
        if not self._stopping:
            self._running += 1
            self._tasks.start_soon(self._work_in_thread, pool)

    def _route(self, subscription: Subscription, delivery: Delivery) -> tuple[Handler, ...]:
        """The handlers for this delivery. Remembered by exchange and routing key, except for retried copies."""
        try:
            envelope = codec.read_envelope(self.app, delivery)
        except errors.DecodeError:
            return ()  # which handler it was for cannot be known: it ends with the unmatched
        if not envelope.verified:
            return ()
        if envelope.handler is not None:
            handler = subscription.handlers.get(envelope.handler)
            return () if handler is None else (handler,)
        handlers = tuple(
            handler for handler in subscription.handlers.values() if handler.matches(envelope.source, envelope.event)
        )
        if delivery.exchange not in ("", self._internal):
            if len(subscription.routes) >= ROUTES:
                subscription.routes.clear()
            subscription.routes[delivery.exchange, delivery.routing_key] = handlers
        return handlers

    # --- tasks

    async def _work(self, subscription: Subscription, left: TaskSlot | None = None) -> None:
        """Handle what is ready until there is nothing left; before that, what another task has left."""
        ready, handled, cancelled = subscription.ready, 0, _cancel_requests()
        shield = anyio.CancelScope()
        slot = TaskSlot(subscription, anyio.CancelScope(), shield=shield)
        handed_on = False
        try:
            if left is not None and not left.again:
                self._start_tasks(subscription, len(ready))
                await self._decide(left)  # out here, where no timeout can cut it short
            self._slots.add(slot)
            try:
                with slot.scope, shield:
                    if left is not None and left.again and left.job is not None and not self._ends():
                        slot.job, handled = left.job, 1
                        await self.process(slot, left.job, left.context)
                    # Not after its time was over, though that handler ended well: the next one would be cancelled.
                    while ready and slot.job is None and not slot.scope.cancel_called and not cancelled():
                        job = ready.popleft()
                        if not self._may_run(subscription, job):
                            continue
                        slot.job = job
                        handled += 1
                        await self.process(slot, job)
                        if handled % CHECKPOINT_EVERY == 0:
                            await anyio.lowlevel.checkpoint()
            except anyio.get_cancelled_exc_class() as error:
                if self._ends():
                    raise
                slot.error = error
            finally:
                self._slots.discard(slot)
            if slot.job is not None and not self._ends():
                self._judge(slot, cancelled=cancelled() > 0, first=handled == 1)
            while cancelled() and not self._ends():
                await _forget_cancellation()
            handed_on = self._hand_on(slot)
        finally:
            if not handed_on:
                self._pools[subscription].give_room()
                self._one_less()

    def _hand_on(self, slot: TaskSlot) -> bool:
        """Whether another task gets this one's room. It is not used any further itself where anything is left: its
        handler may have cancelled it, now or for later.
        """
        if slot.left_behind:  # one got it when that was decided
            self._pools[slot.subscription].ended(slot, slot.error)
            return True
        if (slot.job is None and not slot.subscription.ready) or self._ends():
            return False
        self._tasks.start_soon(self._work, slot.subscription, None if slot.job is None else slot)
        return True

    def _judge(self, slot: TaskSlot, *, cancelled: bool, first: bool) -> None:
        """Whose fault it is that a job is left: the handler's, or that of one before it, which has cancelled the task
        that they share. A new task runs the job again then, which nothing but the handler itself can cancel.
        """
        assert slot.job is not None
        if slot.late is not None:
            slot.error = None
        elif cancelled and not first:
            slot.again = True
            logger.warning(
                "The %s was interrupted: its task was cancelled, most likely by a timer of an earlier handler in the "
                "same task. The handler runs again.",
                described(slot.subscription, slot.job),
            )
        elif slot.error is not None and errors.is_a(slot.error, anyio.get_cancelled_exc_class()):
            slot.error = _cancelled_error(slot, cancelled, slot.error)

    async def _decide(self, left: TaskSlot) -> None:
        """Act on a failure. Where the worker is cancelled meanwhile, a copy that is on its way may still be confirmed:
        else the event would come twice.
        """
        if self._ends():
            return
        assert left.job is not None
        with anyio.CancelScope(shield=True) as scope:
            self._deciding.add(scope)
            try:
                await self._handle_failure(left.subscription, left.job, left.error or _timeout_error(left.job))
            finally:
                self._deciding.discard(scope)

    async def _work_in_thread(self, pool: Pool) -> None:
        """Lend a thread to the pool until it closes; what the thread leaves in its seat is decided on here."""
        coming, handed_on = True, False
        try:
            while not pool.closed:
                seat = ThreadSlot(pool.subscription, anyio.CancelScope(), coming=coming)
                self._slots.add(seat)
                try:
                    with seat.scope:
                        await anyio.to_thread.run_sync(
                            pool.serve, seat, abandon_on_cancel=True, limiter=_thread_limiter()
                        )
                except RuntimeError as error:
                    if seat.thread:
                        raise
                    logger.error(
                        "Cannot start a thread for the sync handlers of %r: %s. Trying again.",
                        pool.subscription.name,
                        error,
                    )
                    await anyio.sleep(NO_THREAD_PAUSE)
                    continue
                finally:
                    self._slots.discard(seat)
                    self._collect(pool)
                coming = False
                if seat.returned is not None and seat.late is None:
                    # With this one's room.
                    self._tasks.start_soon(self._work, pool.subscription, self._left_to_await(seat))
                    handed_on = not pool.take_room(1)
                    if handed_on:
                        break
                    self._running += 1
                elif seat.job is not None:
                    await self._decide(seat)
                    if pool.full:  # then no further thread is to be had
                        break
        finally:
            if not handed_on:
                pool.give_room()
                self._one_less()
            if not self._stopping:
                self._start_tasks(pool.subscription, most=1)

    def _left_to_await(self, seat: ThreadSlot) -> TaskSlot:
        """A plain function around an async one (a decorator's, mostly) returns what is yet to be run."""
        assert seat.job is not None
        delivery, handler, siblings = seat.job
        assert handler is not None
        left = seat.deadline - time.monotonic()
        assert seat.context is not None
        _make_loop_known_in(seat.context)
        rest = attrs.evolve(handler, function=_awaits(seat.returned), arguments=_nothing, timeout=left)
        return TaskSlot(seat.subscription, seat.scope, job=(delivery, rest, siblings), again=True, context=seat.context)

    def _one_less(self) -> None:
        self._running -= 1
        if self._stopping and not self._running:
            self._idle.set()

    def _collect(self, pool: Pool) -> None:
        """Settle what the threads are done with."""
        pool.collecting = False  # first: what is done after this asks again
        while pool.done:
            job, begun = pool.done.popleft()
            if begun:
                self._settle(pool.subscription, job)
            else:
                self._release(pool.subscription, job[1])

    async def process(self, slot: TaskSlot, job: HandlerRun, context: contextvars.Context | None = None) -> None:
        """Decode, handle, settle; a failure stays in the slot, to be decided on."""
        delivery, handler, _ = job
        try:
            if handler is None:
                raise self._no_handler(slot.subscription, delivery)
            arguments = handler.arguments(delivery)
            if context is None:
                context = self._context.copy()
            context.run(codec.current_delivery.set, delivery)
            slot.deadline = time.monotonic() + handler.timeout
            slot.coroutine = handler.function(*arguments)
            await run_in_context(context, slot.coroutine, slot.subscription.let_others_begin)
        except (anyio.get_cancelled_exc_class(), TaskClosed):
            raise  # whose doing that is can be seen outside of the slot's scope
        except BaseException as error:
            if _is_interrupt(error):
                raise
            slot.error = error
        else:
            if not slot.left_behind:
                slot.job = None
                self._settle(slot.subscription, job)
        finally:
            slot.deadline = math.inf

    def _may_run(self, subscription: Subscription, job: HandlerRun) -> bool:
        """Whether the job's turn has come. A handler's own `concurrency` may park it; others go first."""
        delivery, handler, _ = job
        if handler is None or handler.concurrency is None:
            return delivery.channel in subscription.channels  # else its epoch has ended, and it comes again
        if delivery.channel not in subscription.channels:
            self._unpark(subscription, handler)
            return False
        return self._takes_turn(subscription, handler, job)

    def _takes_turn(self, subscription: Subscription, handler: Handler, job: HandlerRun) -> bool:
        assert handler.concurrency is not None
        running = subscription.running_of.get(handler.name, 0)
        if running >= handler.concurrency:
            subscription.parked.setdefault(handler.name, deque()).append(job)
            return False
        subscription.running_of[handler.name] = running + 1
        return True

    def _unpark(self, subscription: Subscription, handler: Handler) -> None:
        parked = subscription.parked.get(handler.name)
        if not parked:
            return
        if handler.is_async:
            subscription.ready.appendleft(parked.popleft())
        else:
            subscription.running_of[handler.name] += 1
            self._pools[subscription].jobs.appendleft(parked.popleft())
            self._pools[subscription].call()

    def _settle(self, subscription: Subscription, job: HandlerRun, *, accepted: bool = True) -> None:
        """This handler has ended with this delivery; when all have, it is acked (or rejected to the dead letters)."""
        delivery, handler, siblings = job
        self.handled += 1
        self._release(subscription, handler)
        if siblings is not None:
            siblings.unended -= 1
            siblings.accepted &= accepted
            if siblings.unended:
                return
            accepted = siblings.accepted
        subscription.settled.append((delivery, accepted))
        # Acks go in batches: when a part of the prefetch is settled, or nothing is left to do (else within TICK).
        if len(subscription.settled) > subscription.ack_batch:
            self._connection.settle(subscription)
        elif not (subscription.ready or self._pools[subscription].done):
            self._connection.settle_soon()

    def _release(self, subscription: Subscription, handler: Handler | None) -> None:
        """This handler has ended: one that was parked for its `concurrency` may begin."""
        if handler is not None and handler.concurrency is not None:
            subscription.running_of[handler.name] -= 1
            self._unpark(subscription, handler)

    # --- handlers over their time

    async def _watch_timeouts(self) -> None:
        """Cancel handlers that are over their time. One look at all slots costs less than a timer for each event."""
        while True:
            await anyio.sleep(self._tick)
            self.beat = now = time.monotonic()
            for pool in self._pools.values():
                self._collect(pool)
            late = [slot for slot in self._slots if slot.give_up(now)]
            if late or any(pool.left_behind for pool in self._pools.values()):
                await self._end_late(late, now)

    async def _end_late(self, late: list[TaskSlot], now: float) -> None:
        for slot in late:
            if isinstance(slot, ThreadSlot):
                slot.cancel(now)
                self._pools[slot.subscription].leave_behind(slot)
        in_the_loop = [slot for slot in late if not isinstance(slot, ThreadSlot)]
        left_behind = [
            slot
            for pool in self._pools.values()
            for slot in _copied(pool.left_behind)
            if not isinstance(slot, ThreadSlot)
        ]
        await self._cancel(in_the_loop + left_behind, now)
        if self._stopping:
            return
        for slot in in_the_loop:
            if slot.job is not None and slot.late is not None and now - slot.late.since > pools.STUCK:
                self._leave_behind(slot)
                self._say_stuck(slot, slot.late, now)
        for pool in self._pools.values():
            for slot, since in list(pool.left_behind.items()):
                if now - since.since > pools.STUCK:
                    self._say_stuck(slot, since, now)

    async def _cancel(self, slots: list[TaskSlot], now: float) -> None:
        """Cancel them for one round of the event loop; without a limit, it would do so in each round until they end."""
        cancelled = [slot for slot in slots if slot.cancel(now)]
        if cancelled:
            await anyio.lowlevel.checkpoint()
            for slot in cancelled:
                slot.rest()

    def _leave_behind(self, slot: TaskSlot) -> None:
        """Decide on the event of a handler that does not end, in another task, which gets its room."""
        if not self._pools[slot.subscription].leave_behind(slot):
            return
        left = TaskSlot(slot.subscription, slot.scope, job=slot.job)
        slot.left_behind, slot.job = True, None
        self._slots.discard(slot)
        self._tasks.start_soon(self._work, slot.subscription, left)

    def _say_stuck(self, slot: TaskSlot, late: Late, now: float) -> None:
        if now - late.said_at < SAY_AGAIN:
            return
        late.said_at = now
        if not slot.left_behind:
            became = (
                "Its event stays unacknowledged and it still counts towards the worker's concurrency, because "
                f"{self._pools[slot.subscription].limit} handlers of this queue already run past their timeout"
            )
        elif isinstance(slot, ThreadSlot):
            became = "Its event has failed; the thread cannot be stopped"
        else:
            became = "Its event has failed; the handler did not end when it was cancelled"
        logger.error(
            "The %s exceeded its timeout of %g s and is still running %.0f s later. %s. It is at:\n%s",
            late.what,
            late.timeout,
            now - late.since,
            became,
            slot.stack() or "  (unknown)",
        )

    def _due(self) -> float:
        return (self.beat or math.inf) + self._tick

    def _handler_that_runs(self) -> str | None:
        """The handler that the event loop is running right now. From another thread."""
        for slot in _copied(self._slots):
            job = slot.job
            if job is None or isinstance(slot, ThreadSlot):
                continue
            decoding = slot.deadline == math.inf  # it has no deadline yet
            if decoding or getattr(slot.coroutine, "cr_running", False):
                return described(slot.subscription, job)
        return None

    # --- what becomes of a failure

    def _no_handler(self, subscription: Subscription, delivery: Delivery) -> errors.NoHandler:
        envelope = codec.read_envelope(self.app, delivery)
        if not envelope.verified:
            return codec.moved_by_hand(self.app, delivery, subscription.name)
        if envelope.handler is not None:
            return errors.NoHandler(
                f"the handler {envelope.handler!r}, whose retry this is, no longer exists. Deploy code that has this "
                "handler, then retry the dead letter."
            )
        own_queue = "" if subscription.suffix == topology.MAIN else f" --queue {subscription.suffix}"
        return errors.NoHandler(
            f"no handler of {self.app!r} on queue {subscription.name!r} handles {envelope.event!r} from "
            f"{envelope.source!r}. If the handler was removed, remove its binding too: lightbus unbind MODULE:ATTR "
            f"PATTERN{own_queue} (one that matches {envelope.event!r})"
        )

    async def _handle_failure(self, subscription: Subscription, job: HandlerRun, error: BaseException) -> None:
        """Decide what becomes of a failed delivery, keep a copy of it there, then settle it."""
        delivery, handler, _ = job
        attempt = self._attempt(delivery)
        policy = self.unmatched_retry if handler is None else handler.retry
        decision = policy.decide(errors.without_machinery(error), attempt)
        if handler is None and isinstance(decision, DeadLetter) and self._is_of_others(subscription, delivery):
            self._settle(subscription, job)
            return
        reason = errors.without_machinery(errors.without_groups(error))
        error = reason if errors.has_traceback(reason) else error  # what shows where it was
        name = None if handler is None else handler.name
        match decision:
            case RetryIn(delay, expiration):
                key = topology.retry_key(subscription.suffix, delay)
                shorter = expiration if expiration < delay else None
                properties = codec.copy_properties(self.app, delivery, name, attempt + 1, subscription.name, shorter)
            case DeadLetter(cause):
                key = topology.DEAD_KEY
                properties = codec.copy_properties(self.app, delivery, name, attempt, subscription.name)
                properties["headers"] |= codec.error_headers(cause, error)
                reason = cause
        failure = self._what_failed(subscription, delivery, handler, attempt, reason)
        copy = Publication(self._internal, key, delivery.body, properties)
        kept = None
        try:
            kept = await self._keep_copy(subscription, delivery, copy, failure)
        finally:  # not before it is true, and also where the worker ends meanwhile
            self._log(subscription, delivery, handler, attempt, decision, error, failure, kept)
        if kept is None:
            self._release(subscription, handler)
        else:
            self._settle(subscription, job, accepted=kept)

    def _is_of_others(self, subscription: Subscription, delivery: Delivery) -> bool:
        """Whether it is an event of another app than its queue is for: each handler names an app with `source=`, and
        one of them would have handled this event of the app that it names.

        That app can bind the bus, or another exchange that it may read, to its own exchange. Its listeners get others'
        events then, by their own bindings.
        """
        handlers = subscription.handlers.values()
        try:
            envelope = codec.read_envelope(self.app, delivery)
        except errors.DecodeError:
            return False
        if (
            not envelope.verified
            or envelope.handler is not None
            or not envelope.source
            or any(handler.source is None for handler in handlers)
        ):
            return False
        named = {handler.source for handler in handlers if handler.matches(handler.source or "", envelope.event)}
        if not named or envelope.source in named:
            return False
        self._of_others[subscription.name] += 1
        if self._is_news(subscription, "", 0):
            logger.warning(
                "%s: %r from %r was acknowledged without a handler (%d so far): all handlers of this queue name other "
                "apps with source=. Either the exchange of such an app (%s) is bound to another one, or a binding is "
                "left over: lightbus unbind MODULE:ATTR PATTERN",
                subscription.name,
                envelope.event,
                envelope.source,
                self._of_others[subscription.name],
                ", ".join(sorted(filter(None, named))),
            )
        return True

    async def _keep_copy(
        self, subscription: Subscription, delivery: Delivery, copy: Publication, failure: str
    ) -> bool | None:
        """Publish a copy with confirm. True: it is kept, so the delivery can be acked. False: the broker will not
        take the copy as it is, so that the delivery itself must be dead-lettered. None: leave it to be delivered again.

        A failure whose copy cannot be kept waits here and holds the slot: taking more that cannot be retried is no use.
        """
        pauses = iter(COPY_PAUSES)
        original = copy
        try:
            while delivery.channel in subscription.channels and not (self._stopping and self._ended.is_set()):
                try:
                    receipt = await self.publisher.publish(copy)
                except errors.PublishError as error:
                    if isinstance(error, errors.PublishRefused) and not isinstance(error, errors.PublisherRefused):
                        if codec.ERROR_TRACEBACK in copy.properties["headers"]:  # the largest that Lightbus adds
                            copy = _without_details(copy)
                            continue
                        logger.error("%s: the copy for %s was refused. %s", subscription.name, copy.routing_key, error)
                        return False
                    if isinstance(error.__cause__, errors.TopologyMissing):
                        self._connection.declare_again(f"the exchange {self._internal} no longer exists")
                    self._unkept[id(original)] = str(error)
                    logger.error(
                        "%s; its copy for %s.%s is not confirmed yet, trying again. %s",
                        failure,
                        self.app,
                        copy.routing_key,
                        error,
                    )
                else:
                    if receipt.routed:
                        return True
                    self._connection.declare_again(f"the queue {self.app}.{copy.routing_key} no longer exists")
                await anyio.sleep(next(pauses, COPY_PAUSES[-1]))
            return None
        finally:
            self._unkept.pop(id(original), None)

    def _attempt(self, delivery: Delivery) -> int:
        try:
            return codec.read_envelope(self.app, delivery).attempt
        except errors.DecodeError:
            return 1

    def _what_failed(
        self,
        subscription: Subscription,
        delivery: Delivery,
        handler: Handler | None,
        attempt: int,
        error: BaseException,
    ) -> str:
        message_id, _ = codec.read_cause(delivery)
        # What `lightbus dead show` finds it by. A stranger may have written it: it stays one line.
        shown = message_id if message_id.isprintable() else ascii(message_id)
        whose = "no handler for" if handler is None else f"{handler.name} failed on"
        said = errors.summary(error).rstrip(".")
        return f"{whose} {self._name(delivery)!r} ({shown}) in {subscription.name!r}, attempt {attempt}: {said}"

    def _log(
        self,
        subscription: Subscription,
        delivery: Delivery,
        handler: Handler | None,
        attempt: int,
        decision: RetryIn | DeadLetter,
        error: BaseException,
        failure: str,
        kept: bool | None,
    ) -> None:
        """Say what failed, and what has become of it."""
        # A left-over binding brings thousands of events that nothing handles: each is said once a while.
        quietly = handler is None and not self._is_news(subscription, self._name(delivery), attempt)
        trace = None
        match decision, kept:
            case _, None:
                level, became = logging.WARNING, "it will be redelivered, because no copy of it was confirmed"
            case RetryIn(delay, _), True:
                level, became = logging.WARNING, f"retry in {delay:g} s"
                if logger.isEnabledFor(logging.DEBUG):  # else the last attempt's will do: one trace an event
                    trace = error if errors.tells_where(error) else None
            case _, True:
                level, became = logging.ERROR, f"dead-lettered to {self.app}.dead"
                trace = error if errors.tells_where(error) else None
            case _:
                level = logging.ERROR
                became = f"to be dead-lettered to {self.app}.dead by the broker, which refused a copy of it"
        exc_info, frames = errors.for_log(trace)
        logger.log(logging.DEBUG if quietly else level, "%s; %s%s", failure, became, frames, exc_info=exc_info)

    def _is_news(self, subscription: Subscription, event: str, attempt: int) -> bool:
        """Whether to say (again) that nothing handles this event."""
        now, what = time.monotonic(), (subscription.name, event, attempt)
        if now - self._said_of_unmatched.get(what, -math.inf) < SAY_AGAIN:
            return False
        if len(self._said_of_unmatched) >= ROUTES:
            self._said_of_unmatched.clear()
        self._said_of_unmatched[what] = now
        return True

    def _name(self, delivery: Delivery) -> str:
        if delivery.exchange not in ("", self._internal):
            return delivery.routing_key
        try:
            return codec.read_envelope(self.app, delivery).event
        except errors.DecodeError:
            return delivery.routing_key


def _context_of_callbacks() -> contextvars.Context:
    """A copy of the context here, in which anyio finds its event loop outside of tasks too.

    Where sniffio is installed, anyio asks it alone; sniffio knows the loop by the task, which a callback does
    not have, or by a variable that `anyio.run` sets and `asyncio.run` does not.
    """
    context = contextvars.copy_context()
    _make_loop_known_in(context)
    return context


def _make_loop_known_in(context: contextvars.Context) -> None:
    with contextlib.suppress(ImportError):
        import sniffio

        context.run(sniffio.current_async_library_cvar.set, sniffio.current_async_library())


_threads: anyio.lowlevel.RunVar[anyio.CapacityLimiter] = anyio.lowlevel.RunVar("lightbus_threads")


def _thread_limiter() -> anyio.CapacityLimiter:
    """anyio allows 40 threads by default; here a worker's `concurrency` is what bounds them."""
    try:
        return _threads.get()
    except LookupError:
        limiter = anyio.CapacityLimiter(10_000)
        _threads.set(limiter)
        return limiter


def _without_details(copy: Publication) -> Publication:
    """A dead letter's copy without the texts of its error, so that the headers fit a frame."""
    headers = {
        key: value
        for key, value in copy.properties["headers"].items()
        if key not in (codec.ERROR_TRACEBACK, codec.ERROR_MESSAGE)
    }
    return attrs.evolve(copy, properties={**copy.properties, "headers": headers})


def _awaits(returned: Awaitable[Any]) -> Callable[[], Any]:
    async def rest() -> None:
        await returned

    return rest


def _nothing(delivery: Delivery) -> tuple[Any, ...]:
    return ()


def _cancelled_error(slot: TaskSlot, cancelled: bool, error: BaseException) -> errors.HandlerCancelled:
    assert slot.job is not None
    assert slot.job[1] is not None
    how = "cancelled its own task" if cancelled else "awaited something that was cancelled"
    made = errors.HandlerCancelled(
        f"handler {slot.job[1].name!r} {how} (CancelledError). "
        "For a time limit of its own, use asyncio.timeout or anyio.fail_after."
    )
    made.__cause__ = error
    return made.with_traceback(error.__traceback__)


def _timeout_error(job: HandlerRun) -> errors.HandlerTimeout:
    handler = job[1]
    assert handler is not None
    return errors.HandlerTimeout(
        f"handler {handler.name!r} ran longer than its timeout of {handler.timeout:g} s. "
        "Make it faster, split the work, or give it more time with timeout=SECONDS."
    )


def _copied(slots: Collection[TaskSlot]) -> list[TaskSlot]:
    """For another thread than the event loop's."""
    while True:
        with contextlib.suppress(RuntimeError):  # the loop changed it meanwhile: look again
            return list(slots)


def _cancel_requests() -> Callable[[], int]:
    """How often this task has been cancelled, by whom does not matter. Under trio, only scopes can be cancelled."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    return _never if task is None else task.cancelling


def _never() -> int:
    return 0


async def _forget_cancellation() -> None:
    """Let this task end well, though a handler has cancelled it: else asyncio would have the whole worker cancelled."""
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.sleep(0)  # one that was not delivered yet is delivered here
    task = asyncio.current_task()
    assert task is not None
    task.uncancel()


def _is_interrupt(error: BaseException) -> bool:
    """Whether a signal (Ctrl-C) has raised it, while a handler happened to run, and not the handler itself."""
    if not errors.is_a(error, KeyboardInterrupt) or threading.current_thread() is not threading.main_thread():
        return False
    on_signal: Any = signal.getsignal(signal.SIGINT)
    while isinstance(on_signal, functools.partial):
        on_signal = on_signal.func
    code = getattr(on_signal, "__code__", None)
    trace, last = error.__traceback__, None
    while trace is not None:
        if trace.tb_frame.f_code is code:
            return True
        trace, last = trace.tb_next, trace
    # Python's own handler leaves no frame: it is raised between two instructions, or within a call.
    return (
        last is not None
        and on_signal is signal.default_int_handler
        and last.tb_frame.f_code.co_code[last.tb_lasti] != RAISE
    )


class TaskClosed(GeneratorExit):
    """The task is closed, with what runs in it, as its event loop has ended."""


@types.coroutine
def run_in_context(
    context: contextvars.Context, coroutine: Any, before_it_waits: Callable[[], object]
) -> Generator[Any, Any, Any]:
    """Await a coroutine with its own context variables: as a separate task would, at a tenth of the cost.

    `before_it_waits` is called once, where it does not end without having to wait.
    """
    try:
        yielded = context.run(coroutine.send, None)
    except StopIteration as stop:
        return stop.value
    before_it_waits()
    step: Callable[..., Any]
    while True:
        try:
            value = yield yielded
        except GeneratorExit:
            coroutine.close()
            raise TaskClosed from None
        except BaseException as error:  # noqa: BLE001  # it is the coroutine's to handle
            step = functools.partial(coroutine.throw, error)
        else:
            step = functools.partial(coroutine.send, value)
        try:
            yielded = context.run(step)
        except StopIteration as stop:
            return stop.value
