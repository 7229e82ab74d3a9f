"""The exchanges, queues and bindings of an app, as pure values. `connection.declare` declares them.

Every name contains the arguments that may change (a delay). So a changed option never causes 406 PRECONDITION_FAILED.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable
from typing import Any, Literal

import attrs

from lightbus import errors, options
from lightbus.event import MAX_NAME_BYTES
from lightbus.transport import Publication

BUS = "lightbus"
MAIN = "main"
INTERNAL = ".internal"
"""The end of the name of an app's internal exchange: see `internal_name`."""
QueueType = Literal["quorum", "classic"]

DELAY_LEVELS = 22
"""Levels 0 to 21: sums of 2^0 to 2^21 seconds reach 48 days."""

_NAME = re.compile(r"[a-z][a-z0-9_-]*")
_PATTERN = re.compile(r"([A-Za-z0-9_-]+|\*|#)(\.([A-Za-z0-9_-]+|\*|#))*")
_TAKEN = {
    BUS: "is the name of the bus exchange itself",
    "amq": "would start its queues' names with 'amq.', which RabbitMQ reserves",
}
_RESERVED = frozenset({MAIN, "dead", "retry", "delay", "internal", "contract"})


@attrs.frozen
class Exchange:
    """A durable exchange."""

    name: str
    type: str
    internal: bool = False
    """It takes messages only from other exchanges: clients cannot publish to it."""
    arguments: dict[str, Any] = attrs.field(factory=dict)


@attrs.frozen
class Queue:
    """A durable queue."""

    name: str
    arguments: dict[str, Any] = attrs.field(factory=dict)


@attrs.frozen
class Binding:
    """From an exchange to an exchange or a queue."""

    source: str
    destination: str
    key: str
    to_queue: bool = False
    arguments: dict[str, Any] | None = None


@attrs.frozen
class Topology:
    """What to declare, in this order: shared exchanges, exchanges, queues, bindings."""

    shared: tuple[Exchange, ...] = ()
    """Exchanges of other apps. They are first declared passively: a restricted user may not declare them."""
    exchanges: tuple[Exchange, ...] = ()
    queues: tuple[Queue, ...] = ()
    bindings: tuple[Binding, ...] = ()


@attrs.frozen
class ConsumedQueue:
    """One queue that an app consumes: its main queue, or a separate one (`queue="slow"`)."""

    app: str
    suffix: str
    patterns: tuple[tuple[str, str], ...]
    """(exchange, pattern), without duplicates."""
    delays: tuple[float, ...]
    """The distinct retry delays of its handlers, in seconds."""

    @property
    def name(self) -> str:
        return queue_name(self.app, self.suffix)


# --- names ------------------------------------------------------------------------------------


def check_app_name(name: object) -> str:
    """
    Raises:
        errors.InvalidName: not a lower-case word. It names the app's exchange, and begins the names of its queues.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise errors.InvalidName(
            f"app name {name!r}: use a lower-case letter, then letters, digits, '_' and '-' (no dots), as in "
            f"{_near_name(name)!r}. It is the name of the app's exchange, and the prefix of its queues' names."
        )
    if name in _TAKEN or len(name) > 100:
        raise errors.InvalidName(
            f"app name {name[:40]!r} {_TAKEN.get(name, 'is longer than 100 characters')}. Choose another one."
        )
    return name


def _near_name(name: object) -> str:
    """The most similar valid app name: 'Billing Service' -> 'billing-service'."""
    words = re.findall(r"[a-z0-9_]+", name.lower()) if isinstance(name, str) and name.isascii() else []
    near = "-".join(words).lstrip("0123456789_-")
    return near if near and near not in _TAKEN and len(near) <= 100 else "billing"


def check_queue_suffix(suffix: object, owner: str) -> str:
    """
    Raises:
        errors.InvalidName: not a word, or reserved by Lightbus.
    """
    if not isinstance(suffix, str) or not _NAME.fullmatch(suffix) or len(suffix) > 100:
        raise errors.InvalidName(
            f"{owner}: queue={suffix!r}: use a lower-case letter, then letters, digits, '_' and '-', as in 'slow'."
        )
    if suffix in _RESERVED:
        raise errors.InvalidName(
            f"{owner}: queue={suffix!r} is reserved by Lightbus ({', '.join(sorted(_RESERVED))}). Choose another name."
        )
    return suffix


def check_pattern(pattern: object, owner: str) -> str:
    """
    Raises:
        errors.InvalidName: not an AMQP topic pattern.
    """
    if not isinstance(pattern, str) or not _PATTERN.fullmatch(pattern) or len(pattern.encode()) > MAX_NAME_BYTES:
        raise errors.InvalidName(
            f"{owner}: {pattern!r} is not a topic pattern. Use words joined by dots, where '*' matches one word and "
            "'#' any number of words, as in 'user.registered', 'user.*' or '#'."
        )
    return pattern


def queue_name(app: str, suffix: str) -> str:
    # Never the app's name alone: permissions are by name. A user who may read the exchange `billing` (for `source=`)
    # could also read a queue `billing`.
    return f"{app}.{suffix}"


def internal_name(app: str) -> str:
    """The exchange of an app's retries and dead letters. Only the app may publish to it."""
    return app + INTERNAL


def retry_key(suffix: str, delay: float) -> str:
    """The routing key of a retry queue on the internal exchange: its name without the app's name."""
    step = _seconds(delay)
    return f"retry.{step}" if suffix == MAIN else f"{suffix}.retry.{step}"


def _seconds(delay: float) -> str:
    milliseconds = round(delay * 1000)
    return f"{milliseconds // 1000}s" if milliseconds % 1000 == 0 else f"{milliseconds}ms"


DEAD_KEY = "dead"

CATALOG = f"{BUS}.catalog"
"""The stream of all apps' contracts. No app has a queue of this name, since no app is named as the bus."""
CONTRACT_KEY = "contract"
"""The routing key of contracts on an app's internal exchange."""


# --- what an app declares ---------------------------------------------------------------------


def bus_exchange() -> Exchange:
    return Exchange(BUS, "topic", internal=True)


def app_exchange(app: str) -> Exchange:
    return _exchange(app, "topic")


def _exchange(name: str, kind: str, arguments: dict[str, Any] | None = None) -> Exchange:
    return Exchange(name, kind, arguments=arguments or {})


def publishing(app: str) -> Topology:
    """What an app needs to publish: its exchange, bound to the bus."""
    return Topology(
        shared=(bus_exchange(),),
        exchanges=(app_exchange(app),),
        bindings=(Binding(app, BUS, "#"),),
    )


def consuming(app: str, queues: Iterable[ConsumedQueue], queue_type: QueueType) -> Topology:
    """The whole topology of an app: what it needs to publish, its queues, retry queues and dead-letter queue."""
    queues = tuple(queues)
    internal = internal_name(app)
    base = publishing(app)
    declared = [
        _queue(queue_name(app, DEAD_KEY), queue_type, {"x-overflow": "reject-publish"}, delivery_limit=1_000_000)
    ]
    bindings = [*base.bindings, Binding(internal, queue_name(app, DEAD_KEY), DEAD_KEY, to_queue=True)]
    for queue in queues:
        declared.append(_queue(queue.name, queue_type, dead_lettering(internal, DEAD_KEY), delivery_limit=20))
        bindings.append(Binding(internal, queue.name, queue.suffix, to_queue=True))
        for delay in queue.delays:
            key = retry_key(queue.suffix, delay)
            ttl = {"x-message-ttl": round(delay * 1000)}
            declared.append(_queue(f"{app}.{key}", queue_type, dead_lettering(internal, queue.suffix) | ttl))
            bindings.append(Binding(internal, f"{app}.{key}", key, to_queue=True))
        bindings += [Binding(exchange, queue.name, pattern, to_queue=True) for exchange, pattern in queue.patterns]
    others = sorted({exchange for queue in queues for exchange, _ in queue.patterns} - {BUS, app})
    return Topology(
        shared=(*base.shared, *(app_exchange(other) for other in others)),
        exchanges=(*base.exchanges, _exchange(internal, "direct")),
        queues=tuple(declared),
        bindings=tuple(bindings),
    )


def catalog_stream() -> Queue:
    """The stream that keeps the contracts of all apps: 64 MiB, which holds 20 generations of 500 apps, and 90 days."""
    arguments = {
        "x-queue-type": "stream",
        "x-max-age": "90D",
        "x-max-length-bytes": 64 * 1024**2,
        "x-stream-max-segment-size-bytes": 4 * 1024**2,  # whole segments are deleted
    }
    return Queue(CATALOG, arguments)


def cataloguing(app: str) -> Topology:
    """What an app needs to publish its contract, beside the stream: only the app may publish to its internal exchange,
    so the exchange of a contract proves which app wrote it."""
    internal = internal_name(app)
    return Topology(
        exchanges=(_exchange(internal, "direct"),),
        bindings=(Binding(internal, CATALOG, CONTRACT_KEY, to_queue=True),),
    )


def dead_lettering(exchange: str, key: str | None = None) -> dict[str, Any]:
    """Arguments of a queue that dead-letters its messages to an exchange without losing any."""
    arguments: dict[str, Any] = {
        "x-dead-letter-exchange": exchange,
        "x-dead-letter-strategy": "at-least-once",
        # Required: otherwise at-least-once dead-lettering silently becomes at-most-once.
        "x-overflow": "reject-publish",
    }
    if key is not None:
        arguments["x-dead-letter-routing-key"] = key
    return arguments


def _queue(name: str, queue_type: QueueType, arguments: dict[str, Any], *, delivery_limit: int | None = None) -> Queue:
    arguments = {"x-queue-type": queue_type, **arguments}
    if queue_type == "quorum":
        if delivery_limit is not None:
            arguments["x-delivery-limit"] = delivery_limit
    else:
        # Classic queues support neither at-least-once dead-lettering nor a delivery limit.
        arguments.pop("x-dead-letter-strategy", None)
    return Queue(name, arguments)


# --- delayed events ---------------------------------------------------------------------------


def delay_seconds(delay: object) -> int:
    """Whole seconds, rounded up: a delayed event may be late by less than a second, but is never early.

    Raises:
        errors.InvalidOption: not within 0 (exclusive) and 30 days.
    """
    seconds = options.in_seconds(delay)
    if not options.is_number(seconds) or not 0 < seconds <= options.MAX_DELAY:
        raise errors.InvalidOption(
            f"delay={delay!r}: use seconds or a timedelta, more than 0 and up to {options.MAX_DELAY:,} (30 days). For "
            "longer delays, store the date in a database and publish when it is reached."
        )
    return math.ceil(seconds)


def delay_level(seconds: int) -> int:
    """The highest level that a delay needs. The event passes the levels from there down to 0."""
    return seconds.bit_length() - 1


def delay_exchange(app: str, level: int) -> str:
    return f"{app}.delay.{level}"


def delay_header(level: int) -> str:
    return f"lightbus-delay-{level}"


_DELAY_HEADERS = {delay_header(level): 1 << level for level in range(DELAY_LEVELS)}


def delay_headers(seconds: int) -> dict[str, int]:
    """The headers that choose the levels where a delayed event waits."""
    return {delay_header(level): 1 for level in range(DELAY_LEVELS) if seconds >> level & 1}


def delayed(publication: Publication, delay: object) -> tuple[Publication, int]:
    """The same publication, but the broker holds it for `delay` seconds; and its highest delay level.

    Raises:
        errors.InvalidOption: as `delay_seconds`.
    """
    seconds = delay_seconds(delay)
    level = delay_level(seconds)
    exchange = delay_exchange(publication.exchange, level)
    publication.properties["headers"] |= delay_headers(seconds)
    return Publication(exchange, publication.routing_key, publication.body, publication.properties), level


def delay_of(headers: Collection[str]) -> int:
    """The seconds for which a publication with these headers is delayed."""
    return 0 if _DELAY_HEADERS.keys().isdisjoint(headers) else sum(_DELAY_HEADERS.get(name, 0) for name in headers)


def delaying(app: str, highest_level: int, queue_type: QueueType) -> Topology:
    """The levels 0 to `highest_level` of delayed publishing.

    Each level is a headers exchange and a queue of the same name. A message that has the level's header waits 2^level
    seconds in the queue, and is then dead-lettered to the next lower level. A message without the header goes there at
    once (alternate exchange). Below level 0 is `billing.delay.due`. It is bound to the app's exchange, and to a queue
    that discards every message at once (TTL 0). That queue is necessary: at-least-once dead-lettering holds back
    messages that no queue takes, so 32 delayed events without a subscriber would stop all later ones.
    """
    due = f"{app}.delay.due"
    discarding = f"{app}.delay.unheard"
    exchanges = [_exchange(due, "topic")]
    queues = [_queue(discarding, "classic", {"x-message-ttl": 0})]
    bindings = [Binding(due, app, "#"), Binding(due, discarding, "#", to_queue=True)]
    for level in range(highest_level + 1):
        name = delay_exchange(app, level)
        lower = delay_exchange(app, level - 1) if level else due
        exchanges.append(_exchange(name, "headers", {"alternate-exchange": lower}))
        queues.append(_queue(name, queue_type, dead_lettering(lower) | {"x-message-ttl": 1000 * 2**level}))
        bindings.append(Binding(name, name, "", to_queue=True, arguments={"x-match": "all", delay_header(level): 1}))
    base = publishing(app)
    return Topology(
        shared=base.shared,
        exchanges=(*base.exchanges, *exchanges),
        queues=tuple(queues),
        bindings=(*base.bindings, *bindings),
    )
