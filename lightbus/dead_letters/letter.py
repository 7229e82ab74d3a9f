"""One dead letter, read from its message; and the filter that selects dead letters."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import attrs

from lightbus import errors, transport
from lightbus.pattern import topic_matches
from lightbus.transport import Delivery, Publication
from lightbus.wire import codec, topology


@attrs.frozen
class DeadLetter:
    """One dead letter, and why it is in the queue."""

    id: str
    """The message's id. Without one: `~` and the first 12 digits of the SHA-256 of its routing key and body."""
    event: str
    source: str
    handler: str | None
    """The handler that failed. None if no handler matched, or if a retry is for all that match."""
    queue: str
    """The queue that it came from."""
    attempt: int
    """The number of the last failed attempt."""
    error: str
    """The error's type without its module, or the broker's reason (`delivery_limit`) if the broker dead-lettered it."""
    error_type: str
    error_message: str
    traceback: str
    published: datetime | None
    died: datetime | None
    by_broker: bool
    proven: bool
    """False if the publisher may have forged the event name and the source."""
    delivery: Delivery
    """As it was delivered to the handler."""
    tag: int

    app: str

    @property
    def suffix(self) -> str:
        """The key on the internal exchange of the queue that it came from. "", which no queue has, if it claims to come
        from the catalogue: a retry would publish its body as the app's contract."""
        suffix = self.queue.removeprefix(f"{self.app}.")
        return "" if suffix == topology.CONTRACT_KEY else suffix

    @property
    def digest(self) -> bytes:
        """Identifies this dead letter. The next one of the same event, after a failed retry, has a different digest."""
        died = self.handler, self.queue, self.attempt, self.error_type, self.error_message, self.died
        what = repr((self.id, self.source, self.event, *died)).encode(errors="surrogatepass")
        return hashlib.blake2b(what + b"\0" + self.delivery.body, digest_size=16).digest()


def read_dead_letter(app: str, delivery: Delivery, *, forgeable: bool = True) -> DeadLetter:
    """
    Args:
        delivery: from the app's dead-letter queue.
        forgeable: the broker keeps an `x-death` header that a publisher has written.
    """
    properties = _properties(delivery)
    headers: Mapping[str, Any] = (properties or {}).get("headers") or {}
    death = _last_death(headers)
    if death is None and (properties is None or transport.UNREADABLE in properties):
        death = {}  # the app writes readable properties, so this is not its copy
    exchange, key = delivery.exchange, delivery.routing_key
    if death is not None and death.get("exchange") != topology.internal_name(app):
        keys = death.get("routing-keys")
        exchange, key = _text(death.get("exchange")), _text(keys[0] if isinstance(keys, list) and keys else "")
    properties = properties or {}
    original = Delivery(
        delivery.channel,
        delivery.delivery_tag,
        delivery.redelivered,
        exchange,
        key,
        properties,
        delivery.body,
    )
    envelope = codec.read_envelope(app, original)
    own = headers if death is None else {}
    reason = _text(death.get("reason")) if death is not None else ""
    error_type = _text(own.get(codec.ERROR_TYPE))
    return DeadLetter(
        id=_text(properties.get("message_id")) or _content_id(delivery),
        event=envelope.event,
        source=envelope.source,
        handler=envelope.handler,
        queue=(_text(death.get("queue")) if death is not None else _text(own.get(codec.QUEUE))) or app,
        attempt=envelope.attempt,
        error=error_type.rpartition(".")[2] or reason or "unknown",
        error_type=error_type or reason or "unknown",
        error_message=_text(own.get(codec.ERROR_MESSAGE)) or _why_broker(reason),
        traceback=_text(own.get(codec.ERROR_TRACEBACK)),
        published=_moment(properties.get("timestamp")),
        died=_moment(own.get(codec.ERROR_TIME)) if death is None else _moment(death.get("time")),
        by_broker=death is not None,
        proven=envelope.verified and (death is None or (bool(death) and not forgeable)),
        delivery=original,
        tag=delivery.delivery_tag,
        app=app,
    )


def retry_publication(dead_letter: DeadLetter) -> Publication:
    """A copy for the queue that the dead letter came from, only for its handler, as attempt 1."""
    app = dead_letter.app
    properties = codec.copy_properties(app, dead_letter.delivery, dead_letter.handler, 1, dead_letter.queue)
    for name in codec.OF_DEAD_LETTERS:
        properties["headers"].pop(name, None)
    return Publication(topology.internal_name(app), dead_letter.suffix, dead_letter.delivery.body, properties)


def _why_broker(reason: str) -> str:
    match reason:
        case "delivery_limit":
            return (
                "its worker crashed (or lost its connection) each time, until the broker's delivery limit was reached"
            )
        case "rejected":
            return "the worker could not publish a copy of it, and let the broker dead-letter it"
        case "":
            return ""
        case _:
            return f"the broker dead-lettered it: {reason}"


def _properties(delivery: Delivery) -> dict[str, Any] | None:
    """None if they are malformed."""
    try:
        return dict(codec.read_properties(delivery))
    except errors.DecodeError:
        return None


def _last_death(headers: Mapping[str, Any]) -> Mapping[str, Any] | None:
    if "x-death" not in headers:
        return None
    deaths = headers["x-death"]
    first = deaths[0] if isinstance(deaths, list) and deaths else {}
    return first if isinstance(first, dict) else {}


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode(errors="surrogateescape")
    return value if isinstance(value, str) else ""


def _moment(value: object) -> datetime | None:
    with suppress(ValueError, OverflowError, OSError):
        match value:
            case datetime():
                return value.astimezone(UTC) if value.tzinfo is not None else value.replace(tzinfo=UTC)
            case bool():
                return None
            case int() | float():
                return datetime.fromtimestamp(value, UTC)
            case str():
                return _moment(datetime.fromisoformat(value))
            case _:
                return None
    return None


def _content_id(delivery: Delivery) -> str:
    return "~" + hashlib.sha256(delivery.routing_key.encode(errors="replace") + b"\0" + delivery.body).hexdigest()[:12]


@attrs.frozen
class Filter:
    """Selects the dead letters that match every given field."""

    event: str | None = None
    """A topic pattern."""
    handler: str | None = None
    error: str | None = None
    """An error's type, with or without its module, or the broker's reason."""
    older: float | None = None
    """Dead for at least so many seconds."""
    newer: float | None = None
    """Dead for at most so many seconds."""
    ids: tuple[str, ...] = ()
    """IDs, or prefixes of them."""

    @property
    def given(self) -> bool:
        return self != Filter()

    def matches(self, dead_letter: DeadLetter, now: float) -> bool:
        names = dead_letter.error.lower(), dead_letter.error_type.lower()
        age = None if dead_letter.died is None else now - dead_letter.died.timestamp()
        return (
            (self.event is None or topic_matches(self.event, dead_letter.event))
            and (self.handler is None or dead_letter.handler == self.handler)
            and (self.error is None or self.error.lower() in names)
            and (self.older is None or (age is not None and age >= self.older))
            and (self.newer is None or (age is not None and age <= self.newer))
            and (not self.ids or dead_letter.id.startswith(self.ids))
        )
