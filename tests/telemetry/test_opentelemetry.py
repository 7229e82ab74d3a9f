"""The instrumentor: which apps it reaches, what a span knows, and that telemetry never breaks what it watches."""

from __future__ import annotations

import copy
import functools
import gc
import logging
import subprocess
import sys
import threading
import uuid
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, cast

import anyio
import attrs
import pytest
import sqlalchemy as sa
from opentelemetry import context, propagate, trace
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.propagators.composite import CompositePropagator
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased, Sampler, SamplingResult

from lightbus import Depends, Lightbus, Message, Next, NextSync, Reject, Retry, errors
from lightbus.outbox import Outbox, metadata
from lightbus.telemetry import opentelemetry
from lightbus.telemetry.opentelemetry import LightbusInstrumentor
from lightbus.testing import TestBus
from lightbus.transport import Channel, Delivery
from tests.bus import QUICK, OrderCancelled, OrderPlaced, eventually, left_in, running
from tests.conformance.conftest import declare_orders
from tests.patience import LIMIT
from tests.rabbitmq import free_port
from tests.telemetry.conftest import MakeApp, Recorded, instrumented

pytestmark = pytest.mark.anyio

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PUBLISH, PROCESS = "publish shop:order.placed", "process shop:order.placed:billing.main"


@pytest.fixture
def broker_url() -> str:
    return f"memory://{uuid.uuid4().hex}"


def current() -> str:
    """The id of the span that is current here."""
    return f"{trace.get_current_span().get_span_context().span_id:016x}"


# --- handlers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_the_span_is_current_in_handlers_dependencies_and_middleware(
    shop: Lightbus, billing: Lightbus, recorded: Recorded
) -> None:
    seen: dict[str, list[str]] = {"async": [], "sync": []}

    @billing.middleware
    class Note:
        async def handle(self, message: Message, call_next: Next) -> None:
            seen["async"].append(current())
            await call_next()
            seen["async"].append(current())

        def handle_sync(self, message: Message, call_next: NextSync) -> None:
            seen["sync"].append(current())
            call_next()
            seen["sync"].append(current())

    async def session() -> AsyncIterator[str]:
        yield current()

    def sync_session() -> Iterator[str]:
        yield current()

    @billing.on("order.placed", name="async")
    async def handle(order: OrderPlaced, given: Annotated[str, Depends(session)]) -> None:
        seen["async"].append(given)
        await anyio.sleep(0.01)
        seen["async"].append(current())

    @billing.on("order.placed", name="sync")
    def handle_sync(order: OrderPlaced, given: Annotated[str, Depends(sync_session)]) -> None:
        seen["sync"] += [given, current()]

    async with running(billing):
        await shop.publish(OrderPlaced(number=1))
        await eventually(lambda: len(recorded.named(PROCESS)), 2)
    assert current() == "0" * 16
    ids = {one.attributes["lightbus.handler"]: one.id for one in recorded.named(PROCESS)}
    assert seen == {kind: [ids[kind]] * 4 for kind in ("async", "sync")}


async def test_handlers_at_the_same_time_have_their_own_spans(
    shop: Lightbus, billing: Lightbus, recorded: Recorded
) -> None:
    began: dict[int, str] = {}
    ended: dict[int, str] = {}
    all_run = anyio.Event()

    @billing.on("order.placed")
    async def handle(order: OrderPlaced) -> None:
        began[order.number] = current()
        if len(began) == 3:
            all_run.set()
        await all_run.wait()
        ended[order.number] = current()

    async with running(billing):
        await shop.publish_many([OrderPlaced(number=n) for n in range(3)])
        await eventually(lambda: len(recorded.named(PROCESS)), 3)
    assert began == ended
    assert len(set(began.values())) == 3


async def test_a_sync_handler_that_returns_an_awaitable_still_runs(
    shop: Lightbus, billing: Lightbus, recorded: Recorded
) -> None:
    """As a decorator around an async one does. Sync middleware refuses such a handler: the instrumentation is none."""
    seen: list[str] = []

    async def rest() -> None:
        await anyio.sleep(0.05)
        seen.append(current())

    @billing.on("order.placed", retry=Retry.none())
    def handle(payload: dict[str, Any]) -> Any:
        return rest()

    async with running(billing):
        await shop.publish(OrderPlaced(number=1))
        attempt = (await eventually(lambda: recorded.named(PROCESS)))[0]
    assert attempt.outcome == (1, "handled")
    assert seen == [attempt.id]
    assert attempt.seconds >= 0.05


async def test_each_outcome_is_on_the_span_of_its_attempt(
    shop: Lightbus, make_app: MakeApp, recorded: Recorded
) -> None:
    billing = make_app("billing", retry=Retry(delays=(0.05,)))

    async def skip(message: Message, call_next: Next) -> None: ...

    @billing.on("order.placed", middleware=[skip])
    async def skipped(order: OrderPlaced) -> None: ...

    @billing.on("order.placed")
    def rejected(order: OrderPlaced) -> None:
        raise Reject("no such customer")

    @billing.on("order.placed")
    async def failing(order: OrderPlaced) -> None:
        raise LookupError("no stock")

    @billing.on("order.placed", timeout=0.05, retry=Retry.none())
    async def slow(order: OrderPlaced) -> None:
        await anyio.sleep(60)

    async with running(billing):
        await shop.publish(OrderPlaced(number=1))
        await eventually(lambda: len(recorded.named(PROCESS)), 5)
    found = [
        (one.attributes["lightbus.handler"], one.outcome, one.attributes.get("error.type"), one.span.status.status_code)
        for one in recorded.named(PROCESS)
    ]
    unset, error = trace.StatusCode.UNSET, trace.StatusCode.ERROR
    assert sorted(found, key=lambda one: (one[0], one[1])) == [
        ("failing", (1, "retried"), "LookupError", error),
        ("failing", (2, "dead"), "LookupError", error),
        ("rejected", (1, "dead"), "lightbus.errors.Reject", error),
        ("skipped", (1, "skipped"), None, unset),
        ("slow", (1, "dead"), "lightbus.errors.HandlerTimeout", error),
    ]
    attempts = {one.attributes["lightbus.handler"]: one for one in recorded.named(PROCESS)}
    assert attempts["failing"].exceptions == ["LookupError: no stock"]
    assert attempts["failing"].span.status.description == "no stock"
    assert [one.attributes.get("lightbus.delay") for one in recorded.named(PROCESS)].count(0.05) == 1
    assert attempts["slow"].exceptions[0].startswith("lightbus.errors.HandlerTimeout: handler 'slow' ran longer")


async def test_each_outcome_has_one_span_also_when_many_handlers_run(
    shop: Lightbus, billing: Lightbus, recorded: Recorded
) -> None:
    outcomes: Counter[tuple[str | None, int, str]] = Counter()
    billing.observe(lambda outcome: outcomes.update([(outcome.handler, outcome.attempt, outcome.kind)]))

    @billing.on("order.placed", retry=Retry(delays=(0.05,)))
    async def handle(order: OrderPlaced, message: Message) -> None:
        await anyio.sleep(order.number % 3 / 1000)
        if order.number % 5 < 2 and message.attempt <= order.number % 5 + 1:
            raise LookupError("no stock")

    @billing.on("order.placed", retry=Retry.none())
    def handle_sync(order: OrderPlaced) -> None:
        if order.number % 7 == 0:
            raise LookupError("no stock")

    async with running(billing):
        await shop.publish_many([OrderPlaced(number=n) for n in range(350)])
        await eventually(outcomes.total, 350 + 140 + 350)
    assert len(recorded.named(PUBLISH)) == 350
    assert Counter((one.attributes["lightbus.handler"], *one.outcome) for one in recorded.named(PROCESS)) == outcomes
    assert outcomes["handle", 2, "dead"] == 70
    assert outcomes["handle_sync", 1, "dead"] == 50


async def test_a_thread_that_runs_on_after_its_timeout_does_not_change_its_span(
    shop: Lightbus, billing: Lightbus, recorded: Recorded, caplog: pytest.LogCaptureFixture
) -> None:
    let_go, ended = threading.Event(), threading.Event()

    @billing.on("order.placed", timeout=0.05, retry=Retry.none())
    def slow(order: OrderPlaced) -> None:
        let_go.wait()
        ended.set()

    async with running(billing):
        await shop.publish(OrderPlaced(number=1))
        attempt = (await eventually(lambda: recorded.named(PROCESS)))[0]
        let_go.set()
        await eventually(ended.is_set)
    assert attempt.outcome == (1, "dead")
    assert len(recorded.named(PROCESS)) == 1
    assert "ended span" not in caplog.text


async def test_an_event_that_only_a_wildcard_matches_has_a_name_with_few_values(
    shop: Lightbus, billing: Lightbus, recorded: Recorded
) -> None:
    @billing.on("invoice.#", "order.*")
    async def audit(payload: dict[str, Any]) -> None: ...

    async with running(billing):
        await shop.publish(OrderPlaced(number=1))
        attempt = (await eventually(lambda: recorded.named("process shop:order.*:billing.main")))[0]
    assert attempt.attributes["messaging.destination.name"] == "shop:order.placed:billing.main"
    assert attempt.attributes["messaging.destination.template"] == "shop:order.*:billing.main"
    (point,) = recorded.points("messaging.process.duration")
    assert "messaging.destination.name" not in point.attributes


# --- publishing -------------------------------------------------------------------------------


async def test_events_that_the_app_does_not_declare_share_a_name(shop: Lightbus, recorded: Recorded) -> None:
    async with shop:
        for number in range(3):
            publication = attrs.evolve(shop.prepare(OrderPlaced(number=number)), routing_key=f"order.{number}")
            await shop.publisher.publish(publication)
    names = [one.attributes["messaging.destination.name"] for one in recorded.named("publish shop")]
    assert names == ["shop:order.0", "shop:order.1", "shop:order.2"]
    (point,) = recorded.points("messaging.client.sent.messages")
    assert (point.attributes["messaging.destination.template"], point.value) == ("shop", 3)


async def test_a_publishers_own_context_stays_and_its_publish_links_to_it(
    shop: Lightbus, billing: Lightbus, recorded: Recorded
) -> None:
    received: list[Any] = []

    @billing.on("order.placed")
    async def handle(order: OrderPlaced, message: Message) -> None:
        received.append(message.headers["traceparent"])

    async with running(billing):
        with recorded.tracer.start_as_current_span("request"):
            await shop.publish(OrderPlaced(number=1), headers={"traceparent": PARENT})
        await shop.publish(OrderPlaced(number=2), headers={"traceparent": PARENT})
        await shop.publish(OrderPlaced(number=3), headers={"traceparent": "no context"})
        await eventually(lambda: len(recorded.named(PROCESS)), 3)
    assert received == [PARENT, PARENT, "no context"]
    within, alone, other = recorded.named(PUBLISH)
    request = recorded.one("request")
    assert (within.kind, within.parent, within.links) == ("CLIENT", request.id, [SPAN])
    assert (alone.kind, alone.parent, alone.links) == ("CLIENT", SPAN, [SPAN])
    assert (other.kind, other.parent, other.links) == ("PRODUCER", None, [])
    assert [one.parent for one in recorded.named(PROCESS)] == [SPAN, SPAN, None]


async def test_a_hook_of_the_user_that_injects_a_context_wins(
    shop: Lightbus, billing: Lightbus, recorded: Recorded
) -> None:
    @billing.on("order.placed")
    async def handle(order: OrderPlaced) -> None: ...

    @shop.on_publish
    def inject(event: object, headers: dict[str, Any]) -> None:
        propagate.inject(headers)

    async with running(billing):
        with recorded.tracer.start_as_current_span("request"):
            await shop.publish(OrderPlaced(number=1))
        await eventually(lambda: len(recorded.named(PROCESS)), 1)
    request = recorded.one("request")
    assert recorded.one(PROCESS).parent == request.id
    assert recorded.one(PUBLISH).parent == request.id


async def test_other_observers_get_plain_headers(shop: Lightbus, recorded: Recorded) -> None:
    headers: list[dict[str, Any]] = []
    shop.observe(lambda outcome: headers.append(dict(outcome.message.headers)))
    copies: list[Any] = []
    shop.on_publish(lambda event, added: copies.append(copy.deepcopy(added)))
    await shop.publish(OrderPlaced(number=1))
    assert [type(value) for value in headers[0].values()] == [str]
    assert copies == headers
    assert [type(value) for value in copies[0].values()] == [str]


def test_the_instrumentor_does_not_import_what_connects() -> None:
    """`opentelemetry-instrument` imports it in each Python program, also in those that do not use Lightbus."""
    code = "import sys, lightbus.telemetry.opentelemetry; print('kombu' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=LIMIT)
    assert done.stdout == "False\n"


async def test_a_publish_that_fails_has_an_error(recorded: Recorded) -> None:
    shop = declare_orders(Lightbus("shop", url=f"amqp://guest@127.0.0.1:{free_port()}/", publish_timeout=0.05))
    with pytest.raises(errors.PublishUnreachable):
        await shop.publish(OrderPlaced(number=1))
    failed = recorded.one(PUBLISH)
    assert failed.attributes["error.type"] == "lightbus.errors.PublishUnreachable"
    assert failed.exceptions[0].startswith("lightbus.errors.PublishUnreachable: ")
    assert failed.seconds >= 0.05
    shop.publisher.close(0)


async def test_an_event_that_no_queue_takes_is_not_routed(shop: Lightbus, recorded: Recorded) -> None:
    await shop.publish(OrderPlaced(number=1))
    assert recorded.one(PUBLISH).attributes["lightbus.routed"] is False


async def test_an_event_in_an_outbox_is_created_when_it_is_added_and_published_by_the_relay(
    shop: Lightbus, billing: Lightbus, recorded: Recorded, tmp_path: Path
) -> None:
    @billing.on("order.placed")
    async def handle(order: OrderPlaced) -> None: ...

    engine = sa.create_engine(f"sqlite:///{tmp_path}/shop.db")
    metadata.create_all(engine)
    outbox = Outbox(shop, engine)
    async with running(billing):
        with recorded.tracer.start_as_current_span("request"), engine.begin() as connection:
            message_id = outbox.add(connection, OrderPlaced(number=1))
        created = recorded.one("create shop:order.placed")
        assert await outbox.relay.drain() == 1
        await eventually(lambda: len(recorded.named(PROCESS)), 1)
    engine.dispose()
    published, attempt = recorded.one(PUBLISH), recorded.one(PROCESS)
    assert (created.kind, created.parent) == ("PRODUCER", recorded.one("request").id)
    assert created.attributes["messaging.operation.type"] == "create"
    assert (published.kind, published.parent, published.links) == ("CLIENT", created.id, [created.id])
    assert published.attributes["messaging.message.id"] == message_id
    assert attempt.parent == created.id


# --- sampling and limits ----------------------------------------------------------------------


async def test_what_is_not_sampled_is_not_recorded_and_its_context_is_passed_on() -> None:
    broker = f"memory://{uuid.uuid4().hex}"
    for recorded in instrumented(Recorded(ParentBased(ALWAYS_OFF))):
        shop, billing = declare_orders(Lightbus("shop", url=broker)), Lightbus("billing", url=broker, retry=QUICK)
        received: list[tuple[str, bool]] = []

        @billing.on("order.placed")
        async def handle(order: OrderPlaced, message: Message, received: list[tuple[str, bool]] = received) -> None:
            span = trace.get_current_span()
            received.append((message.headers["traceparent"], span.is_recording()))
            assert f"{span.get_span_context().trace_id:032x}" in message.headers["traceparent"]
            if message.attempt == 1:
                raise ValueError("again")

        async with running(billing):
            await shop.publish(OrderPlaced(number=1))
            await eventually(lambda received=received: len(received), 2)
        first, second = received
        assert first == second
        assert int(first[0].rpartition("-")[2], 16) & 1 == 0
        assert first[1] is False
        assert recorded.spans == []
        assert len(recorded.points("messaging.client.sent.messages")) == 1
        for app in (shop, billing):
            app.__exit__(None, None, None)


class LaterAttempts(Sampler):
    """Samples attempts from the second on."""

    def should_sample(
        self, parent_context: Any, trace_id: int, name: str, kind: Any = None, attributes: Any = None, *rest: Any
    ) -> SamplingResult:
        sampler = ALWAYS_ON if attributes.get("lightbus.attempt", 1) > 1 else ALWAYS_OFF
        return sampler.should_sample(parent_context, trace_id, name, kind, attributes, *rest)

    def get_description(self) -> str:
        return "later attempts"


async def test_a_sampler_sees_which_attempt_it_is() -> None:
    broker = f"memory://{uuid.uuid4().hex}"
    recorded = Recorded(LaterAttempts())
    for _ in instrumented(recorded):
        shop, billing = declare_orders(Lightbus("shop", url=broker)), Lightbus("billing", url=broker, retry=QUICK)

        @billing.on("order.placed")
        async def handle(order: OrderPlaced, message: Message) -> None:
            if message.attempt < 3:
                raise ValueError("again")

        async with running(billing):
            await shop.publish(OrderPlaced(number=1))
            await eventually(lambda: len(recorded.spans), 2)
        assert [one.attributes["lightbus.outcome"] for one in recorded.spans] == ["retried", "handled"]
        for app in (shop, billing):
            app.__exit__(None, None, None)


async def test_without_an_sdk_the_context_is_passed_on(broker_url: str) -> None:
    shop, billing = (
        declare_orders(Lightbus("shop", url=broker_url)),
        declare_orders(Lightbus("billing", url=broker_url)),
    )
    received: list[str] = []

    @billing.on("order.placed")
    async def handle(order: OrderPlaced, message: Message) -> None:
        received.append(message.headers["traceparent"])
        await billing.publish(OrderCancelled(number=1))

    @billing.on("order.cancelled")
    def note(order: OrderCancelled, message: Message) -> None:
        received.append(message.headers["traceparent"])

    LightbusInstrumentor().instrument(tracer_provider=trace.NoOpTracerProvider())
    try:
        async with running(billing):
            token = context.attach(propagate.extract({"traceparent": PARENT}))
            await shop.publish(OrderPlaced(number=1))
            context.detach(token)
            await eventually(lambda: received, [PARENT, PARENT])
    finally:
        LightbusInstrumentor().uninstrument()
    for app in (shop, billing):
        app.__exit__(None, None, None)


async def test_the_span_of_an_event_that_is_never_sent_goes_with_it(shop: Lightbus, recorded: Recorded) -> None:
    started: list[weakref.ref[Any]] = []

    class Note(SpanProcessor):
        def on_start(self, span: Any, parent_context: Any = None) -> None:
            started.append(weakref.ref(span))

    recorded.tracers.add_span_processor(Note())
    for _ in range(50):
        with pytest.raises(errors.InvalidPayload):
            await shop.publish(OrderPlaced(number="one"))  # type: ignore[arg-type]
    gc.collect()
    assert len(started) == 50
    assert [one for one in started if one() is not None] == []
    assert recorded.spans == []


async def test_runs_whose_outcome_is_never_known_are_limited(
    shop: Lightbus, billing: Lightbus, recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opentelemetry, "RUNNING", 2)
    let_go = anyio.Event()

    @billing.on("order.placed")
    async def handle(order: OrderPlaced) -> None:
        await let_go.wait()

    async with running(billing):
        await shop.publish_many([OrderPlaced(number=n) for n in range(5)])
        await eventually(lambda: len(recorded.named(PROCESS)), 3)
        assert ["lightbus.outcome" in one.attributes for one in recorded.named(PROCESS)] == [False] * 3
        assert all(one.attributes["lightbus.attempt"] == 1 for one in recorded.named(PROCESS))
        let_go.set()
        await eventually(lambda: len(recorded.named(PROCESS)), 5)
        assert [one.outcome for one in recorded.named(PROCESS)[3:]] == [(1, "handled")] * 2


async def test_the_span_of_a_handler_that_runs_ends_where_the_app_is_uninstrumented(
    shop: Lightbus, billing: Lightbus, recorded: Recorded, caplog: pytest.LogCaptureFixture
) -> None:
    began, let_go, ended = anyio.Event(), anyio.Event(), anyio.Event()

    @billing.on("order.placed")
    async def handle(order: OrderPlaced) -> None:
        began.set()
        await let_go.wait()
        ended.set()

    async with running(billing) as bus:
        await shop.publish(OrderPlaced(number=1))
        await began.wait()
        LightbusInstrumentor().uninstrument()
        let_go.set()
        await ended.wait()
        await bus.quiet(billing)
    attempt = recorded.one(PROCESS)
    assert attempt.attributes["lightbus.attempt"] == 1
    assert "lightbus.outcome" not in attempt.attributes
    assert "ended span" not in caplog.text


# --- metrics ----------------------------------------------------------------------------------


async def test_the_metrics_are_those_of_the_conventions(shop: Lightbus, billing: Lightbus, recorded: Recorded) -> None:
    @billing.on("order.placed", retry=Retry.none())
    async def handle(order: OrderPlaced) -> None:
        if order.number == 1:
            raise LookupError("no stock")

    async with running(billing):
        await shop.publish_many([OrderPlaced(number=n) for n in range(3)])
        await eventually(lambda: len(recorded.named(PROCESS)), 3)
    sent = {
        "messaging.system": "lightbus",
        "messaging.operation.name": "publish",
        "messaging.operation.type": "send",
        "messaging.destination.name": "shop:order.placed",
    }
    processed = {
        "messaging.system": "lightbus",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": "shop:order.placed:billing.main",
    }
    failed = {**processed, "error.type": "LookupError"}

    def values(metric: str, value: str) -> list[tuple[dict[str, Any], Any]]:
        found = [(dict(point.attributes), getattr(point, value)) for point in recorded.points(metric)]
        return sorted(found, key=lambda one: len(one[0]))

    assert values("messaging.client.sent.messages", "value") == [(sent, 3)]
    assert values("messaging.client.operation.duration", "count") == [(sent, 3)]
    assert values("messaging.client.consumed.messages", "value") == [(processed, 2), (failed, 1)]
    assert values("messaging.process.duration", "count") == [(processed, 2), (failed, 1)]
    (point, _) = sorted(recorded.points("messaging.process.duration"), key=lambda one: len(one.attributes))
    assert point.explicit_bounds == (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
    assert 0 < point.sum < LIMIT


# --- which apps -------------------------------------------------------------------------------


async def test_apps_in_a_test_bus_are_traced(shop: Lightbus, billing: Lightbus, recorded: Recorded) -> None:
    @billing.on("order.placed")
    async def handle(order: OrderPlaced, message: Message) -> None:
        if message.attempt == 1:
            raise LookupError("no stock")

    async with TestBus(shop, billing) as bus:
        with recorded.tracer.start_as_current_span("test"):
            await shop.publish(OrderPlaced(number=1))
        await bus.drain()
        assert [one.event for one in bus.published()] == ["order.placed"]
    assert {one.trace for one in recorded.spans} == {recorded.one("test").trace}
    assert [one.outcome for one in recorded.named(PROCESS)] == [(1, "retried"), (2, "handled")]


async def test_one_app_may_be_instrumented_by_hand_until_that_is_undone() -> None:
    recorded, instrumentor = Recorded(), LightbusInstrumentor()
    broker = f"memory://{uuid.uuid4().hex}"
    shop, billing = declare_orders(Lightbus("shop", url=broker)), Lightbus("billing", url=broker)
    seen: list[str] = []

    @billing.on("order.placed")
    async def handle(order: OrderPlaced) -> None:
        seen.append(current())

    instrumentor.instrument_app(billing, tracer_provider=recorded.tracers, meter_provider=recorded.meters)
    async with running(billing):
        await shop.publish(OrderPlaced(number=1))
        await eventually(lambda: [one.name for one in recorded.spans], [PROCESS])
        instrumentor.uninstrument_app(billing)
        await shop.publish(OrderPlaced(number=2))
        await eventually(lambda: len(seen), 2)
        instrumentor.instrument_app(billing, tracer_provider=recorded.tracers)
        await shop.publish(OrderPlaced(number=3))
        await eventually(lambda: [one.name for one in recorded.spans], [PROCESS] * 2)
    assert seen == [recorded.spans[0].id, "0" * 16, recorded.spans[1].id]
    instrumentor.uninstrument_app(billing)
    with pytest.raises(errors.InvalidOption, match=r"observe\(\) must be called before the app's first publish"):
        instrumentor.instrument_app(shop)
    for app in (shop, billing):
        app.__exit__(None, None, None)


async def test_instrument_reaches_apps_of_before_and_after_and_warns_of_one_that_has_published(
    caplog: pytest.LogCaptureFixture, broker_url: str
) -> None:
    before = declare_orders(Lightbus("before", url=broker_url))
    published = declare_orders(Lightbus("published", url=broker_url))
    await published.publish(OrderPlaced(number=1))
    for recorded in instrumented(Recorded()):
        assert LightbusInstrumentor().is_instrumented_by_opentelemetry
        assert "App 'published' is not traced: it has published already. Call LightbusInstrumentor()" in caplog.text
        after = declare_orders(Lightbus("after", url=broker_url))
        for app in (before, published, after):
            await app.publish(OrderPlaced(number=2))
        assert [one.name for one in recorded.spans] == ["publish before:order.placed", "publish after:order.placed"]
        LightbusInstrumentor().instrument()
        assert "Lightbus is instrumented already." in caplog.text
    assert not LightbusInstrumentor().is_instrumented_by_opentelemetry
    for app in (before, after):
        await app.publish(OrderPlaced(number=3))
    assert len(recorded.spans) == 2
    for app in (before, published, after):
        app.__exit__(None, None, None)


def test_opentelemetry_instrument_finds_it_by_its_entry_point() -> None:
    found = entry_points(group="opentelemetry_instrumentor")["lightbus"]
    assert found.load() is LightbusInstrumentor
    assert found.load()() is LightbusInstrumentor()


def test_an_instrumented_app_is_not_kept(recorded: Recorded) -> None:
    app = weakref.ref(Lightbus("billing"))
    gc.collect()
    assert app() is None


# --- telemetry that fails ---------------------------------------------------------------------


@pytest.mark.parametrize("propagators", [[], [W3CBaggagePropagator()]], ids=["none", "baggage"])
async def test_a_publish_without_a_header_for_its_span_has_its_parent(
    shop: Lightbus, recorded: Recorded, request: pytest.FixtureRequest, propagators: list[Any]
) -> None:
    """As with OTEL_PROPAGATORS=none: no other service can continue the trace, but this one has it whole."""
    request.addfinalizer(functools.partial(propagate.set_global_textmap, propagate.get_global_textmap()))
    propagate.set_global_textmap(CompositePropagator(propagators))
    with recorded.tracer.start_as_current_span("request") as parent:
        await shop.publish(OrderPlaced(number=1))
        await shop.publish_many([OrderPlaced(number=2)])
    first, second = recorded.named(PUBLISH)
    assert {first.parent, second.parent} == {format(parent.get_span_context().span_id, "016x")}
    assert {first.kind, second.kind} == {"PRODUCER"}


async def test_a_propagator_or_processor_that_fails_breaks_neither_publish_nor_handler(
    shop: Lightbus, billing: Lightbus, recorded: Recorded, caplog: pytest.LogCaptureFixture
) -> None:
    received: list[int] = []

    @billing.on("order.placed")
    async def handle(order: OrderPlaced) -> None:
        received.append(order.number)

    class Broken(SpanProcessor):
        def on_start(self, span: Any, parent_context: Any = None) -> None:
            raise RuntimeError("the processor is broken")

    recorded.tracers.add_span_processor(Broken())
    async with running(billing):
        with caplog.at_level(logging.ERROR, "lightbus"):
            await shop.publish(OrderPlaced(number=1))
            await eventually(lambda: received, [1])
    assert "App 'shop' publishes without a span, since OpenTelemetry has failed." in caplog.text
    assert "Handler 'handle' runs without a span, since OpenTelemetry has failed." in caplog.text
    assert await left_in(billing) == []


async def test_what_cannot_be_printed_or_is_no_utf8_can_still_be_exported(
    shop: Lightbus, billing: Lightbus, recorded: Recorded
) -> None:
    class Unprintable(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    @billing.on("order.placed", retry=Retry.none())
    async def handle(payload: dict[str, Any]) -> None:
        raise Unprintable if payload["number"] == 1 else ValueError("no \udcff")

    @billing.on("odd.#")
    def odd() -> None: ...

    async with running(billing):
        await shop.publish_many([OrderPlaced(number=1), OrderPlaced(number=2)])
        await eventually(lambda: len(recorded.named(PROCESS)), 2)
    first, second = recorded.named(PROCESS)
    assert first.attributes["error.type"].endswith("Unprintable")
    assert first.exceptions[0].endswith("Unprintable: (its __str__ raised RuntimeError)")
    assert second.exceptions == [r"ValueError: no \udcff"]

    one = billing.subscriptions()[0].handlers["odd"]  # the embedded broker has no such keys, RabbitMQ does
    one.function(*one.arguments(Delivery(cast(Channel, None), 1, False, "shop", "odd.\udcff", {}, b"{}")))
    LightbusInstrumentor().uninstrument()
    last = recorded.one("process shop:odd.#:billing.main")
    assert last.attributes["messaging.destination.name"] == r"shop:odd.\udcff:billing.main"
    encode_spans([one.span for one in recorded.spans]).SerializeToString()
