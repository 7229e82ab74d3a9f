"""What this service publishes. Run its relay: lightbus relay shop.bus:app"""

import os

import attrs
import crash
import sqlalchemy as sa
from shop.settings import Settings
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from lightbus import Lightbus
from lightbus.outbox import Outbox, metadata

settings = Settings.read()
engine = create_async_engine(os.environ["DATABASE_URL"])
sessions = async_sessionmaker(engine)

app = Lightbus("shop", concurrency=settings.concurrency)
outbox = Outbox(app, engine)


@app.event("order.placed")
@attrs.frozen(kw_only=True)
class OrderPlaced:
    """An order was stored."""

    id: str
    cents: int


class Base(DeclarativeBase): ...


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[str] = mapped_column(primary_key=True)
    cents: Mapped[int]


async def create_tables() -> None:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
        await connection.run_sync(metadata.create_all)


@sa.event.listens_for(engine.sync_engine, "before_cursor_execute")
def _crash(*arguments: object) -> None:
    if str(arguments[2]).startswith("DELETE FROM lightbus_outbox"):
        crash.once("relay, after the confirm, before the delete")
