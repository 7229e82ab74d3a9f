"""Private RabbitMQ nodes for tests: each with its own folder, ports, cookie and epmd, on 127.0.0.1 only.

with Node() as node:
    kombu.Connection(node.url)
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.patience import until_stopped

INSTALL = (
    "RabbitMQ is not installed: `apt-get install rabbitmq-server` (Debian, Ubuntu) or `brew install rabbitmq`. "
    "No service needs to run: the tests start their own nodes."
)

FOLDERS = (
    *filter(None, [os.environ.get("LIGHTBUS_RABBITMQ")]),  # another version than the installed one
    # Debian's scripts in PATH switch to the user rabbitmq. These are the scripts that they call; any user can run them.
    "/usr/lib/rabbitmq/bin",
    *os.get_exec_path(),
    "/usr/sbin",
    "/opt/homebrew/sbin",
    "/usr/local/sbin",
)

# 32 MiB, because tests send messages above the limit of Lightbus, which is the default of RabbitMQ 4.
CONFIG = """\
log.file.level = info
disk_free_limit.absolute = 50MB
max_message_size = 33554432
raft.wal_max_size_bytes = 67108864
"""

# Two schedulers without busy waiting, because tests share the cores with the node.
ERLANG_ARGS = (
    "+S 2:2 +SDcpu 1:1 +SDio 4 +sbwt none +sbwtdcpu none +sbwtdio none -kernel inet_dist_use_interface {127,0,0,1}"
)
CTL_ARGS = "+S 1:1 +SDcpu 1:1 +SDio 1 +sbwt none -kernel inet_dist_use_interface {127,0,0,1}"

_numbers = itertools.count(1)
_given_ports: set[int] = set()


def find(program: str) -> str | None:
    """The full path of a RabbitMQ program, or None if RabbitMQ is not installed."""
    return shutil.which(program, path=os.pathsep.join(FOLDERS))


def free_port(count: int = 1) -> int:
    """A loopback port on which nothing listens; the first of `count` neighbours.

    It is below the range of ephemeral ports. Such a port could be used by another connection while a node is down, and
    a client that reconnects to it could even connect to itself. None is given twice, and each process of pytest-xdist
    has its own range: between this and the start of a server, somebody else would take it.
    """
    first = 20000 + 1500 * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 8)
    while True:
        port = random.randrange(first, first + 1500 - count)
        ports = range(port, port + count)
        if not _given_ports.isdisjoint(ports) and len(_given_ports) < 1000:
            continue
        _given_ports.update(ports)
        if all(map(_is_free, ports)):
            return port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


class Node:
    """A RabbitMQ node. `stop`, `kill` and `start` keep its ports and data; `close` deletes everything."""

    def __init__(
        self, config: str = "", environment: Mapping[str, str] | None = None, *, epmd_port: int | None = None
    ) -> None:
        """`config` is added to rabbitmq.conf, `environment` to the node's environment.

        `epmd_port` is the port of another running node that this one must find; see `start_cluster`.
        """
        self.port, self.dist_port, self.epmd_port = free_port(), free_port(), epmd_port or free_port()
        self.shares_epmd = epmd_port is not None
        self.name = f"lightbus-{os.getpid()}-{next(_numbers)}@localhost"
        self.folder = Path(tempfile.mkdtemp(prefix="lightbus-rabbitmq-"))
        self.log = self.folder / "log" / "node.log"
        self.owner = os.getpid()
        self.process: subprocess.Popen[bytes] | None = None
        self._epmd: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        cookie = self.folder / ".erlang.cookie"
        cookie.write_text("LIGHTBUSTESTS")
        cookie.chmod(0o400)
        (self.folder / "rabbitmq.conf").write_text(CONFIG + config)
        (self.folder / "enabled_plugins").write_text("[].")
        (self.folder / "env.conf").touch()
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("RABBITMQ_", "ERL_"))},
            "HOME": str(self.folder),
            "LANG": "C.UTF-8",
            "ERL_EPMD_PORT": str(self.epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": self.name,
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self.dist_port),
            "RABBITMQ_CONF_ENV_FILE": str(self.folder / "env.conf"),
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(self.folder / "advanced.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "data"),
            "RABBITMQ_LOG_BASE": str(self.log.parent),
            "RABBITMQ_LOGS": str(self.log),
            "RABBITMQ_PID_FILE": str(self.folder / "pid"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": ERLANG_ARGS,
            "RABBITMQ_CTL_ERL_ARGS": CTL_ARGS,
            # The script becomes the node instead of watching over it: one process, whose id we know.
            "RUNNING_UNDER_SYSTEMD": "true",
            **(environment or {}),
        }

    @property
    def url(self) -> str:
        """The URL of the default virtual host, as `guest`."""
        return self.vhost_url("/")

    def vhost_url(self, vhost: str, user: str = "guest", password: str = "guest") -> str:
        """The URL of a virtual host."""
        return f"amqp://{user}:{password}@127.0.0.1:{self.port}/{vhost}"

    def start(self, timeout: float = 90) -> None:
        """Start the node, and return when it accepts AMQP clients.

        Raises:
            RuntimeError: RabbitMQ is not installed, or the node did not come up within `timeout` seconds.
        """
        server = find("rabbitmq-server")
        if server is None:
            raise RuntimeError(INSTALL)
        atexit.register(self.close)
        if self._epmd is None and not self.shares_epmd:
            # Started here, because the node would start it as a daemon.
            epmd = ["epmd", "-port", str(self.epmd_port), "-address", "127.0.0.1"]
            self._epmd = self._spawn(epmd)
        self.process = self._spawn([server])
        # Kills the node if this process is killed (SIGKILL), because its end of the pipe is closed then.
        epmd_too = "" if self._epmd is None else f"-{self._epmd.pid}"
        ends = f"read -r _; kill -9 -{self.process.pid} {epmd_too}; rm -rf '{self.folder}'"
        self._guard = subprocess.Popen(["sh", "-c", ends], stdin=subprocess.PIPE, start_new_session=True)
        deadline = time.monotonic() + timeout
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                tail = "\n".join(
                    file.read_text(errors="replace")[-3000:] for file in (self.output, self.log) if file.exists()
                )
                self._end(signal.SIGKILL)
                raise RuntimeError(f"RabbitMQ node {self.name} did not start. Its log ends:\n{tail}")
            time.sleep(0.05)

    def answers(self) -> bool:
        """Whether the node accepts AMQP clients."""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=5) as probe:
            probe.sendall(b"AMQP\x00\x00\x09\x01")
            return bool(probe.recv(1))
        return False

    def stop(self) -> None:
        """Stop gracefully (clients get a connection.close), and keep the data."""
        self._end(signal.SIGTERM)

    def kill(self, timeout: float = 30) -> None:
        """Stop like a crash: SIGKILL, when the names of its quorum queues are on disk.

        RabbitMQ (tested with 3.10.8) writes them up to some seconds after it confirms the declaration. If a node is
        killed before that, the queue exists without its contents: confirmed messages are lost, and it has no leader.
        """
        deadline = time.monotonic() + timeout
        while self._has_unwritten_queues():
            if time.monotonic() > deadline:
                raise TimeoutError(f"RabbitMQ node {self.name} did not write its queues' names within {timeout:g} s")
            time.sleep(0.05)
        self._end(signal.SIGKILL)

    def _has_unwritten_queues(self) -> bool:
        registers = self.folder.glob("data/*/quorum/*/names.dets")
        return any(
            queue.is_dir() and queue.name.encode() not in register.read_bytes()
            for register in registers
            for queue in register.parent.iterdir()
        )

    def restart(self) -> None:
        """Stop and start."""
        self.stop()
        self.start()

    def suspend(self) -> None:
        """SIGSTOP: connections stay open without replies. Returns once it has stopped."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        until_stopped(self.process.pid)

    def resume(self) -> None:
        """SIGCONT, after `suspend`."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def ctl(self, *arguments: str, timeout: float = 60) -> str:
        """Run `rabbitmqctl` with these arguments (about a second) and return its output.

        Raises:
            RuntimeError: it failed; the message has its output.
        """
        program = find("rabbitmqctl")
        assert program is not None, INSTALL
        command = [program, "--quiet", "--node", self.name, *arguments]
        done = subprocess.run(
            command, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=timeout
        )
        if done.returncode:
            raise RuntimeError(f"rabbitmqctl {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
        return done.stdout

    def add_vhosts(self, names: list[str]) -> None:
        """Create virtual hosts with all permissions for `guest`: all in one call, since each call costs a second."""
        binaries = ", ".join(map(_binary, names))
        # In parallel: one by one, each takes as long as a test.
        self.ctl(
            "eval",
            f"Names = [{binaries}], rpc:pmap({{rabbit_vhost, add}}, [<<>>], Names), "
            '[rabbit_auth_backend_internal:set_permissions(<<"guest">>, V, <<".*">>, <<".*">>, <<".*">>, <<>>) '
            "|| V <- Names], ok.",
        )

    def add_users(self, vhost: str, permissions: Mapping[str, Sequence[str]], password: str) -> None:
        """Create users by name, with their regular expressions to configure, write and read: all in one call."""
        steps = []
        for user, patterns in permissions.items():
            name, host, secret, *expressions = (_binary(text) for text in (user, vhost, password, *patterns))
            steps.append(f"ok = rabbit_auth_backend_internal:add_user({name}, {secret}, <<>>)")
            steps.append(
                f"ok = rabbit_auth_backend_internal:set_permissions({name}, {host}, {', '.join(expressions)}, <<>>)"
            )
        self.ctl("eval", f"{', '.join(steps)}.")

    def close(self) -> None:
        """Kill the node and its epmd, and delete its folder."""
        if os.getpid() != self.owner:  # a forked child of a test that runs the exit handlers
            return
        self._end(signal.SIGKILL)
        if self._epmd is not None:
            self._epmd.kill()
            self._epmd.wait()
            self._epmd = None
        shutil.rmtree(self.folder, ignore_errors=True)
        atexit.unregister(self.close)

    def __enter__(self) -> Node:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def output(self) -> Path:
        return self.folder / "output"

    def _spawn(self, command: list[str]) -> subprocess.Popen[bytes]:
        with self.output.open("ab") as output:
            return subprocess.Popen(
                command,
                env=self.environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C goes to the tests, which then stop the node.
            )

    def _end(self, how: signal.Signals) -> None:
        if self._guard is not None:
            self._guard.kill()
            self._guard.communicate()
            self._guard = None
        process, self.process = self.process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(how)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its child processes, such as Erlang's resolver


def _binary(text: str) -> str:
    """In Erlang."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'<<"{escaped}">>'


def start_cluster(size: int, config: str = "") -> list[Node]:
    """Start the nodes of one cluster. Close the first one last: the others find each other with its epmd."""
    nodes = [Node(config)]
    nodes += [Node(config, epmd_port=nodes[0].epmd_port) for _ in range(size - 1)]
    try:
        for node in nodes:
            node.start()
        for node in nodes[1:]:  # explicitly: the behavior of a node without its peers differs between versions
            node.ctl("stop_app")
            node.ctl("join_cluster", nodes[0].name)
            node.ctl("start_app")
        nodes[0].ctl("await_online_nodes", str(size))
    except BaseException:
        for node in reversed(nodes):
            node.close()
        raise
    return nodes
