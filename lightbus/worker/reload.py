"""`--reload`: watches the .py files of a folder, and single files outside of it."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import queue
import socket
import threading
from collections.abc import Callable, Iterable
from typing import Any, Self

from lightbus import errors

logger = logging.getLogger("lightbus")


class FileWatcher:
    """Watches in a thread, as a context manager. Each change is queued, and wakes the supervisor."""

    def __init__(self, folder: str, wake: socket.socket) -> None:
        """
        Args:
            wake: gets a null byte after each change.

        Raises:
            errors.WorkerError: watchfiles is not installed.
        """
        try:
            importlib.import_module("watchfiles")
        except ImportError:
            raise errors.WorkerError("--reload needs watchfiles: pip install watchfiles") from None
        self._folder = folder
        self._wake = wake
        self._changes: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._files: set[str] = set()
        """Outside of the folder."""
        self._folders: set[str] = set()
        """Of these files. Each has one thread and one watch: Linux allows 128 watchers per user by default."""

    def changed(self) -> list[str]:
        """The paths that have changed since the last call, relative to the folder."""
        changes: dict[str, None] = {}
        while not self._changes.empty():
            changes[self._changes.get()] = None
        return list(changes)

    def __enter__(self) -> Self:
        import watchfiles

        self._start(self._folder, watchfiles.PythonFilter(), recursive=True)
        return self

    def add(self, files: Iterable[str]) -> None:
        """Watch these files as well, which are outside of the folder."""
        for path in set(files) - self._files:
            self._files.add(path)
            # The folder that it is in: editors replace files, and a watch on a file would end with the old one.
            folder = os.path.dirname(path)
            if folder not in self._folders:
                self._folders.add(folder)
                self._start(folder, lambda _, changed: changed in self._files, recursive=False)

    def _start(self, folder: str, wanted: Callable[[Any, str], bool], *, recursive: bool) -> None:
        threading.Thread(
            target=self._watch, args=(folder, wanted, recursive), name="lightbus reload", daemon=True
        ).start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def _watch(self, folder: str, wanted: Callable[[Any, str], bool], recursive: bool) -> None:
        import watchfiles

        try:
            for changes in watchfiles.watch(
                folder,
                watch_filter=wanted,
                recursive=recursive,
                debounce=400,
                stop_event=self._ended,
                raise_interrupt=False,
                ignore_permission_denied=True,
            ):
                for _, path in sorted(changes):
                    self._changes.put(os.path.relpath(path, self._folder))
                with contextlib.suppress(OSError):
                    self._wake.send(b"\0")
        except Exception as error:  # noqa: BLE001 - watchfiles raises OSError or RuntimeError
            logger.error("%s is no longer watched, so changes are not noticed: %s", folder, error)
