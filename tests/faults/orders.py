"""The system of the outbox's fault tests: `shop` places orders, `billing` writes an invoice for each.

Both use one database. The tables have no constraint that would hide a double: an order may have several invoices.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import attrs
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from lightbus import Lightbus
from lightbus.outbox import Outbox

KEYS = 4
"""Rows of `totals`, which handlers update in a random order."""


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[str] = mapped_column(primary_key=True)
    do: Mapped[str]


class Invoice(Base):
    __tablename__ = "invoices"
    number: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[str]


class Total(Base):
    __tablename__ = "totals"
    key: Mapped[int] = mapped_column(primary_key=True)
    count: Mapped[int] = mapped_column(default=0)


@attrs.frozen(kw_only=True)
class OrderPlaced:
    order_id: str
    do: str = ""
    """What the handler does besides the invoice; see billing.py."""


@attrs.frozen(kw_only=True)
class InvoiceCreated:
    order_id: str


def is_announced(order_id: str) -> bool:
    """Whether the invoice of this order has an event: of every fifth order, since each costs as much as the order."""
    return order_id.endswith(("0", "5"))


# --- in the processes under test: the environment configures them -----------------------------


def open_engine(*, asynchronous: bool) -> sa.Engine | AsyncEngine:
    """The database of the scene; with asyncpg or with psycopg."""
    url = sa.make_url(os.environ["FAULTS_DATABASE"])
    if asynchronous:
        return create_async_engine(url.set(drivername="postgresql+asyncpg"), pool_size=20)
    return sa.create_engine(url, pool_size=40)


def shop(engine: sa.Engine | AsyncEngine | None = None) -> tuple[Lightbus, Outbox]:
    app = Lightbus("shop")
    app.event(OrderPlaced)
    return app, Outbox(app, engine)


def patch_clock() -> None:
    """`time.time` is off by the seconds in the file `clock`, if there is one. Other clocks of the process are right."""
    file = Path(os.environ["FAULTS_LEDGER"]) / "clock"
    right = time.time

    def wrong() -> float:
        try:
            return right() + float(file.read_text())
        except (FileNotFoundError, ValueError):  # ValueError: it is being written
            return right()

    time.time = wrong
