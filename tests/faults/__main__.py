"""`make faults`: run every scenario at full length, and write the table in docs/reliability.md.

`python -m tests.faults NAME ...` runs the scenarios whose names contain one of these, and does not change the page.
"""

from __future__ import annotations

import platform
import sys
import time
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from tests.faults.plan import PLAN
from tests.faults.scenarios import CannotRun
from tests.faults.scene import Row
from tests.faults.stage import Stage, connect

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- written by `make faults`: begin -->", "<!-- written by `make faults`: end -->"
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


def main(wanted: Sequence[str]) -> int:
    chosen = [planned for planned in PLAN if not wanted or any(word in planned.name for word in wanted)]
    rows: list[Row] = []
    skipped: list[str] = []
    failed: list[str] = []
    began = time.monotonic()
    version = ""
    with Stage() as stage:
        for number, planned in enumerate(chosen, 1):
            print(f"[{number}/{len(chosen)}] {planned.name} ... ", end="", flush=True)
            start = time.monotonic()
            try:
                row = planned.full(stage)
                rows.append(row)
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
                connection = connect(stage.node.url)
                version = str(connection.server_properties["version"])
                connection.close()
    took = f"{(time.monotonic() - began) / 60:.0f} minutes"
    table = aligned([HEADS, *(cells(row) for row in rows)])
    print("\n" + "\n".join(table))
    print("\n" + "\n".join(notes(rows, skipped)))
    print(f"\n{took}. " + (f"FAILED: {', '.join(failed)}" if failed else "All scenarios passed."))
    if not wanted and not failed:
        write_page(rows, skipped, version, took)
    return 1 if failed else 0


def cells(row: Row) -> tuple[str, ...]:
    count = sum(row.duplicates.values())
    reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(row.duplicates.items()))
    duplicates = f"{count} ({reasons})" if count else "0"
    numbers = (row.confirmed, row.handled, row.dead, row.queued, row.failed)
    shown = tuple(f"{number:,}" for number in numbers)
    return (row.fault, str(row.times), *shown, duplicates, str(len(row.lost)), row.recovery)


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in table
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def notes(rows: Sequence[Row], skipped: Sequence[str]) -> list[str]:
    return [*(f"- {row.fault}: {row.note}." for row in rows if row.note), *(f"- {line}" for line in skipped)]


def write_page(rows: Sequence[Row], skipped: Sequence[str], version: str, took: str) -> None:
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    about = f"{day}, RabbitMQ {version}, Python {platform.python_version()}, {took}."
    new = [BEGIN, about, "", *aligned([HEADS, *(cells(row) for row in rows)]), "", *notes(rows, skipped), END]
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    PAGE.write_text(before + "\n".join(new) + rest.split(END)[1])
    print(f"Written to {PAGE.relative_to(PAGE.parents[1])}.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
