"""The consuming connection. A separate thread subscribes and sends heartbeats; it also reads and acks while a handler
blocks the event loop, otherwise the loop does. Whole batches go to the handlers, and their settlements come back.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import amqp.exceptions

from lightbus import errors
from lightbus.connection.declare import declare
from lightbus.connection.diagnosis import CHANNEL_LOST, FATAL, LOST
from lightbus.connection.dial import BrokerAddresses
from lightbus.connection.thread import ConnectionThread
from lightbus.consuming.acks import Settlements
from lightbus.consuming.credit import BUDGET, Credit
from lightbus.consuming.watchdog import REBUILDS, Watch
from lightbus.handler import Handler
from lightbus.transport import Channel, Connection, Delivery
from lightbus.wire import codec
from lightbus.wire.topology import Topology

logger = logging.getLogger("lightbus")

IDLE = 60.0
SAY_AGAIN = 10.0
"""Seconds between two logs of the same reason why there is no connection."""
REPAIR_PAUSE = 1.0
"""Seconds between two repairs of subscriptions: what fails at once again must not keep the broker busy."""
REPAIRS = 5
"""Repairs in a row that may fail over something that is deleted meanwhile; then the connection is replaced."""
RETIRED = 3
"""Channels of a queue, at most, on which nothing more arrives, and that stay open until their events are settled."""
FILLED_WITHIN = 0.05
"""Seconds that acks wait at most until a consumer that is to be replaced holds all that it may."""
HOLD = 0.02
"""Seconds that acks wait for those of earlier deliveries, when there is nothing else to do."""
SUSPECT = 2
"""An event that came back unsettled so often may be what its workers die of. Not 1: every lost connection returns all
that was in hand, once."""


class PendingHandlers:
    """The handlers that share one delivery: it is settled when the last of them has ended."""

    __slots__ = ("accepted", "unended")

    def __init__(self, unended: int) -> None:
        self.unended = unended
        self.accepted = True
        """False once the broker must dead-letter the delivery itself for one of them."""


HandlerRun = tuple[Delivery, "Handler | None", "PendingHandlers | None"]
"""A delivery, a handler for it, and the others that share the delivery, if any."""


class Subscription:
    """One consumed queue: its handlers, what waits for them, and its channel of the present epoch."""

    def __init__(
        self,
        name: str,
        suffix: str,
        handlers: Sequence[Handler],
        *,
        prefetch: int,
        concurrency: int,
        budget: int = BUDGET,
    ) -> None:
        self.name = name
        self.suffix = suffix
        self.handlers = {handler.name: handler for handler in handlers}
        self.prefetch = prefetch
        """At most; see `credit`."""
        self.concurrency = concurrency
        # the event loop's
        self.ready: deque[HandlerRun] = deque()
        self.running = 0
        self.running_of: dict[str, int] = {}
        self.parked: dict[str, deque[HandlerRun]] = {}
        self.routes: dict[tuple[str, str], tuple[Handler, ...]] = {}
        self.let_others_begin: Callable[[], object] = _no_others
        """Called where a handler has to wait: what is ready meanwhile goes to other tasks."""
        # owned by what reads the connection: its thread, or the event loop
        self.credit = Credit(prefetch, concurrency, budget)
        self.channel: Channel | None = None
        self.channels: tuple[Channel, ...] = ()
        """On which deliveries can be settled: the present one, and `retired` ones. Read by every thread."""
        self.retired: dict[Channel, int] = {}
        """Channels that a fault has replaced, and that are open; and how many of their deliveries are not settled."""
        self.consumer_tag = ""
        self.fault: str | None = None
        """Why the subscription has ended, and is to be begun again."""
        self.on_probation = False
        """One at a time: see `ConsumerConnection`."""
        self.suspecting = False
        """On probation for a reason that was logged."""
        self.arrived: list[Delivery] = []
        self.settlements = Settlements(0)
        self.taken = 0
        self.taken_before = 0
        """At the watchdog's last look."""
        self.large: dict[int, int] = {}
        """The sizes of large bodies in hand, by delivery tag."""
        self.returning: list[int] = []
        """The tags of deliveries that there is no room for: they go back to the queue."""
        self.prefetch_now = 1
        """What the broker knows; a lower one, only once it has confirmed it."""
        self.before_consumer = 0
        """The last delivery tag before the present consumer: earlier deliveries do not count for its prefetch."""
        self.acks_wait_until = 0.0
        """Until then (monotonic) no acks are sent, unless the consumer is replaced before; 0 where none wait."""
        self.look_planned = False
        """The thread will look at the prefetch again, though nothing happens. Where it will not, it has to be woken."""
        self.ack_batch = 0
        """More settled deliveries than this are acked at once, whatever else there is to do."""
        self.watch = Watch(name)
        # from the one to the other
        self.settled: deque[tuple[Delivery, bool]] = deque()

    @property
    def in_hand(self) -> int:
        """Deliveries of the present channel that are not settled on the broker."""
        return max(0, self.taken + len(self.arrived) - self.settlements.sent)

    @property
    def room(self) -> bool:
        """Whether the broker may deliver more."""
        return self.in_hand < self.prefetch_now

    @property
    def full(self) -> bool:
        """Whether the present consumer holds all that it may, so that nothing is on its way to it."""
        last = self.taken + len(self.arrived)
        return last - self.before_consumer - self.settlements.sent_after(self.before_consumer) >= self.prefetch_now

    def begin(self, channel: Channel, *, on_probation: bool) -> None:
        """From here on this is the channel."""
        self.channel, self.fault = channel, None
        self.channels = (*self.retired, channel)
        self.arrived, self.large, self.returning = [], {}, []
        self.settlements = Settlements(hold=0)
        self.taken = self.taken_before = self.before_consumer = 0
        self.acks_wait_until, self.look_planned = 0.0, False
        self.on_probation, self.suspecting = on_probation, False
        self.credit.begin(1 if on_probation else self.credit.window)
        self.set_prefetch(self.credit.given)

    def set_prefetch(self, prefetch: int) -> None:
        self.prefetch_now = prefetch
        self.ack_batch = self.settlements.hold = prefetch // 4

    def end(self, *, retired: int = 0) -> None:
        """There is no channel until `begin`. The present one may have deliveries left to settle."""
        if retired:
            assert self.channel is not None
            self.retired[self.channel] = retired
        self.channel, self.consumer_tag = None, ""
        self.channels = tuple(self.retired)
        self.arrived, self.large, self.returning = [], {}, []

    def forget(self, retired: Channel) -> None:
        """This one is closed."""
        self.retired.pop(retired, None)
        self.channels = (*self.retired, *(() if self.channel is None else (self.channel,)))


class Listener(Protocol):
    """Callbacks that the connection thread schedules on the event loop."""

    def from_thread(self, function: Callable[..., object], *arguments: Any) -> None:
        """Run one of the functions below soon, in the event loop."""
        ...

    def subscribed(self) -> None: ...

    def cancelled(self) -> None: ...

    def give_up(self, error: errors.LightbusError) -> None: ...


class EpochEnded(OSError):
    """The connection is to be replaced, though it is well."""


class ConsumerConnection(ConnectionThread):
    """The consuming connection: subscribes to every subscription's queue, hands batches over, sends the acks.

    A subscription begins *on probation*: it takes one delivery at a time, until one arrives that was not returned again
    and again; from then on, as many as the prefetch allows. So the first delivery of all decides, nearly always.
    When a worker dies, the broker counts a return for all that it held, and dead-letters what returned too often: so an
    event that kills each of its workers must soon be alone in their hands.
    """

    def __init__(
        self,
        broker: BrokerAddresses,
        name: str,
        wanted: Topology,
        subscriptions: Sequence[Subscription],
        listener: Listener,
    ) -> None:
        self.wanted_topology = wanted
        self.subscriptions = subscriptions
        self.listener = listener
        self.hand_over: Callable[[Subscription, list[Delivery]], object] = _nobody_listens
        """Gives a batch to the event loop, without waiting. Raises RuntimeError where the loop has ended."""
        self.hand_over_here: Callable[[Subscription, list[Delivery]], object] = _nobody_listens
        """The same from the loop itself: behind what it was given before, so that a queue's order is kept."""
        self.draining = False
        """Take no more; what is in hand may still be settled."""
        self._missing: str | None = None
        self._repaired_at = -math.inf
        self._failed_repairs = 0
        self._said, self._say_again_at = "", 0.0
        self._settling_soon = False
        self._held_until_later = False
        self._drained = False
        super().__init__(broker, name)

    def declare_again(self, what_is_missing: str) -> None:
        """From any thread: declare all that this app needs again. Events in progress are not affected."""
        self._missing = what_is_missing
        self.wake()

    def opened(self, connection: Connection) -> None:
        self._missing, self._failed_repairs, self._said = None, 0, ""
        declare(connection, self.wanted_topology)
        for subscription in self.subscriptions:
            self._subscribe(subscription, connection)
        if self.epoch:
            logger.info("%s: connected and subscribed again.", self.name)
        self.listener.from_thread(self.listener.subscribed)

    def _subscribe(self, subscription: Subscription, connection: Connection, *, on_probation: bool = True) -> None:
        channel = connection.channel()
        channel.on_closed = functools.partial(self._closed, subscription, channel)
        channel.takes = functools.partial(self._takes, subscription, channel)
        subscription.begin(channel, on_probation=on_probation and subscription.prefetch > 1)
        channel.basic_qos(channel.counts_bytes and subscription.credit.budget, subscription.prefetch_now, False)
        self._consume(subscription, channel)
        subscription.watch.subscribed(time.monotonic())

    def _consume(self, subscription: Subscription, channel: Channel) -> None:
        subscription.before_consumer = subscription.taken + len(subscription.arrived)
        on_cancel = functools.partial(self._cancelled, subscription, channel)
        subscription.consumer_tag = channel.consume(subscription.name, subscription.arrived.append, on_cancel=on_cancel)

    def _passes_probation(self, subscription: Subscription, delivery: Delivery) -> bool:
        """Whether this delivery ends the probation."""
        returns = codec.read_returns(delivery)
        if returns >= SUSPECT and not subscription.suspecting:
            subscription.suspecting = True
            logger.warning(
                "%s: the event %s in %r was redelivered %d times: its workers crashed, possibly because of it, or "
                "lost their connections. Handling one event at a time until one arrives that was not redelivered.",
                self.name,
                codec.read_cause(delivery)[0],
                subscription.name,
                returns,
            )
        return returns < SUSPECT

    def _set_prefetch(self, subscription: Subscription, prefetch: int) -> None:
        """A consumer with this prefetch takes the place of the present one.

        On the same channel, so that what is in hand stays so, and its tag good.
        """
        channel, replaced = subscription.channel, subscription.consumer_tag
        assert channel is not None
        channel.basic_cancel(replaced)  # first: from here on it is known what is in hand
        prefetch = subscription.credit.given = max(1, min(prefetch, subscription.prefetch - subscription.in_hand))
        # For the consumers that begin after it.
        channel.basic_qos(channel.counts_bytes and subscription.credit.budget, prefetch, False)
        self._consume(subscription, channel)
        subscription.set_prefetch(prefetch)

    # --- faults of one queue or channel: the others go on

    def _cancelled(self, subscription: Subscription, channel: Channel, consumer_tag: str) -> None:
        """The broker ended the subscription; the channel is open, and what arrived on it can be settled."""
        if channel is subscription.channel and not self.draining:
            if consumer_tag == subscription.consumer_tag:
                subscription.consumer_tag = ""
            subscription.fault = (
                f"the broker cancelled the consumer {consumer_tag}: its queue was deleted, or moved to another node"
            )

    def _closed(self, subscription: Subscription, channel: Channel, error: Exception) -> None:
        """The broker closed the channel: what was in hand on it is delivered again."""
        if channel is subscription.channel:
            subscription.fault = f"the broker closed its channel: {error}"
            subscription.end()
        else:
            subscription.forget(channel)
        self.wake()

    def _channel_lost(self, subscription: Subscription, error: Exception) -> None:
        """The same, where a method on it failed."""
        channel = subscription.channel
        if channel is not None:
            self._closed(subscription, channel, error)
            with contextlib.suppress(*LOST):  # the embedded broker leaves it open
                channel.close()

    def _takes(self, subscription: Subscription, channel: Channel, delivery_tag: int, size: int) -> bool:
        """Whether there is room for a large body. If not, the event goes back to its queue, once the prefetch is lower.

        Called while a connection is read, before the body is kept.
        """
        if channel is not subscription.channel:
            return True
        credit, now = subscription.credit, time.monotonic()
        credit.large(now, size)
        self.wake()
        if (
            subscription.large
            and sum(subscription.large.values()) + size > credit.budget
            and subscription.prefetch_now > credit.limit(now)
        ):
            subscription.returning.append(delivery_tag)
            subscription.taken += 1
            return False
        subscription.large[delivery_tag] = size
        return True

    def _repair(self, connection: Connection) -> float:
        """Declare what is missing, and subscribe again where that is needed. Returns when to look again, in seconds."""
        now = time.monotonic()
        faulty = (
            []
            if self.draining
            else [subscription for subscription in self.subscriptions if subscription.fault is not None]
        )
        if self._missing is None and not faulty:
            return math.inf
        if (early := self._repaired_at + REPAIR_PAUSE - now) > 0:
            return early
        self._repaired_at = now
        missing, self._missing = self._missing, None
        if missing is not None:
            logger.warning("%s: %s. Declaring it again.", self.name, missing)
        try:
            declare(connection, self.wanted_topology)
        except amqp.exceptions.NotFound as error:  # on a separate channel: what others have in hand stays in hand
            self._missing = self._missing or missing
            self._repair_failed(error)
            return REPAIR_PAUSE
        for subscription in faulty:
            logger.warning(
                "%s: subscription to %r lost (%s); subscribing again. %s",
                self.name,
                subscription.name,
                subscription.fault,
                "Its unacknowledged events will be redelivered."
                if subscription.channel is None
                else "Events in progress are not affected.",
            )
            self._retire(subscription)
            try:
                self._subscribe(subscription, connection)
            except amqp.exceptions.NotFound as error:
                self._channel_lost(subscription, error)
                self._repair_failed(error)
                return REPAIR_PAUSE
        self._failed_repairs = 0
        return math.inf

    def _repair_failed(self, error: amqp.exceptions.NotFound) -> None:
        """A deletion takes RabbitMQ a moment: a queue that was just declared may be gone when it is bound."""
        self._failed_repairs += 1
        if self._failed_repairs >= REPAIRS:
            raise error
        logger.warning("%s: something is being deleted (%s). Declaring it again in a moment.", self.name, error)

    def _retire(self, subscription: Subscription) -> None:
        """Let nothing more arrive on the channel, which stays open until all that did is settled."""
        channel = subscription.channel
        if channel is None:
            return
        if subscription.consumer_tag:
            channel.basic_cancel(subscription.consumer_tag)
        self._give_back(subscription)
        if subscription.arrived:
            with contextlib.suppress(RuntimeError):  # the loop has ended: the batch is delivered again
                self.hand_over(subscription, self._take(subscription))
        self._send_all_acks(subscription)
        left = subscription.in_hand
        subscription.end(retired=left)
        if not left:
            channel.close()
        while len(subscription.retired) > RETIRED:
            oldest = next(iter(subscription.retired))
            subscription.forget(oldest)
            oldest.close()

    def _close_retired(self, subscription: Subscription) -> None:
        for channel in [channel for channel, left in subscription.retired.items() if not left]:
            subscription.forget(channel)
            channel.close()

    # --- in the thread

    def work(self) -> float:
        connection = self.connection
        assert connection is not None
        if (
            self.reading.loop is not None and self.reading.loop.ended
        ):  # nobody handles what is in hand: it is for others
            self.stopping = True
            return 0.0
        if self.draining:
            self._cancel()
        else:
            self._watch()
        pause = self._repair(connection)
        held = False
        for subscription in self.subscriptions:
            if subscription.arrived:
                batch = self._take(subscription)
                if not self.draining:
                    # First, while the properties are this thread's to read; acted on last, so that no event waits.
                    enough = subscription.on_probation and self._passes_probation(subscription, batch[-1])
                    with contextlib.suppress(RuntimeError):  # the loop has ended: the batch is delivered again
                        self.hand_over(subscription, batch)
                    if enough:
                        self._end_probation(subscription)
            if not self.draining and subscription.channel is not None and subscription.fault is None:
                try:
                    look_after = self._adapt(subscription)
                    subscription.look_planned = look_after < math.inf
                    pause = min(pause, look_after)
                    if subscription.watch.renewal_due and not subscription.in_hand:
                        self._renew(subscription)
                except CHANNEL_LOST as error:
                    self._channel_lost(subscription, error)
                    pause = 0.0
            else:
                subscription.acks_wait_until = 0.0
            if not subscription.acks_wait_until and (subscription.settled or subscription.settlements.waiting):
                held |= self._send_acks(subscription)
            if subscription.retired:
                self._close_retired(subscription)
        # Out-of-order acks wait for those before them, but not when there is nothing else to do.
        return min(pause, HOLD if held else self._until_next_look())

    def _end_probation(self, subscription: Subscription) -> None:
        """End the probation: from here on the prefetch follows the handlers."""
        if subscription.suspecting:
            logger.info(
                "%s: prefetching up to %d events from %r again.", self.name, subscription.prefetch, subscription.name
            )
        subscription.on_probation = subscription.suspecting = False

    def _adapt(self, subscription: Subscription) -> float:
        """Set the prefetch as the handlers' speed and the bodies' size ask for. Returns when to look again.

        Acks wait meanwhile, so that the present consumer gets all that it may hold: see `credit`.
        """
        if subscription.on_probation:
            return math.inf
        now, in_hand, credit = time.monotonic(), subscription.in_hand, subscription.credit
        if not in_hand or not credit.due(now, in_hand):
            subscription.acks_wait_until = 0.0
        elif subscription.full or credit.urgent(now):
            subscription.acks_wait_until = 0.0
            prefetch = credit.next_prefetch(now, in_hand)
            if prefetch is not None:
                self._set_prefetch(subscription, prefetch)
        elif not subscription.acks_wait_until:
            subscription.acks_wait_until = now + FILLED_WITHIN
        elif now >= subscription.acks_wait_until:
            subscription.acks_wait_until = 0.0
            credit.postpone(now)
        if subscription.returning and subscription.prefetch_now <= credit.limit(now):
            self._give_back(subscription)
        if subscription.acks_wait_until:
            return max(0.0, subscription.acks_wait_until - now)
        return credit.next_look(now, subscription.in_hand)

    def _give_back(self, subscription: Subscription) -> None:
        """Return to the queue what there was no room for. With the same prefetch, it would come again at once."""
        channel, returning = subscription.channel, subscription.returning
        assert channel is not None
        subscription.returning = []
        for tag in returning:
            channel.basic_nack(tag, requeue=True)
            subscription.settlements.already_sent(tag)

    def _take(self, subscription: Subscription) -> list[Delivery]:
        batch = subscription.arrived[:]
        subscription.arrived.clear()
        subscription.credit.arrived(time.monotonic(), subscription.settlements.sent)
        subscription.taken += len(batch)
        return batch

    # in the event loop that reads: the same, without waiting

    def read_in_loop(self) -> None:
        loop_reader = self.reading.loop_reader
        assert loop_reader is not None
        loop_reader.connection.drain_nowait()
        for subscription in self.subscriptions:
            if subscription.fault is not None:
                self.wake()
            if subscription.arrived and not subscription.on_probation and not self.draining:
                self.hand_over_here(subscription, self._take(subscription))
                if not subscription.look_planned and subscription.credit.unsteady(time.monotonic()):
                    self.wake()
            elif subscription.arrived:
                self.wake()

    def settle(self, subscription: Subscription) -> None:
        """From the event loop: send the acks that are due, here if the loop reads, else in the thread."""
        loop_reader = self.reading.loop_reader
        if subscription.acks_wait_until and not subscription.full:
            return  # the thread sends them
        if loop_reader is None or subscription.acks_wait_until or not loop_reader.acquire():
            self.wake()
            return
        held = False
        try:
            held = self._send_acks(subscription)
        except BaseException as error:  # the thread ends the epoch over any, as it does over its own
            loop_reader.fail(error)
            if not isinstance(error, Exception):  # a signal's handler raised it, Ctrl-C's for one
                raise
        finally:
            loop_reader.release()
        if held and not self._held_until_later:
            self._held_until_later = True
            loop_reader.loop.native.call_later(HOLD, self._settle_held)

    def settle_soon(self) -> None:
        """The same after this round of the loop: what other handlers settle in it goes along, in one piece."""
        loop_reader = self.reading.loop_reader
        if loop_reader is None:
            self.wake()
        elif not self._settling_soon:
            self._settling_soon = True
            loop_reader.loop.soon(self._settle_all)

    def _settle_all(self) -> None:
        self._settling_soon = False
        for subscription in self.subscriptions:
            if subscription.settled:
                self.settle(subscription)

    def _settle_held(self) -> None:
        self._held_until_later = False
        for subscription in self.subscriptions:
            if subscription.settlements.waiting:
                self.settle(subscription)

    def _until_next_look(self) -> float:
        if self.draining:
            return IDLE
        if any(subscription.arrived for subscription in self.subscriptions):  # while one was subscribed again
            return 0.0
        looks = (subscription.watch.next_look for subscription in self.subscriptions if subscription.fault is None)
        return max(0.0, min(looks, default=math.inf) - time.monotonic())

    def _watch(self) -> None:
        """The watchdog: ask the broker about each queue that is due, and subscribe again where nothing arrives."""
        for subscription in self.subscriptions:
            if (
                time.monotonic() < subscription.watch.next_look
                or subscription.channel is None
                or subscription.fault is not None
            ):
                continue
            # On the consuming channel itself: a broker that does not answer ends the epoch.
            try:
                _, ready, consumers = subscription.channel.queue_declare(subscription.name, passive=True)
            except CHANNEL_LOST as error:
                self._channel_lost(subscription, error)
                continue
            arrived = subscription.taken + len(subscription.arrived)
            stalled = subscription.watch.look(
                time.monotonic(),
                ready=ready,
                consumers=consumers,
                received=arrived > subscription.taken_before,
                room=subscription.room,
            )
            subscription.taken_before = arrived
            if stalled is None:
                continue
            if subscription.watch.rebuilds >= REBUILDS:
                self.stopping = True
                self.listener.from_thread(self.listener.give_up, _still_stalled(stalled))
                return
            subscription.watch.rebuilds += 1
            logger.error(
                "%s: connected but stalled: %s. Subscribing again on %s (attempt %d of %d).",
                self.name,
                stalled,
                "a new channel" if subscription.watch.rebuilds == 1 else "a new connection",
                subscription.watch.rebuilds,
                REBUILDS,
            )
            if subscription.watch.rebuilds > 1:
                raise EpochEnded(stalled)
            subscription.fault = stalled

    def _renew(self, subscription: Subscription) -> None:
        """Subscribe on a fresh channel: what the broker thinks to have delivered on the old one comes again."""
        channel = subscription.channel
        assert channel is not None
        assert self.connection is not None
        channel.basic_cancel(subscription.consumer_tag)
        if subscription.in_hand:  # it came in between, so this channel receives; its tags can be acked on it alone
            self._consume(subscription, channel)
        else:
            # Nothing has died: where the probation was over, it stays over. So idle workers share the next burst.
            on_probation = subscription.on_probation
            subscription.end()
            channel.close()
            self._subscribe(subscription, self.connection, on_probation=on_probation)
        subscription.watch.renewed(time.monotonic())

    def _send_acks(self, subscription: Subscription) -> bool:
        """Send what is due; says whether some acks are held back."""
        channel, settled = subscription.channel, subscription.settled
        tags = []
        while settled:
            delivery, accepted = settled.popleft()
            if delivery.channel is not channel:
                self._settle_retired(subscription, delivery, accepted)
            elif accepted:
                tags.append(delivery.delivery_tag)
            else:
                assert channel is not None
                channel.basic_reject(delivery.delivery_tag, requeue=False)
                subscription.settlements.already_sent(delivery.delivery_tag)
                subscription.large.pop(delivery.delivery_tag, None)
        if channel is None:
            return False
        settlements = subscription.settlements
        if subscription.large:
            for tag in tags:
                subscription.large.pop(tag, None)
        settlements.settle(tags)
        for tag, multiple in settlements.take(all_of_them=not tags):
            channel.basic_ack(tag, multiple=multiple)
        now, in_hand = time.monotonic(), subscription.in_hand
        subscription.credit.measure(now, settlements.sent, in_hand)
        if (
            not subscription.on_probation
            and not subscription.look_planned
            and subscription.credit.next_look(now, in_hand) < math.inf
        ):
            self.wake()
        return bool(settlements.waiting)

    def _settle_retired(self, subscription: Subscription, delivery: Delivery, accepted: bool) -> None:
        channel = delivery.channel
        left = subscription.retired.get(channel)
        if not left:
            return  # its channel has ended: the broker delivers it again
        if accepted:
            channel.basic_ack(delivery.delivery_tag)
        else:
            channel.basic_reject(delivery.delivery_tag, requeue=False)
        subscription.retired[channel] = left - 1
        if left == 1:
            self.wake()  # to be closed

    def _send_all_acks(self, subscription: Subscription) -> None:
        while self._send_acks(subscription):  # what it holds back for earlier ones goes the next time
            pass

    def _cancel(self) -> None:
        tags = [
            (subscription, subscription.consumer_tag)
            for subscription in self.subscriptions
            if subscription.consumer_tag
        ]
        for subscription, tag in tags:
            subscription.consumer_tag = ""
            assert subscription.channel is not None
            subscription.channel.basic_cancel(tag)
        if tags or not self._drained:
            self._drained = True
            self.listener.from_thread(self.listener.cancelled)

    def lost(self, error: BaseException) -> None:
        for subscription in self.subscriptions:
            subscription.retired.clear()
            subscription.end()
            subscription.fault = None
            subscription.watch.ended()
        if self.draining:
            self.listener.from_thread(self.listener.cancelled)
        if isinstance(error, errors.BrokerError):
            return  # `failed` says it
        logger.warning(
            "%s: connection lost (%s); reconnecting. Unacknowledged events will be redelivered.",
            self.name,
            error,
        )

    def failed(self, error: errors.BrokerError) -> None:
        if self.epoch == 0 and isinstance(error, FATAL):
            self.stopping = True
            self.listener.from_thread(self.listener.give_up, error)
        elif str(error) != self._said or time.monotonic() >= self._say_again_at:
            self._said, self._say_again_at = str(error), time.monotonic() + SAY_AGAIN
            logger.error("%s: %s Trying again.", self.name, error)

    def well_after(self, error: Exception) -> bool:
        return isinstance(error, (EpochEnded, CHANNEL_LOST, TimeoutError))

    def closing(self) -> None:
        for subscription in self.subscriptions:
            self._send_all_acks(subscription)


def _no_others() -> None:
    """Before the event loop runs."""


def _nobody_listens(subscription: Subscription, batch: list[Delivery]) -> None:
    """Before the event loop runs: what arrives is delivered again."""


def _still_stalled(why: str) -> errors.WorkerError:
    return errors.WorkerError(
        f"Connected but stalled: {why}, even after reconnecting and subscribing again {REBUILDS} times. Exiting, so "
        "that the supervisor of this worker notices. Check the queue on the broker (lightbus doctor MODULE:ATTR; "
        "rabbitmq-queues quorum_status NAME), then restart the worker."
    )
