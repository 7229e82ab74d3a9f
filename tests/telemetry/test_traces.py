"""One trace over everything that happens to an event, on each broker."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import anyio
import anyio.to_thread
import pytest
from opentelemetry import baggage, context, propagate, trace
from opentelemetry.trace import SpanKind

from lightbus import Lightbus, Retry
from lightbus.dead_letters import actions
from lightbus.dead_letters.letter import Filter
from lightbus.dead_letters.queue import opened
from lightbus.telemetry.opentelemetry import SCHEMA_URL
from lightbus.transport import Publication
from tests.bus import (
    OrderCancelled,
    OrderPlaced,
    connected,
    dead_letters,
    eventually,
    left_in,
    publish_confirmed,
    running,
)
from tests.conformance.conftest import declare_orders
from tests.patience import LIMIT
from tests.telemetry.conftest import MakeApp, Recorded

pytestmark = pytest.mark.anyio

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def web(shop: Lightbus, recorded: Recorded) -> Iterator[str]:
    """The URL of a web server that publishes an order for each request, in a span of the request's trace."""

    class View(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            parent = propagate.extract({key.lower(): value for key, value in self.headers.items()})
            with recorded.tracer.start_as_current_span("POST /orders", parent, SpanKind.SERVER):
                shop.publish_sync(OrderPlaced(number=7))
            self.send_response(202)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), View)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/orders"
    server.shutdown()
    server.server_close()
    thread.join(LIMIT)


def post(url: str, headers: dict[str, str]) -> None:
    with urllib.request.urlopen(urllib.request.Request(url, b"", headers), timeout=LIMIT) as answer:
        assert answer.status == 202


def retry_all(app: Lightbus) -> int:
    """What `lightbus dead retry --all` does."""
    outcome = actions.Outcome()
    with opened(app) as queue:
        actions.retry(queue, Filter(), outcome)
    return outcome.done


async def test_one_trace_from_a_request_to_a_dead_letter_that_is_retried_by_hand(
    web: str, shop: Lightbus, make_app: MakeApp, recorded: Recorded
) -> None:
    billing, stats = make_app("billing"), make_app("stats", retry=Retry(delays=(0.05,)))
    in_order = threading.Event()

    @billing.event("invoice.made")
    class InvoiceMade:
        number: int

    @billing.on("order.placed")
    async def bill(order: OrderPlaced) -> None:
        await billing.publish(InvoiceMade(number=order.number))

    @stats.on("order.placed")
    async def see(order: OrderPlaced) -> None: ...

    @stats.on("invoice.made")
    def count(invoice: dict[str, int]) -> None:
        if not in_order.is_set():
            raise ConnectionError("the statistics are down")

    async with running(billing, stats):
        await anyio.to_thread.run_sync(post, web, {"traceparent": PARENT})
        name = "process billing:invoice.made:stats.main"
        await eventually(lambda: [one.outcome for one in recorded.named(name)], [(1, "retried"), (2, "dead")])
        in_order.set()
        await eventually(lambda: bool(connection_count(stats)), True)
        assert await anyio.to_thread.run_sync(retry_all, stats) == 1
        await eventually(lambda: len(recorded.named(name)), 3)

    request, published = recorded.one("POST /orders"), recorded.one("publish shop:order.placed")
    billed, made = recorded.one("process shop:order.placed:billing.main"), recorded.one("publish billing:invoice.made")
    attempts, seen = recorded.named(name), recorded.one("process shop:order.placed:stats.main")
    assert {one.trace for one in recorded.spans} == {TRACE}
    assert [request.parent, published.parent, billed.parent, made.parent] == [SPAN, request.id, published.id, billed.id]
    assert seen.parent == published.id
    assert [one.parent for one in attempts] == [made.id] * 3
    assert [one.outcome for one in attempts] == [(1, "retried"), (2, "dead"), (1, "handled")]
    assert [one.exceptions for one in attempts] == [["ConnectionError: the statistics are down"]] * 2 + [[]]
    assert [one.kind for one in (published, billed, made, *attempts)] == [
        "PRODUCER",
        "CONSUMER",
        "PRODUCER",
        *["CONSUMER"] * 3,
    ]


def connection_count(app: Lightbus) -> int:
    """How many dead letters the app has."""
    with opened(app) as queue:
        return queue.count


async def test_the_spans_of_a_publish_and_of_an_attempt_follow_the_conventions(
    shop: Lightbus, billing: Lightbus, recorded: Recorded, broker_url: str
) -> None:
    @billing.on("order.placed")
    async def bill(order: OrderPlaced) -> None: ...

    async with running(billing):
        receipt = await shop.publish(OrderPlaced(number=1), correlation_id="request-1")
        await eventually(lambda: len(recorded.named("process shop:order.placed:billing.main")), 1)
    system: dict[str, Any] = {"messaging.system": "lightbus"}
    if broker_url.startswith(("amqp", "activemq")):
        port = int(broker_url.rpartition(":")[2].partition("/")[0])
        kind = "rabbitmq" if broker_url.startswith("amqp") else "activemq"
        system = {"messaging.system": kind, "server.address": "127.0.0.1", "server.port": port}
    both = {
        **system,
        "messaging.rabbitmq.destination.routing_key": "order.placed",
        "messaging.message.id": receipt.id,
        "messaging.message.conversation_id": "request-1",
    }
    published = recorded.one("publish shop:order.placed")
    assert published.attributes == {
        **both,
        "messaging.operation.name": "publish",
        "messaging.operation.type": "send",
        "messaging.destination.name": "shop:order.placed",
    }
    attempt = recorded.one("process shop:order.placed:billing.main")
    tag = attempt.attributes.pop("messaging.rabbitmq.message.delivery_tag")
    assert attempt.attributes == {
        **both,
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": "shop:order.placed:billing.main",
        "messaging.rabbitmq.message.delivery_tag": tag,
        "lightbus.handler": "bill",
        "lightbus.attempt": 1,
        "lightbus.outcome": "handled",
    }
    assert type(tag) is int
    scope = attempt.span.instrumentation_scope
    assert scope is not None
    assert (scope.name, scope.schema_url) == ("lightbus", SCHEMA_URL)


async def test_each_way_to_publish_continues_the_trace(shop: Lightbus, billing: Lightbus, recorded: Recorded) -> None:
    received: dict[int, str | None] = {}

    @billing.on("order.placed")
    async def bill(order: OrderPlaced) -> None:
        span = trace.get_current_span()
        received[order.number] = f"{span.get_span_context().trace_id:032x}"

    def in_a_thread() -> None:
        shop.publish_sync(OrderPlaced(number=4))
        shop.publish_many_sync([OrderPlaced(number=5), OrderPlaced(number=6)])

    async with running(billing):
        with recorded.tracer.start_as_current_span("request") as request:
            await shop.publish(OrderPlaced(number=1))
            await shop.publish_many([OrderPlaced(number=2), OrderPlaced(number=3)])
            await anyio.to_thread.run_sync(in_a_thread)
            await shop.publish(OrderPlaced(number=7), delay=1)
        await eventually(lambda: len(received), 7)
        await eventually(lambda: len(recorded.named("process shop:order.placed:billing.main")), 7)
    wanted = f"{request.get_span_context().trace_id:032x}"
    assert set(received.values()) == {wanted}
    published = recorded.named("publish shop:order.placed")
    assert {one.parent for one in published} == {f"{request.get_span_context().span_id:016x}"}
    assert sorted(one.id for one in published) == sorted(
        str(one.parent) for one in recorded.named("process shop:order.placed:billing.main")
    )
    assert [one.attributes.get("lightbus.delay") for one in published] == [None] * 6 + [1]


async def test_baggage_and_trace_state_reach_the_handler_and_what_it_publishes(
    shop: Lightbus, make_app: MakeApp, recorded: Recorded
) -> None:
    billing, stats = declare_orders(make_app("billing")), make_app("stats")
    seen: list[tuple[object, str]] = []

    def note() -> None:
        seen.append(
            (baggage.get_baggage("tenant"), trace.get_current_span().get_span_context().trace_state.to_header())
        )

    @billing.on("order.placed")
    async def bill(order: OrderPlaced) -> None:
        note()
        await billing.publish(OrderCancelled(number=1))

    @stats.on("order.cancelled")
    def count(order: OrderCancelled) -> None:
        note()

    given = propagate.extract({"traceparent": PARENT, "tracestate": "vendor=1", "baggage": "tenant=acme"})
    async with running(billing, stats):
        token = context.attach(given)
        try:
            await shop.publish(OrderPlaced(number=1))
        finally:
            context.detach(token)
        await eventually(lambda: seen, [("acme", "vendor=1")] * 2)


async def test_a_foreign_producers_context_is_honoured_and_a_foreign_consumer_can_read_ours(
    shop: Lightbus, billing: Lightbus, recorded: Recorded
) -> None:
    @billing.on("order.placed")
    async def bill(order: OrderPlaced) -> None: ...

    async with running(billing, shop):
        with connected(shop) as connection:
            properties = {"headers": {"traceparent": PARENT}, "message_id": "foreign"}
            publish_confirmed(connection, Publication("shop", "order.placed", b'{"number": 1}', properties))
            broken = {"headers": {"traceparent": 7, "tracestate": b"\xff", "baggage": None}}
            publish_confirmed(connection, Publication("shop", "order.placed", b'{"number": 1}', broken))
        await eventually(lambda: len(recorded.named("process shop:order.placed:billing.main")), 2)
        first, second = recorded.named("process shop:order.placed:billing.main")
    assert (first.trace, first.parent) == (TRACE, SPAN)
    assert second.parent is None
    recorded.exporter.clear()
    await shop.publish(OrderPlaced(number=2))
    (waiting,) = await left_in(billing)
    version, trace_id, span_id, flags = waiting.properties["headers"]["traceparent"].split("-")
    published = recorded.one("publish shop:order.placed")
    assert (version, trace_id, span_id, int(flags, 16) & 1) == ("00", published.trace, published.id, 1)


async def test_what_reaches_no_handler_has_a_span(shop: Lightbus, billing: Lightbus, recorded: Recorded) -> None:
    @billing.on("order.placed", retry=Retry.none())
    async def bill(order: OrderPlaced) -> None: ...

    async with running(billing, shop):
        with connected(billing) as connection:  # a binding that is left over
            connection.channel().queue_bind("billing.main", "lightbus", "order.cancelled")
        await shop.publish(OrderCancelled(number=1))
        with connected(shop) as connection:
            publish_confirmed(connection, Publication("shop", "order.placed", b"no JSON", {}))
        await eventually(lambda: len(recorded.named("process shop:order.placed:billing.main")), 1)
        await dead_letters(billing, 2)
    unreadable = recorded.one("process shop:order.placed:billing.main")
    assert unreadable.outcome == (1, "dead")
    assert unreadable.attributes["error.type"] == "lightbus.errors.DecodeError"
    unmatched = recorded.named("process billing.main")[-1]
    assert unmatched.outcome[1] == "dead"
    assert unmatched.parent == recorded.one("publish shop:order.cancelled").id
    assert unmatched.attributes["error.type"] == "lightbus.errors.NoHandler"
    assert unmatched.attributes["messaging.destination.name"] == "shop:order.cancelled:billing.main"
    assert "lightbus.handler" not in unmatched.attributes
