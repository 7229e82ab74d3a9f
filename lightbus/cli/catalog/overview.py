"""A catalogue as tables, and the texts that the other formats share."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lightbus.cli import tables

if TYPE_CHECKING:
    from lightbus.catalog.catalog import Subscriber
    from lightbus.catalog.contract import Contract
    from lightbus.cli.catalog.reading import Reading

NONE = "No app has published a contract."


def lines(reading: Reading) -> list[str]:
    """The apps, the events, and what to look at."""
    if not reading.catalog.contracts and not reading.catalog.ignored:
        return [f"{heading(reading)}. {NONE}"]
    return list(_lines(reading))


def _lines(reading: Reading) -> Iterator[str]:
    from lightbus.catalog.notices import notices

    yield heading(reading)
    live = reading.live is not None
    head, rows = app_rows(reading)
    yield ""
    yield from tables.table(head, rows, right=(2, 3, 4, 5, 6) if live else (2, 3))
    head, rows = event_rows(reading)
    if rows:
        yield ""
        yield from tables.table(head, rows, right=(1,))
    found = notices(reading.catalog)
    if found:
        yield ""
        yield "To look at:"
        yield from (f"  {tables.printable(one.text)}" for one in found)
    note = unknown_note(reading)
    if note:
        yield ""
        yield note


def heading(reading: Reading) -> str:
    """`3 apps, 12 events, in catalog.json`."""
    apps, events = len(reading.catalog.contracts), sum(1 for _ in reading.catalog.events())
    return f"{counted(apps, 'app')}, {counted(events, 'event')}, {reading.place}"


def counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def app_rows(reading: Reading) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of the table of apps."""
    head = ["APP", "RELEASE", "EVENTS", "HANDLERS", "CONTRACT"]
    rows = [
        [
            tables.printable(one.app),
            tables.printable(one.release, 30) or "-",
            f"{len(one.events):,}",
            f"{len(one.handlers):,}",
            f"{tables.age(time.time() - one.at)} ago" if one.at else "?",
        ]
        for one in reading.catalog.contracts
    ]
    if reading.live is not None:
        head[4:4] = ["CONSUMERS", "WAITING", "DEAD LETTERS"]
        for row, one in zip(rows, reading.catalog.contracts, strict=True):
            row[4:4] = _live_cells(reading, one)
    return head, rows


def _live_cells(reading: Reading, contract: Contract) -> list[str]:
    live = reading.live
    assert live is not None
    if not contract.handlers:
        return ["-", "-", "-"]
    counts = live.consumers(contract), live.waiting(contract), live.dead(contract)
    return ["?" if count is None else f"{count:,}" for count in counts]


def event_rows(reading: Reading) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of the table of events."""
    rows = [
        [
            tables.printable(event.name),
            str(event.version),
            tables.printable(contract.app),
            ", ".join(handler(reading, one) for one in reading.catalog.subscribers(event.name, contract.app)) or "-",
        ]
        for contract, event in reading.catalog.events()
    ]
    return ["EVENT", "VERSION", "PUBLISHED BY", "HANDLED BY"], rows


def handler(reading: Reading, one: Subscriber) -> str:
    """`billing.charge`, with `(no consumer)` if no worker consumes its queue."""
    return f"{tables.printable(one.name)}{' (no consumer)' if is_down(reading, one) else ''}"


def is_down(reading: Reading, one: Subscriber) -> bool:
    """Whether it is known that no worker consumes the handler's queue."""
    state = None if reading.live is None else reading.live.queue(one.listener.queue)
    return state is not None and not state.consumers


def unknown_note(reading: Reading) -> str:
    """Explains the `?`; "" if all is known."""
    from lightbus.catalog.live import LIMIT

    live = reading.live
    unknown = 0 if live is None else live.asked - len(live.queues)
    if live is None or not unknown:
        return ""
    return (
        f"?: the state of {unknown:,} of {counted(live.asked, 'queue')} is unknown, because there was no answer within "
        f"{LIMIT:g} s, or this broker user may not see {'it' if unknown == 1 else 'them'}."
    )
