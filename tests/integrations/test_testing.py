"""Runs docs/examples/testing with pytest and unittest."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable

import pytest

from tests.integrations.example import EXAMPLES, NO_BROKER, PYTHON, Example


@pytest.fixture
def tests(example: Callable[[str], Example]) -> Example:
    copy = example("testing")
    for app in ("auth", "billing", "welcome"):
        shutil.copy(EXAMPLES / f"{app}.py", copy.folder.parent)
    return copy


def test_with_pytest(tests: Example) -> None:
    done = tests.run(*PYTHON, "-m", "pytest", "-p", "no:cacheprovider", url=NO_BROKER)
    assert "10 passed in" in done.stdout, done.stdout + done.stderr


def test_with_unittest(tests: Example) -> None:
    done = tests.run(*PYTHON, "-m", "unittest", "test_with_unittest", url=NO_BROKER, extra={"PYTHONPATH": ".."})
    assert "Ran 2 tests" in done.stderr, sys.version + done.stderr
    assert done.stderr.rstrip().endswith("OK")
