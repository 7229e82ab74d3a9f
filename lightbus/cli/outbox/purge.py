"""`lightbus outbox purge`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from lightbus.cli import asking, output
from lightbus.cli.outbox import list as listing
from lightbus.cli.outbox import selection, stores

if TYPE_CHECKING:
    from lightbus.outbox.store import Problem, Store

EPILOG = """\b
Examples:
  lightbus outbox purge billing.bus:app --id 42
  lightbus outbox purge billing.bus:app --all --yes

\b
To keep a copy first:
  lightbus outbox list billing.bus:app --limit 1000000 --json > refused.json

\b
Exit codes:
  0    success
  1    you answered no; an id is not set aside; or the database is not usable
  2    the command line or MODULE:ATTR is invalid
  130  interrupted
"""

MOST_SHOWN = 20
MOST_READ = 10_000
"""Rows that the question is about, at most, for each outbox."""
MOST_SEARCHED = 1_000_000
"""Rows among which the given ids are searched."""


@click.command(short_help="Delete events that were set aside.", epilog=EPILOG)
@click.argument("target", metavar="MODULE:ATTR")
@selection.options
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON. Needs --yes.")
def purge(target: str, ids: tuple[int, ...], all_: bool, yes: bool, as_json: bool) -> None:
    """Delete events that were set aside, permanently: they are never sent.

    The command shows them and asks first, unless --yes is given. It deletes only those that it has counted, none that
    are set aside in the meantime.
    """
    if as_json and not yes:
        raise click.UsageError("--json does not ask: add --yes.")
    found = selection.prepare(target, ids, all_)
    chosen: list[tuple[Store, Sequence[int] | None]]
    if yes:
        chosen = [(store, ids or None) for store in found]
    else:
        shown = [(store, _set_aside(store, ids)) for store in found]
        chosen = [(store, [one.id for one in problems]) for store, problems in shown]
        _ask(shown)
    count, unknown = 0, [*ids]
    for store, some in chosen:
        if some is None:
            count += stores.ask(store, store.purge, None)
        elif ids:
            left = selection.each(store, store.purge, some)
            unknown = [one for one in ids if one in left or one not in some]
            count += len(some) - len(left)
        else:
            count += stores.ask(store, _purge, store, some)
    selection.report(target, "purged", count, unknown, as_json=as_json)


def _set_aside(store: Store, ids: Sequence[int]) -> list[Problem]:
    problems = stores.ask(store, store.problems, MOST_READ if not ids else MOST_SEARCHED)
    return [one for one in problems if one.set_aside and (not ids or one.id in ids)]


def _ask(shown: Sequence[tuple[Store, list[Problem]]]) -> None:
    """
    Raises:
        SystemExit: the answer is no.
    """
    total = sum(len(problems) for _, problems in shown)
    if not total:
        return
    for store, problems in shown:
        if problems:
            output.write(f"{store.name}:")
            listing.show(problems[:MOST_SHOWN])
            if len(problems) > MOST_SHOWN:
                output.write(f"... and {len(problems) - MOST_SHOWN:,} more")
    with asking("--yes"):
        what = "this event" if total == 1 else f"these {total:,} events"
        agreed = click.confirm(f"Delete {what} permanently?", err=True)
    if not agreed:
        click.echo("Nothing was purged.", err=True)
        sys.exit(1)


async def _purge(store: Store, ids: Sequence[int]) -> int:
    return sum(
        [
            await store.purge(ids[start : start + selection.MOST_AT_ONCE])
            for start in range(0, len(ids), selection.MOST_AT_ONCE)
        ]
    )
