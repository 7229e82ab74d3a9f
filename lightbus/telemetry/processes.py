"""Metrics of several processes: prometheus_client keeps each process's values in files of one folder.

A worker that replaces another one continues its files: by their number among the workers of a supervisor, not by their
process ids. So counters are kept when a worker dies, and the folder does not grow.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import glob
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lightbus import errors

if TYPE_CHECKING:
    from prometheus_client import Metric

VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""prometheus_client reads it when it is imported."""
PREFIX = "lightbus-metrics-"
LOCK = "lock"


class SharedFolder:
    """The folder of the workers of one supervisor: see `worker.supervisor.Companion`."""

    def __init__(self) -> None:
        """
        Raises:
            errors.WorkerError: the variable names no folder.
        """
        given = os.environ.get(VARIABLE)
        check_folder(given)
        if not given:
            _remove_abandoned()
        self.path = given or tempfile.mkdtemp(prefix=PREFIX)
        self._lock = None if given else _locked(self.path)
        self.environment: Mapping[str, str] = {VARIABLE: self.path}

    def ended(self, number: int) -> None:
        """Remove the gauges of this worker. Its counters stay."""
        _mark_dead(identifier(os.getpid(), number), self.path)

    def close(self) -> None:
        """Remove the folder, unless the user has chosen it."""
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = None


def _locked(folder: str) -> int:
    """The descriptor of a file in the folder that is locked as long as this process lives."""
    descriptor = os.open(os.path.join(folder, "new"), os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.rename(os.path.join(folder, "new"), os.path.join(folder, LOCK))  # nobody sees it before it is locked
    return descriptor


def _remove_abandoned() -> None:
    """Remove the folders of supervisors that were killed with all their workers."""
    for file in glob.glob(os.path.join(glob.escape(tempfile.gettempdir()), f"{PREFIX}*", LOCK)):
        # An error: it is in use, or belongs to another user.
        with contextlib.suppress(OSError), open(file, "rb", opener=_without_waiting) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(os.path.dirname(file), ignore_errors=True)


def _without_waiting(path: str, flags: int) -> int:
    """Any user may put something else in its place in the temporary folder: a pipe would wait for its other end."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW)


def check_folder(path: str | None) -> None:
    """
    Raises:
        errors.WorkerError: it is not a folder.
    """
    if path is not None and not os.path.isdir(path):
        raise errors.WorkerError(
            f"{VARIABLE}={path} is not a folder. Create it, or unset the variable: `lightbus worker --processes` then "
            "makes one."
        )


def identifier(supervisor: int, number: int) -> str:
    """What tells the files of one worker from those of another: not its process id, which its successor does not have.

    Args:
        supervisor: the process id of the supervisor.
        number: of the worker, from 1.
    """
    return f"{supervisor}-{number}"


class Membership:
    """This process among those that share a folder, if they do."""

    def __init__(self, number: int) -> None:
        """Before any metric is made.

        Args:
            number: of this worker among those of its supervisor, from 1: it continues the files of the one that had
                this number before. 0 without a supervisor.

        Raises:
            errors.WorkerError: the variable names no folder.
        """
        self._path = os.environ.get(VARIABLE)
        check_folder(self._path)
        self._number = number
        self._supervisor = os.getppid()
        if number:
            _name_files(identifier(self._supervisor, number))

    def close(self) -> None:
        """At the end. A supervisor does the rest, unless it was killed."""
        if self._path is None:
            return
        if not self._number:
            _mark_dead(str(os.getpid()), self._path)
        elif os.getppid() != self._supervisor and os.path.basename(self._path).startswith(PREFIX):
            shutil.rmtree(self._path, ignore_errors=True)


class _Name:
    """What prometheus_client names the files of this process by."""

    def __init__(self, name: str) -> None:
        self.name = name
        # A child that was forked from the worker has separate files, or both would overwrite the other's values.
        os.register_at_fork(after_in_child=self._change)

    def _change(self) -> None:
        self.name = str(os.getpid())


def _name_files(name: str) -> None:
    from prometheus_client import values

    # Asked with every increment, so not a Python function.
    ask = functools.partial(getattr, _Name(name), "name")
    values.ValueClass = values.MultiProcessValue(ask)  # type: ignore


def _mark_dead(name: str, path: str) -> None:
    from prometheus_client.multiprocess import mark_process_dead

    mark_process_dead(name, path)  # type: ignore


def merged(path: str) -> Iterable[Metric]:
    """The metrics of all processes."""
    from prometheus_client.multiprocess import MultiProcessCollector

    while True:
        # A new file is empty for a moment, for ever if its process was killed in it: prometheus_client cannot read it
        # (its issue 1199).
        files = [file for file in glob.glob(os.path.join(glob.escape(path), "*.db")) if _has_content(file)]
        try:
            found: Iterable[Metric] = MultiProcessCollector.merge(files)  # type: ignore[no-untyped-call]
        except FileNotFoundError:  # of a process that has ended since
            continue
        return found


def _has_content(file: str) -> bool:
    try:
        return Path(file).stat().st_size > 0
    except FileNotFoundError:
        return False
