"""The private MariaDB servers of other tests: what they leave behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import need_mariadb
from tests.mariadb import INSTALL, MariaDB
from tests.patience import LIMIT
from tests.processes import ROOT, alive, wait_until

pytestmark = pytest.mark.mariadb


def test_close_ends_the_server_and_deletes_its_folder(mariadb_url: str) -> None:
    with MariaDB() as server:
        assert server.process is not None
        pid = server.process.pid
        assert alive(pid)
    assert not alive(pid)
    assert not server.folder.exists()


def test_a_killed_test_process_leaves_nothing_behind() -> None:
    need_mariadb()
    code = (
        "import os, signal; from tests.mariadb import MariaDB; server = MariaDB(); server.start(); "
        "print(server.folder, server.process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=LIMIT * 2, check=False
    )
    assert done.returncode == -9
    folder, pid = done.stdout.split()
    wait_until(lambda: not alive(int(pid)), "the server ends")
    wait_until(lambda: not Path(folder).exists(), "its folder is deleted")


@pytest.mark.parametrize(("ci", "outcome"), [("", "1 skipped"), ("true", "1 error")])
def test_without_mariadb_its_tests_are_skipped_loudly_and_fail_in_ci(ci: str, outcome: str) -> None:
    code = (
        "import sys, pytest; from tests import mariadb; mariadb.FOLDERS = (); "
        f"sys.exit(pytest.main(['-p', 'no:cacheprovider', '{Path(__file__)}', '-k', 'close_ends']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "CI": ci},
        capture_output=True,
        text=True,
        timeout=LIMIT * 2,
        check=False,
    )
    assert outcome in done.stdout
    assert INSTALL in done.stdout
    assert ("1 TESTS WERE SKIPPED WITHOUT MARIADB" in done.stdout) == (ci == "")
