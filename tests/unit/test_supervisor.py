"""What a supervisor reads from its workers, and which files it watches."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from lightbus.modules import files_of
from lightbus.worker import supervisor
from lightbus.worker.process import END, GIVE_UP, WATCH
from lightbus.worker.reload import FileWatcher
from lightbus.worker.supervisor import Child, Supervisor


def test_the_last_message_of_a_worker_is_read_however_many_come_before_it() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child = Child(1)
        child.socket = ours
        paths = [f"/srv/billing/handlers/of_a_module_with_a_long_name_{number}.py" for number in range(500)]
        theirs.sendall(b"".join(WATCH + os.fsencode(path) + END for path in paths) + GIVE_UP)
        child.receive()
        assert child.files == paths
        assert child.fatal


def test_files_of_one_folder_need_one_watch(tmp_path: Path) -> None:
    def watches() -> int:
        return sum(thread.name == "lightbus reload" for thread in threading.enumerate())

    (tmp_path / "app").mkdir()
    before = watches()
    ours, theirs = socket.socketpair()
    with ours, theirs, FileWatcher(str(tmp_path / "app"), ours) as watcher:
        watcher.add([str(tmp_path / f"{number}.py") for number in range(50)])
        assert watches() <= before + 2


def test_the_files_of_a_module_that_cannot_be_imported_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "parcels"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "broken.py").write_text("def")
    (tmp_path / "unpacked").mkdir()
    (tmp_path / "unpacked" / "__init__.py").write_text("raise RuntimeError('no settings')")
    (tmp_path / "unpacked" / "handlers.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert files_of(["parcels.broken", "missing.handlers"]) == [
        str(package / "__init__.py"),
        str(package / "broken.py"),
    ]
    assert files_of(["unpacked.handlers"]) == [str(tmp_path / "unpacked" / "__init__.py")]


class Folder:
    """A companion that notes whether its worker has ended when it is closed."""

    environment: Mapping[str, str] = MappingProxyType({})

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.ended_before: bool | None = None

    def ended(self, number: int) -> None:
        pass

    def close(self) -> None:
        self.ended_before = self.process.returncode is not None


def test_workers_that_are_killed_have_ended_before_their_folder_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "SIGNAL_REPEAT", -1)
    monkeypatch.setattr(os, "_exit", lambda code: None)
    process = subprocess.Popen(["sleep", "60"])
    folder = Folder(process)
    one = Supervisor([], processes=1, grace=30, companion=folder)
    one.children[0].process, one.children[0].ready = process, True
    one._on_signal(signal.SIGINT)
    one._on_signal(signal.SIGINT)
    assert folder.ended_before
    assert process.returncode == -signal.SIGKILL
