"""A test that reads spans. Try it: pytest"""

from collections.abc import Iterator

import pytest
from billing import app
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from lightbus.telemetry.opentelemetry import LightbusInstrumentor
from lightbus.testing import TestBus


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    LightbusInstrumentor().instrument(tracer_provider=provider)
    yield exporter
    LightbusInstrumentor().uninstrument()


def test_the_second_attempt_charges_the_order(exporter: InMemorySpanExporter) -> None:
    with TestBus(app) as bus:
        bus.publish_sync("order.placed", {"order_id": 7, "email": "a@example.com"}, source="shop")
        bus.drain_sync()
    attempts = [span for span in exporter.get_finished_spans() if span.name == "process shop:order.placed:billing.main"]
    assert [span.attributes["lightbus.outcome"] for span in attempts] == ["retried", "handled"]
