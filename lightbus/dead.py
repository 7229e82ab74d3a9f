"""Dead letters: read them, retry them, throw them away. With plain AMQP.

Letters are taken without ack and given back, so that looking changes nothing. Whoever interrupts at any moment loses
nothing: the end of the connection gives back what was not acked, too (though RabbitMQ keeps no order then).

The broker sends them ahead, `WINDOW` at a time: a round trip for each (`basic.get`) made it minutes for a long queue.
A consumer that holds its prefetch is cancelled, which leaves it what it holds, and another one begins. So each letter
is taken once, and comes back once: the 1,000,000 returns that the queue allows are as many looks.

Who says what a letter is? The app wrote it, if it has no `x-death` header: only the app may publish to its internal
exchange, and its copies carry no `x-death` on. Else the broker dead-lettered it (its workers died over it): then
`x-death` says from which queue, and no `lightbus-` header of a first delivery counts, since a stranger may have written
it. Before version 4, RabbitMQ even merges its record into an `x-death` that a stranger has published (verified on
3.10.8), so the source of such a letter is a claim: `Letter.proven` is False, and no claim is retried unasked.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

import amqp.exceptions
import attrs

from lightbus import codec, errors, topology, transport
from lightbus.app import Lightbus
from lightbus.connection import LOST, address_of, describe
from lightbus.pattern import topic_matches
from lightbus.transport import Channel, Connection, Delivery, Publication

FIRST_WINDOW = 50
"""Letters that the broker may send ahead at first: as many as `lightbus dead list` shows. Each next window is twice as
large, up to WINDOW."""
WINDOW = 500
"""Letters that the broker may send ahead at most, and so the most that are in memory at once."""
SECONDS_AHEAD = 60.0
"""What is retried at a rate in so many seconds may be sent ahead: RabbitMQ ends what keeps a letter for 30 minutes."""
WINDOW_BYTES = 32 * 1024 * 1024
"""Bytes of letters that may be sent ahead, as far as the mean of those before tells."""
QUIET = 0.1
"""Seconds without a letter after which the broker is asked whether there are any left."""
PATIENCE = 2.0
"""Seconds without a letter, though there are some, after which they are fetched one by one."""
IN_ORDER = 32
"""Letters that are given back in one return: of more, RabbitMQ (3.10.8) does not keep the order."""
GROUPS = 16
"""Returns before they are waited for: with more than 32 (`quorum_commands_soft_limit`) on their way, RabbitMQ makes one
of them."""
FEW = 5000
"""Letters that are all taken once, so that they keep their order, also where only some of them are looked at."""
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
        return self.queue.removeprefix(f"{self.app}.")

    @property
    def digest(self) -> bytes:
        """Tells this letter from others, also from those of the same event: the next one that its retry may end as."""
        died = self.handler, self.queue, self.attempt, self.error_type, self.error_message, self.died
        what = repr((self.id, self.source, self.event, *died)).encode(errors="surrogatepass")
        return hashlib.blake2b(what + b"\0" + self.delivery.body, digest_size=16).digest()


def read_letter(app: str, delivery: Delivery, *, forgeable: bool = True) -> Letter:
    """
    Args:
        delivery: from the app's dead-letter queue.
        forgeable: the broker takes over an `x-death` header that a publisher has written.
    """
    properties = _properties(delivery)
    headers: Mapping[str, Any] = (properties or {}).get("headers") or {}
    death = _last_death(headers)
    if death is None and (properties is None or transport.UNREADABLE in properties):
        death = {}  # the app would not write what cannot be read
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
        proven=envelope.verified and (death is None or (bool(death) and not forgeable)),
        delivery=original,
        tag=delivery.delivery_tag,
        app=app,
    )


def retry_publication(letter: Letter) -> Publication:
    """A copy for the queue that the letter came from and for its handler only, to be tried as for the first time."""
    app = letter.app
    properties = codec.copy_properties(app, letter.delivery, letter.handler, 1, letter.queue)
    for name in codec.OF_DEAD_LETTERS:
        properties["headers"].pop(name, None)
    return Publication(topology.internal_name(app), letter.suffix, letter.delivery.body, properties)


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
    """An app's dead-letter queue on an open connection. What is not acked is given back at the end."""

    def __init__(self, app: Lightbus, connection: Connection) -> None:
        self.app = app
        self.name = topology.queue_name(app.name, topology.DEAD_KEY)
        self.connection = connection
        self.channel: Channel = connection.channel()
        self.count = self.ready()
        """Letters that are there when it is opened: no more than these are looked at, so that work ends."""
        self.seen = 0
        self.most_ahead = WINDOW
        """Letters that the broker may send ahead at most."""
        self.on_look: Callable[[], object] = _nothing
        """Called after each letter that was looked at."""
        self._forgeable = _takes_over_deaths(connection.server_properties)
        self._next_tick = time.monotonic() + 1.0
        self._arrived: deque[Delivery] = deque()
        self._hand = _Hand()
        self._consumer: str | None = None
        self._numbers = itertools.count(1)
        self._window = FIRST_WINDOW // 2
        self._reads_ahead = True
        self._over = False

    def letters(self) -> Iterator[Letter]:
        while self.seen < self.count:
            self.beat()
            delivery = self._next()
            if delivery is None:
                return
            self.seen += 1
            self.on_look()
            yield read_letter(self.app.name, delivery, forgeable=self._forgeable)

    def _next(self) -> Delivery | None:
        """The next letter; None where the queue is empty."""
        while not self._arrived:
            if self._receive():
                continue
            self._unsubscribe()
            if self._reads_ahead:
                self._subscribe()
            elif not self._arrived:  # by the cancellation
                return self._get()
        return self._arrived.popleft()

    def _get(self) -> Delivery | None:
        delivery = self.channel.get(self.name)
        if delivery is not None:
            self._hand.take(delivery)
            self._hand.close()
        return delivery

    def _subscribe(self) -> None:
        # No more than are left to look at: then each window is filled, and no letter is on its way when it ends.
        most = min(self.most_ahead, max(1, int(WINDOW_BYTES / self._hand.mean_size)), self.count - self._hand.taken)
        self._window = min(2 * self._window, most)
        self.channel.basic_qos(0, self._window, False)
        self._consumer = tag = f"dead.{next(self._numbers)}"  # known before, in case that Ctrl-C comes meanwhile
        self.channel.consume(self.name, self._arrive, on_cancel=self._cancelled, consumer_tag=tag)

    def _receive(self) -> bool:
        """Wait for letters that the consumer is still to be sent; False where there are none."""
        before, since = self._hand.present, time.monotonic()
        while self._consumer is not None and before < self._window:
            try:
                self.connection.drain_events(QUIET)
            except TimeoutError:
                # Others may have taken what was there, or the consumer is deaf. What has been sent and is not here yet
                # comes with the cancellation, or is back in the queue: the last word is a `basic.get`'s.
                if not self.ready() or time.monotonic() - since > PATIENCE:
                    self._reads_ahead = False
                    break
            self.beat()
            if self._hand.present > before:
                return True
        return False

    def _complete(self) -> None:
        """Let the consumer be sent its whole window, then cancel it. An ack would let the broker send it more, and
        what is on its way to a consumer that is cancelled comes back behind those that are behind it."""
        while self._receive():
            pass
        self._unsubscribe()

    def _unsubscribe(self) -> None:
        if self._consumer is not None:
            self.channel.basic_cancel(self._consumer)
            self._consumer = None
            self._hand.close()

    def _arrive(self, delivery: Delivery) -> None:
        self._hand.take(delivery)
        if not self._over:
            self._arrived.append(delivery)

    def _cancelled(self, _: str) -> None:
        """By the broker: the queue is gone, or its leader. A `basic.get` tells."""
        self._consumer, self._reads_ahead = None, False
        self._hand.close()

    def ready(self) -> int:
        return int(self.channel.queue_declare(self.name, passive=True)[1])

    def ack(self, letters: Sequence[Letter]) -> None:
        """Take them out of the queue, for good, and return once they are."""
        self._complete()
        for number, (tag, multiple) in enumerate(self._hand.drop([letter.tag for letter in letters]), 1):
            self.channel.basic_ack(tag, multiple)
            if number % GROUPS == 0:
                self._catch_up()
        self._catch_up()

    def _catch_up(self) -> None:
        """Return once the broker has done what it was told, as it has before it answers a `basic.get`. (RabbitMQ holds
        acks back where many are on their way, and forgets those where the connection ends.)"""
        delivery = self._get()
        if delivery is not None:
            self._arrived.append(delivery)

    def give_back(self) -> None:
        """Return all that was not acked to the queue, in its order; return once it is there, for who looks next."""
        self._over = True
        self._arrived.clear()
        self._complete()
        while self._reads_ahead and self._may_take_the_rest():
            self._subscribe()
            self._complete()
        given, patient = 0, True
        for number, (tag, count) in enumerate(self._hand.groups(), 1):
            self.channel.basic_nack(tag, multiple=True, requeue=True)
            given += count
            if number % GROUPS == 0:
                patient = patient and self._are_back(given)
        if patient and given:
            self._are_back(given)

    def _may_take_the_rest(self) -> bool:
        """RabbitMQ puts what comes back before what never left, and behind what came back before: so that a look at
        some does not move them behind others, all are taken, where they are few."""
        rest = self.count - self._hand.taken
        return self._hand.any and 0 < rest <= FEW and rest * self._hand.mean_size <= WINDOW_BYTES

    def _are_back(self, count: int) -> bool:
        """Wait until so many are there; False where they are not soon, as others may take them at once."""
        deadline = time.monotonic() + PATIENCE
        while self.ready() < count:
            if time.monotonic() > deadline:
                return False
            self.wait(0.005)
        return True

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


class _Hand:
    """Which deliveries are neither acked nor given back: a byte for each, since there may be a million."""

    def __init__(self) -> None:
        self.present = 0
        """How many the present consumer was sent."""
        self._held = bytearray()  # by delivery tag, from 1
        self._ends: list[int] = []  # the last tag of each consumer
        self._bytes = 0

    @property
    def taken(self) -> int:
        return len(self._held)

    @property
    def mean_size(self) -> float:
        """Bytes of a body, 1 at least."""
        return max(1.0, self._bytes / max(1, self.taken))

    @property
    def any(self) -> bool:
        return 1 in self._held

    def take(self, delivery: Delivery) -> None:
        self._held.extend(bytes(delivery.delivery_tag - self.taken))  # Ctrl-C may have swallowed one
        self._held[-1] = 1
        self._bytes += len(delivery.body)
        self.present += 1

    def drop(self, tags: Sequence[int]) -> Iterator[tuple[int, bool]]:
        """Hold these no more. What to ack for that, and whether it stands for all before it."""
        for tag in tags:
            self._held[tag - 1] = 0
        kept = self._held.find(1) + 1  # 0: none is
        first = [tag for tag in tags if not kept or tag < kept]
        if first:
            yield max(first), True
        yield from ((tag, False) for tag in tags if kept and tag > kept)

    def close(self) -> None:
        """What comes from now on is another consumer's."""
        self._ends.append(len(self._held))
        self.present = 0

    def groups(self) -> Iterator[tuple[int, int]]:
        """What is held, in its order: the last tag of some that one consumer holds, and how many they are."""
        first = 0
        for end in self._ends:
            tags = [tag for tag, held in enumerate(self._held[first:end], first + 1) if held]
            for start in range(0, len(tags), IN_ORDER):
                group = tags[start : start + IN_ORDER]
                yield group[-1], len(group)
            first = end


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
        queue = DeadQueue(app, connection)
        try:
            yield queue
        finally:
            with suppress(*LOST):  # then the broker gives them back
                queue.give_back()
    except amqp.exceptions.NotFound as error:
        connection.collect()
        raise errors.TopologyMissing(
            f"There is no queue {app.name}.{topology.DEAD_KEY} on {app.broker.masked}: no worker of {app.name!r} has "
            "run there. Is it the right broker? Check LIGHTBUS_URL; `lightbus doctor` shows what exists there."
        ) from error
    except LOST as error:
        connection.collect()
        raise describe(error, address_of(connection, app.broker)) from error
    finally:
        connection.close()


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
    gone: dict[str, int] = attrs.field(factory=dict)
    """Of those done, the ones for a handler that the app, as it is here, does not have: how many, by handler."""
    vanished: int = 0
    """Were meant, and are not there any more."""
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
    if rate is not None:
        queue.most_ahead = max(1, min(WINDOW, int(SECONDS_AHEAD * rate)))
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
    published: list[Letter] = []
    for letter, result in zip(chunk, results, strict=True):
        if isinstance(result, errors.PublishError):
            outcome.problem = outcome.problem or str(result)
        elif not result.routed:
            outcome.stranded[letter.queue] = outcome.stranded.get(letter.queue, 0) + 1
        else:
            published.append(letter)
            outcome.done += 1
            if letter.handler is not None and letter.handler not in queue.app.handlers:
                outcome.gone[letter.handler] = outcome.gone.get(letter.handler, 0) + 1
    queue.ack(published)


def purge(
    queue: DeadQueue,
    wanted: Filter,
    outcome: Outcome,
    *,
    limit: int | None = None,
    only: Collection[bytes] | None = None,
) -> None:
    """Take each letter that is meant out of the queue, for good.

    Args:
        limit: so many at most.
        only: the digests of those that may be meant.
    """
    now = time.time()
    fitting = (letter for letter in queue.letters() if wanted.fits(letter, now))
    meant = itertools.islice((letter for letter in fitting if only is None or letter.digest in only), limit)
    for chunk in _chunks(meant, CHUNK):
        outcome.matched += len(chunk)
        queue.ack(chunk)
        outcome.done += len(chunk)
