"""The picture of the dashboard: drawn with made-up data, without servers; and the one on the page."""

from __future__ import annotations

import importlib
import json
import math
import re
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"
DASHBOARD: dict[str, Any] = json.loads((DOCS / "examples" / "monitoring" / "dashboard.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def picture(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(DOCS / "site"))
    return importlib.import_module("dashboard_picture")


def words(svg: str) -> list[str]:
    return [one.text or "" for one in xml.etree.ElementTree.fromstring(svg).iter(f"{SVG}text")]


def drawn(picture: Any, title: str, **series: list[float]) -> str:
    """The dashboard, of which one panel has these values, two seconds apart."""
    (panel,) = (one for one in PANELS if one["title"] == title)
    lines = [
        picture.Series(name, [(picture.SCRAPE * number, value) for number, value in enumerate(values)])
        for name, values in series.items()
    ]
    svg: str = picture.draw(DASHBOARD, {panel["id"]: lines})
    return svg


def test_each_panel_is_drawn_with_its_lines_and_the_names_of_them(picture: Any) -> None:
    found = {
        panel["id"]: [picture.Series(f"<{panel['id']}> & {number}", [(0, 1.0), (120, 3.0)]) for number in range(3)]
        for panel in PANELS
    }
    svg = picture.draw(DASHBOARD, found)
    assert {panel["title"] for panel in PANELS} <= set(words(svg))
    assert {f"<{panel['id']}> & 2" for panel in PANELS} <= set(words(svg))
    assert svg.count('fill="none" stroke="#') == 3 * sum(panel["type"] == "timeseries" for panel in PANELS)
    assert "no data" not in words(svg)


def test_a_panel_without_values_says_so(picture: Any) -> None:
    svg = drawn(picture, "Age of events", one=[math.nan, math.nan])
    assert words(svg).count("no data") == len(PANELS)
    assert {panel["title"] for panel in PANELS} <= set(words(svg))


@pytest.mark.parametrize(
    ("title", "value", "shown", "color"),
    [
        ("Ready", 1, "ready", "QUEUE"),
        ("Ready", 0, "not ready", "FAILURE"),
        ("Dead letters", 0, "0", "QUEUE"),
        ("Dead letters", 1, "1", "FAILURE"),
        ("Consumers of each queue", 0, "0", "FAILURE"),
    ],
)
def test_a_number_has_the_text_and_the_colour_of_its_panel(
    picture: Any, title: str, value: float, shown: str, color: str
) -> None:
    svg = drawn(picture, title, billing=[7, value])
    assert f'fill="{getattr(picture, color)}">{shown}</text>' in svg


def test_axes_have_units_and_round_steps(picture: Any) -> None:
    def axis(title: str, *values: float) -> list[str]:
        return re.findall(r'text-anchor="end" font-size="12">(.*)</text>', drawn(picture, title, one=[*values]))

    assert axis("Events handled", 3, 7.5) == ["0 ops/s", "2 ops/s", "4 ops/s", "6 ops/s", "8 ops/s"]
    assert axis("Duration of handlers", 0.75, 1) == ["0 s", "200 ms", "400 ms", "600 ms", "800 ms", "1 s"]
    assert axis("Waiting in queues", 0, 0) == ["0", "1"]
    assert axis("Waiting in queues", 3900, 0) == ["0", "1 K", "2 K", "3 K", "4 K"]


def test_a_line_is_interrupted_where_there_is_no_value(picture: Any) -> None:
    svg = drawn(picture, "Events handled", one=[1, 2, math.nan, 2, 3])
    (way,) = re.findall(r'd="(\S* .*?)" fill="none" stroke="#', svg)
    assert way.count("M") == way.count("L") == 2


def test_long_names_are_cut_and_many_take_several_rows(picture: Any) -> None:
    name = "a handler whose name " + "is long " * 20
    svg = drawn(picture, "Events by handler", **{name: [1.0]}, **{f"handler_number_{n}": [1.0] for n in range(8)})
    (long,) = (one for one in words(svg) if one.startswith("a handler"))
    assert long.endswith("…")
    rows = re.findall(r'y="(\S+)" text-anchor="start" font-size="12">handler_number_', svg)
    assert len(rows) == 8
    assert 1 < len(set(rows)) < 8


def test_variables_of_grafana_are_replaced(picture: Any) -> None:
    for panel in PANELS:
        for target in panel["targets"]:
            assert "$" not in picture.as_grafana_sends(target["expr"], DASHBOARD)
    sent = picture.as_grafana_sends('rate(one{app=~"$app", queue=~"$queue"}[$__rate_interval])', DASHBOARD)
    assert sent == 'rate(one{app=~".*", queue=~".*"}[8s])'
    assert picture.legend("{{queue}} p99", {"queue": "billing.main", "le": "1"}) == "billing.main p99"


def test_the_picture_of_the_page_is_that_of_the_dashboard() -> None:
    svg = (DOCS / "pictures" / "dashboard.svg").read_text()
    assert {panel["title"] for panel in PANELS} <= set(words(svg)), "make pictures"
    assert svg.count("M") > 2 * len(PANELS)
    assert not re.search(r"/(tmp|home|root|work)\b|127\.0\.0\.1", svg)
