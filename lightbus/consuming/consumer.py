"""One queue's consumer on the broker: its channels, its prefetch, its acks. Owned by the reader of the connection.

What all queues of a worker share is in `connection.ConsumerConnection`; what a consumer may hold is decided in
`credit`, which acks to send in `acks`, whether it is stalled in `watchdog`.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import math
import time
from collections.abc import Callable
from typing import Protocol

from lightbus.connection.counts import queue_counts
from lightbus.connection.diagnosis import LOST
from lightbus.connection.loop_reader import Loop
from lightbus.consuming.credit import Credit
from lightbus.consuming.deliveries import Deliveries
from lightbus.consuming.retired import RetiredChannels
from lightbus.consuming.subscription import Subscription
from lightbus.consuming.watchdog import Watch
from lightbus.transport import Channel, Connection, Delivery
from lightbus.wire import codec

logger = logging.getLogger("lightbus")

FILLED_WITHIN = 0.05
"""Seconds that acks wait at most until a consumer that is to be replaced holds all that it may."""
SUSPECT = 2
"""An event that was redelivered this often may be what crashes its workers. Not 1: each lost connection returns once
all that was in hand."""


class Receiver(Protocol):
    """Takes what arrives, in the event loop."""

    def receive(self, batch: list[Delivery]) -> None: ...


class Owner(Protocol):
    """The connection, as one of its consumers needs it."""

    name: str
    """In the log."""
    draining: bool
    """No more events are taken."""

    def wake(self) -> None:
        """Let the connection's thread look for work at once."""
        ...


class Consumer:
    """A consumer on one queue, from one channel to the next.

    A little over 300 lines, because all of it acts on one channel.

    It begins *on probation*: it takes one delivery at a time, until one arrives that was not redelivered repeatedly.
    From then on it takes as many as the prefetch allows, so nearly always the first delivery ends the probation. When
    a worker dies, the broker counts a return for all that it held, and dead-letters what returned too often: so an
    event that crashes each of its workers must soon be the only one that they hold.
    """

    def __init__(self, subscription: Subscription, owner: Owner) -> None:
        config = subscription.config
        self.subscription = subscription
        self.name = config.name
        self.prefetch = config.prefetch
        self.credit = Credit(config.prefetch, config.concurrency, config.budget)
        self.watch = Watch(config.name)
        self.channel: Channel | None = None
        self.deliveries = Deliveries()
        """Those of the present channel."""
        self.retired = RetiredChannels()
        self.consumer_tag = ""
        self.fault: str | None = None
        """Why the subscription has ended. It must be made again."""
        self.on_probation = False
        self.suspecting = False
        """On probation for a reason that was logged."""
        self.prefetch_now = 1
        """What the broker knows; a lower one, only once it has confirmed it."""
        self.acks_wait_until = 0.0
        """No acks are sent until then (monotonic), unless the consumer is replaced before; 0 where none wait."""
        self.look_planned = False
        """The thread will look at the prefetch again, though nothing happens. Where it will not, it must be woken."""
        self.hand_over: Callable[[list[Delivery]], object]
        """Gives a batch to the event loop, without waiting. Raises RuntimeError where the loop has ended."""
        self.hand_over_here: Callable[[list[Delivery]], object]
        """The same from the loop itself: after what it was given before, so that a queue's order is kept."""
        self._owner = owner
        self._seen_by_watch = 0

    def deliver_to(self, receiver: Receiver, loop: Loop, context: contextvars.Context) -> None:
        """From here on, what arrives goes to this receiver, in this event loop."""
        # Without another function in between: they are called for each batch.
        self.hand_over = functools.partial(loop.soon_from_thread, context.run, receiver.receive)
        self.hand_over_here = functools.partial(loop.soon, context.run, receiver.receive)

    @property
    def in_hand(self) -> int:
        """Deliveries of the present channel that are not settled on the broker."""
        return self.deliveries.in_hand

    @property
    def room(self) -> bool:
        """Whether the broker may deliver more."""
        return self.deliveries.in_hand < self.prefetch_now

    @property
    def full(self) -> bool:
        """Whether it holds all that it may, so that nothing is on its way to it."""
        return self.deliveries.full(self.prefetch_now)

    # --- channels

    def subscribe(self, connection: Connection, *, on_probation: bool = True) -> None:
        """Consume on a new channel."""
        channel = connection.channel()
        channel.on_closed = functools.partial(self._closed, channel)
        channel.takes = functools.partial(self._takes, channel)
        self.begin(channel, on_probation=on_probation and self.prefetch > 1)
        channel.basic_qos(channel.counts_bytes and self.credit.budget, self.prefetch_now, False)
        self._consume(channel)
        self.watch.subscribed(time.monotonic())

    def begin(self, channel: Channel, *, on_probation: bool) -> None:
        """From here on this is the channel."""
        self.channel, self.fault = channel, None
        self.deliveries = Deliveries()
        self._seen_by_watch = 0
        self.acks_wait_until, self.look_planned = 0.0, False
        self.on_probation, self.suspecting = on_probation, False
        self.credit.begin(1 if on_probation else self.credit.window)
        self._prefetch_is(self.credit.given)
        self._update_channels()

    def end(self, *, retired: int = 0) -> None:
        """There is no channel until `begin`. The present one may have `retired` deliveries left to settle."""
        if retired:
            assert self.channel is not None
            self.retired.add(self.channel, retired)
        self.channel, self.consumer_tag = None, ""
        self.deliveries.end()
        self._update_channels()

    def connection_lost(self) -> None:
        self.retired.clear()
        self.end()
        self.fault = None
        self.watch.ended()

    def renew(self, connection: Connection) -> None:
        """Subscribe on a new channel: what the broker believes it delivered on the old one comes again."""
        channel = self.channel
        assert channel is not None
        channel.basic_cancel(self.consumer_tag)
        if self.in_hand:  # it came in between, so this channel receives; its tags can be acked on it alone
            self._consume(channel)
        else:
            # No worker has died: where the probation was over, it stays over. So idle workers share the next burst.
            on_probation = self.on_probation
            self.end()
            channel.close()
            self.subscribe(connection, on_probation=on_probation)
        self.watch.renewed(time.monotonic())

    def retire(self) -> None:
        """Let nothing more arrive on the channel, which stays open until all that did is settled."""
        channel = self.channel
        if channel is None:
            return
        if self.consumer_tag:
            channel.basic_cancel(self.consumer_tag)
        self._give_back()
        if self.deliveries.arrived:
            with contextlib.suppress(RuntimeError):  # the loop has ended: the batch is delivered again
                self.hand_over(self.take())
        self.send_all_acks()
        left = self.in_hand
        self.end(retired=left)
        if not left:
            channel.close()
        self.close_retired()

    def close_retired(self) -> None:
        """Close the retired channels that are no longer needed."""
        for channel in self.retired.closable():
            self._forget(channel)
            channel.close()

    def cancel(self) -> bool:
        """Take no more. Returns whether there was a consumer to cancel."""
        tag, self.consumer_tag = self.consumer_tag, ""
        if tag:
            assert self.channel is not None
            self.channel.basic_cancel(tag)
        return bool(tag)

    def channel_lost(self, error: Exception) -> None:
        """A method on the channel failed: the broker has closed it."""
        channel = self.channel
        if channel is not None:
            self._closed(channel, error)
            with contextlib.suppress(*LOST):  # does nothing if it is closed already
                channel.close()

    def _consume(self, channel: Channel) -> None:
        deliveries = self.deliveries
        deliveries.begin_consumer()
        on_cancel = functools.partial(self._cancelled, channel)
        self.consumer_tag = channel.consume(self.name, deliveries.arrived.append, on_cancel=on_cancel)

    def _cancelled(self, channel: Channel, consumer_tag: str) -> None:
        """The broker ended the subscription; the channel is open, and what arrived on it can be settled."""
        if channel is self.channel and not self._owner.draining:
            if consumer_tag == self.consumer_tag:
                self.consumer_tag = ""
            self.fault = (
                f"the broker cancelled the consumer {consumer_tag}: its queue was deleted, or moved to another node"
            )

    def _closed(self, channel: Channel, error: Exception) -> None:
        """The broker closed the channel: what was in hand on it is delivered again."""
        if channel is self.channel:
            self.fault = f"the broker closed its channel: {error}"
            self.end()
        else:
            self._forget(channel)
        self._owner.wake()

    def _forget(self, retired: Channel) -> None:
        """This one is closed."""
        self.retired.forget(retired)
        self._update_channels()

    def _update_channels(self) -> None:
        present = () if self.channel is None else (self.channel,)
        self.subscription.channels = (*self.retired, *present)

    # --- what arrives

    def take(self) -> list[Delivery]:
        """What has arrived, to be handed over."""
        self.credit.arrived(time.monotonic(), self.deliveries.settlements.sent)
        return self.deliveries.take()

    def passes_probation(self, delivery: Delivery) -> bool:
        """Whether this delivery ends the probation."""
        returns = codec.read_returns(delivery)
        if returns >= SUSPECT and not self.suspecting:
            self.suspecting = True
            logger.warning(
                "%s: the event %s in %r was redelivered %d times: its workers crashed, possibly because of it, or "
                "lost their connections. Handling one event at a time until one arrives that was not redelivered.",
                self._owner.name,
                codec.read_cause(delivery)[0],
                self.name,
                returns,
            )
        return returns < SUSPECT

    def end_probation(self) -> None:
        """From here on the prefetch follows the handlers."""
        if self.suspecting:
            logger.info("%s: prefetching up to %d events from %r again.", self._owner.name, self.prefetch, self.name)
        self.on_probation = self.suspecting = False

    def _takes(self, channel: Channel, delivery_tag: int, size: int) -> bool:
        """Whether there is room for a large body. If not, the event goes back to its queue, once the prefetch is lower.

        Called while a connection is read, before the body is kept.
        """
        if channel is not self.channel:
            return True
        credit, large, now = self.credit, self.deliveries.large, time.monotonic()
        credit.large(now, size)
        self._owner.wake()
        if large and sum(large.values()) + size > credit.budget and self.prefetch_now > credit.limit(now):
            self.deliveries.refuse(delivery_tag)
            return False
        large[delivery_tag] = size
        return True

    def _give_back(self) -> None:
        """Return to the queue what there was no room for. With the same prefetch, it would come again at once."""
        channel, deliveries = self.channel, self.deliveries
        assert channel is not None
        returning, deliveries.returning = deliveries.returning, []
        for tag in returning:
            channel.basic_nack(tag, requeue=True)
            deliveries.settlements.already_sent(tag)

    # --- the prefetch

    def adapt(self) -> float:
        """Set the prefetch as the handlers' speed and the bodies' size require. Returns when to look again, in seconds.

        Acks wait meanwhile, so that the present consumer gets all that it may hold: see `credit`.
        """
        if self.on_probation:
            return math.inf
        now, in_hand, credit = time.monotonic(), self.in_hand, self.credit
        if not in_hand or not credit.due(now, in_hand):
            self.acks_wait_until = 0.0
        elif self.full or credit.urgent(now):
            self.acks_wait_until = 0.0
            prefetch = credit.next_prefetch(now, in_hand)
            if prefetch is not None:
                self.set_prefetch(prefetch)
        elif not self.acks_wait_until:
            self.acks_wait_until = now + FILLED_WITHIN
        elif now >= self.acks_wait_until:
            self.acks_wait_until = 0.0
            credit.postpone(now)
        if self.deliveries.returning and self.prefetch_now <= credit.limit(now):
            self._give_back()
        if self.acks_wait_until:
            return max(0.0, self.acks_wait_until - now)
        return credit.next_look(now, self.in_hand)

    def set_prefetch(self, prefetch: int) -> None:
        """A consumer with this prefetch replaces the present one on the same channel, so that what is in hand can
        still be settled.
        """
        channel, replaced = self.channel, self.consumer_tag
        assert channel is not None
        channel.basic_cancel(replaced)  # first: from here on it is known what is in hand
        prefetch = self.credit.given = max(1, min(prefetch, self.prefetch - self.in_hand))
        # For the consumers that begin after it.
        channel.basic_qos(channel.counts_bytes and self.credit.budget, prefetch, False)
        self._consume(channel)
        self._prefetch_is(prefetch)

    def _prefetch_is(self, prefetch: int) -> None:
        self.prefetch_now = prefetch
        self.subscription.ack_batch = self.deliveries.settlements.hold = prefetch // 4

    # --- acks

    def send_acks(self) -> bool:
        """Send the acks that are due. Returns whether some are held back."""
        channel, deliveries, settled = self.channel, self.deliveries, self.subscription.settled
        settlements, large = deliveries.settlements, deliveries.large
        tags: list[int] = []
        while settled:
            delivery, accepted = settled.popleft()
            if delivery.channel is not channel:
                if self.retired.settle(delivery, accepted):
                    self._owner.wake()  # to close it
            elif accepted:
                tags.append(delivery.delivery_tag)
            else:
                assert channel is not None
                channel.basic_reject(delivery.delivery_tag, requeue=False)
                settlements.already_sent(delivery.delivery_tag)
                large.pop(delivery.delivery_tag, None)
        if channel is None:
            return False
        if large:
            for tag in tags:
                large.pop(tag, None)
        settlements.settle(tags)
        for tag, multiple in settlements.take(all_of_them=not tags):
            channel.basic_ack(tag, multiple=multiple)
        now, in_hand = time.monotonic(), self.in_hand
        self.credit.measure(now, settlements.sent, in_hand)
        if not self.on_probation and not self.look_planned and self.credit.next_look(now, in_hand) < math.inf:
            self._owner.wake()
        return bool(settlements.waiting)

    def send_all_acks(self) -> None:
        while self.send_acks():  # what it holds back for earlier ones goes the next time
            pass

    # --- the watchdog

    def look(self) -> str | None:
        """Ask the broker about the queue. Why nothing arrives although events are waiting, once two looks agree."""
        assert self.channel is not None
        # On the consuming channel itself: a broker that does not answer ends the epoch.
        counts = queue_counts(self.channel, self.name)
        if not counts.known:
            self.watch.postpone(time.monotonic())
            return None
        arrived, before = self.deliveries.count, self._seen_by_watch
        self._seen_by_watch = arrived
        return self.watch.look(
            time.monotonic(),
            ready=counts.ready,
            consumers=counts.consumers,
            received=arrived > before,
            room=self.room,
        )
