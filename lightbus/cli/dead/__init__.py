"""`lightbus dead`: list, show, retry and purge the dead letters of an app. One file for each subcommand."""

from __future__ import annotations

import click

from lightbus.cli import Group
from lightbus.cli.dead.list import list_
from lightbus.cli.dead.purge import purge
from lightbus.cli.dead.retry import retry
from lightbus.cli.dead.show import show

EPILOG = """\b
Find out what failed and why, look at one dead letter, fix the cause, and retry:
  lightbus dead list billing.bus:app --stats
  lightbus dead list billing.bus:app --error TimeoutError --newer 2h
  lightbus dead show billing.bus:app 0198c5d2-7a3b
  lightbus dead retry billing.bus:app --error TimeoutError --dry-run
  lightbus dead retry billing.bus:app --error TimeoutError

\b
You can interrupt each of these commands at any time: nothing is lost.
`lightbus dead COMMAND --help` shows the options of each.
"""


@click.group(cls=Group, short_help="List, show, retry or purge dead letters.", epilog=EPILOG)
def dead() -> None:
    """Inspect and retry an app's dead letters, in its queue APP.dead.

    An event becomes a dead letter when its handler fails and no retries are left, raises Reject, or cannot decode it,
    or when it crashes its worker repeatedly. It stays there, complete, until it is retried or purged.
    """


for command in (list_, show, retry, purge):
    dead.add_command(command)
