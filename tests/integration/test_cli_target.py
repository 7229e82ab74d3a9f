"""What `MODULE:ATTR` may be, and what is said where it leads nowhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes import lightbus

FILES = {
    "billing/__init__.py": "",
    "billing/bus.py": "from lightbus import Lightbus\napp = Lightbus('billing')\nnumber = 1\n",
    "two.py": "from lightbus import Lightbus\none = Lightbus('one')\nother = Lightbus('other')\n",
    "none.py": "",
    "syntax.py": "x = 1\ndef (\n",
    "raises.py": "def connect():\n    raise ConnectionError('no database')\nconnect()\n",
    "needs.py": "import no_such_package\n",
    "leaves.py": "raise SystemExit(3)\n",
    "handler.py": "from lightbus import Lightbus\napp = Lightbus('a')\n@app.on('b.c')\ndef f(x: int): ...\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("biling.bus:app", "no module 'biling' in {folder} or among .* Did you mean 'billing.bus'?"),
        ("billing.buss:app", "no module 'billing.buss' in the package 'billing' .* Did you mean 'billing.bus'?"),
        ("billing.bus.app", "'billing.bus' is a module, not a package. Did you mean billing.bus:app?"),
        ("nothing_like_it:app", "Run this from the folder that your imports start from, or set PYTHONPATH."),
        ("billing.bus:ap", "module 'billing.bus' has no 'ap'. Did you mean billing.bus:app?"),
        ("billing.bus:number", "billing.bus:number is a int, not a Lightbus. Did you mean billing.bus:app?"),
        ("billing/bus.py:app", "is a file's path. Name the module, from the current folder: billing.bus:app"),
        ("two", "module 'two' has several apps. Name one: two:one or two:other"),
        ("none", "There is no Lightbus in {folder}/none.py: app = Lightbus('none') makes one."),
        (":app", "':app' is not MODULE:ATTR, as in billing.bus:app"),
    ],
)
def test_a_target_that_leads_nowhere_is_explained_in_one_line(folder: Path, target: str, message: str) -> None:
    done = lightbus("worker", target, folder=folder, url="memory://")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
    for part in message.format(folder=folder).split(" .* "):
        assert part in done.stderr


@pytest.mark.parametrize(
    ("target", "shown", "message"),
    [
        ("syntax", ["syntax.py", "line 2"], "SyntaxError: invalid syntax (line 2 of {folder}/syntax.py)"),
        ("raises", ["line 3, in <module>", "line 2, in connect"], "ConnectionError: no database"),
        ("needs", ["line 1"], "it needs 'no_such_package', which is not installed here"),
        ("leaves", ["line 1"], "SystemExit: 3"),
        ("handler:app", ["line 3"], "InvalidHandler: handler 'f' of app 'a'"),
    ],
)
def test_a_module_that_fails_is_shown_where_without_the_machinery_around_it(
    folder: Path, target: str, shown: list[str], message: str
) -> None:
    done = lightbus("publish", target, "a.b", folder=folder, url="memory://")
    assert done.returncode == 2
    *trace, last = done.stderr.splitlines()
    assert last.startswith("Error: module ")
    assert message.format(folder=folder) in last
    for part in shown:
        assert part in "\n".join(trace)
    assert "importlib" not in done.stderr
    assert "lightbus/cli" not in done.stderr


@pytest.mark.parametrize("processes", ["1", "3"])
def test_several_processes_say_a_bad_target_once(folder: Path, processes: str) -> None:
    done = lightbus("worker", "biling.bus:app", "--processes", processes, folder=folder, url="memory://")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_a_module_with_one_app_needs_no_attribute(folder: Path) -> None:
    done = lightbus("publish", "billing.bus", "nothing", folder=folder, url="memory://")
    assert "event 'nothing' is not declared on app 'billing'" in done.stderr


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis://localhost", "redis:// cannot carry an event bus"),
        ("amqp://me:geheim@host:port/", "is not a broker URL"),
        ("nonsense", "is not a broker URL"),
    ],
)
def test_a_url_that_cannot_be_used_is_explained_in_one_line(folder: Path, url: str, message: str) -> None:
    done = lightbus("worker", "billing.bus:app", folder=folder, url=url)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert "geheim" not in done.stderr


@pytest.mark.parametrize("command", [[], ["worker"], ["publish"], ["unbind"]])
def test_every_command_explains_itself_with_an_example(folder: Path, command: list[str]) -> None:
    done = lightbus(*command, "--help", folder=folder, url="memory://")
    assert done.returncode == 0
    assert "billing.bus:app" in done.stdout
    assert "xit codes:" in done.stdout


def test_a_mistyped_command_is_suggested(folder: Path) -> None:
    done = lightbus("publsh", folder=folder, url="memory://")
    assert done.returncode == 2
    assert "No such command 'publsh'. Did you mean 'publish'?" in done.stderr


def test_the_version_is_printed(folder: Path) -> None:
    from lightbus import __version__

    assert lightbus("--version", folder=folder, url="memory://").stdout == f"lightbus {__version__}\n"
