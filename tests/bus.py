"""A bus for tests: apps that consume on this event loop, and waits that report what they saw last.

async with running(auth, billing):
    await auth.publish(UserRegistered(user_id=1))
    await eventually(lambda: received, [1])
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import Any

import amqp.exceptions
import anyio
import anyio.to_thread
import attrs

from lightbus import Lightbus, Retry, errors
from lightbus.connection.dial import BrokerAddresses
from lightbus.consuming.dispatcher import Dispatcher
from lightbus.transport import Channel, Connection, Delivery, Publication
from tests.patience import LIMIT, wait_until

QUICK = Retry(delays=(0.05, 0.1))
"""Three attempts within a fraction of a second."""

SENTINEL = "tests-sentinel.all.is.quiet"

_missing: Any = object()


# --- events, as a shop would have them --------------------------------------------------------


@attrs.frozen(kw_only=True)
class OrderPlaced:
    """What most tests publish."""

    number: int
    note: str = ""


@attrs.frozen(kw_only=True)
class OrderCancelled:
    number: int


# --- waiting ----------------------------------------------------------------------------------


async def eventually(look: Callable[[], Any], wanted: Any = _missing, *, limit: float = LIMIT) -> Any:
    """Wait until `look()` is `wanted` (or just true), and return it; otherwise fail with its last value."""
    deadline = time.monotonic() + limit
    while True:
        seen = look()
        if (bool(seen) if wanted is _missing else seen == wanted) is True:
            return seen
        if time.monotonic() > deadline:
            expected = "something true" if wanted is _missing else repr(wanted)
            raise AssertionError(f"after {limit:g} s: wanted {_short(expected)}, saw {_short(repr(seen))}")
        await anyio.sleep(0.005)


def _short(text: str) -> str:
    return text if len(text) < 2000 else f"{text[:1000]} ... {text[-1000:]}"


# --- apps that run ----------------------------------------------------------------------------


class Bus:
    """The consumers of some apps, and a way to wait until nothing more arrives."""

    def __init__(self) -> None:
        self.consumers: dict[str, list[Dispatcher]] = {}
        self._received: dict[str, list[int]] = {}
        self._rounds = itertools.count(1)

    def expect_sentinels(self, app: Lightbus) -> None:
        if "sentinel" not in app.handlers:
            received: list[int] = []
            app.on(SENTINEL, name="sentinel")(lambda payload: received.append(payload["round"]))
            self._received[app.name] = received

    async def quiet(self, app: Lightbus) -> None:
        """Return once the app has taken everything from its queue that was confirmed before this call.

        Queues keep their order: when a later event is handled, the earlier ones have been delivered.
        """
        this_round = next(self._rounds)
        body = b'{"round": %d}' % this_round
        async with stranger(app) as channel:
            await anyio.to_thread.run_sync(publish_plainly, channel, app.name, SENTINEL, body)
        await eventually(lambda: this_round in self._received[app.name], True)

    async def stop(self, app: Lightbus, grace: float = 5.0) -> bool:
        """Stop the app's consumers gracefully. Returns whether all running handlers ended."""
        ended = [await consumer.stop(grace) for consumer in self.consumers.pop(app.name)]
        return all(ended)


@contextlib.asynccontextmanager
async def running(
    *apps: Lightbus,
    queues: Sequence[str] = (),
    prefetch: int | None = None,
    concurrency: int | None = None,
    grace: float = 5.0,
) -> AsyncIterator[Bus]:
    """Subscribed consumers of these apps; an app that is passed twice has two. All are stopped at the end."""
    bus = Bus()
    async with contextlib.AsyncExitStack() as opened, anyio.create_task_group() as tasks:
        for app in dict.fromkeys(apps):
            if not queues:
                bus.expect_sentinels(app)
            await opened.enter_async_context(app)
        for app in apps:
            consumer = app.consumer(queues=queues, prefetch=prefetch, concurrency=concurrency)
            bus.consumers.setdefault(app.name, []).append(consumer)
            await tasks.start(consumer.run)
        yield bus
        for consumers in bus.consumers.values():
            for consumer in consumers:
                await consumer.stop(grace)


async def declare(*apps: Lightbus) -> None:
    """Start and stop each app once, so that its queues exist."""
    async with running(*apps):
        pass


class InBackground:
    """One consumer of an app, in a thread with its own event loop, for tests without one."""

    def __init__(self, app: Lightbus) -> None:
        self.app = app

    def __enter__(self) -> InBackground:
        self._started, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=anyio.run, args=(self._run,), daemon=True)
        self._thread.start()
        assert self._started.wait(LIMIT)
        return self

    async def _run(self) -> None:
        async with running(self.app):
            self._started.set()
            await anyio.to_thread.run_sync(self._over.wait)

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(LIMIT)


# --- other programs, dead letters -------------------------------------------------------------


def connect(app_or_url: Lightbus | str, name: str = "tests") -> Connection:
    """A plain connection to the broker of an app, however busy it is."""
    broker = BrokerAddresses.parse(app_or_url) if isinstance(app_or_url, str) else app_or_url.broker
    deadline = time.monotonic() + LIMIT
    while True:
        try:
            return broker.connect(name)
        except errors.BrokerUnreachable:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


@contextlib.contextmanager
def connected(app_or_url: Lightbus | str) -> Iterator[Connection]:
    """The same, closed at the end."""
    connection = connect(app_or_url)
    try:
        yield connection
    finally:
        connection.close()


@contextlib.asynccontextmanager
async def stranger(app_or_url: Lightbus | str) -> AsyncIterator[Channel]:
    """A plain channel, as a program without Lightbus has one."""
    opened = connected(app_or_url)
    connection = await anyio.to_thread.run_sync(opened.__enter__)
    try:
        yield connection.channel()
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(opened.__exit__, None, None, None)


def publish_plainly(
    channel: Any, exchange: str, routing_key: str, body: bytes, properties: dict[str, Any] | None = None
) -> None:
    """Publish with these properties only. Returns when the broker has confirmed it: closing the connection then does
    not lose it. On this channel, only this function publishes.
    """
    confirms: list[int] = []
    channel.on_ack = channel.on_nack = lambda tag, _multiple: confirms.append(tag)
    channel.confirm_select()
    channel.publish([Publication(exchange, routing_key, body, properties or {}, mandatory=False)])
    # A synchronous method after it: it raises the error of a publication that the broker refuses.
    channel.exchange_declare(exchange, "topic", passive=True, durable=True, auto_delete=False)
    connection: Connection = channel.connection

    def confirmed() -> bool:
        if not confirms:
            with contextlib.suppress(TimeoutError):
                connection.drain_events(0.02)
        return bool(confirms)

    wait_until(confirmed, "a confirm")


def publish_confirmed(connection: Connection, *publications: Publication) -> None:
    """Publish, and return once all are confirmed: closing the connection then loses none."""
    channel = connection.channel()
    confirmed = 0

    def on_ack(tag: int, multiple: bool) -> None:
        nonlocal confirmed
        confirmed = tag if multiple else confirmed + 1

    channel.on_ack = on_ack
    channel.confirm_select()
    channel.publish(publications)

    def all_confirmed() -> bool:
        with contextlib.suppress(TimeoutError):
            connection.drain_events(0.02)
        return confirmed >= len(publications)

    wait_until(all_confirmed, "confirms")
    channel.close()


def take_all(app: Lightbus, queue: str) -> list[Delivery]:
    """Take all messages out of a queue."""
    with connected(app) as connection:
        channel = connection.channel()
        taken: list[Delivery] = []
        while (delivery := channel.get(queue)) is not None:
            taken.append(delivery)
        if taken:
            channel.basic_ack(taken[-1].delivery_tag, multiple=True)
        channel.close()
        return taken


async def left_in(app: Lightbus, queue: str | None = None) -> list[Delivery]:
    """Take all messages out of the app's queue, or of another one."""
    return await anyio.to_thread.run_sync(take_all, app, queue or f"{app.name}.main")


async def dead_letters(app: Lightbus, count: int = 1) -> list[Delivery]:
    """Take the app's dead letters out of their queue, once there are `count` of them."""
    taken: list[Delivery] = []
    deadline = time.monotonic() + LIMIT
    while True:
        # A queue that was just declared may not exist yet, or (541 noproc) its leader may not.
        with contextlib.suppress(amqp.exceptions.NotFound, amqp.exceptions.InternalError):
            taken += await left_in(app, f"{app.name}.dead")
        if len(taken) >= count:
            return taken
        assert time.monotonic() < deadline, f"wanted {count} dead letters of {app.name!r}, there are {len(taken)}"
        await anyio.sleep(0.02)


async def returned(app: Lightbus, count: int = 1) -> list[Delivery]:
    """Take events out of the app's queue, once `count` of them are there again: a worker that has ended had them."""
    taken: list[Delivery] = []
    deadline = time.monotonic() + LIMIT
    while len(taken) < count:
        taken += await left_in(app)
        assert time.monotonic() < deadline, f"wanted {count} events in the queue of {app.name!r}, got {len(taken)}"
    return taken


def reason(dead_letter: Delivery) -> str:
    """The reason of a dead letter: `TypeError: the message`."""
    headers = dead_letter.properties["headers"]
    return f"{headers['lightbus-error-type']}: {headers['lightbus-error-message']}"


def order_numbers(deliveries: Iterable[Delivery]) -> list[int]:
    return [json.loads(delivery.body)["number"] for delivery in deliveries]
