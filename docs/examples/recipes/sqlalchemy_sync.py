"""The same for sync handlers, which run in threads. Try it: lightbus worker sqlalchemy_sync:app"""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from contextvars import ContextVar

import attrs
from sqlalchemy import create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from lightbus import Lightbus, Message, NextSync, Reject

# One connection for each thread that runs a handler: `concurrency`, 10 here, is the maximum.
engine = create_engine(os.environ.get("DATABASE_URL", "sqlite:///billing.db"), pool_size=10)
sessions = sessionmaker(engine)
current_session: ContextVar[Session] = ContextVar("current_session")


class Base(DeclarativeBase): ...


class Invoice(Base):
    __tablename__ = "invoice"

    order_id: Mapped[int] = mapped_column(primary_key=True)
    amount: Mapped[int]


@asynccontextmanager
async def lifespan(app: Lightbus) -> AsyncGenerator[None]:
    Base.metadata.create_all(engine)  # in production: Alembic
    yield
    engine.dispose()


app = Lightbus("billing", concurrency=10, lifespan=lifespan)


@app.middleware
def transaction(message: Message, call_next: NextSync) -> None:
    with sessions.begin() as session:  # commits if the handler returns, rolls back if it raises
        token = current_session.set(session)
        try:
            call_next()
        finally:
            current_session.reset(token)


@attrs.frozen
class Order:
    order_id: int
    amount: int


@app.on("order.placed")
def bill(order: Order) -> None:
    session = current_session.get()
    session.add(Invoice(order_id=order.order_id, amount=order.amount))
    session.flush()
    if order.amount <= 0:
        raise Reject("nothing to pay")  # also rolls back
