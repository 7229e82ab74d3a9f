"""`lightbus relay` as a process: it sends, stops, and is killed; the broker or the database is down."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lightbus import Lightbus
from lightbus.worker.health import SLOW_LOOP, STUCK_LOOP, report
from lightbus.worker.services import ServiceRunner
from tests.integration.test_cli_outbox import ORDERS, Database
from tests.integration.test_health import probe
from tests.patience import silent_server, wait_until
from tests.postgres import Postgres
from tests.processes import Program, lightbus, working
from tests.rabbitmq import Node, free_port

FILES = {
    "orders.py": ORDERS,
    "logged.py": """
import logging

logging.basicConfig(format="own %(name)s %(message)s", level="INFO")

from orders import app as app
""",
    "billing.py": """
from lightbus import Lightbus, Message

app = Lightbus("billing")

@app.on("order.placed")
async def bill(order: dict, message: Message):
    print("handled", order["number"], message.id, flush=True)
""",
    "shop.py": ORDERS.replace('app = Lightbus("orders")', 'app = Lightbus("orders", lifespan=lifespan)').replace(
        "app =",
        """import contextlib
from sqlalchemy.orm import sessionmaker
from lightbus.outbox import Inbox

@contextlib.asynccontextmanager
async def lifespan(app):
    print("lifespan begins", flush=True)
    yield
    print("lifespan ends", flush=True)

app =""",
        1,
    )
    + """
inbox = Inbox(app, sessionmaker(outbox.relay.store.engine))

@app.on("order.placed")
def note(order: dict):
    print("handled", order["number"], flush=True)
""",
    "failing.py": ORDERS.replace('app = Lightbus("orders")', 'app = Lightbus("orders", lifespan=lifespan)').replace(
        "app =",
        """import contextlib

@contextlib.asynccontextmanager
async def lifespan(app):
    raise RuntimeError("no settings")
    yield

app =""",
        1,
    ),
}


@pytest.fixture
def database(folder: Path) -> Database:
    return Database(f"sqlite:///{folder}/orders.sqlite")


@contextlib.contextmanager
def relaying(
    *options: str, folder: Path, url: str, database: str = "sqlite:///orders.sqlite", target: str = "orders:app"
) -> Iterator[Program]:
    """A relay that has started."""
    extra = {"DATABASE": database}
    with Program("relay", target, *options, folder=folder, url=url, extra=extra) as relay:
        relay.wait_for("Started: sends events as they are committed")
        yield relay


def handled(worker: Program) -> dict[int, set[str]]:
    """The ids with which each order arrived."""
    found: dict[int, set[str]] = {}
    for number, id_ in re.findall(r"^handled (\d+) (\S+)$", worker.output, re.MULTILINE):
        found.setdefault(int(number), set()).add(id_)
    return found


def with_ids(numbers: range, ids: list[str]) -> dict[int, set[str]]:
    return {number: {id_} for number, id_ in zip(numbers, ids, strict=True)}


# --- sending and stopping ---------------------------------------------------------------------


def test_a_relay_sends_what_is_there_and_what_comes(folder: Path, url: str, database: Database) -> None:
    ids = database.add(0, 1)
    with working("billing:app", folder=folder, url=url) as worker, relaying(folder=folder, url=url) as relay:
        wait_until(lambda: len(handled(worker)) == 2, "the first events")
        ids += database.add(2)
        wait_until(lambda: len(handled(worker)) == 3, "the third event")
        assert handled(worker) == with_ids(range(3), ids)
        wait_until(lambda: database.rows() == {}, "the rows are deleted")
        assert relay.end(signal.SIGTERM) == 0
    assert "WARNING" not in relay.output
    assert "ERROR" not in relay.output


@pytest.mark.postgres
def test_a_relay_on_postgresql_sends_what_comes(folder: Path, sqlite_url: str, postgres_url: str) -> None:
    database = Database(postgres_url)
    with (
        working("billing:app", folder=folder, url=sqlite_url) as worker,
        relaying(folder=folder, url=sqlite_url, database=postgres_url) as relay,
    ):
        ids = database.add(0, 1)
        wait_until(lambda: handled(worker) == with_ids(range(2), ids), "both events")
        assert relay.end(signal.SIGINT) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_relay_that_is_stopped_sends_what_is_left(
    folder: Path, sqlite_url: str, database: Database, number: signal.Signals
) -> None:
    with working("billing:app", folder=folder, url=sqlite_url) as worker:
        with relaying(folder=folder, url=sqlite_url) as relay:
            database.add(-1)
            wait_until(lambda: "handled -1" in worker.output, "the relay sends")
            ids = database.add(*range(1200))  # more than two batches
            assert relay.end(number) == 0
            assert database.rows() == {}
        wait_until(lambda: handled(worker) == with_ids(range(1200), ids), "all events")
    assert f"Stopping ({number.name}): sending what is left, up to 30 s." in relay.output


@pytest.mark.postgres
def test_a_relay_that_starts_after_a_kill_sends_the_rest_with_the_same_ids(
    folder: Path, sqlite_url: str, postgres_url: str
) -> None:
    numbers = range(3000)
    ids = (database := Database(postgres_url)).add(*numbers)
    with working("billing:app", folder=folder, url=sqlite_url) as worker:
        for _ in range(2):
            with relaying(folder=folder, url=sqlite_url, database=postgres_url) as relay:
                worker.wait_for("^handled ")
                assert relay.end(signal.SIGKILL) == -signal.SIGKILL
                database.add(0)  # the worker's next line
        with relaying(folder=folder, url=sqlite_url, database=postgres_url) as relay:
            wait_until(lambda: database.rows() == {}, "the table is empty")
            assert relay.end(signal.SIGTERM) == 0
        wait_until(lambda: len(handled(worker)) == len(numbers), "all events")
        found = handled(worker)
        assert {number: ids & found[number] for number, ids in with_ids(numbers, ids).items()} == with_ids(numbers, ids)
        assert all(len(found[number]) == 1 for number in numbers[1:])


def test_two_relays_share_the_work(folder: Path, sqlite_url: str, database: Database) -> None:
    ids = database.add(*range(2000))
    with (
        working("billing:app", folder=folder, url=sqlite_url) as worker,
        relaying(folder=folder, url=sqlite_url) as first,
        relaying(folder=folder, url=sqlite_url) as second,
    ):
        wait_until(lambda: handled(worker) == with_ids(range(2000), ids), "all events")
        wait_until(lambda: database.rows() == {}, "the rows are deleted")
        assert (first.end(signal.SIGTERM), second.end(signal.SIGTERM)) == (0, 0)
        assert len(re.findall("^handled ", worker.output, re.MULTILINE)) == 2000


# --- what a relay is --------------------------------------------------------------------------


def test_a_relay_runs_within_the_lifespan_sweeps_the_inbox_and_consumes_nothing(
    folder: Path, sqlite_url: str, database: Database
) -> None:
    with working("shop:app", folder=folder, url=sqlite_url) as worker:
        assert worker.end(signal.SIGTERM) == 0
    database.add(1)
    with relaying("--health-port", "0", target="shop:outbox", folder=folder, url=sqlite_url) as relay:
        address = re.search(r"Health: (\S+)/livez", relay.output)
        assert address is not None
        wait_until(lambda: database.rows() == {}, "the row is sent")
        wait_until(lambda: probe(f"{address[1]}/readyz")[1]["outbox"]["sent"] == 1, "it is reported")
        status, report = probe(f"{address[1]}/readyz")
        assert (status, report["ready"], report["problems"], report["app"]) == (200, True, [], "orders")
        assert report["inbox"] == {"error": None, "deleted": 0}
        assert relay.end(signal.SIGTERM) == 0
    assert re.findall("lifespan .*|handled .*", relay.output) == ["lifespan begins", "lifespan ends"]
    with working("shop:app", folder=folder, url=sqlite_url) as worker:
        worker.wait_for("handled 1")


def test_a_relay_whose_event_loop_is_blocked_is_not_ready_and_later_not_live() -> None:
    runner = ServiceRunner(Lightbus("orders", url="memory://"))
    assert report(runner, 1.0).problems == ["it has not started yet"]
    runner.started, runner.beat = True, 0.0
    assert report(runner, SLOW_LOOP - 1).ready
    found = report(runner, SLOW_LOOP + 2)
    assert (found.ready, found.live) == (False, True)
    assert found.problems == ["the event loop has not run for 12 s: a call blocks it"]
    assert not report(runner, STUCK_LOOP + 1).live


@pytest.mark.usefixtures("database")
def test_the_first_line_names_the_app_the_database_and_the_broker(folder: Path) -> None:
    url = f"amqp://ann:secret@127.0.0.1:{free_port()}/"
    with relaying(folder=folder, url=url) as relay:
        assert relay.end(signal.SIGTERM) == 0
    assert re.search(
        r"INFO     Lightbus [\w.]+: relay of app 'orders' \(orders:app\), from 'sqlite:///orders\.sqlite' to "
        r"amqp://ann:\*+@127\.0\.0\.1:\d+/$",
        relay.lines[0],
    )
    assert "secret" not in relay.output
    with relaying("--json-logs", folder=folder, url=url) as relay:
        assert relay.end(signal.SIGTERM) == 0
    logged = [json.loads(line) for line in relay.lines]
    assert re.match(r"Lightbus \S+ relay of app 'orders' \(orders:app\), from 'sqlite:", logged[0]["message"])
    assert [one["level"] for one in logged] == ["info"] * 3
    assert (logged[0]["app"], logged[0]["broker"]) == ("orders", url.replace("secret", "**"))


@pytest.mark.usefixtures("database")
def test_a_relay_leaves_logging_to_an_app_that_configures_it(folder: Path, sqlite_url: str) -> None:
    with relaying("--no-configure-logging", folder=folder, url=sqlite_url, target="logged:app") as relay:
        assert relay.end(signal.SIGTERM) == 0
    assert re.match(r"own lightbus Lightbus \S+ relay of app 'orders' \(logged:app\), from ", relay.lines[0])
    assert all(line.startswith("own ") for line in relay.lines)


def test_a_broker_in_memory_is_refused(folder: Path, database: Database) -> None:
    database.add(1)
    done = lightbus("relay", "orders:app", folder=folder, url="memory://")
    assert (done.returncode, done.stderr) == (
        2,
        "Error: the broker of app 'orders' is memory://, which only this process can use: no worker would receive what "
        "the relay sends. Set LIGHTBUS_URL, or the app's url=, to the broker of the workers.\n",
    )
    assert database.rows() == {1: 0}


def test_a_lifespan_that_fails_ends_the_relay(folder: Path, sqlite_url: str) -> None:
    done = lightbus("relay", "failing:app", folder=folder, url=sqlite_url)
    assert done.returncode == 1
    assert "ERROR    The relay failed at its start." in done.stderr
    assert "RuntimeError: no settings" in done.stderr


def test_a_health_port_that_is_in_use_is_an_error(folder: Path, sqlite_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = lightbus("relay", "orders:app", "--health-port", str(port), folder=folder, url=sqlite_url)
    assert done.returncode == 1
    assert f"--health-port: 127.0.0.1:{port} is not available: Address already in use." in done.stderr


# --- broker or database down ------------------------------------------------------------------


@pytest.mark.rabbitmq
def test_a_relay_waits_for_a_broker_that_is_down_at_its_start(
    folder: Path, database: Database, rabbitmq_node: Callable[..., Node]
) -> None:
    node = rabbitmq_node()
    with working("billing:app", folder=folder, url=node.url) as worker:  # declares the queue
        assert worker.end(signal.SIGTERM) == 0
    node.stop()
    ids = database.add(0, 1)
    with relaying("--health-port", "0", folder=folder, url=node.url) as relay:
        address = re.search(r"Health: (\S+)/livez", relay.output)
        assert address is not None
        relay.wait_for(
            "WARNING  The outbox in 'sqlite:///orders.sqlite' is not sent: .*Connection refused.*Its events wait"
        )
        status, report = probe(f"{address[1]}/readyz")
        assert (status, report["ready"], report["live"]) == (503, False, True)
        assert report["problems"][0].startswith("outbox: ")
        assert probe(f"{address[1]}/livez")[0] == 200
        assert len(database.rows()) == 2
        node.start()
        relay.wait_for("INFO     The outbox in 'sqlite:///orders.sqlite' is sent again")
        wait_until(lambda: database.rows() == {}, "the rows are sent")
        assert probe(f"{address[1]}/readyz")[0] == 200
        assert relay.end(signal.SIGTERM) == 0
    with working("billing:app", folder=folder, url=node.url) as worker:
        wait_until(lambda: handled(worker) == with_ids(range(2), ids), "both events")


@pytest.mark.postgres
def test_a_relay_waits_for_a_database_that_is_down_at_its_start(folder: Path, sqlite_url: str) -> None:
    with Postgres() as cluster, working("billing:app", folder=folder, url=sqlite_url) as worker:
        database = Database(cluster.url())
        ids = database.add(0, 1)
        database.engine.dispose()
        cluster.stop()
        with relaying(folder=folder, url=sqlite_url, database=cluster.url()) as relay:
            relay.wait_for("WARNING  The outbox in .* is not sent: OperationalError: .*Connection refused")
            cluster.start()
            relay.wait_for("INFO     The outbox in .* is sent again")
            wait_until(lambda: handled(worker) == with_ids(range(2), ids), "both events")
            assert relay.end(signal.SIGTERM) == 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_a_relay_at_once(
    folder: Path, database: Database, number: signal.Signals, status: int
) -> None:
    database.add(1)
    with silent_server() as silent:
        url = f"amqp://127.0.0.1:{silent.getsockname()[1]}/"
        with relaying(folder=folder, url=url) as relay:
            connection, _ = silent.accept()
            relay.signal(number)
            relay.wait_for(f"Stopping \\({number.name}\\): sending what is left, up to 30 s. Press Ctrl-C again")

            def is_over() -> bool:
                relay.signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    relay.process.wait(0.5)
                return relay.process.poll() is not None

            wait_until(is_over, "the relay ends")
            assert relay.end() == status
        connection.close()
    assert relay.lines[-1] == "Stopped at once. What was not sent stays in the outbox."
    assert database.rows() == {1: 0}


def test_a_database_that_hangs_does_not_keep_a_relay_from_stopping(folder: Path) -> None:
    with silent_server() as silent:
        url = f"postgresql+psycopg://127.0.0.1:{silent.getsockname()[1]}/orders"
        with relaying("--grace", "1", folder=folder, url=f"sqlite:///{folder}/bus.db", database=url) as relay:
            connection, _ = silent.accept()
            assert relay.end(signal.SIGTERM) == 1
        connection.close()
    assert "ERROR    Not finished within 1 s: outbox (1). What was not sent stays in the outbox." in relay.output
