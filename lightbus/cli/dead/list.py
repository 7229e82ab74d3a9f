"""`lightbus dead list`."""

from __future__ import annotations

import itertools
import sys
from typing import TYPE_CHECKING, Any

import click

from lightbus.cli import tables
from lightbus.cli.dead import reading, selection, summary
from lightbus.cli.dead.reading import write

if TYPE_CHECKING:
    from lightbus.dead_letters.letter import DeadLetter, Filter
    from lightbus.dead_letters.queue import DeadQueue

EPILOG = """\b
Examples:
  lightbus dead list billing.bus:app
  lightbus dead list billing.bus:app --stats
  lightbus dead list billing.bus:app --event 'invoice.*' --handler charge --newer 2h
  lightbus dead list billing.bus:app --error KeyError --limit 0 --json | jq '.[].id'

\b
Next: lightbus dead show MODULE:ATTR ID

\b
Exit codes:
  0  success, even if there are no dead letters
  1  the broker is not usable, or the queue does not exist
  2  the command line or MODULE:ATTR is invalid
"""

LEAST_ERROR = 40
"""Characters of an error that are always shown. If the terminal has no room for them, the lines wrap."""


@click.command("list", short_help="List dead letters, or count them with --stats.", epilog=EPILOG)
@click.argument("target", metavar="MODULE:ATTR")
@selection.filters
@click.option("--stats", is_flag=True, help="Count them by handler and error, over the whole queue.")
@click.option("--limit", type=click.IntRange(0), metavar="N", help="Show at most N; 0 shows all.  [default: 50]")
@click.option("--json", "as_json", is_flag=True, help="A JSON array.")
def list_(target: str, stats: bool, limit: int | None, as_json: bool, **given: Any) -> None:
    """List the dead letters of an app, in the order of their queue.

    This changes nothing: the dead letters are read and returned to the queue in order. While the command runs, other
    `lightbus dead` commands see fewer of them.
    """
    app, wanted = selection.prepare(target, given)
    most = (None if stats else 50) if limit is None else limit or None
    with reading.opened(app) as queue:
        found = itertools.islice(queue.matching(wanted), most)
        if stats:
            groups = summary.grouped(found)
            if groups or as_json:
                summary.show_groups(groups, target, as_json=as_json)
            else:
                _show_none(target, queue, wanted)
        elif as_json:
            reading.write_array(reading.as_json(reading.described(one)) for one in found)
        else:
            _show_table([_row(one) for one in found], target, queue, wanted, most)


def _row(dead_letter: DeadLetter) -> list[str]:
    message = dead_letter.error_message.strip().splitlines()
    return [
        tables.printable(dead_letter.id, 40),
        tables.age_of(dead_letter.died),
        tables.printable(dead_letter.event, 40) or "?",
        tables.printable(dead_letter.handler or "-", 30),
        str(dead_letter.attempt),
        tables.printable(f"{dead_letter.error}: {message[0]}" if message else dead_letter.error, 100),
    ]


def _show_table(rows: list[list[str]], target: str, queue: DeadQueue, wanted: Filter, most: int | None) -> None:
    if not rows:
        _show_none(target, queue, wanted)
        return
    lines = tables.table(["ID", "AGE", "EVENT", "HANDLER", "ATTEMPT", "ERROR"], rows, right=(1, 4))
    for line in tables.fitted(lines, lines[0].index("ERROR") + LEAST_ERROR) if sys.stdout.isatty() else lines:
        write(line)
    unseen = queue.count - queue.seen
    if most is not None and len(rows) == most and unseen > 0:
        write(f"\n{unseen:,} more were not read: --limit 0 shows all, --stats counts them.")
    write(f"\nShow one: lightbus dead show {target} ID")


def _show_none(target: str, queue: DeadQueue, wanted: Filter) -> None:
    if wanted.given and queue.count:
        write(f"None of the {queue.count:,} dead letters match. To see all: lightbus dead list {target} --stats")
        return
    from lightbus.inspection import states

    write(reading.NONE)
    if waiting := states.retrying(queue.connection, queue.app):
        write(f"{states.retries_waiting(waiting)} and may become dead letters after the last one.")
