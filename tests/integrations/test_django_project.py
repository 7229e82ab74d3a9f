"""`lightbus.django` in a project: system checks, management commands, its app for the commands of `lightbus`."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.patience import LIMIT, wait_until
from tests.processes import Program, environment, lightbus

SETTINGS = """\
import os
from pathlib import Path

SECRET_KEY = "for tests"
INSTALLED_APPS = ["lightbus.django"]
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": Path(__file__).with_name("db.sqlite3")}}
USE_TZ = True
LIGHTBUS_APP = os.environ.get("THE_APP", "bus:app")
"""

BUS = """\
from lightbus import Lightbus
from lightbus.django import Inbox, Outbox

app = Lightbus("shop", include=["handlers"])
outbox, inbox = Outbox(app), Inbox(app)

@app.event
class OrderPlaced:
    number: int
"""

HANDLERS = """\
from bus import app, inbox
from lightbus.django.models import OutboxRow

@app.on("order.placed", inbox=inbox)
def bill(order: dict):
    print(f"A bill for order {order['number']}", flush=True)
"""
"""Models can be imported only after Django is set up."""

MANAGE_PY = """\
import os, sys

from django.core.management import execute_from_command_line

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "settings")
execute_from_command_line(sys.argv)
"""

PLACE = """\
import django

django.setup()

from bus import OrderPlaced, outbox

outbox.add(OrderPlaced(number=7))
"""

Manage = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    files = {"settings.py": SETTINGS, "bus.py": BUS, "handlers.py": HANDLERS, "manage.py": MANAGE_PY, "place.py": PLACE}
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def manage(project: Path) -> Manage:
    def run(*arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "manage.py", *arguments],
            cwd=project,
            env=environment({"LIGHTBUS_URL": "memory://checks", **extra}),
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )

    return run


def test_a_correct_project_passes(manage: Manage) -> None:
    done = manage("check")
    assert (done.returncode, done.stderr) == (0, "")
    assert manage("check", THE_APP="").returncode == 0  # only the commands need it


@pytest.mark.parametrize(
    ("app", "error"),
    [
        ("nowhere:app", "ModuleNotFoundError: No module named 'nowhere'"),
        ("bus:shop", "AttributeError: module 'bus' has no attribute 'shop'"),
        ("bus:outbox", "'bus:outbox' is not a Lightbus app"),
        ("lightbus.django:app", "names itself"),
    ],
)
def test_an_app_that_cannot_be_imported_is_an_error(manage: Manage, app: str, error: str) -> None:
    done = manage("check", THE_APP=app)
    assert done.returncode == 1
    assert "(lightbus.E001)" in done.stderr
    assert error in done.stderr


def test_a_database_that_cannot_have_the_tables_is_an_error(manage: Manage, project: Path) -> None:
    backend = project / "oracular"
    backend.mkdir()
    (backend / "__init__.py").write_text("")
    (backend / "base.py").write_text(
        "from django.db.backends.sqlite3.base import DatabaseWrapper as Base\n"
        "class DatabaseWrapper(Base):\n    vendor = 'oracle'\n"
    )
    (project / "settings.py").write_text(SETTINGS.replace("django.db.backends.sqlite3", "oracular"))
    done = manage("check")
    assert "(lightbus.E002)" in done.stderr
    assert "The outbox or inbox of app 'shop' is in DATABASES['default'], which is oracle" in done.stderr


def test_commands_of_lightbus_set_up_django(project: Path) -> None:
    extra = {"DJANGO_SETTINGS_MODULE": "settings"}
    found = lightbus("events", "lightbus.django:app", folder=project, url="memory://checks", extra=extra)
    assert found.returncode == 0, found.stderr
    assert "order.placed" in found.stdout
    other = lightbus("events", "lightbus.django:app", folder=project, url="", extra={**extra, "THE_APP": ""})
    assert other.returncode == 2
    assert 'the setting LIGHTBUS_APP names, as in "shop.bus:app"' in other.stderr
    same = {**extra, "THE_APP": "lightbus.django:app"}
    itself = lightbus("events", "lightbus.django:app", folder=project, url="", extra=same)
    assert itself.returncode == 2
    assert "names itself" in itself.stderr
    without = lightbus("events", "lightbus.django:app", folder=project, url="")
    assert without.returncode == 2
    assert "set DJANGO_SETTINGS_MODULE=shop.settings" in without.stderr


# --- the commands -----------------------------------------------------------------------------


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/bus.db"


def place_order(project: Path, url: str) -> None:
    extra = {"DJANGO_SETTINGS_MODULE": "settings", "LIGHTBUS_URL": url}
    subprocess.run([sys.executable, "place.py"], cwd=project, env=environment(extra), timeout=LIMIT, check=True)


def waiting(project: Path) -> int:
    with closing(sqlite3.connect(project / "db.sqlite3")) as database:
        count: int = database.execute("SELECT count(*) FROM lightbus_outbox").fetchone()[0]
        return count


@pytest.mark.parametrize("processes", [1, 2])
def test_the_worker_sends_and_handles_events_until_sigterm(
    manage: Manage, project: Path, url: str, processes: int
) -> None:
    """Also if it is started in another folder: each process finds the modules beside manage.py."""
    assert manage("migrate").returncode == 0
    arguments = (
        "lightbus_worker",
        "--queue",
        "main",
        "--concurrency=4",
        *(["--processes=2"] if processes == 2 else []),
    )
    command = (sys.executable, str(project / "manage.py"))
    elsewhere = project.parent / "elsewhere"
    elsewhere.mkdir()
    with Program(*arguments, folder=elsewhere, url=url, program=command) as worker:
        worker.wait_for(r"worker of app 'shop' \(" + ("bus:app" if processes == 1 else r"lightbus.django:app\), 2 pro"))
        worker.wait_for("Ready")
        place_order(project, url)
        worker.wait_for("A bill for order 7")
        assert worker.end(signal.SIGTERM) == 0
    assert waiting(project) == 0


def test_the_relay_sends_events_and_handles_none(manage: Manage, project: Path, url: str) -> None:
    assert manage("migrate").returncode == 0
    place_order(project, url)
    with Program("lightbus_relay", folder=project, url=url, program=(sys.executable, "manage.py")) as relay:
        relay.wait_for(r"relay of app 'shop' \(bus:app\), from Django's database 'default'")
        relay.wait_for("Started")
        wait_until(lambda: waiting(project) == 0, "the event was sent")
        place_order(project, url)
        wait_until(lambda: waiting(project) == 0, "the second event was sent")
        assert relay.end(signal.SIGTERM) == 0
        assert "A bill" not in relay.output


def test_the_option_app_takes_precedence_over_the_setting(manage: Manage) -> None:
    without = manage("lightbus_worker", THE_APP="")
    assert without.returncode == 1
    assert 'Which app? Set LIGHTBUS_APP = "shop.bus:app" in the settings, or pass --app' in without.stderr
    other = manage("lightbus_worker", "--app", "bus:outbox")
    assert other.returncode == 2
    assert "bus:outbox is of type Outbox, not a Lightbus" in other.stderr


def test_invalid_options_are_refused(manage: Manage) -> None:
    unknown = manage("lightbus_worker", "--quue", "main")
    assert unknown.returncode == 2
    assert "unrecognized arguments: --quue" in unknown.stderr
    wrong = manage("lightbus_worker", "--grace", "soon")
    assert wrong.returncode == 2
    assert "'soon' is not a valid float" in wrong.stderr
    shown = manage("lightbus_relay", "--help").stdout
    assert "--grace SECONDS" in shown
    assert "--queue" not in shown
