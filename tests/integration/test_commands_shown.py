"""The commands in the documentation. Each is run here, is run by a test that is named here, or only sets something
up."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from lightbus.cli import main

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"^\$ ((?:.*\\\n)*.*)$", re.MULTILINE)

RUN_ELSEWHERE = {
    "tutorial.md": "tests/integration/test_tutorial.py",
    "README.md": "tests/integration/test_examples.py",
    "fastapi.md": "tests/integrations/test_fastapi.py",
    "flask.md": "tests/integrations/test_flask.py",
    "django.md": "tests/integrations/test_django.py",
    "scripts-and-cron.md": "tests/integrations/test_scripts.py",
    "other-languages.md": "tests/integrations/test_other_languages.py",
    "testing.md": "tests/integrations/test_testing.py",
    "larger-applications.md": "tests/integrations/test_larger.py",
    "new-service.md": "tests/integration/test_new.py",
    "install.md": "tests/integration/test_install.py",
    "outbox.md": "tests/integrations/test_outbox_example.py",
    "traces.md": "tests/integrations/test_traces.py",
    "metrics.md": "tests/integration/test_metrics.py",
    "check.md": "tests/integration/test_cli_check.py",
    "operations.md": "tests/integrations/test_outbox_example.py",
}
"""Pages whose commands another test runs."""
APPS = {"billing.bus:app", "auth:app", "welcome:app", "kitchen:app", "accounts:app"}
"""The apps that commands can use here."""
PROGRAMS = {"python", "pytest", "uvicorn", "gunicorn", "node", "curl", "sh", "opentelemetry-instrument"}
"""Programs that only these pages may run."""
SETS_UP = {"cd", "mkdir", "export", ".", "pip", "npm", "docker", "python3", "rabbitmqctl"}
"""Commands that change the machine or the broker. Tests do the same in a different way."""
ENDLESS = {"worker", "tail", "demo", "new", "web"}
"""Commands of Lightbus that do not end, or take long. Here only their options are parsed."""


def commands() -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        for block in CONSOLE.finditer(page.read_text()):
            for found in COMMAND.finditer(block[1]):
                yield page, found[1]


def words_of(command: str) -> list[str]:
    """The words of a command, without a comment, a pipe or a redirection."""
    words = shlex.split(command.replace("\\\n", " "), comments=True)
    ends = [number for number, word in enumerate(words) if word in ("|", ">", ">>", "&&", ";", "<")]
    return words[: ends[0]] if ends else words


SHOWN = list(commands())
OURS = [(page, words_of(command)[1:]) for page, command in SHOWN if words_of(command)[0] == "lightbus"]


def named(page: Path, words: list[str]) -> str:
    return f"{page.name}: {' '.join(words)}"


def find(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command of these words, and its arguments."""
    command: click.Command = main
    context = click.Context(main)
    while isinstance(command, click.Group) and words:
        inner = command.get_command(context, words[0])
        if inner is None:
            break
        command, words = inner, words[1:]
    return command, words


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the apps that the pages use."""
    (tmp_path / "billing").mkdir()
    (tmp_path / "billing" / "__init__.py").touch()
    (tmp_path / "billing" / "bus.py").write_text((EXAMPLES / "billing.py").read_text())
    for name in ("auth.py", "welcome.py", "accounts.py", "tutorial/kitchen.py"):
        (tmp_path / Path(name).name).write_text((EXAMPLES / name).read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTBUS_URL", f"sqlite:///{tmp_path}/bus.db")
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@pytest.mark.parametrize(("page", "words"), OURS, ids=[named(page, words) for page, words in OURS])
def test_a_command_of_lightbus_can_be_run_as_it_is_shown(page: Path, words: list[str], folder: Path) -> None:
    command, rest = find(words)
    targets = [word for word in rest if re.fullmatch(r"[\w.]+:\w+", word)]
    elsewhere = not set(targets) <= APPS
    if elsewhere:
        assert (ROOT / RUN_ELSEWHERE[page.name]).exists(), f"no app {targets[0]} here, nor another test of {page.name}"
    if elsewhere or command.name in ENDLESS:
        command.make_context("lightbus", list(rest))
        return
    done = CliRunner().invoke(main, words, input="n\n")
    # 1 is a result: no such dead letter, no consumer. 2 is an invalid command line.
    assert done.exit_code in (0, 1), done.output
    assert done.exception is None or isinstance(done.exception, SystemExit), done.output


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_that_the_text_names_exist(page: Path) -> None:
    for line in re.findall(r"`lightbus ([^`]+)`", page.read_text()):
        command, rest = find(line.split())
        known = {one for parameter in command.params for one in (*parameter.opts, *parameter.secondary_opts)}
        for word in rest:
            if word.startswith("--"):
                assert word.partition("=")[0] in known | {"--help", "--version"}, f"{page.name}: lightbus {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_command_has_a_prompt_by_which_it_is_found_here(page: Path) -> None:
    for block in CONSOLE.finditer(page.read_text()):
        if not COMMAND.search(block[1]):  # then all of it is output
            assert not re.findall(r"^(?:lightbus|pip|curl) .*", block[1], re.MULTILINE)


@pytest.mark.parametrize(("page", "command"), SHOWN, ids=[f"{page.name}: {command}" for page, command in SHOWN])
def test_each_other_command_sets_something_up_or_is_run_by_a_test(page: Path, command: str) -> None:
    program = words_of(command)[0]
    if program == "lightbus" or program in SETS_UP:
        return
    if program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words_of(command)[1] in targets
    elif program in PROGRAMS:
        assert (ROOT / RUN_ELSEWHERE[page.name]).exists()
    else:
        assert (ROOT / program).exists(), f"{page.name} shows {program}, which no test runs"
