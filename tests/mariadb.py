"""Private MariaDB servers for tests: each with its own folder and port, on 127.0.0.1 only.

with MariaDB() as server:
    sqlalchemy.create_engine(server.url(server.create_database()))
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pymysql

from tests.rabbitmq import free_port

INSTALL = (
    "MariaDB is not installed: `apt-get install mariadb-server` (Debian, Ubuntu) or `brew install mariadb`. "
    "No service needs to run: the tests start their own servers."
)

FOLDERS = (
    *filter(None, [os.environ.get("LIGHTBUS_MARIADB")]),  # another version than the installed one
    *os.get_exec_path(),
    "/usr/sbin",  # Debian's mariadbd: the PATH of a user has none of it.
    "/opt/homebrew/bin",
    "/usr/local/bin",
)

# A commit is written to the operating system at once, so it survives a kill of MariaDB; nothing waits for the disk.
OPTIONS = (
    "--bind-address=127.0.0.1",
    "--skip-grant-tables",  # any user, no password: as `trust` in tests/postgres.py
    "--skip-log-bin",
    "--innodb-flush-log-at-trx-commit=2",
    "--innodb-flush-method=nosync",
    "--innodb-stats-persistent=OFF",
    "--innodb-buffer-pool-size=64M",
    "--innodb-log-file-size=32M",
    "--performance-schema=OFF",
)


def find(program: str = "mariadbd") -> Path | None:
    """The path of a program of MariaDB's server, or None if it is not installed."""
    for folder in map(Path, FOLDERS):
        if os.access(folder / program, os.X_OK):
            return folder / program
    return None


class MariaDB:
    """A MariaDB server. `kill` and `start` keep its port and data; `close` deletes everything."""

    def __init__(self) -> None:
        self.port = free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="lightbus-mariadb-"))
        self.data = self.folder / "data"
        self.output = self.folder / "output"
        self.owner = os.getpid()
        self.process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._numbers = itertools.count(1)

    def url(self, database: str = "mysql", driver: str = "pymysql") -> str:
        """The URL of a database for SQLAlchemy."""
        return f"mariadb+{driver}://root@127.0.0.1:{self.port}/{database}"

    def create_database(self) -> str:
        """Create an empty database, and return its name."""
        name = f"test_{next(self._numbers)}"
        # Not the default: one that cannot store each character, and does not distinguish upper and lower case.
        self._execute(f"CREATE DATABASE {name} CHARACTER SET latin1 COLLATE latin1_swedish_ci")
        return name

    def drop_database(self, name: str) -> None:
        self._execute(f"DROP DATABASE IF EXISTS {name}")

    def start(self, timeout: float = 90) -> None:
        """Start the server, and return when it accepts clients.

        Raises:
            RuntimeError: MariaDB is not installed, or the server did not come up within `timeout` seconds.
        """
        server, install = find(), find("mariadb-install-db")
        if server is None or install is None:
            raise RuntimeError(INSTALL)
        atexit.register(self.close)
        as_user = "--user=root" if os.geteuid() == 0 else "--skip-symbolic-links"
        if not self.data.exists():
            done = self._spawn(str(install), "--no-defaults", f"--datadir={self.data}", "--skip-test-db", as_user)
            if done.wait():
                raise RuntimeError(f"mariadb-install-db failed. Its output ends:\n{self._tail()}")
        places = (f"--datadir={self.data}", f"--socket={self.folder}/socket", f"--pid-file={self.folder}/pid")
        self.process = self._spawn(str(server), "--no-defaults", *OPTIONS, *places, f"--port={self.port}", as_user)
        # Ends the server if this process is killed (SIGKILL), because its end of the pipe is closed then.
        pid = self.process.pid
        ends = (
            f"read -r _; kill -KILL {pid}; while kill -0 {pid} 2>/dev/null; do sleep 0.1; done; rm -rf '{self.folder}'"
        )
        self._guard = subprocess.Popen(["sh", "-c", ends], stdin=subprocess.PIPE, start_new_session=True)
        deadline = time.monotonic() + timeout
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"MariaDB did not start on port {self.port}. Its log ends:\n{self._tail()}")
            time.sleep(0.05)

    def answers(self) -> bool:
        """Whether the server accepts clients."""
        with contextlib.suppress(pymysql.err.OperationalError):
            self._execute("SELECT 1")
            return True
        return False

    def kill(self) -> None:
        """Stop like a crash: SIGKILL. Committed data is still there after `start`."""
        if self._guard is not None:
            self._guard.kill()
            self._guard.communicate()
            self._guard = None
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def close(self) -> None:
        """End the server, and delete its folder."""
        if os.getpid() != self.owner:  # a forked child of a test that runs the exit handlers
            return
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
        atexit.unregister(self.close)

    def __enter__(self) -> MariaDB:
        self.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _execute(self, statement: str) -> None:
        with pymysql.connect(host="127.0.0.1", port=self.port, user="root", connect_timeout=10) as connection:
            connection.cursor().execute(statement)

    def _tail(self) -> str:
        return self.output.read_text(errors="replace")[-3000:] if self.output.exists() else ""

    def _spawn(self, *command: str) -> subprocess.Popen[bytes]:
        with self.output.open("ab") as output:
            return subprocess.Popen(
                command,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C goes to the tests, which then stop the server.
            )
