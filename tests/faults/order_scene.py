"""A scene with a database: `shop` places orders through its outbox, `billing` writes invoices within its inbox."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from urllib.parse import urlsplit

import attrs
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from lightbus import Lightbus
from lightbus.connection.declare import declare
from lightbus.outbox import Outbox, metadata
from lightbus.outbox.tables import outbox
from lightbus.transport import Delivery
from lightbus.wire import topology
from tests.faults.ledger import HANDLED, HELD, PLACED, ROLLED_BACK, SKIPPED, TRIED
from tests.faults.orders import KEYS, Base, Invoice, Order, OrderPlaced, Total, is_announced
from tests.faults.proxy import Proxy
from tests.faults.scene import LIMIT, Process, Scene, recovery
from tests.faults.stage import Stage, connect

TAP = "tap"
"""A queue that gets each event that is sent."""
AHEAD = "100"
"""While so many orders have no invoice, no more are placed: each process has load, and recovery is not the time that a
long backlog takes."""
BILLING = ("lightbus", "worker", "tests.faults.billing:app")


@attrs.frozen(kw_only=True)
class OrderRow:
    """The result of one scenario with orders."""

    fault: str
    times: int
    orders: int
    """Committed."""
    rolled_back: int
    """Orders whose transaction or savepoint was rolled back, or ended with its process."""
    invoices: int
    sent_again: int
    """Further copies of orders on the wire."""
    skipped: Counter[str]
    """Deliveries that the inbox has skipped, by reason."""
    lost: set[str]
    """Committed orders without an invoice, and invoices without their event."""
    twice: set[str]
    """Orders with more than one invoice."""
    phantoms: set[str]
    """What was rolled back, and has an invoice or was sent."""
    dead: int
    recoveries: list[float]
    note: str = ""

    @property
    def recovery(self) -> str:
        return recovery(self.recoveries)

    def check(self) -> None:
        assert not self.dead, f"{self.fault}: {self.dead} dead letters"  # first: their orders have no invoice
        for what in ("lost", "twice", "phantoms"):
            found: set[str] = getattr(self, what)
            assert not found, f"{self.fault}: {what}: {len(found)} orders: {sorted(found)[:20]}"
        assert not self.skipped["unexplained"], f"{self.fault}: {self.skipped} skipped"
        assert self.orders == self.invoices
        assert self.orders, f"{self.fault}: no order was committed, so nothing was tested"


class OrderScene(Scene):
    """`with OrderScene(stage) as scene:`; then start a relay, a worker and a placer."""

    def __init__(self, stage: Stage, options: str = "") -> None:
        super().__init__(stage.vhost(options))
        self.database = stage.database()
        self.engine = sa.create_engine(self.database, poolclass=NullPool)
        self.outbox = Outbox(Lightbus("shop", url=self.url))
        self.outbox.app.event(OrderPlaced)
        self.restarts: list[tuple[float, float]] = []
        """Those of `faults` that have restarted the broker."""

    def __enter__(self) -> OrderScene:
        super().__enter__()
        for tables in (metadata, Base.metadata):
            tables.create_all(self.engine)
        with Session(self.engine) as session, session.begin():
            session.add_all([Total(key=key, count=0) for key in range(KEYS)])
        connection = connect(self.url)
        for app in ("shop", "billing"):
            declare(connection, topology.publishing(app))
        channel = connection.channel()
        channel.queue_declare(TAP, durable=True, auto_delete=False)
        for event in ("order.placed", "invoice.created"):
            channel.queue_bind(TAP, topology.BUS, event)
        connection.close()
        return self

    # --- processes

    def _with_database(
        self, name: str, command: Sequence[str], driver: str = "psycopg", through: Proxy | None = None
    ) -> Process:
        database = self.database
        if through is not None:
            database = database.replace(f":{urlsplit(database).port}/", f":{through.port}/")
        environment = {"LIGHTBUS_URL": self.url, "FAULTS_DATABASE": database, "FAULTS_DRIVER": driver}
        return self._start(name, ["-m", *command], environment)

    def relay(self, driver: str = "psycopg", *, through: Proxy | None = None) -> Process:
        return self._with_database("relay", ["tests.faults.relay", driver], through=through)

    def billing(self, driver: str = "psycopg", *, ready: bool = True, through: Proxy | None = None) -> Process:
        worker = self._with_database("worker", [*BILLING, "--concurrency", "16"], driver, through)
        if ready:
            self.until(lambda: "Ready:" in worker.log, "the worker is ready", worker)
        return worker

    def placer(self, *options: str, ahead: str = AHEAD, through: Proxy | None = None) -> Process:
        prefix = f"o{len(self.processes)}"
        return self._with_database(
            "placer", ["tests.faults.place", "--prefix", prefix, "--ahead", ahead, *options], through=through
        )

    @contextmanager
    def placing(self, id: str, do: str = "", delay: float | None = None) -> Iterator[Session]:
        """Place one order from this process. Its transaction commits at the end of the block."""
        self.ledger.write(TRIED, id)
        with Session(self.engine) as session, session.begin():
            session.add(Order(id=id, do=do))
            self.outbox.add(session, OrderPlaced(order_id=id, do=do), id=id, delay=delay)
            session.flush()
            yield session
        self.ledger.write(PLACED, id)

    # --- waiting

    def rounds(self, times: int, orders: int) -> Iterator[int]:
        """So many times, each after a further share of the orders was handled. At the end, so many are placed."""
        for number in range(times):
            self.until_done(orders * (number + 1) // (times + 1))
            yield number
        self.until_placed(orders)

    def until_done(self, orders: int) -> None:
        """Wait until so many orders have been handled. What was handled before a kill may be noted as skipped."""

        def done() -> int:
            return len(self.ledger.entries(HANDLED)) + len(self.ledger.entries(SKIPPED))

        self.until(lambda: done() >= orders, f"{orders} orders are handled")

    def until_placed(self, orders: int) -> None:
        self.until(lambda: len(self.ledger.entries(PLACED)) >= orders, f"{orders} orders are placed")

    def until_in_batch(self, limit: float = 1.0) -> bool:
        """Wait until a relay is in the middle of a batch: it has claimed rows, and the broker has not confirmed all."""
        return self._until_active("state = 'idle in transaction' AND query LIKE '%lightbus_outbox%SKIP LOCKED%'", limit)

    def until_blocked(self, limit: float = LIMIT) -> bool:
        """Wait until an inbox waits for the transaction of another worker."""
        return self._until_active("wait_event_type = 'Lock' AND query LIKE '%lightbus_inbox%'", limit)

    def _until_active(self, condition: str, limit: float) -> bool:
        deadline = time.monotonic() + limit
        query = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database()"
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            while time.monotonic() < deadline:
                if connection.execute(sa.text(f"{query} AND {condition}")).first():
                    return True
                time.sleep(0.003)
        return False

    def count(self, statement: sa.Select[int]) -> int:
        """A number from the database, which may be about to start again."""
        deadline = time.monotonic() + LIMIT
        while True:
            try:
                with self.engine.connect() as connection:
                    return connection.scalars(statement).one()
            except OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def settle(self, *, dead: int = 0, limit: float = LIMIT) -> None:
        """Stop placing, and wait until all orders have invoices, and the outboxes are empty."""
        del dead
        for process in self.processes:
            if process.name.startswith("placer") and process.alive:
                self.until_begun(process, "o")
                code = process.stop()
                assert code == 0, f"{process.name} ended with {code}:\n{process.log[-3000:]}"

        def missing() -> int:
            without = sa.select(sa.func.count()).where(~sa.exists().where(Invoice.order_id == Order.id))
            return self.count(without.select_from(Order)) + self.count(sa.select(sa.func.count()).select_from(outbox))

        # If an order is lost, stop waiting after 30 s without progress; the row reports the loss.
        deadline = time.monotonic() + limit
        last, progress = missing(), time.monotonic()
        while (left := missing()) and time.monotonic() < deadline and time.monotonic() - progress < 30:
            if left != last:
                last, progress = left, time.monotonic()
            time.sleep(0.1)

    def invoiced(self, id: str) -> bool:
        return self.count(sa.select(sa.func.count()).select_from(Invoice).where(Invoice.order_id == id)) > 0

    def look_for_deadlocks(self, after: str) -> None:
        """PostgreSQL looks for a deadlock after a second. With many of them, all handlers would mostly wait."""
        with self.engine.begin() as connection:
            connection.exec_driver_sql(f"ALTER DATABASE {self.engine.url.database} SET deadlock_timeout = '{after}'")

    # --- the result

    def recoveries(self) -> list[float]:
        """Seconds from the end of each fault to the first invoice of an order that was placed after it."""
        tried = {entry.id: entry.time for entry in self.ledger.entries(TRIED)}
        handled = self.ledger.entries(HANDLED)
        found = []
        for _, end in self.faults:
            first = next((entry.time - end for entry in handled if tried[entry.id] > end), None)
            if first is not None:
                found.append(first)
        return found

    def order_row(self, fault: str, times: int, *, note: str = "", recoveries: list[float] | None = None) -> OrderRow:
        """Stop all processes, read the tables and the queues, and compute the result."""
        for process in self.processes:
            if process.alive:
                code = process.stop()
                assert code == 0, f"{process.name} ended with {code}:\n{process.log[-3000:]}"
        with self.engine.connect() as connection:
            orders = {str(id) for id in connection.scalars(sa.select(Order.id))}
            invoices = Counter(str(id) for id in connection.scalars(sa.select(Invoice.order_id)))
            left = connection.execute(sa.select(outbox.c.event, outbox.c.state, outbox.c.error)).all()
            deadlocked = sa.select(sa.func.count()).where(Order.do == "deadlock")
            expected = 2 * connection.execute(deadlocked).scalar_one()
            total = connection.execute(sa.select(sa.func.sum(Total.count))).scalar_one()
        placed, tried = self.ledger.ids(PLACED), self.ledger.ids(TRIED)
        rolled_back = tried - orders
        assert placed <= orders, f"PostgreSQL has lost committed orders: {sorted(placed - orders)[:20]}"
        assert orders <= tried, "bug in the harness: an order that was never tried"
        assert not self.ledger.ids(ROLLED_BACK) & orders, "PostgreSQL has kept orders that were rolled back"
        assert not left, f"{len(left)} rows are left in the outbox: {left[:5]}"
        sent = self._tapped()
        row = OrderRow(
            fault=fault,
            times=times,
            orders=len(orders),
            rolled_back=len(rolled_back),
            invoices=sum(invoices.values()),
            sent_again=sent["order.placed"].total() - len(sent["order.placed"]),
            skipped=self._skipped(sent["order.placed"]),
            lost=(orders - invoices.keys()) | (set(filter(is_announced, invoices)) - sent["invoice.created"].keys()),
            twice={id for id, count in invoices.items() if count > 1},
            phantoms=rolled_back & (invoices.keys() | sent["order.placed"].keys() | sent["invoice.created"].keys()),
            dead=len(self.take_all("billing.dead")),
            recoveries=self.recoveries() if recoveries is None else recoveries,
            note=note,
        )
        if not row.lost and not row.twice:
            assert total == expected, f"handlers have counted {total}, and should have {expected}"
        return row

    def _skipped(self, sent: Counter[str]) -> Counter[str]:
        reasons: Counter[str] = Counter()
        # A worker that was stopped still has the first copies, which the broker has given to another one meanwhile.
        second = {entry.id for entry in self.ledger.entries(HANDLED) if entry.fields[1] == "1"}
        handled = {entry.id: entry.time for entry in self.ledger.entries(HANDLED)}
        for entry in self.ledger.entries(SKIPPED):
            _, redelivered, attempt = entry.fields
            if redelivered == "1" or entry.id in second:
                reasons["redelivered"] += 1
            elif int(attempt) > 1:
                reasons["retried"] += 1
            elif sent[entry.id] > 1:
                reasons["sent again"] += 1
            elif any(begin - 15 <= handled.get(entry.id, 0.0) <= end <= entry.time for begin, end in self.restarts):
                # A batch that was not confirmed before kill -9 is sent again, and may be lost in the tap only. Or
                # RabbitMQ has not written the delivery, so that the flag is missing.
                reasons["around a restart"] += 1
            else:
                reasons["unexplained"] += 1
        return reasons

    def _tapped(self) -> dict[str, Counter[str]]:
        """How often each order was sent, by event."""
        found: dict[str, Counter[str]] = {"order.placed": Counter(), "invoice.created": Counter()}
        connection = connect(self.url)
        channel = connection.channel()
        left = int(channel.queue_declare(TAP, passive=True).message_count)

        def on_delivery(delivery: Delivery) -> None:
            nonlocal left
            left -= 1
            found[delivery.routing_key][json.loads(delivery.body)["order_id"]] += 1

        channel.consume(TAP, on_delivery, on_cancel=lambda _: None, no_ack=True)
        deadline = time.monotonic() + LIMIT
        while left > 0:
            assert time.monotonic() < deadline, f"{left} events are left in the tap"
            connection.drain_events(timeout=LIMIT)
        connection.close()
        return found

    def until_held(self, id: str) -> int:
        """Wait until a handler holds this order in its transaction. Returns the process id of its worker."""
        held = self.ledger.entries
        self.until(lambda: any(entry.id == id for entry in held(HELD)), f"a handler holds {id}")
        return next(int(entry.fields[0]) for entry in held(HELD) if entry.id == id)
