"""The options that select rows, and what was done with them."""

from __future__ import annotations

import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

import click

from lightbus.cli import output
from lightbus.cli.outbox import stores

if TYPE_CHECKING:
    from lightbus.outbox.store import Store

MOST_AT_ONCE = 1_000
"""Ids in one statement."""


def _ids(_ctx: click.Context, _param: click.Parameter, value: tuple[str, ...]) -> tuple[int, ...]:
    for one in value:
        if not one.isascii() or not one.isdigit() or len(one) > 18:
            reason = "it is empty" if not one else f"{one!r} is not the number of a row"
            raise click.BadParameter(f"{reason}. `lightbus outbox list` shows the ids.")
    return tuple(dict.fromkeys(map(int, value)))


def options(command: Callable[..., None]) -> Callable[..., None]:
    """Add --id and --all."""
    command = click.option("--all", "all_", is_flag=True, help="All that are set aside.")(command)
    return click.option(
        "--id",
        "ids",
        multiple=True,
        callback=_ids,
        metavar="ID",
        help="As `lightbus outbox list` shows it. Repeatable.",
    )(command)


def prepare(target: str, ids: Sequence[int], all_: bool) -> list[Store]:
    """The outboxes.

    Raises:
        click.UsageError: neither --id nor --all was given, or both; or ids of several outboxes.
    """
    if all_ == bool(ids):
        raise click.UsageError("Select rows: use either --id ID or --all.")
    found = stores.find(target)
    if ids:
        stores.one(found, target)
    return found


def each(store: Store, action: Callable[[Sequence[int]], Awaitable[int]], ids: Sequence[int]) -> list[int]:
    """Apply the action to each id. Returns those that were not set aside."""

    async def apply() -> list[int]:
        return [one for one in ids if not await action([one])]

    return stores.ask(store, apply)


def report(target: str, done: str, count: int, unknown: Sequence[int], *, as_json: bool, then: str = "") -> None:
    """Report, and exit: with 1 if an id was not set aside.

    Args:
        done: "retried" or "purged".
        then: what happens next.
    """
    if as_json:
        output.report(json.dumps({done: count, "unknown": [*unknown]}))
    elif count:
        events = "1 event" if count == 1 else f"{count:,} events"
        output.report(f"{events} {done}.{then}")
    elif not unknown:
        output.report("Nothing is set aside.")
    for one in unknown:
        click.echo(f"No event with the id {one} is set aside. To see them: lightbus outbox list {target}", err=True)
    sys.exit(1 if unknown else 0)
