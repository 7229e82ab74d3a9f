"""The consuming connection: a thread of its own subscribes and beats, and reads and acks while a handler blocks the
event loop; else the loop does. Whole batches go to the handlers, and their settlements come back.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from lightbus import codec, errors
from lightbus.connection import FATAL, Broker, ConnectionThread, declare
from lightbus.handler import Handler
from lightbus.settlement import Settlements
from lightbus.topology import Topology
from lightbus.transport import Channel, Connection, Delivery
from lightbus.watchdog import REBUILDS, Watch

logger = logging.getLogger("lightbus")

IDLE = 60.0
SAY_AGAIN = 10.0
"""Seconds between two logs of the same reason why there is no connection."""
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
        self.let_others_begin: Callable[[], object] = _no_others
        """Called where a handler has to wait: what is ready meanwhile goes to other tasks."""
        # the connection thread's
        self.channel: Channel | None = None
        self.consumer_tag = ""
        self.careful = False
        """One at a time: see `Subscriber`."""
        self.suspecting = False
        """Careful for a reason, which was said."""
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

    @property
    def room(self) -> bool:
        """Whether the broker may deliver more."""
        return self.in_hand < (1 if self.careful else self.prefetch)


class Listener(Protocol):
    """Who lives in the event loop and hears of what the thread meets."""

    def from_thread(self, function: Callable[..., object], *arguments: Any) -> None:
        """Run one of the functions below soon, in the event loop."""
        ...

    def subscribed(self) -> None: ...

    def cancelled(self) -> None: ...

    def give_up(self, error: errors.LightbusError) -> None: ...


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
        self._fault: str | None = None
        self._said, self._say_again_at = "", 0.0
        self._settling_soon = False
        self._held_until_later = False
        super().__init__(broker, name)

    def end_epoch(self, why: str) -> None:
        """From any thread: replace the connection, which declares and subscribes anew."""
        self._fault = why
        self.wake()

    def opened(self, connection: Connection) -> None:
        self._fault, self._said = None, ""
        declare(connection, self.wanted_topology)
        for lane in self.lanes:
            self._subscribe(lane, connection)
            lane.watch.subscribed(time.monotonic())
        if self.epoch:
            logger.info("%s: connected and subscribed again.", self.name)
        self.listener.from_thread(self.listener.subscribed)

    def _subscribe(self, lane: Lane, connection: Connection) -> None:
        lane.arrived = []
        lane.settlements = Settlements(hold=lane.prefetch // 4)
        lane.taken = lane.taken_before = 0
        lane.careful, lane.suspecting = lane.prefetch > 1, False
        lane.channel = connection.channel()
        lane.channel.basic_qos(0, 1, False)
        lane.consumer_tag = lane.channel.consume(lane.name, lane.arrived.append, on_cancel=self._cancelled)

    def _may_widen(self, lane: Lane, delivery: Delivery) -> bool:
        """Whether to be careful no longer, for this delivery arrived."""
        returns = codec.read_returns(delivery)
        if returns >= SUSPECT and not lane.suspecting:
            lane.suspecting = True
            logger.warning(
                "%s: the event %s in %r came back %d times: its workers died, perhaps over it, or lost their "
                "connections. Taking one event at a time, so that no other suffers, until one arrives that did not.",
                self.name,
                codec.read_cause(delivery)[0],
                lane.name,
                returns,
            )
        return returns < SUSPECT

    def _widen(self, lane: Lane) -> None:
        """Be careful no longer: a consumer with the whole prefetch takes the place of the careful one.

        On the same channel, so that what is in hand stays so, and its tag good.
        """
        channel, careful_one = lane.channel, lane.consumer_tag
        assert channel is not None
        channel.basic_qos(0, lane.prefetch, False)  # for the consumers that begin after it
        lane.consumer_tag = channel.consume(lane.name, lane.arrived.append, on_cancel=self._cancelled)
        channel.basic_cancel(careful_one)
        if lane.suspecting:
            logger.info("%s: taking up to %d events from %r again.", self.name, lane.prefetch, lane.name)
        lane.careful = lane.suspecting = False

    def _cancelled(self, consumer_tag: str) -> None:
        if not self.draining:
            self._fault = (
                f"the broker cancelled the consumer {consumer_tag}: its queue was deleted, or moved to another node"
            )

    def work(self) -> float:
        if self._fault is not None:
            raise OSError(self._fault)
        if self._loop is not None and self._loop.ended:  # nobody handles what is in hand: it is for others
            self.stopping = True
            return 0.0
        if self.draining:
            self._cancel()
        else:
            self._watch()
        held = False
        for lane in self.lanes:
            if lane.arrived:
                batch = self._take(lane)
                if not self.draining:
                    # First, while the properties are this thread's to read; acted on last, so that no event waits.
                    enough = lane.careful and self._may_widen(lane, batch[-1])
                    with contextlib.suppress(RuntimeError):  # the loop has ended: the batch is delivered again
                        self.hand_over(lane, batch)
                    if enough:
                        self._widen(lane)
            if lane.settled or lane.settlements.waiting:
                held |= self._send_acks(lane)
            if lane.watch.renewal_due and not lane.in_hand and not self.draining:
                self._renew(lane)
        # Out-of-order acks wait for those before them, but not when there is nothing else to do.
        return HOLD if held else self._until_next_look()

    def _take(self, lane: Lane) -> list[Delivery]:
        batch = lane.arrived[:]
        lane.arrived.clear()
        lane.taken += len(batch)
        return batch

    # in the event loop that attends: the same, where nothing must be waited for

    def read_in_loop(self) -> None:
        attention = self._attention
        assert attention is not None
        attention.connection.drain_nowait()
        for lane in self.lanes:
            if lane.arrived and not lane.careful and not self.draining:
                self.hand_over_here(lane, self._take(lane))
            elif lane.arrived:
                self.wake()
        if self._fault is not None:
            self.wake()

    def settle(self, lane: Lane) -> None:
        """From the event loop: send the acks that are due, here if the loop attends, else in the thread."""
        attention = self._attention
        if attention is None or not attention.take():
            self.wake()
            return
        held = False
        try:
            held = self._send_acks(lane)
        except Exception as error:  # noqa: BLE001  # the thread ends the epoch over any, as it does over its own
            attention.fail(error)
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
            self.listener.from_thread(self.listener.cancelled)

    def lost(self, error: BaseException) -> None:
        for lane in self.lanes:
            lane.channel = None
            lane.arrived = []
            lane.consumer_tag = ""
            lane.watch.ended()
        if self.draining:
            self.listener.from_thread(self.listener.cancelled)
        if isinstance(error, errors.BrokerError):
            return  # `failed` says it
        logger.warning(
            "%s: connection lost (%s); connecting again. Events in hand come again where their handler had not ended.",
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

    def closing(self) -> None:
        for lane in self.lanes:
            while self._send_acks(lane):  # what it holds back for earlier ones goes the next time
                pass


def _no_others() -> None:
    """Before the event loop runs."""


def _nobody_listens(lane: Lane, batch: list[Delivery]) -> None:
    """Before the event loop runs: what arrives is delivered again."""


def _still_deaf(why: str) -> errors.WorkerError:
    return errors.WorkerError(
        f"Connected but deaf: {why}, also after connecting and subscribing anew {REBUILDS} times. Giving up, so that "
        "whoever supervises this worker knows. Look at the queue on the broker (lightbus doctor MODULE:ATTR; "
        "rabbitmq-queues quorum_status NAME), then start the worker again."
    )
