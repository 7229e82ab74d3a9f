"""`lightbus outbox sql`."""

from __future__ import annotations

import click

from lightbus.cli import output

EPILOG = """\b
Examples:
  lightbus outbox sql
  lightbus outbox sql | psql "$DATABASE_URL"
  lightbus outbox sql --dialect sqlite | sqlite3 billing.db

\b
Exit codes:
  0  success; no database is used
  1  SQLAlchemy is not installed
  2  the command line is invalid
"""


@click.command(short_help="Print the statements that create the tables.", epilog=EPILOG)
@click.option(
    "--dialect",
    type=click.Choice(["postgresql", "sqlite", "mysql", "mariadb"]),
    default="postgresql",
    show_default=True,
    help="The database.",
)
def sql(dialect: str) -> None:
    """Print the statements that create the tables of the outbox and the inbox, for a migration.

    With Alembic, `lightbus.outbox.metadata` has the tables instead; with Django, its migrations do.
    """
    try:
        from lightbus.outbox.tables import ddl
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "sqlalchemy":
            raise
        raise click.ClickException(
            "SQLAlchemy is not installed. Install it: pip install 'lightbus-amqp[outbox]'"
        ) from error
    output.write(ddl(dialect), nl=False)
