"""A session and a transaction for each handler that asks for one. Try it: lightbus worker sqlalchemy_depends:app"""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated

import attrs
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from lightbus import Depends, Lightbus, Reject

engine = create_async_engine(os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///billing.db"))
sessions = async_sessionmaker(engine, expire_on_commit=False)


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


async def open_session() -> AsyncGenerator[AsyncSession]:
    async with sessions.begin() as session:  # commits if the handler returns, rolls back if it raises or times out
        yield session


Session = Annotated[AsyncSession, Depends(open_session)]


@attrs.frozen
class Order:
    order_id: int
    amount: int


@app.on("order.placed")
async def bill(order: Order, session: Session) -> None:
    session.add(Invoice(order_id=order.order_id, amount=order.amount))
    await session.flush()
    if order.amount <= 0:
        raise Reject("nothing to pay")  # also rolls back
