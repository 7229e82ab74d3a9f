"""The shop's database, its event and its outbox. The worker runs the relay: lightbus worker shop.bus:bus"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

import attrs
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from lightbus import Lightbus
from lightbus.outbox import Outbox, metadata

# In production: postgresql+asyncpg://shop:password@host/shop
engine = create_async_engine(os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///shop.db"))
sessions = async_sessionmaker(engine)


class Base(DeclarativeBase): ...


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    cents: Mapped[int]


async def create_tables() -> None:
    async with engine.begin() as connection:  # in production: a migration
        await connection.run_sync(Base.metadata.create_all)
        await connection.run_sync(metadata.create_all)  # lightbus_outbox, lightbus_inbox


@asynccontextmanager
async def lifespan(_: Lightbus) -> AsyncIterator[None]:
    await create_tables()
    yield
    await engine.dispose()


bus = Lightbus("shop", lifespan=lifespan)
outbox = Outbox(bus, engine)


@bus.event  # published as "order.placed"
@attrs.frozen
class OrderPlaced:
    order_id: UUID
    cents: int
