"""The map: apps that publish on the left, their events in the middle, apps that handle them on the right.

Pure values: a template draws them as SVG.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import attrs

from lightbus.catalog.contract import Contract, PublishedEvent
from lightbus.web import text
from lightbus.web.source import Snapshot

MOST_EVENTS = 60
"""Events on one map. More are not legible: a search or an app selects them."""
MOST_LISTENERS = 400
"""Lines from events to apps on one map."""
CHARACTER = 7.9
"""The width of a character, in pixels, of the font in the style sheet."""
LONGEST = 34
"""Characters of a name that are drawn."""
ROW, BOX, GAP, MARGIN = 34, 26, 14, 12
COLUMN_GAP, WIDEST_GAP = 80, 260


@attrs.frozen
class Node:
    """A box with a name, which is a link."""

    x: float
    y: float
    width: float
    height: float
    kind: str
    """The class in the style sheet: `app`, `app down`, `event`, `event alone`."""
    label: str
    path: str
    tooltip: str
    focus: bool

    @property
    def middle(self) -> float:
        return self.y + self.height / 2


@attrs.frozen
class Edge:
    """A line between two boxes."""

    x1: float
    y1: float
    x2: float
    y2: float
    down: bool
    source: str
    """The `path` of the box on the left."""
    target: str

    @property
    def d(self) -> str:
        """The path of a curve."""
        half = (self.x1 + self.x2) / 2
        return f"M{self.x1:g} {self.y1:g}C{half:g} {self.y1:g} {half:g} {self.y2:g} {self.x2:g} {self.y2:g}"


@attrs.frozen
class Picture:
    """What is drawn."""

    width: float
    height: float
    nodes: list[Node]
    edges: list[Edge]
    columns: list[tuple[float, str]]
    """The headings: where each begins, and its text."""


Pair = tuple[Contract, PublishedEvent]


def draw(snapshot: Snapshot, pairs: Sequence[Pair], focus: str = "") -> Picture:
    """
    Args:
        pairs: the events to draw, in order; those of one app one after the other.
        focus: the name of the app or event to mark.
    """
    by_app: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_app.setdefault(pair[0].app, []).append(pair)
    listeners = [list(_listeners(snapshot, pair)) for several in by_app.values() for pair in several]
    order = _order(listeners)
    widths = [
        _width(by_app),
        _width(event.name for _, event in pairs),
        _width(order),
    ]
    lines = sum(map(len, listeners))
    left = [float(MARGIN), MARGIN + widths[0] + COLUMN_GAP]
    left.append(left[1] + widths[1] + min(WIDEST_GAP, COLUMN_GAP + 3 * lines))  # many lines need room
    nodes: list[Node] = []
    edges: list[Edge] = []
    top = 2.0 * MARGIN + 14
    events: list[Node] = []
    y = top
    for app, several in by_app.items():
        begin = y
        contract = several[0][0]
        owned: list[Node] = []
        for _, event in several:
            count = len(listeners[len(events) + len(owned)])
            owned.append(_event(event, left[1], y, widths[1], count, focus))
            y += ROW
        box = _app(snapshot, contract, app, left[0], begin, widths[0], y - begin - (ROW - BOX), focus)
        nodes.append(box)
        edges += [Edge(box.x + box.width, one.middle, one.x, one.middle, False, box.path, one.path) for one in owned]
        events += owned
        y += GAP
    nodes += events
    height = y
    span = height - GAP - top
    step = max(float(ROW), min(3.0 * ROW, span / max(1, len(order))))
    first = top + max(0.0, (span - step * len(order)) / 2)
    handling: dict[str, Node] = {}
    contracts = {one.app: one for one in snapshot.catalog.contracts}
    for number, app in enumerate(order):
        handling[app] = _app(
            snapshot, contracts.get(app), app, left[2], first + step * number + (step - ROW) / 2, widths[2], BOX, focus
        )
    for event_node, apps in zip(events, listeners, strict=True):
        for app in apps:
            if len(edges) < MOST_LISTENERS + len(events):
                to = handling[app]
                right = event_node.x + event_node.width
                down = "down" in to.kind
                edges.append(Edge(right, event_node.middle, to.x, to.middle, down, event_node.path, to.path))
    nodes += handling.values()
    bottom = max([height, *(one.y + one.height + GAP for one in handling.values())])
    headings = ["Published by", "Event", "Handled by"]
    return Picture(left[-1] + widths[-1] + MARGIN, bottom, nodes, edges, list(zip(left, headings, strict=True)))


def _listeners(snapshot: Snapshot, pair: Pair) -> Iterable[str]:
    contract, event = pair
    return dict.fromkeys(one.contract.app for one in snapshot.catalog.subscribers(event.name, contract.app))


def _order(listeners: Sequence[Iterable[str]]) -> list[str]:
    """The apps on the right, each near the middle of its events, so that few lines cross."""
    places: dict[str, list[int]] = {}
    for number, apps in enumerate(listeners):
        for app in apps:
            places.setdefault(app, []).append(number)
    return sorted(places, key=lambda app: (sum(places[app]) / len(places[app]), app))


def _width(names: Iterable[str]) -> float:
    return max([90.0, *(min(len(one), LONGEST) * CHARACTER + 26 for one in names)])


def _event(event: PublishedEvent, x: float, y: float, width: float, listeners: int, focus: str) -> Node:
    tooltip = f"Event {event.name}, version {event.version}: " + (
        f"handled by {text.counted(listeners, 'app')}" if listeners else "no handler gets it"
    )
    kind = "event" if listeners else "event alone"
    label = text.cut(event.name, LONGEST)
    return Node(x, y, width, BOX, kind, label, f"/events/{text.quoted(event.name)}", tooltip, event.name == focus)


def _app(
    snapshot: Snapshot,
    contract: Contract | None,
    name: str,
    x: float,
    y: float,
    width: float,
    height: float,
    focus: str,
) -> Node:
    down = contract is not None and snapshot.is_down(contract)
    tooltip = f"App {name}{': no worker consumes its queues' if down else ''}"
    label = text.cut(name, LONGEST)
    return Node(
        x, y, width, height, "app down" if down else "app", label, f"/apps/{text.quoted(name)}", tooltip, name == focus
    )
