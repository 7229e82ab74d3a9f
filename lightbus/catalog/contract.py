"""An app's contract: the events that it publishes, and what its handlers subscribe to and read."""

from __future__ import annotations

import inspect
import math
import time
from typing import Any

import attrs
import msgspec

from lightbus import errors
from lightbus.app import Lightbus
from lightbus.catalog import schemas, validity
from lightbus.catalog.schemas import Schema
from lightbus.handler import Handler
from lightbus.version import __version__
from lightbus.wire.topology import check_app_name, queue_name


@attrs.frozen
class PublishedEvent:
    """One `@app.event`."""

    name: str
    version: int
    doc: str
    """The docstring of its class, or ""."""
    schema: Schema
    """A complete JSON Schema of its body."""

    @property
    def fields(self) -> list[str]:
        """The names of its fields in the body."""
        return schemas.fields(self.schema) or []


@attrs.frozen
class Listener:
    """One `@app.on`."""

    handler: str
    patterns: list[str]
    source: str | None
    """The only app whose events it takes; None for any."""
    queue: str
    """The whole name: `billing.main`."""
    doc: str
    schema: Schema | None
    """What it accepts as a body; None if it takes no payload."""

    @property
    def fields(self) -> list[str] | None:
        """The fields that it reads, as its payload class names them; None if it takes the whole body (dict)."""
        return [] if self.schema is None else schemas.fields(self.schema)


@attrs.frozen
class Contract:
    """What one app publishes and subscribes to."""

    app: str
    release: str
    """The deployed release as the app's team names it (LIGHTBUS_RELEASE); "" if unknown."""
    at: float
    """When it was published or, in a snapshot, when it was written; seconds since 1970."""
    lightbus: str
    """The version of Lightbus that wrote it."""
    events: list[PublishedEvent]
    """By name."""
    handlers: list[Listener]


def contract_of(app: Lightbus, release: str = "") -> Contract:
    """The contract of an app whose handlers are loaded (`app.load()`)."""
    return Contract(
        app=app.name,
        release=release,
        at=time.time(),
        lightbus=__version__,
        events=[
            PublishedEvent(name, one.version, doc_of(one.cls) or "", schemas.schema_of(app.name, one, exact=True))
            for name, one in sorted(app.events.items())
        ],
        handlers=[_listener(app, one) for one in app.handlers.values()],
    )


def _listener(app: Lightbus, handler: Handler) -> Listener:
    return Listener(
        handler=handler.name,
        patterns=list(handler.patterns),
        source=handler.source,
        queue=queue_name(app.name, handler.queue),
        doc=doc_of(handler.function) or "",
        schema=None if handler.payload is None else schemas.schema_read(handler.payload),
    )


def doc_of(thing: Any) -> str | None:
    """The docstring of a class or function. Not that of a base class, and not the signature that `dataclass` sets."""
    doc = vars(thing).get("__doc__") if isinstance(thing, type) else getattr(thing, "__doc__", None)
    if not isinstance(doc, str) or (isinstance(thing, type) and doc.startswith(f"{thing.__name__}(")):
        return None
    return inspect.cleandoc(doc) or None


def to_json(contract: Contract) -> dict[str, Any]:
    """The contract as a JSON object."""
    found: dict[str, Any] = msgspec.to_builtins(contract)
    return found


def from_json(written: object) -> Contract:
    """Read it. Unknown fields are ignored: a newer version of Lightbus may have written it.

    Raises:
        errors.CatalogError: it is no contract; the message names the part.
    """
    try:
        contract = msgspec.convert(written, Contract)
        check_app_name(contract.app)
        _check(contract)
    except (ValueError, RecursionError, errors.InvalidName) as error:
        raise errors.CatalogError(
            f"This is not a contract that Lightbus {__version__} can read: {error}. Compare it with the output of: "
            "lightbus contract show"
        ) from error
    return contract


def _check(contract: Contract) -> None:
    """
    Raises:
        ValueError: commands could not read a part of it.
    """
    if not math.isfinite(contract.at):
        raise ValueError(f"its time is {contract.at}")
    for event in contract.events:
        validity.check_name(event.name)
        _check_schema(event.schema, f"event {event.name!r}")
    for listener in contract.handlers:
        for pattern in listener.patterns:
            validity.check_name(pattern)
        if listener.schema is not None:
            _check_schema(listener.schema, f"handler {listener.handler[:100]!r}")


def _check_schema(schema: Schema, owner: str) -> None:
    try:
        validity.check_schema(schema)
    except ValueError as error:
        raise ValueError(f"{owner}: its JSON Schema: {error}") from error
