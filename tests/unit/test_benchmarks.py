"""The benchmark suite ends in time and writes a table, even if contestants fail. No test checks its figures."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import Sequence
from typing import Any, cast

import amqp
import pytest
from opentelemetry.sdk.trace.export import SpanExportResult

from benchmarks import __main__ as suite
from benchmarks import around, report, results, spans
from benchmarks.cases import CASES, Case
from benchmarks.peers import lightbus_
from benchmarks.plan import Plan
from benchmarks.process import Failed
from benchmarks.suite import Row, Suite

ROWS = (
    Row("Lightbus", "lightbus_", settings={"prefetch": 100}),
    Row("another", "another_", settings={"prefetch": 100}),
)
FACTS = {"cores": 2, "cpu": "one", "memory_gb": 8, "system": "Linux", "kernel": "6", "python": "3", "rabbitmq": "4"}


def run(another: Exception | None, rounds: int = 4, until: float = math.inf) -> dict[str, Any]:
    def measure(_: Suite, row: Row) -> dict[str, dict[str, Any]]:
        if row.label == "another" and another is not None:
            raise another
        return {"": {"rate": 1000.0}}

    facts = {**FACTS, "libraries": {}, "missing": [], "date": "2026-01-01", "load": 0.1}
    return suite.run_case(Case("consume", "Consume", measure, ROWS), cast(Suite, None), rounds, until, facts)


@pytest.mark.parametrize("error", [Failed("nothing within 90 s"), amqp.NotFound("no queue"), KeyError("rate")])
def test_a_failing_contestant_is_a_row_of_the_table_and_is_skipped_later(error: Exception) -> None:
    case = run(error)
    assert [one["label"] for one in case["runs"]].count("Lightbus") == 4
    (_, line) = results.summarise(case)
    assert len(line["errors"]) == 2
    assert "| another | failed: " in report.render({"cases": {"consume": case}}, "")


def test_what_a_part_adds_is_compared_with_the_same_part_of_the_same_round() -> None:
    def runs(label: str, added: float) -> list[dict[str, Any]]:
        parts = {"one middleware": {"added_us": added}}
        return [{"round": number, "label": label, "group": "", "lacks": "", "parts": parts} for number in (1, 2, 3)]

    measured = [*runs("Lightbus", 2.0), *runs("another", 40.0)]
    case = {"title": "", "note": "", "rounds": 3, "baseline": "Lightbus", "runs": measured}
    added = {
        (line["label"], line["part"]): (found["median"], found["ratio"])
        for line in results.summarise(case)
        if (found := line["metrics"].get("added_us"))
    }
    assert added == {("Lightbus", "one middleware"): (2.0, 1.0), ("another", "one middleware"): (40.0, 20.0)}
    facts = {**FACTS, "libraries": {}, "missing": [], "date": "2026-01-01", "load": 0.1}
    assert "| 40.0 (40.0 to 40.0) | 20.00 |" in report.render(
        {"cases": {"consume-middleware": {**case, "machine": facts}}}, ""
    )


def test_a_slow_machine_skips_later_rounds_and_reports_their_number() -> None:
    assert run(None)["rounds"] == 4
    case = run(None, until=time.monotonic())
    assert case["rounds"] == 2
    assert len(case["runs"]) == 4


def test_all_cases_take_less_than_half_an_hour_and_one_less_than_three_minutes() -> None:
    assert suite.limits(CASES)[-1] < 28 * 60
    assert all(suite.limits([case])[-1] < 2.75 * 60 for case in CASES)


def test_what_tracing_adds_is_measured_with_spans_that_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    exported: list[str] = []

    def export(_: object, recorded: Sequence[Any]) -> SpanExportResult:
        exported.extend(one.name for one in recorded)
        return SpanExportResult.SUCCESS

    monkeypatch.setattr(around, "BLOCKS", 1)
    monkeypatch.setattr(spans.Dropping, "export", export)
    made = spans.provider()
    monkeypatch.setattr(spans, "provider", lambda: made)
    plan = Plan(url="", name=f"traced-{uuid.uuid4().hex}", additions="telemetry", count=4, warm=1)
    parts = asyncio.run(around.measure(lightbus_, plan))
    made.shutdown()
    assert list(parts) == [around.METRICS, around.TRACES]
    assert sum(name.startswith("process ") for name in exported) == 5
