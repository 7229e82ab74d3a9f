"""The private PostgreSQL clusters of other tests: what they keep, and what they leave behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import sqlalchemy

from tests.conftest import need_postgres
from tests.patience import LIMIT
from tests.postgres import INSTALL, Postgres
from tests.processes import ROOT, alive, wait_until

pytestmark = pytest.mark.postgres

SHARED_MEMORY = Path("/proc/sysvipc/shm")
TABLES = "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"


@pytest.fixture
def cluster() -> Iterator[Postgres]:
    need_postgres()
    with Postgres() as cluster:
        yield cluster


def rows(cluster: Postgres, database: str) -> list[tuple[object, ...]]:
    with psycopg.connect(cluster.url(database, driver=None)) as connection:
        return connection.execute("SELECT id FROM orders ORDER BY id").fetchall()


def test_each_database_is_empty(postgres: Postgres, postgres_url: str) -> None:
    engine = sqlalchemy.create_engine(postgres_url)
    with engine.begin() as connection:
        assert connection.scalar(sqlalchemy.text(TABLES)) == 0
        connection.execute(sqlalchemy.text("CREATE TABLE orders (id int)"))
    engine.dispose()
    with psycopg.connect(postgres.url(postgres.create_database(), driver=None)) as other:
        assert other.execute(TABLES).fetchone() == (0,)


def test_committed_rows_survive_a_kill_a_stop_and_a_start(cluster: Postgres) -> None:
    database = cluster.create_database()
    connection = psycopg.connect(cluster.url(database, driver=None))
    connection.execute("CREATE TABLE orders (id int)")
    connection.execute("INSERT INTO orders VALUES (1)")
    connection.commit()
    connection.execute("INSERT INTO orders VALUES (2)")
    processes = cluster.processes()
    assert connection.info.backend_pid in processes
    cluster.kill()
    assert not any(map(alive, processes))
    with pytest.raises(psycopg.OperationalError):
        connection.execute("SELECT 1")
    assert not cluster.answers()
    cluster.start()
    assert rows(cluster, database) == [(1,)]
    cluster.restart()
    assert rows(cluster, database) == [(1,)]


@pytest.mark.skipif(not SHARED_MEMORY.exists(), reason="needs /proc/sysvipc")
def test_a_kill_leaves_no_shared_memory(cluster: Postgres) -> None:
    own = int((cluster.data / "postmaster.pid").read_text().splitlines()[6].split()[1])

    def all_of_this_machine() -> list[int]:
        return [int(line.split()[1]) for line in SHARED_MEMORY.read_text().splitlines()[1:]]

    assert own in all_of_this_machine()
    cluster.kill()
    assert own not in all_of_this_machine()


def test_by_default_it_does_not_wait_for_the_disk(postgres: Postgres) -> None:
    need_postgres()
    with Postgres(durable=True) as durable:
        for cluster, fsync in ((postgres, "off"), (durable, "on")):
            with psycopg.connect(cluster.url(driver=None)) as connection:
                assert connection.execute("SHOW fsync").fetchone() == (fsync,)
                assert connection.execute("SHOW synchronous_commit").fetchone() == ("on",)


def test_close_ends_its_processes_and_deletes_its_folder(cluster: Postgres) -> None:
    with psycopg.connect(cluster.url(driver=None)):
        processes = cluster.processes()
        assert len(processes) > 2
        assert alive(processes[0])
        cluster.close()
    assert not any(map(alive, processes))
    assert not cluster.folder.exists()


def test_a_killed_test_process_leaves_nothing_behind() -> None:
    need_postgres()
    code = (
        "import os, signal; from tests.postgres import Postgres; cluster = Postgres(); cluster.start(); "
        "print(cluster.folder, *cluster.processes(), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=LIMIT * 2,
        check=False,
    )
    assert done.returncode == -9
    folder, *processes = done.stdout.split()
    assert len(processes) > 2
    wait_until(lambda: not any(alive(int(pid)) for pid in processes), "the cluster ends")
    wait_until(lambda: not Path(folder).exists(), "its folder is deleted")


@pytest.mark.parametrize(("ci", "outcome"), [("", "1 skipped"), ("true", "1 error")])
def test_without_postgresql_its_tests_are_skipped_loudly_and_fail_in_ci(ci: str, outcome: str) -> None:
    code = (
        "import sys, pytest; from tests import postgres; postgres.FOLDERS = (); "
        f"sys.exit(pytest.main(['-p', 'no:cacheprovider', '{Path(__file__)}', '-k', 'each_database']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "CI": ci},
        capture_output=True,
        text=True,
        timeout=LIMIT * 2,
        check=False,
    )
    assert outcome in done.stdout
    assert INSTALL in done.stdout
    assert ("1 TESTS WERE SKIPPED WITHOUT POSTGRESQL" in done.stdout) == (ci == "")
