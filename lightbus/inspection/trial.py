"""A trial of what an app needs, with temporary queues: checks permissions and, with a test message, alarms and clocks.

The names of these queues begin with the app's name, so that the app's own broker user may declare them. They are
deleted with the connection, and receive no events.
"""

# kombu and py-amqp have no types:
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import amqp.exceptions

from lightbus.app import Lightbus
from lightbus.connection.address import Address
from lightbus.connection.brokers.row import Trial
from lightbus.connection.diagnosis import LOST, message_of
from lightbus.inspection.finding import Finding
from lightbus.transport import Channel, Connection, Delivery, Publication
from lightbus.wire import topology

CLOCK_OFF = 5.0
"""Seconds of difference between the clocks that lead to a warning (the broker's time is in whole seconds)."""
TRIAL_LIMIT = 5.0
"""Seconds for the test message."""

NO_TIME = Finding("note", "clock", "The broker does not report its time, so the clocks cannot be compared.")


def trial(connection: Connection, address: Address, app: Lightbus, target: str) -> Iterator[Finding]:
    """Whether the app's broker user may do what the app does, and the broker works. Nothing reaches a handler."""
    name = f"{app.name}.doctor-{uuid.uuid4().hex[:12]}"
    channel = connection.channel()
    try:
        yield from _TRIALS[address.broker.trial](connection, channel, app, name)
    except amqp.exceptions.AccessRefused as error:
        text = f"Publishing, binding or reading is refused: {message_of(error)}."
        yield Finding("fail", "permissions", text, f"lightbus topology permissions {target} prints what it needs.")
        return
    except TimeoutError:
        if connection.blocked:
            text, step = "The broker accepts no messages: a memory or disk alarm.", address.broker.alarms
        else:
            text, step = (
                f"A trial message did not arrive within {TRIAL_LIMIT:g} s.",
                "Check the broker's load and log.",
            )
        yield Finding("fail", "publishing", text, step)


def _through_dead_lettering(connection: Connection, channel: Channel, app: Lightbus, name: str) -> Iterator[Finding]:
    """Publish a test message through exclusive, temporary queues, where the broker dead-letters it, and get it back.

    This checks permissions, alarms and, with the time in the `x-death` header, the broker's clock.
    """
    sent = time.time()
    try:
        dead_letter = _send(connection, channel, app, name)
    except amqp.exceptions.AccessRefused:
        if not app.handlers:
            with contextlib.suppress(*LOST):  # an auto-delete exchange without bindings stays
                connection.channel().exchange_delete(name)
        raise
    works = "publishing, confirms and reading work" if app.handlers else "publishing and confirms work"
    yield Finding("ok", "permissions", f"Declaring, binding, {works}.")
    yield clock(dead_letter, sent, time.time())


def _send(connection: Connection, channel: Channel, app: Lightbus, name: str) -> Delivery:
    out = f"{name}-out"
    if app.handlers:
        exchange = topology.internal_name(app.name)
        sources = (topology.BUS, app.name, *(one.name for one in app.topology().shared[1:]))
    else:  # no worker has declared an internal exchange: use one that is deleted with the queues
        exchange, sources = name, ()
        channel.exchange_declare(exchange, "direct", durable=False, auto_delete=True)
    dead_lettering = {"x-message-ttl": 0, "x-dead-letter-exchange": exchange, "x-dead-letter-routing-key": out}
    for queue, arguments in ((name, dead_lettering), (out, {})):
        channel.queue_declare(queue, durable=False, exclusive=True, auto_delete=True, arguments=arguments)
        channel.queue_bind(queue, exchange, queue)
    for other in sources:
        channel.queue_bind(out, other, name)  # a key of no event
    channel.exchange_bind(topology.BUS, app.name, name)
    channel.exchange_unbind(topology.BUS, app.name, name)
    confirms: list[int] = []
    channel.on_ack = lambda tag, multiple: confirms.append(tag)
    channel.confirm_select()
    channel.publish([Publication(exchange, name, b"{}", {"message_id": name}, mandatory=False)])
    deadline = time.monotonic() + TRIAL_LIMIT
    dead_letter: Delivery | None = None
    while dead_letter is None or not confirms:
        if time.monotonic() > deadline:
            raise TimeoutError
        try:
            connection.drain_events(0.02)
        except TimeoutError:
            dead_letter = dead_letter or channel.get(out)
    channel.basic_ack(dead_letter.delivery_tag)
    for queue in (name, out):
        channel.queue_delete(queue)
    return dead_letter


def _through_subscription(_connection: Connection, channel: Channel, app: Lightbus, name: str) -> Iterator[Finding]:
    """Subscribe with a key of no event. To publish one would be wrong: it would reach the handlers of `#`, too. But the
    app's exchange is declared, which needs the permission to publish to it."""
    channel.exchange_declare(app.name, "topic", durable=True, auto_delete=False)
    if not app.handlers:
        yield Finding("ok", "permissions", "The app may publish.")
        return
    channel.queue_declare(name, durable=False, exclusive=True, auto_delete=True)
    for source in (topology.BUS, app.name, *(one.name for one in app.topology().shared[1:])):
        channel.queue_bind(name, source, name)
    channel.consume(name, lambda _: None, on_cancel=lambda _: None, no_ack=True)
    channel.queue_delete(name)
    channel.close()
    yield Finding("ok", "permissions", "Declaring, binding and reading work, and the app may publish.")
    yield NO_TIME


_TRIALS: dict[Trial, Callable[[Connection, Channel, Lightbus, str], Iterator[Finding]]] = {
    "dead-lettering": _through_dead_lettering,
    "subscription": _through_subscription,
}


def clock(dead_letter: Delivery, sent: float, received: float) -> Finding:
    """Whether the clocks of the broker and of this machine agree.

    Args:
        dead_letter: a message that the broker has dead-lettered between these two times.
    """
    deaths = (dead_letter.properties.get("headers") or {}).get("x-death")
    death = deaths[0].get("time") if isinstance(deaths, list) and deaths else None
    if isinstance(death, datetime):
        death = death.replace(tzinfo=UTC).timestamp() if death.tzinfo is None else death.timestamp()
    if not isinstance(death, (int, float)):
        return NO_TIME
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
