"""docs/examples/traces: a web server and two workers, each under opentelemetry-instrument; and the page about them."""

from __future__ import annotations

import signal
import sys
import xml.etree.ElementTree
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from lightbus.telemetry import opentelemetry
from lightbus.worker import process
from tests.integrations.example import EXAMPLES, PYTHON, SERVES, Example, put
from tests.patience import wait_until
from tests.processes import Program
from tests.telemetry.collector import Collector, collecting

PAGE = " ".join((EXAMPLES.parent / "howto" / "traces.md").read_text().split())
PROGRAMS = Path(sys.executable).parent
INSTRUMENT = str(PROGRAMS / "opentelemetry-instrument")


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as found:
        yield found


def test_one_trace_goes_over_three_services(
    example: Callable[[str], Example], tmp_path: Path, collector: Collector
) -> None:
    shop, url = example("traces"), f"sqlite:///{tmp_path}/bus.db"
    extra = {**collector.environment, "OTEL_METRICS_EXPORTER": "none"}

    def start(service: str, *command: str) -> Program:
        program = (INSTRUMENT, "--service_name", service, *command)
        return stack.enter_context(shop.start(url=url, program=program, extra=extra))

    with ExitStack() as stack:
        workers = [start(name, "lightbus", "worker", f"{name}:app") for name in ("billing", "mail")]
        server = start("shop", "uvicorn", "shop:api", "--port", "0")
        for worker in workers:
            worker.wait_for("Ready")
        address = server.wait_for(SERVES)[1]
        assert put(f"{address}/orders/7?email=a@example.com", {}).status == 202
        workers[1].wait_for("A receipt to a@example.com for order 7.")
        server.end(signal.SIGINT)  # after SIGTERM, uvicorn ends without the exit handlers that send the last spans
        for worker in workers:
            assert worker.end(signal.SIGTERM) == 0
    spans = [one for one in collector.spans if "http send" not in one.name and "http receive" not in one.name]
    by_name = {one.name: one for one in spans}
    (request,) = {one.trace for one in spans}
    assert request
    assert {(one.service, one.name) for one in spans} == {
        ("shop", "PUT /orders/{order_id}"),
        ("shop", "publish shop:order.placed"),
        ("billing", "process shop:order.placed:billing.main"),
        ("billing", "ask the bank"),
        ("billing", "publish billing:invoice.paid"),
        ("mail", "process billing:invoice.paid:mail.main"),
    }
    assert by_name["publish shop:order.placed"].parent == by_name["PUT /orders/{order_id}"].id
    assert by_name["process billing:invoice.paid:mail.main"].parent == by_name["publish billing:invoice.paid"].id
    assert len([one for one in spans if one.name == "process shop:order.placed:billing.main"]) == 2


def test_the_code_by_hand_sends_the_spans_of_a_worker(
    example: Callable[[str], Example], tmp_path: Path, collector: Collector
) -> None:
    shop, url = example("traces"), f"sqlite:///{tmp_path}/bus.db"
    (shop.folder / "worker.py").write_text("import by_hand\nfrom billing import app\n")
    with shop.start("worker", "worker:app", url=url, extra=collector.environment) as worker:
        worker.wait_for("Ready")
        done = shop.run(
            *PYTHON, "-c", "from shop import *; app.publish_sync(OrderPlaced(order_id=7, email=''))", url=url
        )
        assert done.returncode == 0, done.stderr
        wait_until(lambda: any("retry in 0.2 s" in line for line in worker.lines), "the first attempt")
        assert worker.end(signal.SIGTERM) == 0
    assert {one.service for one in collector.spans} == {"billing"}
    assert "process shop:order.placed:billing.main" in {one.name for one in collector.spans}


def test_the_tests_of_the_example_pass(example: Callable[[str], Example]) -> None:
    assert "1 passed" in example("traces").run_its_tests("-W", "error", "-m", "pytest", "-q", "-p", "no:asyncio")


def test_the_picture_shows_each_span_of_a_real_run(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(EXAMPLES.parent / "site")!r})
import trace_picture
trace_picture.FOLDER = Path({str(tmp_path)!r})
trace_picture.main()
"""
    done = Example(tmp_path).run(*PYTHON, "-c", code, url=f"sqlite:///{tmp_path}/unused.db")
    assert done.returncode == 0, done.stderr
    for drawn in (tmp_path / "trace.svg", EXAMPLES.parent / "pictures" / "trace.svg"):
        svg = xml.etree.ElementTree.parse(drawn).getroot()
        words = [one.text or "" for one in svg.iter("{http://www.w3.org/2000/svg}text")]
        assert [one for one in words if one.startswith(("PUT", "publish", "process", "ask"))] == [
            "PUT /orders/{order_id}",
            "publish shop:order.placed",
            *["process shop:order.placed:billing.main", "ask the bank"] * 2,
            "publish billing:invoice.paid",
            "process billing:invoice.paid:mail.main",
        ]
        notes = [one.partition(", ")[2] for one in words if ", attempt" in one]
        assert notes == ["attempt 1: retried", "attempt 2: handled", "attempt 1: handled"]


def test_the_page_names_the_version_and_each_attribute_and_metric() -> None:
    version = opentelemetry.SCHEMA_URL.rpartition("/")[2]
    assert f"version {version} of the semantic conventions" in PAGE
    assert f"`{opentelemetry.SCHEMA_URL}`" in PAGE
    names = [value for key, value in vars(opentelemetry).items() if key.isupper() and isinstance(value, str)]
    assert len(names) > 15
    for name in names:
        assert f"`{name}`" in PAGE
    assert f"more than {opentelemetry.RUNNING:,}" in PAGE
    assert f"gives it {process.FLUSH_LIMIT:g} seconds" in PAGE
