"""`MODULE:ATTR`: valid forms, and the errors for invalid ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import LIMIT
from tests.processes import LIGHTBUS, ROOT, Program, environment, lightbus

FILES = {
    "billing/__init__.py": "",
    "billing/bus.py": "from lightbus import Lightbus\napp = Lightbus('billing')\nnumber = 1\n",
    "two.py": "from lightbus import Lightbus\none = Lightbus('one')\nother = Lightbus('other')\n",
    "none.py": "",
    "syntax.py": "x = 1\ndef (\n",
    "raises.py": "def connect():\n    raise ConnectionError('no database')\nconnect()\n",
    "needs.py": "import no_such_package\n",
    "leaves.py": "raise SystemExit(3)\n",
    "library.py": "import json; json.loads('')\n",
    "chained.py": "import os\ntry: os.environ['DATABASE']\nexcept KeyError: raise RuntimeError('no DATABASE')\n",
    "deep.py": "from handler import app\n",
    "includes.py": "from lightbus import Lightbus\napp = Lightbus('includes', include=['raises'])\n",
    "misspells.py": "from lightbus import Lightbus\napp = Lightbus('misspells', include=['raise'])\n",
    "redeclares.py": "from lightbus import Lightbus\napp = Lightbus('redeclares', include=['handler'])\n",
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
        ("nothing_like_it:app", "Run the command from the root of your code, or set PYTHONPATH."),
        ("billing.bus:ap", "module 'billing.bus' has no 'ap'. Did you mean billing.bus:app?"),
        ("billing.bus:number", "billing.bus:number is of type int, not a Lightbus. Did you mean billing.bus:app?"),
        ("billing/bus.py:app", "is a file path. Use the module name, from the current directory: billing.bus:app"),
        ("two", "module 'two' has several apps. Name one: two:one or two:other"),
        ("none", "There is no Lightbus app in {folder}/none.py: app = Lightbus('none') creates one."),
        (":app", "':app' is not MODULE:ATTR, as in billing.bus:app"),
    ],
)
def test_an_invalid_target_is_explained_in_one_line(folder: Path, target: str, message: str) -> None:
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
        ("syntax", ["syntax.py", "line 2", "SyntaxError: invalid syntax"], "see above."),
        ("raises", ["line 3, in <module>", "line 2, in connect", "ConnectionError: no database"], "see above."),
        ("library", ["line 1, in <module>", "JSONDecodeError: Expecting value"], "see above."),
        ("chained", ["KeyError: 'DATABASE'", "line 3", "RuntimeError: no DATABASE"], "see above."),
        ("leaves", ["line 1", "SystemExit: 3"], "see above."),
    ],
)
def test_a_failing_import_shows_only_the_frames_of_the_users_code(
    folder: Path, target: str, shown: list[str], message: str
) -> None:
    done = lightbus("publish", target, "a.b", folder=folder, url="memory://")
    assert done.returncode == 2
    *trace, last = done.stderr.splitlines()
    assert last == f"Error: module {target!r} cannot be imported: {message}"  # without a repetition of the lines above
    for part in shown:
        assert part in "\n".join(trace)
    for line in trace:
        if line.startswith("  File "):
            assert f'"{folder}/' in line


def test_a_missing_dependency_names_the_python_executable(folder: Path) -> None:
    done = lightbus("publish", "needs", "a.b", folder=folder, url="memory://")
    assert done.returncode == 2
    *trace, last = done.stderr.splitlines()
    assert trace[-1] == "ModuleNotFoundError: No module named 'no_such_package'"
    assert last.startswith(
        f"Error: module 'needs' cannot be imported by {sys.executable}. Install its dependencies there"
    )


def test_a_failing_import_of_an_included_module_is_shown_with_its_traceback(folder: Path) -> None:
    for command in ("worker", "events", "schema", "doctor"):
        done = lightbus(command, "includes", folder=folder, url="memory://")
        assert done.returncode == 2
        *trace, last = done.stderr.splitlines()
        assert trace[-1] == "ConnectionError: no database"
        assert [line for line in trace if line.startswith("  File ")] == [
            f'  File "{folder}/raises.py", line 3, in <module>',
            f'  File "{folder}/raises.py", line 2, in connect',
        ]
        assert last == (
            "Error: app 'includes': include='raises' cannot be imported: raises.py:2: ConnectionError: no database"
        )


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("misspells", "app 'misspells': include='raise': no module 'raise' in {folder} or among "),
        ("redeclares", "include='handler' cannot be imported: handler.py:3: InvalidHandler: handler 'f' of app 'a'"),
    ],
)
def test_an_invalid_included_module_is_explained_in_one_line(folder: Path, target: str, message: str) -> None:
    done = lightbus("worker", target, folder=folder, url="memory://")
    assert done.returncode == 2
    assert message.format(folder=folder) in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("target", "place"), [("handler:app", "handler.py:3"), ("deep", "handler.py:3")])
def test_an_error_in_a_declaration_is_shown_once_with_its_place(folder: Path, target: str, place: str) -> None:
    done = lightbus("worker", target, folder=folder, url="memory://")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"Error: {place}: InvalidHandler: handler 'f' of app 'a': the parameter 'x: int' ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("processes", ["1", "3"])
def test_several_processes_report_an_invalid_target_once(folder: Path, processes: str) -> None:
    done = lightbus("worker", "biling.bus:app", "--processes", processes, folder=folder, url="memory://")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_the_current_folder_comes_before_installed_packages(folder: Path, tmp_path: Path) -> None:
    for name in ("billing", "shop"):  # two services, each with a package `tests`, installed editable side by side
        path = tmp_path / name / "tests" / "elsewhere.py"
        path.parent.mkdir(parents=True)
        path.parent.joinpath("__init__.py").touch()
        path.write_text(f"from lightbus import Lightbus\napp = Lightbus('{name}')\n")
    found = os.pathsep.join([str(tmp_path / "billing"), str(tmp_path / "shop"), str(ROOT)])
    # `python -m` puts the folder first, unless -P is given. The script `lightbus` does not.
    extra = {"PYTHONPATH": found, "PYTHONSAFEPATH": "1"}
    done = lightbus("publish", "tests.elsewhere:app", "a.b", folder=tmp_path / "shop", url="memory://", extra=extra)
    assert "is not declared on app 'shop'" in done.stderr


SCRIPT = (str(Path(sys.executable).parent / "lightbus"),)
SHADOWS = ("email", "queue", "token", "random", "select", "signal", "logging", "json", "calendar", "tempfile", "ssl")


@pytest.mark.parametrize("command", [LIGHTBUS, SCRIPT])
def test_files_do_not_replace_modules_of_the_standard_library(folder: Path, command: tuple[str, ...]) -> None:
    for name in SHADOWS:
        (folder / f"{name}.py").write_text("raise SystemExit('this is not the standard library')\n")
    imports = "\n".join(f"import {name}" for name in (*SHADOWS, "email.message", "yaml_of_mine"))
    (folder / "shadowed.py").write_text(
        f"{imports}\nfrom billing.bus import app\napp.event('invoice.paid')(type('P', (), {{}}))\n"
    )
    (folder / "yaml_of_mine.py").touch()
    done = subprocess.run(
        [*command, "publish", "shadowed:app", "invoice.paid"],
        cwd=folder,
        env=environment({"LIGHTBUS_URL": "memory://"}),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Published invoice.paid")


@pytest.mark.parametrize("options", ["--processes 2", "--reload"])
def test_files_do_not_replace_standard_modules_in_supervised_workers(folder: Path, options: str) -> None:
    for name in (*SHADOWS, "types"):
        (folder / f"{name}.py").write_text("raise SystemExit('this is not the standard library')\n")
    target = ("worker", "billing.bus:app", *options.split())
    with Program(*target, folder=folder, url=f"sqlite:///{folder}/bus.db", program=SCRIPT) as worker:
        worker.wait_for("Ready")
        assert worker.end(signal.SIGTERM) == 0


@pytest.mark.parametrize(("name", "file"), [("queue", "queue.py"), ("calendar", "calendar/__init__.py")])
def test_an_app_in_a_module_with_the_name_of_a_standard_one_is_refused(folder: Path, name: str, file: str) -> None:
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text("from lightbus import Lightbus\napp = Lightbus('billing')\n")
    done = lightbus("publish", f"{name}:app", "a.b", folder=folder, url="memory://")
    assert done.returncode == 2
    assert done.stderr == (
        f"Error: {name!r} is a module of Python's standard library, which takes precedence. Rename "
        f"{file.partition('/')[0]} in {folder}.\n"
    )


def test_a_module_with_one_app_needs_no_attribute(folder: Path) -> None:
    done = lightbus("publish", "billing.bus", "nothing", folder=folder, url="memory://")
    assert "event 'nothing' is not declared on app 'billing'" in done.stderr


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis://localhost", "redis:// is not supported"),
        ("amqp://me:geheim@host:port/", "is not a broker URL"),
        ("nonsense", "is not a broker URL"),
    ],
)
def test_an_unusable_url_is_explained_in_one_line(folder: Path, url: str, message: str) -> None:
    done = lightbus("worker", "billing.bus:app", folder=folder, url=url)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert "geheim" not in done.stderr


def test_several_processes_report_an_unusable_url_once(folder: Path) -> None:
    done = lightbus("worker", "billing.bus:app", "--processes", "2", folder=folder, url="nonsense")
    assert done.returncode == 1
    assert "is not a broker URL" in done.stderr
    assert "starting another one" not in done.stderr


@pytest.mark.parametrize("command", [[], ["worker"], ["publish"], ["unbind"]])
def test_the_help_of_every_command_has_an_example(folder: Path, command: list[str]) -> None:
    done = lightbus(*command, "--help", folder=folder, url="memory://")
    assert done.returncode == 0
    assert "billing.bus:app" in done.stdout
    assert "xit codes:" in done.stdout


def test_a_misspelt_command_gets_a_suggestion(folder: Path) -> None:
    done = lightbus("publsh", folder=folder, url="memory://")
    assert done.returncode == 2
    assert "No such command 'publsh'. Did you mean 'publish'?" in done.stderr


@pytest.mark.parametrize(
    ("word", "hint"),
    [("lst", "Did you mean 'list'?"), ("billing.bus:app", "There are: list, purge, retry, show.")],
)
def test_a_misspelt_subcommand_gets_a_suggestion(folder: Path, word: str, hint: str) -> None:
    done = lightbus("dead", word, folder=folder, url="memory://")
    assert done.returncode == 2
    assert f"No such command {word!r}. {hint}" in done.stderr


def test_the_version_is_printed(folder: Path) -> None:
    from lightbus import __version__

    assert lightbus("--version", folder=folder, url="memory://").stdout == f"lightbus {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("worker", "amqp://ann:s3cr3t@rabbit/"),
        ("worker", "ann:s3cr3t@rabbit"),
        ("dead", "list", "amqp:/ann:s3cr3t@rabbit/"),
        ("doctor", "amqp:/ann:s3cr3t@rabbit/"),
        ("doctor", "amqp://ann:s3cr3t@one,ann:s3cr3t@two/"),
        ("tail", "amqp:ann:s3cr3t@rabbit/"),
        ("tail", "user.*", "amqp://ann:s3cr3t@rabbit/"),
    ],
    ids=" ".join,
)
def test_a_misplaced_or_invalid_url_is_explained_without_its_password(folder: Path, arguments: tuple[str, ...]) -> None:
    done = lightbus(*arguments, folder=folder, url="memory://")
    assert done.returncode in (1, 2)
    assert "URL" in done.stderr
    assert "Traceback" not in done.stderr
    assert "s3cr3t" not in done.stdout + done.stderr
