"""docs/howto matches the code: figures are those of the code, and programs do what the pages describe."""

from __future__ import annotations

import importlib.util
import re
import sqlite3
import sys
import uuid
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import anyio
import pytest

from lightbus import Lightbus, Message, Reject, Retry, app, errors, handler, pydantic_models
from lightbus.connection import address
from lightbus.consuming import failure
from lightbus.handler import Handler
from lightbus.outbox import relay, store, sweep
from lightbus.retry import DeadLetter, RetryIn
from lightbus.testing import TestBus
from lightbus.wire.codec import MAX_BODY_BYTES
from lightbus.worker import health, loop_watch, supervisor, worker
from tests.patience import LIMIT

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"


def page(name: str) -> str:
    """The text of the page, without line breaks."""
    return " ".join((ROOT / "docs" / "howto" / f"{name}.md").read_text().split())


def load(path: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    name = f"howto_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


# --- figures ----------------------------------------------------------------------------------


def seconds(figure: float) -> str:
    return f"{figure:,g}"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("retry", f"The default, `{Retry().delays}`, gives six attempts within 13 minutes"),
        ("retry", f"{seconds(handler.TIMEOUT)} seconds by default"),
        ("retry", f"at most {seconds(handler.LONGEST_TIMEOUT)}"),
        ("deployment", f"running handlers may take (`--grace`) | {seconds(worker.GRACE)} |"),
        ("deployment", f"acks, lifespan, disconnecting | {seconds(worker.LAST_STEPS)} |"),
        ("deployment", f"has not ended after | grace + {seconds(2 * worker.LAST_STEPS)} |"),
        ("deployment", f"should wait | {seconds(2 * worker.GRACE)}, or `--grace` + 30 |"),
        ("deployment", f"after {supervisor.FIRST_PAUSE:g} s, doubled each time up to {supervisor.LONGEST_PAUSE:g} s"),
        ("deployment", f"`--concurrency` | {app.CONCURRENCY} |"),
        ("deployment", f"`--prefetch` | {app.PREFETCH} |"),
        ("deployment", f"event loop has not run for {seconds(health.STUCK_LOOP)} s"),
        ("deployment", f"its loop has not run for {seconds(health.SLOW_LOOP)} s"),
        ("logs", f"looks at the loop {('no', 'one', 'two', 'three', 'four', 'five')[loop_watch.LOOKS]} times"),
        ("logs", f"a block is logged after 1 to {1 + 2 / loop_watch.LOOKS:g} times the limit"),
        ("rabbitmq", f"`?heartbeat={address.HEARTBEAT}`"),
        ("rabbitmq", f"`?connect_timeout={address.CONNECT_TIMEOUT:g}`"),
        ("rabbitmq", f"up to {MAX_BODY_BYTES // 1024**2} MiB"),
        ("rabbitmq", f"({app.PREFETCH} / {app.CONCURRENCY}, {handler.TIMEOUT:g} s) that is 7 minutes"),
        (
            "pydantic",
            f"lists {pydantic_models.SHOWN_ERRORS} of them, and of more than {pydantic_models.MOST_LISTED:,} only",
        ),
        ("first-errors", f"for {seconds(app.PUBLISH_TIMEOUT)} seconds (`publish_timeout=`"),
        ("outbox", f"It reads up to {relay.BATCH} rows"),
        ("outbox", f"a row belongs to a relay for {store.LEASE:g} seconds"),
        ("outbox", f"it looks every {relay.POLL:g} seconds"),
        (
            "outbox",
            f"again after {relay.FIRST_BACKOFF:g} seconds, doubled each time up to {relay.LAST_BACKOFF:g}",
        ),
        ("outbox", f"Ids are kept for {sweep.KEEP.days} days"),
    ],
)
def test_a_figure_on_a_page_matches_the_code(name: str, words: str) -> None:
    assert words in page(name)


def test_the_time_to_stop_covers_all_steps_of_a_worker() -> None:
    longest = worker.GRACE + 2 * worker.LAST_STEPS + worker.LAST_STEPS / 2
    unit = (EXAMPLES / "deployment" / "billing-worker.service").read_text()
    pod = (EXAMPLES / "deployment" / "kubernetes.yaml").read_text()
    for found in (re.search(r"TimeoutStopSec=(\d+)", unit), re.search(r"GracePeriodSeconds: (\d+)", pod)):
        assert found is not None
        assert int(found[1]) > longest
    assert sum(Retry().delays) < 13 * 60
    rounds = -(-app.PREFETCH // app.CONCURRENCY)
    assert rounds * handler.TIMEOUT == 7 * 60
    assert failure.COPY_PAUSES[-1] == 5, "every few seconds, says the page on policies"


def test_the_rabbitmq_page_lists_every_declared_argument() -> None:
    text = page("rabbitmq")
    declared = Lightbus("billing", url="memory://").topology()
    by_name = {queue.name: queue.arguments for queue in declared.queues}
    assert len(by_name) == 7
    assert "that is seven queues" in text
    for queue in ("billing.main", "billing.dead"):
        for argument, value in by_name[queue].items():
            assert f"`{argument}={value}`" in text
    retry = by_name["billing.retry.5s"]
    assert set(retry) == {*by_name["billing.main"], "x-message-ttl"} - {"x-delivery-limit"}
    assert f"`x-message-ttl={retry['x-message-ttl']}`" in text
    for exchange in declared.exchanges:
        assert f"| `{exchange.name}` | {exchange.type} exchange" in text


def test_the_permissions_match_the_command() -> None:
    line = re.search(r"rabbitmqctl set_permissions --vhost / billing '.+?' '.+?' '.+?'", page("deployment"))
    assert line is not None
    assert line[0] in (ROOT / "docs" / "operations.md").read_text()


# --- programs ---------------------------------------------------------------------------------


def message(**given: Any) -> Message:
    defaults: dict[str, Any] = {
        "id": str(uuid.uuid4()),
        "event": "order.placed",
        "source": "shop",
        "time": datetime.now(UTC),
        "version": 1,
        "attempt": 1,
        "correlation_id": "c",
        "causation_id": None,
        "headers": {},
        "body": b"{}",
        "redelivered": False,
    }
    return Message(**defaults | given)


def test_retry_schedules_decide_as_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("retries.py", monkeypatch)

    def decide(name: str, error: Exception, attempt: int = 1) -> object:
        handler: Handler = module.app.handlers[name]
        return handler.retry.decide(error, attempt, part=lambda: 1.0)

    assert decide("charge", ConnectionError()) == RetryIn(10, 8.0)
    assert isinstance(decide("charge", ConnectionError(), 7), DeadLetter)
    assert isinstance(decide("charge", module.CardDeclined()), DeadLetter)
    assert isinstance(decide("charge", Reject("nothing to pay")), DeadLetter)
    assert isinstance(decide("notify_warehouse", KeyError()), DeadLetter)
    assert decide("notify_warehouse", TimeoutError(), 2) == RetryIn(30, 30)
    assert isinstance(decide("send_text_message", ConnectionError()), DeadLetter)


def test_a_handler_that_stores_ids_ignores_duplicates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOYALTY_DATABASE", str(tmp_path / "loyalty.db"))
    module = load("once.py", monkeypatch)
    order, first = module.Order(customer="c-1", amount=5), message()
    for one in (first, first, message()):
        module.add_points(order, one)
    with closing(sqlite3.connect(module.DATABASE)) as database:
        assert database.execute("SELECT * FROM points").fetchall() == [("c-1", 10)]


def test_the_replacement_of_a_celery_task_sends_the_mail(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, str]] = []
    done: anyio.Event

    class Server:
        def __init__(self, host: str, port: int) -> None: ...
        def __enter__(self) -> Server:
            return self

        def __exit__(self, *_: object) -> None: ...
        def sendmail(self, sender: str, to: str, text: str) -> None:
            sent.append((to, text.splitlines()[0]))
            anyio.from_thread.run_sync(done.set)

    monkeypatch.setenv("LIGHTBUS_URL", f"memory://{uuid.uuid4()}")
    monkeypatch.setattr("smtplib.SMTP", Server)
    shop, mail = (
        load("migration/after_celery_shop.py", monkeypatch),
        load("migration/after_celery_mail.py", monkeypatch),
    )

    async def main() -> None:
        nonlocal done
        done = anyio.Event()
        listener = mail.app.consumer()
        async with anyio.create_task_group() as tasks:
            await tasks.start(listener.run)
            await anyio.to_thread.run_sync(shop.place_order, 7, "someone@example.com")
            with anyio.fail_after(LIMIT):
                await done.wait()
            await listener.stop(5)
        for one in (shop.app, mail.app):
            one.publisher.close()

    anyio.run(main)
    assert sent == [("someone@example.com", "Subject: Order 7")]


def test_the_replacement_of_a_faststream_service_handles_and_publishes_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LIGHTBUS_URL", f"memory://{uuid.uuid4()}")
    module = load("migration/after_faststream.py", monkeypatch)
    shop, books = Lightbus("shop"), Lightbus("books")

    @shop.event
    class OrderPlaced:
        order_id: int
        amount: int

    charged_orders: list[tuple[str, Any]] = []
    done: anyio.Event

    @books.on("order.charged")
    async def note(charged: dict[str, Any], message: Message) -> None:
        charged_orders.append((message.source, charged))
        done.set()

    async def main() -> None:
        nonlocal done
        done = anyio.Event()
        consumers = [module.app.consumer(), books.consumer()]
        async with shop, module.app, anyio.create_task_group() as tasks:
            for one in consumers:
                await tasks.start(one.run)
            await shop.publish(OrderPlaced(order_id=7, amount=3))
            with anyio.fail_after(LIMIT):
                await done.wait()
            for one in consumers:
                await one.stop(5)

    anyio.run(main)
    assert charged_orders == [("billing", {"order_id": 7})]


@pytest.mark.parametrize("name", ["after_celery_hooks", "after_faststream_middleware"])
def test_the_replacements_of_signals_and_middleware_know_the_tenant(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = load(f"migration/{name}.py", monkeypatch)
    with TestBus(module.app) as bus:
        bus.publish_sync("order.placed", {"order_id": 7}, source="shop", headers={"tenant": "acme"})
        bus.publish_sync("order.placed", {"order_id": "seven"}, source="test")
        bus.drain_sync()
        assert len(bus.dead("charge")) == 1
        if name == "after_celery_hooks":
            assert "acme: order 7\n" in capsys.readouterr().out
            assert module.failures == {"charge": 1}
        else:
            (charged,) = [one for one in bus.published() if one.source == "billing"]
            assert (charged.event, charged.message.headers["tenant"]) == ("order.charged", "acme")


def test_the_pydantic_example_handles_and_refuses_as_described(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = load("accounts.py", monkeypatch)
    opened = module.AccountOpened(user_id=7, email="someone@example.com")
    with TestBus(module.app) as bus:
        module.app.publish_sync(opened)
        module.app.publish_sync(module.AccountClosed(user_id=7))
        bus.publish_sync("account.opened", b'{"userId": "7", "kind": "opened"}', source="accounts")
        bus.drain_sync()
        assert bus.published(module.AccountOpened)[0] == opened
        welcome, audit = bus.dead("welcome"), bus.dead("audit")
        assert welcome[0].error == "DecodeError: the body cannot be read as Account: email: Field required"
        assert audit[0].error.endswith("read as AccountOpened | AccountClosed: opened.email: Field required")
        with pytest.raises(errors.InvalidPayload, match="userId: Input should be greater than 0"):
            module.app.publish_sync(opened.model_copy(update={"user_id": 0}))
    assert sorted(capsys.readouterr().out.splitlines()) == [
        "7 closed the account: no reason",
        "7 opened an account",
        "Welcome, someone@example.com!",
    ]
