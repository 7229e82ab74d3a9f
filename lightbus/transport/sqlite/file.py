"""The SQLite file: create, open, check, share with other processes, and keep intact in a fork."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Generator, Iterator
from pathlib import Path
from urllib.parse import quote

import platformdirs
from amqp import exceptions as amqp_errors

from lightbus import errors
from lightbus.transport.kombu_calls import amqp_error
from lightbus.transport.sqlite.place import Place, forget_memory_of_parent
from lightbus.transport.sqlite.schema import (
    APPLICATION_ID,
    LOCK_TIMEOUT,
    PREDECLARED,
    SCHEMA,
    SCHEMA_VERSION,
)
from lightbus.transport.sqlite.tables import encode_arguments
from lightbus.transport.sqlite.wake_pipe import wake_pipes

_create_lock = threading.Lock()


def _open_file(place: Place) -> sqlite3.Connection:
    """Open the file. Create it if it does not exist.

    Raises:
        BrokerFileError: the file cannot be used. It is unchanged.
    """
    path = place.path
    try:
        _create_file(path)
        database = sqlite3.connect(
            f"file:{quote(os.fsencode(path))}?mode=rw",
            uri=True,
            timeout=LOCK_TIMEOUT,
            isolation_level=None,
            check_same_thread=False,
        )
    except (OSError, sqlite3.Error) as error:
        raise cannot_open(path, error) from error
    try:
        _prepare(database, place)
    except BaseException as error:
        database.close()
        if isinstance(error, sqlite3.Error):
            raise explain(path, error) from error
        raise
    return database


def _create_file(path: Path) -> None:
    if path == platformdirs.user_state_path("lightbus") / "bus.db":
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if os.path.lexists(path):
        return
    # Not created by SQLite, which would follow the umask. Only if it does not exist, and under a lock: closing a file
    # releases the locks that SQLite holds on it in this process.
    with _create_lock, _folder_locked(path.parent), contextlib.suppress(FileExistsError):
        if not os.path.lexists(path):
            for left_over in _companions(path):  # of a deleted file: SQLite would use them for the new one
                left_over.unlink(missing_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))


@contextlib.contextmanager
def _folder_locked(folder: Path) -> Generator[None]:
    """Let one process at a time create a file there, or remove leftovers. (Not all file systems have locks.)"""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _companions(path: Path) -> tuple[Path, Path]:
    """SQLite's write-ahead log and its index, which belong to the file."""
    return path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm")


_Identity = tuple[int, int]  # device and inode


def _identity(path: str) -> _Identity | None:
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino


def _prepare(database: sqlite3.Connection, place: Place) -> None:
    if _is_empty(database, place.path):
        database.execute("PRAGMA auto_vacuum = INCREMENTAL")  # later only a VACUUM could change it
        _use_wal(database, place.path)
        _create_schema(database, place.path)
    database.execute("PRAGMA synchronous = OFF" if place.in_memory else "PRAGMA synchronous = NORMAL")
    database.execute("PRAGMA journal_size_limit = 67108864")
    database.execute("PRAGMA temp_store = MEMORY")


def _is_empty(database: sqlite3.Connection, path: Path) -> bool:
    database.execute("BEGIN")  # one view of the file: another process may be creating the schema
    try:
        return _check_version(database, path)
    finally:
        if database.in_transaction:
            database.execute("ROLLBACK")


def _check_version(database: sqlite3.Connection, path: Path) -> bool:
    """Whether the file is empty. Only reads: the file may belong to another program."""
    is_ours = database.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID
    version = database.execute("PRAGMA user_version").fetchone()[0]
    if is_ours and version == SCHEMA_VERSION:
        return False
    if is_ours:
        raise errors.BrokerFileError(
            f"The embedded broker's file {path} has schema version {version}, and this Lightbus reads version "
            f"{SCHEMA_VERSION}. Use the Lightbus that wrote it, or another file."
        )
    if database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        raise errors.BrokerFileError(
            f"{path} is a database of another program, not the embedded broker's. Use another file in the broker URL."
        )
    return True


def _use_wal(database: sqlite3.Connection, path: Path) -> None:
    mode = "?"
    deadline = time.monotonic() + LOCK_TIMEOUT
    while mode != "wal":
        try:
            mode = database.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        except sqlite3.OperationalError as error:
            # Here, SQLite does not wait for another process that creates the file at the same time.
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            if mode != "wal":
                raise errors.BrokerFileError(
                    f"The embedded broker cannot use its file {path} there: the file system does not support SQLite's "
                    "write-ahead log (a network drive?). Use a file on a local disk."
                )


def _create_schema(database: sqlite3.Connection, path: Path) -> None:
    database.execute("BEGIN IMMEDIATE")
    try:
        if _check_version(database, path):  # otherwise, another process was faster
            for statement in _statements(SCHEMA):
                database.execute(statement)
            database.executemany(
                "INSERT INTO exchanges VALUES (?, ?, 1, 0, 0, ?)",
                [(name, kind, encode_arguments({})) for name, kind in PREDECLARED.items()],
            )
            database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        database.execute("COMMIT")
    except BaseException:
        database.execute("ROLLBACK")
        raise


def _statements(script: str) -> Iterator[str]:
    statement = ""
    for line in script.splitlines():
        statement += line + "\n"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
    if statement.strip():
        yield statement


def cannot_open(path: Path, error: Exception) -> Exception:
    """The error for a file that cannot be opened, with the next step."""
    if _descriptors_are_used_up(error):
        return _too_many_files(path)
    if not path.parent.is_dir():
        return errors.BrokerFileError(
            f"The embedded broker cannot open its file {path}: the folder {path.parent} does not exist. Create it."
        )
    return errors.BrokerFileError(
        f"The embedded broker cannot open its file {path}: {error}. Check the path and its permissions."
    )


def _descriptors_are_used_up(error: Exception) -> bool:
    """Whether there are too many open files. SQLite reports only that it cannot open or read something, so try it."""
    if isinstance(error, OSError):
        return error.errno in (errno.EMFILE, errno.ENFILE)
    if getattr(error, "sqlite_errorcode", 0) & 0xFF not in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR):
        return False
    opened: list[int] = []
    try:
        for _ in range(4):  # the file, its log, its index, and a folder
            opened.append(os.open(os.devnull, os.O_RDONLY))
    except OSError as refused:
        return refused.errno in (errno.EMFILE, errno.ENFILE)
    finally:
        for descriptor in opened:
            os.close(descriptor)
    return False


def _too_many_files(path: Path) -> errors.LimitReached:
    return errors.LimitReached(
        f"The embedded broker cannot open its file {path}: this process (or the machine) has too many open files. "
        f"Find the leak (lsof -p {os.getpid()}), or raise the limit (ulimit -n)."
    )


_NEXT_STEPS = {
    sqlite3.SQLITE_FULL: "Free disk space; nothing of this operation was stored.",
    sqlite3.SQLITE_READONLY: "Check the permissions of the file and its folder.",
    sqlite3.SQLITE_CANTOPEN: "Check the permissions of the file and its folder.",
    sqlite3.SQLITE_PERM: "Check the permissions of the file and its folder.",
    sqlite3.SQLITE_CORRUPT: "It is damaged: restore it from a backup, or move it away to start with an empty one.",
    sqlite3.SQLITE_NOTADB: "It is not an SQLite file: point the broker URL at another path, or move it away.",
    sqlite3.SQLITE_IOERR: "Check the disk.",
}


def explain(path: Path, error: sqlite3.Error) -> Exception:
    """The error of Lightbus or AMQP for an error of SQLite, with the next step."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return amqp_error(
            amqp_errors.RecoverableConnectionError,
            f"The embedded broker's file {path} was locked by another process for more than {LOCK_TIMEOUT:g} s. Find "
            "it with lsof, and stop it.",
        )
    if _descriptors_are_used_up(error):
        return _too_many_files(path)
    if code == sqlite3.SQLITE_TOOBIG:
        return amqp_error(amqp_errors.ContentTooLarge, f"CONTENT_TOO_LARGE - {error}")
    step = _NEXT_STEPS.get(code, "Check the file, its permissions and the disk.")
    return errors.BrokerFileError(f"The embedded broker cannot use its file {path}: {error}. {step}")


class File:
    """One client's handle on the file.

    SQLite keeps a list of its locks in the memory of the process. A forked child would find locks in it that are never
    released, and would not have those that it needs. So no file is open while a process forks: the forking thread waits
    until other threads have ended their transactions, and closes their files. The parent opens them again on next use.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.lock = threading.RLock()  # held while the file is in use
        self.closed = False
        self._database: sqlite3.Connection | None = None
        self._synced = False
        self._names = [str(path) for path in (place.path, *_companions(place.path))]
        self._identities: list[_Identity | None] = []
        """The device and inode of each, when they were opened."""
        with self.lock:
            with _files_lock:
                open_files.add(self)
            self._open()

    def _open(self) -> sqlite3.Connection:
        if self.place.path in _unusable:
            raise errors.BrokerFileError(
                f"The embedded broker cannot use its file {self.place.path} in this process, which was forked "
                "during a transaction, or by code other than Python's. Fork before connecting, or start a new process."
            )
        self._check_other_connections()
        database = _open_file(self.place)
        found = [_identity(name) for name in self._names]
        if self._identities and self._identities[0] != found[0]:  # replaced while it was closed for a fork
            database.close()
            self.closed = True  # the client's ids have no meaning in the new file
            raise self._moved()
        self._database, self._identities = database, found
        if self._synced and not self.place.in_memory:
            database.execute("PRAGMA synchronous = FULL")
        return database

    def _check_other_connections(self) -> None:
        """
        Raises:
            amqp.exceptions.RecoverableConnectionError: SQLite's log and index were deleted, and another connection of
                this process still has them open. A process has one index for each file, so a new log with the old
                index would damage the file. The other connection notices within a second.
        """
        if self.place.in_memory:
            return
        now = [_identity(name) for name in self._names]
        with _files_lock:
            others = [one for one in open_files if one is not self and one.place.path == self.place.path]
        if any(one.has_open(now[0]) and not one.has_opened(now) for one in others):
            raise amqp_error(
                amqp_errors.RecoverableConnectionError,
                f"Another connection of this process still uses the deleted log of the embedded broker's file "
                f"{self.place.path}. Connecting again once it has noticed.",
            )

    def has_open(self, identity: _Identity | None) -> bool:
        """Whether this file is open here."""
        return self._database is not None and self._identities[:1] == [identity]

    def has_opened(self, identities: list[_Identity | None]) -> bool:
        """Whether these were the file, its log and its index when they were opened."""
        return self._identities == identities

    def get(self) -> sqlite3.Connection:
        """The open file; the caller holds `lock`."""
        if self.closed:
            raise amqp_error(
                amqp_errors.RecoverableConnectionError,
                f"This connection to the embedded broker's file {self.place.path} is closed, or belongs to the "
                "process that this one was forked from. Open another.",
            )
        return self._database or self._open()

    def sync_on_commit(self) -> None:
        """From now on, a commit returns when it is on the disk."""
        with self.lock:
            self._synced = True
            if not self.place.in_memory:
                self.get().execute("PRAGMA synchronous = FULL")

    def check_place(self) -> None:
        """Check that the open file still has its name. SQLite would continue to use a deleted file.

        Raises:
            amqp.exceptions.RecoverableConnectionError: it was deleted or replaced, or SQLite's files beside it were.
        """
        if self.place.in_memory:  # its folder is private
            return
        with self.lock:
            if self._database is not None and self._identities != [_identity(name) for name in self._names]:
                raise self._moved()

    def _moved(self) -> Exception:
        opened, now = self._identities[0], _identity(self._names[0])
        path = self.place.path
        if now == opened:
            with contextlib.suppress(OSError, sqlite3.Error), _folder_locked(path.parent):
                # If there are no new ones yet, save what is in the deleted log.
                if self._database is not None and not any(_identity(name) for name in self._names[1:]):
                    self._database.execute("PRAGMA wal_checkpoint(PASSIVE)")
            what = f"The files {path.name}-wal and -shm, which belong to the embedded broker's {path}, were deleted"
            step = (
                "Reconnecting; recently published events may be lost. Never delete these files while the broker "
                "is in use."
            )
        else:
            self._remove_companions()
            what = f"The embedded broker's file {path} was {'replaced by another' if now else 'deleted'}"
            step = "Reconnecting to the new file; events that waited in the old one are lost."
            if now:
                step += " Before you replace it, stop all programs that use it."
        return amqp_error(amqp_errors.RecoverableConnectionError, f"{what} while it was in use. {step}")

    def _remove_companions(self) -> None:
        """Remove the log and index of a file that no longer exists. They would damage the file with its name now."""
        with contextlib.suppress(OSError), _folder_locked(self.place.path.parent):
            for name, opened in list(zip(self._names, self._identities, strict=True))[1:]:
                if opened is not None and _identity(name) == opened:
                    os.unlink(name)

    def let_go(self) -> None:
        """Close for a fork, until the next use."""
        if self._database is not None and not self._database.in_transaction:
            self._database.close()
            self._database = None

    def close(self) -> None:
        with self.lock:
            self.closed = True
            if self._database is not None:
                self._database.close()
                self._database = None

    def abandon(self) -> None:
        """In a forked child: the open file belongs to the parent."""
        self.lock = threading.RLock()
        self.closed = True
        if self._database is not None:
            # SQLite forbids to use or close it here: so it is never freed.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._database))
            self._database = None
            _unusable.add(self.place.path)


open_files: weakref.WeakSet[File] = weakref.WeakSet()
_files_lock = threading.Lock()
_fork_lock = threading.Lock()
_let_go: list[File] = []  # during a fork: the files whose locks are held
_unusable: set[Path] = set()


def _before_fork() -> None:
    _fork_lock.acquire()
    while new := _other_files():
        for file in new:
            file.lock.acquire()
            _let_go.append(file)
    for file in _let_go:
        file.let_go()


def _other_files() -> list[File]:
    with _files_lock:
        return [file for file in open_files if file not in _let_go]


def _after_fork_in_parent() -> None:
    while _let_go:
        _let_go.pop().lock.release()
    _fork_lock.release()


def _after_fork_in_child() -> None:
    global _create_lock, _files_lock, _fork_lock
    _create_lock, _files_lock, _fork_lock = threading.Lock(), threading.Lock(), threading.Lock()
    forget_memory_of_parent()
    _let_go.clear()
    for wake_pipe in list(wake_pipes):
        wake_pipe.close_in_child()  # otherwise, this copy makes the parent look alive
    for file in list(open_files):
        file.abandon()
    open_files.clear()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
