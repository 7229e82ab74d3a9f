"""Dead letters: read them, retry them, throw them away. With plain AMQP, one message at a time.

Letters are taken without ack and given back by closing the connection, so that looking changes nothing, and whoever
interrupts at any moment loses nothing: what was not acked is in the queue again.

Who says what a letter is? The app wrote it, if it has no `x-death` header: only the app may publish to its internal
exchange, and its copies carry no `x-death` on. Else the broker dead-lettered it (its workers died over it): then
`x-death` says from which queue, and no `lightbus-` header of a first delivery counts, since a stranger may have written
it. Before version 4, RabbitMQ even merges its record into an `x-death` that a stranger has published (verified on
3.10.8), so the source of such a letter is a claim: `Letter.proven` is False, and no claim is retried unasked.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

import amqp.exceptions
import attrs

from lightbus import codec, errors, topology
from lightbus.app import Lightbus
from lightbus.connection import LOST, describe
from lightbus.pattern import topic_matches
from lightbus.transport import Channel, Connection, Delivery, Publication

CHUNK = 100
"""Letters that are published at once at most: an interruption between their confirms and acks repeats no more."""


@attrs.frozen
class Letter:
    """One dead letter, and why it is one."""

    id: str
    """The message's id; of one without, `~` and the first digits of its content's SHA-256."""
    event: str
    source: str
    handler: str | None
    """Which handler failed; None where none matched, or where it is for all that match."""
    queue: str
    """The queue it came from."""
    attempt: int
    """Which attempt failed last."""
    error: str
    """The error's type, without its module; the broker's reason (`delivery_limit`), where that dead-lettered it."""
    error_type: str
    error_message: str
    traceback: str
    published: datetime | None
    died: datetime | None
    by_broker: bool
    proven: bool
    """False where event and source are no more than what the publisher may have claimed."""
    delivery: Delivery
    """As it was before it died."""
    tag: int

    app: str

    @property
    def suffix(self) -> str:
        """The key on the internal exchange of the queue that it came from."""
        return topology.MAIN if self.queue == self.app else self.queue.removeprefix(f"{self.app}.")


def read_letter(app: str, delivery: Delivery, *, forgeable: bool = True) -> Letter:
    """
    Args:
        delivery: from the app's dead-letter queue.
        forgeable: the broker takes over an `x-death` header that a publisher has written.
    """
    properties = _properties(delivery)
    headers: Mapping[str, Any] = (properties or {}).get("headers") or {}
    death = _last_death(headers) if properties is not None else {}  # the app would not write what cannot be read
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
    return Letter(
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
        proven=death is None or (bool(death) and not forgeable),
        delivery=original,
        tag=delivery.delivery_tag,
        app=app,
    )


def retry_publication(letter: Letter) -> Publication:
    """A copy for the queue that the letter came from and for its handler only, to be tried as for the first time."""
    app = letter.app
    properties = codec.copy_properties(app, letter.delivery, letter.handler, 1, letter.queue)
    for name in (codec.ERROR_TYPE, codec.ERROR_MESSAGE, codec.ERROR_TRACEBACK, codec.ERROR_TIME):
        properties["headers"].pop(name, None)
    return Publication(topology.internal_name(app), letter.suffix, letter.delivery.body, properties)


def _why_broker(reason: str) -> str:
    match reason:
        case "delivery_limit":
            return "its worker died (or lost its connection) each time, until the broker's delivery limit was reached"
        case "rejected":
            return "the worker could not keep a copy of it, and let the broker dead-letter it"
        case "":
            return ""
        case _:
            return f"the broker dead-lettered it: {reason}"


def _properties(delivery: Delivery) -> dict[str, Any] | None:
    """None where they are malformed."""
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


# --- which ones -------------------------------------------------------------------------------


@attrs.frozen
class Filter:
    """Which letters are meant: those that fit everything that is given."""

    event: str | None = None
    """A topic pattern."""
    handler: str | None = None
    error: str | None = None
    """An error's type, with or without its module, or a broker's reason."""
    older: float | None = None
    """Seconds since it died, at least."""
    newer: float | None = None
    """Seconds since it died, at most."""
    ids: tuple[str, ...] = ()
    """Their beginnings will do."""

    @property
    def given(self) -> bool:
        return self != Filter()

    def fits(self, letter: Letter, now: float) -> bool:
        age = None if letter.died is None else now - letter.died.timestamp()
        return (
            (self.event is None or topic_matches(self.event, letter.event))
            and (self.handler is None or letter.handler == self.handler)
            and (self.error is None or self.error.lower() in (letter.error.lower(), letter.error_type.lower()))
            and (self.older is None or (age is not None and age >= self.older))
            and (self.newer is None or (age is not None and age <= self.newer))
            and (not self.ids or letter.id.startswith(self.ids))
        )


# --- the queue --------------------------------------------------------------------------------


class DeadQueue:
    """An app's dead-letter queue on an open connection. What is not acked is given back when it is closed."""

    def __init__(self, app: Lightbus, connection: Connection) -> None:
        self.app = app
        self.name = topology.queue_name(app.name, topology.DEAD_KEY)
        self.connection = connection
        self.channel: Channel = connection.channel()
        self.count = int(self.channel.queue_declare(self.name, passive=True)[1])
        """Letters that are there when it is opened: no more than these are looked at, so that work ends."""
        self.seen = 0
        self.on_look: Callable[[], object] = _nothing
        """Called after each letter that was looked at."""
        self._forgeable = _takes_over_deaths(connection.server_properties)
        self._next_tick = time.monotonic() + 1.0

    def letters(self) -> Iterator[Letter]:
        while self.seen < self.count:
            self.beat()
            delivery = self.channel.get(self.name)
            if delivery is None:
                return
            self.seen += 1
            self.on_look()
            yield read_letter(self.app.name, delivery, forgeable=self._forgeable)

    def ack(self, letter: Letter) -> None:
        """Take it out of the queue, for good."""
        self.channel.basic_ack(letter.tag)

    def settle_acks(self) -> None:
        """Return once the broker has taken the acks that were sent."""
        self.channel.queue_declare(self.name, passive=True)

    def beat(self) -> None:
        if time.monotonic() >= self._next_tick:
            self.connection.heartbeat_tick()
            self._next_tick = time.monotonic() + 1.0

    def wait(self, seconds: float) -> None:
        """Let time pass, and the connection live."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            with suppress(TimeoutError):
                self.connection.drain_events(min(left, 1.0))
            self.beat()


def _nothing() -> None:
    """Nobody watches."""


def _takes_over_deaths(server: Mapping[str, Any]) -> bool:
    """RabbitMQ before 4.0. The embedded broker does too, but has no users whom it could tell apart."""
    major = str(server.get("version", "")).partition(".")[0]
    return server.get("product") == "RabbitMQ" and not (major.isdigit() and int(major) >= 4)


@contextmanager
def opened(app: Lightbus) -> Generator[DeadQueue]:
    """The app's dead-letter queue.

    Raises:
        errors.TopologyMissing: there is none: no worker of the app has run on this broker.
        errors.BrokerError: the broker cannot be used, or the connection was lost in between.
    """
    connection = app.broker.connect(f"lightbus {app.name} dead")
    try:
        yield DeadQueue(app, connection)
    except amqp.exceptions.NotFound as error:
        connection.collect()
        raise errors.TopologyMissing(
            f"There is no queue {app.name}.{topology.DEAD_KEY} on {app.broker.masked}: no worker of {app.name!r} has "
            "run there. Is it the right broker? Check LIGHTBUS_URL; `lightbus doctor` shows what is there."
        ) from error
    except LOST as error:
        connection.collect()
        raise describe(error, app.broker.addresses[0]) from error
    finally:
        connection.close()  # which gives back what was not acked


# --- what is done with them -------------------------------------------------------------------


@attrs.define
class Outcome:
    """What became of the letters that were meant."""

    matched: int = 0
    done: int = 0
    """Retried, or purged."""
    unproven: int = 0
    """Left, since their source is a claim that nobody vouches for."""
    stranded: dict[str, int] = attrs.field(factory=dict)
    """Left, since the queue that they came from is not there any more: how many, by queue."""
    problem: str = ""
    """Why it ended before its time."""

    @property
    def left(self) -> int:
        return self.matched - self.done


def retry(
    queue: DeadQueue,
    wanted: Filter,
    outcome: Outcome,
    *,
    limit: int | None = None,
    rate: float | None = None,
    trust_origin: bool = False,
) -> None:
    """Publish each letter that is meant to the queue that it came from, and ack it once that is confirmed.

    An interruption leaves every letter either retried or in the queue (up to `CHUNK` of them both).

    Args:
        outcome: counted up on the way, so that an interruption leaves what is done known.
        limit: retry so many at most.
        rate: letters a second at most.
        trust_origin: also those of which nobody vouches for the source.
    """
    size = CHUNK if rate is None else max(1, min(CHUNK, int(rate)))
    began = time.monotonic()
    for chunk in _chunks(_retriable(queue, wanted, outcome, limit, trust_origin), size):
        _retry_chunk(queue, chunk, outcome)
        if outcome.problem:
            return
        if rate is not None:
            queue.wait(began + outcome.done / rate - time.monotonic())


def _retriable(
    queue: DeadQueue, wanted: Filter, outcome: Outcome, limit: int | None, trust_origin: bool
) -> Iterator[Letter]:
    now = time.time()
    taken = 0
    for letter in queue.letters():
        if limit is not None and taken >= limit:
            return
        if not wanted.fits(letter, now):
            continue
        outcome.matched += 1
        if not letter.proven and not trust_origin:
            outcome.unproven += 1
            continue
        taken += 1
        yield letter
        if limit is not None and taken >= limit:
            return


def _chunks(letters: Iterator[Letter], size: int) -> Iterator[list[Letter]]:
    chunk: list[Letter] = []
    for letter in letters:
        chunk.append(letter)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _retry_chunk(queue: DeadQueue, chunk: Sequence[Letter], outcome: Outcome) -> None:
    publisher = queue.app.publisher
    try:
        results: list[Any] = list(publisher.publish_many_sync([retry_publication(letter) for letter in chunk]))
    except errors.PublishManyError as error:
        results = error.outcomes
    for letter, result in zip(chunk, results, strict=True):
        if isinstance(result, errors.PublishError):
            outcome.problem = outcome.problem or str(result)
        elif not result.routed:
            outcome.stranded[letter.queue] = outcome.stranded.get(letter.queue, 0) + 1
        else:
            queue.ack(letter)
            outcome.done += 1
    queue.settle_acks()


def purge(
    queue: DeadQueue,
    wanted: Filter,
    outcome: Outcome,
    *,
    limit: int | None = None,
) -> None:
    """Take each letter that is meant out of the queue, for good."""
    now = time.time()
    for letter in queue.letters():
        if limit is not None and outcome.done >= limit:
            break
        if wanted.fits(letter, now):
            outcome.matched += 1
            queue.ack(letter)
            outcome.done += 1
    queue.settle_acks()
