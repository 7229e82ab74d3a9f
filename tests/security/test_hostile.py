"""Hostile messages to a running consumer: it survives, and each message is dead-lettered, with a reason.

All of it is valid AMQP, published by py-amqp itself (not by Lightbus), with nothing sane in it. A few thousand in
`make test`; `LIGHTBUS_HOSTILE=100000` (as `make faults` sets it) for the whole of it.
"""

from __future__ import annotations

import ast
import contextlib
import json
import logging
import os
import pickle
import random
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import amqp
import anyio
import anyio.to_thread
import attrs
import kombu.serialization
import pytest

import lightbus
from lightbus import Lightbus, Message, Retry
from lightbus.catalog import storage
from lightbus.catalog.contract import contract_of
from lightbus.connection.declare import declare
from lightbus.transport import Delivery, Publication
from lightbus.wire.topology import cataloguing
from tests.bus import connected, eventually, publish_confirmed, running
from tests.patience import LIMIT

COUNT = int(os.environ.get("LIGHTBUS_HOSTILE", "3000"))
BATCH = 2000
GROWTH = 60 * 1024 * 1024
"""Bytes by which the memory of the consumer's process may grow: far less than keeping some of the messages takes."""


@attrs.frozen(kw_only=True)
class Order:
    number: int
    note: str = ""
    when: datetime | None = None
    price: Decimal = Decimal(0)
    lines: tuple[dict[str, int], ...] = ()


# --- hostile bodies, headers and properties ---------------------------------------------------

Chance = random.Random

LARGE_NUMBERS = (0, -1, 1, 2**31 - 1, 2**31, -(2**31), 2**63 - 1, -(2**63))
TEXTS = (
    "",
    " ",
    "\0",
    "é" * 100,
    "\U0001f4a9",
    "../../etc/passwd",
    "%s%n{0}",
    "a" * 250,
    "lightbus",
    "\n\r\t",
    "\U0001d4b3",
)
MARKER = "/tmp/lightbus-was-here"


def assert_nothing_was_run() -> None:
    assert not os.path.exists(MARKER), "something was unpickled, or read as YAML"


class Exploit:
    """If it is unpickled, it creates a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (MARKER,)


def body(chance: Chance) -> bytes:
    return chance.choice(BODIES)(chance)


def _valid(chance: Chance) -> bytes:
    return json.dumps({"number": chance.randrange(10**6), "note": chance.choice(TEXTS), "extra": [1, None]}).encode()


def _cut(chance: Chance) -> bytes:
    whole = _valid(chance)
    return whole[: chance.randrange(len(whole))]


def _flipped(chance: Chance) -> bytes:
    whole = bytearray(_valid(chance))
    for _ in range(chance.randint(1, 4)):
        whole[chance.randrange(len(whole))] = chance.randrange(256)
    return bytes(whole)


def _nested(chance: Chance) -> bytes:
    depth = chance.choice((10, 1000, 100_000))
    opening, closing = chance.choice(((b"[", b"]"), (b'{"number":', b"}")))
    inner = chance.choice((b"1", b"", b"null"))
    nest = opening * depth + inner + closing * chance.choice((depth, depth - 1, 0))
    return b'{"number": 1, "lines": ' + nest + b"}" if chance.random() < 0.5 else nest


def _huge_number(chance: Chance) -> bytes:
    number = chance.choice((b"9" * 5000, b"-" + b"9" * 400, b"1e999", b"1e-999999", b"0." + b"0" * 3000 + b"1", b"NaN"))
    field = chance.choice((b"number", b"price", b"note", b"when"))
    return b'{"number": 1, "' + field + b'": ' + number + b"}"


def _surrogates(chance: Chance) -> bytes:
    text = chance.choice((rb"\ud800", rb"\udfff\ud800", rb"\u0000", b"\xed\xa0\x80", b"\xc0\x80", b"\xff\xfe", b"\xf8"))
    return b'{"number": 1, "note": "' + text + b'"}'


def _wrong_type(chance: Chance) -> bytes:
    value = chance.choice((None, True, "1", 1.5, [], {}, [[]], {"number": 1}, -(2**70)))
    return json.dumps({chance.choice(("number", "note", "when", "price", "lines")): value}).encode()


def _repeated(chance: Chance) -> bytes:
    return b'{"number": 1' + b', "number": "x"' * chance.randrange(1, 1000) + b"}"


def _noise(chance: Chance) -> bytes:
    return chance.randbytes(chance.choice((0, 1, 7, 300, 20_000)))


def _other_format(chance: Chance) -> bytes:
    return chance.choice(
        (
            pickle.dumps(Exploit()),
            pickle.dumps({"number": 1}),
            b"!!python/object/apply:os.mkdir ['/tmp/lightbus-was-here']\n",
            b"number: 1\n",
            b"<order><number>1</number></order>",
            b"\x81\xa6number\x01",
            '{"number": 1}'.encode("utf-16"),
            b"\xef\xbb\xbf" + b'{"number": 1}',
            b"\x1f\x8b\x08" + b"\0" * 50,
        )
    )


BODIES: tuple[Callable[[Chance], bytes], ...] = (
    _valid, _cut, _flipped, _nested, _huge_number, _surrogates, _wrong_type, _repeated, _noise, _other_format,
)  # fmt: skip

HEADERS = (
    "lightbus-version", "lightbus-causation", "lightbus-attempt", "lightbus-handler", "lightbus-source",
    "lightbus-routing-key", "lightbus-queue", "lightbus-error-type", "lightbus-error-message",
    "lightbus-error-traceback", "lightbus-error-time", "lightbus-delay-3", "lightbus-unheard-of", "traceparent",
    "x-death", "x-first-death-exchange", "x-delivery-count", "CC", "own",
)  # fmt: skip


def header_value(chance: Chance, depth: int = 0) -> Any:
    kind = chance.randrange(10 if depth < 3 else 7)
    match kind:
        case 0:
            return chance.choice(LARGE_NUMBERS)
        case 1 | 2:
            return chance.choice(("note", "dead", "billing", "evil", "order.placed", *TEXTS))
        case 3:
            return chance.choice((True, False, None))
        case 4:
            return chance.choice((0.0, -1.5, 5e-324, 1e308))  # RabbitMQ itself fails (541) on infinity and NaN
        case 5:
            return chance.choice((Decimal("1.5"), Decimal(-7)))
        case 6:
            return datetime.fromtimestamp(chance.choice((0, 2**31, 2**34)), UTC).replace(tzinfo=None)
        case 7:
            return [header_value(chance, depth + 1) for _ in range(chance.randrange(4))]
        case _:
            return {chance.choice(HEADERS): header_value(chance, depth + 1) for _ in range(chance.randrange(4))}


def headers(chance: Chance) -> dict[str, Any]:
    table = {name: header_value(chance) for name in chance.sample(HEADERS, chance.randrange(8))}
    for name in ("CC", "BCC"):  # RabbitMQ reads these, and closes the channel where they are no lists of texts
        table.pop(name, None)
    return table


def properties(chance: Chance) -> dict[str, Any]:
    """As the keyword arguments of py-amqp's Message."""
    some: dict[str, Any] = {"application_headers": headers(chance)} if chance.random() < 0.9 else {}
    for name in ("content_type", "content_encoding", "correlation_id", "reply_to", "message_id", "type", "app_id"):
        if chance.random() < 0.4:
            some[name] = chance.choice(
                (*TEXTS, "application/x-python-serialize", "application/json", "gzip", "billing")
            )
    if chance.random() < 0.3:
        some["timestamp"] = chance.choice((0, 1, 2**31, 2**40, 2**62, 2**63 - 1))
    if chance.random() < 0.3:
        some["delivery_mode"] = chance.choice((1, 2))
    if chance.random() < 0.3:
        some["priority"] = chance.choice((0, 9, 255))
    return some


def routing_key(chance: Chance) -> str:
    return chance.choice(
        ("order.placed",) * 6 + ("order.envelope",) * 3 + ("order.nobody", "order.\U0001f4a9", "order." + "x" * 240)
    )


# --- the test ---------------------------------------------------------------------------------


@contextlib.contextmanager
def as_stranger(url: str) -> Iterator[amqp.Channel]:
    parts = urlsplit(url)
    host, user, secret = f"{parts.hostname}:{parts.port}", parts.username, parts.password
    with amqp.Connection(host, user, secret, virtual_host=parts.path[1:], confirm_publish=False) as connection:
        yield connection.channel()


def throw(url: str, first: int, count: int) -> Counter[str]:
    """Publish `count` messages, each from a separate seed; returns how many the broker accepted, by routing key."""
    taken: Counter[str] = Counter()
    unconfirmed = {*range(1, count + 1)}

    def on_ack(tag: int, multiple: bool) -> None:
        unconfirmed.difference_update(range(1, tag + 1) if multiple else (tag,))

    with as_stranger(url) as channel:
        channel.confirm_select()
        channel.events["basic_ack"].add(on_ack)
        for number in range(first, first + count):
            chance = random.Random(number)
            key = routing_key(chance)
            channel.basic_publish(amqp.Message(body(chance), **properties(chance)), "shop", key)
            taken[key] += 1
        deadline = time.monotonic() + LIMIT
        while unconfirmed:  # closing the connection before could lose them
            assert time.monotonic() < deadline, f"not confirmed: {len(unconfirmed)}"
            with contextlib.suppress(TimeoutError):
                channel.connection.drain_events(timeout=1)
    return taken


def resident(pid: int | None = None) -> int:
    """Bytes of memory of a process."""
    pages = int(Path(f"/proc/{pid or os.getpid()}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def reasons(url: str, queue: str) -> Counter[str]:
    """Take all messages out of a dead-letter queue, and count them by reason. Each has one."""
    found: Counter[str] = Counter()
    with connected(url) as connection:
        channel = connection.channel()
        while (delivery := channel.get(queue)) is not None:
            found[reason_of(delivery)] += 1
            channel.basic_ack(delivery.delivery_tag)
    return found


def reason_of(delivery: Delivery) -> str:
    table = delivery.properties["headers"]
    assert table["lightbus-error-message"], table
    assert datetime.fromisoformat(table["lightbus-error-time"])
    assert table["lightbus-queue"] == "billing.main"
    assert table["lightbus-source"] == "shop"
    assert table["lightbus-attempt"] in (1, 2)
    return str(table["lightbus-error-type"]).rpartition(".")[2]


@pytest.mark.rabbitmq
@pytest.mark.anyio
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
async def test_hostile_messages_are_handled_or_dead_lettered_with_a_reason(
    rabbitmq_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, logger="lightbus")  # pytest keeps every record, and this test measures memory
    handled: Counter[str] = Counter()
    shop, billing = (
        Lightbus("shop", url=rabbitmq_url),
        Lightbus("billing", url=rabbitmq_url, retry=Retry(delays=(0.01,))),
    )

    @billing.on("order.placed")
    async def note(order: Order, message: Message) -> None:
        assert type(order.number) is int
        assert message.source == "shop"
        assert message.attempt == 1
        handled["order.placed"] += 1

    @billing.on("order.envelope")
    async def look(message: Message) -> None:
        assert message.source == "shop"
        assert message.event == "order.envelope"
        assert message.attempt == 1
        assert message.version >= 1
        assert message.time.tzinfo is UTC
        assert message.id
        assert message.correlation_id
        assert not [name for name in message.headers if name.startswith(("lightbus-", "x-death"))]
        handled["order.envelope"] += 1

    sizes: list[int] = []
    dead: Counter[str] = Counter()
    thrown: Counter[str] = Counter()
    async with running(shop, billing) as bus:
        await anyio.to_thread.run_sync(_bind_everything, rabbitmq_url)
        (consumer,) = bus.consumers["billing"]
        for first in range(0, COUNT, BATCH):
            count = min(BATCH, COUNT - first)
            thrown += await anyio.to_thread.run_sync(throw, rabbitmq_url, first, count)
            deadline = time.monotonic() + 120
            while handled.total() + dead.total() < thrown.total():
                assert time.monotonic() < deadline, (
                    f"of {thrown.total()}, {handled.total()} handled, {dead.total()} dead"
                )
                dead += await anyio.to_thread.run_sync(reasons, rabbitmq_url, "billing.dead")
                await anyio.sleep(0.05)
            assert consumer.connected
            sizes.append(resident())
        await bus.quiet(billing)
        dead += await anyio.to_thread.run_sync(reasons, rabbitmq_url, "billing.dead")
    print(f"thrown {dict(thrown)}; handled {dict(handled)}; dead {dict(dead)}; RSS {[size >> 20 for size in sizes]} MB")
    assert handled.total() + dead.total() == thrown.total() == COUNT
    assert handled["order.envelope"] == thrown["order.envelope"], "a handler without a payload gets every event"
    nobody = thrown.total() - thrown["order.placed"] - thrown["order.envelope"]
    assert dead["NoHandler"] == nobody
    assert dead["DecodeError"] == thrown["order.placed"] - handled["order.placed"]
    assert dead.keys() == {"NoHandler", "DecodeError"}
    assert 0.1 * thrown["order.placed"] < handled["order.placed"] < 0.5 * thrown["order.placed"]
    assert max(sizes) - sizes[0] < GROWTH, f"memory grew: {[size >> 20 for size in sizes]} MB"
    assert_nothing_was_run()


@pytest.mark.rabbitmq
@pytest.mark.usefixtures("patient_catalogue")
def test_hostile_messages_in_the_catalogue_cost_no_other_contract(rabbitmq_url: str) -> None:
    shop = Lightbus("shop", url=rabbitmq_url)
    first, last = contract_of(shop, "1"), contract_of(shop, "2")
    storage.publish(shop.broker, first)
    with connected(rabbitmq_url) as connection:
        declare(connection, cataloguing("mallory"))
    stored = sum(_put_into_the_catalogue(rabbitmq_url, seed) for seed in range(COUNT // 20))
    assert stored > COUNT // 80
    found = storage.read(shop.broker)
    assert found.contracts == [first]
    assert [one.writer for one in found.ignored] == ["mallory"]
    storage.publish(shop.broker, last)
    assert storage.read(shop.broker).contracts == [last]


def _put_into_the_catalogue(url: str, seed: int) -> bool:
    """Whether RabbitMQ stores it in a stream: it fails (541) on some properties, and closes the connection."""
    chance = random.Random(seed)
    message = amqp.Message(body(chance), **properties(chance))
    try:
        with as_stranger(url) as channel:
            channel.confirm_select()
            channel.basic_publish_confirm(message, "mallory.internal", "contract")
    except amqp.exceptions.InternalError:
        return False
    return True


def _bind_everything(url: str) -> None:
    with as_stranger(url) as channel:
        channel.queue_bind("billing.main", "lightbus", "order.#")


# --- only JSON --------------------------------------------------------------------------------

FORBIDDEN = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "yaml", "dill", "cloudpickle", "jsonpickle"}
EVALUATES = {"eval", "exec", "__import__", "compile"}


def test_lightbus_uses_nothing_that_could_execute_a_payload() -> None:
    found = []
    for path in Path(lightbus.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name.partition(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module or "").partition(".")[0]]
                if node.module == "kombu" or (node.module or "").startswith("kombu.serialization"):
                    names += ["pickle"] if any(alias.name == "serialization" for alias in node.names) else []
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in EVALUATES:
                found.append(f"{path.name}:{node.lineno} calls {node.func.id}")
            found += [f"{path.name}:{node.lineno} imports {name}" for name in names if name in FORBIDDEN]
    assert found == []


@pytest.mark.anyio
async def test_kombu_never_decodes_a_body(monkeypatch: pytest.MonkeyPatch, broker_url: str) -> None:
    """kombu chooses its serializers by the content type, which any client can set."""

    def never(*arguments: object, **_: object) -> None:
        raise AssertionError(f"a kombu serializer was asked to decode {arguments!r}")

    monkeypatch.setattr(kombu.serialization, "loads", never)
    monkeypatch.setattr(kombu.serialization.registry, "loads", never)
    monkeypatch.setattr(pickle, "loads", never)
    monkeypatch.setattr(pickle, "load", never)
    received: list[Any] = []
    shop, billing = Lightbus("shop", url=broker_url), Lightbus("billing", url=broker_url, retry=Retry.none())

    @billing.on("order.placed")
    async def note(payload: dict[str, Any], message: Message) -> None:
        received.append(payload)

    def publish() -> None:
        with connected(broker_url) as connection:
            for kind in kombu.serialization.registry.name_to_type.values():
                some = {"content_type": kind, "content_encoding": "binary"}
                bodies = (pickle.dumps(Exploit()), b'{"number": 1}')
                publish_confirmed(connection, *(Publication("shop", "order.placed", body, some) for body in bodies))

    async with running(shop, billing) as bus:
        await anyio.to_thread.run_sync(publish)
        count = len(kombu.serialization.registry.name_to_type)
        assert count >= 4
        await eventually(lambda: len(received) >= count)
        await bus.quiet(billing)
        assert received == [{"number": 1}] * count
    assert_nothing_was_run()
    for app in (shop, billing):
        await anyio.to_thread.run_sync(app.__exit__, None, None, None)


def test_a_worker_never_parses_yaml_or_unpickles() -> None:
    """In a separate process: audit hooks report the lookups of `pickle`, and a patch the calls of PyYAML."""
    program = """
import sys
seen = []
def note_it(event, arguments):
    if event.startswith(("pickle.", "marshal.loads", "exec")):
        seen.append(event)
sys.addaudithook(note_it)
try:
    import yaml  # kombu imports it if it is installed
except ImportError:
    pass
else:
    yaml.load = lambda *_: seen.append("yaml")
import anyio
from lightbus import Lightbus
shop, received = Lightbus("shop", url="memory://audit"), []
@shop.event
class OrderPlaced:
    number: int
billing = Lightbus("billing", url="memory://audit")
@billing.on("order.placed")
async def note(order: dict) -> None:
    received.append(order)
async def main():
    consumer = billing.consumer()
    async with anyio.create_task_group() as tasks:
        await tasks.start(consumer.run)
        await shop.publish(OrderPlaced(number=0))
        with anyio.fail_after(60):
            while not received:
                await anyio.sleep(0.01)
            seen.clear()
            for number in range(1, 20):
                await shop.publish(OrderPlaced(number=number))
            while len(received) < 20:
                await anyio.sleep(0.01)
        print(sorted(set(seen)))
        await consumer.stop(5)
anyio.run(main)
"""
    kept = {**os.environ, "PYTHONPATH": str(Path(lightbus.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", program], env=kept, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


# --- invalid frames --------------------------------------------------------------------------


def test_tables_of_any_shape_are_decoded_or_refused() -> None:
    """The decoder itself, with bytes that no broker forwards: it raises ValueError, within bounded time."""
    from lightbus.transport.amqp import wire as amqp_wire

    chance = random.Random(7)
    for _ in range(20_000):
        table = chance.randbytes(chance.randrange(60))
        data = struct.pack(">H", 0x2000) + struct.pack(">I", chance.choice((len(table), 0, 2**31, 5))) + table
        if chance.random() < 0.5:
            data = chance.randbytes(chance.randrange(40))
        try:
            found = amqp_wire.decode_properties(data)
        except ValueError:
            continue
        assert isinstance(found, dict)
