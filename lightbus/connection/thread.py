"""A connection's life: open, declare, heartbeat, backoff, and again. One thread owns each connection.

py-amqp locks writes but not reads, so one at a time uses it; and heartbeats must go on while a handler blocks the
event loop, so the owner is never the loop's thread. But while the loop is quick to come, it reads in the thread's
place (`loop_reader.LoopReader`): a change of threads costs more than an event.
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
from lightbus.connection.loop_reader import Loop, LoopReader
from lightbus.transport import Connection

logger = logging.getLogger("lightbus")
TICK = 1.0


class Backoff:
    """Pauses between tries: 0.1 s, doubled up to 5 s, each shortened at random so that many do not come at once."""

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


_living: weakref.WeakSet[ConnectionThread] = weakref.WeakSet()


def _forget_after_fork() -> None:
    for thread in list(_living):
        thread.forget()


os.register_at_fork(after_in_child=_forget_after_fork)


class WakeUp:
    """What one thread waits for, and any other sets, once for each wait: a lock, since `threading.Event` is not to be
    interrupted. A signal's handler that raises in the middle of one leaves its inner lock held for ever.
    """

    __slots__ = ("_unset",)

    def __init__(self) -> None:
        self._unset = threading.Lock()
        self._unset.acquire()

    def set(self) -> None:
        try:
            self._unset.release()
        except RuntimeError as error:  # it is set
            if errors.is_from_deeper(error):
                raise

    def clear(self) -> None:
        self._unset.acquire(blocking=False)

    def wait(self, seconds: float) -> bool:
        """Wait for so long at most, and clear it. Returns whether it was set."""
        return self._unset.acquire(timeout=max(0.0, seconds))


_here = threading.local()


def own_thread() -> str | None:
    """The name of the connection whose own thread this is, if it is one's."""
    name: str | None = getattr(_here, "connection", None)
    return name


class StartInterrupted(RuntimeError):
    """A connection's thread is wanted where this very thread is just starting it."""


class ConnectionThread:
    """A thread that owns one connection and replaces it when it fails.

    Each connection is an *epoch*: nothing that belongs to an older one (a channel, a delivery tag) is used
    after it has ended, since a stale ack would settle a different message.
    """

    def __init__(self, broker: BrokerAddresses, name: str) -> None:
        self.broker = broker
        self.name = name
        self.connection: Connection | None = None
        self.address = broker.addresses[0]
        """Where the connection leads to, or the last one led."""
        self.error: errors.BrokerError | None = None
        """Why there is no connection now."""
        self.epoch = 0
        self._start()
        _living.add(self)

    def _start(self) -> None:
        self.stopping = False
        self._thread: threading.Thread | None = None
        self._starting = threading.RLock()
        self._in_start = False
        self._running = threading.Lock()
        """Held by the thread that does the work. There is a second one where a start was interrupted so early that the
        first did not count as alive yet: it waits, and ends after it."""
        self._wake = WakeUp()
        self._woken = False
        self._using = threading.Lock()
        """Its holder uses the connection: this thread, or the event loop that reads."""
        self._loop: Loop | None = None
        self._loop_reader: LoopReader | None = None
        self._standing_by = False
        self._visits_seen = 0
        self._own_until = 0.0
        self._open_since: float | None = None

    def forget(self) -> None:
        """In a forked child: the connection is the parent's. Let go of it without a word to the broker."""
        connection, self.connection = self.connection, None
        if connection is not None:
            with contextlib.suppress(Exception):  # whatever is wrong with it, it is not ours
                connection.collect()
        self._forget_loop_reader()
        self._start()

    # what a role fills in

    def wanted(self) -> bool:
        """Whether a connection is needed now."""
        return True

    def opened(self, connection: Connection) -> None:
        """A new epoch begins: declare, open channels, subscribe."""
        raise NotImplementedError

    def work(self) -> float:
        """Send what is waiting; returns for how many seconds there will be nothing else to do."""
        raise NotImplementedError

    def read_in_loop(self) -> None:
        """Read what has arrived and hand it on, in the event loop, which must not wait."""
        raise NotImplementedError

    def channel_closed(self, error: amqp.exceptions.ChannelError) -> bool:
        """The broker closed a channel. Returns whether the epoch goes on with another one."""
        return False

    def lost(self, error: BaseException) -> None:
        """The epoch has ended; `self.connection` is gone."""

    def failed(self, error: errors.BrokerError) -> None:
        """A new epoch could not begin."""

    def well_after(self, error: Exception) -> bool:
        """Whether the connection may be well though its epoch ends over this: then it is closed in good order."""
        return False

    def closing(self) -> None:
        """Say the last words on a connection that is about to be closed in good order."""

    # from any thread

    def ensure_started(self) -> None:
        """
        Raises:
            StartInterrupted: this very thread is starting it, which a signal's handler has interrupted.
            RuntimeError: no thread can be started.
        """
        thread = self._thread
        if thread is not None and thread.is_alive():  # `alive` would be a call more for each event
            return
        self.broker.warn_if_unset()
        with self._starting:
            if self._in_start:
                raise StartInterrupted
            if not self.alive:
                self.stopping = False
                self._in_start = True
                try:
                    # Kept before it is started, whatever interrupts that.
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
        return self._standing_by

    def wake(self) -> None:
        """Let the thread look for work at once. Cheap where it was woken already."""
        if self._woken:
            return
        self._woken = True
        try:
            self._wake.set()
            connection = self.connection
            if connection is not None and not self._standing_by:
                connection.interrupt()
        except BaseException:  # a signal's handler raised: nobody knows how far it came
            self._woken = False
            raise

    def let_loop_read(self, loop: Loop) -> None:
        """From the loop's own thread: let it read the connection, unless another one does already."""
        if loop.can_watch and (self._loop is None or self._loop.ended):
            self._loop = loop
            self.wake()

    def keep_reading(self) -> None:
        """Somebody outside of the loop waits for what arrives: for a second now, nobody but the thread reads."""
        if self._loop_reader is not None:
            self._own_until = time.monotonic() + TICK
            if self._standing_by:
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
        """Let the thread close its connection and end, without waiting for it. For finalizers, in any thread."""
        self.stopping = True
        self._woken = False
        self.wake()

    # the thread itself

    def _own(self) -> None:
        _here.connection = self.name
        with self._running:
            self._run()

    def _run(self) -> None:
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
        with self._using:
            try:
                self._open(connection)
                self._work_on(connection)
            except Exception as error:
                if self.well_after(error):
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
                self._end_loop_reader()

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
            self._wake.clear()
            self._woken = False
            try:
                timeout = max(0.0, min(self.work(), next_tick - time.monotonic()))
                loop_reader = self._present_loop_reader(connection)
                if loop_reader is None:
                    with contextlib.suppress(TimeoutError):
                        connection.drain_events(timeout)
                elif not loop_reader.connection.catch_up():
                    self._stand_by(loop_reader, timeout)
            except amqp.exceptions.ChannelError as error:
                if not self.channel_closed(error):
                    raise
                if self._loop_reader is not None:
                    self._loop_reader.resume()
            if time.monotonic() >= next_tick:
                self._look_whether_the_loop_comes(connection)
                connection.heartbeat_tick()
                next_tick = time.monotonic() + TICK

    def _not_opened(self, connection: Connection, error: BaseException) -> errors.BrokerError:
        described = describe(error, self.address)
        if self.broker.avoid(connection, described) and isinstance(described, FATAL):
            return errors.BrokerUnreachable(str(described))  # by this node: the others are yet to be tried
        return described

    # while an event loop reads

    def _present_loop_reader(self, connection: Connection) -> LoopReader | None:
        """The event loop's attention, where it reads now. Where it does not but could, it is invited."""
        if self._loop is None or time.monotonic() < self._own_until:
            return None
        loop_reader = self._loop_reader
        if loop_reader is not None and loop_reader.loop.ended:
            self._forget_loop_reader()
            loop_reader = None
        if self._loop.ended:
            return None
        if loop_reader is None:
            watched = connection.watched()
            if watched is None:
                return None
            watched.on_unsent = self.wake
            loop_reader = LoopReader(self._loop, watched, using=self._using, read=self.read_in_loop, wake=self.wake)
            self._loop_reader, self._visits_seen = loop_reader, -1
        if loop_reader.comes:
            return loop_reader
        try:
            loop_reader.invite()
        except RuntimeError:
            self._forget_loop_reader()
        return None

    def _stand_by(self, loop_reader: LoopReader, timeout: float) -> None:
        self._standing_by = True
        self._using.release()
        try:
            with contextlib.suppress(RuntimeError):  # it has ended, which is seen when it is missed
                loop_reader.invite()
            if not self.stopping:
                self._wake.wait(timeout)
        finally:
            self._using.acquire()
            self._standing_by = False
        if loop_reader.error is not None:
            raise loop_reader.error

    def _look_whether_the_loop_comes(self, connection: Connection) -> None:
        loop_reader = self._loop_reader
        if loop_reader is None or not loop_reader.comes or time.monotonic() < self._own_until:
            return
        if loop_reader.visits == self._visits_seen:
            # Nothing has arrived, or nobody looked: then the thread reads until the loop comes back.
            with contextlib.suppress(TimeoutError):
                connection.drain_events(0)
                loop_reader.comes = False
        self._visits_seen = loop_reader.visits

    def _forget_loop_reader(self) -> None:
        """The loop has ended (or this is a forked child); the connection may live on."""
        loop_reader, self._loop_reader = self._loop_reader, None
        if loop_reader is not None:
            loop_reader.forget()

    def _end_loop_reader(self) -> None:
        loop_reader, self._loop_reader = self._loop_reader, None
        if loop_reader is not None:
            loop_reader.end()

    def _end(self, error: BaseException) -> None:
        connection, self.connection = self.connection, None
        self.error = describe(error, self.address)
        if connection is not None:
            with contextlib.suppress(Exception):  # it is broken already: nothing that it says now matters
                connection.collect()
            self.lost(error)

    def _pause(self, seconds: float, *, until_wanted: bool = False) -> None:
        """Wait for so long, or (where nothing is wrong, just nothing to do) until a connection is wanted."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self._wake.clear()
            self._woken = False  # after the clear: a caller that finds it True now has left work that is seen below
            if self.stopping or (until_wanted and self.wanted()):
                return
            self._wake.wait(left)
