"""Stores an order and its event in one transaction. Try it: python orders.py 1 margherita"""

import sys

import attrs
from sqlalchemy import create_engine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from lightbus import Lightbus
from lightbus.outbox import Outbox, metadata

app = Lightbus("shop")
engine = create_engine("sqlite:///orders.db")
outbox = Outbox(app, engine)


@app.event
@attrs.frozen
class OrderPlaced:
    number: int
    dish: str


class Base(DeclarativeBase): ...


class Order(Base):
    __tablename__ = "orders"

    number: Mapped[int] = mapped_column(primary_key=True)
    dish: Mapped[str]


def place_order(number: int, dish: str) -> None:
    with Session(engine) as session, session.begin():  # one transaction
        session.add(Order(number=number, dish=dish))
        outbox.add(session, OrderPlaced(number=number, dish=dish))


if __name__ == "__main__":
    Base.metadata.create_all(engine)
    metadata.create_all(engine)  # the table of the outbox
    try:
        place_order(int(sys.argv[1]), sys.argv[2])
        print("stored")
    except IntegrityError:
        print("not stored: this number is taken")
