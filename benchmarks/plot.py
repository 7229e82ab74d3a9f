"""Draws the plot: `python -m benchmarks.plot RESULTS.json OUT.svg`. Needs matplotlib, which `.venv-bench` has."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

INK, PAPER, GRID = "#1f2933", "#ffffff", "#e4e7eb"
LIGHTBUS, PEER, LIMIT = "#0b6e4f", "#9aa5b1", "#d9a441"

PANELS = (
    ("consume", "", "", "cpu_us", "Consume, async handler", "CPU per event, µs (lower is better)"),
    ("consume", "", "", "rate", "Consume, async handler", "events/s (higher is better)"),
    ("consume-sync", "", "", "cpu_us", "Consume, sync handler", "CPU per event, µs (lower is better)"),
    ("publish-500", "", "", "rate", "Publish, confirmed, 500 in flight", "events/s (higher is better)"),
    ("publish-500", "", "", "cpu_us", "Publish, confirmed, 500 in flight", "CPU per event, µs (lower is better)"),
    ("latency", "", "200 events/s", "p50_ms", "Publish to handler at 200 events/s", "p50, ms (lower is better)"),
)


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())["cases"]
    panels = [panel for panel in PANELS if panel[0] in cases]
    if not panels:
        sys.exit("no results for the plot")
    plt.rcParams.update(
        {
            "font.family": "DejaVu Sans",
            "font.size": 9,
            "text.color": INK,
            "svg.fonttype": "path",
            "svg.hashsalt": "lightbus",
        }
    )
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5.4 * columns, 2.7 * rows), facecolor=PAPER, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        _bars(axis, cases, panel)
    figure.tight_layout(pad=1.2)
    figure.savefig(sys.argv[2], facecolor=PAPER, metadata={"Date": None})


def _bars(axis: Any, cases: dict[str, Any], panel: tuple[str, ...]) -> None:
    case, group, part, metric, title, unit = panel
    lines = [
        line
        for line in cases[case]["summary"]
        if (line["group"], line["part"]) == (group, part)
        and metric in line["metrics"]
        and not (metric == "cpu_us" and line["label"].startswith("the limit"))
    ]
    lines.sort(key=lambda line: line["metrics"][metric]["median"], reverse=metric == "rate")
    medians = [line["metrics"][metric]["median"] for line in lines]
    spans = [
        [median - line["metrics"][metric]["min"] for median, line in zip(medians, lines, strict=True)],
        [line["metrics"][metric]["max"] - median for median, line in zip(medians, lines, strict=True)],
    ]
    places = range(len(lines))
    axis.barh(
        places, medians, xerr=spans, color=[_color(line["label"]) for line in lines], height=0.66,
        error_kw={"ecolor": INK, "elinewidth": 0.8, "capsize": 2},
    )  # fmt: skip
    most = max(line["metrics"][metric]["max"] for line in lines)
    for place, median, line in zip(places, medians, lines, strict=True):
        shown = f"{median:,.0f}" if median >= 10 else f"{median:.2f}"
        axis.text(line["metrics"][metric]["max"] + most * 0.02, place, shown, va="center", color=INK, fontsize=8)
    axis.set_yticks(list(places), [line["label"].replace(", its own", ", own") for line in lines], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, most * 1.18)
    axis.set_title(title, fontsize=10, fontweight="bold", loc="left", color=INK)
    axis.set_xlabel(unit, fontsize=8, color=INK)
    axis.tick_params(colors=INK, length=0)
    axis.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
    axis.grid(axis="x", color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.set_facecolor(PAPER)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(GRID)


def _color(label: str) -> str:
    if label.startswith("Lightbus"):
        return LIGHTBUS
    return LIMIT if label.startswith("the limit") else PEER


if __name__ == "__main__":
    main()
