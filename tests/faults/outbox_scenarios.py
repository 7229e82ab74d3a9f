"""The scenarios of outbox and inbox: each committed order has one invoice, and each rolled-back order none."""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections.abc import Iterator

import attrs
import sqlalchemy as sa

from lightbus.outbox.tables import outbox
from lightbus.wire import topology
from tests.faults.ledger import HANDLED
from tests.faults.order_scene import OrderRow, OrderScene
from tests.faults.proxy import Proxy
from tests.faults.relay import SENDS
from tests.faults.stage import Stage, connect

BEATS = "?heartbeat=2"
COMMIT = b"COMMIT"


def relay_killed(stage: Stage, *, how: str, times: int, orders: int) -> OrderRow:
    """Every second kill waits until the relay is in the middle of a batch. `how`: the driver of the relay."""
    with OrderScene(stage) as scene:
        scene.billing()
        relay = scene.relay(how)
        scene.placer()
        in_batch = 0
        for number in scene.rounds(times, orders):
            if number % 2:
                in_batch += scene.until_in_batch()
            with scene.fault():
                relay.kill()
                relay = scene.relay(how)
        scene.settle()
        note = f"{in_batch} of the kills in the middle of a batch"
        return scene.order_row(f"relay killed (kill -9), {how}", times, note=note)


def inbox_worker_killed(stage: Stage, *, how: str, times: int, orders: int) -> OrderRow:
    """The worker has a relay, too, for the events that its handlers add. `how`: the driver of its handlers."""
    with OrderScene(stage) as scene:
        worker = scene.billing(how)
        scene.relay()
        scene.placer()
        for _ in scene.rounds(times, orders):
            with scene.fault():
                worker.kill()
                worker = scene.billing(how, ready=False)
        scene.settle()
        kind = "async" if how == "asyncpg" else "sync"
        row = scene.order_row(f"worker killed (kill -9), {kind} handlers with an inbox", times)
        assert not row.sent_again, f"no order must be sent again: {row.sent_again}"
        return row


def broker_killed_with_outbox(stage: Stage, *, times: int, orders: int) -> OrderRow:
    with OrderScene(stage) as scene:
        scene.billing()
        scene.relay()
        scene.placer()
        for _ in scene.rounds(times, orders):
            with scene.fault():
                stage.node.kill()
                stage.node.start()
        scene.restarts = scene.faults
        scene.settle()
        return scene.order_row("broker killed (kill -9) and restarted", times)


def database_killed(stage: Stage, *, how: str, times: int, orders: int) -> OrderRow:
    with OrderScene(stage) as scene:
        scene.billing(how)
        scene.relay(how)
        placer = scene.placer()
        for _ in scene.rounds(times, orders):
            with scene.fault():
                stage.postgres.kill()
                stage.postgres.start()
        scene.settle()
        note = f"{placer.log.count('unknown outcome')} transactions of the shop with an error"
        return scene.order_row(f"PostgreSQL killed (kill -9) and restarted, {how}", times, note=note)


def commit_cut(stage: Stage, *, how: str, times: int, orders: int) -> OrderRow:
    """The connection of the shop, the relay or the worker is cut at its COMMIT: before the database has it, or after
    that, so that the client does not know the outcome."""
    port = stage.postgres.port
    with Proxy(port) as first, Proxy(port) as second, Proxy(port) as third, OrderScene(stage) as scene:
        scene.billing(how, through=first)
        scene.relay(how, through=second)
        scene.placer(through=third)
        for number in scene.rounds(times, orders):
            proxy = (first, second, third)[number % 3]
            with scene.fault():
                proxy.cut_at(COMMIT, forward=number % 2 == 0)
                scene.until(lambda: proxy.trap is None, "a client commits")  # noqa: B023
        scene.settle()
        return scene.order_row(f"database connection cut at COMMIT (shop, relay, worker), {how}", times)


def connections_ended(stage: Stage, *, times: int, orders: int) -> OrderRow:
    """The database ends all connections, wherever they are (pg_terminate_backend)."""
    end = (
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    with OrderScene(stage) as scene:
        scene.billing("asyncpg")
        scene.relay()
        scene.placer()
        for _ in scene.rounds(times, orders):
            with scene.fault(), scene.engine.connect() as connection:
                connection.exec_driver_sql(end)
        scene.settle()
        return scene.order_row("all database connections ended (pg_terminate_backend)", times)


def relays_share(stage: Stage, *, relays: int, orders: int) -> OrderRow:
    """Several relays on one table, with both drivers: no event is sent twice."""
    with OrderScene(stage) as scene:
        scene.billing()
        running = [scene.relay(("psycopg", "asyncpg")[number % 2]) for number in range(relays)]
        for _ in range(2):
            scene.placer(ahead="1000")
        scene.until_placed(orders)
        scene.until(lambda: all(SENDS in one.log for one in running), "each relay has sent something")
        scene.settle()
        row = scene.order_row(f"{relays} relays on one table", relays, recoveries=[])
        counts = [int(one.log.rpartition("sent ")[2]) for one in running]
        assert not row.sent_again, f"{row.sent_again} orders were sent twice"
        return attrs.evolve(row, note=f"they have sent {', '.join(f'{count:,}' for count in counts)} events")


def late_commit(stage: Stage, *, times: int, orders: int) -> OrderRow:
    """A transaction commits after rows with higher ids were sent. One more is open from the beginning to the end."""
    with OrderScene(stage) as scene:
        scene.billing()
        scene.relay()
        scene.placer()
        commits: dict[str, float] = {}
        ends = contextlib.ExitStack()
        with ends:
            ends.enter_context(scene.placing("late-always"))
            for number in range(times):
                with scene.placing(f"late-{number}"):
                    scene.until_done(orders * (number + 1) // times)
                commits[f"late-{number}"] = time.monotonic()
            scene.until_placed(orders)
        commits["late-always"] = time.monotonic()
        scene.settle()
        handled = {entry.id: entry.time for entry in scene.ledger.entries(HANDLED)}
        delays = [handled[id] - when for id, when in commits.items() if id in handled]
        note = "recovery: from the late commit to the invoice"
        return scene.order_row("transaction that commits late", len(commits), note=note, recoveries=delays)


def placer_killed(stage: Stage, *, times: int, orders: int) -> OrderRow:
    """Half of the transactions are rolled back, as are savepoints, and the shop is killed within transactions."""
    chance = random.Random(14)
    options = ("--rollbacks", "0.5", "--savepoints", "60", "20", "20")
    with OrderScene(stage) as scene:
        scene.billing()
        scene.relay()
        placer = scene.placer(*options)
        for _ in scene.rounds(times, orders):
            time.sleep(chance.uniform(0, 0.1))
            with scene.fault():
                placer.kill()
                placer = scene.placer(*options)
        scene.settle()
        return scene.order_row("shop killed (kill -9), half of the transactions rolled back", times)


def handlers_deadlock(stage: Stage, *, how: str, orders: int) -> OrderRow:
    with OrderScene(stage) as scene:
        scene.look_for_deadlocks("20ms")
        worker = scene.billing(how)
        scene.relay()
        scene.placer("--do", "deadlock", "--share", "0.1")

        def deadlocks() -> int:
            return worker.log.lower().count("deadlock detected")

        for _ in scene.rounds(1, orders):
            scene.until(deadlocks, "handlers block each other", worker)
        scene.settle()
        return scene.order_row(f"deadlocks of handlers, {how}", deadlocks(), recoveries=[])


def claim_of_a_dead_worker(stage: Stage, *, times: int, orders: int) -> OrderRow:
    """A worker is stopped (SIGSTOP) in its transaction. The broker gives its events to another one, whose inbox waits
    for that transaction. Then the first one is killed; every third time it continues instead."""
    with OrderScene(stage, BEATS) as scene:
        workers = [scene.billing(), scene.billing()]
        scene.relay()
        scene.placer()
        waits: list[float] = []
        for number in scene.rounds(times, orders):
            id = f"held-{number}"
            begin = time.monotonic()
            with scene.placing(id, "hold:stop"):
                pass
            pid = scene.until_held(id)
            at = next(at for at, worker in enumerate(workers) if worker.popen.pid == pid)
            assert scene.until_blocked(), "no inbox waits for the stopped worker"
            end = time.monotonic()
            if number % 3 == 2:
                workers[at].signal(signal.SIGCONT)
            else:
                workers[at].kill()
            scene.until(lambda: scene.invoiced(id), f"{id} has an invoice")  # noqa: B023
            waits.append(time.monotonic() - end)
            scene.faults.append((begin, end))
            if not workers[at].alive:
                workers[at] = scene.billing()
        scene.settle()
        note = "recovery: from the kill to the invoice of another worker"
        return scene.order_row("worker stopped in its transaction, then killed", times, note=note, recoveries=waits)


JUMPS = (3600, -86_400, -3600, 400_000, 86_400, -400_000, 0)
"""Seconds. An inbox keeps ids for 7 days by the same clock, so none is that far."""


def clock_jumps(stage: Stage, *, times: int, orders: int) -> OrderRow:
    """The clocks of shop, relay and worker jump: while events wait for a retry, or while a delayed one is in an open
    transaction.

    Covered: `time.time` of these processes. Not covered: the clocks of the database and the broker.
    """
    with OrderScene(stage) as scene:
        scene.billing()
        scene.relay()
        scene.placer()
        waiting = 0
        again = sa.select(sa.func.count()).select_from(outbox).where(outbox.c.due > 0)
        for number in scene.rounds(times, orders):
            offset, delayed = str(JUMPS[number % len(JUMPS)]), f"delayed-{number}"
            with scene.fault():
                if number % 2:
                    with scene.placing(delayed, delay=1):
                        (scene.folder / "clock").write_text(offset)
                else:
                    with _broker_nacks(scene):
                        scene.until(lambda: scene.count(again), "events wait for a retry")
                        waiting += scene.count(again)
                        (scene.folder / "clock").write_text(offset)
            if number % 2:  # before the broker nacks again: RabbitMQ repeats a delayed event only after 3 minutes
                scene.until(lambda: scene.invoiced(delayed), "the delayed order has an invoice")  # noqa: B023
        (scene.folder / "clock").unlink()
        scene.settle()
        note = f"by up to {max(JUMPS):,} s, forward and back; {waiting:,} events waited for a retry at a jump"
        return scene.order_row("clock jumps (shop, relay, worker)", times + 1, note=note)


@contextlib.contextmanager
def _broker_nacks(scene: OrderScene) -> Iterator[None]:
    """The broker nacks each order, because one more queue is full."""
    connection = connect(scene.url)
    channel = connection.channel()
    full = {"x-max-length": 1, "x-overflow": "reject-publish"}
    channel.queue_declare("full", durable=True, auto_delete=False, arguments=full)
    channel.queue_bind("full", topology.BUS, "order.placed")
    try:
        yield
    finally:
        channel.queue_delete("full")
        connection.close()
