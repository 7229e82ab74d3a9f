"""The figures on the first page: read from what `make bench` and `make faults` wrote."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import attrs

from benchmarks import results

DOCS = Path(__file__).parents[1]
PERFORMANCE = DOCS / "performance" / "results.json"
RELIABILITY = DOCS / "reliability.md"
SOURCES = (PERFORMANCE, RELIABILITY)


@attrs.frozen
class Figure:
    value: str
    text: str
    page: str


@attrs.frozen
class Faults:
    """The sums of the first table in docs/reliability.md."""

    scenarios: int
    confirmed: int
    lost: int


def faults() -> Faults:
    written = RELIABILITY.read_text().partition("<!-- written by `make faults`: begin -->")[2].partition("<!--")[0]
    table = re.findall(r"^\|.*\|$", written, re.MULTILINE)
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)

    def total(column: str) -> int:
        return sum(int(row[head.index(column)].replace(",", "")) for row in rows)

    return Faults(len(rows), total("confirmed"), total("lost"))


def consume() -> list[dict[str, Any]]:
    """The lines of the case `consume` (async handler): of each contestant, with each of its prefetch settings."""
    return results.summarise(json.loads(PERFORMANCE.read_text())["cases"]["consume"])


def ratio(metric: str, peer: str) -> float:
    """How many times better Lightbus is: the smallest of the peer's ratios, as in the targets."""
    return min(line["metrics"][metric]["ratio"] for line in consume() if line["label"].startswith(peer))


def median(metric: str, label: str) -> float:
    (found,) = (line["metrics"][metric]["median"] for line in consume() if line["label"] == label)
    return float(found)


def all_figures() -> list[Figure]:
    tested = faults()
    return [
        Figure(
            f"{median('rate', 'Lightbus'):,.0f}",
            "events/s in one process, each validated, handled and acknowledged",
            "performance.html",
        ),
        *(
            Figure(f"1/{ratio('cpu_us', peer):.0f}", f"of the CPU that {peer} needs per event", "performance.html")
            for peer in ("FastStream", "Celery")
        ),
        Figure(
            f"{tested.lost} lost",
            f"of {tested.confirmed:,} confirmed events, in {tested.scenarios} fault tests",
            "reliability.html#fault-tests",
        ),
    ]


def as_html() -> str:
    items = "".join(
        f'<a href="{one.page}"><strong>{html.escape(one.value)}</strong> <span>{html.escape(one.text)}</span></a>'
        for one in all_figures()
    )
    return f'<div class="figures">{items}</div>'
