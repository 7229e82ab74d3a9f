"""The consuming connection: a thread of its own subscribes, reads, acks and beats, also while a handler blocks the
event loop. Whole batches cross to the event loop, and their settlements come back.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from lightbus import errors
from lightbus.connection import FATAL, Broker, ConnectionThread, declare
from lightbus.handler import Handler
from lightbus.settlement import Settlements
from lightbus.topology import Topology
from lightbus.transport import Channel, Connection, Delivery
from lightbus.watchdog import REBUILDS, Watch

logger = logging.getLogger("lightbus")

IDLE = 60.0


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


class Listener(Protocol):
    """Who lives in the event loop and hears of what the thread meets."""

    def from_thread(self, function: Callable[..., object], *arguments: Any) -> None:
        """Run one of the functions below soon, in the event loop."""
        ...

    def subscribed(self) -> None: ...

    def cancelled(self) -> None: ...

    def give_up(self, error: errors.LightbusError) -> None: ...


class Subscriber(ConnectionThread):
    """The consuming connection: subscribes to every lane's queue, hands batches over, sends the acks."""

    def __init__(self, broker: Broker, name: str, wanted: Topology, lanes: Sequence[Lane], listener: Listener) -> None:
        self.wanted_topology = wanted
        self.lanes = lanes
        self.listener = listener
        self.hand_over: Callable[[Lane, list[Delivery]], object] = _nobody_listens
        """Gives a batch to the event loop, without waiting. Raises RuntimeError where the loop has ended."""
        self.draining = False
        """Take no more; what is in hand may still be settled."""
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
        if self.epoch:
            logger.info("%s: connected and subscribed again.", self.name)
        self.listener.from_thread(self.listener.subscribed)

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
                batch = lane.arrived[:]
                lane.arrived.clear()
                lane.taken += len(batch)
                if not self.draining:
                    with contextlib.suppress(RuntimeError):  # the loop has ended: the batch is delivered again
                        self.hand_over(lane, batch)
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
        logger.warning(
            "%s: connection lost (%s); connecting again. Events in hand come again where their handler had not ended.",
            self.name,
            error,
        )

    def failed(self, error: errors.BrokerError) -> None:
        if self.epoch == 0 and isinstance(error, FATAL):
            self.stopping = True
            self.listener.from_thread(self.listener.give_up, error)
        else:
            logger.error("%s: %s Trying again.", self.name, error)

    def closing(self) -> None:
        for lane in self.lanes:
            lane.settlements.settle([])
            self._send_acks(lane)


def _nobody_listens(lane: Lane, batch: list[Delivery]) -> None:
    """Before the event loop runs: what arrives is delivered again."""


def _still_deaf(why: str) -> errors.WorkerError:
    return errors.WorkerError(
        f"Connected but deaf: {why}, also after connecting and subscribing anew {REBUILDS} times. Giving up, so that "
        "whoever supervises this worker knows. Look at the queue on the broker (lightbus doctor MODULE:ATTR; "
        "rabbitmq-queues quorum_status NAME), then start the worker again."
    )
