"""Publishing with pipelined confirms: many callers, one connection, one window of unconfirmed messages.

py-amqp's own `confirm_publish` takes any ack for the right one. Here delivery tags are counted, `multiple`,
nack and return are distinguished, and after a reconnect what was not confirmed is published again (same id).
"""

# The end of a timeout is a PublishError, which says what is known of the outcome; a cancel scope could not:
# ruff: noqa: ASYNC109

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import math
import re
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import amqp.exceptions

from lightbus import errors
from lightbus.connection.declare import declare
from lightbus.connection.diagnosis import FATAL, describe
from lightbus.connection.dial import BrokerAddresses
from lightbus.connection.loop_reader import Loop, current_loop
from lightbus.connection.thread import ConnectionThread, StartInterrupted, WakeUp, own_thread
from lightbus.message import Receipt
from lightbus.transport import Channel, Connection, Publication, Unencodable
from lightbus.wire import topology
from lightbus.wire.topology import QueueType

logger = logging.getLogger("lightbus")

WINDOW = 1000
"""Unconfirmed messages at most: enough to hide the round trip, little enough to publish again after a fault."""
NOT_DELAYED = -1
PIECE = 32
"""Messages that are sent while the loop's tasks publish more, so that the broker works meanwhile: with 500 in flight, a
third more a second than all in one piece (`make bench CASE=publish-500`)."""
HERE_AT_ONCE = 500
"""Messages that a caller's own thread sends at once at most; more are the connection's thread's work."""
IDLE = 60.0
UNREACHABLE_FOR = 1.0
"""Seconds without a connection until that is logged: once, for as long as it lasts."""
RENEW_AFTER, RENEW_EVERY, RENEW_WAIT = 1.0, 5.0, 2.0
"""Seconds: after a nack the channel is replaced, not more often than this, if what is in flight is settled so soon."""

# The broker closed the channel or connection over what it was sent (not over its own state).
_REFUSALS = (311, 403, 404, 405, 406, 501, 502, 503, 504, 505, 530, 540, 541)
# Of these: it may be over the broker's own state all the same, so that only a second time counts.
_DOUBTFUL = (404, 541)
_BASIC_PUBLISH = (60, 40)
_TOO_LARGE = re.compile(r"message size \d+ is larger than configured max size (\d+)")
# Of these: a permission, or the exchange, was taken away.
_NOT_OVER_THE_MESSAGE = (amqp.exceptions.AccessRefused, amqp.exceptions.NotFound, amqp.exceptions.NotAllowed)


class PendingPublish:
    """A message on its way, and the caller that waits for its confirm."""

    __slots__ = (
        "abandoned",
        "delay_level",
        "done",
        "doubted",
        "error",
        "loop",
        "publication",
        "returned",
        "sent",
    )

    def __init__(self, publication: Publication, delay_level: int | None, loop: Loop | None) -> None:
        self.publication = publication
        self.delay_level = NOT_DELAYED if delay_level is None else delay_level
        """The highest level of delayed publishing that must be there for it."""
        self.sent = False
        self.returned = False
        self.abandoned = False
        """Nobody waits for it any more: do not send it (again)."""
        self.doubted = False
        """Something went wrong over it, alone, that another attempt may repair: its exchange was missing, say."""
        self.error: errors.PublishError | None = None
        self.loop = loop
        """Where it is waited for; None where a thread waits."""
        self.done: Any
        """A `Wait` where `loop` is given, else a held lock that is released."""
        if loop is None:
            self.done = threading.Lock()
            self.done.acquire()
        else:
            self.done = loop.new_wait()

    def receipt(self) -> Receipt:
        if self.error is not None:
            raise self.error
        return Receipt(self.publication.properties["message_id"], not self.returned)


class Publisher(ConnectionThread):
    """The app's one publishing connection. Any thread and any task may publish through it at once."""

    def __init__(self, app: str, broker: BrokerAddresses, *, timeout: float, queue_type: QueueType) -> None:
        self.app = app
        self.timeout = timeout
        self.queue_type: QueueType = queue_type
        self._reset()
        super().__init__(broker, f"lightbus {app} publisher")

    def _reset(self) -> None:
        # Its holder may take from the window and send. It knows its owner: see `_send_or_wake`.
        self._sending = threading.RLock()
        self._sender = 0
        """The thread of the caller that is sending; 0 where none is."""
        self._interrupted = False
        """A caller was interrupted while it was sending, by a signal's handler that raised: no tag can be trusted."""
        self._taken: list[PendingPublish] = []
        """No longer in `_waiting`, and perhaps not yet in `_unconfirmed`."""
        self._channel: Channel | None = None
        self._waiting: deque[PendingPublish] = deque()
        self._unconfirmed: dict[int, PendingPublish] = {}
        self._next_tag = 1
        self._suspects = 0
        self._renew_at: float | None = None
        self._renewed_at = float("-inf")
        self._delay_level = self._wanted_delay_level = NOT_DELAYED
        self._by_id: dict[str, PendingPublish] = {}
        self._finished: list[PendingPublish] = []
        self._registered = False
        self._say_unreachable_at: float | None = None
        """On the monotonic clock; None where all is well, infinite once it was said."""
        self._wake_planned_in: Loop | None = None
        self._openers: list[WakeUp] = []
        """Callers that wait for the connection to be there (it may be already), or to have failed for good."""

    def forget(self) -> None:
        super().forget()
        self._reset()  # what was on its way is the parent's to finish

    # --- from any thread or task

    async def publish(
        self, publication: Publication, *, timeout: float | None = None, delay_level: int | None = None
    ) -> Receipt:
        """Publish and return once the broker has confirmed.

        Raises:
            errors.PublishError: it did not, within `timeout` seconds.
        """
        limit = self.timeout if timeout is None else timeout
        pending = PendingPublish(publication, delay_level, current_loop())
        try:
            self._submit_from_loop(pending)
            in_time = await pending.done.over(limit)
        except BaseException:  # cancelled: a web client has gone, say
            self._abandon(pending)
            raise
        return self._outcome(pending, limit, in_time)

    def publish_sync(
        self, publication: Publication, *, timeout: float | None = None, delay_level: int | None = None
    ) -> Receipt:
        """The same for a thread without an event loop."""
        limit = self.timeout if timeout is None else timeout
        pending = PendingPublish(publication, delay_level, None)
        try:
            self._submit_from_thread(pending)
            in_time = pending.done.acquire(timeout=limit)
        except BaseException:  # Ctrl-C: nobody waits for it any more, nor shall the interpreter's end
            self._abandon(pending)
            raise
        return self._outcome(pending, limit, in_time)

    async def publish_many(self, publications: Sequence[Publication], *, timeout: float | None = None) -> list[Receipt]:
        """Publish all, at most a window of them at a time, and return once all are confirmed, in their order.

        Args:
            timeout: seconds for each, from when it enters the window.

        Raises:
            errors.PublishManyError: some were not confirmed; it says which.
        """
        limit = self.timeout if timeout is None else timeout
        loop = current_loop()
        outcomes: list[Receipt | errors.PublishError] = []
        window: deque[tuple[float, PendingPublish]] = deque()
        try:
            for publication in publications:
                pending = PendingPublish(publication, None, loop)
                window.append((time.monotonic() + limit, pending))
                self._submit_from_loop(pending)
                if len(window) >= WINDOW:
                    outcomes.append(await self._await_one(*window[0], limit))
                    window.popleft()
            for deadline, pending in window:
                outcomes.append(await self._await_one(deadline, pending, limit))
        except BaseException:  # cancelled
            for _, pending in window:
                self._abandon(pending)
            raise
        return _all_receipts(outcomes)

    def publish_many_sync(self, publications: Sequence[Publication], *, timeout: float | None = None) -> list[Receipt]:
        """The same for a thread without an event loop."""
        limit = self.timeout if timeout is None else timeout
        outcomes: list[Receipt | errors.PublishError] = []
        window: deque[tuple[float, PendingPublish]] = deque()

        def finish_oldest() -> None:
            deadline, pending = window[0]
            in_time = pending.done.acquire(timeout=max(0.0, deadline - time.monotonic()))
            outcomes.append(self._settled(pending, limit, in_time))
            window.popleft()

        try:
            for publication in publications:
                pending = PendingPublish(publication, None, None)
                window.append((time.monotonic() + limit, pending))
                self._submit_from_thread(pending)
                if len(window) >= WINDOW:
                    finish_oldest()
            while window:
                finish_oldest()
        except BaseException:  # Ctrl-C
            for _, pending in window:
                self._abandon(pending)
            raise
        return _all_receipts(outcomes)

    async def _await_one(self, deadline: float, pending: PendingPublish, limit: float) -> Receipt | errors.PublishError:
        in_time = await pending.done.over(deadline - time.monotonic())
        return self._settled(pending, limit, in_time)

    def _settled(self, pending: PendingPublish, limit: float, in_time: bool) -> Receipt | errors.PublishError:
        try:
            return self._outcome(pending, limit, in_time)
        except errors.PublishError as error:
            return error

    def _submit_from_loop(self, pending: PendingPublish) -> None:
        loop = pending.loop
        assert loop is not None
        self._submit(pending)
        if self._loop is not loop:
            self.let_loop_read(loop)
            if self._loop is not loop:
                self.keep_reading()
        if len(self._waiting) % PIECE == 0:
            self._send_or_wake()
        elif self._wake_planned_in is not loop:
            # After this round of the loop: what other tasks publish in it goes along, in one piece.
            self._wake_planned_in = loop
            loop.soon(self._wake_as_planned)

    def _wake_as_planned(self) -> None:
        self._wake_planned_in = None
        self._send_or_wake()

    def _submit_from_thread(self, pending: PendingPublish) -> None:
        connection = own_thread()
        if connection is not None:
            raise errors.PublishWouldDeadlock(
                f"{_what(pending)} was not sent: it was published in the thread of a connection ({connection}), "
                "which would wait for itself. Put a logging handler that publishes behind a "
                "logging.handlers.QueueHandler and QueueListener."
            )
        self._submit(pending)
        self.keep_reading()
        self._send_or_wake()

    def _send_or_wake(self) -> None:
        """Send what is waiting from this very thread where nothing stands in the way, else wake the one that owns the
        connection: without the change of threads, an event published alone takes about a fifth less time and CPU (the
        median of five pairs of runs on RabbitMQ 3.10.8).
        """
        sent = False
        try:
            # Inside, since a signal's handler may raise right after it: Ctrl-C in a shell, the time limit of a job.
            if self._sending.acquire(blocking=False):
                sent = self._send_here()
        finally:
            try:
                self._sending.release()
            except RuntimeError as error:  # somebody else holds it
                if errors.is_from_deeper(error):
                    raise
        if not sent or (self._waiting and len(self._unconfirmed) < WINDOW):  # else the next confirm makes room
            self._refuse_within_a_publish()
            self.wake()

    def _send_here(self) -> bool:
        connection, channel = self.connection, self._channel
        if connection is None or channel is None or connection.blocked or self._suspects or self._renewal_is_due():
            return False
        if self._sender or self._interrupted:
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

    def _refuse_within_a_publish(self) -> None:
        """
        Raises:
            errors.PublishWouldDeadlock: this thread is in the middle of sending, which a signal's handler interrupted,
                or a finalizer.
        """
        if self._sender and self._sender == threading.get_ident():
            raise _would_deadlock()

    def _take_and_send(self, channel: Channel) -> bool:
        batch = self._next_batch(HERE_AT_ONCE)
        if not batch:
            return True
        try:
            if channel.publish_nowait([pending.publication for pending in batch]):
                return True
        except Unencodable:  # the connection's thread refuses it
            pass
        self._put_back(batch)
        return False

    def _put_back(self, batch: Sequence[PendingPublish]) -> None:
        """Nothing was sent: as if they had never been taken."""
        for pending in reversed(batch):
            self._next_tag -= 1
            del self._unconfirmed[self._next_tag]
            del self._by_id[pending.publication.properties["message_id"]]
            pending.sent = False
            self._waiting.appendleft(pending)

    def _submit(self, pending: PendingPublish) -> None:
        if not self._registered:
            self._registered = True
            _close_at_exit(self)
        try:
            self.ensure_started()  # first: where that fails, nothing is left that a later publish would send
        except StartInterrupted:
            raise _would_deadlock() from None
        except RuntimeError as error:
            raise _no_thread(error, pending) from error
        self._waiting.append(pending)

    def _outcome(self, pending: PendingPublish, limit: float, in_time: bool) -> Receipt:
        if in_time:
            return pending.receipt()
        self._abandon(pending)
        raise self._timed_out(pending, limit)

    def _abandon(self, pending: PendingPublish) -> None:
        """Nobody waits for it any more: it is not sent any more, nor again where it was sent and is not confirmed."""
        pending.abandoned = True
        self._withdraw(pending)

    def _withdraw(self, pending: PendingPublish) -> bool:
        """Forget it, unless it is on its way: nobody waits for it, and what an outage stops must not pile up."""
        try:
            self._waiting.remove(pending)
        except ValueError:
            return False
        return True

    def _timed_out(self, pending: PendingPublish, limit: float) -> errors.PublishError:
        what = _what(pending)
        if pending.sent:
            why = "Check the broker's health." if self.error is None else str(self.error)
            unknown = errors.PublishTimeout(
                f"{what}: no confirm from {self.broker.masked} within {limit:g} s. The outcome is unknown: it may "
                f"have arrived, or may still arrive. Publish it again if subscribers can handle a duplicate. {why}"
            )
            return _chained(unknown, self.error)
        connection = self.connection
        if connection is not None and connection.blocked:
            return errors.PublishBlocked(
                f"{what} was not sent: {self.broker.masked} has not accepted messages (a memory or disk alarm) for "
                f"{limit:g} s. Free memory or disk on the broker (rabbitmq-diagnostics alarms); publishing resumes "
                "automatically."
            )
        if self.error is not None or self._channel is None:
            slow = f"No connection to {self.broker.masked} yet: no answer so far. Is a broker listening there?"
            error = errors.PublishUnreachable(f"{what} was not sent within {limit:g} s. {self.error or slow}")
            return _chained(error, self.error)
        return errors.PublishTimeout(
            f"{what} was not sent within {limit:g} s: too many events wait before it. Publish fewer at once, or allow "
            "more time."
        )

    def open(self, timeout: float) -> None:
        """Connect and declare now rather than at the first publish. Blocks.

        Raises:
            errors.BrokerError: it cannot be done, or not within `timeout` seconds.
        """
        opened = WakeUp()
        self._openers.append(opened)
        try:
            self.ensure_started()
            self.wake()
            if not opened.wait(timeout) or self._channel is None:
                error = self.error or errors.BrokerUnreachable(
                    f"No connection to {self.broker.masked} within {timeout:g} s. Is the broker running there?"
                )
                raise error.with_traceback(None)  # another thread's frames say nothing here
        finally:
            self._openers.remove(opened)

    def close(self, timeout: float | None = None) -> None:
        """Wait for what is on its way, up to `timeout` seconds, then disconnect. A later publish connects again."""
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        while self.alive and self._busy() and time.monotonic() < deadline:
            self.keep_reading()  # the loop that reads may be blocked by this very call
            time.sleep(0.01)
        self.stop(max(1.0, deadline - time.monotonic()))
        self._fail_all(
            errors.PublisherClosed("The app was closed before the broker confirmed. The outcome is unknown.")
        )

    def _busy(self) -> bool:
        # The thread moves messages from one to the other: look in that order, or one could hide in between.
        return any(not pending.abandoned for pending in [*self._waiting, *self._unconfirmed.copy().values()])

    # --- the thread

    def wanted(self) -> bool:
        return bool(self._waiting or self._openers)

    def opened(self, connection: Connection) -> None:
        declare(connection, topology.publishing(self.app))
        channel = self._confirming_channel(connection)
        self._begin_on(channel)
        self._interrupted, self._sender = False, 0
        self._renew_at = None
        self._delay_level = self._wanted_delay_level = NOT_DELAYED
        self._say_unreachable_at = None
        self._channel = channel

    def _begin_on(self, channel: Channel) -> None:
        self._next_tag = 1
        self._by_id = {}

    def _confirming_channel(self, connection: Connection) -> Channel:
        channel = connection.channel()
        channel.on_ack = self._on_ack
        channel.on_nack = self._on_nack
        channel.on_return = self._on_return
        channel.confirm_select()
        return channel

    def _renewal_is_due(self) -> bool:
        return self._renew_at is not None and time.monotonic() >= self._renew_at

    def _renewed(self, connection: Connection) -> bool:
        """Replace the channel, once nothing is in flight on it (so nothing is published twice); False: not yet.

        RabbitMQ (seen with 3.10.8): a channel that first publishes to a quorum queue while a new leader is elected may
        go on to nack every message to it for as long as the old leader's node is down. A new channel does not.
        """
        assert self._renew_at is not None
        old = self._channel
        assert old is not None
        with self._sending:
            if self._unconfirmed:
                if time.monotonic() > self._renew_at + RENEW_WAIT:  # its confirms do not come: go on without
                    self._renew_at = time.monotonic() + RENEW_EVERY
                    return True
                return False
            self._channel = self._confirming_channel(connection)
            self._begin_on(self._channel)
            self._renew_at, self._renewed_at = None, time.monotonic()
        old.close()
        return True

    def work(self) -> float:
        self._announce()
        connection = self.connection
        assert connection is not None
        self._tell_openers()
        if self._renewal_is_due() and not self._renewed(connection):
            return RENEW_WAIT
        channel = self._channel
        assert channel is not None
        with self._sending:
            if self._interrupted or self._sender:  # nobody sends now, so that one was interrupted
                raise OSError("publishing was interrupted in the middle of a message")
            if connection.blocked or not self._waiting:
                return IDLE
            self._check_window()
            self._send(connection, channel)
        return IDLE

    def _send(self, connection: Connection, channel: Channel) -> None:
        batch = self._next_batch(WINDOW)
        if self._wanted_delay_level > self._delay_level:
            self._declare_delays(connection)
            batch += self._next_batch(WINDOW)
        while batch:
            try:
                channel.publish([pending.publication for pending in batch])
            except Unencodable as error:
                culprit = next(pending for pending in batch if pending.publication is error.publication)
                self._put_back(batch)
                if self._withdraw(culprit):
                    self._refuse(culprit, errors.PublishRefused(f"{_what(culprit)} cannot be sent: {error}"), error)
                    self._announce()
                batch = self._next_batch(WINDOW)
            else:
                return

    def _declare_delays(self, connection: Connection) -> None:
        """Declare what delayed events pass through. Where it cannot be, they are refused, and they alone."""
        wanted, self._wanted_delay_level = self._wanted_delay_level, self._delay_level
        try:
            declare(connection, topology.delaying(self.app, wanted, self.queue_type))
        except amqp.exceptions.ChannelError as error:  # it closed a separate channel; the connection is well
            reason = describe(error, self.address)
            for pending in list(self._waiting):
                if pending.delay_level > self._delay_level and self._withdraw(pending):
                    pending.error = _chained(errors.PublisherRefused(f"The event was not sent. {reason}"), reason)
                    self._finish(pending)
            self._announce()
        else:
            self._delay_level = self._wanted_delay_level = wanted

    def read_in_loop(self) -> None:
        loop_reader = self._loop_reader
        assert loop_reader is not None
        loop_reader.connection.drain_nowait()
        self._announce(loop_reader.loop)
        if self._waiting:
            self._send_or_wake()

    def _check_window(self) -> None:
        """A full window whose oldest nobody waits for: the confirms are not coming. Begin a new epoch."""
        if len(self._unconfirmed) >= WINDOW and next(iter(self._unconfirmed.values())).abandoned:
            raise OSError(f"{WINDOW} messages stayed unconfirmed until nobody waited for them")

    def _next_batch(self, most: int) -> list[PendingPublish]:
        """Take what may be sent now, each with its tag. Only while `_sending` is held."""
        # After a refusal the suspects go one by one, so that the one to blame is alone when it happens again.
        window = 1 if self._suspects else WINDOW
        waiting, unconfirmed, taken = self._waiting, self._unconfirmed, self._taken
        batch: list[PendingPublish] = []
        # A return names its message by the id alone, so no two of one id (as copies have) are in flight at once.
        held: list[PendingPublish] = []
        while (room := min(window - len(unconfirmed), most - len(batch), len(waiting))) > 0:
            first = len(taken)
            # In one call: between two, a signal's handler may raise, and what was taken would be nowhere.
            try:
                taken.extend(itertools.islice(iter(waiting.popleft, None), room))
            except IndexError as error:  # one was withdrawn meanwhile
                if errors.is_from_deeper(error):
                    raise
            for pending in taken[first:]:
                if pending.abandoned:
                    self._suspects = max(0, self._suspects - 1)
                    continue
                message_id = pending.publication.properties["message_id"]
                twin = self._by_id.get(message_id)
                if pending.delay_level > self._wanted_delay_level:
                    self._wanted_delay_level = pending.delay_level
                if pending.delay_level > self._delay_level or (twin is not None and not twin.abandoned):
                    held.append(pending)
                    continue
                unconfirmed[self._next_tag] = pending
                self._next_tag += 1
                pending.sent = True
                self._by_id[message_id] = pending
                batch.append(pending)
        waiting.extendleft(reversed(held))
        taken.clear()
        return batch

    def _on_return(self, message_id: str) -> None:
        pending = self._by_id.get(message_id)
        if pending is not None:
            pending.returned = True

    def _on_ack(self, tag: int, multiple: bool) -> None:
        for pending in self._confirmed(tag, multiple):
            self._finish(pending)

    def _on_nack(self, tag: int, multiple: bool) -> None:
        if self._renew_at is None:
            self._renew_at = max(time.monotonic() + RENEW_AFTER, self._renewed_at + RENEW_EVERY)
        for pending in self._confirmed(tag, multiple):
            pending.error = errors.PublishNacked(
                f"event {pending.publication.routing_key!r} ({pending.publication.properties['message_id']}): the "
                "broker refused it: a bound queue is full, or has no quorum of its nodes. Other queues may have "
                "received it. Publish it again later (the same event, a new id); see `rabbitmqctl list_queues name "
                "messages policy`."
            )
            self._finish(pending)

    def _confirmed(self, tag: int, multiple: bool) -> Iterable[PendingPublish]:
        unconfirmed = self._unconfirmed
        if not multiple:
            pending = unconfirmed.pop(tag, None)
            return () if pending is None else (pending,)
        # Tags enter in order, so that those up to `tag` come first.
        confirmed = []
        for first in list(unconfirmed):
            if first > tag:
                break
            confirmed.append(unconfirmed.pop(first))
        return confirmed

    def _finish(self, pending: PendingPublish) -> None:
        message_id = pending.publication.properties["message_id"]
        if self._by_id.get(message_id) is pending:
            del self._by_id[message_id]
        self._suspects = max(0, self._suspects - 1)
        self._finished.append(pending)

    def _announce(self, here: Loop | None = None) -> None:
        """Wake the callers that wait: threads by their locks, each event loop once for all of its messages (`here`
        is the one that runs this: directly).
        """
        finished = self._finished.copy()
        by_loop: dict[Loop, list[Callable[[], object]]] = {}
        for pending in finished:
            if pending.loop is None:
                if pending.done.locked():
                    pending.done.release()
            elif pending.loop is here:
                pending.done.set()
            else:
                by_loop.setdefault(pending.loop, []).append(pending.done.set)
        for loop, wake_ups in by_loop.items():
            try:
                loop.soon_from_thread(_call_all, wake_ups)
            except RuntimeError:
                logger.debug("an event loop closed before it received %d confirms", len(wake_ups))
        del self._finished[: len(finished)]  # last: interrupted by a signal's handler, it is done again

    def channel_closed(self, error: amqp.exceptions.ChannelError) -> bool:
        """The broker refused a message, and closed the channel over it: the connection goes on, with another one."""
        connection = self.connection
        if connection is None or self._interrupted or error.method_sig != _BASIC_PUBLISH:
            return False
        again = self._take_back(error)
        if isinstance(error, amqp.exceptions.NotFound):  # somebody deleted the exchange
            declare(connection, topology.publishing(self.app))
        channel = self._confirming_channel(connection)
        with self._sending:
            self._begin_on(channel)
            self._channel = channel
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
        """What was in flight will be sent again, but for the one to blame, where that is known. Returns how many."""
        with self._sending:
            self._channel = None
            unconfirmed = list(self._unconfirmed.values())
            if self._taken:  # a caller was interrupted between taking these and sending them
                known = {*map(id, unconfirmed), *map(id, self._waiting)}
                unconfirmed += [pending for pending in self._taken if id(pending) not in known]
                self._taken.clear()
            self._unconfirmed.clear()
            guilty = self._guilty(error, unconfirmed)
            again = [one for one in unconfirmed if not one.abandoned and one not in guilty]
            for pending in again:
                pending.returned = False
            self._waiting.extendleft(reversed(again))
        refused: type[errors.PublishRefused] = errors.PublishRefused
        cause = error
        if guilty and isinstance(error, _NOT_OVER_THE_MESSAGE):
            refused, cause = errors.PublisherRefused, describe(error, self.address)
        for pending in guilty:
            self._refuse(pending, refused(f"{_what(pending)}: the broker refused it: {cause}"), cause)
        self._announce()
        return len(again)

    def _guilty(self, error: BaseException, in_flight: Sequence[PendingPublish]) -> list[PendingPublish]:
        """Which of them the broker has refused. Where it is not known, they are sent one by one: see `_suspects`."""
        if not _is_refusal(error) or self._interrupted:
            return []
        too_large = _TOO_LARGE.search(str(error))
        if too_large:
            return [one for one in in_flight if len(one.publication.body) > int(too_large[1])]
        if len(in_flight) != 1:
            self._suspects = sum(not one.abandoned for one in in_flight)
            return []
        culprit = in_flight[0]
        assert isinstance(error, amqp.exceptions.AMQPError)
        if error.code in _DOUBTFUL and not culprit.doubted:
            culprit.doubted = True
            self._suspects = 1
            return []
        return [culprit]

    def _refuse(self, pending: PendingPublish, error: errors.PublishRefused, cause: BaseException) -> None:
        pending.error = _chained(error, cause)
        self._finish(pending)

    def failed(self, error: errors.BrokerError) -> None:
        if isinstance(error, FATAL) and not self.broker.worked:  # a wrong setting: waiting would not help
            self._fail_all(lambda: _chained(errors.PublisherRefused(f"The event was not sent. {error}"), error))
            self._tell_openers()
        elif self._say_unreachable_at is None:
            self._say_unreachable_at = time.monotonic() + UNREACHABLE_FOR
        elif time.monotonic() >= self._say_unreachable_at:  # callers wait: log why
            self._say_unreachable_at = math.inf
            logger.warning("%s: %s Trying again.", self.name, error)

    def _tell_openers(self) -> None:
        for opened in self._openers.copy():
            opened.set()

    def closing(self) -> None:
        self._announce()
        with self._sending:
            self._channel = None

    def _fail_all(self, error: errors.PublishError | Callable[[], errors.PublishError]) -> None:
        stopped = [pending for pending in list(self._waiting) if self._withdraw(pending)]
        stopped += self._unconfirmed.values()
        self._unconfirmed.clear()
        for pending in stopped:
            pending.error = error() if callable(error) else error
        self._finished += stopped
        self._announce()


def _what(pending: PendingPublish) -> str:
    publication = pending.publication
    name = publication.properties.get("type") or publication.routing_key
    return f"event {name!r} ({publication.properties['message_id']})"


def _would_deadlock() -> errors.PublishWouldDeadlock:
    return errors.PublishWouldDeadlock(
        "The event was not sent: a signal handler (or a finalizer) called publish while it interrupted another "
        "publish of the same thread. Set a flag in the handler and publish where the flag is read, or publish in a "
        "separate thread."
    )


def _no_thread(error: RuntimeError, pending: PendingPublish) -> Exception:
    words = str(error)
    if "interpreter shutdown" in words:  # Python 3.12+
        return errors.PublisherClosed(
            f"{_what(pending)} was not sent: the interpreter is shutting down. Publish before the main thread ends."
        )
    if "new thread" in words:
        return errors.PublishUnreachable(
            f"{_what(pending)} was not sent: the thread that connects could not be started ({words}). A limit of "
            "processes and threads is reached (ulimit -u, or a container's pids limit): raise it, or run fewer."
        )
    return error  # somebody else's: a signal's handler raised it


def _is_refusal(error: BaseException) -> bool:
    return isinstance(error, amqp.exceptions.AMQPError) and error.code in _REFUSALS


def _chained(error: errors.PublishError, cause: BaseException | None) -> errors.PublishError:
    error.__cause__ = cause
    return error


def _call_all(functions: list[Callable[[], object]]) -> None:
    for function in functions:
        function()


def _all_receipts(outcomes: list[Receipt | errors.PublishError]) -> list[Receipt]:
    receipts = [outcome for outcome in outcomes if isinstance(outcome, Receipt)]
    if len(receipts) == len(outcomes):
        return receipts
    place, first = next((n, outcome) for n, outcome in enumerate(outcomes) if isinstance(outcome, errors.PublishError))
    raise errors.PublishManyError(
        f"{len(outcomes) - len(receipts)} of {len(outcomes)} events were not confirmed, "
        f"the first at index {place}: {first} (`outcomes` on this error has a Receipt or an error for each).",
        outcomes,
    ) from first


def _close_at_exit(publisher: Publisher) -> None:
    """Let threads that still publish while the interpreter ends get their confirms."""
    reference = weakref.ref(publisher, lambda _: atexit.unregister(close))

    def close() -> None:
        living = reference()
        if living is not None:
            with contextlib.suppress(KeyboardInterrupt):  # a second Ctrl-C ends the wait
                living.close()

    atexit.register(close)
