"""Writes one invoice for each order. Try it: lightbus worker billing.bus:bus"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

import attrs
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from lightbus import Lightbus, Reject
from lightbus.outbox import Inbox, Outbox, metadata

engine = create_async_engine(os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///billing.db"))
sessions = async_sessionmaker(engine)


class Base(DeclarativeBase): ...


class Invoice(Base):
    __tablename__ = "invoice"

    number: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[UUID]  # not unique: the inbox is what keeps a duplicate out
    cents: Mapped[int]


@asynccontextmanager
async def lifespan(_: Lightbus) -> AsyncIterator[None]:
    async with engine.begin() as connection:  # in production: a migration
        await connection.run_sync(Base.metadata.create_all)
        await connection.run_sync(metadata.create_all)  # lightbus_outbox, lightbus_inbox
    yield
    await engine.dispose()


# SQLite has one writer at a time: more handlers at once would only wait for each other.
bus = Lightbus("billing", lifespan=lifespan, concurrency=1 if engine.dialect.name == "sqlite" else 10)
outbox = Outbox(bus, engine)
inbox = Inbox(bus, sessions)


@bus.event  # published as "invoice.written"
@attrs.frozen
class InvoiceWritten:
    number: int
    order_id: UUID


@attrs.frozen
class Order:
    order_id: UUID
    cents: int


@bus.on("order.placed", inbox=inbox)
async def bill(order: Order, session: AsyncSession) -> None:  # the session of the inbox's transaction
    invoice = Invoice(order_id=order.order_id, cents=order.cents)
    session.add(invoice)
    await session.flush()  # the database assigns the number
    outbox.add(session, InvoiceWritten(number=invoice.number, order_id=order.order_id))
    if order.cents <= 0:
        raise Reject("nothing to pay")  # also rolls back: no invoice, no event, no id in the inbox
