"""`lightbus dead purge`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from lightbus.cli import asking
from lightbus.cli.dead import reading, result, selection, summary
from lightbus.cli.dead.reading import write

if TYPE_CHECKING:
    from lightbus.dead_letters.letter import DeadLetter

EPILOG = """\b
Examples:
  lightbus dead purge billing.bus:app --error ValueError --older 7d --dry-run
  lightbus dead purge billing.bus:app --id 0198c5d2-7a3b
  lightbus dead purge billing.bus:app --handler old_handler --yes

\b
To keep a copy first:
  lightbus dead show billing.bus:app --all --json > dead-letters.json

\b
Exit codes:
  0    success
  1    you answered no; the broker is not usable, or the queue does not exist
  2    the command line or MODULE:ATTR is invalid
  130  interrupted: purged ones are deleted, the others are unchanged
"""


@click.command(short_help="Delete dead letters permanently.", epilog=EPILOG)
@click.argument("target", metavar="MODULE:ATTR")
@selection.filters
@click.option(
    "--all", "all_", is_flag=True, help="All dead letters. Required if neither a filter nor --limit is given."
)
@click.option("--dry-run", is_flag=True, help="Only show what would be purged.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Purge at most N.")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON. Needs --yes or --dry-run.")
def purge(target: str, all_: bool, dry_run: bool, limit: int | None, yes: bool, as_json: bool, **given: Any) -> None:
    """Delete dead letters permanently.

    The command shows them and asks first, unless --yes is given. It deletes only those that it has shown, none that
    arrive in the meantime.
    """
    from lightbus.dead_letters import actions
    from lightbus.dead_letters.letter import Filter

    app, wanted = selection.prepare(target, given)
    selection.require_selection(wanted, limit, all_)
    if as_json and not (yes or dry_run):
        raise click.UsageError("--json does not ask: add --yes or --dry-run.")
    shown: set[bytes] | None = None
    total = 0
    if dry_run or not yes:
        with reading.opened(app) as queue:
            dead_letters = actions.purgeable(queue, wanted, limit=limit)
            if dry_run:
                groups = summary.grouped(dead_letters)
                if as_json:
                    write(summary.dry_run_as_json(groups, "purged"))
                else:
                    summary.show_dry_run(groups, queue.count, "purged")
                return
            shown = set()
            groups = summary.grouped(_collecting(dead_letters, shown))
        total = summary.total(groups)
        if not total:
            write("No matching dead letters.")
            return
        summary.show_groups(groups, target, as_json=False)
        with asking("--yes"):
            agreed = click.confirm(f"Purge {total:,} of them permanently?", err=True)
        if not agreed:
            click.echo("Nothing was purged.", err=True)
            sys.exit(1)
        wanted = Filter()  # purge what was shown, even if it is now too old for --newer
    outcome = actions.Outcome()
    with (
        result.reported(app, outcome, "purged", as_json=as_json),
        reading.opened(app, outcome, "purged") as queue,
    ):
        actions.purge(queue, wanted, outcome, limit=limit if shown is None else total, only=shown)
        outcome.vanished = max(0, total - outcome.matched)


def _collecting(dead_letters: Iterator[DeadLetter], digests: set[bytes]) -> Iterator[DeadLetter]:
    """The same dead letters, with their digests added to the set."""
    for one in dead_letters:
        digests.add(one.digest)
        yield one
