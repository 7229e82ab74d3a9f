"""What is there on the broker, and what is wrong with it: findings with their next step. Plain AMQP; nothing changes.

What a trial needs (an exclusive queue, an exchange, a binding) is the app's by name, goes with the connection, and
receives no event.
"""

# kombu and py-amqp have no types:
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import contextlib
import ipaddress
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal
from urllib.parse import urlsplit

import amqp.exceptions
import attrs

from lightbus import errors
from lightbus.app import Lightbus
from lightbus.connection.address import Address
from lightbus.connection.declare import declare, exchange_exists, near_exchange
from lightbus.connection.diagnosis import LOST, ctl, describe, message_of, resolution
from lightbus.connection.dial import BrokerAddresses, address_of
from lightbus.transport import Channel, Connection, Delivery, Publication
from lightbus.wire import topology
from lightbus.wire.topology import Topology

Level = Literal["ok", "note", "warn", "fail"]

OLDEST = (3, 10)
NEWEST_MAJOR = 4
MANY_READY = 10_000
"""Events waiting in one queue that are worth a word."""
CLOCK_OFF = 5.0
"""Seconds between the broker's clock and ours that are worth a word (its answer is in whole seconds)."""
TRIAL_LIMIT = 5.0


@attrs.frozen
class Finding:
    """One thing that was looked at."""

    level: Level
    subject: str
    text: str
    step: str = ""
    """What to do next."""


@attrs.frozen
class QueueState:
    """What the broker says of a queue."""

    name: str
    exists: bool
    ready: int = 0
    consumers: int = 0


def examine(broker: BrokerAddresses, app: Lightbus | None, target: str) -> Iterator[Finding]:
    """All that can be said of a broker, and of an app on it.

    Args:
        target: how the user calls the app, for the next steps.
    """
    connections: list[Connection] = []
    try:
        for address in broker.addresses:
            try:
                connections.append(BrokerAddresses((address,)).connect("lightbus doctor"))
            except errors.BrokerError as error:
                yield Finding("fail", "broker", str(error), _unreachable_step(error))
            else:
                yield Finding("ok", "broker", f"{address.masked} answers.")
                yield _version(connections[-1].server_properties)
                yield from _encryption(address)
        if connections:
            yield from _on_broker(connections[0], address_of(connections[0], broker), app, target)
    finally:
        for connection in connections:
            connection.close()


def _on_broker(connection: Connection, address: Address, app: Lightbus | None, target: str) -> Iterator[Finding]:
    try:
        if app is None:
            yield from _bus(connection, address, target)
            yield Finding("note", "app", "No app was given.", "To check an app, too: lightbus doctor MODULE:ATTR")
            return
        whole = True
        for finding in _topology(connection, address, app, target):
            whole = whole and finding.level in ("ok", "note")
            yield finding
        yield from _sources(connection, app)
        yield from _queues(connection, address, app, target)
        if whole:
            yield from _trial(connection, app, target)
        else:
            yield Finding(
                "note", "trial", "Skipped (publishing, permissions, clock): fix the failures above first.", "See above."
            )
    except LOST as error:
        said = describe(error, address)
        yield Finding("fail", "broker", f"The connection was lost: {said}", "Check the broker's log.")


def _unreachable_step(error: errors.BrokerError) -> str:
    match error:
        case errors.LimitReached():
            return "See above: a limit is reached, or too low."
        case errors.AccessRefused():
            return "Check the user, its password and its virtual host in LIGHTBUS_URL."
        case errors.TLSRefused():
            return "Check the port, and the certificate's names and dates; ?cafile= names the authority that signed it."
        case errors.BrokerFileError():
            return "See above; the file is unchanged."
        case _:
            return "Check the host and port in LIGHTBUS_URL, that the broker runs, and the network in between."


def _version(server: Mapping[str, Any]) -> Finding:
    product, version = str(server.get("product", "unknown")), str(server.get("version", "unknown"))
    what = f"{product} {version}"
    if product != "RabbitMQ":
        level: Level = "ok" if "Lightbus" in product else "warn"
        step = "" if level == "ok" else "Lightbus is tested with RabbitMQ 3.10 to 4.x and with its embedded broker."
        return Finding(level, "version", f"{what}.", step)
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if len(numbers) == 2 and numbers < OLDEST:
        return Finding("fail", "version", f"{what} is older than 3.10.", "Upgrade RabbitMQ: events could be lost.")
    if len(numbers) < 2 or numbers[0] > NEWEST_MAJOR:
        return Finding("warn", "version", f"{what} is not known here.", "Lightbus is tested with 3.10 to 4.x.")
    return Finding("ok", "version", f"{what} (Lightbus needs 3.10 to 4.x).")


def _encryption(address: Address) -> Iterator[Finding]:
    if address.embedded:
        return
    host = urlsplit(address.plain).hostname or "localhost"
    if address.scheme == "amqps":
        yield Finding("ok", "TLS", f"{host}: encrypted, and the certificate was verified.")
    elif _is_loopback(host):
        yield Finding("ok", "TLS", f"{host}: not encrypted, on this machine.")
    else:
        yield Finding(
            "warn",
            "TLS",
            f"{host}: passwords and events cross the network unencrypted.",
            "Use amqps:// in LIGHTBUS_URL.",
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# --- topology ---------------------------------------------------------------------------------


def _bus(connection: Connection, address: Address, target: str) -> Iterator[Finding]:
    bus = topology.bus_exchange()
    if not exchange_exists(connection, bus.name):
        yield Finding(
            "warn",
            "topology",
            f"The bus exchange {bus.name!r} does not exist: no app has run here yet.",
            "Start a worker once, as a user with permission to configure it.",
        )
    else:
        yield from _compared(connection, address, Topology(exchanges=(bus,)), target, restricted=True)


def _topology(connection: Connection, address: Address, app: Lightbus, target: str) -> Iterator[Finding]:
    yield from _bus(connection, address, target)
    # An app without handlers subscribes to nothing: it needs no worker, nor what one declares.
    wanted = app.topology() if app.handlers else topology.publishing(app.name)
    missing = [one.name for one in wanted.exchanges if not exchange_exists(connection, one.name)]
    missing += [f"{one.name} (queue)" for one in wanted.queues if not _queue_exists(connection, one.name)]
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
    there = [Topology(exchanges=(one,)) for one in wanted.exchanges if one.name not in missing]
    there += [Topology(queues=(one,)) for one in wanted.queues if f"{one.name} (queue)" not in missing]
    found: list[Finding] = []
    for one in there:
        found += _compared(connection, address, one, target)
        if found and found[-1].subject == "permissions":
            break  # the others would say the same
    yield from found
    if not missing and not found:
        if app.handlers:
            count = f"{len(wanted.exchanges)} exchanges and {len(wanted.queues)} queues exist"
        else:
            count = f"{app.name!r} has no handlers, so it needs no queues and no worker. Its exchange exists"
        yield Finding("ok", "topology", f"{count}, as {app.name!r} declares them.")
    if not app.handlers:
        return
    look = ctl("list_bindings", address.vhost, "source_name", "routing_key", "destination_name") + "; "
    yield Finding(
        "note",
        "bindings",
        f"{len(wanted.bindings)} are declared by each worker that starts; AMQP cannot list them.",
        f"{'' if address.embedded else look}lightbus unbind removes one.",
    )


def _sources(connection: Connection, app: Lightbus) -> Iterator[Finding]:
    """Apps that handlers name with source=: a worker declares their exchanges, also where there is no such app."""
    for source in sorted({one.source for one in app.handlers.values() if one.source not in (None, app.name)}, key=str):
        assert source is not None
        # Which the workers of an app declare, and nobody else. An app that only publishes has none.
        if exchange_exists(connection, topology.internal_name(source)):
            continue
        names = ", ".join(one.name for one in app.handlers.values() if one.source == source)
        near = near_exchange(connection, source)
        text = f"{names}: handles events of {source!r} only, and no worker of such an app has run here."
        if near is not None:
            yield Finding("warn", "source", text, f"Did you mean {near!r}, which exists? Correct source=.")
        else:
            yield Finding("note", "source", text, "Check the name. An app that only publishes has no workers.")


def _queue_exists(connection: Connection, name: str) -> bool:
    channel = connection.channel()
    try:
        channel.queue_declare(name, passive=True)
    except amqp.exceptions.NotFound:
        return False
    channel.close()
    return True


def _compared(
    connection: Connection, address: Address, one: Topology, target: str, *, restricted: bool = False
) -> list[Finding]:
    """Declare what exists once more, on a separate channel: the broker answers what differs, or refuses it."""
    try:
        declare(connection, one)
    except amqp.exceptions.PreconditionFailed as error:
        words = message_of(error)
        if "inequivalent arg" not in words:
            return [Finding("fail", "topology", str(describe(error, address)), "See above.")]
        text = f"It differs from what the app declares: {words}."
        return [Finding("fail", "topology", text, resolution(words, address))]
    except amqp.exceptions.AccessRefused as error:
        if restricted:  # as it should be: only who sets the broker up may configure the bus
            return []
        text = f"The app's own names cannot be configured (declared): {message_of(error)}."
        return [Finding("fail", "permissions", text, f"lightbus topology permissions {target} prints what it needs.")]
    return []


@attrs.frozen
class ObjectState:
    """What the broker has where an app declares an exchange or a queue."""

    exists: bool
    difference: str = ""
    """In the broker's words, where it has it with other arguments; or why that is not known."""
    ready: int = 0
    consumers: int = 0


@attrs.frozen
class States:
    """What the broker has of all that an app declares, by name. Bindings are not in it: AMQP cannot ask for them."""

    exchanges: Mapping[str, ObjectState]
    queues: Mapping[str, ObjectState]


def states(connection: Connection, app: Lightbus) -> States:
    """Look at each exchange and queue of an app, and change none of them."""
    wanted, address = app.topology(), address_of(connection, app.broker)
    exchanges = {}
    for exchange in (*wanted.shared, *wanted.exchanges):
        there = exchange_exists(connection, exchange.name)
        others = exchange in wanted.shared
        same = Topology(exchanges=(exchange,))
        exchanges[exchange.name] = ObjectState(there, _difference(connection, address, same, others) if there else "")
    queues = {}
    for queue, state in zip(wanted.queues, queue_states(connection, [one.name for one in wanted.queues]), strict=True):
        difference = _difference(connection, address, Topology(queues=(queue,))) if state.exists else ""
        queues[queue.name] = ObjectState(state.exists, difference, state.ready, state.consumers)
    return States(exchanges, queues)


def _difference(connection: Connection, address: Address, one: Topology, others: bool = False) -> str:
    found = _compared(connection, address, one, "MODULE:ATTR", restricted=others)
    return found[0].text if found else ""


# --- queues -----------------------------------------------------------------------------------


def queue_states(connection: Connection, names: Sequence[str]) -> list[QueueState]:
    """What the broker says of these queues."""
    found = []
    for name in names:
        channel = connection.channel()
        try:
            _, ready, consumers = channel.queue_declare(name, passive=True)
        except amqp.exceptions.NotFound:
            found.append(QueueState(name, False))
        else:
            channel.close()
            found.append(QueueState(name, True, int(ready), int(consumers)))
    return found


def consumed(app: Lightbus) -> list[str]:
    return [queue.name for queue in app.consumed_queues()]


def retrying(connection: Connection, app: Lightbus) -> int:
    """How many events wait for their next attempt."""
    others = {*consumed(app), topology.queue_name(app.name, topology.DEAD_KEY)}
    retry_queues = [one.name for one in app.topology().queues if one.name not in others]
    return sum(state.ready for state in queue_states(connection, retry_queues))


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
        wait = "event waits for its" if waiting == 1 else "events wait for their"
        yield Finding("ok", "retries", f"{waiting:,} {wait} next attempt.")
    for state in [*others, *([dead] if dead.exists else [])]:
        if state.consumers:
            count = "1 consumer" if state.consumers == 1 else f"{state.consumers} consumers"
            ours = "consumes it only while `lightbus dead` reads it" if state is dead else "never consumes it"
            yield Finding(
                "warn",
                "queue",
                f"{state.name} has {count}; Lightbus {ours}.",
                "Find out who does" + ("." if address.embedded else f": {ctl('list_consumers', address.vhost)}"),
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


# --- a trial ----------------------------------------------------------------------------------


def _trial(connection: Connection, app: Lightbus, target: str) -> Iterator[Finding]:
    """A message of our own through queues of our own: publish, confirm, dead-letter, get. It shows permissions, alarms
    and, by the time that the broker notes on its death, the broker's clock.
    """
    name = f"{app.name}.doctor-{uuid.uuid4().hex[:12]}"
    channel = connection.channel()
    try:
        sent = time.time()
        letter = _through(connection, channel, app, name)
    except amqp.exceptions.AccessRefused as error:
        if not app.handlers:
            with contextlib.suppress(*LOST):  # an exchange that nothing was bound to does not go by itself
                connection.channel().exchange_delete(name)
        text = f"Publishing, binding or reading is refused: {message_of(error)}."
        yield Finding("fail", "permissions", text, f"lightbus topology permissions {target} prints what it needs.")
        return
    except TimeoutError:
        if connection.blocked:
            text, step = "The broker accepts no messages: a memory or disk alarm.", "rabbitmq-diagnostics alarms"
        else:
            text, step = (
                f"A trial message did not arrive within {TRIAL_LIMIT:g} s.",
                "Check the broker's load and log.",
            )
        yield Finding("fail", "publishing", text, step)
        return
    works = "publishing, confirms and reading work" if app.handlers else "publishing and confirms work"
    yield Finding("ok", "permissions", f"Declaring, binding, {works}.")
    yield _clock(letter, sent, time.time())


def _through(connection: Connection, channel: Channel, app: Lightbus, name: str) -> Delivery:
    out = f"{name}-out"
    if app.handlers:
        exchange = topology.internal_name(app.name)
        sources = (topology.BUS, app.name, *(one.name for one in app.topology().shared[1:]))
    else:  # no worker has declared an internal exchange: this one goes with the queues
        exchange, sources = name, ()
        channel.exchange_declare(exchange, "direct", durable=False, auto_delete=True)
    dead_lettering = {"x-message-ttl": 0, "x-dead-letter-exchange": exchange, "x-dead-letter-routing-key": out}
    for queue, arguments in ((name, dead_lettering), (out, {})):
        channel.queue_declare(queue, durable=False, exclusive=True, auto_delete=True, arguments=arguments)
        channel.queue_bind(queue, exchange, queue)
    for other in sources:
        channel.queue_bind(out, other, name)  # a key that no event has
    channel.exchange_bind(topology.BUS, app.name, name)
    channel.exchange_unbind(topology.BUS, app.name, name)
    confirms: list[int] = []
    channel.on_ack = lambda tag, multiple: confirms.append(tag)
    channel.confirm_select()
    channel.publish([Publication(exchange, name, b"{}", {"message_id": name}, mandatory=False)])
    deadline = time.monotonic() + TRIAL_LIMIT
    letter: Delivery | None = None
    while letter is None or not confirms:
        if time.monotonic() > deadline:
            raise TimeoutError
        try:
            connection.drain_events(0.02)
        except TimeoutError:
            letter = letter or channel.get(out)
    channel.basic_ack(letter.delivery_tag)
    for queue in (name, out):
        channel.queue_delete(queue)
    return letter


def _clock(letter: Delivery, sent: float, received: float) -> Finding:
    deaths = (letter.properties.get("headers") or {}).get("x-death")
    death = deaths[0].get("time") if isinstance(deaths, list) and deaths else None
    if isinstance(death, datetime):
        death = death.replace(tzinfo=UTC).timestamp() if death.tzinfo is None else death.timestamp()
    if not isinstance(death, (int, float)):
        return Finding("note", "clock", "The broker does not report its time, so the clocks cannot be compared.")
    off = max(sent - death - 1.0, death - received, 0.0)
    if off > CLOCK_OFF:
        ahead = "ahead of" if death > received else "behind"
        return Finding(
            "warn",
            "clock",
            f"The broker's clock is {off:.0f} s {ahead} this machine's.",
            "Synchronize both clocks (chrony, systemd-timesyncd): ages and Message.time are wrong by this difference.",
        )
    return Finding("ok", "clock", "The clocks of the broker and of this machine agree.")
