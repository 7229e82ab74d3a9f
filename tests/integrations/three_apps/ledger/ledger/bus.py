"""What this service handles. Run it: lightbus worker ledger.bus:app"""

import os

import attrs
import crash
import sqlalchemy as sa
from ledger.settings import Settings
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from lightbus import Lightbus, Outcome
from lightbus.outbox import Inbox, metadata

settings = Settings.read()
engine = create_async_engine(os.environ["DATABASE_URL"])
sessions = async_sessionmaker(engine)
app = Lightbus("ledger", concurrency=settings.concurrency)
inbox = Inbox(app, sessions)


class Base(DeclarativeBase): ...


class Entry(Base):
    __tablename__ = "entry"

    id: Mapped[int] = mapped_column(primary_key=True)
    order: Mapped[str]  # not unique: only the inbox keeps duplicates out
    cents: Mapped[int]


async def create_tables() -> None:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
        await connection.run_sync(metadata.create_all)


@attrs.frozen
class Invoice:
    """The fields of invoice.written that this service reads. It ignores all others."""

    id: str
    cents: int


@app.on("invoice.written", inbox=inbox)
async def enter(invoice: Invoice, session: AsyncSession) -> None:
    session.add(Entry(order=invoice.id, cents=invoice.cents))
    await session.flush()
    crash.once("ledger, before the commit")


@sa.event.listens_for(Session, "after_commit")
def _crash(_: Session) -> None:
    crash.once("ledger, after the commit, before the ack")


@app.observe
def note(outcome: Outcome) -> None:
    if outcome.kind == "skipped" and outcome.message is not None:
        print(f"skipped {outcome.message.id}", flush=True)
