"""`--reload`: watches the .py files of a folder."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import queue
import socket
import threading
from typing import Self

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

    def changed(self) -> list[str]:
        """The paths that have changed since the last call, relative to the folder."""
        changes: dict[str, None] = {}
        while not self._changes.empty():
            changes[self._changes.get()] = None
        return list(changes)

    def __enter__(self) -> Self:
        threading.Thread(target=self._watch, name="lightbus reload", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def _watch(self) -> None:
        import watchfiles

        try:
            for changes in watchfiles.watch(
                self._folder,
                watch_filter=watchfiles.PythonFilter(),
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
            logger.error("%s is no longer watched, so changes are not noticed: %s", self._folder, error)
