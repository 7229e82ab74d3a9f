"""What type checkers make of an application: the files of tests/typing, read by mypy and by pyright."""

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
        pytest.skip(f"{checker} IS NOT INSTALLED, SO NOTHING IS KNOWN OF HOW IT READS tests/typing (see `make lint`)")


def test_there_is_something_to_read() -> None:
    assert {file.name for file in FILES} >= {"declaring.py", "messages.py"}


def test_mypy_sees_what_applications_may_and_may_not_do() -> None:
    need("mypy")
    done = run("mypy", "--strict", "--warn-unused-ignores", "--no-error-summary", *map(str, FILES))
    assert done.returncode == 0, done.stdout + done.stderr


def test_pyright_sees_what_applications_may_and_may_not_do() -> None:
    need("pyright")
    done = run("pyright", "--project", "tests/typing", "--pythonpath", sys.executable, "--outputjson")
    try:
        found = json.loads(done.stdout)
    except ValueError:
        pytest.skip(f"PYRIGHT CANNOT RUN HERE (it needs Node.js): {(done.stdout + done.stderr).strip()[-300:]}")
    told = [
        f"{one['file']}:{one['range']['start']['line'] + 1}: {one['message']}" for one in found["generalDiagnostics"]
    ]
    assert found["summary"]["filesAnalyzed"] == len(FILES)
    assert not told, "\n".join(told)


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
