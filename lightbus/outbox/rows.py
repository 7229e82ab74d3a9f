"""A row of the outbox: an event as it will be sent. The same for each database library."""

from __future__ import annotations

import hashlib
import math
import time
from datetime import timedelta
from typing import Any

import attrs

from lightbus import errors, options
from lightbus.app import Lightbus
from lightbus.transport import Delivery, Publication, StoredPublication
from lightbus.transport.sqlite.tables import decode_table, encode_properties
from lightbus.wire import codec, topology

OUTBOX = "lightbus_outbox"
"""The table of events that wait to be sent."""
INBOX = "lightbus_inbox"
"""The table of events that were handled."""
DELETE_ON_MARIADB = (
    "DELETE waiting FROM JSON_TABLE({ids}, '$[*]' COLUMNS (id BIGINT PATH '$')) AS sent "
    f"STRAIGHT_JOIN {OUTBOX} AS waiting FORCE INDEX (PRIMARY) ON waiting.id = sent.id"
)
"""Deletes rows by their ids, a JSON array, on MariaDB and MySQL. With `WHERE id IN (...)`, the optimizer may read the
whole table if it is small, and wait for the rows that other relays have locked: a deadlock. This always reads by key.
"""
WAITING, SET_ASIDE = 0, 1
"""`state`: to be sent; or refused for good, with its `error`."""


@attrs.frozen(kw_only=True)
class NewRow:
    """The columns of a row that is added."""

    app: str
    """Whose event it is: only a relay of this app sends it."""
    event: str
    """The event's name."""
    message_id: str
    """The same on each copy that is sent."""
    body: bytes
    """JSON."""
    properties: bytes
    """The AMQP properties, with the headers, as MessagePack."""
    delay: int
    """Seconds after `added_at`; 0 without a delay."""
    added_at: float
    """Seconds since 1970, by the clock of the program that added it."""


@attrs.frozen
class Row:
    """A row that a relay has read. The columns of `NewRow` that it needs, and:"""

    id: int
    """In the order of the INSERTs, which is not the order of the commits."""
    attempts: int
    """How often the broker has refused it so far."""
    app: str
    event: str
    message_id: str
    body: bytes
    properties: bytes
    delay: int
    added_at: float

    def publication(self) -> tuple[Publication, int | None]:
        """The message to send, and its delay level. What is left of the delay counts from when it was added.

        Raises:
            ValueError: the row cannot be read.
        """
        try:
            properties = decode_table(self.properties)
            _ = properties["message_id"], properties["headers"].keys()
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, OSError) as error:
            raise ValueError(f"its properties cannot be read: {errors.summary(error)}") from error
        message = StoredPublication(self.app, self.event, self.body, properties, added_at=self.added_at)
        if not self.delay:
            return message, None
        left = min(self.delay, math.ceil(self.added_at + self.delay - time.time()))
        if left <= 0:
            return message, None
        delayed, level = topology.delayed(message, left)
        return attrs.evolve(message, exchange=delayed.exchange, properties=delayed.properties), level


def message_id_of(delivery: Delivery) -> str:
    """The id for the inbox: a hash of one that a database refuses or takes for another one. Such ids of other programs
    have control characters, or a space at the end, which MariaDB ignores.
    """
    found = codec.remembered_id(delivery)
    if found.isprintable() and not found.endswith(" "):
        return found
    return f"sha256:{hashlib.sha256(found.encode(errors='surrogatepass')).hexdigest()}"


def free_name(app: Lightbus, name: str) -> str:
    """A service's name, which no other service of the app has: `outbox`, then `outbox-2`."""
    taken = {service.name for service in app.services}
    return next(one for one in (name, *(f"{name}-{n}" for n in range(2, len(taken) + 3))) if one not in taken)


def check_app(app: object, owner: str, second: str) -> None:
    """
    Raises:
        errors.InvalidOption: it is no app.
    """
    if not isinstance(app, Lightbus):
        raise errors.InvalidOption(f"{owner}({app!r}): pass the app, as in {owner}(app, {second}).")


def check_keep(app: str, keep: object) -> float:
    """For how many seconds an inbox keeps ids.

    Raises:
        errors.InvalidOption: not a positive number of seconds, or a positive timedelta.
    """
    seconds = options.in_seconds(keep)
    if not options.is_number(seconds) or not seconds > 0:
        raise errors.InvalidOption(f"Inbox({app!r}): keep={keep!r}: use a timedelta, more than 0.")
    return float(seconds)


def new_row(app: Lightbus, event: object, delay: float | timedelta | None, options: dict[str, Any]) -> NewRow:
    """
    Raises:
        errors.UnknownEvent, errors.InvalidPayload, errors.InvalidOption: as `app.publish`.
    """
    message = app.prepare(event, **options)
    try:
        properties = encode_properties(message.properties)
    except ValueError as error:
        raise errors.InvalidPayload(f"event {message.routing_key!r} was not added to the outbox: {error}") from error
    return NewRow(
        app=app.name,
        event=message.routing_key,
        message_id=message.properties["message_id"],
        body=message.body,
        properties=properties,
        delay=0 if delay is None or delay in (0, timedelta(0)) else topology.delay_seconds(delay),
        added_at=time.time(),
    )
