"""SIGTERM during the imports of a command: it exits at once. Also as process 1, for which the kernel ignores it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.integration.test_interrupt import SCRIPT, STUCK
from tests.patience import LIMIT, wait_until, within
from tests.processes import LIGHTBUS, Program, environment

CONTAINER = ("unshare", "--pid", "--fork", "--kill-child")
"""Runs a program as process 1 of a PID namespace, as in a container."""

APP = "from lightbus import Lightbus\napp = Lightbus('billing')\n@app.on('order.placed')\ndef book(order): ...\n"


@pytest.fixture(scope="session")
def container() -> tuple[str, ...]:
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare, to make a PID namespace with")
    if subprocess.run([*CONTAINER, "true"], capture_output=True, check=False, timeout=LIMIT).returncode:
        pytest.skip("this user may not make a PID namespace")
    return CONTAINER


def _only_child(pid: int) -> int:
    found: list[int] = []

    def look() -> bool:
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                    found.append(int(stat.parent.name))
            except (FileNotFoundError, ProcessLookupError):
                continue
        return bool(found)

    wait_until(look, f"process {pid} has a child")
    return found[0]


def _end_inside(it: Program, number: signal.Signals) -> int:
    os.kill(_only_child(it.process.pid), number)
    return it.end()


@pytest.mark.parametrize("program", [SCRIPT, LIGHTBUS], ids=["script", "-m"])
@pytest.mark.parametrize("module", ["click", "kombu", "stuck"])
def test_as_process_1_a_worker_exits_during_its_imports(
    tmp_path: Path, module: str, program: tuple[str, ...], container: tuple[str, ...]
) -> None:
    tmp_path.joinpath(f"{module}.py").write_text(STUCK)
    extra = {"PYTHONPATH": os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])}
    command = ("worker", "stuck:app")
    with Program(*command, folder=tmp_path, url="memory://", program=(*container, *program), extra=extra) as it:
        it.wait_for(f"importing {module}")
        assert _end_inside(it, signal.SIGTERM) == 128 + signal.SIGTERM
        assert it.lines == [f"importing {module}"]


@pytest.mark.parametrize("command", [("tail", "stuck:app"), ("dead", "list", "stuck:app"), ("health", "stuck:app")])
def test_as_process_1_other_commands_exit_too(
    tmp_path: Path, command: tuple[str, ...], container: tuple[str, ...]
) -> None:
    tmp_path.joinpath("stuck.py").write_text(STUCK)
    with Program(*command, folder=tmp_path, url="memory://", program=(*container, *LIGHTBUS)) as it:
        it.wait_for("importing stuck")
        assert _end_inside(it, signal.SIGTERM) == 128 + signal.SIGTERM


def test_as_process_1_ctrl_c_ends_imports_quietly(tmp_path: Path, container: tuple[str, ...]) -> None:
    tmp_path.joinpath("stuck.py").write_text(STUCK)
    with Program("worker", "stuck:app", folder=tmp_path, url="memory://", program=(*container, *LIGHTBUS)) as it:
        it.wait_for("importing stuck")
        assert _end_inside(it, signal.SIGINT) == 130
        assert it.lines == ["importing stuck", "Interrupted."]


def test_as_process_1_a_ready_worker_stops_gracefully(tmp_path: Path, container: tuple[str, ...]) -> None:
    tmp_path.joinpath("billing.py").write_text(APP)
    with Program("worker", "billing:app", folder=tmp_path, url="memory://", program=(*container, *LIGHTBUS)) as it:
        it.wait_for("Ready")
        assert _end_inside(it, signal.SIGTERM) == 0
        assert "Stopping (SIGTERM)" in it.output


def test_the_kernel_ends_any_other_process_during_its_imports(tmp_path: Path) -> None:
    tmp_path.joinpath("stuck.py").write_text(STUCK)
    with Program("worker", "stuck:app", folder=tmp_path, url="memory://") as it:
        it.wait_for("importing stuck")
        assert it.end(signal.SIGTERM) == -signal.SIGTERM


@pytest.mark.parametrize("options", [("--processes", "2"), ("--reload",)])
@pytest.mark.parametrize("first", [False, True], ids=["", "process 1"])
def test_a_supervisor_does_not_wait_for_workers_that_are_importing(
    tmp_path: Path, options: tuple[str, ...], first: bool, request: pytest.FixtureRequest
) -> None:
    tmp_path.joinpath("stuck.py").write_text(STUCK)
    around: tuple[str, ...] = request.getfixturevalue("container") if first else ()
    url = f"sqlite:///{tmp_path}/bus.db"
    with Program("worker", "stuck:app", *options, folder=tmp_path, url=url, program=(*around, *LIGHTBUS)) as it:
        it.wait_for("importing stuck")
        with within(10):  # of 30 s of grace, and 20 s more
            assert (_end_inside(it, signal.SIGTERM) if first else it.end(signal.SIGTERM)) == 0


def test_a_change_restarts_a_worker_that_is_importing(tmp_path: Path) -> None:
    stuck = tmp_path / "billing.py"
    stuck.write_text(STUCK)
    with Program("worker", "billing:app", "--reload", folder=tmp_path, url=f"sqlite:///{tmp_path}/bus.db") as it:
        it.wait_for("importing billing")
        stuck.write_text(APP)
        with within(10):
            it.wait_for("Ready")
        assert it.end(signal.SIGTERM) == 0
