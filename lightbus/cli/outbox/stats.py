"""`lightbus outbox stats`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from lightbus.cli import output, tables
from lightbus.cli.outbox import stores

if TYPE_CHECKING:
    from lightbus.outbox.store import Depth

EPILOG = """\b
Examples:
  lightbus outbox stats billing.bus:app
  lightbus outbox stats billing.bus:app --max-age 300 || page-somebody
  lightbus outbox stats billing.bus:app --json | jq '.outboxes[].waiting'

\b
Exit codes:
  0  nothing is set aside, and nothing has waited for longer than --max-age
  1  unhealthy: the output shows the problem and the next step
  2  the command line or MODULE:ATTR is invalid
"""


@click.command(short_help="Count what waits and what is set aside.", epilog=EPILOG)
@click.argument("target", metavar="MODULE:ATTR")
@click.option(
    "--max-age",
    type=click.FloatRange(0),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How long an event may wait.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def stats(target: str, max_age: float, as_json: bool) -> None:
    """Show how many events wait in an outbox, the age of the oldest, and how many are set aside. For alerts, too."""
    from lightbus.outbox.store import health

    depths = [(store.name, stores.ask(store, store.depth)) for store in stores.find(target)]
    problems = [problem for name, depth in depths for problem in _problems(name, depth, max_age, target)]
    if as_json:
        outboxes = [{"database": name.strip("'"), **health(depth)} for name, depth in depths]
        output.write(json.dumps({"healthy": not problems, "outboxes": outboxes, "problems": problems}, indent=1))
    else:
        for name, depth in depths:
            oldest = f", the oldest for {tables.age(depth.oldest_seconds)}" if depth.waiting else ""
            output.write(f"{name}: {depth.waiting:,} waiting{oldest}, {depth.set_aside:,} set aside")
        for problem in problems:
            click.echo(f"Unhealthy: {problem}", err=True)
        if not problems:
            output.write("Healthy.")
    sys.exit(1 if problems else 0)


def _problems(name: str, depth: Depth, max_age: float, target: str) -> Iterator[str]:
    if depth.set_aside:
        yield (
            f"{depth.set_aside:,} set aside in {name}, which could not be sent. To see why: "
            f"lightbus outbox list {target}"
        )
    if depth.oldest_seconds > max_age:
        yield (
            f"the oldest event in {name} has waited for {tables.age(depth.oldest_seconds)}. Is a relay running? "
            f"Start one: lightbus relay {target}"
        )
