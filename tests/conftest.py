"""Fixtures that give each test its own broker (an embedded one, a virtual host of a private RabbitMQ node, or an
emptied private Artemis) and its own database of a private PostgreSQL cluster.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests import artemis as brokers
from tests import mariadb as mariadbs
from tests import postgres as clusters
from tests import prometheus as monitors
from tests import rabbitmq as nodes
from tests.integrations.example import MISSING
from tests.patience import DELAY

VHOSTS_AT_ONCE = 40

_vhost_numbers = itertools.count(1)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "rabbitmq: needs an installed RabbitMQ server (it does not need to run)")
    config.addinivalue_line("markers", "artemis: needs an installed ActiveMQ Artemis (it does not need to run)")
    config.addinivalue_line("markers", "impossible_on_artemis(reason): see the table in docs/howto/activemq.md")
    config.addinivalue_line("markers", "postgres: needs an installed PostgreSQL server (it does not need to run)")
    config.addinivalue_line("markers", "mariadb: needs an installed MariaDB server (it does not need to run)")
    config.addinivalue_line("markers", "prometheus: needs an installed Prometheus server (it does not need to run)")
    # xdist's processes ignore Ctrl-C, and child processes inherit that, including the commands that tests interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# A pause of the machine is not a failure.
settings.register_profile("patient", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@atexit.register  # after pytest has ended its capturing
def _hide_late_frees() -> None:
    """What qpid-proton's blocking client leaves behind is freed after Python's end, with a line on stderr for each."""
    if "cproton" in sys.modules:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


SLOW_FILES = (
    "integration/test_install.py",
    "faults/test_faults_short.py",
    "faults/test_outbox_short.py",
    "integration/test_new.py",
    "integration/test_makefile.py",
    "integration/test_permissions.py",
    "integrations/test_three_apps.py",
    "integration/test_worker.py",
    "integration/test_relay.py",
    "integration/test_tutorial.py",
    "integration/test_outbox.py",
    "integration/test_inbox.py",
    "integration/test_dead.py",
    "integration/test_refused_publisher.py",
    "unit/test_site.py",
)
"""Each takes a minute or more of one process, so none may be the last to start."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    root = Path(__file__).parent
    order = {root / name: number for number, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    lines = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])]
    servers = (
        ("RABBITMQ", nodes.INSTALL),
        ("ACTIVEMQ ARTEMIS", brokers.INSTALL),
        ("POSTGRESQL", clusters.INSTALL),
        ("MARIADB", mariadbs.INSTALL),
        ("PROMETHEUS", monitors.INSTALL),
    )
    for server, install in servers:
        skipped = sum(install in line for line in lines)
        if skipped:
            terminalreporter.section(f"{server} IS MISSING", red=True, bold=True)
            terminalreporter.line(f"{skipped} TESTS WERE SKIPPED WITHOUT {server}. {install}", red=True)
    missing = sorted({line[line.rfind("Skipped: ") + 9 :].rstrip("')") for line in lines if MISSING in line})
    if missing:
        terminalreporter.section("PROGRAMS ARE MISSING", red=True, bold=True)
        for line in missing:
            terminalreporter.line(line, red=True)


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """Restore log levels: commands that run in the test process change them, which would affect later tests."""
    root = logging.getLogger()
    loggers = [root, *(each for each in root.manager.loggerDict.values() if isinstance(each, logging.Logger))]
    before = [(each, each.level, each.disabled, each.propagate) for each in loggers]
    handlers = root.handlers[:]
    yield
    root.handlers[:] = handlers
    for each, level, disabled, propagate in before:
        each.setLevel(level)
        each.disabled, each.propagate = disabled, propagate


@pytest.fixture(autouse=True)
def _modules_as_before(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Forget modules that a test has imported from its temporary folder: later tests may have one of the same name."""
    before = {*sys.modules}
    yield
    temporary = str(tmp_path_factory.getbasetemp())
    # All are found before one is deleted: a package without `__init__.py` needs its parents for its path.
    for name in [name for name in {*sys.modules} - before if _is_in(temporary, sys.modules[name])]:
        del sys.modules[name]


def _is_in(folder: str, module: object) -> bool:
    found = getattr(module, "__dict__", {})
    return any(str(place).startswith(folder) for place in (found.get("__file__"), *found.get("__path__", ())))


def _need(found: object, install: str) -> None:
    """Skip the test if a server is not installed; in CI, fail it."""
    if found is None:
        if os.environ.get("CI") == "true":
            pytest.fail(install, pytrace=False)
        pytest.skip(install)


def need_rabbitmq() -> None:
    _need(nodes.find("rabbitmq-server"), nodes.INSTALL)


def need_artemis() -> None:
    if brokers.find() is None and not brokers.can_install():
        pytest.skip(brokers.INSTALL)  # in CI, too: only Maven has it
    _need(brokers.find(), brokers.INSTALL)


def need_postgres() -> None:
    _need(clusters.find(), clusters.INSTALL)


def need_mariadb() -> None:
    _need(mariadbs.find(), mariadbs.INSTALL)


def need_prometheus() -> None:
    _need(monitors.find() and monitors.find("promtool"), monitors.INSTALL)


@pytest.fixture(scope="session")
def rabbitmq() -> Iterator[nodes.Node]:
    """The RabbitMQ node that all tests share. Leave it as it is: `rabbitmq_node` is for tests that break one."""
    need_rabbitmq()
    with nodes.Node() as node:
        yield node


@pytest.fixture
def rabbitmq_node() -> Iterator[Callable[..., nodes.Node]]:
    """`rabbitmq_node(config="...")` starts a node for this test alone, which ends with it."""
    need_rabbitmq()
    started: list[nodes.Node] = []

    def start(config: str = "", **options: object) -> nodes.Node:
        node = nodes.Node(config, **options)  # type: ignore[arg-type]
        started.append(node)
        node.start()
        return node

    yield start
    for node in started:
        node.close()


@pytest.fixture(scope="session")
def _vhosts(rabbitmq: nodes.Node) -> Iterator[str]:
    """An endless iterator over names of new virtual hosts, which are created in bulk."""

    def generate() -> Iterator[str]:
        while True:
            names = [f"test-{next(_vhost_numbers)}" for _ in range(VHOSTS_AT_ONCE)]
            rabbitmq.add_vhosts(names)
            yield from names

    return generate()


@pytest.fixture
def rabbitmq_url(rabbitmq: nodes.Node, _vhosts: Iterator[str]) -> str:
    """The URL of a virtual host of the shared node that no other test has used."""
    return rabbitmq.vhost_url(next(_vhosts))


@pytest.fixture(scope="session")
def artemis() -> Iterator[brokers.Artemis]:
    """The Artemis broker that all tests share. Leave it as it is: a test that breaks one starts its own."""
    need_artemis()
    with brokers.Artemis() as broker:
        yield broker


@pytest.fixture
def artemis_url(artemis: brokers.Artemis) -> str:
    """The URL of the shared broker, emptied for this test, for a user who may do everything."""
    artemis.reset()
    return artemis.url()


@pytest.fixture(scope="session")
def postgres() -> Iterator[clusters.Postgres]:
    """The PostgreSQL cluster that all tests share. Leave it as it is: a test that breaks one starts its own."""
    need_postgres()
    with clusters.Postgres() as cluster:
        yield cluster


@pytest.fixture
def postgres_url(postgres: clusters.Postgres) -> Iterator[str]:
    """The URL (for SQLAlchemy, with the driver psycopg) of an empty database for this test alone."""
    database = postgres.create_database()
    yield postgres.url(database)
    postgres.drop_database(database)  # Each takes about 8 MB.


@pytest.fixture(scope="session")
def mariadb() -> Iterator[mariadbs.MariaDB]:
    """The MariaDB server that all tests share. Leave it as it is."""
    need_mariadb()
    with mariadbs.MariaDB() as server:
        yield server


@pytest.fixture
def mariadb_url(mariadb: mariadbs.MariaDB) -> Iterator[str]:
    """The URL (for SQLAlchemy, with the driver pymysql) of an empty database for this test alone."""
    database = mariadb.create_database()
    yield mariadb.url(database)
    mariadb.drop_database(database)


@pytest.fixture(
    params=[
        "memory",
        "sqlite",
        pytest.param("rabbitmq", marks=pytest.mark.rabbitmq),
        pytest.param("artemis", marks=pytest.mark.artemis),
    ]
)
def broker_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty broker; the test runs once for each kind."""
    match request.param:
        case "memory":
            return f"memory://{uuid.uuid4().hex}"
        case "sqlite":
            return f"sqlite:///{tmp_path}/bus.db"
        case "artemis":
            artemis_url: str = request.getfixturevalue("artemis_url")
            return artemis_url
        case _:
            url: str = request.getfixturevalue("rabbitmq_url")
            return url


@pytest.fixture
def patient_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    """However late RabbitMQ sends the first contract, the catalogue is not taken for empty."""
    monkeypatch.setattr("lightbus.transport.amqp.channel._STREAM_SILENCE", DELAY)
