"""The consuming connection. A separate thread subscribes and sends heartbeats; it also reads and acks while a handler
blocks the event loop, otherwise the loop does. Whole batches go to the handlers, and their settlements come back.

What concerns one queue only is in `consumer.Consumer`.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import amqp.exceptions

from lightbus import errors
from lightbus.connection.address import Address
from lightbus.connection.declare import declare
from lightbus.connection.diagnosis import CHANNEL_LOST, FATAL
from lightbus.connection.dial import BrokerAddresses, address_of
from lightbus.connection.loop_reader import Loop
from lightbus.connection.thread import ConnectionThread
from lightbus.consuming.consumer import Consumer, Receiver
from lightbus.consuming.subscription import Subscription
from lightbus.consuming.watchdog import REBUILDS
from lightbus.transport import Connection
from lightbus.wire.topology import Topology

logger = logging.getLogger("lightbus")

IDLE = 60.0
LOG_AGAIN = 10.0
"""Seconds between two logs of the same reason why there is no connection."""
REPAIR_PAUSE = 1.0
"""Seconds between two repairs of subscriptions: what fails at once again must not keep the broker busy."""
REPAIRS = 5
"""Repairs in a row that may fail over something that is deleted meanwhile; then the connection is replaced."""
HOLD = 0.02
"""Seconds that acks wait for those of earlier deliveries, when there is nothing else to do."""


class Listener(Protocol):
    """What the connection reports. Called in the event loop."""

    def subscribed(self) -> None:
        """Every queue has a consumer, for the first time or again."""
        ...

    def cancelled(self) -> None:
        """After `drain`: nothing more arrives."""
        ...

    def give_up(self, error: errors.LightbusError) -> None:
        """The connection has ended for good."""
        ...


class EpochEnded(OSError):
    """The connection is to be replaced, though it works."""


class ConsumerConnection(ConnectionThread):
    """The consuming connection: a consumer on each queue, batches to the event loop, acks to the broker."""

    def __init__(
        self, broker: BrokerAddresses, name: str, wanted: Topology, subscriptions: Sequence[Subscription]
    ) -> None:
        self.wanted_topology = wanted
        self.draining = False
        """No more events are taken; what is in hand may still be settled."""
        self.consumers = [Consumer(subscription, self) for subscription in subscriptions]
        self._missing: str | None = None
        self._repaired_at = -math.inf
        self._failed_repairs = 0
        self._logged, self._log_again_at = "", 0.0
        self._settling_soon = False
        self._held_until_later = False
        self._drained = False
        super().__init__(broker, name)

    # --- from the event loop

    def begin(
        self, loop: Loop, context: contextvars.Context, listener: Listener, receivers: Sequence[Receiver]
    ) -> None:
        """Connect and consume.

        Args:
            loop: the event loop that runs here. Everything that is given is called in it, in `context`.
            listener: called with the connection's events.
            receivers: one for each of `consumers`, in their order.
        """
        self._home, self._context, self._listener = loop, context, listener
        for consumer, receiver in zip(self.consumers, receivers, strict=True):
            consumer.deliver_to(receiver, loop, context)
        self.let_loop_read(loop)
        self.ensure_started()

    def drain(self) -> None:
        """Take no more; what is in hand may still be settled. `Listener.cancelled` follows."""
        self.draining = True
        self.wake()

    def settle(self, consumer: Consumer) -> None:
        """Send the acks that are due, here if the loop reads, else in the thread."""
        loop_reader = self.reading.loop_reader
        if consumer.acks_wait_until and not consumer.full:
            return  # the thread sends them
        if loop_reader is None or consumer.acks_wait_until or not loop_reader.acquire():
            self.wake()
            return
        held = False
        try:
            held = consumer.send_acks()
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
        for consumer in self.consumers:
            if consumer.subscription.settled:
                self.settle(consumer)

    def _settle_held(self) -> None:
        self._held_until_later = False
        for consumer in self.consumers:
            if consumer.deliveries.settlements.waiting:
                self.settle(consumer)

    # --- from any thread

    def declare_again(self, what_is_missing: str) -> None:
        """Declare all that this app needs again. Events in progress are not affected."""
        self._missing = what_is_missing
        self.wake()

    # --- in the event loop that reads: as `work`, without waiting

    def read_in_loop(self) -> None:
        loop_reader = self.reading.loop_reader
        assert loop_reader is not None
        loop_reader.connection.drain_nowait()
        for consumer in self.consumers:
            if consumer.fault is not None:
                self.wake()
            if consumer.deliveries.arrived:
                if consumer.on_probation or self.draining:
                    self.wake()
                    continue
                consumer.hand_over_here(consumer.take())
                if not consumer.look_planned and consumer.credit.unsteady(time.monotonic()):
                    self.wake()

    # --- in the thread

    def opened(self, connection: Connection) -> None:
        self._missing, self._failed_repairs, self._logged = None, 0, ""
        declare(connection, self.wanted_topology)
        for consumer in self.consumers:
            consumer.subscribe(connection)
        if self.epoch:
            logger.info("%s: connected and subscribed again.", self.name)
        self._report(self._listener.subscribed)

    def work(self) -> float:
        connection = self.connection
        assert connection is not None
        loop = self.reading.loop
        if loop is not None and loop.ended:  # disconnect, so that the broker redelivers what is in hand
            self.stopping = True
            return 0.0
        if self.draining:
            self._cancel()
        else:
            self._watch(connection)
        pause = self._repair(connection)
        held = False
        for consumer in self.consumers:
            if consumer.deliveries.arrived:
                batch = consumer.take()
                if not self.draining:
                    # First, while the properties are this thread's to read; acted on last, so that no event waits.
                    enough = consumer.on_probation and consumer.passes_probation(batch[-1])
                    with contextlib.suppress(RuntimeError):  # the loop has ended: the batch is delivered again
                        consumer.hand_over(batch)
                    if enough:
                        consumer.end_probation()
            if not self.draining and consumer.channel is not None and consumer.fault is None:
                pause = min(pause, self._adapt(consumer, connection))
            else:
                consumer.acks_wait_until = 0.0
            settlements = consumer.deliveries.settlements
            if not consumer.acks_wait_until and (consumer.subscription.settled or settlements.waiting):
                held |= consumer.send_acks()
            if consumer.retired:
                consumer.close_retired()
        # Out-of-order acks wait for those before them, but not when there is nothing else to do.
        return min(pause, HOLD if held else self._until_next_look())

    def _adapt(self, consumer: Consumer, connection: Connection) -> float:
        try:
            look_after = consumer.adapt()
            consumer.look_planned = look_after < math.inf
            if consumer.watch.renewal_due and not consumer.in_hand:
                consumer.renew(connection)
        except CHANNEL_LOST as error:
            consumer.channel_lost(error)
            return 0.0
        return look_after

    def _cancel(self) -> None:
        cancelled = [consumer.cancel() for consumer in self.consumers]
        if any(cancelled) or not self._drained:
            self._drained = True
            self._report(self._listener.cancelled)

    def _until_next_look(self) -> float:
        if self.draining:
            return IDLE
        if any(consumer.deliveries.arrived for consumer in self.consumers):  # while one was subscribed again
            return 0.0
        looks = (consumer.watch.next_look for consumer in self.consumers if consumer.fault is None)
        return max(0.0, min(looks, default=math.inf) - time.monotonic())

    def _report(self, method: Callable[..., object], *arguments: Any) -> None:
        """Call a method of the listener in the event loop."""
        with contextlib.suppress(RuntimeError):  # the loop has ended: what was in hand is delivered again
            self._home.soon_from_thread(self._context.run, method, *arguments)

    # --- faults of one queue or channel: the others go on

    def _repair(self, connection: Connection) -> float:
        """Declare what is missing, and subscribe again where that is needed. Returns when to look again, in seconds."""
        now = time.monotonic()
        faulty = [] if self.draining else [consumer for consumer in self.consumers if consumer.fault is not None]
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
        for consumer in faulty:
            logger.warning(
                "%s: subscription to %r lost (%s); subscribing again. %s",
                self.name,
                consumer.name,
                consumer.fault,
                "Its unacknowledged events will be redelivered."
                if consumer.channel is None
                else "Events in progress are not affected.",
            )
            consumer.retire()
            try:
                consumer.subscribe(connection)
            except amqp.exceptions.NotFound as error:
                consumer.channel_lost(error)
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

    def _watch(self, connection: Connection) -> None:
        """The watchdog: ask the broker about each queue that is due, and subscribe again where nothing arrives."""
        for consumer in self.consumers:
            watch = consumer.watch
            if time.monotonic() < watch.next_look or consumer.channel is None or consumer.fault is not None:
                continue
            try:
                stalled = consumer.look()
            except CHANNEL_LOST as error:
                consumer.channel_lost(error)
                continue
            if stalled is None:
                continue
            if watch.rebuilds >= REBUILDS:
                self._give_up(_still_stalled(stalled, address_of(connection, self.broker)))
                return
            watch.rebuilds += 1
            logger.error(
                "%s: connected but stalled: %s. Subscribing again on %s (attempt %d of %d).",
                self.name,
                stalled,
                "a new channel" if watch.rebuilds == 1 else "a new connection",
                watch.rebuilds,
                REBUILDS,
            )
            if watch.rebuilds > 1:
                raise EpochEnded(stalled)
            consumer.fault = stalled

    # --- the end of a connection

    def lost(self, error: BaseException) -> None:
        for consumer in self.consumers:
            consumer.connection_lost()
        if self.draining:
            self._report(self._listener.cancelled)
        if isinstance(error, errors.BrokerError):
            return  # `failed` logs it
        logger.warning(
            "%s: connection lost (%s); reconnecting. Unacknowledged events will be redelivered.", self.name, error
        )

    def failed(self, error: errors.BrokerError) -> None:
        if self.epoch == 0 and isinstance(error, FATAL):
            self._give_up(error)
        elif str(error) != self._logged or time.monotonic() >= self._log_again_at:
            self._logged, self._log_again_at = str(error), time.monotonic() + LOG_AGAIN
            logger.error("%s: %s Trying again.", self.name, error)

    def usable_after(self, error: Exception) -> bool:
        return isinstance(error, (EpochEnded, CHANNEL_LOST, TimeoutError))

    def closing(self) -> None:
        for consumer in self.consumers:
            consumer.send_all_acks()

    def _give_up(self, error: errors.LightbusError) -> None:
        self.stopping = True
        self._report(self._listener.give_up, error)


def _still_stalled(why: str, address: Address) -> errors.WorkerError:
    return errors.WorkerError(
        f"Connected but stalled: {why}, even after reconnecting and subscribing again {REBUILDS} times. Exiting, so "
        "that the supervisor of this worker notices. Check the queue on the broker (lightbus doctor MODULE:ATTR; "
        f"{address.broker.queue_health}), then restart the worker."
    )
