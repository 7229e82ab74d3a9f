"""All checks of `lightbus doctor`, in their order."""

# kombu and py-amqp have no types:
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Iterator

from lightbus import errors
from lightbus.app import Lightbus
from lightbus.connection.address import Address
from lightbus.connection.declare import exchange_exists, near_exchange
from lightbus.connection.diagnosis import LOST, describe
from lightbus.connection.dial import BrokerAddresses, address_of
from lightbus.inspection import contracts
from lightbus.inspection.broker import encryption, unreachable_step, version
from lightbus.inspection.comparison import differences
from lightbus.inspection.finding import Finding, Level
from lightbus.inspection.states import QueueState, consumed, queue_states, retries_waiting
from lightbus.inspection.trial import trial
from lightbus.transport import Connection
from lightbus.wire import topology
from lightbus.wire.topology import Topology

MANY_READY = 10_000
"""Ready events in one queue that lead to a warning."""


def examine(broker: BrokerAddresses, app: Lightbus | None, target: str) -> Iterator[Finding]:
    """Check a broker, and an app on it.

    Args:
        target: MODULE:ATTR or a URL, as the user gave it, for the next steps.
    """
    connections: list[Connection] = []
    try:
        for address in broker.addresses:
            try:
                connections.append(BrokerAddresses((address,)).connect("lightbus doctor"))
            except errors.BrokerError as error:
                yield Finding("fail", "broker", str(error), unreachable_step(error, address))
            else:
                yield Finding("ok", "broker", f"{address.masked} answers.")
                yield version(address, connections[-1].server_properties)
                yield from encryption(address)
        if connections:
            yield from _on_broker(connections[0], address_of(connections[0], broker), app, target)
    finally:
        for connection in connections:
            connection.close()


def _on_broker(connection: Connection, address: Address, app: Lightbus | None, target: str) -> Iterator[Finding]:
    try:
        if app is None:
            yield from _bus(connection, address, target)
            yield from contracts.catalog(connection, address, None, target)
            yield Finding("note", "app", "No app was given.", "To check an app, too: lightbus doctor MODULE:ATTR")
            return
        complete = True
        for finding in _topology(connection, address, app, target):
            complete = complete and finding.level in ("ok", "note")
            yield finding
        yield from _sources(connection, app)
        yield from _queues(connection, address, app, target)
        if complete:
            yield from trial(connection, address, app, target)
            yield from contracts.catalog(connection, address, app, target)
        else:
            yield Finding(
                "note",
                "trial",
                "Skipped (publishing, permissions, clock, catalog): fix the failures above first.",
                "See above.",
            )
    except LOST as error:
        text = f"The connection was lost: {describe(error, address)}"
        yield Finding("fail", "broker", text, "Check the broker's log.")


# --- topology ---------------------------------------------------------------------------------


def _bus(connection: Connection, address: Address, target: str) -> Iterator[Finding]:
    bus = topology.bus_exchange()
    if not exchange_exists(connection, bus.name):
        yield Finding(
            "warn",
            "topology",
            f"The bus exchange {bus.name!r} does not exist: {address.broker.no_bus}.",
            address.broker.no_bus_step,
        )
    else:
        yield from differences(connection, address, Topology(exchanges=(bus,)), target, restricted=True)


def _topology(connection: Connection, address: Address, app: Lightbus, target: str) -> Iterator[Finding]:
    yield from _bus(connection, address, target)
    # An app without handlers needs no worker, and not the queues that a worker declares.
    wanted = app.topology() if app.handlers else topology.publishing(app.name)
    missing = [one.name for one in wanted.exchanges if not exchange_exists(connection, one.name)]
    queues = queue_states(connection, [one.name for one in wanted.queues])
    missing += [f"{one.name} (queue)" for one in queues if not one.exists]
    missing += [
        f"{one.name} (of another app)" for one in wanted.shared[1:] if not exchange_exists(connection, one.name)
    ]
    if missing:
        yield Finding(
            "fail",
            "topology",
            f"Missing: {', '.join(missing)}.",
            f"Start a worker, which declares them: lightbus worker {target}"
            if app.handlers
            else "Publish an event, which declares it.",
        )
    existing = [Topology(exchanges=(one,)) for one in wanted.exchanges if one.name not in missing]
    existing += [Topology(queues=(one,)) for one in wanted.queues if f"{one.name} (queue)" not in missing]
    found: list[Finding] = []
    for one in existing:
        found += differences(connection, address, one, target)
        if found and found[-1].subject == "permissions":
            break  # the others would lead to the same finding
    yield from found
    if not missing and not found:
        if app.handlers:
            count = f"{len(wanted.exchanges)} exchanges and {len(wanted.queues)} queues exist"
        else:
            count = f"{app.name!r} has no handlers, so it needs no queues and no worker. Its exchange exists"
        yield Finding("ok", "topology", f"{count}, as {app.name!r} declares them.")
    if not app.handlers:
        return
    look = address.broker.list_bindings(address.vhost)
    yield Finding(
        "note",
        "bindings",
        f"{len(wanted.bindings)} are declared by each worker that starts; {address.broker.bindings}.",
        f"{look and f'{look}; '}lightbus unbind removes one.",
    )


def _sources(connection: Connection, app: Lightbus) -> Iterator[Finding]:
    """Apps that handlers name with source=. A worker declares their exchanges, even if no such app exists."""
    for source in sorted({one.source for one in app.handlers.values() if one.source not in (None, app.name)}, key=str):
        assert source is not None
        # Only the workers of an app declare its internal exchange. An app that only publishes has none.
        if exchange_exists(connection, topology.internal_name(source)):
            continue
        names = ", ".join(one.name for one in app.handlers.values() if one.source == source)
        near = near_exchange(connection, source)
        text = f"{names}: handles events of {source!r} only, and no worker of such an app has run here."
        if near is not None:
            yield Finding("warn", "source", text, f"Did you mean {near!r}, which exists? Correct source=.")
        else:
            yield Finding("note", "source", text, "Check the name. An app that only publishes has no workers.")


# --- queues -----------------------------------------------------------------------------------


def _queues(connection: Connection, address: Address, app: Lightbus, target: str) -> Iterator[Finding]:
    queues = consumed(app)
    by_name = {state.name: state for state in queue_states(connection, [one.name for one in app.topology().queues])}
    for name in queues:
        if by_name[name].exists and (app.handlers or by_name[name].ready):
            yield _consumed_queue(by_name[name], target)
    dead = by_name[topology.queue_name(app.name, topology.DEAD_KEY)]
    others = [state for name, state in by_name.items() if name not in queues and state is not dead and state.exists]
    waiting = sum(state.ready for state in others)
    if others:
        yield Finding("ok", "retries", f"{retries_waiting(waiting)}.")
    look = address.broker.list_consumers(address.vhost)
    for state in [*others, *([dead] if dead.exists else [])]:
        if state.consumers:
            count = "1 consumer" if state.consumers == 1 else f"{state.consumers} consumers"
            ours = "consumes it only while `lightbus dead` reads it" if state is dead else "never consumes it"
            yield Finding(
                "warn",
                "queue",
                f"{state.name} has {count}; Lightbus {ours}.",
                f"Find out who does{f': {look}' if look else '.'}",
            )
    if dead.exists and dead.ready:
        yield Finding(
            "warn",
            "dead letters",
            f"{dead.ready:,} in {dead.name}.",
            f"lightbus dead list {target} --stats",
        )
    elif dead.exists:
        yield Finding("ok", "dead letters", f"None in {dead.name}.")


def _consumed_queue(state: QueueState, target: str) -> Finding:
    consumers = "1 consumer" if state.consumers == 1 else f"{state.consumers} consumers"
    events = "1 event" if state.ready == 1 else f"{state.ready:,} events"
    what = f"{state.name}: {events} ready, {consumers}."
    if not state.consumers:
        level: Level = "fail" if state.ready else "warn"
        return Finding(
            level, "queue", f"{what} No worker is running, or workers keep crashing.", f"lightbus worker {target}"
        )
    if state.ready >= MANY_READY:
        return Finding("warn", "queue", what, "Workers lag behind: start more, or look for slow handlers.")
    return Finding("ok", "queue", what)
