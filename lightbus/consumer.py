"""One delivery's whole story: arrived, decoded, handled, decided, settled.

`Consumer` lives in the event loop and runs handlers. What it is given comes from `subscriber.Subscriber`, which owns
the connection in a thread of its own; what becomes of it goes back there to be acked.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import math
import time
import types
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any

import anyio
import anyio.abc
import attrs

from lightbus import codec, errors, topology
from lightbus.connection import Broker, current_loop
from lightbus.handler import Handler
from lightbus.publisher import Publisher
from lightbus.retry import DeadLetter, Retry, RetryIn
from lightbus.subscriber import Job, Lane, Siblings, Subscriber
from lightbus.topology import Topology
from lightbus.transport import Delivery, Publication

logger = logging.getLogger("lightbus")

CHECKPOINT_EVERY = 16
"""Deliveries that one task handles before it lets others run, though no handler ever waited."""
SAY_AGAIN = 60.0
"""Seconds between two warnings that the same event has no handler."""
COPY_PAUSES = (0.2, 1.0, 5.0)
ROUTES = 10_000
"""Remembered (exchange, routing key) pairs; forgotten all at once when there are more."""


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


class Consumer:
    """Runs handlers for what arrives, and settles each delivery with what becomes of it."""

    def __init__(
        self,
        *,
        app: str,
        broker: Broker,
        lanes: Sequence[Lane],
        wanted: Topology,
        publisher: Publisher,
        retry: Retry,
    ) -> None:
        self.app = app
        self.lanes = lanes
        self.publisher = publisher
        self.unmatched_retry = retry
        """For events that no handler matches."""
        self._internal = topology.internal_name(app)
        self._subscriber = Subscriber(broker, f"lightbus {app} consumer", wanted, lanes, self)
        self._said_of_unmatched: dict[tuple[str, str, int], float] = {}
        self._slots: set[Slot] = set()
        self._running = 0
        self._stopping = False
        self._failure: errors.LightbusError | None = None
        self.beat: float | None = None
        """When the event loop last ran, within the last second unless a handler blocks it (monotonic clock)."""
        self.handled = 0
        """Deliveries that a handler ended with, well or not, since the start."""

    # --- a worker's life

    async def run(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Consume until `stop` has been called. Started (see `TaskGroup.start`) once it is subscribed.

        Raises:
            errors.BrokerError: the first connection failed in a way that trying again will not mend.
            errors.WorkerError: nothing arrives though events wait, and connecting anew did not help.
        """
        self._schedule = current_loop().soon_from_thread
        self._context = _context_of_callbacks()  # handlers see what the worker's lifespan has set
        # Without a function of its own in between: it is called for each batch.
        self._subscriber.hand_over = functools.partial(self._schedule, self._context.run, self.receive)
        self._ready = anyio.Event()
        self._drained = anyio.Event()
        self._ended = anyio.Event()
        self._idle = anyio.Event()
        try:
            async with anyio.create_task_group() as self._tasks:
                self._tasks.start_soon(self._watch_timeouts)
                self._subscriber.ensure_started()
                await self._ready.wait()
                if self._failure is None:
                    task_status.started()
                    await self._ended.wait()
                self._tasks.cancel_scope.cancel()
        finally:
            self._stopping = True
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(self._subscriber.stop, 5.0)
        if self._failure is not None:
            raise self._failure

    async def stop(self, grace: float) -> bool:
        """Take no more, let handlers in flight end for up to `grace` seconds, settle, disconnect.

        Returns whether all of them ended; the others' events are delivered again, to whoever consumes then.
        """
        deadline = anyio.current_time() + grace
        self._stopping = True
        self._subscriber.draining = True
        self._subscriber.wake()
        with anyio.CancelScope(deadline=min(deadline, anyio.current_time() + 5.0)):
            if self._subscriber.connection is not None:
                await self._drained.wait()
        for lane in self.lanes:
            lane.ready.clear()
            lane.parked.clear()
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
        return self._subscriber.connection is not None and all(lane.consumer_tag for lane in self.lanes)

    # --- how it is, for whoever asks from another thread

    @property
    def connection_state(self) -> tuple[str, str | None]:
        """ "connected", or "disconnected" and why."""
        error = self._subscriber.error
        if self._subscriber.connection is not None and error is None:
            return "connected", None
        return "disconnected", None if error is None else str(error)

    @property
    def reading(self) -> bool:
        """Whether the thread lives that owns the connection."""
        return self._subscriber.alive

    def running(self, now: float) -> list[tuple[str, float]]:
        """The handlers that are running now, and for how many seconds each."""
        while True:
            with contextlib.suppress(RuntimeError):  # the loop changed the set meanwhile: look again
                jobs = [(slot.job, slot.deadline) for slot in self._slots]
                break
        return [
            (job[1].name, max(0.0, now - deadline + job[1].timeout))
            for job, deadline in jobs
            if job is not None and job[1] is not None and deadline < math.inf
        ]

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

    def receive(self, lane: Lane, batch: list[Delivery]) -> None:
        """Find each delivery's handlers, and start as many tasks as there is work and room for."""
        if self._stopping:
            return
        ready = lane.ready
        for delivery in batch:
            handlers = lane.routes.get((delivery.exchange, delivery.routing_key)) or self._route(lane, delivery)
            if len(handlers) == 1:
                ready.append((delivery, handlers[0], None))
            elif not handlers:
                ready.append((delivery, None, None))
            else:
                siblings = Siblings(len(handlers))
                ready.extend((delivery, handler, siblings) for handler in handlers)
        for _ in range(min(len(ready), lane.concurrency - lane.running)):
            lane.running += 1
            self._running += 1
            self._tasks.start_soon(self._work, lane)

    def _route(self, lane: Lane, delivery: Delivery) -> tuple[Handler, ...]:
        """The handlers for this delivery. Remembered by exchange and routing key, except for retried copies."""
        try:
            envelope = codec.read_envelope(self.app, delivery)
        except errors.DecodeError:
            return ()  # which handler it was for cannot be known: it ends with the unmatched
        if envelope.handler is not None:
            handler = lane.handlers.get(envelope.handler)
            return () if handler is None else (handler,)
        handlers = tuple(
            handler for handler in lane.handlers.values() if handler.hears(envelope.source, envelope.event)
        )
        if delivery.exchange != self._internal:
            if len(lane.routes) >= ROUTES:
                lane.routes.clear()
            lane.routes[delivery.exchange, delivery.routing_key] = handlers
        return handlers

    # --- tasks

    async def _work(self, lane: Lane) -> None:
        """Handle what is ready until there is nothing left."""
        ready, handled = lane.ready, 0
        try:
            while ready:
                slot = Slot(lane, anyio.CancelScope())
                self._slots.add(slot)
                try:
                    with slot.scope:
                        while ready and slot.job is None:
                            job = ready.popleft()
                            if not self._may_run(lane, job):
                                continue
                            slot.job = job
                            await self.process(slot, job)
                            handled += 1
                            if handled % CHECKPOINT_EVERY == 0:
                                await anyio.lowlevel.checkpoint()
                finally:
                    self._slots.discard(slot)
                if slot.job is not None:  # it failed: settled out here, where no timeout can cut it short
                    await self._conclude(lane, slot.job, slot.error or _timeout_error(slot.job))
        finally:
            lane.running -= 1
            self._running -= 1
            if self._stopping and not self._running:
                self._idle.set()

    async def process(self, slot: Slot, job: Job) -> None:
        """Decode, handle, settle; a failure stays in the slot, to be decided on."""
        delivery, handler, _ = job
        try:
            if handler is None:
                raise self._no_handler(slot.lane, delivery)
            arguments = handler.arguments(delivery)
            context = self._context.copy()
            context.run(codec.current_delivery.set, delivery)
            slot.deadline = time.monotonic() + handler.timeout
            await run_in_context(context, handler.function(*arguments))
        except (Exception, SystemExit, BaseExceptionGroup) as error:  # noqa: BLE001  # whatever the user's code raises
            slot.error = None if slot.scope.cancel_called else error
        except anyio.get_cancelled_exc_class() as error:
            if slot.scope.cancel_called or self._stopping:
                raise
            slot.error = error  # the handler's own doing: it awaited something that was cancelled
        else:
            slot.job = None
            self._settle(slot.lane, job)
        finally:
            slot.deadline = math.inf

    def _may_run(self, lane: Lane, job: Job) -> bool:
        """Whether the job's turn has come. A handler's own `concurrency` may park it; others go first."""
        delivery, handler, _ = job
        if handler is None or handler.concurrency is None:
            return delivery.channel is lane.channel  # else its epoch has ended, and it comes again
        if delivery.channel is not lane.channel:
            self._unpark(lane, handler)
            return False
        running = lane.running_of.get(handler.name, 0)
        if running >= handler.concurrency:
            lane.parked.setdefault(handler.name, deque()).append(job)
            return False
        lane.running_of[handler.name] = running + 1
        return True

    def _unpark(self, lane: Lane, handler: Handler) -> None:
        parked = lane.parked.get(handler.name)
        if parked:
            lane.ready.appendleft(parked.popleft())

    def _settle(self, lane: Lane, job: Job, *, accepted: bool = True) -> None:
        """This handler has ended with this delivery; when all have, it is acked (or rejected to the dead letters)."""
        delivery, handler, siblings = job
        self.handled += 1
        self._release(lane, handler)
        if siblings is not None:
            siblings.unended -= 1
            siblings.accepted &= accepted
            if siblings.unended:
                return
            accepted = siblings.accepted
        lane.settled.append((delivery, accepted))
        # Acks go in batches: when a part of the prefetch is settled, or nothing is left to do (else within TICK).
        if not lane.ready or len(lane.settled) > lane.prefetch // 4:
            self._subscriber.wake()

    def _release(self, lane: Lane, handler: Handler | None) -> None:
        """This handler has ended: one that was parked for its `concurrency` may begin."""
        if handler is not None and handler.concurrency is not None:
            lane.running_of[handler.name] -= 1
            self._unpark(lane, handler)

    async def _watch_timeouts(self) -> None:
        """Cancel handlers that are over their time. One look at all slots costs less than a timer for each event."""
        shortest = min((handler.timeout for lane in self.lanes for handler in lane.handlers.values()), default=60.0)
        while True:
            await anyio.sleep(max(0.02, min(1.0, shortest / 10)))
            self.beat = now = time.monotonic()
            for slot in list(self._slots):
                if slot.deadline < now:
                    slot.scope.cancel()

    # --- what becomes of a failure

    def _no_handler(self, lane: Lane, delivery: Delivery) -> errors.NoHandler:
        envelope = codec.read_envelope(self.app, delivery)
        if envelope.handler is not None:
            return errors.NoHandler(
                f"the handler {envelope.handler!r}, whose retry this is, is not there any more. "
                "Deploy the code that has it, or retry the dead letter once it is back."
            )
        own_queue = "" if lane.suffix == topology.MAIN else f" --queue {lane.suffix}"
        return errors.NoHandler(
            f"no handler of {self.app!r} on queue {lane.name!r} hears {envelope.event!r} from {envelope.source!r}. "
            "If the handler was removed, so must its binding be: "
            f"lightbus unbind MODULE:ATTR PATTERN{own_queue} (one that matches {envelope.event!r})"
        )

    async def _conclude(self, lane: Lane, job: Job, error: BaseException) -> None:
        """Decide what becomes of a failed delivery, keep a copy of it there, then settle it."""
        delivery, handler, _ = job
        attempt = self._attempt(delivery)
        policy = self.unmatched_retry if handler is None else handler.retry
        decision = policy.decide(error, attempt)
        self._log(lane, delivery, handler, attempt, decision, error)
        name = None if handler is None else handler.name
        match decision:
            case RetryIn(delay, expiration):
                key = topology.retry_key(lane.suffix, delay)
                shorter = expiration if expiration < delay else None
                properties = codec.copy_properties(self.app, delivery, name, attempt + 1, lane.name, shorter)
            case DeadLetter(cause):
                key = topology.DEAD_KEY
                properties = codec.copy_properties(self.app, delivery, name, attempt, lane.name)
                properties["headers"] |= codec.error_headers(cause)
        kept = await self._keep_copy(lane, delivery, Publication(self._internal, key, delivery.body, properties))
        if kept is None:
            self._release(lane, handler)
        else:
            self._settle(lane, job, accepted=kept)

    async def _keep_copy(self, lane: Lane, delivery: Delivery, copy: Publication) -> bool | None:
        """Publish a copy with confirm. True: it is kept, so the delivery can be acked. False: the broker will not
        take the copy as it is, so that the delivery itself must be dead-lettered. None: leave it to be delivered again.

        Whoever cannot keep a copy waits here, which holds the slot: taking more of what cannot be retried helps nobody.
        """
        pauses = iter(COPY_PAUSES)
        while delivery.channel is lane.channel and not (self._stopping and self._ended.is_set()):
            try:
                receipt = await self.publisher.publish(copy)
            except errors.PublishRefused as error:
                logger.error(
                    "%s: the copy for %s was refused; the broker dead-letters the event itself. %s",
                    lane.name,
                    copy.routing_key,
                    error,
                )
                return False
            except errors.PublishError as error:
                logger.error(
                    "%s: the copy for %s is not confirmed yet, trying again. %s", lane.name, copy.routing_key, error
                )
            else:
                if receipt.routed:
                    return True
                self._subscriber.end_epoch(f"the queue {self.app}.{copy.routing_key} is gone")
                return None
            await anyio.sleep(next(pauses, COPY_PAUSES[-1]))
        return None

    def _attempt(self, delivery: Delivery) -> int:
        try:
            return codec.read_envelope(self.app, delivery).attempt
        except errors.DecodeError:
            return 1

    def _log(
        self,
        lane: Lane,
        delivery: Delivery,
        handler: Handler | None,
        attempt: int,
        decision: RetryIn | DeadLetter,
        error: BaseException,
    ) -> None:
        event = self._event(delivery) if delivery.exchange == self._internal else delivery.routing_key
        what = f"{event!r} in {lane.name!r}"
        who = "no handler" if handler is None else handler.name
        said = f"{type(error).__name__}: {errors.words(error)}"
        # A left-over binding brings thousands of events that nothing handles: each is said once a while.
        quietly = handler is None and not self._is_news(lane, event, attempt)
        match decision:
            case RetryIn(delay, _):
                level = logging.DEBUG if quietly else logging.WARNING
                logger.log(level, "%s failed on %s, attempt %d: %s; again in %g s", who, what, attempt, said, delay)
            case DeadLetter(_):
                logger.log(
                    logging.DEBUG if quietly else logging.ERROR,
                    "%s failed on %s, attempt %d: %s; dead-lettered to %s.dead",
                    who,
                    what,
                    attempt,
                    said,
                    self.app,
                    exc_info=None if isinstance(error, errors.LightbusError) else error,
                )

    def _is_news(self, lane: Lane, event: str, attempt: int) -> bool:
        """Whether to say (again) that nothing handles this event."""
        now, what = time.monotonic(), (lane.name, event, attempt)
        if now - self._said_of_unmatched.get(what, -math.inf) < SAY_AGAIN:
            return False
        if len(self._said_of_unmatched) >= ROUTES:
            self._said_of_unmatched.clear()
        self._said_of_unmatched[what] = now
        return True

    def _event(self, delivery: Delivery) -> str:
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
    with contextlib.suppress(ImportError):
        import sniffio

        context.run(sniffio.current_async_library_cvar.set, sniffio.current_async_library())
    return context


def _timeout_error(job: Job) -> errors.HandlerTimeout:
    handler = job[1]
    assert handler is not None
    return errors.HandlerTimeout(
        f"handler {handler.name!r} ran longer than its timeout of {handler.timeout:g} s. "
        "Make it faster, split the work, or give it more time with timeout=."
    )


@types.coroutine
def run_in_context(context: contextvars.Context, coroutine: Any) -> Generator[Any, Any, Any]:
    """Await a coroutine with its own context variables: as a task of its own would, at a tenth of the cost."""
    step: Callable[..., Any] = functools.partial(coroutine.send, None)
    while True:
        try:
            yielded = context.run(step)
        except StopIteration as stop:
            return stop.value
        try:
            value = yield yielded
        except GeneratorExit:
            coroutine.close()
            raise
        except BaseException as error:  # noqa: BLE001  # it is the coroutine's to handle
            step = functools.partial(coroutine.throw, error)
        else:
            step = functools.partial(coroutine.send, value)
