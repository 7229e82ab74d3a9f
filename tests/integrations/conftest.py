"""Runs docs/examples as a reader does: in a copy of the folder, with real servers and a real broker."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integrations.example import EXAMPLES, Example


@pytest.fixture(params=["sqlite", pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The broker of the processes of the example."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/bus.db"
    found: str = request.getfixturevalue("rabbitmq_url")
    return found


@pytest.fixture
def example(tmp_path: Path) -> Callable[[str], Example]:
    """`example("flask")`: a copy of docs/examples/flask, in which its programs may write files."""

    def copy(name: str) -> Example:
        ignored = shutil.ignore_patterns("__pycache__", "node_modules", "*.sqlite3", "*.db")
        return Example(Path(shutil.copytree(EXAMPLES / name, tmp_path / name, ignore=ignored)))

    return copy
