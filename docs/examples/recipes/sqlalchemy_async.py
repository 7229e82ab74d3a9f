"""SQLAlchemy: a session and a transaction for each event. Try it: lightbus worker sqlalchemy_async:app"""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from contextvars import ContextVar

import attrs
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from lightbus import Lightbus, Message, Next, Reject

engine = create_async_engine(os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///billing.db"))
sessions = async_sessionmaker(engine, expire_on_commit=False)
current_session: ContextVar[AsyncSession] = ContextVar("current_session")


class Base(DeclarativeBase): ...


class Invoice(Base):
    __tablename__ = "invoice"

    order_id: Mapped[int] = mapped_column(primary_key=True)
    amount: Mapped[int]


@asynccontextmanager
async def lifespan(app: Lightbus) -> AsyncGenerator[None]:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)  # in production: Alembic
    yield
    await engine.dispose()


app = Lightbus("billing", lifespan=lifespan)


@app.middleware
async def transaction(message: Message, call_next: Next) -> None:
    async with sessions.begin() as session:  # commits if the handler returns, rolls back if it raises or times out
        token = current_session.set(session)
        try:
            await call_next()
        finally:
            current_session.reset(token)


@attrs.frozen
class Order:
    order_id: int
    amount: int


@app.on("order.placed")
async def bill(order: Order) -> None:
    session = current_session.get()
    session.add(Invoice(order_id=order.order_id, amount=order.amount))
    await session.flush()
    if order.amount <= 0:
        raise Reject("nothing to pay")  # also rolls back
