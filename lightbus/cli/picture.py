"""An app's topology as an SVG picture: publishing on the left, subscriptions in the middle, failures on the right.

All elements are placed in a grid, and lines follow its rows and columns. So nothing overlaps, even with long names or
retry schedules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import attrs

from lightbus.cli import tables
from lightbus.cli.drawing import BOX, CHARACTER, GAP, LONGEST, MARGIN, ROW, Canvas, escaped, width_of

if TYPE_CHECKING:
    from lightbus import Lightbus
    from lightbus.handler import Handler
    from lightbus.inspection.states import ObjectState, States
    from lightbus.wire.topology import ConsumedQueue


def draw(app: Lightbus, states: States | None = None, place: str = "") -> str:
    """
    Args:
        states: the state on a broker, shown in the boxes.
        place: the broker, for the title.
    """
    return _Picture(app, states, place).svg()


@attrs.frozen
class _Band:
    """One consumed queue, with its bindings on the left, and its handlers and retry queues on the right."""

    queue: ConsumedQueue
    handlers: Sequence[Handler]
    top: int

    def row(self, number: int) -> int:
        """The y position of a binding's line. The first one is level with the first exchange."""
        return self.top + BOX // 2 + ROW * number

    @property
    def schedule_height(self) -> int:
        return ROW * (len(self.queue.delays) + 1) + 12 if self.queue.delays else 0

    @property
    def handlers_height(self) -> int:
        return max(1, len(self.handlers)) * (BOX + 8)

    @property
    def height(self) -> int:
        """The height of the queue's box, so that every line to and from it is horizontal."""
        patterns = ROW * len(self.queue.patterns) + 12
        return max(patterns, 3 * ROW, self.handlers_height + 2 * ROW + 8, self.schedule_height)

    @property
    def bottom(self) -> int:
        return self.top + self.height


class _Picture:
    def __init__(self, app: Lightbus, states: States | None, place: str) -> None:
        from lightbus.wire.topology import BUS, internal_name

        self.app = app
        self.states = states
        self.title = f"{app.name}: exchanges, queues and handlers" + (f", on {place}" if place else "")
        self.internal = internal_name(app.name)
        self.rail_text = f"{self.internal}  ({_wrong(self._state(self.internal, queue=False)) or 'direct'})"
        self.canvas = Canvas()
        self.bands: list[_Band] = []
        top = MARGIN + 2 * ROW
        for queue in app.consumed_queues():
            handlers = [one for one in app.handlers.values() if one.queue == queue.suffix]
            self.bands.append(_Band(queue, handlers, top))
            top = self.bands[-1].bottom + 2 * GAP
        self.first = self.bands[0].top
        # Far enough below, so that the vertical name of the internal exchange fits.
        self.dead_top = max(top, self.first + round((min(len(self.rail_text), LONGEST) + 3) * CHARACTER) - BOX)
        # The exchanges that queues are bound to, except the app's own. Each has one column for its lines.
        sources = {exchange for queue in app.consumed_queues() for exchange, _ in queue.patterns}
        self.exchanges = [BUS, *sorted(sources - {BUS, app.name})]
        self.handles_its_own = app.name in sources
        self._set_columns(sources)

    def _set_columns(self, sources: set[str]) -> None:
        patterns = [pattern for band in self.bands for _, pattern in band.queue.patterns]
        queues = [text for band in self.bands for text in self._queue_texts(band.queue.name)]
        handlers = [text for one in self.app.handlers.values() for text in _handler_texts(one)]
        steps = [self._step(band.queue, delay) for band in self.bands for delay in band.queue.delays]
        schedules = width_of([name for name, _, _ in steps]) + 24 + width_of([text for _, text, _ in steps])
        self.own = MARGIN
        self.own_width = width_of([self.app.name], 110) + 28
        self.bus = self.own + self.own_width + 60
        self.bus_width = width_of(self.exchanges, 120) + 28
        self.trunks = self.bus + self.bus_width + 20
        self.labels = self.trunks + 12 * (len(sources) + 1)
        self.queue = self.labels + width_of(patterns, 40) + 40
        self.queue_width = width_of(queues, 120) + 28
        self.handler = self.queue + self.queue_width + 40
        self.handler_width = width_of(handlers, 190) + 28
        self.rail = self.handler + self.handler_width + 70
        self.schedule = self.rail + 34 + 110
        self.schedule_width = max(width_of(self._queue_texts(f"{self.app.name}.dead"), 170), schedules) + 28
        self.right = self.schedule + self.schedule_width + MARGIN
        self.bottom = max(self.dead_top + BOX + 3 * GAP, self.first + (len(self.exchanges) + 1) * (BOX + GAP) + 2 * GAP)

    # --- texts in the boxes

    def _state(self, name: str, *, queue: bool) -> ObjectState | None:
        if self.states is None:
            return None
        return (self.states.queues if queue else self.states.exchanges)[name]

    def _queue_texts(self, name: str) -> list[str]:
        state = self._state(name, queue=True)
        kind = f"{self.app.queue_type} queue"
        if state is None:
            return [name, kind]
        if not state.exists:
            return [name, _wrong(state)]
        counts = f"{state.ready:,} ready, {state.consumers} consuming"
        return [name, counts, *([_wrong(state)] if _wrong(state) else [])]

    def _step(self, queue: ConsumedQueue, delay: float) -> tuple[str, str, bool]:
        """The name of a retry queue, its description, and whether it is missing or differs."""
        from lightbus.wire.topology import retry_key

        name = f"{self.app.name}.{retry_key(queue.suffix, delay)}"
        state = self._state(name, queue=True)
        if state is None:
            return name, f"{delay:g} s", False
        found = [*([f"{state.ready:,} wait"] if state.exists else []), *([_wrong(state)] if _wrong(state) else [])]
        return name, f"{delay:g} s: {', '.join(found)}", bool(_wrong(state))

    # --- drawing

    def svg(self) -> str:
        self.canvas.text(MARGIN, MARGIN + 12, self.title, "name", whole=True)
        self._draw_publishing()
        for band in self.bands:
            self._draw_subscription(band)
            self._draw_failures(band)
        self._draw_dead_letters()
        self._draw_internal_exchange()
        self._draw_legend()
        width, height = max(self.right, round(len(self.title) * CHARACTER) + 2 * MARGIN), self.bottom + ROW + 12
        return self.canvas.svg(self.title, width, height)

    def _draw_publishing(self) -> None:
        from lightbus.wire.topology import BUS

        self._exchange(self.own, self.first, self.own_width, self.app.name, "topic")
        middle = self.first + BOX // 2
        self.canvas.line([(self.own + self.own_width, middle), (self.bus, middle)])
        self.canvas.text(self.own + self.own_width + 22, middle - 6, "#")
        for number, exchange in enumerate(self.exchanges):
            kind = "topic, internal" if exchange == BUS else "topic"
            top = self.first + number * (BOX + GAP)
            self._exchange(self.bus, top, self.bus_width, exchange, kind)
            self._trunk(exchange, number, [(self.bus + self.bus_width, top + BOX // 2)])
        if self.handles_its_own:
            low = self.first + len(self.exchanges) * (BOX + GAP)
            start = self.own + self.own_width // 2
            self._trunk(self.app.name, len(self.exchanges), [(start, self.first + BOX), (start, low)])

    def _trunk(self, exchange: str, number: int, way: list[tuple[int, int]]) -> None:
        """Lines from an exchange to each of its bindings: one column, from which the rows branch off."""
        column = self.trunks + 12 * number
        for band in self.bands:
            for row, (source, _) in enumerate(band.queue.patterns):
                if source == exchange:
                    height = band.row(row)
                    points = [*way, (column, way[-1][1]), (column, height), (self.queue, height)]
                    self.canvas.line(points, f"c{number % 4}")

    def _draw_subscription(self, band: _Band) -> None:
        for row, (_, pattern) in enumerate(band.queue.patterns):
            self.canvas.text(self.labels + 4, band.row(row) - 6, pattern)
        self._queue(self.queue, band.top, self.queue_width, band.height, band.queue.name)
        for number, handler in enumerate(band.handlers):
            top = band.top + number * (BOX + 8)
            middle = top + BOX // 2
            self.canvas.line([(self.queue + self.queue_width, middle), (self.handler, middle)])
            self._box("handler", self.handler, top, self.handler_width, BOX, _handler_texts(handler))
            self.canvas.line([(self.handler + self.handler_width, middle), (self.rail, middle)])
            self.canvas.text(self.handler + self.handler_width + 12, middle - 6, "fails", "faint")
        if not band.handlers:
            self.canvas.text(self.handler, band.top + BOX // 2, "no handler", "faint")

    def _draw_failures(self, band: _Band) -> None:
        edge, low = self.queue + self.queue_width, band.bottom
        if self.app.queue_type == "quorum":
            self.canvas.line([(edge, low - 8), (self.rail, low - 8)])
            self.canvas.text(edge + 12, low - 14, "redelivered 20 times", "faint")
        self.canvas.line([(self.rail, low - 8 - ROW), (edge, low - 8 - ROW)], "again")
        self.canvas.text(edge + 12, low - 14 - ROW, f"{band.queue.suffix}: to be retried", "faint")
        if not band.queue.delays:
            return
        edge = self.rail + 34
        self.canvas.line([(edge, band.top + ROW), (self.schedule, band.top + ROW)])
        self.canvas.text(edge + 12, band.top + ROW - 6, "retry", "faint")
        back = band.top + band.schedule_height - ROW // 2
        self.canvas.line([(self.schedule, back), (edge, back)], "again")
        self.canvas.text(edge + 12, back - 6, "delay is over", "faint")
        steps = [self._step(band.queue, delay) for delay in band.queue.delays]
        wrong = any(one for _, _, one in steps)
        self.canvas.rectangle("queue", self.schedule, band.top, self.schedule_width, band.schedule_height, wrong)
        self.canvas.text(self.schedule + 14, band.top + 18, "a queue for each delay", "faint")
        for row, (name, text, wrong) in enumerate(steps):
            height = band.top + ROW * (row + 1) + 18
            self.canvas.text(self.schedule + 14, height, name, "name")
            right = self.schedule + self.schedule_width - 14
            self.canvas.text(right, height, text, "bad" if wrong else "faint", anchor="end")

    def _draw_dead_letters(self) -> None:
        middle = self.dead_top + BOX // 2
        self.canvas.line([(self.rail + 34, middle), (self.schedule, middle)])
        self.canvas.text(self.rail + 46, middle - 6, "dead", "faint")
        self._queue(self.schedule, self.dead_top, self.schedule_width, BOX, f"{self.app.name}.dead")

    def _draw_internal_exchange(self) -> None:
        """The internal exchange is a column, because every failed event passes through it."""
        height = self.dead_top + BOX - self.first
        state = self._state(self.internal, queue=False)
        self.canvas.rectangle("exchange", self.rail, self.first, 34, height, bool(_wrong(state)), 17)
        x, y = self.rail + 21, self.first + height // 2
        shown = tables.printable(self.rail_text, round(height / CHARACTER) - 3)
        self.canvas.parts.append(
            f'<text class="name" transform="translate({x} {y}) rotate(-90)" text-anchor="middle">{escaped(shown)}'
            f"<title>{escaped(self.rail_text)}</title></text>"
        )

    def _draw_legend(self) -> None:
        x, y = MARGIN, self.bottom + ROW // 2
        for kind, text in (("exchange", "exchange"), ("queue", "queue"), ("handler", "handler: your function")):
            self.canvas.rectangle(kind, x, y - 11, 26, 14, radius=7 if kind == "exchange" else 3)
            self.canvas.text(x + 34, y, text, "faint")
            x += 34 + round(len(text) * CHARACTER) + 28

    def _exchange(self, x: int, y: int, width: int, name: str, kind: str) -> None:
        wrong = _wrong(self._state(name, queue=False))
        self._box("exchange", x, y, width, BOX, [name, wrong or kind], bool(wrong), radius=BOX // 2)

    def _queue(self, x: int, y: int, width: int, height: int, name: str) -> None:
        wrong = bool(_wrong(self._state(name, queue=True)))
        self._box("queue", x, y, width, height, self._queue_texts(name), wrong)

    def _box(
        self,
        kind: str,
        x: int,
        y: int,
        width: int,
        height: int,
        texts: Sequence[str],
        wrong: bool = False,
        radius: int = 4,
    ) -> None:
        self.canvas.rectangle(kind, x, y, width, height, wrong, radius)
        self.canvas.text(x + 14, y + 18, texts[0], "name")
        for row, text in enumerate(texts[1:]):
            self.canvas.text(x + 14, y + 35 + 17 * row, text, "bad" if wrong else "faint")


def _handler_texts(handler: Handler) -> list[str]:
    return [handler.name, ", ".join(handler.patterns) + (f" from {handler.source}" if handler.source else "")]


def _wrong(state: ObjectState | None) -> str:
    if state is None:
        return ""
    return "missing" if not state.exists else "differs" if state.difference else ""
