"""Whether an app can publish its contract to the catalogue, and read those of all apps."""

# kombu and py-amqp have no types:
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import uuid
from collections.abc import Iterator

import amqp.exceptions

from lightbus.app import Lightbus
from lightbus.connection.address import Address
from lightbus.connection.diagnosis import message_of
from lightbus.inspection.finding import Finding
from lightbus.inspection.states import queue_states
from lightbus.transport import Connection
from lightbus.wire.topology import CATALOG

READING_LIMIT = 5.0
"""Seconds for reading the catalogue."""


def catalog(connection: Connection, address: Address, app: Lightbus | None, target: str) -> Iterator[Finding]:
    """Whether the catalogue exists and, with an app, whether the app's broker user may write and read it.

    Args:
        app: its own exchange exists.
    """
    (state,) = queue_states(connection, [CATALOG])
    if not state.exists:
        yield Finding(
            "note",
            "catalog",
            f"The stream {CATALOG!r} does not exist: no contract has been published here.",
            address.broker.no_catalog_step,
        )
    elif app is not None:
        yield _access(connection, app, target)


def _access(connection: Connection, app: Lightbus, target: str) -> Finding:
    step = f"lightbus topology permissions {target} prints what it needs."
    channel = connection.channel()
    key = f"{app.name}.doctor-{uuid.uuid4().hex[:12]}"  # of no event
    try:
        channel.queue_bind(CATALOG, app.name, key)
        channel.queue_unbind(CATALOG, app.name, key)
    except amqp.exceptions.AccessRefused as error:
        return Finding("warn", "catalog", f"The app's contract cannot be published: {message_of(error)}.", step)
    channel.close()
    channel = connection.channel()
    try:
        channel.read_stream(CATALOG, lambda _: None, seconds=READING_LIMIT)
    except amqp.exceptions.AccessRefused as error:
        return Finding("warn", "catalog", f"The contracts of all apps cannot be read: {message_of(error)}.", step)
    except TimeoutError:
        return Finding(
            "warn",
            "catalog",
            f"{CATALOG} could not be read within {READING_LIMIT:g} s.",
            "Check the broker's load, its log, and the network.",
        )
    channel.close()
    return Finding("ok", "catalog", f"The app can publish its contract to {CATALOG}, and read those of all apps.")
