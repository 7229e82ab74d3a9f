"""Lightbus's outbox and inbox, with SQLAlchemy and psycopg on PostgreSQL."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import attrs
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, registry

from benchmarks import payload
from benchmarks.peers import lightbus_
from benchmarks.peers.lightbus_ import make, publishing, send_many
from benchmarks.plan import Meter, Plan, cpu_seconds
from lightbus import Lightbus
from lightbus.outbox import Inbox, Outbox, metadata
from lightbus.outbox.rows import new_row
from lightbus.outbox.tables import outbox as outbox_table

__all__ = ["consuming", "make", "publishing", "run", "send_many"]

BLOCKS = 20
"""`add`: the kinds of transactions take turns, this often."""
NO_DISK = {"options": "-c synchronous_commit=off"}
"""`add` and the inbox: the cost of the library is measured, not the disk."""
SAMPLE = 0.002
"""Seconds between two looks at what the relay has sent."""


class Base(DeclarativeBase):
    pass


class PlacedOrder(Base):
    __tablename__ = "placed_order"
    id: Mapped[int] = mapped_column(primary_key=True)
    customer_id: Mapped[int]
    email: Mapped[str]
    total: Mapped[float]


class Bill(Base):
    __tablename__ = "bill"
    id: Mapped[int] = mapped_column(primary_key=True)
    customer_id: Mapped[int]
    total: Mapped[float]


class PlainRow:
    """A row of the application with the same columns as a row of the outbox."""


plain_table = outbox_table.to_metadata(Base.metadata, name="plain_row")
plain_table.indexes.clear()  # their names are taken
registry().map_imperatively(PlainRow, plain_table)


def run(plan: Plan) -> dict[str, Any]:
    match plan.handler:
        case "schema":
            return _create(plan)
        case "add":
            return _add(plan)
        case _:
            return asyncio.run(_relay(plan))


def _create(plan: Plan) -> dict[str, Any]:
    """The tables, and one event as the outbox adds it, of which the others are copies."""
    app = lightbus_.new_app(plan, plan.name)
    engine = sa.create_engine(plan.database)
    metadata.create_all(engine)
    Base.metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        Outbox(app).add(session, make(plan, payload.SEED, 0))
        session.flush()
        for statement in SEED:
            session.execute(sa.text(statement))
    return {"created": True}


def _statements(engine: sa.Engine) -> Callable[[], int]:
    """Counts the statements that the engine executes from now on, without BEGIN and COMMIT."""
    count = 0

    @sa.event.listens_for(engine, "before_cursor_execute")
    def executing(*_: object) -> None:
        nonlocal count
        count += 1

    return lambda: count


# --- outbox.add


def _add(plan: Plan) -> dict[str, Any]:
    """Process time per order of three kinds of transactions, which take turns, and the statements of each.

    The event and the values of the other row are made before.
    """
    app = lightbus_.new_app(plan, plan.name)
    outbox = Outbox(app)
    engine = sa.create_engine(plan.database, connect_args=NO_DISK)
    orders = plan.in_flight
    transactions = max(2, plan.count // BLOCKS // orders)
    fields = payload.make("order", payload.FIRST)
    event = make(plan, payload.FIRST, 0)
    columns = attrs.asdict(new_row(app, event, None, {}))

    def only(session: Session) -> None:
        session.add(PlacedOrder(customer_id=1, email=fields["email"], total=fields["total"]))

    def plain(session: Session) -> None:
        only(session)
        session.add(PlainRow(**columns))

    def added(session: Session) -> None:
        only(session)
        outbox.add(session, event)

    kinds = {"the order only": only, "with one more row": plain, "with outbox.add": added}
    cpu: dict[str, list[float]] = {name: [] for name in kinds}
    statements = dict.fromkeys(kinds, 0.0)
    executed = _statements(engine)
    for block in range(BLOCKS + 2):
        for name, per_order in kinds.items():
            before, began = executed(), time.process_time()
            for _ in range(transactions):
                with Session(engine) as session, session.begin():
                    for _ in range(orders):
                        per_order(session)
            spent = (time.process_time() - began) / (transactions * orders)
            statements[name] = (executed() - before) / (transactions * orders)
            if block >= 2:
                cpu[name].append(spent * 1e6)
    # The lowest of the blocks: other load on the machine only adds to process time.
    lowest = {name: min(values) for name, values in cpu.items()}
    return {
        "parts": {name: {"cpu_us": value, "statements": statements[name]} for name, value in lowest.items()},
        "added_us": lowest["with outbox.add"] - lowest["with one more row"],
    }


# --- the relay


async def _relay(plan: Plan) -> dict[str, Any]:
    """The relay as a worker runs it: time and CPU between two numbers of sent rows (`plan.phases`)."""
    app = lightbus_.new_app(plan, plan.name)
    engine = sa.create_engine(plan.database)
    relay = Outbox(app, engine).relay
    assert relay is not None
    marks: list[tuple[int, float, float]] = []

    async def reached(sent: int) -> None:
        while relay.sent < sent:  # noqa: ASYNC110
            await anyio.sleep(SAMPLE)
        marks.append((relay.sent, time.perf_counter(), cpu_seconds()))

    async with app, anyio.create_task_group() as tasks:
        tasks.start_soon(relay.run, anyio.Event())
        if plan.waiting:
            await _in_turns(plan, engine, marks, reached)
        else:
            for sent in plan.phases:
                await reached(sent)
        # Stopped between two batches, or in one: then its rows stay, although they may have been published.
        tasks.cancel_scope.cancel()
    begin, end = marks
    events, wall, cpu = (after - before for before, after in zip(begin, end, strict=True))
    return {"events": events, "wall": wall, "cpu": cpu, "sent": relay.sent}


async def _in_turns(plan: Plan, engine: sa.Engine, marks: list[Any], reached: Any) -> None:
    """A transaction adds so many rows, then all are sent: from the commit to the last of them."""
    spans: list[tuple[Any, Any]] = []
    turns = plan.count // plan.waiting
    for turn in range(turns + 2):
        connection = await asyncio.to_thread(_filled, engine, plan.waiting)
        began = (turn * plan.waiting, time.perf_counter(), cpu_seconds())
        await asyncio.to_thread(connection.commit)
        await reached((turn + 1) * plan.waiting)
        connection.close()
        if turn >= 2:
            spans.append((began, marks[-1]))
    # As if it were one span.
    sums = [sum(end[index] - begin[index] for begin, end in spans) for index in range(3)]
    marks[:] = [(0, 0.0, 0.0), (sums[0], sums[1], sums[2])]


def _filled(engine: sa.Engine, count: int) -> sa.Connection:
    connection = engine.connect()
    connection.execute(sa.text(COPIES.format(count=count)))
    return connection


SEED = (
    "CREATE SEQUENCE lightbus_number",
    "CREATE TABLE lightbus_seed AS SELECT app, event, message_id, body, properties, added_at FROM lightbus_outbox",
    "DELETE FROM lightbus_outbox",
)
COPIES = (
    "INSERT INTO lightbus_outbox (app, event, message_id, body, properties, added_at) "
    "SELECT app, event, new_id, body, decode(replace(encode(properties, 'hex'), encode(convert_to(message_id, 'UTF8'), "
    "'hex'), encode(convert_to(new_id, 'UTF8'), 'hex')), 'hex'), added_at FROM (SELECT *, left(message_id, -12) || "
    "lpad(to_hex(nextval('lightbus_number')), 12, '0') AS new_id FROM lightbus_seed, generate_series(1, {count})) c"
)
"""Copies of the event that `_create` has added, each with its own id."""


# --- the inbox


@contextlib.asynccontextmanager
async def consuming(plan: Plan, meter: Meter) -> AsyncIterator[None]:
    """A handler that inserts one row: in a transaction of its own, or in that of its inbox."""
    if not plan.database:
        async with lightbus_.consuming(plan, meter):
            yield
        return
    engine = create_async_engine(plan.database, pool_size=32, connect_args=NO_DISK)
    sessions = async_sessionmaker(engine)
    app = lightbus_.new_app(plan, plan.name)
    (event,) = lightbus_._classes
    options: dict[str, Any] = {"inbox": Inbox(app, sessions)} if plan.around == "inbox" else {}

    async def in_inbox(order, session):  # type: ignore[no-untyped-def]
        await session.execute(_insert, {"customer_id": order.customer_id, "total": order.total})
        meter(order.customer_id)

    async def own_session(order):  # type: ignore[no-untyped-def]
        async with sessions.begin() as session:
            await session.execute(_insert, {"customer_id": order.customer_id, "total": order.total})
        meter(order.customer_id)

    in_inbox.__annotations__ |= {"order": event, "session": AsyncSession}
    own_session.__annotations__["order"] = event
    app.on(lightbus_.event_name(plan, 0), name="handle", **options)(in_inbox if options else own_session)
    executed = _statements(engine.sync_engine)
    async with _running(app):
        yield
        meter.more["statements"] = executed() / max(1, len(meter.values))
    async with engine.connect() as connection:
        meter.more["rows"] = (await connection.execute(sa.select(sa.func.count()).select_from(Bill))).scalar()


_insert = sa.insert(Bill)


@contextlib.asynccontextmanager
async def _running(app: Lightbus) -> AsyncIterator[None]:
    consumer = app.consumer()
    async with app, anyio.create_task_group() as tasks:
        await tasks.start(consumer.run)
        yield
        await consumer.stop(5)
