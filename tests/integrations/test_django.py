"""docs/examples/django: gunicorn or uvicorn, the management command as the worker, and a shared database."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from uuid import UUID

import pytest

from tests.integrations.example import (
    GUNICORN,
    MAIL,
    NO_BROKER,
    ORDER,
    PYTHON,
    SERVES,
    UVICORN,
    Example,
    place_order,
    put,
)
from tests.patience import wait_until
from tests.processes import LIGHTBUS

MANAGE = (*PYTHON, "manage.py")
WORKER = (*MANAGE, "lightbus_worker")

PLACE = """\
import os, sys

import django

os.environ["DJANGO_SETTINGS_MODULE"] = "shop.settings"
django.setup()

from django.db import transaction
from django.test import Client

for order_id in sys.argv[1:]:
    with transaction.atomic():
        answer = Client().put(f"/orders/{order_id}", {"email": "a@example.com"}, content_type="application/json")
        transaction.set_rollback(order_id == sys.argv[1])
    print(answer.status_code)
"""
"""Places orders, each in a transaction; the first transaction is rolled back."""


@pytest.fixture
def shop(example: Callable[[str], Example]) -> Example:
    """The example, with its database."""
    shop = example("django")
    migrated = shop.run(*MANAGE, "migrate", url=NO_BROKER)
    assert migrated.returncode == 0, migrated.stderr
    return shop


def confirmed(shop: Example) -> list[UUID]:
    with closing(sqlite3.connect(shop.folder / "db.sqlite3")) as database:
        return [UUID(row[0]) for row in database.execute("SELECT id FROM orders_order WHERE confirmed")]


def open_databases(shop: Example, pid: int) -> int:
    """How many times the process has opened the file of the Django database."""
    found = 0
    for number in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found += os.readlink(f"/proc/{pid}/fd/{number}") == str(shop.folder / "db.sqlite3")
    return found


@pytest.mark.parametrize("server", [GUNICORN, UVICORN], ids=["wsgi", "asgi"])
def test_the_event_of_a_request_is_handled_by_the_worker(shop: Example, url: str, server: Sequence[str]) -> None:
    interface = ["shop.wsgi"] if server is GUNICORN else ["--lifespan", "off", "shop.asgi:application"]
    with (
        shop.start(program=WORKER, url=url) as worker,
        shop.start(*interface, program=server, url=url) as web,
    ):
        worker.wait_for("Ready")
        root = web.wait_for(SERVES)[1]
        assert place_order(root).status == 202
        worker.wait_for(MAIL)
        assert put(f"{root}/orders/{ORDER}/seen", {}).status == 202
        web.end(signal.SIGTERM)
        worker.signal(signal.SIGTERM)
        worker.wait_for(r"Stopping \(SIGTERM\)")
        assert worker.end() == 0
    assert confirmed(shop) == [UUID(ORDER)]


def test_a_rolled_back_order_is_not_published(shop: Example, url: str) -> None:
    (shop.folder / "place.py").write_text(PLACE)
    rolled_back, committed = ORDER, ORDER.replace("3", "4")
    with shop.audit(url) as audit:
        done = shop.run(*PYTHON, "place.py", rolled_back, committed, url=url)
        assert done.stdout == "202\n202\n", done.stderr
        audit.wait_for(f'order.placed from shop: .*"order_id": "{committed}"')
        assert rolled_back not in audit.output


def test_the_database_connection_is_closed_after_each_event(shop: Example, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/bus.db"
    with (
        shop.start(program=WORKER, url=url) as worker,
        shop.start("shop.wsgi", program=GUNICORN, url=url) as web,
    ):
        worker.wait_for("Ready")
        assert place_order(web.wait_for(SERVES)[1]).status == 202
        worker.wait_for(MAIL)
        wait_until(lambda: not open_databases(shop, worker.process.pid), "the worker has closed the database")


@pytest.mark.parametrize(
    ("program", "options"),
    [(WORKER, ["--processes", "2", "--queue", "main"]), (LIGHTBUS, ["worker", "lightbus.django:app"])],
    ids=["options", "lightbus worker"],
)
def test_the_worker_accepts_options_and_also_starts_with_the_lightbus_command(
    shop: Example, tmp_path: Path, program: Sequence[str], options: list[str]
) -> None:
    settings = {"DJANGO_SETTINGS_MODULE": "shop.settings"}
    with shop.start(*options, program=program, url=f"sqlite:///{tmp_path}/bus.db", extra=settings) as worker:
        worker.wait_for(r"worker of app 'shop' \(lightbus.django:app\)" + (", 2 processes" if "2" in options else ""))
        worker.wait_for(r"order.placed +-> confirm +in a thread")
        worker.wait_for("Ready")
        assert worker.end(signal.SIGTERM) == 0


def test_an_invalid_option_is_reported(shop: Example) -> None:
    done = shop.run(*WORKER, "--quue", "main", url=NO_BROKER)
    assert done.returncode == 2
    assert "unrecognized arguments: --quue" in done.stderr


def test_a_missing_broker_causes_a_503_and_the_order_is_kept(shop: Example) -> None:
    with shop.start("shop.wsgi", program=GUNICORN, url=NO_BROKER) as web:
        answer = place_order(web.wait_for(SERVES)[1])
        assert web.end(signal.SIGTERM) == 0
    assert answer.status == 503
    assert answer.headers["Retry-After"] == "5"
    with closing(sqlite3.connect(shop.folder / "db.sqlite3")) as database:
        assert database.execute("SELECT count(*) FROM orders_order").fetchone() == (1,)


def test_models_and_migrations_match(shop: Example) -> None:
    done = shop.run(*MANAGE, "makemigrations", "--check", url=NO_BROKER)
    assert done.returncode == 0, done.stdout


def test_the_tests_of_the_example_pass(example: Callable[[str], Example]) -> None:
    assert "Ran 5 tests" in example("django").run_its_tests("-W", "error", "manage.py", "test")
