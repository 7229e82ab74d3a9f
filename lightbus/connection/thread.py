"""A thread that owns a connection: open, declare, send heartbeats, reconnect with backoff.

py-amqp locks writes but not reads, so only one thread may use a connection at a time. Heartbeats must continue while a
handler blocks the event loop, so the owner is never the loop's thread. But a thread switch costs more than an event, so
while the loop is responsive it reads in the thread's place (`reading.SharedReading`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import threading
import time
import weakref

import amqp.exceptions

from lightbus import errors
from lightbus.connection.diagnosis import FATAL, LOST, describe
from lightbus.connection.dial import BrokerAddresses, address_of
from lightbus.connection.loop_reader import Loop
from lightbus.connection.reading import TICK, SharedReading
from lightbus.connection.wake_up import WakeUp
from lightbus.transport import Connection

logger = logging.getLogger("lightbus")


class Backoff:
    """Pauses between attempts: 0.1 s, doubled up to 5 s. Each is shortened by up to half at random, so that many
    clients do not reconnect at the same moment.
    """

    def __init__(self, first: float = 0.1, highest: float = 5.0) -> None:
        self.first = first
        self.highest = highest
        self.failures = 0

    def next(self) -> float:
        pause = min(self.highest, self.first * 2.0 ** min(self.failures, 20))
        self.failures += 1
        return pause * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        self.failures = 0


_instances: weakref.WeakSet[ConnectionThread] = weakref.WeakSet()


def _forget_after_fork() -> None:
    for thread in list(_instances):
        thread.forget()


os.register_at_fork(after_in_child=_forget_after_fork)

_here = threading.local()


def own_thread() -> str | None:
    """The name of the connection that the calling thread owns; None in every other thread."""
    name: str | None = getattr(_here, "connection", None)
    return name


class StartInterrupted(RuntimeError):
    """A signal handler needs the connection's thread while it interrupts the thread that is starting it."""


class ConnectionThread:
    """A thread that owns one connection and replaces it when it fails. Subclasses use the connection.

    Each connection is an *epoch*: nothing that belongs to an older one (a channel, a delivery tag) is used after it has
    ended, since a stale ack would settle a different message.
    """

    def __init__(self, broker: BrokerAddresses, name: str) -> None:
        self.broker = broker
        self.name = name
        self.connection: Connection | None = None
        self.address = broker.addresses[0]
        """The broker address of the connection, or of the last one."""
        self.error: errors.BrokerError | None = None
        """Why there is no connection now."""
        self.epoch = 0
        self.losses = 0
        """How often an open connection was lost."""
        self._start()
        _instances.add(self)

    def _start(self) -> None:
        self.stopping = False
        self._thread: threading.Thread | None = None
        self._starting = threading.RLock()
        self._in_start = False
        self._running = threading.Lock()
        """Held by the thread that does the work. If a start is interrupted before the thread counts as alive, a later
        start creates a second thread, which waits for this and ends after the first."""
        self._wake_up = WakeUp()
        self._woken = False
        self.reading = SharedReading(self._wake_up)
        self._open_since: float | None = None

    def forget(self) -> None:
        """In a forked child: the connection belongs to the parent. Drop it without sending anything."""
        connection, self.connection = self.connection, None
        if connection is not None:
            with contextlib.suppress(Exception):  # its state in the parent does not matter here
                connection.collect()
        self.reading.forget()
        self._start()

    # --- what a subclass fills in

    def wanted(self) -> bool:
        """Whether a connection is needed now."""
        return True

    def opened(self, connection: Connection) -> None:
        """A new epoch begins: declare, open channels, subscribe."""
        raise NotImplementedError

    def work(self) -> float:
        """Send what is waiting. Returns for how many seconds at most there is nothing else to do."""
        raise NotImplementedError

    def read_in_loop(self) -> None:
        """Read and pass on what has arrived. Called in the event loop, which must not wait."""
        raise NotImplementedError

    def channel_closed(self, error: amqp.exceptions.ChannelError) -> bool:
        """The broker closed a channel. Returns whether the epoch continues, with another channel."""
        return False

    def lost(self, error: BaseException) -> None:
        """The epoch has ended; `self.connection` is None."""

    def failed(self, error: errors.BrokerError) -> None:
        """A new epoch could not begin."""

    def usable_after(self, error: Exception) -> bool:
        """Whether the connection may still work although this error ends the epoch: then it is closed gracefully."""
        return False

    def closing(self) -> None:
        """Send what is pending, before a graceful close."""

    # --- from any thread

    def ensure_started(self) -> None:
        """
        Raises:
            StartInterrupted: called by a signal handler that interrupts the start in the same thread.
            RuntimeError: no thread can be started.
        """
        thread = self._thread
        if thread is not None and thread.is_alive():  # `alive` would be one more call per event
            return
        self.broker.warn_if_unset()
        with self._starting:
            if self._in_start:
                raise StartInterrupted
            if not self.alive:
                self.stopping = False
                self._in_start = True
                try:
                    # Stored before it is started, in case the start is interrupted.
                    self._thread = threading.Thread(target=self._own, name=self.name, daemon=True)
                    self._thread.start()
                finally:
                    self._in_start = False

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def read_by_loop(self) -> bool:
        """Whether an event loop reads the connection now, and the thread stands by."""
        return self.reading.standing_by

    def wake(self) -> None:
        """Let the thread look for work at once. Cheap if it was woken already."""
        if self._woken:
            return
        self._woken = True
        try:
            self._wake_up.set()
            connection = self.connection
            if connection is not None and not self.reading.standing_by:
                connection.interrupt()
        except BaseException:  # a signal handler raised: perhaps the thread was not woken
            self._woken = False
            raise

    def let_loop_read(self, loop: Loop) -> None:
        """From the loop's own thread: let it read the connection, unless another loop does already."""
        if self.reading.offer(loop):
            self.wake()

    def keep_reading(self) -> None:
        """A caller outside the loop waits for what arrives: for one second from now, only the thread reads."""
        if self.reading.suspend():
            self.wake()

    def stop(self, timeout: float) -> None:
        """End the thread and close its connection, within `timeout` seconds."""
        thread = self._thread
        self.let_go()
        if thread is not None and thread.is_alive() and thread is not threading.current_thread():
            thread.join(timeout)
            if thread.is_alive():
                logger.warning("%s did not stop within %g s; the broker will close its connection.", self.name, timeout)
                return
        self._thread = None

    def let_go(self) -> None:
        """Let the thread close its connection and end, without waiting for it. Safe in finalizers, in any thread."""
        self.stopping = True
        self._woken = False
        self.wake()

    # --- in the thread

    def _own(self) -> None:
        _here.connection = self.name
        with self._running:
            self.run()

    def run(self) -> None:
        """All that the thread does, until `stopping`. Called by the thread; a test may call it in its own."""
        backoff = Backoff()
        while not self.stopping:
            if not self.wanted():
                self._pause(TICK, until_wanted=True)
                continue
            self._open_since = None
            try:
                self._live()
            except errors.BrokerError as error:
                self._end(error)
                self.failed(error)
            except LOST as error:
                self._end(error)
            except Exception as error:
                # A bug must not end the thread silently: callers would wait for their whole timeout.
                logger.exception("%s: unexpected error; reconnecting.", self.name)
                self._end(error)
            if self._open_since is not None and time.monotonic() - self._open_since > backoff.highest:
                backoff.reset()
            if not self.stopping:
                self._pause(backoff.next())

    def _live(self) -> None:
        """One epoch, from opening to the end."""
        connection = self.broker.connect(self.name)
        self.address = address_of(connection, self.broker)
        self.connection = connection
        with self.reading.using:
            try:
                self._open(connection)
                self._work_on(connection)
            except Exception as error:
                if self.usable_after(error):
                    with contextlib.suppress(*LOST):
                        self.closing()
                        connection.close()
                raise
            else:
                self.closing()
                self.connection = None
                with contextlib.suppress(*LOST):
                    connection.close()
            finally:
                self.reading.end()

    def _open(self, connection: Connection) -> None:
        try:
            self.opened(connection)
        except (errors.BrokerError, *LOST) as error:
            described = self._not_opened(connection, error)
            if described is error:
                raise
            raise described from error
        self.epoch += 1
        self.error = None
        self.broker.worked = True
        self._open_since = time.monotonic()

    def _work_on(self, connection: Connection) -> None:
        next_tick = time.monotonic() + TICK
        while not self.stopping:
            self._wake_up.clear()
            self._woken = False
            try:
                timeout = max(0.0, min(self.work(), next_tick - time.monotonic()))
                loop_reader = self.reading.present_reader(connection, self)
                if loop_reader is None:
                    with contextlib.suppress(TimeoutError):
                        connection.drain_events(timeout)
                elif not loop_reader.connection.catch_up():
                    self.reading.stand_by(loop_reader, timeout, self)
            except amqp.exceptions.ChannelError as error:
                if not self.channel_closed(error):
                    raise
                self.reading.resume()
            if time.monotonic() >= next_tick:
                self.reading.check(connection)
                connection.heartbeat_tick()
                next_tick = time.monotonic() + TICK

    def _not_opened(self, connection: Connection, error: BaseException) -> errors.BrokerError:
        described = describe(error, self.address)
        if self.broker.avoid(connection, described) and isinstance(described, FATAL):
            return errors.BrokerUnreachable(str(described))  # only this node: others may accept the connection
        return described

    def _end(self, error: BaseException) -> None:
        connection, self.connection = self.connection, None
        self.error = describe(error, self.address)
        if self._open_since is not None:
            self.losses += 1
        if connection is not None:
            with contextlib.suppress(Exception):  # it has failed already: further errors add nothing
                connection.collect()
            self.lost(error)

    def _pause(self, seconds: float, *, until_wanted: bool = False) -> None:
        """Wait for this long, or until the thread is to stop or (with `until_wanted`) a connection is wanted."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self._wake_up.clear()
            self._woken = False  # after the clear: if a caller finds it True, its work is seen below
            if self.stopping or (until_wanted and self.wanted()):
                return
            self._wake_up.wait(left)
