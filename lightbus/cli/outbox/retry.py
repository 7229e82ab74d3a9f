"""`lightbus outbox retry`."""

from __future__ import annotations

import click

from lightbus.cli.outbox import selection, stores

EPILOG = """\b
Examples:
  lightbus outbox retry billing.bus:app --id 42
  lightbus outbox retry billing.bus:app --id 42 --id 43
  lightbus outbox retry billing.bus:app --all

\b
Exit codes:
  0  success
  1  an id is not set aside, or the database is not usable
  2  the command line or MODULE:ATTR is invalid
"""


@click.command(short_help="Have events that were set aside sent again.", epilog=EPILOG)
@click.argument("target", metavar="MODULE:ATTR")
@selection.options
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def retry(target: str, ids: tuple[int, ...], all_: bool, as_json: bool) -> None:
    """Have events that were set aside sent again, with the same ids. The next relay or worker sends them.

    This command itself sends nothing.
    """
    found = selection.prepare(target, ids, all_)
    unknown: list[int] = []
    if all_:
        count = sum(stores.ask(store, store.retry, None) for store in found)
    else:
        unknown = selection.each(found[0], found[0].retry, ids)
        count = len(ids) - len(unknown)
    then = " The next relay or worker sends them." if count > 1 else " The next relay or worker sends it."
    selection.report(target, "retried", count, unknown, as_json=as_json, then=then)
