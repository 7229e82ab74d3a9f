"""`--json-logs`: what a line contains, whatever a program logs, and which event it names."""

from __future__ import annotations

import asyncio
import json
import logging
import queue
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from logging.handlers import QueueHandler
from pathlib import Path
from typing import Any

import anyio
import pytest
from opentelemetry import trace

from lightbus import Lightbus, Message, Next, Reject, Retry
from lightbus.cli.logs import outcomes_of
from lightbus.logs import SCHEMA, JSONLines, current_fields, log_outcome, trace_id_of
from lightbus.testing import TestBus
from tests.patience import LIMIT

pytestmark = pytest.mark.anyio
PAGE = (Path(__file__).parents[2] / "docs" / "howto" / "logs.md").read_text()
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{SPAN}-01"


class Lines(logging.Handler):
    """Keeps what `JSONLines` makes of each record."""

    def __init__(self, label: str = "") -> None:
        super().__init__()
        self.setFormatter(JSONLines(label))
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(self.format(record))

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(text, parse_constant=_refuse) for text in self.texts]

    def with_message(self, pattern: str) -> dict[str, Any]:
        (found,) = [line for line in self.lines if re.search(pattern, line["message"])]
        return found


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def kept() -> Iterator[Lines]:
    """What is logged from DEBUG on, as JSON lines."""
    root, handler = logging.getLogger(), Lines("[2]")
    levels = [(one, one.level) for one in (root, logging.getLogger("lightbus"))]
    root.addHandler(handler)
    for one, _ in levels:
        one.setLevel(logging.DEBUG)
    yield handler
    root.removeHandler(handler)
    for one, level in levels:
        one.setLevel(level)


logger = logging.getLogger("billing.handlers")


# --- the schema -------------------------------------------------------------------------------


def test_the_page_describes_each_name_of_the_schema_in_its_order() -> None:
    table = PAGE[PAGE.index("| name |") :].split("\n\n")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == SCHEMA


def test_a_line_begins_with_time_level_logger_message_and_worker(kept: Lines) -> None:
    logger.warning("%d invoices", 3)
    (line,) = kept.lines
    assert list(line) == ["time", "level", "logger", "message", "worker"]
    assert datetime.fromisoformat(line["time"]).utcoffset() is not None
    assert list(line.values())[1:] == ["warning", "billing.handlers", "3 invoices", "2"]


def test_no_value_of_extra_is_lost_or_replaces_another() -> None:
    names = [name for name in SCHEMA if name != "message"] + ["extra_event", "tenant", "lightbus"]
    extra = {name: f"mine {name}" for name in names}
    lines = Lines("[1]")
    record = logger.makeRecord(logger.name, logging.INFO, "", 0, "text", (), None, extra=extra)
    record.message = "mine"  # type: ignore[attr-defined]  # logging itself refuses this one in extra=
    lines.emit(record)
    (line,) = lines.lines
    assert (line["message"], line["level"], line["worker"]) == ("text", "info", "1")
    assert line["tenant"] == "mine tenant"
    assert line["lightbus"] == "mine lightbus"
    assert sorted(value for value in line.values() if str(value).startswith("mine ")) == sorted(extra.values())
    assert line["extra_level"] == "mine level"
    assert (line["extra_event"], line["extra_extra_event"]) == ("mine event", "mine extra_event")


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("no text")


def _cycle() -> list[object]:
    cycle: list[object] = []
    cycle.append(cycle)
    return cycle


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({"a": [1, 2.5, None, True]}, {"a": [1, 2.5, None, True]}),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        ([float("nan")], "[nan]"),
        ({(1, 2): 3}, "{(1, 2): 3}"),
        ({"at": datetime(2026, 1, 2)}, {"at": "2026-01-02 00:00:00"}),
        (b"\xff", "b'\\xff'"),
        (_cycle(), "[[...]]"),
        (Unprintable(), "<Unprintable: its __str__ raised RuntimeError>"),
        ([Unprintable()], ["<Unprintable: its __str__ raised RuntimeError>"]),
        ("\ud800\n\x1b", "\ud800\n\x1b"),
    ],
)
def test_any_value_of_extra_is_a_line_of_json(kept: Lines, value: object, shown: object) -> None:
    logger.info("x", extra={"value": value})
    assert kept.lines[0]["value"] == shown
    assert kept.texts[0].isprintable()


def test_a_record_whose_arguments_do_not_fit_is_a_line_with_both() -> None:
    lines = Lines()
    lines.emit(logger.makeRecord("x", logging.INFO, "", 0, "%d invoices", ("three",), None))
    lines.emit(logger.makeRecord("x", logging.INFO, "", 0, Unprintable(), (), None))
    assert lines.lines[0]["message"] == "%d invoices ('three',)"
    assert "its __str__ raised RuntimeError" in lines.lines[1]["message"]


def test_exceptions_and_stacks_have_their_fields(kept: Lines) -> None:
    try:
        raise LookupError("no such invoice")
    except LookupError:
        logger.exception("failed", stack_info=True)
    (line,) = kept.lines
    assert line["exception"].endswith("LookupError: no such invoice")
    assert "test_exceptions_and_stacks_have_their_fields" in line["stack"]


# --- the trace --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (TRACEPARENT, TRACE),
        (TRACEPARENT.encode(), TRACE),
        (f"cc-{TRACE}-{SPAN}-01-more", TRACE),  # a later version may have more
        (f"{TRACEPARENT}-more", None),
        (f"ff-{TRACE}-{SPAN}-01", None),
        (f"00-{TRACE.upper()}-{SPAN}-01", None),
        (f"00-{'0' * 32}-{SPAN}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE}-{SPAN}", None),
        (f"00-{TRACE[:-1]}-{SPAN}-01", None),
        (f"{TRACEPARENT}\n", None),
        ("", None),
        (7, None),
    ],
)
def test_a_traceparent_is_read_as_w3c_says(value: object, found: str | None) -> None:
    assert trace_id_of({"traceparent": value}) == found


def test_a_current_span_is_named_also_outside_of_a_handler(kept: Lines) -> None:
    context = trace.SpanContext(int(TRACE, 16), int(SPAN, 16), is_remote=False)
    with trace.use_span(trace.NonRecordingSpan(context)):
        logger.info("inside")
    logger.info("outside")
    inside, outside = kept.lines
    assert (inside["trace_id"], inside["span_id"]) == (TRACE, SPAN)
    assert "trace_id" not in outside
    assert "span_id" not in outside


def test_opentelemetry_is_never_imported() -> None:
    code = (
        "import sys, logging; from lightbus.logs import JSONLines, current_fields; "
        "JSONLines().format(logging.makeLogRecord({})); assert current_fields() == {}; "
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT, check=True)
    assert done.stdout == "[]\n"


# --- the event --------------------------------------------------------------------------------


class Paid:
    number: int


def make_app() -> Lightbus:
    app = Lightbus("billing", url="memory://", retry=Retry.none())
    app.event("invoice.paid")(Paid)
    return app


async def handled(app: Lightbus, **options: Any) -> str:
    """Publish one event, let all handlers end, and return its id."""
    async with TestBus(app, allow_dead=True) as bus:
        receipt = await app.publish(app.events["invoice.paid"].cls(number=1), **options)
        await bus.drain()
    return receipt.id


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_what_a_handler_logs_names_the_event_also_in_its_functions_tasks_and_middleware(kept: Lines) -> None:
    app = make_app()

    async def child() -> None:
        logger.info("in a task")

    @app.middleware
    async def around(message: Message, call_next: Next) -> None:
        logger.info("in middleware")
        await call_next()

    @app.on("invoice.paid", name="charge", queue="slow")
    async def charge_it(invoice: dict[str, Any]) -> None:
        logger.info("in the handler", extra={"number": invoice["number"]})
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(child)

    event_id = await handled(app, headers={"traceparent": TRACEPARENT})
    expected = {
        "app": "billing",
        "event": "invoice.paid",
        "id": event_id,
        "handler": "charge",
        "queue": "billing.slow",
        "attempt": 1,
        "trace_id": TRACE,
    }
    for where in ("in a task", "in middleware", "in the handler"):
        line = kept.with_message(where)
        assert {name: line.get(name) for name in expected} == expected
    assert kept.with_message("in the handler")["number"] == 1
    assert current_fields() == {}


async def test_what_a_sync_handler_logs_names_the_event(kept: Lines) -> None:
    app = make_app()

    @app.on("invoice.paid")
    def charge() -> None:
        logger.info("in a thread")

    event_id = await handled(app)
    line = kept.with_message("in a thread")
    assert (line["handler"], line["id"], line["queue"]) == ("charge", event_id, "billing.main")
    assert "trace_id" not in line


async def test_a_queue_handler_with_the_formatter_keeps_the_event() -> None:
    waiting: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    behind = QueueHandler(waiting)
    behind.setFormatter(JSONLines())
    app = make_app()

    @app.on("invoice.paid")
    async def charge() -> None:
        behind.handle(logger.makeRecord("billing", logging.INFO, "", 0, "queued", (), None))

    event_id = await handled(app)
    line = json.loads(waiting.get(timeout=LIMIT).getMessage())
    assert (line["message"], line["handler"], line["id"]) == ("queued", "charge", event_id)


async def test_a_span_comes_before_the_events_traceparent(kept: Lines) -> None:
    app = make_app()

    @app.on("invoice.paid")
    async def charge() -> None:
        context = trace.SpanContext(0xABC, 0xDEF, is_remote=False)
        with trace.use_span(trace.NonRecordingSpan(context)):
            logger.info("in a span")

    await handled(app, headers={"traceparent": TRACEPARENT})
    line = kept.with_message("in a span")
    assert (line["trace_id"], line["span_id"]) == (f"{0xABC:032x}", f"{0xDEF:016x}")


@pytest.mark.parametrize("observed", [False, True])
async def test_each_failed_attempt_is_one_line_with_its_outcome(kept: Lines, observed: bool) -> None:
    app = Lightbus("billing", url="memory://", retry=Retry(delays=(5,)))
    app.event("invoice.paid")(Paid)
    if observed:
        app.observe(lambda outcome: None)

    @app.on("invoice.paid")
    async def charge() -> None:
        await asyncio.sleep(0.01)
        raise LookupError("no such invoice")

    @app.on("invoice.paid", name="refuse")
    def refuse_it() -> None:
        raise Reject("not ours")

    event_id = await handled(app, headers={"traceparent": TRACEPARENT})
    lines = [line for line in kept.lines if line.get("outcome") in ("retried", "dead")]
    assert sorted((one["handler"], one["attempt"], one["outcome"], one.get("delay")) for one in lines) == [
        ("charge", 1, "retried", 5),
        ("charge", 2, "dead", None),
        ("refuse", 1, "dead", None),
    ]
    assert all((one["id"], one["event"], one["trace_id"]) == (event_id, "invoice.paid", TRACE) for one in lines)
    assert all(0.005 < one["seconds"] < LIMIT for one in lines if one["handler"] == "charge")
    assert all(0 <= one["seconds"] < LIMIT for one in lines if one["handler"] == "refuse")
    dead = [one for one in lines if one["outcome"] == "dead" and one["handler"] == "charge"]
    assert dead[0]["level"] == "error"
    assert dead[0]["exception"].endswith("LookupError: no such invoice")


async def test_a_handler_that_exceeds_its_timeout_has_a_line_with_its_seconds(kept: Lines) -> None:
    app = make_app()

    @app.on("invoice.paid", timeout=0.05)
    async def charge() -> None:
        await asyncio.sleep(LIMIT)

    await handled(app)
    line = kept.with_message("longer than its timeout")
    assert (line["outcome"], line["handler"]) == ("dead", "charge")
    assert 0.04 < line["seconds"] < LIMIT


async def test_at_level_debug_each_handled_and_published_event_is_a_line(kept: Lines) -> None:
    app = make_app()
    app.observe(log_outcome)

    @app.middleware
    async def skip_even(message: Message, call_next: Next) -> None:
        if message.headers.get("skip") is None:
            await call_next()

    @app.on("invoice.paid")
    async def charge() -> None: ...

    event_id = await handled(app)
    line = kept.with_message("^charge handled 'invoice.paid'")
    assert line["level"] == "debug"
    named = ("app", "event", "id", "handler", "queue", "attempt", "outcome")
    assert [line[name] for name in named] == [
        "billing",
        "invoice.paid",
        event_id,
        "charge",
        "billing.main",
        1,
        "handled",
    ]
    assert 0 <= line["seconds"] < LIMIT
    published = kept.with_message("^published 'invoice.paid'")
    assert (published["id"], published["outcome"]) == (event_id, "published")
    assert not {"handler", "queue", "attempt"} & set(published)
    await handled(app, headers={"skip": True})
    assert kept.with_message("^charge skipped")["outcome"] == "skipped"


@pytest.mark.parametrize(("level", "observed"), [(logging.INFO, False), (logging.DEBUG, True)])
def test_outcomes_are_observed_at_level_debug_only(kept: Lines, level: int, observed: bool) -> None:
    app = make_app()
    logging.getLogger("lightbus").setLevel(level)
    with outcomes_of(app):
        assert (app.observer is not None) is observed
    assert app.observer is None
