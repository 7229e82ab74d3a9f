"""Orders pass through three services on PostgreSQL and RabbitMQ while their processes are killed (kill -9).

Each service comes from the template (`lightbus new`), and has then grown: `shop` takes orders with FastAPI, and has an
outbox with SQLAlchemy; `billing` writes invoices with Django, and has an inbox and an outbox; `ledger` has an inbox
with SQLAlchemy. tests/integrations/three_apps has what each has in place of the template's files.
"""

from __future__ import annotations

import itertools
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import unquote

import psycopg
import pytest

from lightbus.wire import topology
from tests.integrations.example import NO_BROKER, PYTHON, SERVES, UVICORN, put
from tests.patience import LIMIT, wait_until
from tests.postgres import Postgres
from tests.processes import LIGHTBUS, ROOT, Program, environment
from tests.rabbitmq import Node

pytestmark = [pytest.mark.rabbitmq, pytest.mark.postgres]

GROWN = ROOT / "tests" / "integrations" / "three_apps"
WAVES, ORDERS = 6, 34
KILLS = {
    "relay, after the confirm, before the delete",
    "billing, before the commit",
    "billing, after the commit, before the ack",
    "ledger, before the commit",
    "ledger, after the commit, before the ack",
}
"""Each happens once, in addition to those of the test."""


class Database:
    """A database of the cluster, and one connection to it."""

    def __init__(self, cluster: Postgres) -> None:
        self.cluster = cluster
        self.name = cluster.create_database()
        self._connection = psycopg.connect(cluster.url(self.name, driver=None), autocommit=True)

    def environment(self) -> dict[str, str]:
        return {
            "DATABASE_URL": self.cluster.url(self.name, driver="asyncpg"),
            "DATABASE_PORT": str(self.cluster.port),
            "DATABASE_NAME": self.name,
        }

    def ids(self, query: str) -> list[str]:
        return [str(row[0]) for row in self._connection.execute(query.encode())]

    def count(self, table: str) -> int:
        return int(self.ids(f"SELECT count(*) FROM {table}")[0])

    def drop(self) -> None:
        self._connection.close()
        self.cluster.drop_database(self.name)


class Service:
    """A service from the template, in its folder, with its database."""

    def __init__(self, folder: Path, publishes: str, consumes: str, database: Database) -> None:
        self.name = folder.name
        self.folder = folder
        self.database = database
        self.crashes = folder.parent / "crashes"
        self.crashes.mkdir(exist_ok=True)
        self.run(
            *LIGHTBUS, "new", self.name, "--event", publishes, "--consumes", consumes, "--no-input", at=folder.parent
        )
        shutil.copytree(GROWN / self.name, folder, dirs_exist_ok=True)
        shutil.copy(GROWN / "crash.py", folder)

    def environment(self) -> dict[str, str]:
        return {**self.database.environment(), "CRASHES": str(self.crashes)}

    def run(self, *command: str, at: Path | None = None) -> None:
        done = subprocess.run(
            command,
            cwd=at or self.folder,
            env=environment({"LIGHTBUS_URL": NO_BROKER, **self.environment()}),
            capture_output=True,
            text=True,
            timeout=2 * LIMIT,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


class Process:
    """A process of a service. If it has ended, `keep` starts it again."""

    def __init__(self, service: Service, program: Sequence[str], url: str, stack: ExitStack) -> None:
        self._start: Callable[[], Program] = lambda: stack.enter_context(
            Program(folder=service.folder, url=url, program=program, extra=service.environment())
        )
        self.runs = [self._start()]

    @property
    def current(self) -> Program:
        return self.runs[-1]

    @property
    def output(self) -> str:
        return "\n".join(one.output for one in self.runs)

    def wait_until_ready(self) -> None:
        def ready() -> object:
            self.keep()
            return re.search("Ready|Started", self.current.output)

        wait_until(ready, "it is ready")

    def kill(self) -> None:
        self.current.process.kill()
        self.current.process.wait(LIMIT)

    def keep(self) -> None:
        status = self.current.process.poll()
        if status is not None:
            assert status == -signal.SIGKILL, self.current.output
            self.runs.append(self._start())


def messages(node: Node, url: str) -> int:
    """How many events the queues of a virtual host have, unacknowledged ones included. Contracts stay in the stream."""
    vhost = unquote(url.rpartition("/")[2])
    listed = node.ctl("list_queues", "-p", vhost, "name", "messages", "--no-table-headers")
    found = dict(line.split("\t") for line in listed.splitlines())
    return sum(int(count) for name, count in found.items() if name != topology.CATALOG)


@pytest.fixture
def database(postgres: Postgres) -> Iterator[Callable[[], Database]]:
    made: list[Database] = []

    def make() -> Database:
        made.append(Database(postgres))
        return made[-1]

    yield make
    for one in made:
        one.drop()


def test_each_order_has_each_effect_once_although_processes_are_killed(
    tmp_path: Path, database: Callable[[], Database], rabbitmq: Node, rabbitmq_url: str
) -> None:
    with ThreadPoolExecutor() as at_once:
        shop, billing, ledger = at_once.map(
            lambda one: Service(tmp_path / one[0], one[1], one[2], database()),
            [
                ("shop", "order.placed", "cart.submitted"),
                ("billing", "invoice.written", "order.placed"),
                ("ledger", "entry.made", "invoice.written"),
            ],
        )
    for service in (shop, ledger):
        create = f"import asyncio, {service.name}.bus as bus; asyncio.run(bus.create_tables())"
        service.run(sys.executable, "-c", create)
    billing.run(*PYTHON, "manage.py", "migrate")

    with ExitStack() as stack:

        def start(service: Service, *program: str) -> Process:
            return Process(service, program, rabbitmq_url, stack)

        web = start(shop, *UVICORN, "shop.web:api")
        billers = [start(billing, *PYTHON, "manage.py", "lightbus_worker") for _ in range(2)]
        enterers = [start(ledger, *LIGHTBUS, "worker", "ledger.bus:app") for _ in range(2)]
        for one in (*billers, *enterers):
            one.wait_until_ready()  # their queues exist from now on
        relay = start(shop, *LIGHTBUS, "relay", "shop.bus:app")
        workers = [relay, *billers, *enterers]
        root = web.current.wait_for(SERVES)[1]

        victims = itertools.cycle([relay, billers[0], enterers[0], relay, billers[1], enterers[1]])
        with ThreadPoolExecutor(4) as clients:
            for wave, victim in zip(range(WAVES), victims, strict=False):
                victim.wait_until_ready()
                orders = [f"order-{wave * ORDERS + n:03}" for n in range(ORDERS)]
                answers = list(clients.map(lambda order: put(f"{root}/orders/{order}", {"cents": 950}), orders))
                assert {one.status for one in answers} == {201}
                assert put(f"{root}/orders/rolled-back-{wave}", {"cents": 0}).status == 409
                victim.kill()
                for one in workers:
                    one.keep()

        def wait_while_kept(condition: Callable[[], bool], what: str) -> None:
            def look() -> bool:
                for one in workers:
                    one.keep()
                return condition()

            wait_until(look, what)

        def in_all(database: Database, select: str) -> bool:
            return len(set(database.ids(select))) == WAVES * ORDERS

        invoices, entries = 'SELECT "order" FROM invoices_invoice', 'SELECT "order" FROM entry'
        wait_while_kept(lambda: shop.database.count("lightbus_outbox") == 0, "each order is sent")
        wait_while_kept(lambda: in_all(billing.database, invoices), "each order has an invoice")
        wait_while_kept(lambda: billing.database.count("lightbus_outbox") == 0, "each invoice is sent")
        wait_while_kept(lambda: in_all(ledger.database, entries), "each order has an entry")
        for one in workers:
            one.wait_until_ready()
        wait_until(lambda: messages(rabbitmq, rabbitmq_url) == 0, "nothing waits, is in hand or is a dead letter")
        for one in workers:
            assert one.current.end(signal.SIGTERM) == 0, one.output

    expected = Counter(f"order-{n:03}" for n in range(WAVES * ORDERS))
    assert Counter(shop.database.ids("SELECT id FROM orders")) == expected
    assert Counter(billing.database.ids('SELECT "order" FROM invoices_invoice')) == expected
    assert Counter(ledger.database.ids('SELECT "order" FROM entry')) == expected
    assert billing.database.count("lightbus_inbox") == ledger.database.count("lightbus_inbox") == WAVES * ORDERS
    assert {file.name for file in shop.crashes.iterdir()} == KILLS
    for process in (billers, enterers):  # duplicates have come, and were skipped
        assert any("skipped " in one.output for one in process)
