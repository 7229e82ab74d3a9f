"""The processes of the demo: three workers and a publisher."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

import lightbus
from lightbus.cli.demo.stopping import Failed
from lightbus.wire.topology import Topology

LISTENERS = ("stats", "reviews", "inbox")
PUBLISHER = "forge"
PAGE = "web"


CONTRACT_LIMIT = 20.0
"""Seconds for one `lightbus contract` command."""


def _folder() -> Path:
    """The folder of the services: docs/examples/demo in a clone, lightbus/_demo in a wheel."""
    package = Path(lightbus.__file__).parent
    installed = package / "_demo"
    return installed if installed.exists() else package.parent / "docs" / "examples" / "demo"


FOLDER = _folder()


def topology_of(service: str, prefix: str) -> Topology:
    """What the service declares, from its source, so that all of it can be deleted.

    Args:
        prefix: of the app's name.
    """
    os.environ["DEMO_PREFIX"] = prefix
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location(f"lightbus_demo_{service}", FOLDER / f"{service}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # annotations are looked up there
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    topology: Topology = module.app.topology()
    return topology


class Services:
    """Starts and stops the processes, and reads what they have recorded."""

    def __init__(self, folder: Path, url: str, prefix: str, *, contracts: bool = False) -> None:
        """
        Args:
            folder: the working directory of the processes.
            prefix: of the names of the apps. With one, the broker is not the demo's own.
            contracts: whether workers publish contracts, although they would stay on the broker for 90 days.
        """
        self.folder = folder
        self.url = url
        self.prefix = prefix
        self.contracts = contracts or not prefix
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start_worker(self, name: str) -> None:
        options = [] if self.contracts else ["--no-contract"]
        self._start(name, "-m", "lightbus", "worker", f"{name}:app", *options)

    def start_publisher(self, lines: list[bytes]) -> None:
        """Start the publisher with these lines as its stdin."""
        data = self.folder / "commits.jsonl"
        data.write_bytes(b"".join(lines))
        with data.open("rb") as file:
            self._start(PUBLISHER, str(FOLDER / "forge.py"), stdin=file)

    def start_slow_publisher(self) -> IO[bytes]:
        """Start a publisher that publishes each line that is written to this pipe."""
        self._start(PUBLISHER, str(FOLDER / "forge.py"), "1", stdin=subprocess.PIPE)
        pipe = self.processes[PUBLISHER].stdin
        assert pipe is not None
        return pipe

    def start_page(self) -> None:
        """Start `lightbus web`, on any free port."""
        self._start(PAGE, "-m", "lightbus", "web", "--port", "0", "--allow-actions")

    def page(self) -> str:
        """The page's address; "" before it is ready."""
        first = self._output(PAGE).read_text().partition("\n")
        return first[0].removeprefix("Lightbus web: ") if first[1] else ""

    def contract(self, command: str, name: str) -> None:
        """Run `lightbus contract publish` or `withdraw`, to its end.

        Raises:
            Failed: it has failed, or did not end within `CONTRACT_LIMIT`.
        """
        self._start("contract", "-m", "lightbus", "contract", command, f"{name}:app")
        process = self.processes.pop("contract")
        try:
            status = process.wait(CONTRACT_LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        if status:
            raise Failed(f"lightbus contract {command} {name}:app ended with status {status}.\n{self.log('contract')}")

    def _start(self, name: str, *arguments: str, stdin: Any = subprocess.DEVNULL) -> None:
        roots = [str(FOLDER), str(Path(lightbus.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "LIGHTBUS_URL": self.url,
            "DEMO_PREFIX": self.prefix,
            "PYTHONPATH": os.pathsep.join(filter(None, roots)),
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        with self._output(name).open("wb") as output, (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=self.folder,
                env=environment,
                stdin=stdin,
                stdout=output,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches the demo only, which stops them
            )

    def stop(self) -> None:
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        deadline = time.monotonic() + 10
        for process in self.processes.values():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def pid(self, name: str) -> int:
        return self.processes[name].pid

    @property
    def publishing(self) -> bool:
        """Whether the publisher is still running."""
        return self.processes[PUBLISHER].poll() is None

    def check(self) -> None:
        """
        Raises:
            Failed: a worker has exited, or the publisher has failed.
        """
        for name, process in self.processes.items():
            status = process.poll()
            if status is not None and (name != PUBLISHER or status != 0):
                raise Failed(f"{name} ended with status {status}.\n{self.log(name)[-2000:]}")

    # --- what they have written

    def _output(self, name: str) -> Path:
        return self.folder / f"{name}.out"

    def log(self, name: str) -> str:
        """Its stdout and stderr."""
        both = (self._output(name), self.folder / f"{name}.log")
        return "".join(file.read_text(errors="replace") for file in both if file.exists())

    def last_log_lines(self) -> str:
        return "\n".join(f"{name}: {self.log(name)[-500:]}" for name in self.processes)

    def published(self) -> int:
        """The number of events that the publisher has published."""
        return sum(int(line) for line in self._output(PUBLISHER).read_text().split())

    def entries(self, service: str) -> list[tuple[str, int]]:
        """What a service has recorded: (what, lines)."""
        file = self.folder / f"{service}.db"
        if not file.exists():
            return []
        with contextlib.closing(sqlite3.connect(file, timeout=10)) as database:
            try:
                return list(database.execute("SELECT what, lines FROM entries"))
            except sqlite3.OperationalError:  # the table does not exist yet
                return []
