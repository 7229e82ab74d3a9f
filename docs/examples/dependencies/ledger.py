"""Enters payments in a ledger: one transaction for each event. Try it: lightbus worker ledger:app"""

import os
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from typing import Annotated

import attrs

from lightbus import Depends, Lightbus, Reject, State


@attrs.frozen
class Settings:
    database: str


@asynccontextmanager
async def lifespan(app: Lightbus) -> AsyncIterator[Settings]:
    settings = Settings(database=os.environ.get("LEDGER_DB", "ledger.sqlite3"))
    with closing(sqlite3.connect(settings.database)) as database, database:
        database.execute("CREATE TABLE IF NOT EXISTS ledger (invoice_id TEXT PRIMARY KEY, cents INTEGER)")
    yield settings


app = Lightbus("ledger", lifespan=lifespan)


def open_database(settings: State[Settings]) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(settings.database)) as database, database:
        yield database  # `with database:` commits, or rolls back if the handler raises


Database = Annotated[sqlite3.Connection, Depends(open_database)]


@attrs.frozen
class Payment:
    invoice_id: str
    cents: int


@app.on("invoice.paid")
def enter(payment: Payment, database: Database) -> None:
    database.execute("INSERT INTO ledger VALUES (?, ?)", (payment.invoice_id, payment.cents))
    if payment.cents <= 0:
        raise Reject("nothing was paid")
