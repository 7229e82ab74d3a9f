"""`lightbus outbox`, and what `lightbus doctor` says about an outbox."""

from __future__ import annotations

import json
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from lightbus import Lightbus
from lightbus.outbox import Outbox, metadata
from lightbus.outbox.tables import outbox as table
from tests.patience import silent_server
from tests.processes import Program, environment, lightbus
from tests.rabbitmq import free_port

ORDERS = """
import os
from sqlalchemy import create_engine
from lightbus import Lightbus
from lightbus.outbox import Outbox

app = Lightbus("orders")
outbox = Outbox(app, create_engine(os.environ.get("DATABASE", "sqlite:///orders.sqlite")))

@app.event("order.placed")
class Placed:
    number: int
"""
FILES = {
    "orders.py": ORDERS,
    "asynchronous.py": ORDERS.replace("sqlalchemy import", "sqlalchemy.ext.asyncio import").replace(
        "create_engine", "create_async_engine"
    ),
    "bare.py": 'from lightbus import Lightbus\napp = Lightbus("bare")\n',
    "two.py": ORDERS + 'second = Outbox(app, create_engine("sqlite:///second.sqlite"))\n',
}


class Database:
    """The outbox of the app in `orders.py`, as a program of it would fill it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.engine = sa.create_engine(url)
        metadata.create_all(self.engine)
        self.app = Lightbus("orders", url="memory://")
        self.outbox = Outbox(self.app)

        @self.app.event("order.placed")
        class Placed:
            number: int

        self.event = Placed

    def add(self, *numbers: int, seconds_ago: float = 0) -> list[str]:
        """Add events, and return their ids."""
        with Session(self.engine) as session, session.begin():
            ids = [self.outbox.add(session, self.event(number=number)) for number in numbers]
        with self.engine.begin() as connection:
            connection.execute(
                sa.update(table).where(table.c.message_id.in_(ids)).values(added_at=time.time() - seconds_ago)
            )
        return ids

    def set_aside(self, *numbers: int, error: str = "The broker refuses it.") -> list[str]:
        ids = self.add(*numbers)
        with self.engine.begin() as connection:
            connection.execute(
                sa.update(table).where(table.c.message_id.in_(ids)).values(state=1, error=error, attempts=1)
            )
        return ids

    def rows(self) -> dict[int, int]:
        """The state of each row, by its id."""
        with self.engine.connect() as connection:
            return {row.id: row.state for row in connection.execute(sa.select(table))}


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def database(request: pytest.FixtureRequest, folder: Path) -> Database:
    if request.param == "sqlite":
        return Database(f"sqlite:///{folder}/orders.sqlite")
    return Database(request.getfixturevalue("postgres_url"))


def run(
    *arguments: str, folder: Path, database: Database | str = "sqlite:///orders.sqlite", given: bytes = b""
) -> subprocess.CompletedProcess[str]:
    url = database if isinstance(database, str) else database.url
    return lightbus(*arguments, folder=folder, url=f"sqlite:///{folder}/bus.db", given=given, extra={"DATABASE": url})


# --- sql --------------------------------------------------------------------------------------


def test_the_statements_create_the_tables_in_sqlite(folder: Path) -> None:
    done = run("outbox", "sql", "--dialect", "sqlite", folder=folder)
    assert (done.returncode, done.stderr) == (0, "")
    connection = sqlite3.connect(folder / "orders.sqlite")
    connection.executescript(done.stdout)
    connection.close()
    assert run("outbox", "stats", "orders:app", folder=folder).stdout == (
        "'sqlite:///orders.sqlite': 0 waiting, 0 set aside\nHealthy.\n"
    )


@pytest.mark.postgres
def test_the_statements_create_the_tables_in_postgresql_by_default(folder: Path, postgres_url: str) -> None:
    done = run("outbox", "sql", folder=folder)
    with psycopg.connect(postgres_url.replace("+psycopg", "")) as connection:
        connection.execute(done.stdout.encode())
    stats = run("outbox", "stats", "orders:app", folder=folder, database=postgres_url)
    assert (stats.returncode, stats.stderr) == (0, "")


@pytest.mark.parametrize("dialect", ["mysql", "mariadb"])
def test_there_are_statements_for_mysql_and_mariadb(folder: Path, dialect: str) -> None:
    assert "AUTO_INCREMENT" in run("outbox", "sql", "--dialect", dialect, folder=folder).stdout


def test_an_unknown_dialect_is_an_error_of_the_command_line(folder: Path) -> None:
    done = run("outbox", "sql", "--dialect", "oracle", folder=folder)
    assert done.returncode == 2
    assert "'oracle' is not one of 'postgresql', 'sqlite', 'mysql', 'mariadb'" in done.stderr


def test_without_sqlalchemy_the_error_names_the_extra(folder: Path) -> None:
    without = (
        "import sys; sys.modules['sqlalchemy'] = None; from lightbus.cli import main; "
        "main(['outbox', 'sql'], prog_name='lightbus')"
    )
    done = subprocess.run(
        [sys.executable, "-c", without], cwd=folder, env=environment(), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (
        1,
        "Error: SQLAlchemy is not installed. Install it: pip install 'lightbus-amqp[outbox]'\n",
    )


# --- stats ------------------------------------------------------------------------------------


def test_stats_show_what_waits(folder: Path, database: Database) -> None:
    database.add(1, 2, 3)
    done = run("outbox", "stats", "orders:app", folder=folder, database=database)
    assert (done.returncode, done.stderr) == (0, "")
    assert "3 waiting, the oldest for " in done.stdout
    assert "0 set aside" in done.stdout


def test_stats_report_what_has_waited_for_too_long(folder: Path, database: Database) -> None:
    database.add(1, seconds_ago=1000)
    done = run("outbox", "stats", "orders:app", folder=folder, database=database)
    assert done.returncode == 1
    assert "has waited for 17m. Is a relay running? Start one: lightbus relay orders:app" in done.stderr
    assert run("outbox", "stats", "orders:app", "--max-age", "5000", folder=folder, database=database).returncode == 0


def test_stats_report_what_is_set_aside(folder: Path, database: Database) -> None:
    database.set_aside(1)
    done = run("outbox", "stats", "orders:outbox", "--json", folder=folder, database=database)
    found = json.loads(done.stdout)
    assert (done.returncode, found["healthy"]) == (1, False)
    (problem,) = found["problems"]
    assert problem.startswith("1 set aside in '")
    assert problem.endswith(", which could not be sent. To see why: lightbus outbox list orders:outbox")
    assert found["outboxes"][0]["set_aside"] == 1


# --- list -------------------------------------------------------------------------------------


def test_the_list_shows_what_was_refused(folder: Path, database: Database) -> None:
    (refused,) = database.set_aside(1)
    (again,) = database.add(2)
    database.add(3)
    with database.engine.begin() as connection:
        connection.execute(
            sa.update(table)
            .where(table.c.message_id == again)
            .values(error="The queue is full.", attempts=4, due=time.time() + 3590)
        )
    done = run("outbox", "list", "orders:app", folder=folder, database=database)
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert lines[1].split() == ["ID", "EVENT", "MESSAGE", "ID", "AGE", "ATTEMPTS", "NEXT", "TRY", "ERROR"]
    assert lines[2].split()[:3] == ["1", "order.placed", refused]
    assert lines[2].endswith(" 1  set aside  The broker refuses it.")
    assert lines[3].split()[:3] == ["2", "order.placed", again]
    assert re.search(r" 4  in (5[0-9]|60)m     The queue is full\.$", lines[3])
    assert lines[4:] == ["", "After fixing the cause: lightbus outbox retry orders:app --id ID"]
    found = json.loads(run("outbox", "list", "orders:app", "--json", folder=folder, database=database).stdout)
    assert [(one["id"], one["set_aside"], one["next_try"] is None, one["body"]) for one in found] == [
        (1, True, True, '{"number":1}'),
        (2, False, False, '{"number":2}'),
    ]


def test_the_list_is_limited_and_says_so(folder: Path) -> None:
    Database(f"sqlite:///{folder}/orders.sqlite").set_aside(1, 2, 3)
    done = run("outbox", "list", "orders:app", "--limit", "2", folder=folder)
    assert done.stdout.count("set aside") == 2
    assert "There may be more: --limit 20 shows them." in done.stdout


def test_an_empty_list_says_so(folder: Path, database: Database) -> None:
    done = run("outbox", "list", "orders:app", folder=folder, database=database)
    assert done.stdout.endswith(": nothing was refused.\n")
    assert run("outbox", "list", "orders:app", "--json", folder=folder, database=database).stdout == "[]\n"


def test_text_of_an_error_cannot_control_the_terminal(folder: Path) -> None:
    Database(f"sqlite:///{folder}/orders.sqlite").set_aside(1, error="red \x1b[31m\nnext line")
    assert "red \\x1b[31m\\nnext line" in run("outbox", "list", "orders:app", folder=folder).stdout


# --- retry and purge --------------------------------------------------------------------------


def test_a_row_is_retried_by_its_id(folder: Path, database: Database) -> None:
    database.set_aside(1, 2, 3)
    done = run("outbox", "retry", "orders:app", "--id", "1", "--id", "3", folder=folder, database=database)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "2 events retried. The next relay or worker sends them.\n"
    assert database.rows() == {1: 0, 2: 1, 3: 0}


def test_all_rows_are_retried(folder: Path, database: Database) -> None:
    database.set_aside(1, 2)
    done = run("outbox", "retry", "orders:app", "--all", "--json", folder=folder, database=database)
    assert json.loads(done.stdout) == {"retried": 2, "unknown": []}
    assert database.rows() == {1: 0, 2: 0}
    assert run("outbox", "retry", "orders:app", "--all", folder=folder, database=database).stdout == (
        "Nothing is set aside.\n"
    )


@pytest.mark.parametrize("action", [["retry"], ["purge", "--yes"]])
def test_an_unknown_id_is_reported_and_the_others_are_done(folder: Path, database: Database, action: list[str]) -> None:
    database.set_aside(1, 2)
    database.add(3)
    done = run(
        "outbox", *action, "orders:app", "--id", "1", "--id", "3", "--id", "77", folder=folder, database=database
    )
    assert done.returncode == 1
    assert done.stdout.startswith("1 event ")
    assert done.stderr.splitlines() == [
        f"No event with the id {one} is set aside. To see them: lightbus outbox list orders:app" for one in (3, 77)
    ]
    assert database.rows() == {2: 1, 3: 0, **({1: 0} if action == ["retry"] else {})}


@pytest.mark.parametrize("action", [["retry"], ["purge", "--yes"]])
@pytest.mark.parametrize(
    ("given", "why"),
    [
        ([], "Select rows: use either --id ID or --all."),
        (["--id", "1", "--all"], "Select rows: use either --id ID or --all."),
        (["--id", ""], "it is empty. `lightbus outbox list` shows the ids."),
        (["--id", "1", "--id", ""], "it is empty. `lightbus outbox list` shows the ids."),
        (["--id", "all"], "'all' is not the number of a row. `lightbus outbox list` shows the ids."),
        (["--id", "-1"], "'-1' is not the number of a row. `lightbus outbox list` shows the ids."),
    ],
)
def test_rows_are_never_selected_by_mistake(folder: Path, action: list[str], given: list[str], why: str) -> None:
    database = Database(f"sqlite:///{folder}/orders.sqlite")
    database.set_aside(1, 2)
    done = run("outbox", *action, "orders:app", *given, folder=folder)
    assert done.returncode == 2
    assert why in done.stderr
    assert database.rows() == {1: 1, 2: 1}


def test_purge_shows_rows_and_asks(folder: Path, database: Database) -> None:
    database.set_aside(1, 2)
    database.add(3)
    no = run("outbox", "purge", "orders:app", "--all", folder=folder, database=database, given=b"n\n")
    assert (no.returncode, no.stderr) == (1, "Delete these 2 events permanently? [y/N]: Nothing was purged.\n")
    assert no.stdout.count("The broker refuses it.") == 2
    unanswered = run("outbox", "purge", "orders:app", "--id", "1", folder=folder, database=database)
    assert unanswered.returncode == 1
    assert unanswered.stderr.endswith("Error: stdin ended without an answer. To skip the question: --yes\n")
    assert database.rows() == {1: 1, 2: 1, 3: 0}
    yes = run("outbox", "purge", "orders:app", "--all", folder=folder, database=database, given=b"y\n")
    assert yes.returncode == 0
    assert yes.stdout.endswith("2 events purged.\n")
    assert database.rows() == {3: 0}


def test_purge_without_a_question(folder: Path, database: Database) -> None:
    database.set_aside(1, 2)
    asked = run("outbox", "purge", "orders:app", "--all", "--json", folder=folder, database=database)
    assert (asked.returncode, database.rows()) == (2, {1: 1, 2: 1})
    assert "--json does not ask: add --yes." in asked.stderr
    done = run("outbox", "purge", "orders:app", "--all", "--yes", "--json", folder=folder, database=database)
    assert json.loads(done.stdout) == {"purged": 2, "unknown": []}
    assert database.rows() == {}


@pytest.mark.postgres
def test_the_commands_work_with_an_async_engine(folder: Path, postgres_url: str) -> None:
    database = Database(postgres_url)
    database.set_aside(1, 2, 3)
    url = postgres_url.replace("psycopg", "asyncpg")
    listed = run("outbox", "list", "asynchronous:app", folder=folder, database=url)
    assert (listed.stdout.count("The broker refuses it."), listed.stderr) == (3, "")
    retried = run("outbox", "retry", "asynchronous:app", "--id", "1", "--id", "2", folder=folder, database=url)
    assert (retried.returncode, retried.stderr) == (0, "")
    # Two event loops: one before the question, one after it.
    purged = run("outbox", "purge", "asynchronous:app", "--all", folder=folder, database=url, given=b"y\n")
    assert (purged.returncode, purged.stderr) == (0, "Delete this event permanently? [y/N]: ")
    assert database.rows() == {1: 0, 2: 0}
    stats = run("outbox", "stats", "asynchronous:app", folder=folder, database=url)
    assert (stats.returncode, stats.stderr) == (0, "")
    doctor = run("doctor", "asynchronous:app", folder=folder, database=url)
    assert "2 waiting in 'postgresql+asyncpg://" in doctor.stdout
    assert doctor.stderr == ""


# --- several outboxes, none, and no database --------------------------------------------------


def test_several_outboxes_are_all_shown(folder: Path) -> None:
    for name, numbers in (("orders", (1,)), ("second", (1, 2))):
        Database(f"sqlite:///{folder}/{name}.sqlite").set_aside(*numbers)
    stats = run("outbox", "stats", "two:app", folder=folder)
    assert stats.stdout.splitlines() == [
        "'sqlite:///orders.sqlite': 0 waiting, 1 set aside",
        "'sqlite:///second.sqlite': 0 waiting, 2 set aside",
    ]
    listed = json.loads(run("outbox", "list", "two:app", "--json", folder=folder).stdout)
    assert [one["database"] for one in listed] == ["sqlite:///orders.sqlite", *2 * ["sqlite:///second.sqlite"]]
    assert run("outbox", "retry", "two:app", "--all", folder=folder).stdout.startswith("3 events retried.")


def test_an_id_belongs_to_one_of_several_outboxes(folder: Path) -> None:
    first, second = (Database(f"sqlite:///{folder}/{name}.sqlite") for name in ("orders", "second"))
    for database in (first, second):
        database.set_aside(1)
    done = run("outbox", "purge", "two:app", "--id", "1", "--yes", folder=folder)
    assert done.returncode == 2
    assert (
        "two:app has several outboxes ('sqlite:///orders.sqlite' and 'sqlite:///second.sqlite'), and an id belongs to "
        "one. Name it instead of the app, as in two:outbox."
    ) in done.stderr
    done = run("outbox", "purge", "two:second", "--id", "1", "--yes", folder=folder)
    assert (done.returncode, first.rows(), second.rows()) == (0, {1: 1}, {})


@pytest.mark.parametrize("command", [["outbox", "stats"], ["outbox", "list"], ["outbox", "retry", "--all"], ["relay"]])
def test_an_app_without_an_outbox_is_an_error_with_the_next_step(folder: Path, command: list[str]) -> None:
    done = run(*command, "bare:app", folder=folder)
    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        "",
        "Error: app 'bare' has no outbox with a database. Create one where the app is imported from: "
        "outbox = Outbox(app, engine), or with Django Outbox(app).\n",
    )


def test_a_missing_table_is_an_error_with_the_next_step(folder: Path) -> None:
    done = run("outbox", "stats", "orders:app", folder=folder)
    assert (done.returncode, done.stderr) == (
        1,
        "Error: The outbox in 'sqlite:///orders.sqlite' cannot be used: OperationalError: no such table: "
        "lightbus_outbox. Create the tables with a migration: lightbus outbox sql prints the statements.\n",
    )


def test_a_database_that_does_not_answer_is_an_error_without_its_password(folder: Path) -> None:
    url = f"postgresql+psycopg://ann:secret@127.0.0.1:{free_port()}/orders"
    done = run("outbox", "list", "orders:app", folder=folder, database=url)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: The outbox in 'postgresql+psycopg://ann:***@127.0.0.1:")
    assert done.stderr.endswith(" failed: Connection refused.\n")
    assert done.stderr.count("\n") == 1
    assert "secret" not in done.stderr


@pytest.mark.parametrize("command", ["list", "stats"])
def test_ctrl_c_ends_a_command_whose_database_hangs(folder: Path, command: str) -> None:
    with silent_server() as silent:
        url = f"postgresql+psycopg://127.0.0.1:{silent.getsockname()[1]}/orders"
        with Program("outbox", command, "orders:app", folder=folder, url="memory://", extra={"DATABASE": url}) as one:
            connection, _ = silent.accept()
            assert (one.end(signal.SIGINT), one.output) == (130, "Interrupted.")
        connection.close()


INTERRUPTED = """
import signal, threading, time

def interrupt_itself():
    while not os.path.exists("now"):
        time.sleep(0.02)
    signal.pthread_kill(threading.get_ident(), signal.SIGINT)

threading.Thread(target=interrupt_itself, daemon=True).start()
"""


def test_ctrl_c_that_another_thread_receives_ends_a_command_whose_database_hangs(folder: Path) -> None:
    """So does a signal that arrives just before the event loop begins to wait: that wait is not interrupted."""
    (folder / "orders.py").write_text(ORDERS + INTERRUPTED)
    with silent_server() as silent:
        url = f"postgresql+psycopg://127.0.0.1:{silent.getsockname()[1]}/orders"
        with Program("outbox", "list", "orders:app", folder=folder, url="memory://", extra={"DATABASE": url}) as one:
            connection, _ = silent.accept()
            (folder / "now").touch()
            assert (one.end(), one.output) == (130, "Interrupted.")
        connection.close()


# --- doctor -----------------------------------------------------------------------------------


def findings(folder: Path, database: Database | str) -> list[dict[str, str]]:
    done = run("doctor", "orders:app", "--json", folder=folder, database=database)
    return [one for one in json.loads(done.stdout)["findings"] if one["subject"] == "outbox"]


def test_doctor_finds_nothing_wrong_with_an_outbox(folder: Path, database: Database) -> None:
    database.add(1)
    (found,) = findings(folder, database)
    assert (found["level"], found["next"]) == ("ok", None)
    assert found["text"].startswith("1 waiting in '")


def test_doctor_finds_rows_that_are_set_aside_and_a_relay_that_does_not_run(folder: Path, database: Database) -> None:
    database.add(1, seconds_ago=100)
    database.set_aside(2, 3)
    aside, old = findings(folder, database)
    assert (aside["level"], aside["next"]) == ("warn", "lightbus outbox list orders:app")
    assert aside["text"].endswith(": 2 set aside, which could not be sent.")
    assert (old["level"], old["next"]) == (
        "fail",
        "Is a relay running? Each worker has one; or start one: lightbus relay orders:app",
    )
    assert "1 waiting in '" in old["text"]
    assert ", the oldest for 1" in old["text"]


def test_doctor_finds_a_missing_table(folder: Path) -> None:
    (found,) = findings(folder, "sqlite:///orders.sqlite")
    assert found == {
        "level": "fail",
        "subject": "outbox",
        "text": "'sqlite:///orders.sqlite': OperationalError: no such table: lightbus_outbox.",
        "next": "Create the tables with a migration: lightbus outbox sql prints the statements",
    }


@pytest.mark.postgres
def test_doctor_finds_a_missing_table_in_postgresql(folder: Path, postgres_url: str) -> None:
    (found,) = findings(folder, postgres_url)
    assert found["text"].endswith(': UndefinedTable: relation "lightbus_outbox" does not exist.')
    assert found["next"] == "Create the tables with a migration: lightbus outbox sql prints the statements"


def test_doctor_finds_a_database_that_does_not_answer(folder: Path) -> None:
    url = f"postgresql+psycopg://ann:secret@127.0.0.1:{free_port()}/orders"
    (found,) = findings(folder, url)
    assert found["level"] == "fail"
    assert "cannot be used: OperationalError: " in found["text"]
    assert found["text"].endswith(" failed: Connection refused.")
    assert "secret" not in found["text"]
    assert found["next"] == (
        "Check that the database runs, its URL, and the user's permissions. Until then, nothing is sent."
    )
