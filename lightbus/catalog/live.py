"""The live state of a catalogue's queues: consumers, and what waits. By passive declares, which change nothing."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque

import amqp.exceptions
import attrs

from lightbus import errors
from lightbus.catalog.catalog import Catalog
from lightbus.catalog.contract import Contract
from lightbus.connection.counts import TRIES, queue_counts
from lightbus.connection.diagnosis import LOST
from lightbus.connection.dial import BrokerAddresses
from lightbus.inspection.states import QueueState
from lightbus.transport import Channel, Connection
from lightbus.wire.topology import DEAD_KEY, queue_name

LIMIT = 5.0
"""Seconds for all queues together. The state of the rest is unknown."""
CONNECTIONS = 8
"""At most. A broker answers one declare of a connection after the other, so a distant one needs several."""
SHARE = 50
"""Queues for which another connection is worth it."""
LONGEST = 255
"""Bytes of a queue's name in AMQP."""


@attrs.frozen
class Live:
    """What the broker says about the queues of a catalogue."""

    queues: dict[str, QueueState]
    """By name. Those whose state is unknown are missing: this user may not see them, or there was no answer in time."""
    asked: int
    """The number of queues that the catalogue names."""

    def queue(self, name: str) -> QueueState | None:
        """The state of a queue; None if unknown."""
        return self.queues.get(name)

    def dead(self, contract: Contract) -> int | None:
        """The number of an app's dead letters; None if unknown."""
        state = self.queues.get(queue_name(contract.app, DEAD_KEY))
        return None if state is None else state.ready

    def waiting(self, contract: Contract) -> int | None:
        """The number of messages that wait for an app's handlers; None if unknown."""
        counts = [None if one is None else one.ready for one in self._states(contract)]
        known = [one for one in counts if one is not None]
        return sum(known) if known and len(known) == len(counts) else None

    def consumers(self, contract: Contract) -> int | None:
        """The number of an app's live workers: the consumers of the queue that has most; None if unknown."""
        counts = [None if one is None else one.consumers for one in self._states(contract)]
        known = [one for one in counts if one is not None]
        return max(known) if known else None

    def _states(self, contract: Contract) -> list[QueueState | None]:
        return [self.queues.get(name) for name in consumed_queues(contract)]


def consumed_queues(contract: Contract) -> list[str]:
    """The queues of an app's handlers. Only its own: a contract cannot show another app's queue as its own."""
    names = dict.fromkeys(one.queue for one in contract.handlers)
    return [name for name in names if name.startswith(f"{contract.app}.") and len(name.encode()) <= LONGEST]


def ask(broker: BrokerAddresses, catalog: Catalog, limit: float = LIMIT) -> Live:
    """Ask the broker for the state of all queues.

    Args:
        limit: seconds, after which the remaining queues count as unknown.

    Raises:
        errors.BrokerError: the broker is not usable.
    """
    names = [
        name
        for one in catalog.contracts
        if one.handlers
        for name in (*consumed_queues(one), queue_name(one.app, DEAD_KEY))
    ]
    return Live(_Round(broker, names, limit).run(), len(names))


class _Round:
    """Asks for all queues, over several connections if there are many, until a deadline."""

    def __init__(self, broker: BrokerAddresses, names: list[str], limit: float) -> None:
        self.broker = broker
        self.left = deque(names)
        self.limit = limit
        self.deadline = 0.0
        self.found: dict[str, QueueState] = {}
        self.connected = threading.Event()
        """Set by the first thread, also if it failed."""
        self.failure: errors.BrokerError | None = None

    def run(self) -> dict[str, QueueState]:
        # Daemons: one that still waits for a broker's answer at the deadline must not delay the end of the program.
        count = 1 + min(CONNECTIONS - 1, len(self.left) // SHARE)
        first, *others = [
            threading.Thread(target=self._work, args=(number == 0,), name="lightbus catalog", daemon=True)
            for number in range(count)
        ]
        first.start()
        self.connected.wait()  # connecting has its own limit
        if self.failure is not None:
            raise self.failure
        for one in others:
            one.start()
        for one in (first, *others):
            one.join(max(0.0, self.deadline - time.monotonic()))
        return dict(self.found)

    def _work(self, first: bool) -> None:
        try:
            connection = self.broker.connect("lightbus catalog")
        except errors.BrokerError as error:
            if first:
                self.failure = error
            return  # the others do the work of a further one
        finally:
            if first:
                self.deadline = time.monotonic() + self.limit
                self.connected.set()
        with contextlib.suppress(*LOST):  # the rest is unknown
            try:
                self._ask(connection)
            finally:
                connection.close()

    def _ask(self, connection: Connection) -> None:
        channel: Channel | None = None
        while time.monotonic() < self.deadline:
            try:
                name = self.left.popleft()
            except IndexError:
                break
            channel = channel or connection.channel()
            try:
                counts = queue_counts(channel, name, tries=TRIES)
            except amqp.exceptions.NotFound:
                channel = None  # closed by the broker
                self.found[name] = QueueState(name, False)
            except (amqp.exceptions.AccessRefused, amqp.exceptions.ResourceLocked):
                channel = None
            else:
                if counts.known:
                    self.found[name] = QueueState(name, True, counts.ready, counts.consumers)
