"""The drawings in docs/pictures: `make pictures` writes them, and a test fails if they are out of date.

Each consists of boxes and arrows. On the site, lines and text have the colour of the text around them. Where the file
is shown alone, as on GitHub, the style at its beginning sets the colour, light or dark.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

import attrs

FOLDER = Path(__file__).parents[1] / "pictures"
STYLE = """<style>
  svg { color: #1f2328; background: #ffffff; }
  @media (prefers-color-scheme: dark) { svg { color: #d1d7e0; background: #151b23; } }
</style>"""
# Readable on white and on black.
EXCHANGE, QUEUE, CODE, FAILURE = "#2f81f7", "#1a9c4b", "#8b949e", "#e5534b"
HEIGHT = 44

Point = tuple[float, float]


@attrs.frozen
class Box:
    """An exchange (round), a queue (with bars) or code (plain)."""

    x: float
    y: float
    width: float
    name: str
    note: str = ""
    color: str = CODE

    @property
    def left(self) -> Point:
        return self.x, self.y + HEIGHT / 2

    @property
    def right(self) -> Point:
        return self.x + self.width, self.y + HEIGHT / 2

    def top(self, part: float = 0.5) -> Point:
        return self.x + self.width * part, self.y

    def bottom(self, part: float = 0.5) -> Point:
        return self.x + self.width * part, self.y + HEIGHT

    def __str__(self) -> str:
        middle = self.x + self.width / 2
        place = f'x="{self.x:g}" y="{self.y:g}" width="{self.width:g}" height="{HEIGHT}"'
        round_by = HEIGHT / 2 if self.color == EXCHANGE else 4
        shape = f'<rect {place} rx="{round_by:g}" fill="{self.color}" fill-opacity="0.12" stroke="{self.color}"/>'
        bars = [
            f'<path d="M{self.right[0] - step:g} {self.y + 8:g}v{HEIGHT - 16}" stroke="{self.color}"/>'
            for step in ((6, 10, 14) if self.color == QUEUE else ())
        ]
        if not self.note:
            return "\n".join([shape, *bars, text((middle, self.y + 27), self.name, bold=True)])
        lines = [text((middle, self.y + 19), self.name, bold=True), text((middle, self.y + 35), self.note, small=True)]
        return "\n".join([shape, *bars, *lines])


@attrs.frozen
class Arrow:
    """A line through the points, and its label at `at`."""

    points: Sequence[Point]
    label: str = ""
    at: Point = (0, 0)
    anchor: str = "middle"
    color: str = "currentColor"

    def __str__(self) -> str:
        way = " ".join(f"{x:g},{y:g}" for x, y in self.points)
        head = "failure" if self.color == FAILURE else "arrow"
        line = f'<polyline points="{way}" fill="none" stroke="{self.color}" marker-end="url(#NAME-{head})"/>'
        return line + ("\n" + text(self.at, self.label, small=True, anchor=self.anchor) if self.label else "")


@attrs.frozen
class Frame:
    """A dashed line around what belongs together."""

    x: float
    y: float
    width: float
    height: float

    def __str__(self) -> str:
        place = f'x="{self.x:g}" y="{self.y:g}" width="{self.width:g}" height="{self.height:g}"'
        return f'<rect {place} rx="8" fill="none" stroke="currentColor" stroke-dasharray="5 4" stroke-opacity="0.6"/>'


@attrs.frozen
class Label:
    at: Point
    label: str
    bold: bool = False
    anchor: str = "start"

    def __str__(self) -> str:
        return text(self.at, self.label, bold=self.bold, small=not self.bold, anchor=self.anchor)


def text(at: Point, label: str, *, bold: bool = False, small: bool = False, anchor: str = "middle") -> str:
    weight = ' font-weight="600"' if bold else ""
    size = ' font-size="12"' if small else ""
    place = f'x="{at[0]:g}" y="{at[1]:g}" text-anchor="{anchor}"'
    return f"<text {place}{size}{weight}>{html.escape(label, quote=False)}</text>"


def drawing(name: str, title: str, size: tuple[int, int], parts: Sequence[Box | Arrow | Frame | Label]) -> str:
    """The picture as SVG. The title is for screen readers."""
    width, height = size
    head = '<marker id="{}-{}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
    heads = [
        head.format(name, kind) + f'<path d="M0 0.5L8 4L0 7.5z" fill="{color}"/></marker>'
        for kind, color in (("arrow", "currentColor"), ("failure", FAILURE))
    ]
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"',
        f'  role="img" aria-label="{html.escape(title)}"',
        '  font-family="system-ui, sans-serif" font-size="14" stroke-width="1.4" fill="currentColor">',
        STYLE,
        "<defs>",
        *heads,
        "</defs>",
        *(str(part).replace("NAME", name) for part in parts),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def one_event() -> str:
    publish = Box(10, 108, 130, "app shop", "publishes")
    shop = Box(200, 108, 120, "shop", "topic exchange", EXCHANGE)
    bus = Box(390, 108, 130, "lightbus", "the bus exchange", EXCHANGE)
    queues = [
        Box(640, 20, 140, "billing.main", "quorum queue", QUEUE),
        Box(640, 108, 140, "stats.main", "quorum queue", QUEUE),
        Box(640, 196, 140, "audit.main", "quorum queue", QUEUE),
    ]
    handlers = [
        Box(830, 20, 130, "charge"),
        Box(830, 108, 130, "count"),
        Box(830, 196, 130, "keep"),
    ]
    keys = ["order.placed", "order.*", "order.placed"]
    bends = [(580, queues[0].left[1]), (580, queues[1].left[1])]
    return drawing(
        "one-event",
        "An event goes from its app's exchange to the bus exchange, and from there to each subscribed queue.",
        (970, 270),
        [
            publish,
            shop,
            bus,
            *queues,
            *handlers,
            Arrow([publish.right, shop.left], "order.placed", (170, 100)),
            Arrow([shop.right, bus.left], "#", (355, 122)),
            Arrow([bus.top(), (bus.top()[0], bends[0][1]), queues[0].left], keys[0], (540, 36)),
            Arrow([bus.right, queues[1].left], keys[1], (580, 122)),
            Arrow(
                [shop.bottom(), (shop.bottom()[0], queues[2].left[1]), queues[2].left],
                keys[2] + '  (source="shop")',
                (450, 212),
            ),
            *(Arrow([queue.right, handler.left]) for queue, handler in zip(queues, handlers, strict=True)),
        ],
    )


def failure() -> str:
    queue = Box(40, 30, 170, "stats.main", "the app's queue", QUEUE)
    handler = Box(380, 30, 150, "handler")
    done = Box(680, 30, 130, "acknowledged")
    internal = Box(370, 150, 170, "stats.internal", "direct exchange", EXCHANGE)
    retry = Box(40, 150, 170, "stats.retry.5s", "waits 5 s", QUEUE)
    dead = Box(670, 150, 150, "stats.dead", "kept", QUEUE)
    return drawing(
        "failure",
        "If a handler fails, the event waits in a retry queue and is delivered again, or becomes a dead letter.",
        (850, 250),
        [
            queue,
            handler,
            done,
            internal,
            retry,
            dead,
            Arrow([queue.right, handler.left], "delivered", (295, 44)),
            Arrow([handler.right, done.left], "returns", (605, 44)),
            Arrow(
                [handler.bottom(), internal.top()],
                "raises: a copy, confirmed, then the ack",
                (463, 116),
                "start",
                FAILURE,
            ),
            Arrow([internal.left, retry.right], "key retry.5s", (290, 164), color=FAILURE),
            Arrow([retry.top(), queue.bottom()], "expired: back, key main", (133, 116), "start"),
            Arrow([internal.right, dead.left], "key dead", (605, 164), color=FAILURE),
            Arrow(
                [queue.left, (14, queue.left[1]), (14, 226), (745, 226), dead.bottom()],
                "redelivered 20 times, never acknowledged: dead-lettered by the broker",
                (400, 218),
                color=FAILURE,
            ),
        ],
    )


def task_or_event() -> str:
    caller, tasks, worker = (
        Box(30, 64, 130, "shop", "send_receipt.delay()"),
        Box(270, 64, 130, "tasks", "", QUEUE),
        Box(510, 64, 130, "send_receipt"),
    )
    shop, bus = Box(30, 236, 130, "shop", "OrderPlaced(...)"), Box(270, 236, 130, "lightbus", "", EXCHANGE)
    queues = [
        Box(510, 180 + 56 * n, 130, f"{name}.main", "", QUEUE) for n, name in enumerate(("mail", "billing", "stats"))
    ]
    handlers = [Box(720, 180 + 56 * n, 130, name) for n, name in enumerate(("send_receipt", "charge", "count"))]
    return drawing(
        "task-or-event",
        "A task names the function to run. Of an event, each subscribed app gets its own copy.",
        (880, 360),
        [
            Label((30, 40), "A task names the function to run", bold=True),
            caller,
            tasks,
            worker,
            Arrow([caller.right, tasks.left], "command", (215, 78)),
            Arrow([tasks.right, worker.left]),
            Label((30, 168), "An event describes what happened", bold=True),
            shop,
            bus,
            *queues,
            *handlers,
            Arrow([shop.right, bus.left], "fact", (215, 250)),
            Arrow([bus.right, (455, 258), (455, 202), queues[0].left]),
            Arrow([bus.right, queues[1].left]),
            Arrow([bus.right, (455, 258), (455, 314), queues[2].left]),
            *(Arrow([queue.right, handler.left]) for queue, handler in zip(queues, handlers, strict=True)),
        ],
    )


def delay() -> str:
    levels = [3, 2, 1, 0]
    exchanges = [
        Box(60, 20 + 84 * n, 190, f"billing.delay.{level}", "headers exchange", EXCHANGE)
        for n, level in enumerate(levels)
    ]
    queues = {
        level: Box(480, 20 + 84 * n, 190, f"billing.delay.{level}", f"waits {2**level} s", QUEUE)
        for n, level in enumerate(levels)
        if level != 2
    }
    due = Box(60, 356, 190, "billing.delay.due", "", EXCHANGE)
    app = Box(60, 440, 190, "billing", "like any event", EXCHANGE)
    unheard = Box(480, 356, 210, "billing.delay.unheard", "discards at once", QUEUE)
    below = [*exchanges[1:], due]
    arrows = []
    for n, level in enumerate(levels):
        exchange = exchanges[n]
        if level == 2:
            arrows.append(
                Arrow(
                    [exchange.bottom(0.3), below[n].top(0.3)],
                    "has no header: passes at once",
                    (125, exchange.y + 68),
                    "start",
                )
            )
            continue
        queue = queues[level]
        arrows.append(Arrow([exchange.right, queue.left], f"has lightbus-delay-{level}", (365, exchange.y + 15)))
        turn = queue.y + 64
        arrows.append(
            Arrow(
                [queue.bottom(), (queue.bottom()[0], turn), (exchange.bottom(0.75)[0], turn), below[n].top(0.75)],
                "then",
                (560, turn - 6),
                "end",
            )
        )
    return drawing(
        "delay",
        "A delay of 11 seconds: 8 on level 3, none on level 2, 2 on level 1 and 1 on level 0.",
        (730, 500),
        [
            *exchanges,
            *queues.values(),
            due,
            app,
            unheard,
            *arrows,
            Arrow([due.right, unheard.left], "#", (365, 370)),
            Arrow([due.bottom(0.5), app.top(0.5)], "#", (165, 424), "start"),
        ],
    )


def outbox() -> str:
    shop = Box(20, 74, 140, "shop", "request or handler")
    orders = Box(230, 50, 150, "orders", "+ 1 order")
    rows = Box(230, 110, 150, "lightbus_outbox", "+ 1 event")
    relay = Box(460, 110, 120, "relay", "in the worker")
    queue = Box(670, 110, 140, "billing.main", "", QUEUE)
    bill = Box(670, 282, 140, "bill", "inbox=inbox")
    inbox = Box(400, 258, 150, "lightbus_inbox", "+ the event's id")
    invoices = Box(400, 318, 150, "invoices", "+ 1 invoice")
    below = relay.bottom()[0], 192
    return drawing(
        "outbox",
        "The shop commits the order and its event in one transaction. The relay publishes the event, then deletes it. "
        "Billing commits the id of the event and the invoice in one transaction, then acknowledges the event.",
        (960, 394),
        [
            Frame(214, 40, 182, 130),
            Label((305, 30), "one transaction", anchor="middle"),
            Frame(384, 248, 182, 130),
            Label((475, 238), "one transaction", anchor="middle"),
            *(shop, orders, rows, relay, queue, bill, inbox, invoices),
            Arrow([shop.right, (190, 96), (190, 72), orders.left]),
            Arrow([shop.right, (190, 96), (190, 132), rows.left]),
            Arrow([rows.right, relay.left], "reads", (430, 124)),
            Arrow([relay.right, queue.left], "publishes", (625, 124)),
            Arrow(
                [relay.bottom(), below, (rows.bottom()[0], 192), rows.bottom()],
                "deletes, when the broker has confirmed",
                (412, 208),
            ),
            Arrow([queue.bottom(0.3), bill.top(0.3)], "delivered", (704, 222), "end"),
            Arrow([bill.left, (625, 304), (625, 280), inbox.right]),
            Arrow([bill.left, (625, 304), (625, 340), invoices.right]),
            Arrow([bill.top(0.7), queue.bottom(0.7)], "ack, after the commit", (776, 222), "start"),
        ],
    )


PICTURES = {
    "one-event": one_event,
    "failure": failure,
    "task-or-event": task_or_event,
    "delay": delay,
    "outbox": outbox,
}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, picture in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(picture())
        print(FOLDER / f"{name}.svg")
