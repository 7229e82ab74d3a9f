"""After, with SQLAlchemy: the order and its event are committed together."""

import os

import attrs
from sqlalchemy import create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from lightbus import Lightbus
from lightbus.outbox import Outbox

engine = create_engine(os.environ.get("DATABASE_URL", "sqlite:///shop.db"))
sessions = sessionmaker(engine)
app = Lightbus("shop")
outbox = Outbox(app, engine)


class Base(DeclarativeBase): ...


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str]


@app.event
@attrs.frozen
class OrderPlaced:
    order_id: int
    email: str


def place_order(order_id: int, email: str) -> None:
    with sessions.begin() as session:
        session.add(Order(id=order_id, email=email))
        outbox.add(session, OrderPlaced(order_id=order_id, email=email))
