"""docs/howto/seeing.md and command-line.md show the real output, and their shell completions work."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

from lightbus.cli import COMMANDS, main
from lightbus.tail import HELD, QUEUE_LIMIT
from tests.processes import LIMIT, Program, environment, lightbus

ROOT = Path(__file__).parents[2]
HOWTO = ROOT / "docs" / "howto"
BLOCKS = dict(
    re.findall(r"^```console\n\$ lightbus ([^\n]+)\n(.*?)^```$", (HOWTO / "seeing.md").read_text(), re.M | re.S)
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "billing").mkdir()
    (tmp_path / "billing" / "__init__.py").touch()
    (tmp_path / "billing" / "bus.py").write_text((ROOT / "docs" / "examples" / "billing.py").read_text())
    return tmp_path


# --- what is shown ----------------------------------------------------------------------------


def matches(shown: str, printed: str) -> bool:
    """A line `...` stands for any lines."""
    pattern = r"(?:.*\n)+?".join(map(re.escape, shown.split("...\n")))
    return re.fullmatch(pattern, printed) is not None


@pytest.mark.parametrize("command", [one for one in BLOCKS if not one.startswith("tail") and BLOCKS[one]])
def test_the_page_shows_the_output(folder: Path, command: str) -> None:
    done = lightbus(*shlex.split(command), folder=folder, url="amqp://127.0.0.1:1/")
    assert (done.returncode, done.stderr) == (0, "")
    assert matches(BLOCKS[command], done.stdout), done.stdout


def plain(text: str) -> str:
    """The text without ids and times, which differ each time."""
    text = re.sub(r"SQLite file \S+\)", "SQLite file)", text)
    text = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "ID", text)
    return re.sub(r"(\d{4}-\d\d-\d\d )?\d\d:\d\d:\d\d\.\d{3}", "TIME", text)


def test_the_page_shows_the_output_of_tail(folder: Path) -> None:
    (command,) = [one for one in BLOCKS if one.startswith("tail")]
    url = f"sqlite:///{folder}/bus.db"
    with Program(*shlex.split(command), folder=folder, url=url) as one:
        one.wait_for("Listening")
        for arguments in (["invoice.paid", "invoice_id=i-1", "amount=9.50"], ["invoice.due", "invoice_id=i-1"]):
            assert lightbus("publish", "billing.bus:app", *arguments, folder=folder, url=url).returncode == 0
            one.wait_for('"invoice_id": "i-1"')
        one.end(signal.SIGINT)
        assert [plain(line) for line in one.lines[:-1]] == plain(BLOCKS[command]).splitlines()


def test_the_limits_on_the_page_are_the_codes() -> None:
    page = " ".join((HOWTO / "seeing.md").read_text().split())
    assert QUEUE_LIMIT == HELD
    assert f"The queue holds {QUEUE_LIMIT:,} events, and so does the command" in page


# --- help -------------------------------------------------------------------------------------


def every_command() -> list[tuple[str, click.Command, click.Context]]:
    found: list[tuple[str, click.Command, click.Context]] = []

    def walk(command: click.Command, path: str, parent: click.Context | None) -> None:
        context = click.Context(command, info_name=path.rpartition(" ")[2], parent=parent)
        found.append((path, command, context))
        if isinstance(command, click.Group):
            for name in command.list_commands(context):
                inner = command.get_command(context, name)
                assert inner is not None
                walk(inner, f"{path} {name}", context)

    walk(main, "lightbus", None)
    return found


@pytest.mark.parametrize(("path", "command", "context"), every_command(), ids=[one[0] for one in every_command()])
def test_the_examples_in_every_help_text_are_valid(path: str, command: click.Command, context: click.Context) -> None:
    text = command.get_help(context)
    examples = re.findall(
        r"^ +(?:\w+ \S+ \| )?(lightbus (?:.|\\\n)*?)(?: {3,}\(.*)?$", command.epilog or "", re.MULTILINE
    )
    mine = [one for one in examples if one.startswith(path)]
    if not isinstance(command, click.Group):
        assert "xit codes:" in text, f"{path} --help has no exit codes"
    if command is not main:
        assert mine, f"{path} --help has no example"
    for example in examples:
        words = shlex.split(example, comments=True)
        ends = [number for number, word in enumerate(words) if word in ("|", ">", ">>", "||", "&&")]
        words = words[1 : ends[0]] if ends else words[1:]
        inner: click.Command = main
        outer = click.Context(main, info_name="lightbus")
        while isinstance(inner, click.Group) and (next_one := inner.get_command(outer, words[0])) is not None:
            inner, words = next_one, words[1:]
        inner.make_context("example", words, parent=outer)  # parses the options


def test_python_dash_m_is_the_same_command(folder: Path) -> None:
    done = lightbus("--help", folder=folder, url="memory://")
    assert done.stdout.startswith("Usage: lightbus [OPTIONS] COMMAND [ARGS]...")
    assert set(COMMANDS) <= set(re.findall(r"^  (\w+)  ", done.stdout, re.MULTILINE))


# --- completion -------------------------------------------------------------------------------

COMPLETED = {"lightbus to": "topology", "lightbus topology per": "permissions", "lightbus topology show --li": "--live"}


@pytest.fixture
def path_with_lightbus(tmp_path: Path) -> str:
    """A PATH with this `lightbus`."""
    script = tmp_path / "bin" / "lightbus"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m lightbus "$@"\n')
    script.chmod(0o755)
    return f"{script.parent}:{os.environ['PATH']}"


def setup_line(shell: str) -> str:
    """The line of the page for the shell's configuration file."""
    page = (HOWTO / "command-line.md").read_text()
    row = re.search(rf"^\| {shell}.*? \| `(.+?)` \|", page, re.MULTILINE)
    assert row is not None
    return row[1].replace("\\|", "|")


BASH = """
<setup>
COMP_WORDS=(<words>); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_lightbus_completion lightbus
printf '%s\\n' "${COMPREPLY[@]}"
"""
FISH = "<setup>; complete --do-complete '<words>'"
# Simulates the Tab key. zsh's function that shows completions is replaced by one that prints them.
ZSH = """
autoload -Uz compinit; compinit -u -d <folder>/dump
<setup>
_describe() { print -l -- "${(@P)3%%:*}"; }
compadd() { print -l -- "${(@P)@[-1]}"; }
words=(<words>); CURRENT=${#words}
_lightbus_completion
"""


@pytest.mark.parametrize("words", COMPLETED)
@pytest.mark.parametrize(
    ("shell", "script"), [("bash", BASH), ("fish", FISH), ("zsh", ZSH)], ids=["bash", "fish", "zsh"]
)
def test_a_shell_completes_with_the_line_of_the_page(
    tmp_path: Path, path_with_lightbus: str, shell: str, script: str, words: str
) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    options = {"bash": ["--norc"], "fish": ["--no-config"], "zsh": ["-f"]}[shell]
    text = script.replace("<setup>", setup_line(shell)).replace("<words>", words).replace("<folder>", str(tmp_path))
    done = subprocess.run(
        [shell, *options, "-c", text],
        env=environment({"PATH": path_with_lightbus, "HOME": str(tmp_path)}),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert COMPLETED[words] in [line.partition("\t")[0] for line in done.stdout.splitlines()], done.stdout + done.stderr


# --- colors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["doctor", "billing.bus:app"], ["worker", "billing.bus:app"]], ids=str)
@pytest.mark.parametrize(
    ("extra", "colored"),
    [({"FORCE_COLOR": "1"}, True), ({}, False), ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False)],
    ids=str,
)
def test_the_environment_controls_colors(
    folder: Path, command: list[str], extra: dict[str, str], colored: bool
) -> None:
    """The colors of output, of the banner and of logs."""
    url = "amqp://127.0.0.1:1/" if command[0] == "doctor" else f"sqlite:///{folder}/bus.db"
    with Program(*command, folder=folder, url=url, extra=extra) as one:
        one.wait_for("To check an app, too|broker|Ready")
        one.end(signal.SIGTERM)
        assert ("\x1b[" in one.output) is colored, one.output
