"""Private PostgreSQL clusters for tests: each with its own folder and port, on 127.0.0.1 only.

with Postgres() as cluster:
    psycopg.connect(cluster.url(cluster.create_database(), driver=None))
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psycopg

from tests.processes import alive
from tests.server import PrivateServer

INSTALL = (
    "PostgreSQL is not installed: `apt-get install postgresql` (Debian, Ubuntu) or `brew install postgresql`. "
    "No service needs to run: the tests start their own clusters."
)

FOLDERS = (
    *filter(None, [os.environ.get("LIGHTBUS_POSTGRES")]),  # another version than the installed one
    *os.get_exec_path(),
    *sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")), reverse=True),  # Debian's PATH has none of them.
    "/opt/homebrew/bin",
    "/usr/local/bin",
)

OS_USER = "postgres"
"""Who runs the cluster if root runs the tests, since PostgreSQL refuses root. Debian's package creates this user."""

CONFIG = """\
listen_addresses = '127.0.0.1'
unix_socket_directories = ''
max_connections = 200
shared_buffers = 32MB
dynamic_shared_memory_type = mmap
jit = off
timezone = 'UTC'
"""

# Not synchronous_commit = off: the last commits would then be in the memory of PostgreSQL, and a kill would lose them.
WITHOUT_DISK = """\
fsync = off
full_page_writes = off
"""


def find() -> Path | None:
    """The folder with PostgreSQL's programs, or None if PostgreSQL is not installed."""
    for folder in map(Path, FOLDERS):
        if all(os.access(folder / program, os.X_OK) for program in ("initdb", "postgres")):
            return folder
    return None


class Postgres(PrivateServer):
    """A PostgreSQL cluster. `stop`, `kill` and `start` keep its port and data; `close` deletes everything."""

    def __init__(self, config: str = "", *, durable: bool = False) -> None:
        """`config` is added to postgresql.conf.

        By default, PostgreSQL does not wait for the disk. Committed data survives `kill` nevertheless, because the
        operating system has it then; only a crash of the operating system would lose it. `durable` waits for the disk,
        as PostgreSQL does by default: for tests that measure it.
        """
        super().__init__("PostgreSQL")
        self.config = CONFIG + f"port = {self.port}\n" + ("" if durable else WITHOUT_DISK) + config
        self.data = self.folder / "data"
        self._numbers = itertools.count(1)

    def url(self, database: str = "postgres", driver: str | None = "psycopg") -> str:
        """The URL of a database for SQLAlchemy; without a driver, for psycopg.connect and asyncpg.connect."""
        scheme = f"postgresql+{driver}" if driver else "postgresql"
        return f"{scheme}://postgres@127.0.0.1:{self.port}/{database}"

    def create_database(self) -> str:
        """Create an empty database, and return its name."""
        name = f"test_{next(self._numbers)}"
        self._execute(f"CREATE DATABASE {name} TEMPLATE template0")
        return name

    def drop_database(self, name: str) -> None:
        """Delete a database; its connections are closed."""
        self._execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def start(self, timeout: float = 90) -> None:
        """Start the cluster, and return when it accepts clients.

        Raises:
            RuntimeError: PostgreSQL is not installed or has no user to run as, or the cluster did not come up within
                `timeout` seconds.
        """
        programs = find()
        if programs is None:
            raise RuntimeError(INSTALL)
        if not self.data.exists():
            self._create(programs)
        # SIGQUIT, because the processes of the cluster are in separate sessions: only the first one can end them all.
        lock = self.data / "postmaster.pid"
        ends = (
            "kill -QUIT $pid; n=0; "
            f"while [ -e '{lock}' ] && [ $n -lt 300 ]; do sleep 0.1; n=$((n + 1)); done; "
            f"if [ -e '{lock}' ]; then kill -9 $pid; fi"
        )
        self.launch(str(programs / "postgres"), "-D", str(self.data), timeout=timeout, ends=ends)

    def answers(self) -> bool:
        with contextlib.suppress(psycopg.OperationalError):
            self._execute("SELECT 1")
            return True
        return False

    def stop(self) -> None:
        """Stop gracefully, and keep the data. Clients get an error (57P01, admin_shutdown)."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """Stop like a crash: SIGKILL to all processes of the cluster. Committed data is still there after `start`."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Stop and start."""
        self.stop()
        self.start()

    def processes(self) -> list[int]:
        """The ids of the cluster's processes: the first one, and its children."""
        if self.process is None or self.process.poll() is not None:
            return []
        return [self.process.pid, *children_of(self.process.pid)]

    def end(self) -> None:
        self._end(signal.SIGQUIT)  # at once, but it deletes its shared memory

    def _execute(self, command: str) -> None:
        with psycopg.connect(self.url(driver=None), autocommit=True, connect_timeout=30) as connection:
            connection.execute(command.encode())

    def _create(self, programs: Path) -> None:
        if os.geteuid() == 0:
            os.chown(self.folder, *_ids())
        options = ("--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C", "--no-sync")
        done = self.spawn(str(programs / "initdb"), "-D", str(self.data), *options)
        if done.wait():
            raise RuntimeError(f"PostgreSQL could not create a cluster. The output of initdb ends:\n{self.tail()}")
        with (self.data / "postgresql.conf").open("a") as file:
            file.write(self.config)

    def spawn(self, *command: str, **options: Any) -> subprocess.Popen[bytes]:
        if os.geteuid() == 0:
            user, group = _ids()
            options |= {"user": user, "group": group, "extra_groups": []}
        options["env"] = {key: value for key, value in os.environ.items() if not key.startswith("PG")}
        return super().spawn(*command, **options)

    def _end(self, how: signal.Signals) -> None:
        self.stop_guard()
        process, self.process = self.process, None
        if process is None:
            return
        if how is not signal.SIGKILL:
            process.send_signal(how)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
                return
        self._kill(process)

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        # Stopped, it starts no more children, and does not react when they end.
        process.send_signal(signal.SIGSTOP)
        with contextlib.suppress(ChildProcessError):  # It has ended by itself.
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        children = children_of(process.pid)
        for pid in (process.pid, *children):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + 30
        while any(map(alive, children)):  # PostgreSQL does not start while one of them uses its shared memory.
            if time.monotonic() > deadline:
                raise TimeoutError(f"PostgreSQL's processes {children} did not end within 30 s of SIGKILL")
            time.sleep(0.01)
        # Only the next start would delete the shared memory, and there may be none.
        with contextlib.suppress(OSError, IndexError):
            memory = (self.data / "postmaster.pid").read_text().splitlines()[6].split()[1]
            subprocess.run(["ipcrm", "-m", memory], capture_output=True, check=False)


def children_of(parent: int) -> list[int]:
    """The ids of a process's children, from /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # It has ended.
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(stat.parent.name))
    return found


def _ids() -> tuple[int, int]:
    """The user and the group that run PostgreSQL if root runs the tests."""
    try:
        user = pwd.getpwnam(OS_USER)
    except KeyError:
        raise RuntimeError(
            f"PostgreSQL does not run as root, and there is no user {OS_USER!r} to run it: "
            f"`useradd --system {OS_USER}`, or run the tests as another user."
        ) from None
    return user.pw_uid, user.pw_gid
