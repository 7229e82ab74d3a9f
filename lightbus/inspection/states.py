"""Which exchanges and queues of an app exist on a broker, and their state."""

# kombu and py-amqp have no types:
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime

import amqp.exceptions
import attrs

from lightbus.app import Lightbus
from lightbus.connection.address import Address
from lightbus.connection.counts import TRIES, queue_counts
from lightbus.connection.declare import exchange_exists
from lightbus.connection.diagnosis import LOST, describe
from lightbus.connection.dial import address_of
from lightbus.inspection.comparison import differences
from lightbus.transport import Connection
from lightbus.wire import topology
from lightbus.wire.topology import Topology


@contextmanager
def connected(app: Lightbus, purpose: str) -> Generator[Connection]:
    """A connection to the app's broker.

    Args:
        purpose: part of the connection's name on the broker.

    Raises:
        errors.BrokerError: the broker is not usable, or the connection was lost.
    """
    connection = app.broker.connect(f"lightbus {app.name} {purpose}")
    try:
        yield connection
    except LOST as error:
        raise describe(error, address_of(connection, app.broker)) from error
    finally:
        connection.close()


@attrs.frozen
class QueueState:
    """A queue on the broker."""

    name: str
    exists: bool
    ready: int = 0
    consumers: int = 0


@attrs.frozen
class ObjectState:
    """An exchange or a queue on the broker that an app declares."""

    exists: bool
    difference: str = ""
    """The broker's description, if it exists with other arguments; or why the comparison failed."""
    ready: int = 0
    consumers: int = 0


@attrs.frozen
class States:
    """All exchanges and queues that an app declares, by name. Without bindings: AMQP cannot list them."""

    exchanges: Mapping[str, ObjectState]
    queues: Mapping[str, ObjectState]


def states(connection: Connection, app: Lightbus) -> States:
    """The state of each exchange and queue of an app. Changes nothing."""
    wanted, address = app.topology(), address_of(connection, app.broker)
    exchanges = {}
    for exchange in (*wanted.shared, *wanted.exchanges):
        exists = exchange_exists(connection, exchange.name)
        others = exchange in wanted.shared
        same = Topology(exchanges=(exchange,))
        exchanges[exchange.name] = ObjectState(exists, _difference(connection, address, same, others) if exists else "")
    queues = {}
    for queue, state in zip(wanted.queues, queue_states(connection, [one.name for one in wanted.queues]), strict=True):
        difference = _difference(connection, address, Topology(queues=(queue,))) if state.exists else ""
        queues[queue.name] = ObjectState(state.exists, difference, state.ready, state.consumers)
    return States(exchanges, queues)


def _difference(connection: Connection, address: Address, one: Topology, others: bool = False) -> str:
    found = differences(connection, address, one, "MODULE:ATTR", restricted=others)
    return found[0].text if found else ""


def queue_states(connection: Connection, names: Sequence[str]) -> list[QueueState]:
    """The states of these queues."""
    found = []
    for name in names:
        channel = connection.channel()
        try:
            counts = queue_counts(channel, name, tries=TRIES)
        except amqp.exceptions.NotFound:
            found.append(QueueState(name, False))
        else:
            channel.close()
            found.append(QueueState(name, True, counts.ready, counts.consumers))
    return found


def oldest_seconds(connection: Connection, queue: str) -> float | None:
    """How long ago the first message that waits in a queue was published, or its delay or the wait before its retry
    ended; None if there is none, or the broker (any but the embedded one) cannot tell."""
    channel = connection.channel()
    properties = channel.first_properties(queue) or {}
    channel.close()
    published, headers = properties.get("timestamp"), properties.get("headers")
    if not isinstance(published, int | float):
        return None
    if not isinstance(headers, dict):
        headers = {}
    arrived = published + topology.delay_of(headers)
    match headers.get("x-death"):
        case [{"time": datetime() as left_queue}, *_]:  # a delay queue or a retry queue
            arrived = max(arrived, left_queue.timestamp())
        case _:
            pass
    return max(0.0, time.time() - arrived)


def consumed(app: Lightbus) -> list[str]:
    """The names of the queues that the app's workers consume."""
    return [queue.name for queue in app.consumed_queues()]


def retrying(connection: Connection, app: Lightbus) -> int:
    """The number of events in the retry queues."""
    others = {*consumed(app), topology.queue_name(app.name, topology.DEAD_KEY)}
    retry_queues = [one.name for one in app.topology().queues if one.name not in others]
    return sum(state.ready for state in queue_states(connection, retry_queues))


def retries_waiting(count: int) -> str:
    """`2 events wait for their next attempt`."""
    return f"{count:,} {'event waits for its' if count == 1 else 'events wait for their'} next attempt"
