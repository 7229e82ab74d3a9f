"""The tables `lightbus_outbox` and `lightbus_inbox`, for SQLAlchemy and Alembic."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import registry
from sqlalchemy.schema import CreateIndex, CreateTable

from lightbus import errors
from lightbus.outbox.rows import INBOX, OUTBOX
from lightbus.outbox.store import CHANNEL

metadata = sa.MetaData()
"""Both tables: `metadata.create_all(engine)`, or one of Alembic's `target_metadata`."""

_BIG = 2**32 - 1  # MariaDB needs a length for more than 64 KB
# Of MariaDB and MySQL: transactions and row locks, each character, upper and lower case distinguished. Their defaults
# may have none of that.
_MARIADB: Any = {
    f"{dialect}_{option}": value
    for dialect in ("mysql", "mariadb")
    for option, value in (("engine", "InnoDB"), ("charset", "utf8mb4"), ("collate", "utf8mb4_bin"))
}

outbox = sa.Table(
    OUTBOX,
    metadata,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("app", sa.String(255), nullable=False),
    sa.Column("event", sa.String(255), nullable=False),
    sa.Column("message_id", sa.String(255), nullable=False),
    sa.Column("body", sa.LargeBinary(_BIG), nullable=False),
    sa.Column("properties", sa.LargeBinary(_BIG), nullable=False),
    sa.Column("delay", sa.Integer, nullable=False, server_default="0"),
    sa.Column("added_at", sa.Double, nullable=False),
    sa.Column("state", sa.SmallInteger, nullable=False, server_default="0"),
    sa.Column("due", sa.Double, nullable=False, server_default="0"),
    sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
    sa.Column("error", sa.Text),
    sa.Index(f"{OUTBOX}_due", "app", "state", "due", "id"),
    **_MARIADB,
)
"""
`state`: 0 waits, 1 is set aside with its `error`. `due`: 0 for a new row; else when it may be tried again, in seconds
since 1970. `attempts`: how often the broker has refused it.
"""

inbox = sa.Table(
    INBOX,
    metadata,
    sa.Column("handler", sa.String(511), primary_key=True),
    sa.Column("message_id", sa.String(255), primary_key=True),
    sa.Column("handled_at", sa.Double, nullable=False),
    sa.Index(f"{INBOX}_handled_at", "handled_at"),
    **_MARIADB,
)
"""`handler`: `billing.bill`, the app and the handler. `handled_at`: seconds since 1970."""

NOTIFY = (
    f"CREATE OR REPLACE FUNCTION {OUTBOX}_notify() RETURNS trigger LANGUAGE plpgsql AS "
    f"$$ BEGIN PERFORM pg_notify('{CHANNEL}', ''); RETURN NULL; END $$",
    f"CREATE OR REPLACE TRIGGER {OUTBOX}_notify AFTER INSERT ON {OUTBOX} "
    f"FOR EACH STATEMENT EXECUTE FUNCTION {OUTBOX}_notify()",
)
"""PostgreSQL 14 and later: wakes the relays when a transaction with events commits."""

_DDL: Any = sa.DDL  # has no types
for _statement in NOTIFY:
    event.listen(outbox, "after_create", _DDL(_statement).execute_if(dialect="postgresql"))


class OutboxRow:
    """A row that an ORM session inserts with its other objects."""

    def __init__(self, **columns: Any) -> None:
        for name, value in columns.items():
            setattr(self, name, value)


registry(metadata=metadata).map_imperatively(OutboxRow, outbox)

DIALECTS = ("postgresql", "sqlite", "mysql", "mariadb")


def ddl(dialect: str) -> str:
    """The statements that create both tables: for a migration.

    Raises:
        errors.InvalidOption: not one of DIALECTS.
    """
    if dialect not in DIALECTS:
        raise errors.InvalidOption(f"dialect={dialect!r}: use one of {', '.join(DIALECTS)}.")
    compiler = sa.make_url(f"{dialect}://").get_dialect()()
    statements: list[str] = []
    for table in (outbox, inbox):
        statements.append(str(CreateTable(table).compile(dialect=compiler)).strip())
        statements += [str(CreateIndex(index).compile(dialect=compiler)).strip() for index in table.indexes]
    if dialect == "postgresql":
        statements += NOTIFY
    return "".join(f"{statement};\n" for statement in statements)
