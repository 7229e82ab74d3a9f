"""Private MariaDB servers for tests: each with its own folder and port, on 127.0.0.1 only.

with MariaDB() as server:
    sqlalchemy.create_engine(server.url(server.create_database()))
"""

from __future__ import annotations

import contextlib
import itertools
import os
from pathlib import Path

import pymysql

from tests.server import PrivateServer

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


class MariaDB(PrivateServer):
    """A MariaDB server. `kill` and `start` keep its port and data; `close` deletes everything."""

    def __init__(self) -> None:
        super().__init__("MariaDB")
        self.data = self.folder / "data"
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
        as_user = "--user=root" if os.geteuid() == 0 else "--skip-symbolic-links"
        # A server that starts removes the temporary tables of others from a folder that they share.
        both = (f"--datadir={self.data}", f"--tmpdir={self.folder}", as_user)
        if not self.data.exists():
            done = self.spawn(str(install), "--no-defaults", "--skip-test-db", *both)
            if done.wait():
                raise RuntimeError(f"mariadb-install-db failed. Its output ends:\n{self.tail()}")
        places = (f"--socket={self.folder}/socket", f"--pid-file={self.folder}/pid")
        command = (str(server), "--no-defaults", *OPTIONS, *both, *places, f"--port={self.port}")
        self.launch(*command, timeout=timeout)

    def answers(self) -> bool:
        # Not pymysql.err: Django imports it again as MySQLdb.err, and its classes are others then.
        with contextlib.suppress(pymysql.OperationalError):
            self._execute("SELECT 1")
            return True
        return False

    def _execute(self, statement: str) -> None:
        with pymysql.connect(host="127.0.0.1", port=self.port, user="root", connect_timeout=10) as connection:
            connection.cursor().execute(statement)
