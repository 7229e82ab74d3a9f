"""One delivery's whole story: arrived, decoded, handled, decided, settled.

Two halves meet here. `Subscriber` owns the connection in a thread of its own: it reads, acks and beats,
also while a handler blocks the event loop. `Consumer` lives in the event loop: it runs handlers. Whole
batches cross between them, both ways.
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
from lightbus.connection import FATAL, Broker, ConnectionThread, current_loop, declare
from lightbus.handler import Handler
from lightbus.publisher import Publisher
from lightbus.retry import DeadLetter, Retry, RetryIn
from lightbus.settlement import Settlements
from lightbus.topology import Topology
from lightbus.transport import Channel, Connection, Delivery, Publication
from lightbus.watchdog import REBUILDS, Watch

logger = logging.getLogger("lightbus")

IDLE = 60.0
CHECKPOINT_EVERY = 16
"""Deliveries that one task handles before it lets others run, though no handler ever waited."""
COPY_PAUSES = (0.2, 1.0, 5.0)
ROUTES = 10_000
"""Remembered (exchange, routing key) pairs; forgotten all at once when there are more."""


class Siblings:
    """The handlers that share one delivery: it is settled when the last of them has ended."""

    __slots__ = ("accepted", "unended")

    def __init__(self, unended: int) -> None:
        self.unended = unended
        self.accepted = True
        """False once the broker must dead-letter the delivery itself for one of them."""


Job = tuple[Delivery, "Handler | None", "Siblings | None"]
"""A delivery, a handler for it, and the others that share the delivery, if any."""


class Lane:
    """One consumed queue: its handlers, what waits for them, and its channel of the present epoch."""

    def __init__(self, name: str, suffix: str, handlers: Sequence[Handler], *, prefetch: int, concurrency: int) -> None:
        self.name = name
        self.suffix = suffix
        self.handlers = {handler.name: handler for handler in handlers}
        self.prefetch = prefetch
        self.concurrency = concurrency
        # the event loop's
        self.ready: deque[Job] = deque()
        self.running = 0
        self.running_of: dict[str, int] = {}
        self.parked: dict[str, deque[Job]] = {}
        self.routes: dict[tuple[str, str], tuple[Handler, ...]] = {}
        # the connection thread's
        self.channel: Channel | None = None
        self.consumer_tag = ""
        self.arrived: list[Delivery] = []
        self.settlements = Settlements(0)
        self.taken = 0
        self.taken_before = 0
        """At the watchdog's last look."""
        self.watch = Watch(name)
        # from the one to the other
        self.settled: deque[tuple[Delivery, bool]] = deque()

    @property
    def in_hand(self) -> int:
        """Deliveries of this epoch that are not settled on the broker."""
        return max(0, self.taken + len(self.arrived) - self.settlements.sent)


class Subscriber(ConnectionThread):
    """The consuming connection: subscribes to every lane's queue, hands batches over, sends the acks."""

    def __init__(self, broker: Broker, name: str, wanted: Topology, lanes: Sequence[Lane], consumer: Consumer) -> None:
        self.wanted_topology = wanted
        self.lanes = lanes
        self.consumer = consumer
        self.draining = False
        self._fault: str | None = None
        super().__init__(broker, name)

    def end_epoch(self, why: str) -> None:
        """From any thread: replace the connection, which declares and subscribes anew."""
        self._fault = why
        self.wake()

    def opened(self, connection: Connection) -> None:
        self._fault = None
        declare(connection, self.wanted_topology)
        for lane in self.lanes:
            self._subscribe(lane, connection)
            lane.watch.subscribed(time.monotonic())
        self.consumer.from_thread(self.consumer.subscribed)

    def _subscribe(self, lane: Lane, connection: Connection) -> None:
        lane.arrived = []
        lane.settlements = Settlements(hold=lane.prefetch // 4)
        lane.taken = lane.taken_before = 0
        channel = connection.channel()
        channel.basic_qos(0, lane.prefetch, False)
        lane.channel = channel
        lane.consumer_tag = channel.consume(lane.name, lane.arrived.append, on_cancel=self._cancelled)

    def _cancelled(self, consumer_tag: str) -> None:
        if not self.draining:
            self._fault = (
                f"the broker cancelled the consumer {consumer_tag}: its queue was deleted, or moved to another node"
            )

    def work(self) -> float:
        if self._fault is not None:
            raise OSError(self._fault)
        if self.draining:
            self._cancel()
        else:
            self._watch()
        held = False
        for lane in self.lanes:
            if lane.arrived:
                self._hand_over(lane)
            if lane.settled or lane.settlements.waiting:
                held |= self._send_acks(lane)
            if lane.watch.renewal_due and not lane.in_hand and not self.draining:
                self._renew(lane)
        # Out-of-order acks wait for those before them, but not when there is nothing else to do.
        return 0.02 if held else self._until_next_look()

    def _until_next_look(self) -> float:
        if self.draining:
            return IDLE
        if any(lane.arrived for lane in self.lanes):  # while one was subscribed anew
            return 0.0
        return max(0.0, min(lane.watch.next_look for lane in self.lanes) - time.monotonic())

    def _watch(self) -> None:
        """The watchdog: ask the broker about each queue whose time has come, and begin anew where nothing arrives."""
        for lane in self.lanes:
            if time.monotonic() < lane.watch.next_look:
                continue
            assert lane.channel is not None
            # On the consuming channel itself: a queue that is gone, or a broker that does not answer, ends the epoch.
            _, ready, consumers = lane.channel.queue_declare(lane.name, passive=True)
            arrived = lane.taken + len(lane.arrived)
            deaf = lane.watch.look(
                time.monotonic(),
                ready=ready,
                consumers=consumers,
                heard=arrived > lane.taken_before,
                room=lane.in_hand < lane.prefetch,
            )
            lane.taken_before = arrived
            if deaf is None:
                continue
            if lane.watch.rebuilds >= REBUILDS:
                self.stopping = True
                self.consumer.from_thread(self.consumer.give_up, _still_deaf(deaf))
                return
            lane.watch.rebuilds += 1
            logger.error(
                "%s: connected but deaf: %s. Connecting, declaring and subscribing anew (%d of %d before giving up).",
                self.name,
                deaf,
                lane.watch.rebuilds,
                REBUILDS,
            )
            raise OSError(deaf)

    def _renew(self, lane: Lane) -> None:
        """Subscribe on a fresh channel: what the broker thinks to have delivered on the old one comes again."""
        channel = lane.channel
        assert channel is not None
        assert self.connection is not None
        channel.basic_cancel(lane.consumer_tag)
        if lane.in_hand:  # it came in between, so this channel hears; its tags can be acked on it alone
            lane.consumer_tag = channel.consume(lane.name, lane.arrived.append, on_cancel=self._cancelled)
        else:
            channel.close()
            self._subscribe(lane, self.connection)
        lane.watch.renewed(time.monotonic())

    def _hand_over(self, lane: Lane) -> None:
        batch = lane.arrived[:]
        lane.arrived.clear()
        lane.taken += len(batch)
        if not self.draining:
            self.consumer.from_thread(self.consumer.receive, lane, batch)

    def _send_acks(self, lane: Lane) -> bool:
        """Send what is due; says whether some acks are held back."""
        channel, settled = lane.channel, lane.settled
        assert channel is not None
        tags = []
        while settled:
            delivery, accepted = settled.popleft()
            if delivery.channel is not channel:
                continue  # an older epoch's: the broker delivers it again
            if accepted:
                tags.append(delivery.delivery_tag)
            else:
                channel.basic_reject(delivery.delivery_tag, requeue=False)
                lane.settlements.already_sent(delivery.delivery_tag)
        lane.settlements.settle(tags)
        for tag, multiple in lane.settlements.take(all_of_them=not tags):
            channel.basic_ack(tag, multiple=multiple)
        return bool(lane.settlements.waiting)

    def _cancel(self) -> None:
        tags = [(lane, lane.consumer_tag) for lane in self.lanes if lane.consumer_tag]
        for lane, tag in tags:
            lane.consumer_tag = ""
            assert lane.channel is not None
            lane.channel.basic_cancel(tag)
        if tags:
            self.consumer.from_thread(self.consumer.cancelled)

    def lost(self, error: BaseException) -> None:
        for lane in self.lanes:
            lane.channel = None
            lane.arrived = []
            lane.consumer_tag = ""
            lane.watch.ended()
        if self.draining:
            self.consumer.from_thread(self.consumer.cancelled)
        logger.warning(
            "%s: connection lost (%s); connecting again. Events in hand come again where their handler had not ended.",
            self.name,
            error,
        )

    def failed(self, error: errors.BrokerError) -> None:
        if self.epoch == 0 and isinstance(error, FATAL):
            self.stopping = True
            self.consumer.from_thread(self.consumer.give_up, error)
        else:
            logger.error("%s: %s Trying again.", self.name, error)

    def closing(self) -> None:
        for lane in self.lanes:
            lane.settlements.settle([])
            self._send_acks(lane)


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
        self._stopping = True
        self._subscriber.draining = True
        self._subscriber.wake()
        with anyio.move_on_after(min(grace, 5.0)):
            if self._subscriber.connection is not None:
                await self._drained.wait()
        for lane in self.lanes:
            lane.ready.clear()
            lane.parked.clear()
        if not self._running:
            self._idle.set()
        with anyio.move_on_after(grace):
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
        try:
            while lane.ready:
                slot = Slot(lane, anyio.CancelScope())
                with slot.scope:
                    self._slots.add(slot)
                    try:
                        await self._handle_ready(slot)
                    finally:
                        self._slots.discard(slot)
                if slot.job is not None:  # it failed: settled out here, where no timeout can cut it short
                    await self._conclude(lane, slot.job, slot.error or _timeout_error(slot.job))
        finally:
            lane.running -= 1
            self._running -= 1
            if self._stopping and not self._running:
                self._idle.set()

    async def _handle_ready(self, slot: Slot) -> None:
        """Process one job after the other, until one fails."""
        lane, ready = slot.lane, slot.lane.ready
        since_checkpoint = 0
        while ready and slot.job is None:
            job = ready.popleft()
            if not self._may_run(lane, job):
                continue
            slot.job = job
            await self.process(slot, job)
            since_checkpoint += 1
            if since_checkpoint == CHECKPOINT_EVERY:
                since_checkpoint = 0
                await anyio.lowlevel.checkpoint()

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
        return errors.NoHandler(
            f"no handler of {self.app!r} on queue {lane.name!r} hears {envelope.event!r} from {envelope.source!r}. "
            "If the handler was removed, so must its binding be: "
            f"lightbus unbind MODULE:ATTR PATTERN (one that matches {envelope.event!r})"
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
        match decision:
            case RetryIn(delay, _):
                logger.warning("%s failed on %s, attempt %d: %s; again in %g s", who, what, attempt, said, delay)
            case DeadLetter(_):
                quiet = isinstance(error, (errors.LightbusError,))
                logger.error(
                    "%s failed on %s, attempt %d: %s; dead-lettered to %s.dead",
                    who,
                    what,
                    attempt,
                    said,
                    self.app,
                    exc_info=None if quiet else error,
                )

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


def _still_deaf(why: str) -> errors.WorkerError:
    return errors.WorkerError(
        f"Connected but deaf: {why}, also after connecting and subscribing anew {REBUILDS} times. Giving up, so that "
        "whoever supervises this worker knows. Look at the queue on the broker (lightbus doctor MODULE:ATTR; "
        "rabbitmq-queues quorum_status NAME), then start the worker again."
    )


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
