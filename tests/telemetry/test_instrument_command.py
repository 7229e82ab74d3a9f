"""`opentelemetry-instrument lightbus worker ...`, without code: real processes that send OTLP over HTTP."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightbus import Lightbus
from lightbus.telemetry.opentelemetry import SCHEMA_URL
from tests.patience import wait_until
from tests.processes import Program
from tests.telemetry.collector import Collector, collecting

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"

BILLING = """\
import anyio
from lightbus import Lightbus, Message, Retry
from lightbus.worker import process

process.FLUSH_LIMIT = 60.0  # the test receives the spans, and may be slow

app = Lightbus("billing", retry=Retry(delays=(0.05,)))

@app.event
class InvoiceMade:
    number: int

@app.on("order.placed")
async def bill(order: dict, message: Message):
    if order["number"] == 0 and message.attempt == 1:
        raise LookupError("no such customer")
    if order["number"] == 2:
        print("waits\\n", end="", flush=True)  # one write: two processes write
        await anyio.sleep_forever()
    await app.publish(InvoiceMade(number=order["number"]))
    print("billed\\n", end="", flush=True)
"""


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as found:
        yield found


@pytest.mark.parametrize("options", [(), ("--processes", "2")], ids=["one process", "two processes"])
def test_a_worker_without_code_sends_its_spans_before_it_ends(
    tmp_path: Path, collector: Collector, options: tuple[str, ...]
) -> None:
    (tmp_path / "billing.py").write_text(BILLING)
    url = f"sqlite:///{tmp_path}/bus.db"
    extra = {**collector.environment, "OTEL_SERVICE_NAME": "billing-worker"}
    instrument = (str(Path(sys.executable).parent / "opentelemetry-instrument"), "lightbus")
    shop = Lightbus("shop", url=url)

    @shop.event
    class OrderPlaced:
        number: int

    with Program(
        "worker", "billing:app", "--grace", "3", *options, folder=tmp_path, url=url, extra=extra, program=instrument
    ) as worker:
        worker.wait_for("Ready")
        with shop:
            for number in range(3):
                shop.publish_sync(OrderPlaced(number=number), headers={"traceparent": f"00-{TRACE}-{SPAN}-01"})
        wait_until(lambda: sum("billed" in line for line in worker.lines) == 2, "two invoices")
        wait_until(lambda: any("waits" in line for line in worker.lines), "the third order")
        worker.end(signal.SIGTERM)
    spans = collector.spans
    assert {(one.service, one.scope, one.schema, one.trace) for one in spans} == {
        ("billing-worker", "lightbus", SCHEMA_URL, TRACE)
    }
    attempts = [one for one in spans if one.name == "process shop:order.placed:billing.main"]
    assert {one.parent for one in attempts} == {SPAN}
    outcomes = [(one.attributes["lightbus.attempt"], one.attributes.get("lightbus.outcome", "")) for one in attempts]
    assert sorted(outcomes) == [(1, ""), (1, "handled"), (1, "retried"), (2, "handled")]
    made = [one for one in spans if one.name == "publish billing:invoice.made"]
    assert {one.parent for one in made} == {
        one.id for one in attempts if one.attributes.get("lightbus.outcome") == "handled"
    }
    assert len(attempts) + len(made) == len(spans) == 6
    assert collector.metrics >= {"messaging.process.duration", "messaging.client.sent.messages"}
