"""Ctrl-C during the imports and the questions of a command: no traceback, exit code 130."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.patience import LIMIT
from tests.processes import LIGHTBUS, Program, environment

SCRIPT = (str(Path(sys.executable).parent / "lightbus"),)
STUCK = "import sys, time\nprint('importing', __name__, flush=True)\ntime.sleep(3600)\n"


@pytest.mark.parametrize("program", [SCRIPT, LIGHTBUS], ids=["script", "-m"])
@pytest.mark.parametrize(
    ("command", "module"),  # imported by the command, by the app, by a worker
    [("health", "click"), ("health", "msgspec"), ("health", "anyio"), ("worker", "kombu"), ("tail", "kombu")],
)
def test_ctrl_c_during_an_import_ends_the_command_quietly(
    tmp_path: Path, command: str, module: str, program: Sequence[str]
) -> None:
    tmp_path.joinpath(f"{module}.py").write_text(STUCK)
    extra = {"PYTHONPATH": os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])}
    with Program(command, "x:app", folder=tmp_path, url="memory://", program=program, extra=extra) as it:
        it.wait_for(f"importing {module}")
        assert it.end(signal.SIGINT) == 130
        assert it.lines == [f"importing {module}", "Interrupted."]


def test_ctrl_c_during_the_import_of_the_app_ends_the_command_quietly(tmp_path: Path) -> None:
    tmp_path.joinpath("stuck.py").write_text(STUCK)
    with Program("health", "stuck:app", folder=tmp_path, url="memory://") as it:
        it.wait_for("importing stuck")
        assert it.end(signal.SIGINT) == 130
        assert it.lines == ["importing stuck", "Interrupted."]


def test_an_ignored_sigint_stays_ignored(tmp_path: Path) -> None:
    """As in a background job of a script: `lightbus ... &` in sh."""
    code = "import signal; print('interruptible', signal.getsignal(signal.SIGINT) is not signal.SIG_IGN, flush=True)\n"
    tmp_path.joinpath("signals.py").write_text(code)
    ignore = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    program = (sys.executable, "-c", ignore, *LIGHTBUS)
    with Program("health", "signals:app", folder=tmp_path, url="memory://", program=program) as it:
        it.wait_for("interruptible False")


@pytest.mark.parametrize(("key", "status", "expected"), [(b"\x03", 130, "Interrupted."), (b"\x04", 1, "Aborted!")])
def test_ctrl_c_interrupts_a_question_and_ctrl_d_aborts_it(
    tmp_path: Path, key: bytes, status: int, expected: str
) -> None:
    terminal, end = os.openpty()
    with subprocess.Popen(
        [*LIGHTBUS, "new"],
        cwd=tmp_path,
        env=environment(),
        stdin=end,
        stdout=end,
        stderr=end,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(end, termios.TIOCSCTTY, 0),  # so that Ctrl-C sends a signal
    ) as process:
        os.close(end)
        shown = b""
        with contextlib.suppress(OSError):  # Linux raises EIO at the end
            while True:
                if select.select([terminal], [], [], 1)[0]:
                    if not (more := os.read(terminal, 1024)):
                        break
                    shown += more
                elif b"of the service?" in shown:  # repeated: Python loses a signal directly before it reads
                    os.write(terminal, key)
        assert process.wait(LIMIT) == status
    os.close(terminal)
    assert shown.decode().replace("\r", "").strip().endswith(expected)
    assert not list(tmp_path.iterdir())
