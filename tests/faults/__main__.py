"""`make faults`: run every scenario at full length, and write the table in docs/reliability.md.

`python -m tests.faults NAME ...` runs the scenarios whose names contain one of these. The page has three tables: one is
written if all of its scenarios ran and passed, so `python -m tests.faults outbox-` and `python -m tests.faults
artemis-` write the second and the third one. Without Artemis, its scenarios are skipped, and its table stays.
"""

from __future__ import annotations

import platform
import sys
import time
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import attrs
import psycopg
import sqlalchemy

from tests import artemis
from tests.faults.order_scene import OrderRow
from tests.faults.plan import PLAN, Planned
from tests.faults.scene import Row
from tests.faults.stage import CannotRun, Stage, connect

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- written by `make faults`: begin -->", "<!-- written by `make faults`: end -->"
ARTEMIS_BEGIN, ARTEMIS_END = (
    "<!-- written by `make faults`, Artemis: begin -->",
    "<!-- written by `make faults`, Artemis: end -->",
)
OUTBOX_BEGIN, OUTBOX_END = (
    "<!-- written by `make faults`, outbox: begin -->",
    "<!-- written by `make faults`, outbox: end -->",
)
HEADS = (
    "fault",
    "times",
    "confirmed",
    "handled",
    "dead",
    "queued",
    "failed publishes",
    "duplicates",
    "lost",
    "recovery",
)
ORDER_HEADS = (
    "fault",
    "times",
    "orders",
    "rolled back",
    "invoices",
    "sent again",
    "skipped by the inbox",
    "lost",
    "done twice",
    "recovery",
)


def main(wanted: Sequence[str]) -> int:
    chosen = [planned for planned in PLAN if not wanted or any(word in planned.name for word in wanted)]
    if not chosen:
        print(f"No scenario's name contains {' or '.join(wanted)}. There are:", *(one.name for one in PLAN), sep="\n")
        return 2
    missing = [planned for planned in chosen if planned.artemis and artemis.find() is None]
    chosen = [planned for planned in chosen if planned not in missing]
    rows: list[Row] = []
    artemis_rows: list[Row] = []
    order_rows: list[OrderRow] = []
    skipped: list[str] = []
    failed: list[str] = []
    began = time.monotonic()
    version = artemis_version = postgres_version = ""
    with Stage() as stage:
        for number, planned in enumerate(chosen, 1):
            print(f"[{number}/{len(chosen)}] {planned.name} ... ", end="", flush=True)
            start = time.monotonic()
            try:
                row = planned.full(stage)
                if isinstance(row, OrderRow):
                    order_rows.append(row)
                else:
                    (artemis_rows if planned.artemis else rows).append(row)
                row.check()
                print(f"{time.monotonic() - start:.0f} s")
            except CannotRun as why:
                skipped.append(f"{planned.name}: SKIPPED: {why}")
                print(f"SKIPPED: {why}")
            except Exception:  # noqa: BLE001 - the other scenarios continue
                failed.append(planned.name)
                print("FAILED", flush=True)
                traceback.print_exc()
            if planned.rabbitmq and not version and stage.node.process is not None:
                version = version_of(stage.node.url)
            if planned.artemis and not artemis_version and planned.name not in failed:
                artemis_version = version_of(stage.url("artemis"))
            if planned.postgres and not postgres_version and stage.postgres.process is not None:
                with psycopg.connect(stage.postgres.url(driver=None)) as database:
                    number = database.info.server_version
                    postgres_version = f"{number // 10_000}.{number % 10_000}"
    took = f"{(time.monotonic() - began) / 60:.0f} minutes"
    about = f"{datetime.now(UTC):%Y-%m-%d}, RabbitMQ {version}, "
    python = f"Python {platform.python_version()}, {took}."
    tables = (
        Table(
            [one for one in PLAN if not one.artemis and not one.postgres],
            BEGIN,
            END,
            about + python,
            HEADS,
            [cells(row) for row in rows],
            notes(rows, skipped),
        ),
        Table(
            [one for one in PLAN if one.artemis],
            ARTEMIS_BEGIN,
            ARTEMIS_END,
            f"{datetime.now(UTC):%Y-%m-%d}, ActiveMQ Artemis {artemis_version}, {python}",
            HEADS,
            [cells(row) for row in artemis_rows],
            notes(artemis_rows, []),
        ),
        Table(
            [one for one in PLAN if one.postgres],
            OUTBOX_BEGIN,
            OUTBOX_END,
            f"{about}PostgreSQL {postgres_version}, SQLAlchemy {sqlalchemy.__version__}, {python}",
            ORDER_HEADS,
            [order_cells(row) for row in order_rows],
            notes(order_rows, []),
        ),
    )
    for table in tables:
        if table.rows:
            print("\n" + "\n".join(table.lines()))
        if not failed and all(one in chosen for one in table.planned):
            table.write()
    if missing:
        names = ", ".join(one.name for one in missing)
        print(f"\nSKIPPED, AND THEIR TABLE IS NOT WRITTEN: {names}. {artemis.INSTALL}")
    print(f"\n{took}. " + (f"FAILED: {', '.join(failed)}" if failed else "All scenarios passed."))
    return 1 if failed else 0


def version_of(url: str) -> str:
    connection = connect(url)
    try:
        return str(connection.server_properties["version"])
    finally:
        connection.close()


@attrs.frozen
class Table:
    """A table of the page, between two comments."""

    planned: Sequence[Planned]
    """Its scenarios."""
    begin: str
    end: str
    about: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]

    def lines(self) -> list[str]:
        return [self.about, "", *aligned([self.heads, *self.rows]), *([""] if self.notes else []), *self.notes]

    def write(self) -> None:
        before, rest = PAGE.read_text().split(self.begin)
        PAGE.write_text(before + "\n".join([self.begin, *self.lines(), self.end]) + rest.split(self.end)[1])
        print(f"Written to {PAGE.relative_to(PAGE.parents[1])}.")


def cells(row: Row) -> tuple[str, ...]:
    count = sum(row.duplicates.values())
    reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(row.duplicates.items()))
    duplicates = f"{count} ({reasons})" if count else "0"
    numbers = (row.confirmed, row.handled, row.dead, row.queued, row.failed)
    shown = tuple(f"{number:,}" for number in numbers)
    return (row.fault, str(row.times), *shown, duplicates, str(len(row.lost)), row.recovery)


def order_cells(row: OrderRow) -> tuple[str, ...]:
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in sorted(row.skipped.items()))
    skipped = f"{row.skipped.total():,} ({reasons})" if reasons else "0"
    numbers = (row.orders, row.rolled_back, row.invoices, row.sent_again)
    bad = (str(len(row.lost)), str(len(row.twice | row.phantoms)))
    return (row.fault, str(row.times), *(f"{number:,}" for number in numbers), skipped, *bad, row.recovery)


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in table
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def notes(rows: Sequence[Row | OrderRow], skipped: Sequence[str]) -> list[str]:
    return [*(f"- {row.fault}: {row.note}." for row in rows if row.note), *(f"- {line}" for line in skipped)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
