"""Metrics for Prometheus: which series there are, what they count, and what a broker that does not answer costs."""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import anyio
import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.parser import text_string_to_metric_families

from lightbus import Lightbus, Message, Next, Outcome, Receipt, Reject, Retry, errors
from lightbus.inspection.states import queue_states
from lightbus.telemetry import processes, queues
from lightbus.telemetry.families import FAMILIES, HANDLER_SECONDS
from lightbus.telemetry.prometheus import Metrics
from lightbus.telemetry.series import MOST_WAITING, Histogram
from lightbus.wire import topology
from lightbus.worker.worker import Worker
from tests.bus import OrderCancelled, OrderPlaced, connected, eventually, running
from tests.patience import DELAY, LIMIT, within
from tests.processes import ROOT

pytestmark = pytest.mark.anyio

BEGIN_AT_0 = ("lightbus_events_total", "lightbus_published_total")
PAGE = Path(__file__).parents[2] / "docs" / "howto" / "metrics.md"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def shop(tmp_path: Path) -> Lightbus:
    app = Lightbus("shop", url=f"memory://{tmp_path.name}", retry=Retry(delays=(0.05,)))
    app.event(OrderPlaced)
    app.event(OrderCancelled)
    return app


def samples(registry: CollectorRegistry, name: str, *labels: str) -> dict[str | tuple[str, ...], float]:
    """The samples of this name, by their values of these labels (by default all, except the app). Of events: not 0."""
    found: dict[str | tuple[str, ...], float] = {}
    for metric in registry.collect():
        for sample in metric.samples:
            if sample.name == name and (sample.value or name not in BEGIN_AT_0):
                names = labels or [label for label in sample.labels if label != "app"]
                values = tuple(sample.labels[label] for label in names)
                key = values[0] if len(values) == 1 else values
                assert key not in found, "the same series twice"
                found[key] = sample.value
    return found


def outcome(event: str, **fields: object) -> Outcome:
    message = Message(
        id="1", event=event, source="shop", time=datetime.now(UTC), version=1, attempt=1, correlation_id="1",
        causation_id=None, headers={}, body=b"{}", redelivered=False,
    )  # fmt: skip
    return Outcome(**{"kind": "published", "app": "shop", "message": message, **fields})  # type: ignore[arg-type]


# --- names ------------------------------------------------------------------------------------


def test_the_page_lists_the_metrics_of_the_code() -> None:
    rows = re.findall(r"^\| `(lightbus_\w+)` \| (\w+) \| (.*?) \| (.*?) \|$", PAGE.read_text(), re.MULTILINE)
    assert [(name, kind, re.findall(r"`(\w+)`", labels)) for name, kind, labels, _ in rows] == [
        (family.name, family.kind, list(family.labels)) for family in FAMILIES
    ]
    for name, kind, _, meaning in rows:
        (family,) = (family for family in FAMILIES if family.name == name)
        assert family.help.endswith(".")
        assert meaning
        assert (family.name.endswith("_total")) == (kind == "counter")
        if "seconds" in name:
            assert "econds" in family.help or "long" in family.help or "From" in family.help or "age" in family.help


def test_the_page_gives_the_limits_of_the_code() -> None:
    text = " ".join(PAGE.read_text().split())
    assert f"at most every {queues.EVERY:g} seconds" in text
    assert f"waits up to {queues.LIMIT:g} seconds" in text


# --- what is counted --------------------------------------------------------------------------


async def test_each_outcome_of_an_attempt_is_counted(shop: Lightbus, registry: CollectorRegistry) -> None:
    Metrics(shop, registry=registry)

    class Skips:
        async def handle(self, message: Message, call_next: Next) -> None:
            if message.body != b'{"note":"skip","number":0}':
                await call_next()

    @shop.on(OrderPlaced, middleware=[Skips])
    async def bill(order: OrderPlaced, message: Message) -> None:
        if order.note == "once" and message.attempt == 1:
            raise ValueError
        if order.note == "reject":
            raise Reject("no")

    async with running(shop):
        for note in ("", "", "skip", "once", "reject"):
            await shop.publish(OrderPlaced(number=0, note=note))
        await eventually(
            lambda: samples(registry, "lightbus_events_total", "handler", "outcome"),
            {("bill", "handled"): 3, ("bill", "skipped"): 1, ("bill", "retried"): 1, ("bill", "dead"): 1},
        )
    assert samples(registry, "lightbus_handler_seconds_count", "queue", "handler") == {("shop.main", "bill"): 6}
    assert samples(registry, "lightbus_handler_seconds_bucket", "handler", "le")["bill", "+Inf"] == 6
    assert samples(registry, "lightbus_published_total") == {("order.placed", "published"): 5}
    assert samples(registry, "lightbus_publish_seconds_count", "app") == {"shop": 5}


def test_counters_begin_at_0_before_the_first_failure(shop: Lightbus, registry: CollectorRegistry) -> None:
    """Prometheus' `increase` does not see the first event of a series that begins at 1."""
    metrics = Metrics(shop, registry=registry)
    shop.on(OrderPlaced, name="bill")(lambda: None)
    metrics.watch(Worker(shop))
    _, text = metrics.page("")
    for outcome in ("handled", "skipped", "retried", "dead", "redelivered"):
        assert f'app="shop",handler="bill",outcome="{outcome}",queue="shop.main"}} 0.0'.encode() in text
    for outcome in ("published", "unrouted", "failed"):
        assert f'app="shop",event="order.placed",outcome="{outcome}"}} 0.0'.encode() in text


async def test_an_event_without_a_handler_has_an_empty_handler(shop: Lightbus, registry: CollectorRegistry) -> None:
    metrics = Metrics(shop, registry=registry)
    shop.observe(lambda outcome: None)
    assert shop.observer is not None
    shop.observer(outcome("odd", kind="dead", queue="shop.main"))
    assert samples(metrics.registry, "lightbus_events_total", "handler", "outcome") == {("", "dead"): 1}
    assert samples(metrics.registry, "lightbus_handler_seconds_count") == {}


async def test_a_handler_of_all_events_is_one_series(shop: Lightbus, registry: CollectorRegistry) -> None:
    Metrics(shop, registry=registry)
    received: list[str] = []
    shop.on("#", queue="audit", name="audit")(lambda message: received.append(message.event)).__annotations__ = {}

    async with running(shop, queues=["audit"]):
        await shop.publish(OrderPlaced(number=1))
        await shop.publish(OrderCancelled(number=1))
        await eventually(lambda: samples(registry, "lightbus_events_total", "handler"), {"audit": 2})
    assert sum(samples(registry, "lightbus_event_age_seconds_count").values()) >= 1


def test_events_that_the_app_has_not_declared_share_a_series(shop: Lightbus, registry: CollectorRegistry) -> None:
    Metrics(shop, registry=registry)
    assert shop.observer is not None
    for number in range(50):
        shop.observer(outcome(f"order.{number}", receipt=Receipt("1", True)))
    shop.observer(outcome("order.placed", receipt=Receipt("1", False)))
    shop.observer(outcome("order.placed", kind="failed", error=errors.PublishTimeout("late")))
    assert samples(registry, "lightbus_published_total") == {
        ("other", "published"): 50,
        ("order.placed", "unrouted"): 1,
        ("order.placed", "failed"): 1,
    }


@pytest.mark.parametrize(("delay", "age"), [(0, 40.0), (30, 10.0), (600, 0.0)])
def test_the_age_begins_at_the_end_of_the_delay(
    shop: Lightbus, registry: CollectorRegistry, delay: int, age: float
) -> None:
    Metrics(shop, registry=registry)
    assert shop.observer is not None
    message = Message(
        id="1", event="order.placed", source="shop", time=datetime.now(UTC) - timedelta(seconds=40), version=1,
        attempt=1, correlation_id="1", causation_id=None, headers={}, body=b"{}", redelivered=False, delay=delay,
    )  # fmt: skip
    shop.observer(Outcome(kind="handled", app="shop", message=message, handler="bill", queue="shop.main"))
    (measured,) = samples(registry, "lightbus_event_age_seconds_sum").values()
    assert age <= measured < age + DELAY


def test_later_attempts_and_redeliveries_have_no_age(shop: Lightbus, registry: CollectorRegistry) -> None:
    Metrics(shop, registry=registry)
    assert shop.observer is not None
    for kind, attempt in (("handled", 2), ("redelivered", 1)):
        shop.observer(outcome("order.placed", kind=kind, handler="bill", queue="shop.main", attempt=attempt))
    assert sum(samples(registry, "lightbus_event_age_seconds_count").values()) == 0


@pytest.mark.parametrize(
    ("one", "total", "seconds"),
    [
        (
            outcome("order.placed", receipt=Receipt("1", True), seconds=0.25),
            "lightbus_published_total",
            "lightbus_publish_seconds",
        ),
        (
            outcome("order.placed", kind="handled", handler="bill", queue="shop.main", seconds=0.25),
            "lightbus_events_total",
            "lightbus_handler_seconds",
        ),
    ],
    ids=["publishes", "attempts"],
)
def test_counts_of_many_threads_are_exact(
    shop: Lightbus, registry: CollectorRegistry, one: Outcome, total: str, seconds: str
) -> None:
    Metrics(shop, registry=registry)
    observe = shop.observer
    assert observe is not None
    started = threading.Barrier(4)

    def publish() -> None:
        started.wait(LIMIT)
        for _ in range(5000):
            observe(one)

    threads = [threading.Thread(target=publish) for _ in range(3)]
    for thread in threads:
        thread.start()
    started.wait(LIMIT)
    while any(thread.is_alive() for thread in threads):
        samples(registry, f"{seconds}_count")
    assert samples(registry, total, "app") == {"shop": 15_000}
    assert samples(registry, f"{seconds}_count", "app") == {"shop": 15_000}
    assert samples(registry, f"{seconds}_sum", "app") == {"shop": 15_000 * 0.25}


@pytest.mark.parametrize("seconds", [[], [0.0005], [0.001, 0.0025, 300.0], [0.0, 0.3, 0.3, 0.25, 400.0, 0.26, 1.0]])
def test_a_histogram_takes_many_values_at_once_as_one_by_one(seconds: list[float]) -> None:
    at_once, one_by_one = (Histogram(HANDLER_SECONDS, ("shop", "main", name)) for name in ("bill", "pack"))
    at_once.observe_all(seconds)
    for value in seconds:
        one_by_one.observe(value)
    for histogram in (at_once, one_by_one):
        histogram.flush()
    assert at_once.read() == one_by_one.read()
    assert at_once.read()[0][-1][1] == len(seconds)


def test_attempts_that_nobody_reads_are_added_up(shop: Lightbus, registry: CollectorRegistry) -> None:
    metrics = Metrics(shop, registry=registry)
    assert shop.observer is not None
    for number in range(MOST_WAITING * 2 + 3):
        shop.observer(outcome("order.placed", kind="handled", handler="bill", queue="shop.main", seconds=number))
    assert [len(tally.waiting) for tally in metrics._series._tallies] == [3]


# --- a registry -------------------------------------------------------------------------------


def test_apps_of_one_process_share_the_families(shop: Lightbus, registry: CollectorRegistry) -> None:
    billing = Lightbus("billing", url="memory://")
    page, _ = (Metrics(app, registry=registry) for app in (shop, billing))
    for app in (shop, billing):
        assert app.observer is not None
        app.observer(outcome("order.placed", app=app.name, receipt=Receipt("1", True)))
    assert samples(registry, "lightbus_published_total", "app") == {"shop": 1, "billing": 1}
    content_type, text = page.page("")
    assert content_type == "text/plain; version=0.0.4; charset=utf-8"
    assert text.count(b"# TYPE lightbus_published_total counter") == 1


def test_metrics_of_other_libraries_are_on_the_page(shop: Lightbus, registry: CollectorRegistry) -> None:
    Counter("signups", "People who have signed up", registry=registry).inc(3)
    _, text = Metrics(shop, registry=registry).page("text/plain")
    assert b"signups_total 3.0" in text


def test_the_page_is_in_the_format_that_prometheus_asks_for(shop: Lightbus, registry: CollectorRegistry) -> None:
    metrics = Metrics(shop, registry=registry)
    content_type, text = metrics.page("application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2")
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    assert text.endswith(b"# EOF\n")
    _, plain = metrics.page("*/*")
    names = {metric.name for metric in text_string_to_metric_families(plain.decode())}
    assert "lightbus_publish_seconds" in names


def test_an_app_has_metrics_once(shop: Lightbus, registry: CollectorRegistry) -> None:
    metrics = Metrics(shop, registry=registry)
    assert Metrics.of(shop) is metrics
    with pytest.raises(errors.InvalidOption, match=r"^app 'shop' has Metrics already\. Create them once"):
        Metrics(shop)


def test_an_app_that_is_dropped_leaves_its_counters_only(registry: CollectorRegistry) -> None:
    app = Lightbus("gone", url="memory://")
    metrics = Metrics(app, registry=registry)
    assert app.observer is not None
    app.observer(outcome("order.placed", receipt=Receipt("1", True)))
    left = weakref.ref(app), weakref.ref(metrics)
    del app, metrics
    gc.collect()
    assert [reference() for reference in left] == [None, None]
    assert samples(registry, "lightbus_published_total", "event") == {"other": 1}


# --- what is so now ---------------------------------------------------------------------------


@pytest.mark.usefixtures("patient_scrapes")
async def test_a_worker_shows_what_it_does_now(shop: Lightbus, registry: CollectorRegistry) -> None:
    metrics = Metrics(shop, registry=registry)
    held = anyio.Event()

    @shop.on(OrderPlaced, queue="slow")
    async def bill(order: OrderPlaced) -> None:
        await held.wait()

    worker = Worker(shop)
    metrics.watch(worker)
    stop, started = anyio.Event(), anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(worker.serve, stop, started.set)
        await started.wait()
        assert samples(registry, "lightbus_connected", "connection") == {"consumer": 1}
        await shop.publish_many([OrderPlaced(number=number) for number in range(3)])
        await eventually(lambda: samples(registry, "lightbus_running_handlers"), {"shop.main": 0, "shop.slow": 3})
        assert samples(registry, "lightbus_prefetched_events") == {"shop.main": 0, "shop.slow": 3}
        assert samples(registry, "lightbus_connected", "connection") == {"consumer": 1, "publisher": 1}
        assert samples(registry, "lightbus_connections_lost_total") == {"consumer": 0, "publisher": 0}
        assert samples(registry, "lightbus_ready", "app") == {"shop": 1}
        assert samples(registry, "lightbus_queue_consumers") == {"shop.main": 1, "shop.slow": 1}
        assert samples(registry, "lightbus_dead_letters") == {"shop.dead": 0}
        held.set()
        stop.set()
    assert samples(registry, "lightbus_connected", "connection")["consumer"] == 0


async def test_counters_go_on_with_the_next_worker(shop: Lightbus, registry: CollectorRegistry) -> None:
    shop.on(OrderPlaced, name="note")(lambda order: None)
    metrics = Metrics(shop, registry=registry)
    for blocks, expected in ((3, 3), (0, 3), (2, 5)):
        worker = Worker(shop)
        metrics.watch(worker)
        worker.blocked["note"] += blocks
        assert samples(registry, "lightbus_event_loop_blocked_total", "handler")["note"] == expected


@pytest.mark.usefixtures("patient_scrapes")
async def test_the_depth_and_the_age_of_a_queue(shop: Lightbus, registry: CollectorRegistry) -> None:
    Metrics(shop, registry=registry, queues=True)
    shop.on(OrderPlaced)(lambda: None)
    async with running(shop):
        pass
    async with shop:
        await shop.publish(OrderPlaced(number=1), time=datetime.now(UTC) - timedelta(minutes=5))
        await shop.publish(OrderPlaced(number=2))
    assert samples(registry, "lightbus_queue_messages") == {"shop.main": 2}
    assert samples(registry, "lightbus_queue_consumers") == {"shop.main": 0}
    age = samples(registry, "lightbus_queue_oldest_seconds")["shop.main"]
    assert 300 <= age < 300 + LIMIT


@pytest.mark.usefixtures("patient_scrapes")
async def test_the_age_of_a_queue_begins_at_the_end_of_a_delay(shop: Lightbus, registry: CollectorRegistry) -> None:
    Metrics(shop, registry=registry, queues=True)
    shop.on(OrderPlaced)(lambda: None)
    async with running(shop):
        pass
    publication = shop.prepare(OrderPlaced(number=1), time=datetime.now(UTC) - timedelta(seconds=300))
    publication.properties["headers"] |= topology.delay_headers(200)
    async with shop:
        await shop.publisher.publish(publication)
    age = samples(registry, "lightbus_queue_oldest_seconds")["shop.main"]
    assert 100 <= age < 100 + LIMIT


@pytest.mark.usefixtures("patient_scrapes")
async def test_the_age_of_a_queue_begins_again_with_each_retry(shop: Lightbus, registry: CollectorRegistry) -> None:
    Metrics(shop, registry=registry, queues=True)
    failed = anyio.Event()

    @shop.on(OrderPlaced, retry=Retry((1,) * 100, jitter=0))  # however slowly the worker stops, there is a next one
    async def fail(event: OrderPlaced) -> None:
        failed.set()
        raise ConnectionError

    async with running(shop):
        await shop.publish(OrderPlaced(number=1), time=datetime.now(UTC) - timedelta(minutes=5))
        await eventually(failed.is_set)

    def waiting() -> int:
        with connected(shop) as connection:
            return queue_states(connection, ["shop.main"])[0].ready

    await eventually(waiting, 1)
    assert samples(registry, "lightbus_queue_oldest_seconds")["shop.main"] < LIMIT


def test_only_folders_that_no_supervisor_uses_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv(processes.VARIABLE, raising=False)
    used = processes.SharedFolder()
    abandoned, strange = tmp_path / f"{processes.PREFIX}abandoned", tmp_path / f"{processes.PREFIX}strange"
    for folder in (abandoned, strange):
        folder.mkdir()
    (abandoned / processes.LOCK).touch()
    os.mkfifo(strange / processes.LOCK)
    made: list[processes.SharedFolder] = []
    making = threading.Thread(target=lambda: made.append(processes.SharedFolder()), daemon=True)
    making.start()
    making.join(LIMIT)
    assert made, "it waits for the other end of a pipe"
    assert not abandoned.exists()
    assert Path(used.path).exists()
    for one in (used, *made):
        one.close()


def test_a_forked_child_does_not_wait_for_a_thread_of_its_parent(
    shop: Lightbus, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    Metrics(shop, registry=registry)
    updating, go_on = threading.Event(), threading.Event()

    def slow(_metrics: Metrics) -> None:
        updating.set()
        go_on.wait(LIMIT)

    with monkeypatch.context() as patched:
        patched.setattr(Metrics, "update", slow)
        scrape = threading.Thread(target=samples, args=(registry, "lightbus_published_total"))
        scrape.start()
        assert updating.wait(LIMIT)
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(int(LIMIT))
            samples(registry, "lightbus_published_total")
            os._exit(0)
        finally:
            os._exit(1)
    go_on.set()
    scrape.join(LIMIT)
    assert os.waitpid(child, 0)[1] == 0


FORKS = """
import os, signal, time
from lightbus import Lightbus
from lightbus.telemetry import processes
from lightbus.telemetry.prometheus import Metrics
from tests.unit.test_metrics import outcome

app = Lightbus("shop", url="memory://")
Metrics(app)
one = outcome("order.placed", kind="handled", handler="bill", queue="shop.main", seconds=0.5)
app.observer(one)
ended, end = os.pipe()
child = os.fork()
if child == 0:
    signal.alarm(60)
    app.observer(one)
    os.read(ended, 1)
    os._exit(0)
deadline = time.monotonic() + 60
while True:
    counts = [
        sample.value
        for family in processes.merged(os.environ["PROMETHEUS_MULTIPROC_DIR"])
        for sample in family.samples
        if sample.name == "lightbus_handler_seconds_count"
    ]
    if counts == [2.0] or time.monotonic() > deadline:
        break
    time.sleep(0.05)
os.write(end, b"1")
os.waitpid(child, 0)
print(counts)
"""


def test_a_forked_child_shows_the_durations_of_its_handlers(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKS],
        env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=2 * LIMIT,
        check=False,
    )
    assert done.stdout == "[2.0]\n", done.stderr


@pytest.fixture
def patient_scrapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queues, "LIMIT", LIMIT)


class SlowBroker:
    """In place of the question to the broker."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked = 0
        self.answers = threading.Event()
        monkeypatch.setattr(queues, "_samples", self._ask)

    def _ask(self, app: Lightbus) -> queues.Samples:
        self.asked += 1
        assert self.answers.wait(LIMIT)
        return [(queues.DEAD_LETTERS, ("shop", "shop.dead"), self.asked)]


@pytest.fixture
def slow_broker(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowBroker]:
    broker = SlowBroker(monkeypatch)
    yield broker
    broker.answers.set()


async def test_a_broker_that_does_not_answer_delays_no_scrape_for_long(
    shop: Lightbus, registry: CollectorRegistry, slow_broker: SlowBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    Metrics(shop, registry=registry, queues=True)
    monkeypatch.setattr(queues, "LIMIT", 0.1)
    for _ in range(3):
        with within(0.1):
            assert samples(registry, "lightbus_dead_letters") == {}
    assert slow_broker.asked == 1, "one question at a time"
    slow_broker.answers.set()
    await eventually(lambda: samples(registry, "lightbus_dead_letters"), {"shop.dead": 1})


@pytest.mark.usefixtures("patient_scrapes")
def test_the_broker_is_asked_rarely_and_an_old_answer_is_left_out(
    shop: Lightbus, registry: CollectorRegistry, slow_broker: SlowBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    Metrics(shop, registry=registry, queues=True)
    slow_broker.answers.set()
    began = time.monotonic()
    assert [samples(registry, "lightbus_dead_letters") for _ in range(5)] == [{"shop.dead": 1}] * 5
    if time.monotonic() - began < queues.EVERY:
        assert slow_broker.asked == 1
    slow_broker.answers.clear()
    monkeypatch.setattr(queues, "EVERY", 0.0)
    monkeypatch.setattr(queues, "LIMIT", 0.1)
    assert samples(registry, "lightbus_dead_letters") == {}


@pytest.mark.usefixtures("patient_scrapes")
async def test_a_broker_that_is_away_is_logged_once(
    shop: Lightbus, registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    away = Lightbus("away", url="amqp://ann:s3cr3t@127.0.0.1:1/")
    Metrics(away, registry=registry, queues=True)
    for _ in range(3):
        assert samples(registry, "lightbus_queue_messages") == {}
    (record,) = [record.getMessage() for record in caplog.records if "/metrics" in record.getMessage()]
    assert record.startswith("/metrics has no numbers of the queues of 'away': No connection to amqp://ann:**@")


def test_an_outbox_shows_its_rows(shop: Lightbus, registry: CollectorRegistry) -> None:
    Metrics(shop, registry=registry)

    class Relays:
        name = "outbox"
        found: dict[str, object] = {"waiting": None, "oldest_seconds": None, "set_aside": None}  # noqa: RUF012

        def health(self) -> dict[str, object]:
            return self.found

    relay = Relays()
    shop.services.append(relay)  # type: ignore[arg-type]
    assert samples(registry, "lightbus_outbox_rows") == {}
    relay.found = {"error": None, "sent": 4, "waiting": 3, "oldest_seconds": 61.5, "set_aside": 1}
    assert samples(registry, "lightbus_outbox_rows") == {"waiting": 3, "failed": 1}
    assert samples(registry, "lightbus_outbox_oldest_seconds", "app") == {"shop": 61.5}
