"""A catalogue as an SVG picture: each app on the left, then its events, then the apps that handle each of them.

An app that handles events is drawn beside each of them, in the place of lines to one box. So lines never cross, however
many apps there are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from lightbus.cli import drawing, tables
from lightbus.cli.catalog import overview
from lightbus.cli.drawing import BOX, GAP, MARGIN, ROW, Canvas, width_of

if TYPE_CHECKING:
    from lightbus.catalog.catalog import Subscriber
    from lightbus.catalog.contract import Contract, PublishedEvent
    from lightbus.cli.catalog.reading import Reading

CHIP = 26
"""The height of an event, and of an app beside it."""
LINE = CHIP + 10
ROOM = 620
"""The width for the apps beside an event. The others are on further lines."""

STYLE = (
    drawing.STYLE
    + """
rect.event { fill: var(--back); stroke: var(--c0); stroke-width: 1.5; }
rect.app { fill: var(--box); stroke: var(--line); stroke-width: 1.5; }
rect.down { stroke: var(--bad); stroke-dasharray: 4 3; }
rect.unconsumed { stroke: var(--line); stroke-dasharray: 4 3; }"""
)


@attrs.frozen
class _Chip:
    """An app beside an event."""

    text: str
    tooltip: str
    down: bool

    @property
    def width(self) -> int:
        return width_of([self.text]) + 20


def draw(reading: Reading) -> str:
    """The picture of all apps that publish, and below it those that only handle events."""
    return _Picture(reading).svg()


class _Picture:
    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.catalog = reading.catalog
        self.canvas = Canvas()
        self.title = overview.heading(reading)
        publishing = [one for one in self.catalog.contracts if one.events]
        self.app_width = max(width_of([one.app for one in publishing], 90), width_of(self._states(publishing))) + 28
        self.event = MARGIN + self.app_width + 40
        self.event_width = width_of([event.name for _, event in self.catalog.events()], 90) + 24
        self.chips = self.event + self.event_width + 40
        self.right = self.chips + 100
        """The right end of what is drawn."""

    def _states(self, contracts: list[Contract]) -> list[str]:
        return [self._state(one) for one in contracts]

    def _state(self, contract: Contract) -> str:
        """The line below an app's name."""
        live = self.reading.live
        if live is None or not contract.handlers:
            return (
                f"release {contract.release}" if contract.release else overview.counted(len(contract.events), "event")
            )
        count = live.consumers(contract)
        return "consumers: ?" if count is None else overview.counted(count, "consumer")

    def svg(self) -> str:
        self.canvas.text(MARGIN, MARGIN + 12, self.title, "name", whole=True)
        top = MARGIN + 2 * ROW
        self._head(top)
        top += GAP
        for contract in self.catalog.contracts:
            if contract.events:
                top = self._draw_app(contract, top) + GAP
        top = self._draw_others(top)
        if not self.catalog.contracts:
            self.canvas.text(MARGIN, top + ROW, overview.NONE, "faint", whole=True)
            top += 2 * ROW
        self._draw_legend(top + ROW)
        width = max(self.right + MARGIN, round(len(self.title) * drawing.CHARACTER) + 2 * MARGIN)
        return self.canvas.svg(self.title, width, top + 2 * ROW, STYLE)

    def _head(self, top: int) -> None:
        for x, text in ((MARGIN, "published by"), (self.event, "event"), (self.chips, "handled by")):
            self.canvas.text(x, top, text, "faint")

    def _draw_app(self, contract: Contract, top: int) -> int:
        """Returns where it ends."""
        rows = [(event, self._lines(self._chips(contract, event))) for event in contract.events]
        lines = sum(max(1, len(chips)) for _, chips in rows)
        height = max(BOX, lines * LINE - (LINE - CHIP))
        self.canvas.rectangle("app", MARGIN, top, self.app_width, height)
        self.canvas.text(MARGIN + 14, top + 18, contract.app, "name")
        self.canvas.text(MARGIN + 14, top + 35, self._state(contract), "faint")
        y = top
        for event, chips in rows:
            self._draw_event(event, chips, y)
            y += LINE * max(1, len(chips))
        return top + height

    def _draw_event(self, event: PublishedEvent, lines: list[list[_Chip]], top: int) -> None:
        middle = top + CHIP // 2
        self.canvas.line([(MARGIN + self.app_width, middle), (self.event, middle)])
        kind = "event" if lines else "event unconsumed"
        self.canvas.rectangle(kind, self.event, top, self.event_width, CHIP, radius=CHIP // 2)
        self.canvas.text(self.event + 12, top + 17, event.name)
        if not lines:
            self.canvas.text(self.chips, top + 17, "no handler", "faint")
            return
        self.canvas.line([(self.event + self.event_width, middle), (self.chips, middle)])
        for number, chips in enumerate(lines):
            x = self.chips
            for chip in chips:
                y = top + LINE * number
                self.canvas.parts.append(f"<g><title>{drawing.escaped(chip.tooltip)}</title>")
                self.canvas.rectangle("app down" if chip.down else "app", x, y, chip.width, CHIP)
                self.canvas.text(x + 10, y + 17, chip.text)
                self.canvas.parts.append("</g>")
                self.right = max(self.right, x + chip.width)
                x += chip.width + 8

    def _chips(self, contract: Contract, event: PublishedEvent) -> list[_Chip]:
        by_app: dict[str, list[Subscriber]] = {}
        for one in self.catalog.subscribers(event.name, contract.app):
            by_app.setdefault(one.contract.app, []).append(one)
        return [self._chip(app, several) for app, several in by_app.items()]

    def _chip(self, app: str, several: list[Subscriber]) -> _Chip:
        names = ", ".join(overview.handler(self.reading, one) for one in several)
        return _Chip(app, names, all(overview.is_down(self.reading, one) for one in several))

    def _lines(self, chips: list[_Chip]) -> list[list[_Chip]]:
        lines: list[list[_Chip]] = []
        used = ROOM
        for chip in chips:
            if used + chip.width > ROOM:
                lines.append([])
                used = 0
            lines[-1].append(chip)
            used += chip.width + 8
        return lines

    def _draw_others(self, top: int) -> int:
        """Apps without events: they are beside the events that they handle, or nowhere if they handle none."""
        others = [one.app for one in self.catalog.contracts if not one.events]
        if not others:
            return top
        text = f"Without events of their own: {tables.printable(', '.join(others), 120)}"
        self.canvas.text(MARGIN, top + ROW, text, "faint", whole=True)
        self.right = max(self.right, MARGIN + round(len(text) * drawing.CHARACTER))
        return top + ROW + GAP

    def _draw_legend(self, y: int) -> None:
        x = MARGIN
        kinds = [("app", "app", 4), ("event", "event", 7), ("event unconsumed", "event without a handler", 7)]
        if self.reading.live is not None:
            kinds.append(("app down", "no consumer", 4))
        for kind, text, radius in kinds:
            self.canvas.rectangle(kind, x, y - 11, 26, 14, radius=radius)
            self.canvas.text(x + 34, y, text, "faint")
            x += 34 + round(len(text) * drawing.CHARACTER) + 28
        self.right = max(self.right, x - 28)
