"""The picture of the dashboard in docs/pictures: `make pictures` runs a worker under a varying load, on the embedded
broker, and a Prometheus that scrapes it, asks for what the panels of docs/examples/monitoring/dashboard.json show, and
draws it. No Grafana is involved.

Figures differ from run to run, so no test compares the picture with another run. `PYTHONPATH` is the root of the
repository, because the Prometheus and the worker are those of the tests.
"""

from __future__ import annotations

import html
import json
import math
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import anyio
import attrs
from pictures import EXCHANGE, FAILURE, FOLDER, QUEUE, STYLE, Point, text

from lightbus import Lightbus
from tests.patience import wait_until
from tests.processes import Program
from tests.prometheus import Prometheus
from tests.rabbitmq import free_port

DASHBOARD = FOLDER.parent / "examples" / "monitoring" / "dashboard.json"
SECONDS, SCRAPE = 120, 2
"""How long the run is, and from one scrape to the next."""

WINDOW = 4 * SCRAPE
"""Grafana's $__rate_interval, if the picture has a point per scrape."""

BUS = """\
import time
from contextlib import asynccontextmanager

import anyio
from sqlalchemy import create_engine

from lightbus import Lightbus, Message, Retry
from lightbus.outbox import Outbox, metadata

engine = create_engine("sqlite:///billing.db")

@asynccontextmanager
async def lifespan(_):
    metadata.create_all(engine)
    yield

app = Lightbus("billing", lifespan=lifespan, retry=Retry(delays=(2, 5)))
outbox = Outbox(app, engine)

@app.event
class InvoicePaid:
    number: int

@app.event
class ReceiptSent:
    number: int

@app.on("order.placed")
def charge(order: dict, message: Message):
    time.sleep(0.004 + order["number"] % 7 / 1000)
    if order["number"] % 60 == 17:
        raise ValueError("no such card")
    if order["number"] % 9 == 4 and message.attempt == 1:
        raise ConnectionError("the bank does not answer")
    with engine.begin() as connection:
        outbox.add(connection, InvoicePaid(number=order["number"]))

@app.on(InvoicePaid, queue="mail", concurrency=4)
async def send_receipt(invoice: InvoicePaid):
    if invoice.number % 250 == 101:
        time.sleep(1.6)  # blocks the event loop
    await anyio.sleep(0.25 + invoice.number % 10 / 40)
    await app.publish(ReceiptSent(number=invoice.number))

@app.on("#", queue="stats")
async def count(event: dict): ...
"""

# Readable on white and on black, in the order of a panel's series.
COLORS = (QUEUE, "#b07800", EXCHANGE, FAILURE, "#a371f7", "#0e9aa7", "#d6619e", "#8b949e", "#7a8b00", "#a0643c")
NAMED = {"green": QUEUE, "red": FAILURE}
COLUMNS, WIDTH, UNIT, HEAD, GAP, MARGIN = 24, 970, 28, 40, 8, 12
"""Of Grafana's grid: columns; the rest in pixels: width, height of a row, above the panels, between them, in them."""
CHARACTER, LINE = 6.5, 17
"""Pixels: the average width of a character of the small text, with room to spare, and the height of its line."""


@attrs.frozen
class Series:
    """A line of a panel; its points are seconds from the run's beginning, and the value."""

    name: str
    points: Sequence[tuple[float, float]]


@attrs.frozen
class Area:
    left: float
    top: float
    right: float
    bottom: float


# --- the run ----------------------------------------------------------------------------------


def orders_per_second(second: float) -> float:
    """A wave, and a rush in the middle that is more than `send_receipt` can do."""
    return 6 + 3 * math.sin(second / 8) + (14 if 42 <= second < 58 else 0)


async def publish_orders(url: str) -> None:
    shop = Lightbus("shop", url=url)

    @shop.event
    @attrs.frozen
    class OrderPlaced:
        number: int

    async with shop:
        began, number, due = time.monotonic(), 0, 0.0
        for tick in range(SECONDS * 4):
            await anyio.sleep(max(0, began + tick / 4 - time.monotonic()))
            due += orders_per_second(tick / 4) / 4
            while number < due:
                await shop.publish(OrderPlaced(number=number))
                number += 1


def run(dashboard: dict[str, Any], folder: Path) -> dict[int, list[Series]]:
    """What each panel shows of a real run, by its id."""
    (folder / "billing.py").write_text(BUS)
    url, port = f"sqlite:///{folder}/bus.db", free_port()
    with Program("worker", "billing:app", "--health-port", str(port), "--metrics", folder=folder, url=url) as worker:
        worker.wait_for("Ready")
        with Prometheus([f"127.0.0.1:{port}"], interval=f"{SCRAPE}s") as prometheus:
            wait_until(lambda: prometheus.query("lightbus_queue_messages"), "the worker is scraped")
            began = time.time()
            anyio.run(publish_orders, url)
            found = {panel["id"]: answer(prometheus, dashboard, panel, began) for panel in dashboard["panels"]}
        assert worker.end(signal.SIGTERM) == 0, worker.output
    return found


def answer(prometheus: Prometheus, dashboard: dict[str, Any], panel: dict[str, Any], began: float) -> list[Series]:
    """The series of each of its expressions, in the order of the expressions."""
    found: list[Series] = []
    for target in panel["targets"]:
        query = as_grafana_sends(target["expr"], dashboard)
        span = {"start": f"{began:.3f}", "end": f"{began + SECONDS:.3f}", "step": str(SCRAPE)}
        lines: list[Series] = []
        for one in prometheus.ask("query_range", query=query, **span)["result"]:
            points = [(at - began, float(value)) for at, value in one["values"]]
            lines.append(Series(legend(target["legendFormat"], one["metric"]), points))
        found += sorted(lines, key=lambda line: line.name)
    return found


def as_grafana_sends(expression: str, dashboard: dict[str, Any]) -> str:
    """With the variables replaced, which are all on "All"."""
    expression = expression.replace("$__rate_interval", f"{WINDOW}s")
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            expression = expression.replace("$" + variable["name"], variable["allValue"])
    assert "$" not in expression, expression
    return expression


def legend(form: str, labels: dict[str, str]) -> str:
    for name, value in labels.items():
        form = form.replace("{{" + name + "}}", value)
    return form


# --- the drawing ------------------------------------------------------------------------------


def draw(dashboard: dict[str, Any], found: dict[int, list[Series]]) -> str:
    """The panels at their places, as SVG."""
    bottom = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"])
    height = HEAD + UNIT * bottom
    title = f"The dashboard {dashboard['title']} after a run of {SECONDS} seconds: {len(dashboard['panels'])} panels."
    parts = [text((GAP, 26), dashboard["title"], bold=True, anchor="start")]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            label = f"{variable['label']}: {variable['current']['text']}"
            parts.append(text((110 + 100 * (len(parts) - 1), 26), label, small=True, anchor="start"))
    for panel in dashboard["panels"]:
        parts += panel_parts(panel, found.get(panel["id"], []))
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


def panel_parts(panel: dict[str, Any], lines: list[Series]) -> Iterator[str]:
    column, place = (WIDTH - GAP) / COLUMNS, panel["gridPos"]
    left, top = GAP + column * place["x"], HEAD + UNIT * place["y"]
    width, height = column * place["w"] - GAP, UNIT * place["h"] - GAP
    yield (
        f'<rect x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}" rx="4" '
        'fill="none" stroke="currentColor" stroke-opacity="0.3"/>'
    )
    yield text((left + MARGIN, top + 22), panel["title"], bold=True, anchor="start")
    inside = Area(left + MARGIN, top + 36, left + width - MARGIN, top + height - MARGIN)
    lines = [attrs.evolve(one, points=[point for point in one.points if math.isfinite(point[1])]) for one in lines]
    lines = [one for one in lines if one.points]
    if not lines:
        yield text((left + width / 2, top + height / 2 + 12), "no data", small=True)
    else:
        yield from {"stat": stat, "timeseries": chart}[panel["type"]](panel["fieldConfig"]["defaults"], lines, inside)


def stat(settings: dict[str, Any], lines: list[Series], area: Area) -> Iterator[str]:
    """The last value of each, side by side."""
    width = (area.right - area.left) / len(lines)
    for number, line in enumerate(lines):
        middle, value = area.left + width * (number + 0.5), line.points[-1][1]
        shown, color = label_of(value, settings["unit"]), "currentColor"
        for step in settings.get("thresholds", {}).get("steps", ()):
            if step["value"] is None or value >= step["value"]:
                color = NAMED[step["color"]]
        for mapping in settings.get("mappings", ()):
            option = mapping["options"].get(f"{value:g}")
            if option:
                shown, color = option["text"], NAMED[option["color"]]
        yield text((middle, area.top + 12), cut(line.name, width), small=True)
        yield (
            f'<text x="{middle:g}" y="{area.top + 40:g}" text-anchor="middle" font-size="24" font-weight="600" '
            f'fill="{color}">{html.escape(shown)}</text>'
        )


def chart(settings: dict[str, Any], lines: list[Series], area: Area) -> Iterator[str]:
    """Lines between two axes, and what each is below them."""
    unit, highest = settings["unit"], max(value for one in lines for _, value in one.points)
    rows = list(legend_rows([one.name for one in lines], area.right - area.left))
    right, bottom = area.right - 6, area.bottom - LINE * len(rows) - 22
    step = nice_step(highest / max(1, (bottom - area.top) // 22), least=1 if unit == "short" else 0)
    top = step * max(1, math.ceil(highest / step - 1e-9))
    ticks = [step * number for number in range(round(top / step) + 1)]
    left = area.left + CHARACTER * max(len(label_of(tick, unit)) for tick in ticks) + 6

    def at(second: float, value: float) -> Point:
        return left + (right - left) * second / SECONDS, bottom - (bottom - area.top) * value / top

    for tick in ticks:
        y = at(0, tick)[1]
        yield f'<path d="M{left:.1f} {y:.1f}H{right:.1f}" stroke="currentColor" stroke-opacity="0.18"/>'
        yield text((round(left - 6, 1), round(y + 4, 1)), label_of(tick, unit), small=True, anchor="end")
    for second in range(0, SECONDS + 1, 30):
        label = f"{second // 60}:{second % 60:02}"
        yield text((round(at(second, 0)[0], 1), round(bottom + 17, 1)), label, small=True)
    for number, line in enumerate(lines):
        color = COLORS[number % len(COLORS)]
        way = "".join(strokes([at(*point) for point in line.points], widest=1.5 * SCRAPE * (right - left) / SECONDS))
        yield f'<path d="{way}" fill="none" stroke="{color}" stroke-width="1.6" stroke-linecap="round"/>'
    for row, entries in enumerate(rows):
        y = area.bottom - LINE * (len(rows) - 1 - row)
        for x, number, name in entries:
            color = COLORS[number % len(COLORS)]
            yield f'<path d="M{area.left + x:.1f} {y - 4:.1f}h12" stroke="{color}" stroke-width="3"/>'
            yield text((round(area.left + x + 17, 1), round(y, 1)), name, small=True, anchor="start")


def strokes(points: list[Point], widest: float) -> Iterator[str]:
    """The line as commands of a path; it is interrupted where the next point is farther away than that."""
    last: Point | None = None
    for number, (x, y) in enumerate(points):
        if last is None or x - last[0] > widest:
            yield f"M{x:.1f} {y:.1f}h0"  # seen as a dot, if it stays alone
        elif y != last[1] or number + 1 == len(points) or points[number + 1][1] != y:
            yield f"L{x:.1f} {y:.1f}"
        last = x, y


def legend_rows(names: Sequence[str], width: float) -> Iterator[list[tuple[float, int, str]]]:
    """Rows of names with their place and number, as many in each as fit."""
    row: list[tuple[float, int, str]] = []
    x = 0.0
    for number, name in enumerate(names):
        name = cut(name, width - 17)
        needed = 17 + CHARACTER * len(name)
        if row and x + needed > width:
            yield row
            row, x = [], 0.0
        row.append((x, number, name))
        x += needed + 12
    yield row


def cut(name: str, width: float) -> str:
    fits = int(width / CHARACTER)
    return name if len(name) <= fits else name[: fits - 1] + "…"


def nice_step(least_step: float, least: float) -> float:
    """1, 2 or 5 times a power of ten, and at least both."""
    wanted = max(least_step, least) or 0.25
    power = 10.0 ** math.floor(math.log10(wanted))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= wanted * (1 - 1e-9))


def label_of(value: float, unit: str) -> str:
    """As Grafana writes a value of this unit."""
    if unit == "ops":
        return f"{value:.3g} ops/s"
    if unit == "s":
        return f"{value * 1000:.3g} ms" if 0 < value < 1 else f"{value:.3g} s"
    return f"{value / 1000:.3g} K" if value >= 1000 else f"{value:.3g}"


def main() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    with tempfile.TemporaryDirectory() as folder:
        found = run(dashboard, Path(folder))
    path = FOLDER / "dashboard.svg"
    path.write_text(draw(dashboard, found))
    print(path)


if __name__ == "__main__":
    main()
