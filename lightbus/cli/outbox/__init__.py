"""`lightbus outbox`: an app's outbox, and the statements that create its tables. One file for each subcommand."""

from __future__ import annotations

import click

from lightbus.cli import Group
from lightbus.cli.outbox.list import list_
from lightbus.cli.outbox.purge import purge
from lightbus.cli.outbox.retry import retry
from lightbus.cli.outbox.sql import sql
from lightbus.cli.outbox.stats import stats

EPILOG = """\b
Create the tables, look at what waits and what the broker has refused, fix the cause, and retry:
  lightbus outbox sql --dialect postgresql
  lightbus outbox stats billing.bus:app
  lightbus outbox list billing.bus:app
  lightbus outbox retry billing.bus:app --id 42

\b
`lightbus outbox COMMAND --help` shows the options of each.
"""


@click.group(cls=Group, short_help="Inspect an outbox; print the SQL of its tables.", epilog=EPILOG)
def outbox() -> None:
    """Inspect an app's outbox: the events that wait in its database, and those that the broker has refused.

    An event that the broker refuses for good is set aside. It stays in the table `lightbus_outbox`, complete, until it
    is retried or purged. If the broker only rejects it for now (a full queue), the relay tries it again by itself.

    ATTR names the app, or one Outbox of it.
    """


for command in (sql, stats, list_, retry, purge):
    outbox.add_command(command)
