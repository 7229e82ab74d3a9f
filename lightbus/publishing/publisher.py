"""Publish and wait for the broker's confirm: many callers, from any thread and event loop, on one connection."""

# The end of a timeout is a PublishError, which has what is known of the outcome; a cancel scope could not:
# ruff: noqa: ASYNC109

from __future__ import annotations

import atexit
import contextlib
import itertools
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence

from lightbus import errors
from lightbus.connection.dial import BrokerAddresses, address_of
from lightbus.connection.loop_reader import Loop, current_loop
from lightbus.connection.thread import StartInterrupted, own_thread
from lightbus.connection.wake_up import WakeUp
from lightbus.message import Receipt
from lightbus.publishing.confirms import WINDOW, PendingPublish
from lightbus.publishing.connection import PublisherConnection, chained, would_deadlock
from lightbus.transport import Publication
from lightbus.wire.topology import QueueType

PIECE = 32
"""Messages that are sent while other tasks of the loop publish more, so that the broker works meanwhile: with 500 in
flight, a third more events/s than all in one piece (`make bench CASE=publish-500`)."""


class Publisher(PublisherConnection):
    """An app's only publisher. Any thread and any task may publish at the same time."""

    def __init__(self, app: str, broker: BrokerAddresses, *, timeout: float, queue_type: QueueType) -> None:
        self.timeout = timeout
        self._closes_at_exit = False
        self._sends_soon_in: Loop | None = None
        super().__init__(app, broker, queue_type)

    def forget(self) -> None:
        super().forget()
        self._closes_at_exit, self._sends_soon_in = False, None

    @property
    def busy(self) -> bool:
        """Whether a caller waits for an outcome."""
        return self.window.busy

    # --- publish: a task waits with its event loop's `Waiter`, a thread with a lock

    async def publish(
        self, publication: Publication, *, timeout: float | None = None, delay_level: int | None = None
    ) -> Receipt:
        """Publish and return once the broker has confirmed.

        Raises:
            errors.PublishError: it did not confirm within `timeout` seconds, or refused the message.
        """
        limit = self.timeout if timeout is None else timeout
        loop = current_loop()
        waiter = loop.new_waiter()
        pending = PendingPublish(publication, delay_level, loop=loop, waiter=waiter)
        try:
            self.submit(pending)
            in_time = await waiter.wait(limit)
        except BaseException as error:  # cancelled: a web client has disconnected, for example
            self.abandon(pending, error)
            raise
        return self.outcome(pending, limit, in_time)

    def publish_sync(
        self, publication: Publication, *, timeout: float | None = None, delay_level: int | None = None
    ) -> Receipt:
        """The same for a thread without an event loop."""
        limit = self.timeout if timeout is None else timeout
        lock = threading.Lock()
        lock.acquire()
        pending = PendingPublish(publication, delay_level, lock=lock)
        try:
            self.submit(pending)
            in_time = lock.acquire(timeout=limit)
        except BaseException as error:  # Ctrl-C: no caller waits for it, nor must the end of the interpreter
            self.abandon(pending, error)
            raise
        return self.outcome(pending, limit, in_time)

    async def publish_many(self, publications: Sequence[Publication], *, timeout: float | None = None) -> list[Receipt]:
        """Publish all, at most 1,000 at a time, and return once all are confirmed, in their order.

        Args:
            timeout: seconds for each, from when it enters the window.

        Raises:
            errors.PublishManyError: some were not confirmed; its `outcomes` say which.
        """
        many = _ManyPublishes(self, publications, timeout, current_loop())
        try:
            while (pending := many.oldest()) is not None:
                assert pending.waiter is not None
                many.finish_oldest(await pending.waiter.wait(many.seconds_left()))
        except BaseException as error:  # cancelled
            many.abandon(error)
            raise
        return many.receipts()

    def publish_many_sync(self, publications: Sequence[Publication], *, timeout: float | None = None) -> list[Receipt]:
        """The same for a thread without an event loop."""
        many = _ManyPublishes(self, publications, timeout, None)
        try:
            while (pending := many.oldest()) is not None:
                assert pending.lock is not None
                many.finish_oldest(pending.lock.acquire(timeout=many.seconds_left()))
        except BaseException as error:  # Ctrl-C
            many.abandon(error)
            raise
        return many.receipts()

    # --- the steps that all four share

    def submit(self, pending: PendingPublish) -> None:
        """Have it sent: now where that is possible, else by the connection's thread.

        Raises:
            errors.PublishError: it will not be sent.
        """
        loop, reading = pending.loop, self.reading
        if loop is None or reading.loop is not loop:
            _refuse_in_own_thread(pending)
        if not self._closes_at_exit:
            self._closes_at_exit = True
            close_at_exit(self)
        try:
            self.ensure_started()  # first: if that fails, a later publish must not send this message
        except StartInterrupted:
            raise would_deadlock() from None
        except RuntimeError as error:
            raise _no_thread(error, pending) from error
        waiting = self.window.waiting
        waiting.append(pending)
        if loop is None:
            if reading.loop_reader is not None:
                self.keep_reading()
        elif reading.loop is not loop:
            self.let_loop_read(loop)
            if reading.loop is not loop:
                self.keep_reading()
        if loop is None or len(waiting) % PIECE == 0:
            self.send_or_wake()
        elif self._sends_soon_in is not loop:
            # After this round of the loop: what other tasks publish in it is sent in the same piece.
            self._sends_soon_in = loop
            loop.soon(self._send_soon)

    def _send_soon(self) -> None:
        self._sends_soon_in = None
        self.send_or_wake()

    def outcome(self, pending: PendingPublish, limit: float, in_time: bool) -> Receipt:
        """
        Args:
            in_time: whether the wait, of `limit` seconds, has ended with an outcome.

        Raises:
            errors.PublishError: it was not published, or the outcome is unknown.
        """
        if in_time:
            if pending.error is not None:
                raise pending.error
            return Receipt(pending.publication.properties["message_id"], not pending.returned)
        self.window.abandon(pending)
        raise self._timed_out(pending, limit)

    def abandon(self, pending: PendingPublish, error: BaseException) -> None:
        """Its caller stops waiting without an outcome, because of this error."""
        self.window.abandon(pending)

    def _timed_out(self, pending: PendingPublish, limit: float) -> errors.PublishError:
        broker = self.broker.masked
        if pending.sent:
            why = "Check the broker's health." if self.error is None else str(self.error)
            unknown = errors.PublishTimeout(
                f"{pending}: no confirm from {broker} within {limit:g} s. The outcome is unknown: it may have arrived, "
                f"or may still arrive. Publish it again if subscribers can handle a duplicate. {why}"
            )
            return chained(unknown, self.error)
        connection = self.connection
        if connection is not None and connection.blocked:
            return errors.PublishBlocked(
                f"{pending} was not sent: {broker} has not accepted messages (a memory or disk alarm) for {limit:g} s. "
                f"Free memory or disk on the broker ({address_of(connection, self.broker).broker.alarms}); publishing "
                "resumes automatically."
            )
        if self.error is not None or self.channel is None:
            slow = f"No connection to {broker} yet: no answer so far. Is a broker listening there?"
            error = errors.PublishUnreachable(f"{pending} was not sent within {limit:g} s. {self.error or slow}")
            return chained(error, self.error)
        return errors.PublishTimeout(
            f"{pending} was not sent within {limit:g} s: too many events wait before it. Publish fewer at once, or "
            "allow more time."
        )

    # --- open and close

    def open(self, timeout: float) -> None:
        """Connect and declare now rather than at the first publish. Blocks.

        Raises:
            errors.BrokerError: it failed, or took more than `timeout` seconds.
        """
        opened = WakeUp()
        self.add_opener(opened)
        try:
            self.ensure_started()
            self.wake()
            if not opened.wait(timeout) or self.channel is None:
                error = self.error or errors.BrokerUnreachable(
                    f"No connection to {self.broker.masked} within {timeout:g} s. Is the broker running there?"
                )
                raise error.with_traceback(None)  # the connection thread's frames do not help here
        finally:
            self.remove_opener(opened)

    def close(self, timeout: float | None = None) -> None:
        """Wait for unconfirmed messages, up to `timeout` seconds, then disconnect. A later publish connects again."""
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        while self.alive and self.busy and time.monotonic() < deadline:
            self.keep_reading()  # this call may block the event loop that reads
            time.sleep(0.01)
        self.stop(max(1.0, deadline - time.monotonic()))
        self.fail_all(
            lambda: errors.PublisherClosed("The app was closed before the broker confirmed. The outcome is unknown.")
        )


def close_at_exit(publisher: Publisher) -> None:
    """Close it when the interpreter ends, so that threads that still publish get their confirms."""
    reference = weakref.ref(publisher, lambda _: atexit.unregister(close))

    def close() -> None:
        living = reference()
        if living is not None:
            with contextlib.suppress(KeyboardInterrupt):  # a second Ctrl-C ends the wait
                living.close()

    atexit.register(close)


def _refuse_in_own_thread(pending: PendingPublish) -> None:
    """
    Raises:
        errors.PublishWouldDeadlock: this is the thread of a connection.
    """
    connection = own_thread()
    if connection is not None:
        raise errors.PublishWouldDeadlock(
            f"{pending} was not sent: it was published in the thread of a connection ({connection}), which would wait "
            "for itself. Put a logging handler that publishes behind a logging.handlers.QueueHandler and QueueListener."
        )


def _no_thread(error: RuntimeError, pending: PendingPublish) -> Exception:
    message = str(error)
    if "interpreter shutdown" in message:  # Python 3.12+
        return errors.PublisherClosed(
            f"{pending} was not sent: the interpreter is shutting down. Publish before the main thread ends."
        )
    if "new thread" in message:
        return errors.PublishUnreachable(
            f"{pending} was not sent: the thread that connects could not be started ({message}). A limit of processes "
            "and threads is reached (ulimit -u, or a container's pids limit): raise it, or run fewer."
        )
    return error  # not ours: a signal handler raised it


class _ManyPublishes:
    """A `publish_many` in progress: submits while there is room in the window, and waits for the oldest message."""

    def __init__(
        self, publisher: Publisher, publications: Sequence[Publication], timeout: float | None, loop: Loop | None
    ) -> None:
        """
        Args:
            loop: a task of this event loop waits; None: a thread does.
        """
        self._publisher = publisher
        self._limit = publisher.timeout if timeout is None else timeout
        self._loop = loop
        self._remaining = iter(publications)
        self._window: deque[tuple[float, PendingPublish]] = deque()
        self._outcomes: list[Receipt | errors.PublishError] = []

    def oldest(self) -> PendingPublish | None:
        """Fill the window. Returns the oldest message, for which the caller waits; None if all have an outcome."""
        loop, window = self._loop, self._window
        for publication in itertools.islice(self._remaining, WINDOW - len(window)):
            if loop is None:
                lock = threading.Lock()
                lock.acquire()
                pending = PendingPublish(publication, lock=lock)
            else:
                pending = PendingPublish(publication, loop=loop, waiter=loop.new_waiter())
            window.append((time.monotonic() + self._limit, pending))
            self._publisher.submit(pending)
        return window[0][1] if window else None

    def seconds_left(self) -> float:
        """For the oldest message, counted from when it was submitted."""
        return max(0.0, self._window[0][0] - time.monotonic())

    def finish_oldest(self, in_time: bool) -> None:
        try:
            self._outcomes.append(self._publisher.outcome(self._window[0][1], self._limit, in_time))
        except errors.PublishError as error:
            self._outcomes.append(error)
        self._window.popleft()

    def abandon(self, error: BaseException) -> None:
        for _, pending in self._window:
            self._publisher.abandon(pending, error)

    def receipts(self) -> list[Receipt]:
        """
        Raises:
            errors.PublishManyError: some were not confirmed.
        """
        outcomes = self._outcomes
        receipts = [outcome for outcome in outcomes if isinstance(outcome, Receipt)]
        if len(receipts) == len(outcomes):
            return receipts
        place, first = next((n, one) for n, one in enumerate(outcomes) if isinstance(one, errors.PublishError))
        raise errors.PublishManyError(
            f"{len(outcomes) - len(receipts)} of {len(outcomes)} events were not confirmed, "
            f"the first at index {place}: {first} (`outcomes` on this error has a Receipt or an error for each).",
            outcomes,
        ) from first
