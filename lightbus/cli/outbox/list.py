"""`lightbus outbox list`."""

from __future__ import annotations

import json
import sys
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from lightbus.cli import output, tables
from lightbus.cli.outbox import stores

if TYPE_CHECKING:
    from lightbus.outbox.store import Problem

EPILOG = """\b
Examples:
  lightbus outbox list billing.bus:app
  lightbus outbox list billing.bus:app --limit 1000 --json | jq '.[].error'

\b
Next: lightbus outbox retry MODULE:ATTR --id ID, after fixing the cause

\b
Exit codes:
  0  success, even if there are none
  1  the database is not usable
  2  the command line or MODULE:ATTR is invalid
"""

LEAST_ERROR = 40
"""Characters of an error that are always shown. If the terminal has no room for them, the lines wrap."""
HEAD = ["ID", "EVENT", "MESSAGE ID", "AGE", "ATTEMPTS", "NEXT TRY", "ERROR"]


@click.command("list", short_help="List the events that the broker has refused.", epilog=EPILOG)
@click.argument("target", metavar="MODULE:ATTR")
@click.option(
    "--limit", type=click.IntRange(1, 1_000_000), default=50, show_default=True, metavar="N", help="Show at most N."
)
@click.option("--json", "as_json", is_flag=True, help="A JSON array.")
def list_(target: str, limit: int, as_json: bool) -> None:
    """List the events that the broker has refused, the oldest first: those that are set aside, and those that the
    relay tries again by itself.
    """
    found = [(store.name, stores.ask(store, store.problems, limit)) for store in stores.find(target)]
    if as_json:
        output.write(json.dumps([_as_json(name, one) for name, problems in found for one in problems], indent=1))
        return
    for name, problems in found:
        if not problems:
            output.write(f"{name}: nothing was refused.")
        else:
            output.write(f"{name}:")
            show(problems)
            if len(problems) == limit:
                output.write(f"There may be more: --limit {limit * 10} shows them.")
    if any(one.set_aside for _, problems in found for one in problems):
        output.write(f"\nAfter fixing the cause: lightbus outbox retry {target} --id ID")


def show(problems: list[Problem]) -> None:
    lines = tables.table(HEAD, map(_row, problems), right=(0, 3, 4))
    for line in tables.fitted(lines, lines[0].index("ERROR") + LEAST_ERROR) if sys.stdout.isatty() else lines:
        output.write(line)


def _row(one: Problem) -> list[str]:
    return [
        str(one.id),
        tables.printable(one.event, 40),
        tables.printable(one.message_id, 40),
        tables.age(time.time() - one.added_at),
        str(one.attempts),
        _next_try(one),
        tables.printable(one.error, 200),
    ]


def _next_try(one: Problem) -> str:
    if one.set_aside:
        return "set aside"
    return "soon" if one.retry_at is None else f"in {tables.age(one.retry_at - time.time())}"


def _as_json(name: str, one: Problem) -> dict[str, Any]:
    return {
        "database": name.strip("'"),
        "id": one.id,
        "event": one.event,
        "message_id": one.message_id,
        "added_at": _time(one.added_at),
        "attempts": one.attempts,
        "set_aside": one.set_aside,
        "next_try": None if one.retry_at is None else _time(one.retry_at),
        "error": one.error,
        "body": one.body.decode(errors="replace"),
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
