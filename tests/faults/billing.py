"""The app that writes the invoices: `lightbus worker tests.faults.billing:app`. The environment configures it.

FAULTS_DRIVER: psycopg (a sync handler) or asyncpg (an async one).
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import anyio
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from lightbus import Lightbus, Message, Retry
from lightbus.outbox import Inbox, Outbox
from lightbus.outcome import Outcome
from tests.faults.ledger import HANDLED, HELD, SKIPPED, Ledger
from tests.faults.orders import (
    KEYS,
    Invoice,
    InvoiceCreated,
    OrderPlaced,
    Total,
    is_announced,
    open_engine,
    patch_clock,
)

patch_clock()
ledger = Ledger(Path(os.environ["FAULTS_LEDGER"]))
asynchronous = os.environ["FAULTS_DRIVER"] == "asyncpg"
engine: Any = open_engine(asynchronous=asynchronous)
# Enough retries for a database that is away for some seconds: a dead letter would have no invoice.
app = Lightbus("billing", retry=Retry(delays=(0.2, 0.2, 0.5, 0.5, 1, 1, 2, 2, 5, 5, 5, 5, 5)))
app.event(InvoiceCreated)
outbox = Outbox(app, engine)
inbox = Inbox(app, async_sessionmaker(engine) if asynchronous else sessionmaker(engine))


def steps(order: OrderPlaced, message: Message, session: Session) -> float:
    """What the handler does. Returns for how many seconds it then waits."""
    session.add(Invoice(order_id=order.order_id))
    if is_announced(order.order_id):
        outbox.add(session, InvoiceCreated(order_id=order.order_id))
    session.flush()
    what, _, seconds = order.do.partition(":")
    if what == "deadlock":  # in any order: two of these block each other for ever, until PostgreSQL ends one
        for key in random.sample(range(KEYS), 2):
            session.execute(sa.update(Total).where(Total.key == key).values(count=Total.count + 1))
            time.sleep(0.001)
    elif what == "hold" and not message.redelivered:
        ledger.write(HELD, order.order_id, os.getpid())
        if seconds == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        return 0.5
    return 0.0


if asynchronous:

    @app.on("order.placed", timeout=120, inbox=inbox)
    async def bill(order: OrderPlaced, message: Message, session: AsyncSession) -> None:
        await anyio.sleep(await session.run_sync(lambda one: steps(order, message, one)))

else:

    @app.on("order.placed", timeout=120, inbox=inbox, name="bill")
    def bill_sync(order: OrderPlaced, message: Message, session: Session) -> None:
        time.sleep(steps(order, message, session))


@app.observe
def note(outcome: Outcome) -> None:
    """After the commit, before the ack."""
    if outcome.kind in ("handled", "skipped") and outcome.handler is not None:
        kind = HANDLED if outcome.kind == "handled" else SKIPPED
        # The event has the id of its order.
        ledger.write(kind, outcome.message.id, os.getpid(), int(outcome.message.redelivered), outcome.attempt)
