"""What tests of commands share: a folder with an app in it, and a broker that outlasts one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.databases import ASYNCMY, POSTGRES, SQLITE, Database, opened


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Has the `FILES` of the test's module, by their names."""
    files: dict[str, str] = request.module.FILES
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/bus.db"


@pytest.fixture(params=["sqlite", pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)])
def url(request: pytest.FixtureRequest) -> str:
    """The URL of an empty broker, of each kind that several processes can use."""
    found: str = request.getfixturevalue(f"{request.param}_url")
    return found


@pytest.fixture(
    params=[
        *SQLITE,
        *(pytest.param(driver, marks=pytest.mark.postgres) for driver in POSTGRES),
        pytest.param(ASYNCMY, marks=pytest.mark.mariadb),  # test_mariadb.py has tests with the other one
    ],
)
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """A database with the tables of the outbox and the inbox, for each driver."""
    driver: str = request.param
    url = f"sqlite:///{tmp_path}/data.db"
    if driver not in SQLITE:
        url = request.getfixturevalue("postgres_url" if driver in POSTGRES else "mariadb_url")
    with opened(driver, url) as database:
        yield database
