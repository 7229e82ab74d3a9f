"""The options that select dead letters, and the app and filter that a command line names."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from lightbus.cli import tables

if TYPE_CHECKING:
    from lightbus import Lightbus
    from lightbus.dead_letters.letter import Filter


def _age(_ctx: click.Context, _param: click.Parameter, value: str | None) -> float | None:
    try:
        return None if value is None else tables.read_age(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is not an age: use 90s, 5m, 2h, 7d or 1w.") from None


def _ids(_ctx: click.Context, _param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    if "" in value:  # an unset shell variable. Every ID begins with an empty string
        raise click.BadParameter("it is empty and would match every dead letter. Give an ID, or a prefix of one.")
    return value


_FILTERS = (
    click.option("--event", metavar="PATTERN", help="Events whose name matches, as in 'invoice.*'."),
    click.option("--handler", metavar="NAME", help="Only those that this handler failed on."),
    click.option(
        "--error",
        metavar="TYPE",
        help="The error's type, as in TimeoutError; 'delivery_limit' for events that crashed their workers.",
    ),
    click.option("--older", callback=_age, metavar="AGE", help="Dead for at least this long: 90s, 5m, 2h, 7d."),
    click.option("--newer", callback=_age, metavar="AGE", help="Dead for at most this long."),
    click.option(
        "--id", "ids", multiple=True, callback=_ids, metavar="ID", help="The ID, or a prefix of it. Repeatable."
    ),
)


def filters(command: Callable[..., None]) -> Callable[..., None]:
    """Add the filter options: --event, --handler, --error, --older, --newer and --id."""
    for option in reversed(_FILTERS):
        command = option(command)
    return command


def prepare(target: str, given: dict[str, Any]) -> tuple[Lightbus, Filter]:
    """Load the app, and build the filter from the values of the filter options."""
    from lightbus.cli import logs
    from lightbus.cli import target as targets
    from lightbus.dead_letters.letter import Filter
    from lightbus.wire.topology import check_pattern

    logs.configure("error")
    if given.get("event") is not None:
        check_pattern(given["event"], "--event")
    return targets.load_app(target), Filter(**given)


def require_selection(wanted: Filter, limit: int | None, all_: bool) -> None:
    """
    Raises:
        click.UsageError: neither a filter, nor --limit, nor --all was given.
    """
    if not (wanted.given or limit or all_):
        raise click.UsageError("Select dead letters: use a filter (see --help), --limit N, or --all.")
