"""`lightbus.django` in a project: system checks, and its app for the commands of `lightbus`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.patience import LIMIT
from tests.processes import environment, lightbus

SETTINGS = """\
import os

SECRET_KEY = "for tests"
INSTALLED_APPS = ["lightbus.django"]
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "db.sqlite3"}}
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
def bill(order: dict): ...
"""
"""Models can be imported only after Django is set up."""

Manage = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name, text in {"settings.py": SETTINGS, "bus.py": BUS, "handlers.py": HANDLERS}.items():
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture
def manage(project: Path) -> Manage:
    def run(*arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "django", *arguments],
            cwd=project,
            env=environment({"DJANGO_SETTINGS_MODULE": "settings", "LIGHTBUS_URL": "memory://checks", **extra}),
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
