"""What an event costs, in counts that do not depend on time: Python calls, reads, writes and thread hops.

The real app, publisher and consumer run here, with their threads; the broker is a script that answers from inside the
socket, and that lets whole batches through at once. So the counts are the same on every machine and in every run.

A test that fails here says that the path of an event has grown by more than 15 %. If that is meant, run
`python -m tests.unit.test_cost_guard`, which prints the counts as they are now, and write them into RECORDED with
the reason in the commit; `make bench CASE=consume` and `CASE=publish-500` say what it costs in time.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import struct
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Annotated, Any

import pytest
from amqp import serialization

import lightbus
from lightbus import Depends, Lightbus, Message, Next, NextSync
from lightbus.connection.dial import BrokerAddresses
from lightbus.transport.amqp.connection import Connection
from tests.patience import LIMIT

EVENTS = 400
ROOM = 1.15
RECORDED: dict[str, dict[str, float]] = {
    "consume": {
        "connection.loop_reader": 0.01,
        "consuming.acks": 0.01,
        "consuming.connection": 0.01,
        "consuming.consumer": 0.01,
        "consuming.coroutines": 1.0,
        "consuming.credit": 0.02,
        "consuming.deliveries": 0.01,
        "consuming.runner": 2.07,
        "consuming.tasks": 0.01,
        "consuming.threads": 0.01,
        "consuming.turns": 1.0,
        "handler": 1.0,
        "transport.__init__": 1.0,
        "transport.amqp.channel": 1.0,
        "transport.amqp.frames": 1.0,
        "transport.amqp.connection": 0.01,
        "wire.codec": 1.0,
        "reads": 2,
        "writes": 1,
        "hops": 0,
    },
    "consume_plain": {
        "connection.loop_reader": 0.01,
        "consuming.acks": 0.01,
        "consuming.connection": 0.01,
        "consuming.consumer": 0.01,
        "consuming.credit": 0.02,
        "consuming.deliveries": 0.01,
        "consuming.runner": 1.01,
        "consuming.slots": 2.0,
        "consuming.tasks": 0.0,
        "consuming.threads": 2.01,
        "handler": 1.0,
        "transport.__init__": 1.0,
        "transport.amqp.channel": 1.0,
        "transport.amqp.frames": 1.0,
        "transport.amqp.connection": 0.01,
        "wire.codec": 1.0,
        "reads": 2,
        "writes": 1,
        "hops": 1,
    },
    "publish": {
        "transport.amqp.connection": 1.02,
        "transport.amqp.wire": 9.0,
        "app": 5.0,
        "wire.codec": 4.0,
        "connection.thread": 1.0,
        "connection.loop_reader": 5.01,
        "message": 1.0,
        "publishing.confirms": 1.13,
        "publishing.connection": 0.14,
        "publishing.publisher": 4.0,
        "reads": 1,
        "writes": 13,
        "hops": 0,
    },
    "publish_many": {
        "transport.amqp.connection": 1.02,
        "transport.amqp.wire": 9.0,
        "app": 1.01,
        "wire.codec": 4.0,
        "connection.thread": 1.0,
        "connection.loop_reader": 3.01,
        "message": 1.0,
        "publishing.confirms": 1.13,
        "publishing.connection": 0.14,
        "publishing.publisher": 5.02,
        "reads": 1,
        "writes": 13,
        "hops": 0,
    },
}
"""By path: calls of Lightbus' functions an event, by module; reads, writes and thread hops for all EVENTS."""

# What is added around a handler costs only its own calls.
RECORDED["consume_middleware"] = {**RECORDED["consume"], "message": 1.0, "middleware": 6.0}
RECORDED["consume_plain_middleware"] = {**RECORDED["consume_plain"], "message": 1.0, "middleware": 5.0}
RECORDED["consume_depends"] = {**RECORDED["consume"], "dependencies": 4.0, "middleware": 1.0}


# --- the script -------------------------------------------------------------------------------

ANSWERS = {
    (10, 40): ((10, 41), "s", [""]),  # connection.open
    (10, 50): ((10, 51), "", []),  # connection.close
    (20, 10): ((20, 11), "S", [""]),  # channel.open
    (20, 40): ((20, 41), "", []),  # channel.close
    (40, 10): ((40, 11), "", []),  # exchange.declare
    (40, 30): ((40, 31), "", []),  # exchange.bind
    (50, 10): ((50, 11), "sll", ["", 0, 0]),  # queue.declare
    (50, 20): ((50, 21), "", []),  # queue.bind
    (60, 10): ((60, 11), "", []),  # basic.qos
    (85, 10): ((85, 11), "", []),  # confirm.select
}


class ScriptedSocket:
    """A socket with a broker inside: answers what is sent, in whole pieces, and counts reads and writes."""

    def __init__(self) -> None:
        self._real, self._signal = socket.socketpair()
        self._real.setblocking(False)
        self._incoming = b""
        self._lock = threading.Lock()
        self._sent = b""
        self._published = self._publishing_channel = 0
        self.consumer_channel = 0
        self.consumer_tag = ""
        self.acked = 0
        self.reads = self.writes = self.frames_written = 0
        properties = {"product": "Script", "version": "1", "capabilities": {}}
        start = method(0, (10, 10), "ooFSS", 0, 9, properties, "PLAIN", "en_US")
        self.push(start + method(0, (10, 30), "BlB", 100, 131072, 0))

    # what the connection calls

    def fileno(self) -> int:
        return self._real.fileno()

    def setblocking(self, flag: bool) -> None: ...

    def close(self) -> None:
        self._real.close()
        self._signal.close()

    def recv(self, size: int) -> bytes:
        with self._lock:
            piece, self._incoming = self._incoming[:size], self._incoming[size:]
            if not self._incoming:
                with contextlib.suppress(BlockingIOError):
                    self._real.recv(4096)
        if not piece:
            raise BlockingIOError
        self.reads += 1
        return piece

    def send(self, data: bytes | memoryview) -> int:
        self.writes += 1
        self._sent += bytes(data)
        published = self._published
        answers = b""
        while len(self._sent) >= 8:
            kind, channel, size = struct.unpack_from(">BHI", self._sent)
            if len(self._sent) < size + 8:
                break
            payload, self._sent = self._sent[7 : 7 + size], self._sent[size + 8 :]
            self.frames_written += 1
            if kind == 1:
                answers += self._answer(channel, payload)
        if self._published > published:
            answers += method(self._publishing_channel, (60, 80), "Lb", self._published, True)
        if answers:
            self.push(answers)
        return len(data)

    def _answer(self, channel: int, payload: bytes) -> bytes:
        signature: tuple[int, int] = struct.unpack_from(">HH", payload)  # type: ignore[assignment]
        if signature == (60, 40):
            self._published += 1
            self._publishing_channel = channel
        elif signature == (60, 80):
            self.acked = max(self.acked, struct.unpack_from(">Q", payload, 4)[0])
        elif signature == (60, 20):
            self.consumer_channel = channel
            (_, self.consumer_tag), _ = serialization.loads("ss", payload, 6)
            return method(channel, (60, 21), "s", self.consumer_tag)
        elif signature == (60, 30):
            (tag,), _ = serialization.loads("s", payload, 4)
            return method(channel, (60, 31), "s", tag)
        if signature not in ANSWERS:
            return b""
        answer, types, values = ANSWERS[signature]
        return method(channel, answer, types, *values)

    # what the test calls

    def push(self, data: bytes) -> None:
        """Let the client receive this, in one piece."""
        with self._lock:
            self._incoming += data
            self._signal.send(b"\0")


def method(channel: int, signature: tuple[int, int], types: str, *values: Any) -> bytes:
    payload = struct.pack(">HH", *signature) + serialization.dumps(types, values)
    return struct.pack(">BHI", 1, channel, len(payload)) + payload + b"\xce"


def delivery(channel: int, consumer: str, tag: int, body: bytes) -> bytes:
    head = method(channel, (60, 60), "sLbss", consumer, tag, False, "shop", "order.placed")
    header = struct.pack(">HHQH", 60, 0, len(body), 0x9000) + b"\x10application/json\x02"
    return head + b"".join(
        struct.pack(">BHI", kind, channel, len(payload)) + payload + b"\xce"
        for kind, payload in ((2, header), (3, body))
    )


@pytest.fixture
def sockets(monkeypatch: pytest.MonkeyPatch) -> list[ScriptedSocket]:
    """Every connection that is opened, in turn."""
    opened: list[ScriptedSocket] = []
    monkeypatch.setattr(BrokerAddresses, "connect", lambda self, name, timeout=5.0: connect(opened))
    return opened


def connect(opened: list[ScriptedSocket]) -> Connection:
    opened.append(ScriptedSocket())
    transport = SimpleNamespace(sock=opened[-1], connected=True, connect_timeout=5, connect=lambda: None)

    class Scripted(Connection):
        def Transport(self, *args: Any, **kwargs: Any) -> Any:
            return transport

    connection = Scripted(login_method="PLAIN", operation_timeout=LIMIT)
    connection.connect()
    return connection


# --- counting ---------------------------------------------------------------------------------

PACKAGE = str(Path(lightbus.__file__).parent)


class Calls:
    """Counts the calls of Lightbus' own functions, in all threads that are started inside."""

    def __init__(self) -> None:
        self._by_thread: dict[int, Counter[str]] = {}
        self.counting = False

    def __enter__(self) -> Calls:
        threading.setprofile(self._profile)
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)
        self.counting = False

    def _profile(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or not self.counting:
            return
        file = frame.f_code.co_filename
        if file.startswith(PACKAGE):
            mine = self._by_thread.setdefault(threading.get_ident(), Counter())
            mine[file[len(PACKAGE) + 1 : -len(".py")].replace("/", ".")] += 1

    @contextlib.contextmanager
    def window(self) -> Iterator[None]:
        self._by_thread.clear()
        self.counting = True
        yield
        self.counting = False

    def an_event(self) -> dict[str, float]:
        total: Counter[str] = Counter()
        for one in self._by_thread.values():
            total += one
        return {name: round(count / EVENTS, 2) for name, count in sorted(total.items())}


class Hops:
    """Counts what other threads schedule in this event loop."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        loop = asyncio.get_running_loop()
        schedule = loop.call_soon_threadsafe

        def counted(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            return schedule(*arguments, **options)

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)


async def until(done: Callable[[], object]) -> None:
    async with asyncio.timeout(LIMIT):
        while not done():  # noqa: ASYNC110 - it looks at what other threads have done
            await asyncio.sleep(0.01)


BODY = (
    b'{"order_id":"o-1","customer_id":4711,"email":"somebody@example.com","total":99.5,'
    b'"currency":"EUR","items":["a","b"],"paid":true}'
)


def new_app(**options: Any) -> tuple[Lightbus, type[Any]]:
    app = Lightbus("shop", url="amqp://script", prefetch=4 * EVENTS, **options)

    @app.event("order.placed")
    class Order:
        order_id: str
        customer_id: int
        email: str
        total: float
        currency: str
        items: list[str]
        paid: bool

    return app, Order


class Empty:
    """A middleware that does nothing."""

    async def handle(self, message: Message, call_next: Next) -> None:
        await call_next()

    def handle_sync(self, message: Message, call_next: NextSync) -> None:
        call_next()


class Session: ...


async def open_session() -> AsyncIterator[Session]:
    yield Session()


async def consume(
    sockets: list[ScriptedSocket],
    monkeypatch: pytest.MonkeyPatch,
    work: Callable[[], object] = lambda: None,
    *,
    plain: bool = False,
    around: str = "",
) -> dict[str, float]:
    """The counts for EVENTS deliveries that arrive at once, up to their acks; the handler also calls `work`.

    Around it may be one empty middleware (`middleware`), or one dependency on an async generator (`depends`).
    """
    # One thread: when Python lets another one in is not the same in every run.
    app, order = new_app(concurrency=1) if plain else new_app()
    numbers = itertools.count()  # its next() is atomic: plain handlers run in threads

    def handle_plainly(event: Any) -> None:
        next(numbers)
        work()

    async def handle(event: Any) -> None:
        handle_plainly(event)

    async def handle_with_session(event: Any, session: Any) -> None:
        handle_plainly(event)

    function = handle_plainly if plain else handle_with_session if around == "depends" else handle
    function.__annotations__["event"] = order
    if around == "depends":
        function.__annotations__["session"] = Annotated[Session, Depends(open_session)]
    if around == "middleware":
        app.middleware(Empty)
    app.on("order.placed")(function)
    hops = Hops(monkeypatch)
    with Calls() as calls:
        consumer = app.consumer()
        running = asyncio.ensure_future(consumer.run())
        await until(lambda: sockets and sockets[0].consumer_channel and consumer.connected)
        script = sockets[0]
        channel = script.consumer_channel
        (queue_consumer,) = consumer.consumers
        queue_consumer.credit.window = queue_consumer.prefetch  # as after a second of fast handlers
        script.push(delivery(channel, script.consumer_tag, 1, BODY))  # the route is known from here on
        await until(lambda: script.acked == 1 and queue_consumer.prefetch_now >= queue_consumer.prefetch - 1)
        await until(lambda: consumer.read_by_loop)
        script.reads = script.writes = hops.count = 0
        with calls.window():
            script.push(b"".join(delivery(channel, script.consumer_tag, tag, BODY) for tag in range(2, EVENTS + 2)))
            await until(lambda: script.acked == EVENTS + 1)
        counts = {**calls.an_event(), "reads": script.reads, "writes": script.writes, "hops": hops.count}
        assert next(numbers) == EVENTS + 1
        await consumer.stop(1)
        await running
    return counts


async def publish(sockets: list[ScriptedSocket], monkeypatch: pytest.MonkeyPatch, *, many: bool) -> dict[str, float]:
    """The counts for EVENTS events, published one at a time by as many tasks, or by one `publish_many`."""
    app, order = new_app()
    event = order(
        order_id="o-1", customer_id=1, email="somebody@example.com", total=9.5, currency="EUR", items=["a"], paid=True
    )
    with Calls() as calls:
        await app.publish(event)
        script = sockets[0]
        hops = Hops(monkeypatch)
        await until(lambda: app.publisher.read_by_loop)
        script.reads = script.writes = hops.count = 0
        with calls.window():
            calls_of_publish = (
                [app.publish_many([event] * EVENTS)] if many else [app.publish(event) for _ in range(EVENTS)]
            )
            pending = [asyncio.ensure_future(one) for one in calls_of_publish]
            receipts = await asyncio.wait_for(asyncio.gather(*pending), LIMIT)
        counts = {**calls.an_event(), "reads": script.reads, "writes": script.writes, "hops": hops.count}
        assert len(receipts[0] if many else receipts) == EVENTS  # type: ignore[arg-type]
        await asyncio.to_thread(app.publisher.close)
    return counts


def check(path: str, counts: dict[str, float]) -> None:
    recorded = RECORDED[path]
    # What a wake-up more or less costs is no growth: some calls in a whole batch, one read, write or hop.
    over = {
        name: (recorded.get(name, 0.0), count)
        for name, count in counts.items()
        if count > max(recorded.get(name, 0.0) * ROOM, recorded.get(name, 0.0) + (3 if name in WHOLE else 0.3))
    }
    assert not over, f"{path} costs more than recorded (recorded, now): {over}. See the top of {Path(__file__).name}."


WHOLE = ("reads", "writes", "hops")


# --- the guard --------------------------------------------------------------------------------


def test_an_event_that_arrives_costs_no_more_calls_reads_writes_and_hops_than_recorded(
    sockets: list[ScriptedSocket], monkeypatch: pytest.MonkeyPatch
) -> None:
    check("consume", asyncio.run(consume(sockets, monkeypatch)))


def test_an_event_for_a_plain_handler_costs_no_more_calls_and_hops_than_recorded(
    sockets: list[ScriptedSocket], monkeypatch: pytest.MonkeyPatch
) -> None:
    check("consume_plain", asyncio.run(consume(sockets, monkeypatch, plain=True)))


def test_one_empty_middleware_costs_no_more_calls_than_recorded(
    sockets: list[ScriptedSocket], monkeypatch: pytest.MonkeyPatch
) -> None:
    check("consume_middleware", asyncio.run(consume(sockets, monkeypatch, around="middleware")))


def test_one_empty_middleware_around_a_plain_handler_costs_no_more_calls_than_recorded(
    sockets: list[ScriptedSocket], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = asyncio.run(consume(sockets, monkeypatch, plain=True, around="middleware"))
    check("consume_plain_middleware", counts)


def test_one_dependency_on_an_async_generator_costs_no_more_calls_than_recorded(
    sockets: list[ScriptedSocket], monkeypatch: pytest.MonkeyPatch
) -> None:
    check("consume_depends", asyncio.run(consume(sockets, monkeypatch, around="depends")))


def test_an_event_that_is_published_costs_no_more_than_recorded(
    sockets: list[ScriptedSocket], monkeypatch: pytest.MonkeyPatch
) -> None:
    check("publish", asyncio.run(publish(sockets, monkeypatch, many=False)))


def test_publishing_many_costs_no_more_than_recorded(
    sockets: list[ScriptedSocket], monkeypatch: pytest.MonkeyPatch
) -> None:
    check("publish_many", asyncio.run(publish(sockets, monkeypatch, many=True)))


def test_one_more_call_an_event_is_seen(sockets: list[ScriptedSocket], monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {}
    exec(compile("def extra(): pass", f"{PACKAGE}/handler.py", "exec"), names)  # as if handler.py had one more
    before = asyncio.run(consume(sockets, monkeypatch))
    sockets.clear()
    after = asyncio.run(consume(sockets, monkeypatch, names["extra"]))
    assert after["handler"] - before["handler"] == pytest.approx(1, abs=0.02)
    with pytest.raises(AssertionError, match="costs more than recorded"):
        check("consume", after)


def main() -> None:
    patch = pytest.MonkeyPatch()
    for path, run in (
        ("consume", lambda opened: consume(opened, patch)),
        ("consume_middleware", lambda opened: consume(opened, patch, around="middleware")),
        ("consume_depends", lambda opened: consume(opened, patch, around="depends")),
        ("consume_plain", lambda opened: consume(opened, patch, plain=True)),
        ("consume_plain_middleware", lambda opened: consume(opened, patch, plain=True, around="middleware")),
        ("publish", lambda opened: publish(opened, patch, many=False)),
        ("publish_many", lambda opened: publish(opened, patch, many=True)),
    ):
        opened: list[ScriptedSocket] = []
        patch.setattr(BrokerAddresses, "connect", lambda self, name, timeout=5.0, opened=opened: connect(opened))
        print(f'    "{path}": {asyncio.run(run(opened))},')
    patch.undo()


if __name__ == "__main__":
    main()
