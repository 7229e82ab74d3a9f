"""Spans and metrics of apps that are instrumented, as OpenTelemetry's SDK records them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import Sampler

from lightbus import Lightbus
from lightbus.telemetry.opentelemetry import LightbusInstrumentor
from tests.conformance.conftest import MakeApp, apps_on, declare_orders


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Recorded:
    """What the SDK has recorded, in the order in which the spans ended."""

    def __init__(self, sampler: Sampler | None = None) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracers = TracerProvider(shutdown_on_exit=False, sampler=sampler)
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.reader = InMemoryMetricReader()
        self.meters = MeterProvider([self.reader], shutdown_on_exit=False)
        self.tracer = self.tracers.get_tracer("tests")

    @property
    def spans(self) -> list[RecordedSpan]:
        return [RecordedSpan(span) for span in self.exporter.get_finished_spans()]

    def named(self, name: str) -> list[RecordedSpan]:
        """Those of this name, in the order in which they began."""
        return sorted((one for one in self.spans if one.name == name), key=lambda one: one.start)

    def one(self, name: str) -> RecordedSpan:
        (found,) = self.named(name)
        return found

    def points(self, metric: str) -> list[Any]:
        data = self.reader.get_metrics_data()
        return [
            point
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for one in scope.metrics
            if one.name == metric
            for point in one.data.data_points
        ]


@attrs.frozen(repr=False)
class RecordedSpan:
    """A span with ids as text."""

    span: ReadableSpan

    def __repr__(self) -> str:
        return f"<{self.name} {self.attributes.get('lightbus.outcome', '')}>"

    @property
    def name(self) -> str:
        return self.span.name

    @property
    def kind(self) -> str:
        return self.span.kind.name

    @property
    def trace(self) -> str:
        return f"{self.span.context.trace_id:032x}"

    @property
    def id(self) -> str:
        return f"{self.span.context.span_id:016x}"

    @property
    def parent(self) -> str | None:
        return None if self.span.parent is None else f"{self.span.parent.span_id:016x}"

    @property
    def links(self) -> list[str]:
        return [f"{link.context.span_id:016x}" for link in self.span.links]

    @property
    def attributes(self) -> dict[str, Any]:
        return dict(self.span.attributes or {})

    @property
    def outcome(self) -> tuple[int, str]:
        """Which attempt, and what came of it."""
        return self.attributes["lightbus.attempt"], self.attributes["lightbus.outcome"]

    @property
    def start(self) -> int:
        assert self.span.start_time is not None
        return self.span.start_time

    @property
    def seconds(self) -> float:
        assert self.span.end_time is not None
        return (self.span.end_time - self.start) / 1e9

    @property
    def exceptions(self) -> list[str]:
        return [
            f"{event.attributes['exception.type']}: {event.attributes['exception.message']}"
            for event in self.span.events
            if event.attributes
        ]


def instrumented(recorded: Recorded) -> Iterator[Recorded]:
    instrumentor = LightbusInstrumentor()
    instrumentor.instrument(tracer_provider=recorded.tracers, meter_provider=recorded.meters)
    try:
        yield recorded
    finally:
        instrumentor.uninstrument()


@pytest.fixture
def recorded() -> Iterator[Recorded]:
    """All apps are instrumented, and each span is recorded."""
    yield from instrumented(Recorded())


@pytest.fixture
def make_app(broker_url: str, recorded: Recorded) -> Iterator[MakeApp]:
    """`make_app("billing")`: an instrumented app on this test's broker, with a short retry schedule."""
    yield from apps_on(broker_url)


@pytest.fixture
def shop(make_app: MakeApp) -> Lightbus:
    """An app that publishes `order.placed` and `order.cancelled`."""
    return declare_orders(make_app("shop"))


@pytest.fixture
def billing(make_app: MakeApp) -> Lightbus:
    return make_app("billing")
