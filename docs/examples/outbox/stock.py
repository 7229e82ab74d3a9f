"""The same with sync sessions, a Connection and a dependency. Try it: lightbus worker stock:bus"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import attrs
from sqlalchemy import create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from lightbus import Depends, Lightbus
from lightbus.outbox import Inbox, Outbox, metadata

engine = create_engine(os.environ.get("STOCK_DATABASE_URL", "sqlite:///stock.db"))
sessions = sessionmaker(engine)


class Base(DeclarativeBase): ...


class Reservation(Base):
    __tablename__ = "reservation"

    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[str]


@asynccontextmanager
async def lifespan(_: Lightbus) -> AsyncIterator[None]:
    Base.metadata.create_all(engine)  # in production: a migration
    metadata.create_all(engine)
    yield
    engine.dispose()


bus = Lightbus("stock", lifespan=lifespan, concurrency=1)
outbox = Outbox(bus, engine)
inbox = Inbox(bus, sessions)


@bus.event  # published as "stock.reserved"
@attrs.frozen
class StockReserved:
    order_id: str


@bus.event  # published as "stock.counted"
@attrs.frozen
class StockCounted:
    reserved: int


def count_stock() -> None:
    with engine.begin() as connection:  # SQLAlchemy Core: a Connection instead of a session
        reserved = connection.exec_driver_sql("SELECT count(*) FROM reservation").scalar_one()
        outbox.add(connection, StockCounted(reserved=reserved))


class Reservations:
    """A repository: it gets the session of the inbox's transaction as a dependency."""

    def __init__(self, session: Annotated[Session, Depends(inbox.session)]) -> None:
        self.session = session

    def add(self, order_id: str) -> None:
        self.session.add(Reservation(order_id=order_id))
        outbox.add(self.session, StockReserved(order_id=order_id))


@attrs.frozen
class Order:
    order_id: str


@bus.on("order.placed", inbox=inbox)
def reserve(order: Order, reservations: Annotated[Reservations, Depends(Reservations)]) -> None:
    reservations.add(order.order_id)
