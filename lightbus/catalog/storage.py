"""The contracts on the broker: one stream for all apps, to which each app publishes through its internal exchange.

Nothing is removed from a stream, so that every app's user may read it. The broker deletes what is old. Of each app, the
newest contract counts. RabbitMQ keeps the exchange of a message, and lets only its app publish to it: so the exchange
proves which app wrote a contract, and one that names another app is forged (verified on RabbitMQ 3.10.8).
"""

# kombu and py-amqp have no types:
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import contextlib
import json
import time
import zlib
from collections.abc import Callable, Generator
from typing import Any, TypeVar

import amqp.exceptions
import attrs

from lightbus import errors
from lightbus.catalog import catalog as catalogs
from lightbus.catalog import contract as contracts
from lightbus.catalog.catalog import Catalog, Ignored
from lightbus.catalog.contract import Contract
from lightbus.connection.declare import declare
from lightbus.connection.diagnosis import LOST, describe
from lightbus.connection.dial import BrokerAddresses, address_of
from lightbus.transport import Connection, Delivery, Publication
from lightbus.wire import codec
from lightbus.wire.topology import CATALOG, CONTRACT_KEY, INTERNAL, Topology, catalog_stream, cataloguing, internal_name

LIMIT = 30.0
"""Seconds for publishing a contract, or for reading all of them."""
MAX_BYTES = 1024 * 1024
"""Of one contract as JSON. A larger one is refused by its writer, and ignored by readers."""
ENCODING = "deflate"
WITHDRAWN = "withdrawn"
"""A key in the place of a contract: the app no longer exists."""
PAUSES = (0.2, 0.4, 0.8, 1.6)
"""Seconds before the next attempts, where the stream is being created."""

_Result = TypeVar("_Result")


@contextlib.contextmanager
def _connected(broker: BrokerAddresses, purpose: str) -> Generator[Connection]:
    """
    Raises:
        errors.BrokerError: the broker is not usable, or the connection was lost.
    """
    connection = broker.connect(f"lightbus {purpose}")
    try:
        yield connection
    except LOST as error:
        raise describe(error, address_of(connection, broker)) from error
    finally:
        connection.close()


def _with_stream(broker: BrokerAddresses, purpose: str, work: Callable[[Connection], _Result]) -> _Result:
    """Call `work` with a connection. The stream exists then.

    Where several create it at once, as the first workers of a bus do, RabbitMQ refuses some: "INTERNAL_ERROR", or
    "RESOURCE_ERROR - Stream not found" (verified on 3.10.8). A moment later it exists.

    Raises:
        errors.CatalogError: the stream does not exist, and this user may not create it; or what `work` raises.
        errors.BrokerError: the broker is not usable, or the connection was lost.
    """
    pauses = iter(PAUSES)
    while True:
        try:
            with _connected(broker, purpose) as connection:
                _declare_stream(connection)
                return work(connection)
        except errors.BrokerError as error:
            is_refused = isinstance(error.__cause__, amqp.exceptions.InternalError | amqp.exceptions.ResourceError)
            pause = next(pauses, None) if is_refused else None
            if pause is None:
                raise
            time.sleep(pause)


# --- publishing -------------------------------------------------------------------------------


def publish(broker: BrokerAddresses, contract: Contract) -> None:
    """Publish an app's contract, and return when the broker has it.

    Raises:
        errors.CatalogError: this user may not publish to the catalogue; or the contract is too large, or not readable.
        errors.BrokerError: the broker is not usable, or has no streams.
    """
    content = contracts.to_json(contract)
    contracts.from_json(content)  # the app's team shall see what is wrong, not only the readers
    _publish(broker, contract.app, content)


def withdraw(broker: BrokerAddresses, app: str) -> None:
    """Remove an app from the catalogue, until it publishes a contract again.

    Raises:
        errors.CatalogError, errors.BrokerError: as `publish`.
    """
    _publish(broker, app, {"app": app, "at": time.time(), WITHDRAWN: True})


def _publish(broker: BrokerAddresses, app: str, content: dict[str, Any]) -> None:
    body = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode(errors="replace")
    if len(body) > MAX_BYTES:
        raise errors.CatalogError(
            f"The contract of app {app!r} has {len(body):,} bytes; the catalogue takes {MAX_BYTES:,}. Shorten the "
            "docstrings of its events, or declare fewer events in one app."
        )
    properties = {
        "content_type": "application/json",
        "content_encoding": ENCODING,
        "delivery_mode": 2,
        "timestamp": int(time.time()),
        "app_id": app,
    }
    publication = Publication(internal_name(app), CONTRACT_KEY, zlib.compress(body), properties)

    def declare_and_send(connection: Connection) -> None:
        try:
            declare(connection, cataloguing(app))
        except amqp.exceptions.AccessRefused as error:
            raise errors.CatalogError(
                f"This user may not write to {CATALOG} as app {app!r}. Give it the permissions that `lightbus topology "
                "permissions` prints."
            ) from error
        _send(connection, publication)

    _with_stream(broker, f"{app} contract", declare_and_send)


def _declare_stream(connection: Connection) -> None:
    """An administrator may have declared it, with other limits.

    Raises:
        errors.CatalogError: it does not exist, and this user may not create it.
    """
    probe = connection.channel()
    try:
        probe.queue_declare(CATALOG, passive=True)
    except amqp.exceptions.NotFound:
        try:
            declare(connection, Topology(queues=(catalog_stream(),)))
        except amqp.exceptions.AccessRefused as error:
            raise errors.CatalogError(
                f"The stream {CATALOG} does not exist, and this user may not create it. Run once as a user who may: "
                "lightbus catalog"
            ) from error
    else:
        probe.close()


def _send(connection: Connection, publication: Publication) -> None:
    """
    Raises:
        errors.CatalogError: the broker refuses it, or does not confirm it in time.
    """
    channel = connection.channel()
    outcome: list[str] = []
    channel.on_ack = lambda _tag, _multiple: outcome.append("")
    channel.on_nack = lambda _tag, _multiple: outcome.append("the broker has refused it")

    def returned(*_: object) -> None:
        outcome.append(f"{CATALOG} is not bound to {publication.exchange}")

    channel.on_return = returned
    channel.confirm_select()
    channel.publish([publication])
    deadline = time.monotonic() + LIMIT
    while not outcome:
        if time.monotonic() > deadline:
            raise errors.CatalogError(f"The broker did not confirm the contract within {LIMIT:g} s.")
        with contextlib.suppress(TimeoutError):
            connection.drain_events(0.1)
    channel.close()
    if outcome[0]:
        raise errors.CatalogError(f"The contract was not stored: {outcome[0]}.")


# --- reading ----------------------------------------------------------------------------------


@attrs.frozen
class _Stored:
    """A message of the stream, not decoded yet: only the newest of each app is."""

    body: bytes
    encoding: str
    at: float


def read(broker: BrokerAddresses) -> Catalog:
    """Read the newest contract of each app.

    Raises:
        errors.CatalogError: the stream does not exist, and this user may not create it.
        errors.BrokerError: the broker is not usable, has no streams, or this user may not read this one.
    """
    newest: dict[str, _Stored] = {}
    ignored: dict[str, Ignored] = {}

    def take(delivery: Delivery) -> None:
        app = delivery.exchange.removesuffix(INTERNAL)
        if delivery.exchange != internal_name(app) or delivery.routing_key != CONTRACT_KEY or "." in app:
            writer = app.partition(".")[0]
            ignored[writer] = Ignored(
                writer,
                _time_of(delivery),
                f"A message of exchange {delivery.exchange!r} is not a contract. Remove that exchange's binding to "
                f"{CATALOG}.",
            )
            return
        encoding = _property(delivery, "content_encoding")
        newest.pop(app, None)
        newest[app] = _Stored(delivery.body, encoding if isinstance(encoding, str) else "", _time_of(delivery))

    def read_all(connection: Connection) -> None:
        newest.clear()
        ignored.clear()
        channel = connection.channel()
        channel.read_stream(CATALOG, take, seconds=LIMIT)
        channel.close()

    _with_stream(broker, "catalog", read_all)
    found = []
    for app, stored in newest.items():
        try:
            contract = _decoded(app, stored)
        except errors.CatalogError as error:
            ignored[app] = Ignored(app, stored.at, str(error))
        else:
            found += [contract] if contract is not None else []
    return catalogs.of(found, list(ignored.values()))


def _time_of(delivery: Delivery) -> float:
    """When it was published; 0 if that is unknown."""
    at = _property(delivery, "timestamp")
    return float(at) if isinstance(at, int | float) else 0.0


def _property(delivery: Delivery, name: str) -> object:
    """None if it is missing, or the properties cannot be read."""
    try:
        return codec.read_properties(delivery).get(name)
    except errors.DecodeError:
        return None


def _decoded(app: str, stored: _Stored) -> Contract | None:
    """The contract; None if it is withdrawn.

    Raises:
        errors.CatalogError: it cannot be read, or names another app.
    """
    content = _unpacked(app, stored)
    named = content.get("app")
    if named != app:
        raise errors.CatalogError(f"App {app!r} has published a contract of app {str(named)[:100]!r}, which is forged.")
    if content.get(WITHDRAWN) is True:
        return None
    return contracts.from_json(content)


def _unpacked(app: str, stored: _Stored) -> dict[str, Any]:
    body = stored.body
    try:
        if stored.encoding == ENCODING:
            unpack = zlib.decompressobj()
            body = unpack.decompress(body, MAX_BYTES + 1)
        if len(body) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES:,} bytes")
        content = json.loads(body)
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    except (ValueError, zlib.error, RecursionError) as error:
        raise errors.CatalogError(f"The contract of app {app!r} cannot be read: {error}.") from error
    return content
