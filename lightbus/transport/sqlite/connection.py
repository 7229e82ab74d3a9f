"""The embedded broker: a kombu transport that keeps the AMQP model in an SQLite file.

    kombu.Connection("sqlite:///bus.db", transport=Transport)

| URL | the file |
|---|---|
| `sqlite:///bus.db` | relative to the working directory in which the app was created: three slashes |
| `sqlite:////var/lib/billing/bus.db` | absolute: four slashes |
| `sqlite://` | one for the user, in the platform's folder for state |
| `memory://`, `memory://name` | a temporary file for this process, shared by its connections and deleted at its end |

Processes share the file through SQLite's locks, so it must be on a local disk. Beside it is the folder
`bus.db.clients` (see `wake_pipe`). There is no background process: a client in `drain_events` also expires messages
and finds clients that died.

Differences from RabbitMQ, which should not matter:

- A message expires on time, not only at the head of its queue.
- Queues that are not durable live as long as the file: the broker never restarts.
- `x-expires`, `x-max-length-bytes` and priorities are accepted and ignored.
- A stream keeps its newest 10,000 messages, and is read as a whole (`read_stream`).
- An error in a batch of publications undoes the whole batch.
- A message that waits for at-least-once dead-lettering moves on as soon as a queue takes it.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from functools import partial
from typing import Any

from amqp import exceptions as amqp_errors

from lightbus import errors
from lightbus.transport.kombu_calls import KombuTransport, amqp_error
from lightbus.transport.sqlite.channel import Channel, Consumer
from lightbus.transport.sqlite.deliveries import Claim
from lightbus.transport.sqlite.place import locate
from lightbus.transport.sqlite.store import Store
from lightbus.version import __version__

TICK = 0.5  # seconds between checks for dead clients
SHARED_FOR = 0.1
"""Seconds for which messages are left to the other clients that consume a queue. After that, any client may claim them:
the others have no room, or do not run."""


class Connection:
    """One client of the file; see `lightbus.transport.Connection`."""

    blocked = False  # the embedded broker never blocks publishers: a full disk is an error

    def __init__(self, url: str) -> None:
        self.client: Any = None  # kombu's connection
        self.reached: Any = None
        self.channels: dict[int, Channel] = {}
        self._numbers = itertools.count(1)
        self.store = Store(locate(url))
        """The file. Owned by this connection, like everything in it."""
        self._open = True
        self._interrupted = False
        self._busy = False  # whether there was a transaction since the last tick
        self._outbox: deque[Callable[[], object]] = deque()  # what the next drain_events calls
        self._stale = True  # the file may have something for this client: look
        self._next_due: float | None = None
        self._shared_until = math.inf
        """When (monotonic) this client claims what it has left to others. Infinity: it has left nothing."""
        self._next_tick = time.monotonic() + TICK

    @property
    def server_properties(self) -> Mapping[str, Any]:
        return {"product": "Lightbus embedded broker", "version": __version__}

    @property
    def connected(self) -> bool:
        return self._open and self.store.session.is_open

    def channel(self) -> Channel:
        self._check_open()
        number = next(self._numbers)
        self.channels[number] = channel = Channel(self, self.store, number)
        return channel

    def interrupt(self) -> None:
        """Let the current or the next `drain_events` return at once. From any thread, at any time."""
        self._interrupted = True
        self.store.session.wake_pipe.wake()

    def watched(self) -> None:
        """None: a transaction may wait for the disk, and messages become ready by time alone."""

    def heartbeat_tick(self, rate: int = 2) -> None:
        """Nothing to do: the named pipes show which clients are alive."""

    def close(self) -> None:
        """Store the acks, and requeue what is not settled."""
        if not self._open:
            return
        self._open = False
        try:
            self.store.close([entry for channel in self.channels.values() for entry in channel.take_acks()])
        finally:
            self.channels.clear()

    def collect(self) -> None:
        """Drop the connection. What it holds is requeued when another client finds it dead."""
        self._open = False
        if self.store.session.is_open and any(channel.has_acks for channel in self.channels.values()):
            # A lost ack only causes a duplicate, so errors are ignored.
            with contextlib.suppress(errors.BrokerError, amqp_errors.AMQPError, OSError), self.transaction():
                pass
        self.store.session.drop()
        self.channels.clear()

    def _check_open(self) -> None:
        if not self.connected:
            raise amqp_error(
                amqp_errors.RecoverableConnectionError,
                "This connection to the embedded broker is closed, or belongs to the process that this one was "
                "forked from. Open another.",
            )

    # --- transactions ---------------------------------------------------------------------

    @contextlib.contextmanager
    def transaction(self) -> Generator[None]:
        """A transaction that begins with the acks that are waiting to be stored."""
        acks = [(channel, channel.take_acks()) for channel in self.channels.values()]
        self._busy = True
        try:
            with self.store.session.transaction():
                self.store.entries.delete([entry for _, entries in acks for entry in entries])
                yield
        except BaseException:
            for channel, entries in acks:
                channel.put_acks_back(entries)
            raise

    # --- events ---------------------------------------------------------------------------

    def dispatch_later(self, event: Callable[[], object]) -> None:
        """Call it in the next `drain_events`."""
        self._outbox.append(event)

    def look_again(self) -> None:
        """Look for messages to deliver: there is a new consumer, or room for more."""
        self._stale = True

    def drain_events(self, timeout: float | None = None) -> None:
        """Wait up to `timeout` seconds for something to arrive, then dispatch everything that has arrived.

        Raises:
            TimeoutError: nothing arrived in time.
            BrokerFileError: the file can no longer be used.
            amqp.exceptions.AMQPError: the connection is closed, or the file was locked for too long.
        """
        self._check_open()
        deadline = None if timeout is None else time.monotonic() + timeout
        seconds = 0.0
        while True:
            if self.store.session.wake_pipe.wait(seconds):
                self._stale = True
            self._look()
            if self._dispatch() or self._was_interrupted():
                return
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                raise TimeoutError("Nothing arrived from the embedded broker in time.")
            seconds = self._seconds_to_wait(now, deadline)

    def _was_interrupted(self) -> bool:
        # Cleared only if it was seen: another thread may set it between the two lines.
        if self._interrupted:
            self._interrupted = False
            return True
        return False

    def _dispatch(self) -> bool:
        # Only what is there now: callbacks that publish must not keep this loop running for ever.
        waiting = len(self._outbox)
        for _ in range(waiting):
            self._outbox.popleft()()
        return waiting > 0

    def _seconds_to_wait(self, now: float, deadline: float | None) -> float:
        if self._stale:
            return 0.0
        until = min(self._next_tick, self._shared_until)
        if deadline is not None:
            until = min(until, deadline)
        seconds = until - now
        if self._next_due is not None:
            seconds = min(seconds, self._next_due - self.store.session.now())
        return max(seconds, 0.0)

    def _look(self) -> None:
        """Store acks, expire what is due and claim what is ready: in one transaction, and only if there is any."""
        self._tick()
        due = self._next_due is not None and self._next_due <= self.store.session.now()
        acks = any(channel.has_acks for channel in self.channels.values())
        if not (self._stale or due or acks) and time.monotonic() < self._shared_until:
            return
        self._stale = False
        self.store.session.refresh()
        self._cancel_orphans()
        self._next_due = self.store.dead_letters.next_due()
        due = self._next_due is not None and self._next_due <= self.store.session.now()
        if (
            acks
            or due
            or any(self.store.entries.has_ready(consumer.queue) for _, consumer in self._consumers_with_credit())
        ):
            with self.transaction():
                expired = self.store.dead_letters.expire()
                claims = self._claim() if expired else []
            for channel, consumer, claimed in claims:
                channel.deliver(consumer, claimed)
            self._cancel_orphans()
            self._next_due = self.store.dead_letters.next_due()
        else:
            self._shared_until = math.inf

    def _tick(self) -> None:
        now = time.monotonic()
        if now >= self._next_tick:
            self._next_tick = now + TICK
            self.store.session.file.check_place()
            self.store.session.watch_clock()
            self.store.clients.reap()
            if not self._busy:
                self.store.shrink()
            self._busy = False
            self._stale = True  # a client may have died between its commit and the wake-up

    def _consumers_with_credit(self) -> Iterator[tuple[Channel, Consumer]]:
        for channel in self.channels.values():
            for consumer in channel.consumers.values():
                if channel.credit(consumer) > 0:
                    yield channel, consumer

    def _claim(self) -> list[tuple[Channel, Consumer, list[Claim]]]:
        claims: list[tuple[Channel, Consumer, list[Claim]]] = []
        now = time.monotonic()
        for_any = now >= self._shared_until
        left_to_others = False
        for channel, consumer in self._consumers_with_credit():
            credit = channel.credit(consumer)
            share = credit if for_any or consumer.no_ack else self.store.deliveries.fair_share(consumer.queue, credit)
            room = channel.bytes_left
            claimed = (
                self.store.deliveries.claim(consumer.queue, share, settled=consumer.no_ack, room=room) if share else []
            )
            if claimed:
                claims.append((channel, consumer, claimed))
                self._stale = self._stale or len(claimed) < share
            if share < credit:
                left_to_others = left_to_others or self.store.entries.has_ready(consumer.queue)
        if not left_to_others:
            self._shared_until = math.inf
        elif for_any or self._shared_until == math.inf:
            self._shared_until = now + SHARED_FOR
        return claims

    def _cancel_orphans(self) -> None:
        """Cancel the consumers whose queue was deleted."""
        known = self.store.session.topology.queues_by_id
        for channel in list(self.channels.values()):
            for consumer in list(channel.consumers.values()):
                queue = known.get(consumer.queue.id)
                if queue is None:
                    self.dispatch_later(partial(channel.cancel_orphan, consumer))
                else:
                    consumer.queue = queue


class Transport(KombuTransport):
    """The class for `kombu.Connection(transport=...)`."""

    driver_type = "lightbus-sqlite"
    driver_name = "sqlite3"

    def establish_connection(self) -> Connection:
        connection = Connection(self.client.hostname)
        connection.client = self.client
        return connection

    def as_uri(self, uri: str, include_password: bool = False, mask: str = "**") -> str:
        return uri
