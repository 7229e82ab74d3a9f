"""`lightbus dead retry`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from lightbus.cli.dead import reading, result, selection, summary
from lightbus.cli.dead.reading import write

if TYPE_CHECKING:
    from lightbus import Lightbus
    from lightbus.dead_letters.letter import Filter

EPILOG = """\b
Examples:
  lightbus dead retry billing.bus:app --id 0198c5d2-7a3b
  lightbus dead retry billing.bus:app --handler charge --error TimeoutError --dry-run
  lightbus dead retry billing.bus:app --event 'invoice.*' --older 1h --rate 20
  lightbus dead retry billing.bus:app --limit 1     (try one first)

\b
Exit codes:
  0    every matching dead letter was retried
  1    some were not retried; the output names them, and why
  2    the command line or MODULE:ATTR is invalid
  130  interrupted: confirmed ones are retried, the others are unchanged
"""


@click.command(short_help="Retry dead letters, each for the handler that failed.", epilog=EPILOG)
@click.argument("target", metavar="MODULE:ATTR")
@selection.filters
@click.option(
    "--all", "all_", is_flag=True, help="All dead letters. Required if neither a filter nor --limit is given."
)
@click.option("--dry-run", is_flag=True, help="Only show what would be retried.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Retry at most N.")
@click.option("--rate", type=click.FloatRange(0, 100_000, min_open=True), metavar="N", help="At most N per second.")
@click.option("--trust-origin", is_flag=True, help="Include dead letters whose source is not verified; see above.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def retry(
    target: str,
    all_: bool,
    dry_run: bool,
    limit: int | None,
    rate: float | None,
    trust_origin: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Put dead letters back into their queue, only for the handler that failed on them.

    They start again at attempt 1, with the full retry schedule. Each is removed from the dead letters only after the
    broker has confirmed its copy: if you interrupt the command, nothing is lost, and up to 100 may be retried twice.
    Only dead letters that exist at the start are retried: those that fail again in the meantime stay.

    When an event crashes its worker repeatedly, the broker dead-letters it, and the app cannot record its source. A
    publisher can forge the source on RabbitMQ before 4.0, so the command skips these dead letters. It also skips those
    that were moved between queues by hand (for example in the management UI), and those that a queue has dead-lettered
    to the bus. If you trust everyone who can publish on this broker, add --trust-origin.
    """
    from lightbus.dead_letters import actions

    app, wanted = selection.prepare(target, given)
    selection.require_selection(wanted, limit, all_)
    if dry_run:
        _dry_run(app, wanted, limit, trust_origin, as_json=as_json)
        return
    outcome = actions.Outcome()
    with result.reported(app, outcome, "retried", as_json=as_json):
        try:
            with reading.opened(app, outcome, "retried") as queue:
                actions.retry(queue, wanted, outcome, limit=limit, rate=rate, trust_origin=trust_origin)
        finally:
            app.publisher.close(1.0)
    sys.exit(1 if outcome.left else 0)


def _dry_run(app: Lightbus, wanted: Filter, limit: int | None, trust_origin: bool, *, as_json: bool) -> None:
    from lightbus.dead_letters import actions

    outcome = actions.Outcome()
    with reading.opened(app) as queue:
        groups = summary.grouped(actions.retriable(queue, wanted, outcome, limit=limit, trust_origin=trust_origin))
        if as_json:
            write(summary.dry_run_as_json(groups, "retried", outcome.unproven))
            return
        summary.show_dry_run(groups, queue.count, "retried")
        for (handler, _), group in groups.items():
            if handler != "-" and handler not in app.handlers:
                write(result.without_handler(handler, group.count, "would be"))
        if outcome.unproven:
            write(f"{outcome.unproven:,} more would be skipped: their source is not verified (--trust-origin).")
