"""Where the file of the embedded broker is, and the temporary folders of `memory://` brokers.

A `memory://` broker is a file in a folder `lightbus-memory-XXXXXXXX`, in the folder for temporary files. The
process that created the folder removes it at its end. If it is killed, or ends with `os._exit`, the next
process with a `memory://` broker removes it: its lock is free.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import shutil
import sys
import tempfile
import threading
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes, urlsplit

import attrs
import platformdirs

from lightbus import errors


@attrs.frozen
class Place:
    """The file that a URL names."""

    path: Path
    in_memory: bool


@attrs.frozen
class _MemoryFolder:
    path: Path
    lock: int
    """A descriptor of the file `lock` in it, which is locked while this process lives. -1: none."""


MEMORY_PREFIX = "lightbus-memory-"
_memory_folders: dict[str, _MemoryFolder] = {}
_memory_lock = threading.Lock()
_cleaned_up = False
_finalized_process = 0
"""The child of multiprocessing, by its pid, that removes its folders at its end."""
standing_clocks: dict[Path, float] = {}
"""The clocks of `memory://` brokers that a test has stopped: the time at which they stand, before they are advanced."""


def locate(url: str) -> Place:
    """The file that `url` names.

    `sqlite:///relative.db` and `sqlite:////absolute/path.db` (the first slash ends the empty host,
    as in SQLAlchemy), `sqlite://` for one in the user's home folder, `memory://` and `memory://name`.

    Raises:
        InvalidURL: it has a host, a query or another scheme.
    """
    parts = urlsplit(url)
    if parts.query or parts.fragment:
        # Options may contain secrets, so the message does not show them.
        raise errors.InvalidURL(
            f"The broker URL '{parts.scheme}://...?...' has options, and the embedded broker takes none. Remove them."
        )
    if parts.scheme == "memory":
        return Place(_memory_file(unquote(parts.netloc + parts.path).strip("/")), in_memory=True)
    if parts.scheme != "sqlite":
        raise errors.InvalidURL(
            f"Broker URL {url!r} is not the embedded broker's: use 'sqlite:///path', 'sqlite://' or 'memory://'."
        )
    if parts.netloc:
        host = parts.netloc.rpartition("@")[2]  # without a password
        raise errors.InvalidURL(
            f"The broker URL 'sqlite://{host}{parts.path}' names the host {host!r}, and a file has none. "
            f"Use 'sqlite:///{host}{parts.path}' (relative) or four slashes for an absolute path."
        )
    if parts.path in ("", "/"):
        return Place(platformdirs.user_state_path("lightbus") / "bus.db", in_memory=False)
    return Place(Path(os.path.abspath(os.fsdecode(unquote_to_bytes(parts.path[1:])))), in_memory=False)


def short_path(path: Path) -> Path:
    """A path as typed in a shell: with `~` for the home folder."""
    home = Path.home()
    return Path("~", path.relative_to(home)) if home in path.parents else path


def _memory_file(name: str) -> Path:
    # A temporary file without fsync. SQLite's shared memory mode has table locks that fail instead of waiting; a file
    # behaves as in production.
    global _cleaned_up
    with _memory_lock:
        if name not in _memory_folders:
            if not _cleaned_up:
                _cleaned_up = True
                _remove_abandoned_folders()
            _finalize_in_multiprocessing()
            _memory_folders[name] = _create_memory_folder()
        return _memory_folders[name].path / "bus.db"


def _create_memory_folder() -> _MemoryFolder:
    while True:
        path = Path(tempfile.mkdtemp(prefix=MEMORY_PREFIX))
        lock = _lock(path / "lock")
        if path.is_dir():  # otherwise, another process removed it before it was locked
            return _MemoryFolder(path, lock)
        _unlock(lock)


def _lock(path: Path) -> int:
    """Lock a new file. -1 if that is impossible, for example with too many open files: opening the broker shows why."""
    try:
        lock = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    except OSError:
        return -1
    with contextlib.suppress(OSError):  # not all file systems have locks
        fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def _unlock(lock: int) -> None:
    if lock >= 0:
        os.close(lock)


def _remove_abandoned_folders() -> None:
    """Remove the folders of processes that ended without removing them. The kernel has released their locks."""
    with contextlib.suppress(OSError), os.scandir(tempfile.gettempdir()) as found:
        for entry in found:
            if entry.name.startswith(MEMORY_PREFIX):
                with contextlib.suppress(OSError):
                    if entry.stat(follow_symlinks=False).st_uid == os.getuid():
                        _remove_if_abandoned(Path(entry.path))


def _remove_if_abandoned(folder: Path) -> None:
    lock = os.open(folder / "lock", os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its process is alive
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def forget_memory(name: str) -> None:
    """Remove the broker `memory://name`. For tests that use many: all others are removed when the process ends."""
    with _memory_lock:
        folder = _memory_folders.pop(name, None)
    if folder is not None:
        standing_clocks.pop(folder.path / "bus.db", None)
        shutil.rmtree(folder.path, ignore_errors=True)
        _unlock(folder.lock)


def forget_memory_of_parent() -> None:
    """In a forked child: the `memory://` brokers belong to the parent."""
    global _memory_lock
    _memory_lock = threading.Lock()
    for folder in _memory_folders.values():
        _unlock(folder.lock)  # only this copy: the parent still holds the lock
    _memory_folders.clear()


def _remove_memory_folders() -> None:
    for name in list(_memory_folders):
        forget_memory(name)


def _finalize_in_multiprocessing() -> None:
    """In a child of multiprocessing, which ends with `os._exit` after its own finalizers, add one for the folders."""
    global _finalized_process
    processes = sys.modules.get("multiprocessing.util")
    if processes is None or sys.modules["multiprocessing"].parent_process() is None:
        return
    if _finalized_process != os.getpid():
        _finalized_process = os.getpid()
        processes.Finalize(None, _remove_memory_folders, exitpriority=0)


atexit.register(_remove_memory_folders)
