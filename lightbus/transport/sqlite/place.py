"""Where the file of the embedded broker is, as its URL says."""

from __future__ import annotations

import atexit
import os
import shutil
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


_memory_folders: dict[str, Path] = {}
_memory_lock = threading.Lock()
standing_clocks: dict[Path, float] = {}  # of brokers in memory: where their clocks stand, before they are advanced


def locate(url: str) -> Place:
    """The file that `url` names.

    `sqlite:///relative.db` and `sqlite:////absolute/path.db` (the first slash ends the empty host,
    as in SQLAlchemy), `sqlite://` for the user's own file, `memory://` and `memory://name`.

    Raises:
        InvalidURL: it has a host, a query or another scheme.
    """
    parts = urlsplit(url)
    if parts.query or parts.fragment:
        # Options may be secrets, here as before a host.
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
        host = parts.netloc.rpartition("@")[2]  # without what may be a password
        raise errors.InvalidURL(
            f"The broker URL 'sqlite://{host}{parts.path}' names the host {host!r}, and a file has none. "
            f"Use 'sqlite:///{host}{parts.path}' (relative) or four slashes for an absolute path."
        )
    if parts.path in ("", "/"):
        return Place(platformdirs.user_state_path("lightbus") / "bus.db", in_memory=False)
    return Place(Path(os.path.abspath(os.fsdecode(unquote_to_bytes(parts.path[1:])))), in_memory=False)


def short_path(path: Path) -> Path:
    """A path as one would type it in a shell."""
    home = Path.home()
    return Path("~", path.relative_to(home)) if home in path.parents else path


def _memory_file(name: str) -> Path:
    # A private file without fsync, rather than SQLite's shared memory mode, whose table locks fail
    # instead of waiting: one code path, and the same promises.
    with _memory_lock:
        if name not in _memory_folders:
            _memory_folders[name] = Path(tempfile.mkdtemp(prefix="lightbus-"))
        return _memory_folders[name] / "bus.db"


def forget_memory(name: str) -> None:
    """Remove what `memory://name` holds. For tests that use many; the rest go when the process ends."""
    with _memory_lock:
        folder = _memory_folders.pop(name, None)
    if folder is not None:
        standing_clocks.pop(folder / "bus.db", None)
        shutil.rmtree(folder, ignore_errors=True)


def forget_memory_of_parent() -> None:
    """In a forked child: the parent's memory brokers are not its own."""
    global _memory_lock
    _memory_lock = threading.Lock()
    _memory_folders.clear()


@atexit.register
def _remove_memory_folders() -> None:
    for name in list(_memory_folders):
        forget_memory(name)
