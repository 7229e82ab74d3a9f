"""Live events for the page, as server-sent events: bounded in number, and ended with the page's connection."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import attrs

from lightbus import errors
from lightbus.tail import Tail, Taken
from lightbus.transport import Delivery
from lightbus.web import text
from lightbus.web.source import Source
from lightbus.wire import codec
from lightbus.wire.topology import BUS, check_app_name, check_pattern

STREAMS = 8
"""Pages that show live events at once: each has a connection and a queue on the broker."""
BATCH = 50
"""Events that are sent at once. If more arrive in `PAUSE`, the rest is skipped and counted."""
PAUSE = 0.25
"""Seconds between two batches."""
BODY = 2000
"""Characters of a body."""
LONGEST = 3600.0
"""Seconds after which a stream ends. The page opens the next one."""
MOST_PATTERNS = 10


@attrs.frozen
class Wanted:
    """Which events a page shows."""

    patterns: Sequence[str] = ("#",)
    source: str = ""
    """The app that publishes them; "" for any."""
    contains: str = ""
    """A text in the body."""

    def keeps(self, delivery: Delivery) -> bool:
        # The exchange of a delayed event is `billing.delay.N`.
        by = not self.source or delivery.exchange.partition(".")[0] == self.source
        return by and (not self.contains or self.contains.encode(errors="replace") in delivery.body)


def read(pattern: str, source: str, contains: str) -> Wanted:
    """
    Args:
        pattern: topic patterns, with spaces or commas between them; "" for all events.

    Raises:
        errors.InvalidName: a pattern or the app's name is invalid.
    """
    patterns = [check_pattern(one, "tail") for one in pattern.replace(",", " ").split()[:MOST_PATTERNS]]
    return Wanted(patterns or ["#"], check_app_name(source.strip()) if source.strip() else "", contains[:200])


def open_tail(source: Source, wanted: Wanted) -> Tail:
    """Start reading.

    Raises:
        errors.CatalogError: there is no broker.
    """
    if source.broker is None:
        source.app_named("any")  # raises
        raise AssertionError
    owner = BUS if source.app is None else source.app.name
    tail = Tail(source.broker, wanted.patterns, owner=owner, keep=wanted.keeps)
    tail.ensure_started()
    return tail


def described(taken: Taken) -> dict[str, Any]:
    """An event, as the page shows it."""
    try:
        message = codec.read_message(BUS, taken.delivery)
    except errors.DecodeError as error:
        return {
            "at": taken.received,
            "event": text.printable(taken.delivery.routing_key),
            "source": text.printable(taken.delivery.exchange),
            "id": "",
            "body": text.printable(f"This event cannot be read: {error}"),
            "kind": "",
        }
    content, kind = text.body(message.body, BODY, indent=0)
    return {
        "at": taken.received,
        "event": text.printable(message.event),
        "source": text.printable(message.source),
        "id": text.printable(message.id[:100]),
        "body": text.printable(content),
        "kind": f"{len(message.body):,} bytes, {kind}",
    }


def collect(tail: Tail, seconds: float, most: int) -> list[dict[str, Any]]:
    """What arrives within this time, for pages without scripts. Blocks.

    Raises:
        errors.BrokerError: the broker is not usable.
    """
    deadline = time.monotonic() + seconds
    found: list[dict[str, Any]] = []
    try:
        while len(found) < most and (left := deadline - time.monotonic()) > 0:
            taken = tail.take(min(left, PAUSE))
            if taken is not None:
                found.append(described(taken))
    finally:
        tail.stop(2.0)
    return found


async def events(
    source: Source, tail: Tail, is_over: Callable[[], bool], limiter: anyio.CapacityLimiter
) -> AsyncIterator[str]:
    """The stream. It ends with the connection, because Starlette then cancels it."""
    until = time.monotonic() + LONGEST
    last = time.monotonic()
    yield "retry: 2000\n\n"
    try:
        while not is_over() and time.monotonic() < until:
            try:
                batch = await anyio.to_thread.run_sync(partial(_batch, tail), limiter=limiter)
            except errors.BrokerError as error:
                yield problem(explained(error, source))
                return
            if batch["events"] or batch["skipped"]:
                yield _sent("events", batch)
                last = time.monotonic()
                await anyio.sleep(PAUSE)
            elif time.monotonic() > last + 10:
                yield ": alive\n\n"  # proxies close silent connections
                last = time.monotonic()
    finally:
        tail.let_go()


def problem(why: str) -> str:
    """The last message of a stream that cannot go on."""
    return _sent("problem", {"text": text.printable(why)})


def explained(error: errors.LightbusError, source: Source) -> str:
    """The error, and what an app's own user can do."""
    if isinstance(error, errors.AccessRefused) and source.app is None:
        return f"{error} An app's own user can start: lightbus web MODULE:ATTR."
    return str(error)


def _batch(tail: Tail) -> dict[str, Any]:
    found: list[dict[str, Any]] = []
    skipped, overrun = 0, False
    wait = PAUSE
    for _ in range(BATCH + len(tail.buffer)):
        taken = tail.take(wait)
        if taken is None:
            break
        wait = 0.0
        skipped += taken.dropped
        overrun |= taken.overrun
        if len(found) < BATCH:
            found.append(described(taken))
        else:
            skipped += 1
    return {"events": found, "skipped": skipped, "overrun": overrun}


def _sent(kind: str, content: dict[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps(content)}\n\n"
