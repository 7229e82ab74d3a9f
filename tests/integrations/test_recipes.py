"""docs/examples/recipes: each recipe does what docs/howto/recipes.md describes."""

from __future__ import annotations

import importlib.util
import json
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import anyio
import attrs
import pytest
import sentry_sdk
import structlog
from sentry_sdk.envelope import Envelope
from sentry_sdk.transport import Transport

from lightbus import Message, Outcome, Retry
from lightbus.testing import TestBus
from tests.integrations.example import EXAMPLES, PYTHON, Example
from tests.patience import wait_until

pytestmark = pytest.mark.anyio
BOTH_LOOPS = pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
Load = Callable[[str], ModuleType]

SHOP = '''\
"""Publishes one order. Usage: python shop.py ORDER_ID AMOUNT"""

import sys

import attrs

from lightbus import Lightbus

app = Lightbus("shop")


@app.event
@attrs.frozen
class OrderPlaced:
    order_id: int
    amount: int


with app:
    assert app.publish_sync(OrderPlaced(order_id=int(sys.argv[1]), amount=int(sys.argv[2]))).routed
'''


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def database_url(name: str, folder: Path) -> str:
    """The database of this recipe, in this folder."""
    driver = "sqlite" if name == "sqlalchemy_sync" else "sqlite+aiosqlite"
    return f"{driver}:///{folder}/billing.db"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Load:
    """`load("tenant")`: the recipe's module, imported again for this test."""

    def load_one(name: str) -> ModuleType:
        monkeypatch.setenv("DATABASE_URL", database_url(name, tmp_path))
        spec = importlib.util.spec_from_file_location(f"recipe_{name}", EXAMPLES / "recipes" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load_one


async def place(bus: TestBus, *orders: dict[str, Any], headers: dict[str, Any] | None = None) -> None:
    for order in orders:
        await bus.publish("order.placed", order, source="shop", headers=headers)
    await bus.drain()


# --- SQLAlchemy -------------------------------------------------------------------------------


def invoices(folder: Path) -> list[tuple[int, int]]:
    with closing(sqlite3.connect(folder / "billing.db")) as database:
        return database.execute("SELECT order_id, amount FROM invoice ORDER BY order_id").fetchall()


@pytest.mark.parametrize("name", ["sqlalchemy_async", "sqlalchemy_sync", "sqlalchemy_depends"])
async def test_sqlalchemy_commits_what_a_handler_does_and_rolls_back_what_it_rejects(
    name: str, load: Load, tmp_path: Path
) -> None:
    module = load(name)
    async with TestBus(module.app) as bus:
        await place(bus, {"order_id": 1, "amount": 5}, {"order_id": 2, "amount": 0}, {"order_id": 3, "amount": 7})
        assert len(bus.handled("bill")) == 2
        assert [dead.error for dead in bus.dead("bill")] == ["Reject: nothing to pay"]
    assert invoices(tmp_path) == [(1, 5), (3, 7)]


@pytest.mark.parametrize("name", ["sqlalchemy_async", "sqlalchemy_sync"])
async def test_an_error_in_the_commit_fails_the_event(name: str, load: Load, tmp_path: Path) -> None:
    module = load(name)
    module.app.handlers.clear()

    def add(order: Any) -> None:  # without a flush, the database refuses the row at the commit
        module.current_session.get().add(module.Invoice(order_id=order.order_id, amount=None))

    async def add_async(order: Any) -> None:
        add(order)

    handler = add_async if name.endswith("_async") else add
    handler.__annotations__["order"] = module.Order
    module.app.on("order.placed", name="bill")(handler)
    async with TestBus(module.app) as bus:
        await place(bus, {"order_id": 1, "amount": 5})
        assert bus.handled("bill") == []
        (dead,) = bus.dead("bill")
    assert dead.error_type == "sqlalchemy.exc.IntegrityError"
    assert dead.attempt == 6
    assert invoices(tmp_path) == []


async def test_sqlalchemy_rolls_back_a_handler_that_exceeds_its_timeout(load: Load, tmp_path: Path) -> None:
    module = load("sqlalchemy_async")

    @module.app.on("order.placed", source="slow", timeout=0.5, retry=Retry.none())  # type: ignore[untyped-decorator]
    async def hang(message: Message) -> None:
        session = module.current_session.get()
        session.add(module.Invoice(order_id=1, amount=5))
        await session.flush()
        await anyio.sleep_forever()

    module.app.handlers["bill"] = attrs.evolve(module.app.handlers["bill"], source="shop")
    async with TestBus(module.app) as bus:
        await bus.publish("order.placed", {"order_id": 1, "amount": 5}, source="slow")
        await bus.drain()
        await place(bus, {"order_id": 2, "amount": 6})  # the connection is free again, and nothing is locked
        (dead,) = bus.dead("hang")
        assert dead.error_type == "lightbus.errors.HandlerTimeout"
    assert invoices(tmp_path) == [(2, 6)]


@pytest.mark.parametrize("name", ["sqlalchemy_async", "sqlalchemy_sync", "sqlalchemy_depends"])
def test_sqlalchemy_in_a_worker(name: str, example: Callable[[str], Example], url: str) -> None:
    recipes = example("recipes")
    extra = {"DATABASE_URL": database_url(name, recipes.folder)}  # not the developer's
    (recipes.folder / "shop.py").write_text(SHOP)
    with recipes.start("worker", f"{name}:app", url=url, extra=extra) as worker:
        worker.wait_for("Ready")
        for order in (("7", "9"), ("8", "0")):
            done = recipes.run(*PYTHON, "shop.py", *order, url=url)
            assert done.returncode == 0, done.stderr
        worker.wait_for("nothing to pay; dead-lettered to billing.dead")
        wait_until(lambda: invoices(recipes.folder) == [(7, 9)], "the invoice is committed")


# --- Sentry -----------------------------------------------------------------------------------


class Kept(Transport):
    """Keeps what Sentry would send."""

    def __init__(self, options: dict[str, Any] | None = None) -> None:
        super().__init__(options)
        self.events: list[dict[str, Any]] = []

    def capture_envelope(self, envelope: Envelope) -> None:
        event = envelope.get_event()
        if event is not None:
            self.events.append(dict(event))


@pytest.fixture
def sentry() -> Iterator[Kept]:
    """Sentry without a network, and without its integrations, which would change this process for other tests."""
    transport = Kept()
    before = sentry_sdk.get_global_scope().client
    sentry_sdk.init(dsn="https://key@sentry.invalid/1", transport=transport, default_integrations=False)
    yield transport
    sentry_sdk.get_global_scope().set_client(before)


@BOTH_LOOPS
async def test_sentry_gets_each_failure_with_the_tags_of_its_event(load: Load, sentry: Kept) -> None:
    module = load("sentry")
    async with TestBus(module.app, lifespan=False) as bus:
        await place(bus, {"order_id": 1, "amount": -1})
        (dead,) = bus.dead("charge")
    reports = [one for one in sentry.events if "exception" in one]
    assert [(one["level"], one["tags"]["attempt"]) for one in reports] == [
        *(("warning", attempt) for attempt in range(1, 6)),
        ("error", 6),
    ]
    for report in reports:
        assert report["tags"]["handler"] == "charge"
        assert report["tags"]["event"] == "order.placed"
        assert report["tags"]["event_id"] == dead.message.id
        (exception,) = report["exception"]["values"]
        assert (exception["type"], exception["value"]) == ("ValueError", "nothing to pay")
        assert exception["stacktrace"]["frames"][-1]["function"] == "charge"


@BOTH_LOOPS
async def test_what_a_handler_reports_to_sentry_has_the_tags_of_its_own_event(load: Load, sentry: Kept) -> None:
    module = load("sentry")
    async with TestBus(module.app, lifespan=False) as bus:
        await place(bus, *[{"order_id": number, "amount": 2000} for number in range(5)])
        ids = {one.message.id for one in bus.handled("charge")}
    assert sorted(one["message"] for one in sentry.events) == ["A large label"] * 5 + ["A large order"] * 5
    for message in ("A large label", "A large order"):
        assert {one["tags"]["event_id"] for one in sentry.events if one["message"] == message} == ids


async def test_sentry_gets_timeouts_too(load: Load, sentry: Kept) -> None:
    module = load("sentry")
    module.app.handlers.clear()

    @module.app.on("order.placed", timeout=0.1, retry=Retry.none())  # type: ignore[untyped-decorator]
    async def hang(order: dict[str, Any]) -> None:
        await anyio.sleep_forever()

    async with TestBus(module.app, lifespan=False) as bus:
        await place(bus, {"order_id": 1, "amount": 1})
        assert len(bus.dead("hang")) == 1
    (report,) = sentry.events
    assert report["exception"]["values"][-1]["type"] == "HandlerTimeout"
    assert (report["level"], report["tags"]["handler"]) == ("error", "hang")


SENTRY_ONCE = '''\
"""Runs the recipe with Sentry's default integrations, and prints the level and the tags of each report."""

import anyio
import sentry
import sentry_sdk
from sentry_sdk.transport import Transport

from lightbus.testing import TestBus


class Printing(Transport):
    def capture_envelope(self, envelope):
        event = envelope.get_event()
        print(event["level"], event.get("tags", {}).get("handler"))


init = sentry_sdk.init
sentry_sdk.init = lambda: init(dsn="https://key@sentry.invalid/1", transport=Printing())


async def main():
    async with TestBus(sentry.app) as bus:
        await bus.publish("order.placed", {"order_id": 1, "amount": 0}, source="shop")
        await bus.drain()
        bus.dead()


anyio.run(main)
'''


def test_sentry_gets_each_failure_once_although_the_worker_logs_it(example: Callable[[str], Example]) -> None:
    recipes = example("recipes")
    (recipes.folder / "once.py").write_text(SENTRY_ONCE)
    done = recipes.run(*PYTHON, "once.py", url="memory://")
    assert done.stdout.splitlines() == ["warning charge"] * 5 + ["error charge"], done.stderr


# --- structlog --------------------------------------------------------------------------------


@BOTH_LOOPS
async def test_each_line_of_structlog_names_the_event_that_is_handled(load: Load) -> None:
    module = load("structlog_context")
    orders = [{"order_id": number} for number in range(20)]
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        async with TestBus(module.app, lifespan=False) as bus:
            await place(bus, *orders)
            ids = {one.payload.order_id: one.message.id for one in bus.handled("charge")}
    assert len(lines) == 40
    for line in lines:
        assert line["event"] in ("Charged", "Printed")
        assert line["event_id"] == ids[line["order_id"]]
        assert (line["event_name"], line["attempt"]) == ("order.placed", 1)
    assert structlog.contextvars.get_contextvars() == {}


def test_structlog_in_a_worker(example: Callable[[str], Example], url: str) -> None:
    recipes = example("recipes")
    (recipes.folder / "shop.py").write_text(SHOP)
    with recipes.start("worker", "structlog_context:app", url=url) as worker:
        worker.wait_for("Ready")
        assert recipes.run(*PYTHON, "shop.py", "7", "9", url=url).returncode == 0
        line = json.loads(worker.wait_for(r'\{.*"event": "Printed".*\}')[0])
    assert (line["order_id"], line["event_name"], line["attempt"]) == (7, "order.placed", 1)


# --- tenant -----------------------------------------------------------------------------------


@BOTH_LOOPS
async def test_events_that_a_handler_publishes_have_the_tenant_of_the_event_that_it_handles(load: Load) -> None:
    module = load("tenant")
    async with TestBus(module.app) as bus:
        for number in range(20):
            headers = {"tenant": f"tenant-{number}"}
            await bus.publish("order.placed", {"order_id": number}, source="shop", headers=headers)
        await bus.drain()
        for event in ("invoice.sent", "label.printed"):
            published = [one for one in bus.published() if one.event == event]
            assert {one.payload.order_id: one.message.headers["tenant"] for one in published} == {
                number: f"tenant-{number}" for number in range(20)
            }


async def test_an_event_without_a_tenant_becomes_a_dead_letter(load: Load) -> None:
    module = load("tenant")
    async with TestBus(module.app) as bus:
        await place(bus, {"order_id": 1})
        assert [(dead.error, dead.attempt) for dead in bus.dead()] == [
            ("Reject: order.placed from shop has no tenant header", 1)
        ] * 2


async def test_a_publish_without_a_tenant_is_refused(load: Load) -> None:
    module = load("tenant")
    async with TestBus(module.app) as bus:
        with pytest.raises(RuntimeError, match="InvoiceSent has no tenant"):
            await module.app.publish(module.InvoiceSent(order_id=1))
        await module.app.publish(module.InvoiceSent(order_id=2), headers={"tenant": "acme"})
        assert [one.message.headers["tenant"] for one in bus.published()] == ["acme"]


# --- rate limit -------------------------------------------------------------------------------


@BOTH_LOOPS
@pytest.mark.parametrize("name", ["send_text_message", "send_mail"])
async def test_a_rate_limit_spaces_the_runs_of_a_handler_and_loses_nothing(load: Load, name: str) -> None:
    module = load("rate_limit")
    module.app.handlers = {name: module.app.handlers[name]}
    began = time.monotonic()
    async with TestBus(module.app, timeout=30) as bus:
        await place(bus, *[{"order_id": number} for number in range(21)])
        took = time.monotonic() - began
        assert len(bus.handled(name)) == 21
        assert bus.failed() == []
    assert sorted(module.sent) == list(range(21))
    assert took >= 20 / 20  # seconds: 21 runs at 20 per second


# --- idempotency ------------------------------------------------------------------------------


@attrs.define
class Clock:
    seconds: float = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def once(load: Load) -> ModuleType:
    return load("idempotency")


def with_handler(module: ModuleType, function: Callable[[Any], Any], store: Any) -> None:
    """Replace the recipe's handler."""

    async def charge(order: Any) -> None:
        await function(order)

    charge.__annotations__["order"] = module.Order
    module.app.handlers.clear()
    module.app.on("order.placed", middleware=[module.Once(store, "charge")])(charge)


@BOTH_LOOPS
async def test_a_duplicate_is_skipped(once: ModuleType) -> None:
    outcomes: list[Outcome] = []
    once.app.observe(outcomes.append)
    async with TestBus(once.app) as bus:
        for _ in range(3):
            await bus.publish("order.placed", {"order_id": 1}, source="shop", id="o-1")
            await bus.drain()
        await bus.publish("order.placed", {"order_id": 2}, source="shop", id="o-2")
        await bus.drain()
    assert once.charged == [1, 2]
    assert [one.kind for one in outcomes] == ["handled", "skipped", "skipped", "handled"]


@BOTH_LOOPS
async def test_an_event_whose_handler_has_failed_is_not_taken_for_its_own_duplicate(once: ModuleType) -> None:
    errors = [ConnectionError("the bank is down"), None]
    charged: list[int] = []

    async def charge(order: Any) -> None:
        if (error := errors.pop(0)) is not None:
            raise error
        charged.append(order.order_id)

    with_handler(once, charge, once.MemoryStore())
    async with TestBus(once.app) as bus:
        await place(bus, {"order_id": 1})
        assert [one.error for one in bus.failed("charge")] == ["ConnectionError: the bank is down"]
    assert charged == [1]


@BOTH_LOOPS
async def test_two_copies_at_once_run_the_handler_once(once: ModuleType) -> None:
    running, release, charged = anyio.Event(), anyio.Event(), []

    async def charge(order: Any) -> None:
        running.set()
        await release.wait()
        charged.append(order.order_id)

    with_handler(once, charge, once.MemoryStore())
    outcomes: list[Outcome] = []

    def note(outcome: Outcome) -> None:
        outcomes.append(outcome)
        if outcome.kind == "retried":
            release.set()  # the other copy was refused while this one was running

    once.app.observe(note)
    async with TestBus(once.app) as bus:
        await bus.publish("order.placed", {"order_id": 1}, source="shop", id="o-1")
        await running.wait()
        await bus.publish("order.placed", {"order_id": 1}, source="shop", id="o-1")
        await bus.drain()
        assert {type(one.exception) for one in bus.failed("charge")} == {once.StillRunning}
    assert charged == [1]
    assert Counter(one.kind for one in outcomes)["handled"] == 1
    assert outcomes[-1].kind == "skipped"


async def test_an_event_whose_worker_has_crashed_runs_again_when_its_claim_has_expired(once: ModuleType) -> None:
    clock = Clock()
    store = once.MemoryStore(clock)
    charged: list[int] = []

    async def charge(order: Any) -> None:
        charged.append(order.order_id)

    with_handler(once, charge, store)
    assert await store.set("charge:o-1", "running", ex=120, nx=True)  # by a worker that has crashed since

    def pass_time(outcome: Outcome) -> None:
        clock.seconds += outcome.delay or 0

    once.app.observe(pass_time)
    async with TestBus(once.app) as bus:
        await bus.publish("order.placed", {"order_id": 1}, source="shop", id="o-1")
        await bus.drain()
        assert [one.attempt for one in bus.failed("charge")] == [1, 2, 3, 4]  # 1 + 5 + 30 + 120 s
        assert [one.attempt for one in bus.handled("charge")] == [5]
    assert charged == [1]


async def test_an_event_waits_for_its_retry_while_the_store_is_down(once: ModuleType) -> None:
    class Down(once.MemoryStore):  # type: ignore[misc, name-defined]
        async def get(self, name: str) -> str | None:
            raise ConnectionError("no Redis")

    charged: list[int] = []

    async def charge(order: Any) -> None:
        charged.append(order.order_id)

    with_handler(once, charge, Down())
    async with TestBus(once.app) as bus:
        await place(bus, {"order_id": 1})
        assert [dead.error for dead in bus.dead("charge")] == ["ConnectionError: no Redis"]
    assert charged == []
