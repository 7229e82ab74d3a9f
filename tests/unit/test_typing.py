"""Checks the files of tests/typing, and the examples of the README, with mypy and pyright."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README_EXAMPLES = ("hello", "auth", "welcome", "billing", "demo/reviews", "demo/inbox")
FILES = sorted((ROOT / "tests" / "typing").glob("*.py"))


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=300)


def need(checker: str) -> None:
    if importlib.util.find_spec(checker) is None:
        pytest.skip(f"{checker} IS NOT INSTALLED, SO tests/typing IS NOT CHECKED (see `make lint`)")


def test_the_files_exist() -> None:
    assert {file.name for file in FILES} >= {"declaring.py", "messages.py"}


def test_mypy_accepts_valid_code_and_rejects_invalid_code() -> None:
    need("mypy")
    done = run("mypy", "--strict", "--warn-unused-ignores", "--no-error-summary", *map(str, FILES))
    assert done.returncode == 0, done.stdout + done.stderr


def test_pyright_accepts_valid_code_and_rejects_invalid_code() -> None:
    need("pyright")
    done = run("pyright", "--project", "tests/typing", "--pythonpath", sys.executable, "--outputjson")
    try:
        found = json.loads(done.stdout)
    except ValueError:
        pytest.skip(f"PYRIGHT CANNOT RUN HERE (it needs Node.js): {(done.stdout + done.stderr).strip()[-300:]}")
    problems = [
        f"{one['file']}:{one['range']['start']['line'] + 1}: {one['message']}" for one in found["generalDiagnostics"]
    ]
    assert found["summary"]["filesAnalyzed"] == len(FILES)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_the_examples_of_the_readme_type_check_as_they_are(checker: str) -> None:
    need(checker)
    examples = [f"docs/examples/{name}.py" for name in README_EXAMPLES]
    if checker == "mypy":
        done = run("mypy", "--strict", "--no-error-summary", *examples)
    else:
        done = run("pyright", "--pythonpath", sys.executable, *examples)
        if done.returncode > 1 or not done.stdout.rstrip().endswith(("informations", "information")):
            pytest.skip(f"PYRIGHT CANNOT RUN HERE (it needs Node.js): {(done.stdout + done.stderr).strip()[-300:]}")
    assert done.returncode == 0, done.stdout + done.stderr
