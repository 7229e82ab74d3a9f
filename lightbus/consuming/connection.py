"""The consuming connection: a thread of its own subscribes and beats, and reads and acks while a handler blocks the
event loop; else the loop does. Whole batches go to the handlers, and their settlements come back.
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
from lightbus.connection.dial import Broker
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
        self.ready: deque[Job] = deque()
        self.running = 0
        self.running_of: dict[str, int] = {}
        self.parked: dict[str, deque[Job]] = {}
        self.routes: dict[tuple[str, str], tuple[Handler, ...]] = {}
        self.let_others_begin: Callable[[], object] = _no_others
        """Called where a handler has to wait: what is ready meanwhile goes to other tasks."""
        # of whoever uses the connection: its thread, or the loop that attends
        self.credit = Credit(prefetch, concurrency, budget)
        self.channel: Channel | None = None
        self.channels: tuple[Channel, ...] = ()
        """On which deliveries can be settled: the present one, and `retired` ones. Read by every thread."""
        self.retired: dict[Channel, int] = {}
        """Channels that a fault has replaced, and that are open; and how many of their deliveries are not settled."""
        self.consumer_tag = ""
        self.fault: str | None = None
        """Why the subscription has ended, and is to be begun again."""
        self.careful = False
        """One at a time: see `Subscriber`."""
        self.suspecting = False
        """Careful for a reason, which was said."""
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

    def begin(self, channel: Channel, *, careful: bool) -> None:
        """From here on this is the channel."""
        self.channel, self.fault = channel, None
        self.channels = (*self.retired, channel)
        self.arrived, self.large, self.returning = [], {}, []
        self.settlements = Settlements(hold=0)
        self.taken = self.taken_before = self.before_consumer = 0
        self.acks_wait_until, self.look_planned = 0.0, False
        self.careful, self.suspecting = careful, False
        self.credit.begin(1 if careful else self.credit.window)
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
    """Who lives in the event loop and hears of what the thread meets."""

    def from_thread(self, function: Callable[..., object], *arguments: Any) -> None:
        """Run one of the functions below soon, in the event loop."""
        ...

    def subscribed(self) -> None: ...

    def cancelled(self) -> None: ...

    def give_up(self, error: errors.LightbusError) -> None: ...


class EpochEnded(OSError):
    """The connection is to be replaced, though it is well."""


class Subscriber(ConnectionThread):
    """The consuming connection: subscribes to every lane's queue, hands batches over, sends the acks.

    A subscription begins *careful*: it takes one delivery at a time, until one arrives that has not come back unsettled
    again and again; from then on, as many as the prefetch allows. So the first delivery of all decides, nearly always.
    When a worker dies, the broker counts a return for all that it held, and dead-letters what returned too often: so an
    event that kills each of its workers must soon be alone in their hands.
    """

    def __init__(self, broker: Broker, name: str, wanted: Topology, lanes: Sequence[Lane], listener: Listener) -> None:
        self.wanted_topology = wanted
        self.lanes = lanes
        self.listener = listener
        self.hand_over: Callable[[Lane, list[Delivery]], object] = _nobody_listens
        """Gives a batch to the event loop, without waiting. Raises RuntimeError where the loop has ended."""
        self.hand_over_here: Callable[[Lane, list[Delivery]], object] = _nobody_listens
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
        for lane in self.lanes:
            self._subscribe(lane, connection)
        if self.epoch:
            logger.info("%s: connected and subscribed again.", self.name)
        self.listener.from_thread(self.listener.subscribed)

    def _subscribe(self, lane: Lane, connection: Connection, *, careful: bool = True) -> None:
        channel = connection.channel()
        channel.on_closed = functools.partial(self._closed, lane, channel)
        channel.takes = functools.partial(self._takes, lane, channel)
        lane.begin(channel, careful=careful and lane.prefetch > 1)
        channel.basic_qos(channel.counts_bytes and lane.credit.budget, lane.prefetch_now, False)
        self._consume(lane, channel)
        lane.watch.subscribed(time.monotonic())

    def _consume(self, lane: Lane, channel: Channel) -> None:
        lane.before_consumer = lane.taken + len(lane.arrived)
        on_cancel = functools.partial(self._cancelled, lane, channel)
        lane.consumer_tag = channel.consume(lane.name, lane.arrived.append, on_cancel=on_cancel)

    def _may_be_careless(self, lane: Lane, delivery: Delivery) -> bool:
        """Whether to be careful no longer, for this delivery arrived."""
        returns = codec.read_returns(delivery)
        if returns >= SUSPECT and not lane.suspecting:
            lane.suspecting = True
            logger.warning(
                "%s: the event %s in %r was redelivered %d times: its workers crashed, possibly because of it, or "
                "lost their connections. Handling one event at a time until one arrives that was not redelivered.",
                self.name,
                codec.read_cause(delivery)[0],
                lane.name,
                returns,
            )
        return returns < SUSPECT

    def _set_prefetch(self, lane: Lane, prefetch: int) -> None:
        """A consumer with this prefetch takes the place of the present one.

        On the same channel, so that what is in hand stays so, and its tag good.
        """
        channel, replaced = lane.channel, lane.consumer_tag
        assert channel is not None
        channel.basic_cancel(replaced)  # first: from here on it is known what is in hand
        prefetch = lane.credit.given = max(1, min(prefetch, lane.prefetch - lane.in_hand))
        # For the consumers that begin after it.
        channel.basic_qos(channel.counts_bytes and lane.credit.budget, prefetch, False)
        self._consume(lane, channel)
        lane.set_prefetch(prefetch)

    # --- faults of one queue or channel: the others go on

    def _cancelled(self, lane: Lane, channel: Channel, consumer_tag: str) -> None:
        """The broker ended the subscription; the channel is open, and what arrived on it can be settled."""
        if channel is lane.channel and not self.draining:
            if consumer_tag == lane.consumer_tag:
                lane.consumer_tag = ""
            lane.fault = (
                f"the broker cancelled the consumer {consumer_tag}: its queue was deleted, or moved to another node"
            )

    def _closed(self, lane: Lane, channel: Channel, error: Exception) -> None:
        """The broker closed the channel: what was in hand on it is delivered again."""
        if channel is lane.channel:
            lane.fault = f"the broker closed its channel: {error}"
            lane.end()
        else:
            lane.forget(channel)
        self.wake()

    def _channel_lost(self, lane: Lane, error: Exception) -> None:
        """The same, where a method on it failed."""
        channel = lane.channel
        if channel is not None:
            self._closed(lane, channel, error)
            with contextlib.suppress(*LOST):  # the embedded broker leaves it open
                channel.close()

    def _takes(self, lane: Lane, channel: Channel, delivery_tag: int, size: int) -> bool:
        """Whether there is room for a large body. If not, the event goes back to its queue, once the prefetch is lower.

        Called while a connection is read, before the body is kept.
        """
        if channel is not lane.channel:
            return True
        credit, now = lane.credit, time.monotonic()
        credit.large(now, size)
        self.wake()
        if lane.large and sum(lane.large.values()) + size > credit.budget and lane.prefetch_now > credit.limit(now):
            lane.returning.append(delivery_tag)
            lane.taken += 1
            return False
        lane.large[delivery_tag] = size
        return True

    def _repair(self, connection: Connection) -> float:
        """Declare what is missing, and subscribe again where that is needed. Returns when to look again, in seconds."""
        now = time.monotonic()
        faulty = [] if self.draining else [lane for lane in self.lanes if lane.fault is not None]
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
        except amqp.exceptions.NotFound as error:  # on a channel of its own: what others have in hand stays in hand
            self._missing = self._missing or missing
            self._repair_failed(error)
            return REPAIR_PAUSE
        for lane in faulty:
            logger.warning(
                "%s: subscription to %r lost (%s); subscribing again. %s",
                self.name,
                lane.name,
                lane.fault,
                "Its unacknowledged events will be redelivered."
                if lane.channel is None
                else "Events in progress are not affected.",
            )
            self._retire(lane)
            try:
                self._subscribe(lane, connection)
            except amqp.exceptions.NotFound as error:
                self._channel_lost(lane, error)
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

    def _retire(self, lane: Lane) -> None:
        """Let nothing more arrive on the channel, which stays open until all that did is settled."""
        channel = lane.channel
        if channel is None:
            return
        if lane.consumer_tag:
            channel.basic_cancel(lane.consumer_tag)
        self._give_back(lane)
        if lane.arrived:
            with contextlib.suppress(RuntimeError):  # the loop has ended: the batch is delivered again
                self.hand_over(lane, self._take(lane))
        self._send_all_acks(lane)
        left = lane.in_hand
        lane.end(retired=left)
        if not left:
            channel.close()
        while len(lane.retired) > RETIRED:
            oldest = next(iter(lane.retired))
            lane.forget(oldest)
            oldest.close()

    def _close_retired(self, lane: Lane) -> None:
        for channel in [channel for channel, left in lane.retired.items() if not left]:
            lane.forget(channel)
            channel.close()

    # --- in the thread

    def work(self) -> float:
        connection = self.connection
        assert connection is not None
        if self._loop is not None and self._loop.ended:  # nobody handles what is in hand: it is for others
            self.stopping = True
            return 0.0
        if self.draining:
            self._cancel()
        else:
            self._watch()
        pause = self._repair(connection)
        held = False
        for lane in self.lanes:
            if lane.arrived:
                batch = self._take(lane)
                if not self.draining:
                    # First, while the properties are this thread's to read; acted on last, so that no event waits.
                    enough = lane.careful and self._may_be_careless(lane, batch[-1])
                    with contextlib.suppress(RuntimeError):  # the loop has ended: the batch is delivered again
                        self.hand_over(lane, batch)
                    if enough:
                        self._be_careless(lane)
            if not self.draining and lane.channel is not None and lane.fault is None:
                try:
                    look_after = self._adapt(lane)
                    lane.look_planned = look_after < math.inf
                    pause = min(pause, look_after)
                    if lane.watch.renewal_due and not lane.in_hand:
                        self._renew(lane)
                except CHANNEL_LOST as error:
                    self._channel_lost(lane, error)
                    pause = 0.0
            else:
                lane.acks_wait_until = 0.0
            if not lane.acks_wait_until and (lane.settled or lane.settlements.waiting):
                held |= self._send_acks(lane)
            if lane.retired:
                self._close_retired(lane)
        # Out-of-order acks wait for those before them, but not when there is nothing else to do.
        return min(pause, HOLD if held else self._until_next_look())

    def _be_careless(self, lane: Lane) -> None:
        """Be careful no longer: from here on the prefetch follows the handlers."""
        if lane.suspecting:
            logger.info("%s: prefetching up to %d events from %r again.", self.name, lane.prefetch, lane.name)
        lane.careful = lane.suspecting = False

    def _adapt(self, lane: Lane) -> float:
        """Set the prefetch as the handlers' speed and the bodies' size ask for. Returns when to look again.

        Acks wait meanwhile, so that the present consumer gets all that it may hold: see `credit`.
        """
        if lane.careful:
            return math.inf
        now, in_hand, credit = time.monotonic(), lane.in_hand, lane.credit
        if not in_hand or not credit.due(now, in_hand):
            lane.acks_wait_until = 0.0
        elif lane.full or credit.urgent(now):
            lane.acks_wait_until = 0.0
            prefetch = credit.next_prefetch(now, in_hand)
            if prefetch is not None:
                self._set_prefetch(lane, prefetch)
        elif not lane.acks_wait_until:
            lane.acks_wait_until = now + FILLED_WITHIN
        elif now >= lane.acks_wait_until:
            lane.acks_wait_until = 0.0
            credit.postpone(now)
        if lane.returning and lane.prefetch_now <= credit.limit(now):
            self._give_back(lane)
        if lane.acks_wait_until:
            return max(0.0, lane.acks_wait_until - now)
        return credit.next_look(now, lane.in_hand)

    def _give_back(self, lane: Lane) -> None:
        """Return to the queue what there was no room for. With the same prefetch, it would come again at once."""
        channel, returning = lane.channel, lane.returning
        assert channel is not None
        lane.returning = []
        for tag in returning:
            channel.basic_nack(tag, requeue=True)
            lane.settlements.already_sent(tag)

    def _take(self, lane: Lane) -> list[Delivery]:
        batch = lane.arrived[:]
        lane.arrived.clear()
        lane.credit.arrived(time.monotonic(), lane.settlements.sent)
        lane.taken += len(batch)
        return batch

    # in the event loop that attends: the same, where nothing must be waited for

    def read_in_loop(self) -> None:
        attention = self._attention
        assert attention is not None
        attention.connection.drain_nowait()
        for lane in self.lanes:
            if lane.fault is not None:
                self.wake()
            if lane.arrived and not lane.careful and not self.draining:
                self.hand_over_here(lane, self._take(lane))
                if not lane.look_planned and lane.credit.unsteady(time.monotonic()):
                    self.wake()
            elif lane.arrived:
                self.wake()

    def settle(self, lane: Lane) -> None:
        """From the event loop: send the acks that are due, here if the loop attends, else in the thread."""
        attention = self._attention
        if lane.acks_wait_until and not lane.full:
            return  # the thread sends them
        if attention is None or lane.acks_wait_until or not attention.take():
            self.wake()
            return
        held = False
        try:
            held = self._send_acks(lane)
        except BaseException as error:  # the thread ends the epoch over any, as it does over its own
            attention.fail(error)
            if not isinstance(error, Exception):  # a signal's handler raised it, Ctrl-C's for one
                raise
        finally:
            attention.give_back()
        if held and not self._held_until_later:
            self._held_until_later = True
            attention.loop.native.call_later(HOLD, self._settle_held)

    def settle_soon(self) -> None:
        """The same after this round of the loop: what other handlers settle in it goes along, in one piece."""
        attention = self._attention
        if attention is None:
            self.wake()
        elif not self._settling_soon:
            self._settling_soon = True
            attention.loop.soon(self._settle_all)

    def _settle_all(self) -> None:
        self._settling_soon = False
        for lane in self.lanes:
            if lane.settled:
                self.settle(lane)

    def _settle_held(self) -> None:
        self._held_until_later = False
        for lane in self.lanes:
            if lane.settlements.waiting:
                self.settle(lane)

    def _until_next_look(self) -> float:
        if self.draining:
            return IDLE
        if any(lane.arrived for lane in self.lanes):  # while one was subscribed anew
            return 0.0
        looks = (lane.watch.next_look for lane in self.lanes if lane.fault is None)
        return max(0.0, min(looks, default=math.inf) - time.monotonic())

    def _watch(self) -> None:
        """The watchdog: ask the broker about each queue whose time has come, and begin anew where nothing arrives."""
        for lane in self.lanes:
            if time.monotonic() < lane.watch.next_look or lane.channel is None or lane.fault is not None:
                continue
            # On the consuming channel itself: a broker that does not answer ends the epoch.
            try:
                _, ready, consumers = lane.channel.queue_declare(lane.name, passive=True)
            except CHANNEL_LOST as error:
                self._channel_lost(lane, error)
                continue
            arrived = lane.taken + len(lane.arrived)
            deaf = lane.watch.look(
                time.monotonic(),
                ready=ready,
                consumers=consumers,
                heard=arrived > lane.taken_before,
                room=lane.room,
            )
            lane.taken_before = arrived
            if deaf is None:
                continue
            if lane.watch.rebuilds >= REBUILDS:
                self.stopping = True
                self.listener.from_thread(self.listener.give_up, _still_deaf(deaf))
                return
            lane.watch.rebuilds += 1
            logger.error(
                "%s: connected but stalled: %s. Subscribing again on %s (attempt %d of %d).",
                self.name,
                deaf,
                "a new channel" if lane.watch.rebuilds == 1 else "a new connection",
                lane.watch.rebuilds,
                REBUILDS,
            )
            if lane.watch.rebuilds > 1:
                raise EpochEnded(deaf)
            lane.fault = deaf

    def _renew(self, lane: Lane) -> None:
        """Subscribe on a fresh channel: what the broker thinks to have delivered on the old one comes again."""
        channel = lane.channel
        assert channel is not None
        assert self.connection is not None
        channel.basic_cancel(lane.consumer_tag)
        if lane.in_hand:  # it came in between, so this channel hears; its tags can be acked on it alone
            self._consume(lane, channel)
        else:
            # Nothing has died: where the careful start was over, it is over. So idle workers share the next burst.
            careful = lane.careful
            lane.end()
            channel.close()
            self._subscribe(lane, self.connection, careful=careful)
        lane.watch.renewed(time.monotonic())

    def _send_acks(self, lane: Lane) -> bool:
        """Send what is due; says whether some acks are held back."""
        channel, settled = lane.channel, lane.settled
        tags = []
        while settled:
            delivery, accepted = settled.popleft()
            if delivery.channel is not channel:
                self._settle_retired(lane, delivery, accepted)
            elif accepted:
                tags.append(delivery.delivery_tag)
            else:
                assert channel is not None
                channel.basic_reject(delivery.delivery_tag, requeue=False)
                lane.settlements.already_sent(delivery.delivery_tag)
                lane.large.pop(delivery.delivery_tag, None)
        if channel is None:
            return False
        settlements = lane.settlements
        if lane.large:
            for tag in tags:
                lane.large.pop(tag, None)
        settlements.settle(tags)
        for tag, multiple in settlements.take(all_of_them=not tags):
            channel.basic_ack(tag, multiple=multiple)
        now, in_hand = time.monotonic(), lane.in_hand
        lane.credit.measure(now, settlements.sent, in_hand)
        if not lane.careful and not lane.look_planned and lane.credit.next_look(now, in_hand) < math.inf:
            self.wake()
        return bool(settlements.waiting)

    def _settle_retired(self, lane: Lane, delivery: Delivery, accepted: bool) -> None:
        channel = delivery.channel
        left = lane.retired.get(channel)
        if not left:
            return  # its channel has ended: the broker delivers it again
        if accepted:
            channel.basic_ack(delivery.delivery_tag)
        else:
            channel.basic_reject(delivery.delivery_tag, requeue=False)
        lane.retired[channel] = left - 1
        if left == 1:
            self.wake()  # to be closed

    def _send_all_acks(self, lane: Lane) -> None:
        while self._send_acks(lane):  # what it holds back for earlier ones goes the next time
            pass

    def _cancel(self) -> None:
        tags = [(lane, lane.consumer_tag) for lane in self.lanes if lane.consumer_tag]
        for lane, tag in tags:
            lane.consumer_tag = ""
            assert lane.channel is not None
            lane.channel.basic_cancel(tag)
        if tags or not self._drained:
            self._drained = True
            self.listener.from_thread(self.listener.cancelled)

    def lost(self, error: BaseException) -> None:
        for lane in self.lanes:
            lane.retired.clear()
            lane.end()
            lane.fault = None
            lane.watch.ended()
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
        for lane in self.lanes:
            self._send_all_acks(lane)


def _no_others() -> None:
    """Before the event loop runs."""


def _nobody_listens(lane: Lane, batch: list[Delivery]) -> None:
    """Before the event loop runs: what arrives is delivered again."""


def _still_deaf(why: str) -> errors.WorkerError:
    return errors.WorkerError(
        f"Connected but stalled: {why}, even after reconnecting and subscribing again {REBUILDS} times. Exiting, so "
        "that the supervisor of this worker notices. Check the queue on the broker (lightbus doctor MODULE:ATTR; "
        "rabbitmq-queues quorum_status NAME), then restart the worker."
    )
