"""Encodes events and decodes deliveries: a JSON body, AMQP properties and headers, with a fallback for each.

Only JSON is decoded, whatever the content type. No header is trusted that any client can write: the attempt, handler,
source and routing key of a copy are read only from deliveries of the app's internal exchange.
"""

from __future__ import annotations

import functools
import math
import time
import typing
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Annotated, Any, Protocol

import attrs
import msgspec
import msgspec.inspect

from lightbus import errors, pydantic_models, transport
from lightbus.event import EventType
from lightbus.message import Message, arrived, new_id, sent
from lightbus.transport import Delivery, Properties, Publication
from lightbus.wire import collisions, topology
from lightbus.wire.topology import INTERNAL

MAX_BODY_BYTES = 16 * 1024 * 1024
"""RabbitMQ 4.0's default limit (`max_message_size`); older brokers accept more."""

MAX_HEADERS_BYTES = 64 * 1024
"""Half of the frame that RabbitMQ negotiates by default (128 KiB)."""

CONTENT_TYPE = "application/json"
PERSISTENT = 2

VERSION = "lightbus-version"
CAUSATION = "lightbus-causation"
ATTEMPT = "lightbus-attempt"
HANDLER = "lightbus-handler"
SOURCE = "lightbus-source"
ROUTING_KEY = "lightbus-routing-key"
QUEUE = "lightbus-queue"
UNVERIFIED = "lightbus-unverified"
UNREADABLE_PROPERTIES = "lightbus-unreadable"
ERROR_TYPE = "lightbus-error-type"
ERROR_MESSAGE = "lightbus-error-message"
ERROR_TRACEBACK = "lightbus-error-traceback"
ERROR_TIME = "lightbus-error-time"

OF_DEAD_LETTERS = (ERROR_TYPE, ERROR_MESSAGE, ERROR_TRACEBACK, ERROR_TIME, UNVERIFIED)

DELIVERY_COUNT = "x-delivery-count"

_LATEST = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
"""The last second that a Message's time can have."""

_OWN_PREFIX = "lightbus-"

# Headers that brokers interpret or write. A copy must not have them: RabbitMQ also routes a message to the keys in CC
# and BCC, so each copy would multiply; and before 4.0.1 it drops a message whose x-death shows a cycle. These names are
# case-sensitive: `cc` is an ordinary header.
ROUTING_HEADERS = frozenset({"CC", "BCC"})
_BROKER_NAMES = ROUTING_HEADERS | {
    DELIVERY_COUNT,
    "x-acquired-count",
    "x-cc",
    "x-delay",
    "x-exchange",
    "x-received-from",
    "x-routed-by",
    "x-routing-key",
    "x-shovelled",
    "x-shovelled-by",
    "x-shovelled-timestamp",
}
_BROKER_PREFIXES = ("x-death", "x-first-death-", "x-last-death-", "x-opt-", "x-stream-")
_NOT_THE_PUBLISHERS = (_OWN_PREFIX, *_BROKER_PREFIXES)

_COPIED = ("content_type", "content_encoding", "correlation_id", "reply_to", "timestamp", "type", "app_id")
"""The properties that a copy keeps unchanged. It does not keep those that RabbitMQ acts on: `user_id` (the channel
closes if it is not the publisher's), `expiration`, and `priority` (in a retry queue, it would delay the messages behind
it)."""

_DIRECT_REPLY = "amq.rabbitmq.reply-to"
"""RabbitMQ closes the channel of a publisher that uses this without a consumer on it."""

# With the user's headers, a header frame must fit the smallest frame that brokers negotiate (8 KB).
_MAX_TRACEBACK = 4_000
_MAX_MESSAGE = 1_000
_MAX_TYPE = 200

current_run: ContextVar[Run | None] = ContextVar("lightbus_current_run", default=None)
"""What this task or thread handles: its delivery is the cause of the events that it publishes."""
current_app: ContextVar[str] = ContextVar("lightbus_current_app", default="")
"""The app whose handler runs in this task or thread; empty outside of a worker."""

UNREADABLE = (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError)
"""What decoding a body raises by itself. A validator or a `__post_init__` of the user may raise anything."""
_NOT_UNREADABLE = (errors.Reject, MemoryError)
"""What is no DecodeError though decoding raises it: a reason that the user gives, and what may succeed later."""

_NULL = (msgspec.inspect.NoneType, msgspec.inspect.AnyType, msgspec.inspect.RawType, msgspec.inspect.CustomType)

_encoder = msgspec.json.Encoder()
_coders: dict[Any, Coder] = {}


class Named(Protocol):
    """A handler, as far as this module needs to know."""

    @property
    def name(self) -> str: ...

    @property
    def queue(self) -> str: ...


Run = tuple[Delivery, "Named | None", Any]
"""What is handled: a delivery, its handler, and what else `consuming` keeps of it."""


class Coder(Protocol):
    """Encodes and decodes one type. `check` raises for the body of an event that has a value of a wrong type."""

    @property
    def encode(self) -> Callable[[Any], bytes]: ...

    @property
    def check(self) -> Callable[[bytes], Any]: ...

    @property
    def decode(self) -> Callable[[bytes], Any]: ...


@attrs.frozen
class _Coder:
    """These are msgspec's own methods, so that an event costs no further call."""

    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]
    check: Callable[[bytes], Any]


# --- bodies -----------------------------------------------------------------------------------


def encode(event_type: EventType, event: object) -> bytes:
    """The JSON body of an event. It is decoded once, to check it.

    So a value of the wrong type is an error of the publisher, where the mistake is.

    Raises:
        errors.InvalidPayload: a value does not have its field's type.
        errors.BodyTooLarge: the body has more than `MAX_BODY_BYTES`.
    """
    cls: Any = event_type.cls
    try:
        coder = _coder(cls)
        body = coder.encode(event)
        coder.check(body)
        if _takes_null(cls) and b"null" in body and pydantic_models.holds_not_finite(msgspec.to_builtins(event)):
            raise ValueError("it has a NaN or an infinity, which JSON cannot represent (it would arrive as null)")
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise errors.InvalidPayload(
            f"event {event_type.name!r} was not sent: {_sentence(error)}Set the fields of {event_type.cls.__name__} "
            "to values of their declared types."
        ) from error
    return check_size(event_type.name, body)


@functools.cache
def _takes_null(cls: type) -> bool:
    """Whether a null is valid somewhere in such an event. Checked once per class: searching each body for values that
    became null takes longer than decoding it.
    """
    if pydantic_models.is_model(cls):
        return False  # its coder checks this
    seen: set[int] = set()
    left: list[object] = [msgspec.inspect.type_info(cls)]
    while left:
        kind = left.pop()
        if isinstance(kind, tuple):
            left += kind
        elif isinstance(kind, (msgspec.inspect.Type, msgspec.inspect.Field)) and id(kind) not in seen:
            if isinstance(kind, _NULL) or (isinstance(kind, msgspec.inspect.LiteralType) and None in kind.values):
                return True
            seen.add(id(kind))  # a class may be recursive
            left += [getattr(kind, name) for name in kind.__struct_fields__]
    return False


def check_size(name: str, body: bytes) -> bytes:
    if len(body) > MAX_BODY_BYTES:
        raise errors.BodyTooLarge(
            f"event {name!r} was not sent: its body has {len(body):,} bytes, the limit is {MAX_BODY_BYTES:,}. Store "
            "the data elsewhere and publish a link to it."
        )
    return body


def decode(payload_type: Any, body: bytes) -> Any:
    """A body as the type that a handler expects.

    Raises:
        errors.DecodeError: not JSON, not of that type, or refused by a validator (whatever that raised).
    """
    if len(body) > MAX_BODY_BYTES:
        raise _over_limit(body)
    try:
        return _coder(payload_type).decode(body)
    except _NOT_UNREADABLE:
        raise
    except Exception as error:
        raise _unreadable(payload_type, error) from error


def _over_limit(body: bytes) -> errors.DecodeError:
    return errors.DecodeError(f"the body has {len(body):,} bytes, the limit is {MAX_BODY_BYTES:,}")


def _unreadable(payload_type: Any, error: Exception) -> errors.DecodeError:
    return errors.DecodeError(f"the body cannot be read as {_type_name(payload_type)}: {_explain(error)}")


def _explain(error: Exception) -> str:
    """The message of an error of decoding; with its type, where a validator has raised another one (KeyError)."""
    return pydantic_models.explain(error) if isinstance(error, UNREADABLE) else errors.summary(error)


def _sentence(error: Exception) -> str:
    """The message of an error, ready to be followed by a sentence: of several lines, that is on the next line."""
    text = pydantic_models.explain(error)
    return f"{text}\n" if "\n" in text else f"{text.removesuffix('.')}. "


def _coder(payload_type: Any) -> Coder:
    try:
        return _coders[payload_type]
    except KeyError:
        return _coders.setdefault(payload_type, _new_coder(payload_type))
    except TypeError:  # not hashable: a union whose discriminator is a pydantic.Field
        return _new_coder(payload_type)


def _new_coder(payload_type: Any) -> Coder:
    if pydantic_models.holds_model(payload_type):
        return collisions.guard_model(pydantic_models.Coder(payload_type))
    decode = collisions.guard(msgspec.json.Decoder(payload_type)).decode
    return _Coder(_encoder.encode, decode, check=decode)


def _type_name(payload_type: Any) -> str:
    name = None if typing.get_origin(payload_type) is Annotated else getattr(payload_type, "__name__", None)
    return name or pydantic_models.shown(payload_type)


def build_event(event_type: EventType, payload: Mapping[str, Any] | bytes) -> Any:
    """An event from JSON, or from loose data such as a command line's: there, strings become numbers where the class
    has numbers.

    Raises:
        errors.InvalidPayload: the data does not fit the class.
    """
    try:
        if isinstance(payload, bytes):  # directly into the class: through a float, a Decimal would lose digits
            return _coder(event_type.cls).decode(payload)
        if pydantic_models.is_model(event_type.cls):
            return _coder(event_type.cls).decode(_encoder.encode(payload))
        return msgspec.convert(payload, event_type.cls, strict=False)
    except Exception as error:
        raise errors.InvalidPayload(f"event {event_type.name!r}: {_explain(error)}") from error


# --- properties -------------------------------------------------------------------------------


def event_properties(app: str, event_type: EventType, headers: Mapping[str, Any] | None) -> Properties:
    """The AMQP properties of a new event. Its cause is the delivery that is being handled, if there is one."""
    message_id = new_id()
    table: dict[str, Any] = {VERSION: event_type.version}
    run = current_run.get()
    if run is None:
        correlation_id = message_id
    else:
        table[CAUSATION], correlation_id = read_cause(run[0])
    if headers:
        table.update(_checked_headers(event_type.name, headers))
    return {
        "content_type": CONTENT_TYPE,
        "headers": table,
        "delivery_mode": PERSISTENT,
        "correlation_id": correlation_id,
        "message_id": message_id,
        "timestamp": int(time.time()),
        "type": event_type.name,
        "app_id": app,
    }


def set_envelope(
    properties: Properties, message_id: str | None, correlation_id: str | None, published_at: datetime | None
) -> None:
    """Replace what `event_properties` has chosen by what the publisher gives.

    Raises:
        errors.InvalidOption: one of them cannot be sent.
    """
    name = properties["type"]
    if message_id is not None:
        checked = _checked_id(name, "id", message_id)
        if properties["correlation_id"] == properties["message_id"]:  # the first event of its chain
            properties["correlation_id"] = checked
        properties["message_id"] = checked
    if correlation_id is not None:
        properties["correlation_id"] = _checked_id(name, "correlation_id", correlation_id)
    if published_at is not None:
        properties["timestamp"] = _timestamp(name, published_at)


def _checked_id(name: str, option: str, value: object) -> str:
    if not isinstance(value, str):
        advice = f"it is a {type(value).__name__}. Pass a string: {option}=str(...)"
    elif not value:
        advice = "it is empty. Pass a string of 1 to 255 bytes, or leave it out"
    elif not value.isprintable():
        advice = "it has characters that cannot be printed. Remove them"
    elif len(value.encode()) > 255:
        advice = f"it has {len(value.encode()):,} bytes, the limit is 255. Pass a hash of it"
    else:
        return value
    raise errors.InvalidOption(f"event {name!r} was not sent: {option}={_shortened(value)}: {advice}.")


def _timestamp(name: str, value: object) -> int:
    owner = f"event {name!r} was not sent: time={value!r}"
    if not isinstance(value, datetime):
        raise errors.InvalidOption(f"{owner}: it is not a datetime. Pass one with a timezone: datetime.now(UTC).")
    if value.utcoffset() is None:
        raise errors.InvalidOption(
            f"{owner}: it has no timezone. Pass datetime.now(UTC), or value.replace(tzinfo=UTC) if it is in UTC."
        )
    seconds = math.floor(value.timestamp())
    if not 0 <= seconds <= _LATEST.timestamp():
        raise errors.InvalidOption(f"{owner}: use a time from 1970-01-01 to 9999-12-31 in UTC.")
    return seconds


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _checked_headers(name: str, headers: Mapping[Any, Any]) -> Mapping[str, Any]:
    for key, value in headers.items():
        if not isinstance(key, str) or len(key.encode(errors="replace")) > 255:
            raise errors.InvalidPayload(
                f"event {name!r} was not sent: the header {key!r} is not a string of up to 255 bytes."
            )
        if key.startswith((_OWN_PREFIX, "x-")):
            raise errors.InvalidPayload(
                f"event {name!r} was not sent: the header {key!r} begins with 'lightbus-' or 'x-', "
                "which belong to Lightbus and the broker. Choose another name."
            )
        if key in ROUTING_HEADERS:
            raise errors.InvalidPayload(
                f"event {name!r} was not sent: the broker would also route it to the keys in the header {key!r}. "
                "Choose another name, such as 'cc-address'."
            )
        if not _is_text(key) or (isinstance(value, str) and not _is_text(value)):
            raise errors.InvalidPayload(
                f"event {name!r} was not sent: the header {key!r} has characters that UTF-8 cannot encode (surrogates)."
            )
        if not isinstance(value, (str, int, float, bool, datetime, type(None))):
            raise errors.InvalidPayload(
                f"event {name!r} was not sent: the header {key!r} is a {type(value).__name__}. "
                "Headers take str, int, float, bool, datetime and None; put the rest into the event."
            )
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise errors.InvalidPayload(f"event {name!r} was not sent: the header {key!r} does not fit 64 bits.")
        if isinstance(value, float) and not math.isfinite(value):
            raise errors.InvalidPayload(
                f"event {name!r} was not sent: the header {key!r} is {value}, which RabbitMQ does not accept. Send a "
                "finite number, or a str."
            )
        if isinstance(value, datetime) and value.year < 1970:
            raise errors.InvalidPayload(
                f"event {name!r} was not sent: the header {key!r} is before 1970, which AMQP cannot represent. Send "
                "it as a str."
            )
    size = sum(len(key.encode()) + len(str(value).encode()) for key, value in headers.items())
    if size > MAX_HEADERS_BYTES:  # all headers are in one frame, with the error headers of a dead letter
        raise errors.InvalidPayload(
            f"event {name!r} was not sent: its headers have {size:,} bytes, the limit is {MAX_HEADERS_BYTES:,}. "
            "Put the data into the event."
        )
    return headers


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


@attrs.frozen
class Envelope:
    """What the dispatcher needs to know of a delivery before it is decoded, from trusted sources."""

    event: str
    source: str
    attempt: int
    handler: str | None
    verified: bool = True
    """False for a copy that was moved between queues by hand: all fields are then only claims of its headers. Also
    false for a message that was dead-lettered to the bus: its source is empty."""


def read_envelope(app: str, delivery: Delivery) -> Envelope:
    """The event, the app that published it, and the attempt.

    A first delivery has them in its exchange and routing key. A retried copy has them in headers. These are trusted,
    because only the app itself may publish to its internal exchange.

    Raises:
        errors.DecodeError: the properties are malformed.
    """
    internal = app + INTERNAL  # not by a function: this runs for each delivery
    if delivery.exchange and delivery.exchange != internal:
        if delivery.exchange == topology.BUS:  # no client can publish to it, but a queue can dead-letter to it
            return Envelope(delivery.routing_key, "", 1, None, verified=False)
        # A delayed event comes from `billing.delay.N`: the source is the first part of its exchange's name.
        return Envelope(delivery.routing_key, delivery.exchange.partition(".")[0], 1, None)
    properties = read_properties(delivery)
    headers = _headers(properties)
    if not delivery.exchange and ROUTING_KEY not in headers:
        return _read_first_moved(delivery, headers)
    attempt = headers.get(ATTEMPT)
    handler = headers.get(HANDLER)
    return Envelope(
        event=_name(headers.get(ROUTING_KEY)) or delivery.routing_key,
        source=_name(headers[SOURCE]) if SOURCE in headers else app,
        attempt=attempt if type(attempt) is int and 1 <= attempt < 2**31 else 1,
        handler=handler if isinstance(handler, str) and handler else None,
        verified=bool(delivery.exchange)
        and _waited_for(internal, headers)
        and UNVERIFIED not in headers
        and transport.UNREADABLE not in properties,  # the app never writes such a copy
    )


def _read_first_moved(delivery: Delivery, headers: Mapping[str, Any]) -> Envelope:
    """The envelope of a delivery from the default exchange that is not a copy: a message that the broker dead-lettered
    and that was moved by hand, or one that was published to the queue directly."""
    match headers.get("x-death"):
        case [{"exchange": str(exchange), "routing-keys": [str() | bytes() as key, *_]}, *_] if exchange:
            return Envelope(_name(key), exchange.partition(".")[0], 1, None, verified=False)
        case _:
            return Envelope(delivery.routing_key, "", 1, None)


def _waited_for(internal: str, headers: Mapping[str, Any]) -> bool:
    """Whether a delivery from the internal exchange was published to it. If not, it was put into a retry queue through
    the default exchange, and the broker dead-lettered it from there to the internal exchange."""
    deaths = headers.get("x-death")
    if not isinstance(deaths, list) or not deaths or not isinstance(deaths[0], dict):
        return deaths is None
    return bool(deaths[0].get("exchange") == internal)


def attempt_of(app: str, delivery: Delivery) -> int:
    """Which attempt of its handler this is; 1 where that cannot be read."""
    if delivery.exchange and delivery.exchange != app + INTERNAL:  # no copy: nothing needs to be decoded
        return 1
    try:
        return read_envelope(app, delivery).attempt
    except errors.DecodeError:
        return 1


def read_properties(delivery: Delivery) -> Properties:
    try:
        return delivery.properties
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
        raise errors.DecodeError(f"the AMQP properties cannot be read: {error}") from error


def read_message(app: str, delivery: Delivery) -> Message:
    """The envelope that handlers get. Every property has a fallback: any AMQP program can send a message.

    Raises:
        errors.DecodeError: the properties are malformed.
    """
    envelope = read_envelope(app, delivery)
    properties = read_properties(delivery)
    headers = _headers(properties)
    version = headers.get(VERSION)
    message_id = _text(properties.get("message_id")) or remembered_id(delivery)
    return Message(
        id=message_id,
        event=envelope.event,
        source=envelope.source,
        time=_time(properties),
        version=version if type(version) is int and version > 0 else 1,
        attempt=envelope.attempt,
        correlation_id=_text(properties.get("correlation_id")) or message_id,
        causation_id=_text(headers.get(CAUSATION)) or None,
        headers={
            key: value
            for key, value in headers.items()
            if not key.startswith(_NOT_THE_PUBLISHERS) and key not in _BROKER_NAMES
        },
        body=delivery.body,
        redelivered=delivery.redelivered,
        delay=topology.delay_of(headers),
    )


def message_of(app: str, delivery: Delivery) -> Message:
    """The same, read when the first field is asked for."""
    return arrived(read_message, app, delivery)


def message_sent(app: str, publication: Publication) -> Message:
    """The same of what was published. Its `event` is there at once."""
    return sent(_read_sent, app, publication, publication.routing_key)


def _read_sent(app: str, publication: Publication) -> Message:
    no_channel: Any = None
    properties = dict(publication.properties)
    delivery = Delivery(
        no_channel, 0, False, publication.exchange, publication.routing_key, properties, publication.body
    )
    return read_message(app, delivery)


def current_message() -> Message | None:
    """The message that is being handled here, also in the functions that a handler calls; None outside of a handler."""
    run = current_run.get()
    return None if run is None else message_of(current_app.get(), run[0])


def read_cause(delivery: Delivery) -> tuple[str, str]:
    """(message id, correlation id) for the events that the handler publishes."""
    try:
        properties = read_properties(delivery)
    except errors.DecodeError:
        properties = {}
    message_id = _text(properties.get("message_id")) or remembered_id(delivery)
    return message_id, _text(properties.get("correlation_id")) or message_id


def read_returns(delivery: Delivery) -> int:
    """How often it was returned unsettled, for example because its worker died; 0 if the broker does not count.

    Quorum queues and the embedded broker count. Classic queues do not, and keep whatever a publisher wrote there.
    """
    if not delivery.redelivered:
        return 0
    try:
        count = _headers(read_properties(delivery)).get(DELIVERY_COUNT)
    except errors.DecodeError:
        return 0
    return count if type(count) is int else 0


def copy_properties(
    app: str, delivery: Delivery, handler: str | None, attempt: int, queue: str, expiration: float | None = None
) -> Properties:
    """The properties of a copy for a retry or dead-letter queue: those of the delivery, and the app's own headers.

    Args:
        attempt: the attempt that the copy is for; in a dead letter, the one that failed last.
        queue: the name of the queue that the delivery came from.
        expiration: seconds, if less than the TTL of the retry queue.
    """
    try:
        properties = read_properties(delivery)
        envelope = read_envelope(app, delivery)
    except errors.DecodeError:  # malformed properties cannot be copied; the body and the reason can
        properties = {}
        envelope = Envelope(delivery.routing_key, delivery.exchange.partition(".")[0], 1, None)
    from_a_copy = delivery.exchange == topology.internal_name(app) or not (delivery.exchange or envelope.verified)
    headers = {
        key: value
        for key, value in _headers(properties).items()
        if key not in _BROKER_NAMES
        and not key.startswith(_BROKER_PREFIXES)
        # Other `lightbus-` headers of a first delivery are forged, or of another app.
        and (from_a_copy or not key.startswith(_OWN_PREFIX) or key in (VERSION, CAUSATION))
    }
    headers |= {
        ATTEMPT: attempt,
        SOURCE: _wire_name(envelope.source),
        ROUTING_KEY: _wire_name(envelope.event),
        QUEUE: queue if envelope.verified else _text(headers.get(QUEUE)) or queue,
    }
    if not envelope.verified:
        headers[UNVERIFIED] = True
    if handler is not None:
        headers[HANDLER] = handler
    if transport.UNREADABLE in properties:
        headers[UNREADABLE_PROPERTIES] = properties[transport.UNREADABLE]
    copied = {name: properties[name] for name in _COPIED if name in properties}
    if copied.get("reply_to") == _DIRECT_REPLY:
        del copied["reply_to"]
    if expiration is not None:
        copied["expiration"] = str(max(1, round(expiration * 1000)))
    copied["message_id"] = remembered_id(delivery)
    copied["delivery_mode"] = PERSISTENT
    copied["headers"] = headers
    return copied


def moved_by_hand(app: str, delivery: Delivery, queue: str) -> errors.UnverifiedOrigin:
    """Why a delivery that did not come through an app's exchange is dead-lettered, and its former error, if any."""
    headers = _headers(read_properties(delivery))
    if delivery.exchange == topology.BUS:
        return errors.UnverifiedOrigin(
            f"it reached {queue!r} through the bus exchange, to which no client can publish: {_last_queue(headers)} "
            "dead-lettered it there. So its source is not verified. To retry it, if you trust everyone who can "
            "publish there, use `lightbus dead retry` with --trust-origin."
        )
    before = ": ".join(filter(None, (_text(headers.get(ERROR_TYPE)), _text(headers.get(ERROR_MESSAGE)))))
    return errors.UnverifiedOrigin(
        f"it was moved to {queue!r} without an exchange, so its source is not verified. To retry dead letters, use "
        "`lightbus dead retry`; for this one, if you trust everyone who can publish there, with --trust-origin."
        + (f" It was a dead letter before, for {before}" if before else "")
    )


def _last_queue(headers: Mapping[str, Any]) -> str:
    """The queue that dead-lettered it last. The broker puts its record first, also before a forged one."""
    match headers.get("x-death"):
        case [{"queue": str() | bytes() as queue}, *_]:
            return f"the queue {_name(queue)!r}"
        case _:
            return "a queue"


def error_headers(error: BaseException, within: BaseException | None = None) -> dict[str, Any]:
    """The reason for a dead letter, as headers. `lightbus dead show` prints them.

    Args:
        within: the exception group that has it as a member, for the traceback.
    """
    return {
        ERROR_TYPE: _clipped(errors.type_name(error), _MAX_TYPE),
        ERROR_MESSAGE: _clipped(errors.message_of(error), _MAX_MESSAGE),
        ERROR_TRACEBACK: _clipped(_traceback(error if within is None else within), _MAX_TRACEBACK, keep_end=True),
        ERROR_TIME: datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _traceback(error: BaseException) -> str:
    """As Python prints it. Of a Lightbus error only the application's frames, and nothing if there are none: the other
    frames add nothing to its message.
    """
    if not errors.has_traceback(error):
        return ""
    if errors.is_a(error, errors.LightbusError):
        return errors.format_traceback(error, hidden=errors.is_machinery, only_with_frames=True)
    return errors.format_traceback(error)


def _clipped(text: str, limit: int, *, keep_end: bool = False) -> str:
    """At most `limit` bytes of the text, and `...` if some are left out."""
    encoded = text.encode("utf-8", "backslashreplace")
    if len(encoded) <= limit:
        return encoded.decode()
    if keep_end:
        return "... " + encoded[-limit:].decode("utf-8", "ignore")
    return encoded[:limit].decode("utf-8", "ignore") + " ..."


def _headers(properties: Properties) -> dict[str, Any]:
    headers = properties.get("headers")
    return headers if isinstance(headers, dict) else {}


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _wire_name(name: str) -> str | bytes:
    """An exchange's name or a routing key as a header. Other programs may use bytes that are not UTF-8 (see
    `transport.amqp.wire.decode_names`). A string header cannot have those, so they are sent as bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return name.encode(errors="surrogateescape")
    return name


def _name(value: object) -> str:
    return value.decode(errors="surrogateescape") if isinstance(value, bytes) else _text(value)


def _time(properties: Properties) -> datetime:
    """When it was published. A message without a valid time (of another program) gets one, which its delivery keeps."""
    try:
        return datetime.fromtimestamp(properties["timestamp"], UTC)
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        properties["timestamp"] = now = int(time.time())
        return datetime.fromtimestamp(now, UTC)


def remembered_id(delivery: Delivery) -> str:
    """The id of a message. One without an id (of another program) gets one, which its delivery keeps."""
    try:
        properties = delivery.properties
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
        return new_id()
    if not isinstance(properties.get("message_id"), str) or not properties["message_id"]:
        properties["message_id"] = new_id()
    return str(properties["message_id"])


def payload_reader(payload_type: Any) -> Callable[[Delivery], Any]:
    """`decode` for one type, resolved once: that saves two calls per event, which are 4 % of its CPU time."""
    decode_body = _coder(payload_type).decode

    def read(delivery: Delivery) -> Any:
        body = delivery.body
        if len(body) > MAX_BODY_BYTES:
            raise _over_limit(body)
        try:
            return decode_body(body)
        except _NOT_UNREADABLE:
            raise
        except Exception as error:
            raise _unreadable(payload_type, error) from error

    return read
