"""Dead letters counted by handler and error."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import TYPE_CHECKING

from lightbus.cli import tables
from lightbus.cli.dead.reading import as_json as to_json
from lightbus.cli.dead.reading import write, write_array

if TYPE_CHECKING:
    from lightbus.dead_letters.letter import DeadLetter

MOST_EVENTS = 100
"""Event names that a group lists."""


class Group:
    """The dead letters of one handler with one type of error."""

    def __init__(self) -> None:
        self.count = 0
        self.oldest: datetime | None = None
        self.newest: datetime | None = None
        self.events: dict[str, int] = {}
        self.example = ""
        """The ID of the first one."""

    def add(self, dead_letter: DeadLetter) -> None:
        self.count += 1
        self.example = self.example or dead_letter.id
        if len(self.events) < MOST_EVENTS or dead_letter.event in self.events:
            self.events[dead_letter.event] = self.events.get(dead_letter.event, 0) + 1
        if dead_letter.died is not None:
            self.oldest = dead_letter.died if self.oldest is None else min(self.oldest, dead_letter.died)
            self.newest = dead_letter.died if self.newest is None else max(self.newest, dead_letter.died)


Groups = dict[tuple[str, str], Group]
"""By handler ("-" for none) and error, the largest group first."""


def grouped(dead_letters: Iterable[DeadLetter]) -> Groups:
    groups: Groups = {}
    for dead_letter in dead_letters:
        groups.setdefault((dead_letter.handler or "-", dead_letter.error), Group()).add(dead_letter)
    return dict(sorted(groups.items(), key=lambda item: -item[1].count))


def total(groups: Groups) -> int:
    return sum(group.count for group in groups.values())


def show_groups(groups: Groups, target: str, *, as_json: bool) -> None:
    """The output of `list --stats`, which `purge` shows before its question, too."""
    if as_json:
        write_array(
            to_json(
                {
                    "handler": None if handler == "-" else handler,
                    "error": error,
                    "count": group.count,
                    "oldest": None if group.oldest is None else group.oldest.isoformat(),
                    "newest": None if group.newest is None else group.newest.isoformat(),
                    "events": group.events,
                    "example": group.example,
                }
            )
            for (handler, error), group in groups.items()
        )
        return
    rows = [
        [
            f"{group.count:,}",
            tables.printable(handler, 30),
            tables.printable(error, 40),
            tables.age_of(group.oldest),
            tables.age_of(group.newest),
            tables.printable(", ".join(group.events), 40),
            tables.printable(group.example, 40),
        ]
        for (handler, error), group in groups.items()
    ]
    for line in tables.table(
        ["COUNT", "HANDLER", "ERROR", "OLDEST", "NEWEST", "EVENTS", "EXAMPLE"], rows, right=(0, 3, 4)
    ):
        write(line)
    count = total(groups)
    what = "1 dead letter. Show it:" if count == 1 else f"{count:,} dead letters. Show one:"
    write(f"\n{what} lightbus dead show {target} ID")


def show_dry_run(groups: Groups, queue_count: int, done: str) -> None:
    """What `retry --dry-run` and `purge --dry-run` show first.

    Args:
        queue_count: the number of dead letters in the queue.
        done: "retried" or "purged".
    """
    if groups:
        rows = [
            [
                f"{group.count:,}",
                tables.printable(handler, 30),
                tables.printable(error, 40),
                tables.printable(", ".join(group.events), 60),
            ]
            for (handler, error), group in groups.items()
        ]
        for line in tables.table(["COUNT", "HANDLER", "ERROR", "EVENTS"], rows, right=(0,)):
            write(line)
        write("")
    write(f"{total(groups):,} of {queue_count:,} would be {done}. Nothing was changed (--dry-run).")


def dry_run_as_json(groups: Groups, done: str, skipped: int = 0) -> str:
    count = total(groups)
    return to_json({"dry_run": True, "matched": count + skipped, done: count, "left": skipped})
