"""The publishing connection: sends what waits in the window, and reads its confirms.

py-amqp's own `confirm_publish` takes any ack for the right one. Here delivery tags are counted, `multiple`, nack and
return are distinguished, and after a reconnect what was not confirmed is published again (same id).
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable

import amqp.exceptions

from lightbus import errors
from lightbus.connection.declare import declare
from lightbus.connection.diagnosis import FATAL, describe
from lightbus.connection.dial import BrokerAddresses, address_of
from lightbus.connection.loop_reader import Loop
from lightbus.connection.thread import ConnectionThread
from lightbus.connection.wake_up import WakeUp
from lightbus.publishing.confirms import ConfirmWindow, Refusal
from lightbus.transport import Channel, Connection, Unencodable
from lightbus.wire import topology
from lightbus.wire.topology import QueueType

logger = logging.getLogger("lightbus")

SEND_DIRECTLY = 500
"""Messages that a caller's thread sends at once at most; the connection's thread sends more."""
IDLE = 60.0
UNREACHABLE_FOR = 1.0
"""Seconds without a connection until that is logged: once, for as long as it lasts."""
RENEW_AFTER, RENEW_EVERY, RENEW_WAIT = 1.0, 5.0, 2.0
"""Seconds: see `ChannelRenewal`."""

_BASIC_PUBLISH = (60, 40)
# Refusals because a permission, or the exchange, was removed: not because of the message.
_NOT_THE_MESSAGE = (amqp.exceptions.AccessRefused, amqp.exceptions.NotFound, amqp.exceptions.NotAllowed)


class ChannelRenewal:
    """When to replace the channel: 1 s after a nack, at most every 5 s. Pure: the clock is a parameter.

    RabbitMQ (seen with 3.10.8): a channel that first publishes to a quorum queue during the election of a leader may
    nack every message to it for as long as the old leader's node is down. A new channel does not.
    """

    def __init__(self) -> None:
        self.due_at: float | None = None
        self._last = -math.inf

    def nacked(self, now: float) -> None:
        if self.due_at is None:
            self.due_at = max(now + RENEW_AFTER, self._last + RENEW_EVERY)

    def due(self, now: float) -> bool:
        return self.due_at is not None and now >= self.due_at

    def overdue(self, now: float) -> bool:
        """Whether it has waited too long for confirms. (It waits, since what is in flight would be sent twice.)"""
        return self.due_at is not None and now > self.due_at + RENEW_WAIT

    def postpone(self, now: float) -> None:
        self.due_at = now + RENEW_EVERY

    def done(self, now: float) -> None:
        self.due_at, self._last = None, now


class PublisherConnection(ConnectionThread):
    """A publisher's connection, and the thread that owns it. Callers' threads may send too, one at a time."""

    def __init__(self, app: str, broker: BrokerAddresses, queue_type: QueueType) -> None:
        self.app = app
        self.queue_type: QueueType = queue_type
        self._reset()
        super().__init__(broker, f"lightbus {app} publisher")

    def _reset(self) -> None:
        self.window = ConfirmWindow()
        self.channel: Channel | None = None
        """In confirm mode; None while there is no connection."""
        self.sending = threading.RLock()
        """Its holder may take from the window and send. Reentrant: a signal handler may publish in the same thread."""
        self._sender = 0
        """The ident of the caller's thread that is sending; 0 if none is."""
        self._interrupted = False
        """A signal handler raised while a caller was sending: the connection's delivery tags are uncertain."""
        self._renewal = ChannelRenewal()
        self._log_unreachable_at: float | None = None
        """On the monotonic clock; None while connected, infinite once it was logged."""
        self._openers: list[WakeUp] = []

    def forget(self) -> None:
        super().forget()
        self._reset()  # the parent publishes what is in the window

    # --- from any thread

    def add_opener(self, opened: WakeUp) -> None:
        """Connect, though no message waits, and set this once that is done or has failed for good."""
        self._openers.append(opened)

    def remove_opener(self, opened: WakeUp) -> None:
        self._openers.remove(opened)

    def send_or_wake(self) -> None:
        """Send what is waiting from the calling thread if that is possible at once, else wake the connection's thread.

        Without the thread switch, an event that is published alone takes about a fifth less time and CPU (the median
        of five pairs of runs on RabbitMQ 3.10.8).

        Raises:
            errors.PublishWouldDeadlock: a signal handler or a finalizer calls this while its thread is sending.
        """
        sent = False
        try:
            # Inside, since a signal handler may raise right after it: Ctrl-C in a shell, the time limit of a job.
            if self.sending.acquire(blocking=False):
                sent = self._send_directly()
        finally:
            try:
                self.sending.release()
            except RuntimeError as error:  # another thread holds it
                if errors.is_from_deeper(error):
                    raise
        window = self.window
        if not sent or (window.waiting and not window.full):  # else the next confirm makes room
            if self._sender and self._sender == threading.get_ident():
                raise would_deadlock()
            self.wake()

    def _send_directly(self) -> bool:
        connection, channel = self.connection, self.channel
        if connection is None or channel is None or connection.blocked or self.window.one_by_one:
            return False
        if self._sender or self._interrupted:
            return False
        if self._renewal.due_at is not None and self._renewal.due(time.monotonic()):
            return False
        try:
            self._sender = threading.get_ident()
            sent = self._take_and_send(channel)
        except BaseException:
            self._interrupted = True
            self._sender = 0
            raise
        self._sender = 0
        return sent

    def _take_and_send(self, channel: Channel) -> bool:
        batch = self.window.take(SEND_DIRECTLY)
        if not batch:
            return True
        try:
            if channel.publish_nowait([pending.publication for pending in batch]):
                return True
        except Unencodable:  # the connection's thread refuses it
            pass
        self.window.put_back(batch)
        return False

    # --- in the connection's thread

    def wanted(self) -> bool:
        return bool(self.window.waiting or self._openers)

    def opened(self, connection: Connection) -> None:
        declare(connection, topology.publishing(self.app))
        channel = self._confirming_channel(connection)
        self.window.begin_connection()
        self._interrupted, self._sender = False, 0
        self._renewal.due_at = None
        self._log_unreachable_at = None
        self.channel = channel

    def _confirming_channel(self, connection: Connection) -> Channel:
        channel = connection.channel()
        channel.on_ack = self.window.ack
        look = address_of(connection, self.broker).broker.queue_lengths
        channel.on_nack = lambda tag, multiple: self._nacked(tag, multiple, look)
        channel.on_return = self.window.mark_returned
        channel.confirm_select()
        return channel

    def _nacked(self, tag: int, multiple: bool, look: str) -> None:
        self._renewal.nacked(time.monotonic())
        self.window.nack(tag, multiple, look)

    def _renew_channel(self, connection: Connection) -> bool:
        """Replace the channel once nothing is in flight on it, so that nothing is published twice. False: not yet."""
        old = self.channel
        assert old is not None
        with self.sending:
            if self.window.unconfirmed:
                if not self._renewal.overdue(time.monotonic()):
                    return False
                self._renewal.postpone(time.monotonic())  # its confirms do not arrive: continue without a new channel
                return True
            self.channel = self._confirming_channel(connection)
            self.window.begin_channel()
            self._renewal.done(time.monotonic())
        old.close()
        return True

    def work(self) -> float:
        self.announce()
        connection = self.connection
        assert connection is not None
        self._wake_openers()
        if self._renewal.due(time.monotonic()) and not self._renew_channel(connection):
            return RENEW_WAIT
        channel = self.channel
        assert channel is not None
        with self.sending:
            if self._interrupted or self._sender:  # no caller can be sending now, so a sender was interrupted
                raise OSError("publishing was interrupted in the middle of a message")
            if connection.blocked or not self.window.waiting:
                return IDLE
            if self.window.stuck:
                raise OSError(f"{self.window.size} messages stayed unconfirmed until their callers had given up")
            self._send(connection, channel)
        return IDLE

    def _send(self, connection: Connection, channel: Channel) -> None:
        window = self.window
        batch = window.take(window.size)
        if window.wanted_delay_level > window.declared_delay_level:
            self._declare_delays(connection)
            batch += window.take(window.size)
        while batch:
            try:
                channel.publish([pending.publication for pending in batch])
            except Unencodable as error:
                refused = next(pending for pending in batch if pending.publication is error.publication)
                window.put_back(batch)
                if window.withdraw(refused):
                    window.refuse(refused, chained(errors.PublishRefused(f"{refused} cannot be sent: {error}"), error))
                    self.announce()
                batch = window.take(window.size)
            else:
                return

    def _declare_delays(self, connection: Connection) -> None:
        """Declare the queues that delayed events pass through. If that fails, only the delayed events fail."""
        window, wanted = self.window, self.window.wanted_delay_level
        try:
            declare(connection, topology.delaying(self.app, wanted, self.queue_type))
        except amqp.exceptions.ChannelError as error:  # of a separate channel: the connection stays open
            reason = describe(error, self.address)
            window.fail_delayed(lambda: chained(errors.PublisherRefused(f"The event was not sent. {reason}"), reason))
            self.announce()
        else:
            window.declared_delay_level = window.wanted_delay_level = wanted

    def channel_closed(self, error: amqp.exceptions.ChannelError) -> bool:
        """The broker refused a message and closed its channel: publish on another channel of the same connection."""
        connection = self.connection
        if connection is None or self._interrupted or error.method_sig != _BASIC_PUBLISH:
            return False
        again = self._take_back(error)
        if isinstance(error, amqp.exceptions.NotFound):  # the exchange was deleted
            declare(connection, topology.publishing(self.app))
        channel = self._confirming_channel(connection)
        with self.sending:
            self.window.begin_channel()
            self.channel = channel
        logger.info(
            "%s: the broker closed the channel (%s); opening another one, %d messages will be published again.",
            self.name,
            error,
            again,
        )
        return True

    def lost(self, error: BaseException) -> None:
        again = self._take_back(error)
        logger.warning("%s: connection lost (%s); %d messages will be published again.", self.name, error, again)

    def _take_back(self, error: BaseException) -> int:
        """What is unconfirmed will be sent again, except what the broker refused. Returns how many."""
        with self.sending:
            self.channel = None
            # After an interruption it is not known what was sent, and so not what was refused.
            again, refused = self.window.take_back(None if self._interrupted else Refusal.of(error))
        kind: type[errors.PublishRefused] = errors.PublishRefused
        cause = error
        if refused and isinstance(error, _NOT_THE_MESSAGE):
            kind, cause = errors.PublisherRefused, describe(error, self.address)
        for pending in refused:
            self.window.refuse(pending, chained(kind(f"{pending}: the broker refused it: {cause}"), cause))
        self.announce()
        return again

    def failed(self, error: errors.BrokerError) -> None:
        if isinstance(error, FATAL) and not self.broker.worked:  # a wrong setting: waiting would not help
            self.fail_all(lambda: chained(errors.PublisherRefused(f"The event was not sent. {error}"), error))
            self._wake_openers()
        elif self._log_unreachable_at is None:
            self._log_unreachable_at = time.monotonic() + UNREACHABLE_FOR
        elif time.monotonic() >= self._log_unreachable_at:
            self._log_unreachable_at = math.inf
            logger.warning("%s: %s Trying again.", self.name, error)

    def closing(self) -> None:
        self.announce()
        with self.sending:
            self.channel = None

    def _wake_openers(self) -> None:
        for opened in self._openers.copy():
            opened.set()

    # --- in the event loop that reads

    def read_in_loop(self) -> None:
        loop_reader = self.reading.loop_reader
        assert loop_reader is not None
        loop_reader.connection.drain_nowait()
        self.announce(loop_reader.loop)
        if self.window.waiting:
            self.send_or_wake()

    # --- outcomes, in the thread or in the loop

    def announce(self, here: Loop | None = None) -> None:
        """Wake the callers whose messages are finished: each event loop once for all of its messages.

        Args:
            here: the event loop that runs this.
        """
        finished = self.window.finished.copy()
        if not finished:
            return
        by_loop: dict[Loop, list[Callable[[], object]]] = {}
        for pending in finished:
            waiter = pending.waiter
            if waiter is None:
                lock = pending.lock
                if lock is not None and lock.locked():
                    lock.release()
            elif pending.loop is here:
                waiter.set()
            elif pending.loop is not None:
                by_loop.setdefault(pending.loop, []).append(waiter.set)
        for loop, wake_ups in by_loop.items():
            try:
                loop.soon_from_thread(_call_all, wake_ups)
            except RuntimeError:
                logger.debug("an event loop closed before it received %d confirms", len(wake_ups))
        del self.window.finished[: len(finished)]  # last: if a signal handler interrupts this, it is done again

    def fail_all(self, new_error: Callable[[], errors.PublishError]) -> None:
        """Fail every message that has no outcome. `new_error` makes an error for each."""
        self.window.fail_all(new_error)
        self.announce()


def would_deadlock() -> errors.PublishWouldDeadlock:
    return errors.PublishWouldDeadlock(
        "The event was not sent: a signal handler (or a finalizer) called publish while it interrupted another "
        "publish of the same thread. Set a flag in the handler and publish where the flag is read, or publish in a "
        "separate thread."
    )


def chained(error: errors.PublishError, cause: BaseException | None) -> errors.PublishError:
    error.__cause__ = cause
    return error


def _call_all(functions: list[Callable[[], object]]) -> None:
    for function in functions:
        function()
