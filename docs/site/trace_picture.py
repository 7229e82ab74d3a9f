"""The picture of a trace in docs/pictures: `make pictures` runs the three services of docs/examples/traces, on the
embedded broker and in one process, and draws the spans that OpenTelemetry's SDK has recorded.

Durations differ from run to run, so no test compares the picture with another run.
"""

from __future__ import annotations

import html
import importlib
import os
import sys
import tempfile
from typing import Any

import anyio
import attrs
import httpx2
from opentelemetry import trace
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pictures import FAILURE, FOLDER, STYLE, text

from lightbus import Lightbus
from lightbus.telemetry.opentelemetry import LightbusInstrumentor

EXAMPLE = FOLDER.parent / "examples" / "traces"
# Readable on white and on black.
COLORS = {"shop": "#2f81f7", "billing": "#1a9c4b", "mail": "#b07800"}
ROW, LEFT, RIGHT, WIDTH, HEAD = 30, 330, 20, 970, 58
INDENT = 14
STEPS = (0.1, 0.2, 0.5, 1.0)
"""Seconds between two lines of the scale."""


@attrs.frozen
class Bar:
    """A span as it is drawn; times in seconds from the trace's beginning."""

    name: str
    service: str
    depth: int
    start: float
    seconds: float
    note: str
    failed: bool


async def run() -> list[ReadableSpan]:
    """The spans of one order."""
    exporter = InMemorySpanExporter()
    providers: dict[str, TracerProvider] = {}
    for service in COLORS:
        providers[service] = TracerProvider(resource=Resource.create({"service.name": service}))
        providers[service].add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(providers["billing"])  # the one service that adds spans
    modules: dict[str, Any] = {name: importlib.import_module(name) for name in COLORS}
    apps: dict[str, Lightbus] = {name: module.app for name, module in modules.items()}
    for name, app in apps.items():
        LightbusInstrumentor().instrument_app(app, tracer_provider=providers[name])
    api = modules["shop"].api
    FastAPIInstrumentor.instrument_app(api, tracer_provider=providers["shop"], exclude_spans=["receive", "send"])
    send, receive = anyio.create_memory_object_stream[str](8)
    apps["mail"].observe(lambda outcome: send.send_nowait(outcome.kind))
    async with anyio.create_task_group() as tasks:
        consumers = [apps[name].consumer() for name in ("billing", "mail")]
        for consumer in consumers:
            await tasks.start(consumer.run)
        async with apps["shop"], httpx2.AsyncClient(transport=httpx2.ASGITransport(api), base_url="http://shop") as web:
            # The first one connects and imports what is needed only once.
            for order_id in (6, 7):
                exporter.clear()
                (await web.put(f"/orders/{order_id}", params={"email": "a@example.com"})).raise_for_status()
                with anyio.fail_after(60):
                    assert await receive.receive() == "handled"
        for consumer in consumers:
            await consumer.stop(5)
    return [*exporter.get_finished_spans()]


def bars(spans: list[ReadableSpan]) -> list[Bar]:
    """In the order of a trace viewer: each span above those that it caused."""
    children: dict[int | None, list[ReadableSpan]] = {}
    for span in sorted(spans, key=lambda one: one.start_time or 0):
        children.setdefault(None if span.parent is None else span.parent.span_id, []).append(span)
    (root,) = children[None]
    found: list[Bar] = []

    def add(span: ReadableSpan, depth: int) -> None:
        attributes = span.attributes or {}
        outcome = attributes.get("lightbus.outcome")
        began, zero = span.start_time or 0, root.start_time or 0
        found.append(
            Bar(
                name=span.name,
                service=str(span.resource.attributes["service.name"]),
                depth=depth,
                start=(began - zero) / 1e9,
                seconds=((span.end_time or 0) - began) / 1e9,
                note=f", attempt {attributes['lightbus.attempt']}: {outcome}" if outcome else "",
                failed=not span.status.is_ok,
            )
        )
        assert span.context is not None
        for child in children.get(span.context.span_id, ()):
            add(child, depth + 1)

    add(root, 0)
    return found


def draw(found: list[Bar]) -> str:
    """The bars as SVG."""
    total = max(bar.start + bar.seconds for bar in found)
    scale = (WIDTH - LEFT - RIGHT - 180) / total  # the last label is right of its bar
    height = HEAD + ROW * len(found) + 12
    step = next(one for one in STEPS if total / one <= 8)
    parts: list[str] = []
    for number in range(int(total / step) + 1):
        x = LEFT + number * step * scale
        parts.append(f'<path d="M{x:.1f} {HEAD - 12}V{height - 12}" stroke="currentColor" stroke-opacity="0.18"/>')
        parts.append(text((x, HEAD - 18), f"{number * step * 1000:g} ms", small=True))
    x = 10.0
    for service, color in COLORS.items():
        parts.append(f'<rect x="{x:g}" y="10" width="14" height="14" rx="3" fill="{color}"/>')
        parts.append(text((x + 20, 22), service, bold=True, anchor="start"))
        x += 40 + 9 * len(service)
    parts.append(
        f'<rect x="{x:g}" y="10" width="14" height="14" rx="3" fill="none" stroke="{FAILURE}" stroke-width="2"/>'
    )
    parts.append(text((x + 20, 22), "error", anchor="start"))
    for number, bar in enumerate(found):
        y = HEAD + ROW * number
        left, width = LEFT + bar.start * scale, max(3.0, bar.seconds * scale)
        color = COLORS[bar.service]
        stroke = f' stroke="{FAILURE}" stroke-width="2"' if bar.failed else ""
        parts.append(text((10 + INDENT * bar.depth, y + 19), bar.name, small=True, anchor="start"))
        parts.append(
            f'<rect x="{left:.1f}" y="{y + 5}" width="{width:.1f}" height="18" rx="3" fill="{color}"{stroke}/>'
        )
        parts.append(
            text((left + width + 6, y + 19), f"{bar.seconds * 1000:.3g} ms{bar.note}", small=True, anchor="start")
        )
    title = (
        "A trace: a request to the service shop, the event order.placed, two attempts in billing, the event "
        "invoice.paid, and a handler in mail."
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"',
            f'  role="img" aria-label="{html.escape(title)}"',
            '  font-family="system-ui, sans-serif" font-size="14" fill="currentColor">',
            STYLE,
            *parts,
            "</svg>\n",
        ]
    )


def main() -> None:
    sys.path.insert(0, str(EXAMPLE))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LIGHTBUS_URL"] = f"sqlite:///{folder}/bus.db"
        spans = anyio.run(run)
    (FOLDER / "trace.svg").write_text(draw(bars(spans)))


if __name__ == "__main__":
    main()
