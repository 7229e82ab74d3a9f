"""Private ActiveMQ Artemis brokers for tests: each with its own folder and port, on 127.0.0.1 only.

with Artemis() as broker:
    BlockingConnection(broker.url())
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lightbus.transport.activemq import broker_xml
from tests.patience import until_stopped
from tests.rabbitmq import free_port
from tests.server import PrivateServer

VERSION = "2.40.0"
INSTALL = (
    "ActiveMQ Artemis is not installed: `make servers` downloads it, where Maven (mvn) and Java 17 or newer exist, and "
    "builds python-qpid-proton, where a C compiler and the headers of Python exist. No service needs to "
    "run: the tests start their own brokers."
)

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightbus" / f"apache-artemis-{VERSION}"
FOLDERS = (
    *filter(None, [os.environ.get("LIGHTBUS_ARTEMIS")]),  # another version than that of `make servers`
    CACHE,
)

JAVA_OPTIONS = ("-Xms64M", "-Xmx512M", "-XX:+UseSerialGC", "-Dlog4j2.disableJmx=true")
ADMIN = "admin"
"""The name, the password and the role of the user who may do everything."""

# What is confirmed is with the operating system, so it survives a kill of the broker. Only with {sync} does it wait for
# the disk.
BROKER = """\
<configuration xmlns="urn:activemq">
<core xmlns="urn:activemq:core">
<name>{name}</name>
<journal-type>NIO</journal-type>
<journal-datasync>{sync}</journal-datasync>
<journal-pool-files>10</journal-pool-files>
<paging-directory>{folder}/data/paging</paging-directory>
<bindings-directory>{folder}/data/bindings</bindings-directory>
<journal-directory>{folder}/data/journal</journal-directory>
<large-messages-directory>{folder}/data/large-messages</large-messages-directory>
<max-disk-usage>-1</max-disk-usage>
<critical-analyzer>false</critical-analyzer>
<acceptors>
{acceptors}
</acceptors>
{settings}
</core>
</configuration>
"""

EVERYTHING = "".join(
    f'<permission type="{right}" roles="{ADMIN}"/>'
    for right in (
        *("createAddress", "deleteAddress", "createDurableQueue", "deleteDurableQueue", "createNonDurableQueue"),
        *("deleteNonDurableQueue", "send", "consume", "browse", "manage", "view", "edit"),
    )
)
OPEN = f'<security-setting match="#">{EVERYTHING}</security-setting>'
"""All rights for `ADMIN`, none for other roles, on what has no setting."""

BOOTSTRAP = """\
<broker xmlns="http://activemq.apache.org/schema">
<jaas-security domain="activemq"/>
<server configuration="file:{folder}/etc/broker.xml"/>
</broker>
"""

MANAGEMENT = '<management-context xmlns="http://activemq.apache.org/schema"/>'

LOGIN = """\
activemq {
  org.apache.activemq.artemis.spi.core.security.jaas.PropertiesLoginModule required
  reload=true
  org.apache.activemq.jaas.properties.user="users.properties"
  org.apache.activemq.jaas.properties.role="roles.properties";
};
"""

LOG = """\
rootLogger.level = WARN
rootLogger.appenderRef.console.ref = console
appender.console.type = Console
appender.console.name = console
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = %d %-5level [%logger] %msg%n
"""


def default_settings(*security: str) -> str:
    """The administrator's part, these security-settings, and all rights for `ADMIN`."""
    end = "</security-settings>"
    return broker_xml.administrator(ADMIN).replace(end, "\n".join([*security, OPEN, end]))


@functools.cache
def find_java() -> str | None:
    """The full path of Java 17 or newer, or None if there is none."""
    home = os.environ.get("JAVA_HOME")
    java = shutil.which("java", path=f"{home}/bin") if home else shutil.which("java")
    if java is None:
        return None
    # On macOS, there is a `java` that only prints where to get one.
    done = subprocess.run([java, "-version"], capture_output=True, text=True, check=False)
    version = re.search(r'version "(\d+)', done.stderr)
    return java if version is not None and int(version[1]) >= 17 else None


def find() -> Path | None:
    """The folder of the installed Artemis; None if it, Java or python-qpid-proton is missing."""
    if find_java() is None or importlib.util.find_spec("proton") is None:
        return None
    for folder in map(Path, FOLDERS):
        if (folder / "lib" / "artemis-boot.jar").is_file():
            return folder
    return None


def can_install() -> bool:
    """Whether `make servers` can download Artemis on this machine."""
    return shutil.which("mvn") is not None and find_java() is not None


class Artemis(PrivateServer):
    """An Artemis broker. `stop`, `kill` and `start` keep its port and data; `close` deletes everything."""

    def __init__(
        self,
        settings: str | None = None,
        *,
        tls: Mapping[str, object] | None = None,
        options: str = "",
        java_options: Iterable[str] = (),
        sync: bool = False,
    ) -> None:
        """
        Args:
            settings: the elements of broker.xml's `<core>`, apart from the acceptors and the journal's. None:
                `default_settings()`.
            tls: options of a second acceptor, at `tls_port`. {"keyStoreType": "PEM", "keyStorePath": ...} is a file
                with a key and its certificates; {"needClientAuth": "true", "trustStoreType": "PEMCA",
                "trustStorePath": ...} demands one of the client. None: there is none.
            options: more options of the acceptors, or in place of ours, such as "amqpIdleTimeout=2000".
            sync: confirm only what is on the disk, as a production broker does.
        """
        super().__init__("Artemis")
        self.tls_port = free_port()
        self.java_options = (*JAVA_OPTIONS, *java_options)
        self.users = {ADMIN: (ADMIN, [ADMIN])}
        self.etc = self.folder / "etc"
        pairs = f"{broker_xml.ACCEPTOR_OPTIONS};{options}".rstrip(";").split(";")
        options = ";".join("=".join(pair) for pair in dict(pair.split("=", 1) for pair in pairs).items())
        acceptors = {"amqp": f"tcp://127.0.0.1:{self.port}?{options}"}
        if tls is not None:
            secure = {"sslEnabled": "true", **tls}
            more = ";".join(f"{key}={value}" for key, value in secure.items())
            acceptors["amqps"] = f"tcp://127.0.0.1:{self.tls_port}?{options};{more}"
        lines = "\n".join(f'<acceptor name="{name}">{url}</acceptor>' for name, url in acceptors.items())
        settings = default_settings() if settings is None else settings
        self.etc.mkdir()
        files = {
            "broker.xml": BROKER.format(
                name=self.folder.name, folder=self.folder, sync=str(sync).lower(), acceptors=lines, settings=settings
            ),
            "management.xml": MANAGEMENT,
            "bootstrap.xml": BOOTSTRAP.format(folder=self.folder),
            "login.config": LOGIN,
            "log4j2.properties": LOG,
        }
        for name, text in files.items():
            (self.etc / name).write_text(text)
        self._write_users()

    def url(self, user: str = ADMIN, *, scheme: str = "activemq", port: int | None = None) -> str:
        """The URL for a user whom `add_users` has added."""
        password, _ = self.users[user]
        return f"{scheme}://{quote(user)}:{quote(password)}@127.0.0.1:{port or self.port}"

    def add_users(self, roles: Mapping[str, Iterable[str]], password: str = "secret") -> None:
        """Add users, by name, with their roles. The broker reads the files at the next login."""
        self.users |= {user: (password, list(names)) for user, names in roles.items()}
        self._write_users()

    def _write_users(self) -> None:
        by_role: dict[str, list[str]] = {}
        for user, (_, roles) in self.users.items():
            for role in roles:
                by_role.setdefault(role, []).append(user)
        passwords = "".join(f"{user} = {password}\n" for user, (password, _) in self.users.items())
        members = "".join(f"{role} = {','.join(users)}\n" for role, users in by_role.items())
        for name, text in (("users", passwords), ("roles", members)):
            # Renamed, because the broker may read the file at any time.
            written = self.etc / f"{name}.new"
            written.write_text(text)
            written.rename(self.etc / f"{name}.properties")

    def start(self, timeout: float = 90) -> None:
        """Start the broker, and return when it accepts AMQP clients.

        Raises:
            RuntimeError: Artemis is not installed, or the broker did not come up within `timeout` seconds.
        """
        home, java = find(), find_java()
        if home is None or java is None:
            raise RuntimeError(INSTALL)
        for name in ("data", "tmp"):
            (self.folder / name).mkdir(exist_ok=True)
        # The script `artemis` runs the same. This is the broker's process, whose id we know, and needs no instance
        # made by `artemis create`, which takes longer than the broker's start.
        properties = {
            "java.security.auth.login.config": self.etc / "login.config",
            "log4j2.configurationFile": f"file:{self.etc}/log4j2.properties",
            "java.io.tmpdir": self.folder / "tmp",
            "artemis.home": home,
            "artemis.instance": self.folder,
            "artemis.instance.etc": self.etc,
            "data.dir": self.folder / "data",
        }
        self.launch(
            *(java, *self.java_options, *(f"-D{key}={value}" for key, value in properties.items())),
            *("-classpath", str(home / "lib" / "artemis-boot.jar"), "org.apache.activemq.artemis.boot.Artemis", "run"),
            timeout=timeout,
        )

    def answers(self) -> bool:
        """Whether the broker accepts AMQP clients."""
        header = b"AMQP\x03\x01\x00\x00"  # of SASL
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=5) as probe:
            probe.sendall(header)
            return probe.recv(8) == header
        return False

    def stop(self) -> None:
        """Stop gracefully, and keep the data."""
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        self.kill()

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

    def reset(self) -> None:
        """Delete all queues and messages, and all addresses but those of the administrator's part."""
        with self.management() as management:
            queues = management.listed("listQueues")
            addresses = [one["name"] for one in management.listed("listAddresses")]
            fixed = broker_xml.FIXED_ADDRESSES
            requests: list[tuple[str, str, list[Any]]] = []
            for queue in queues:
                if queue["name"] in fixed:
                    requests.append((f"queue.{queue['name']}", "removeAllMessages", []))
                elif queue["address"] != management.reply_to:
                    requests.append(("broker", "destroyQueue", [queue["name"], True]))
            for address in addresses:
                if address not in (*fixed, management.reply_to) and not address.startswith(("activemq.", "$sys.")):
                    requests.append(("broker", "deleteAddress", [address, True]))
            # A queue or address of a client that is leaving may be gone by now.
            management.call(requests, tolerate=("AMQ229017", "AMQ229203", "AMQ229067"))

    @contextlib.contextmanager
    def management(self, user: str = ADMIN) -> Iterator[Management]:
        """Management operations, as this user."""
        from proton.utils import BlockingConnection

        connection = BlockingConnection(self.url(user, scheme="amqp"), timeout=30, allowed_mechs="PLAIN")
        try:
            yield Management(connection)
        finally:
            connection.close()


class Management:
    """Calls the broker's management operations, with qpid-proton's blocking client."""

    def __init__(self, connection: Any) -> None:
        """
        Args:
            connection: a `proton.utils.BlockingConnection`.
        """
        self._answers = connection.create_receiver(None, dynamic=True, credit=1000)
        self._sender = connection.create_sender("activemq.management")
        self.reply_to: str = self._answers.link.remote_source.address

    def call(self, requests: Iterable[tuple[str, str, list[Any]]], *, tolerate: tuple[str, ...] = ()) -> list[Any]:
        """The answers to requests of (resource, operation, arguments), in one round trip.

        Args:
            tolerate: the codes of errors that are ignored: the answer is None.

        Raises:
            RuntimeError: one of them failed.
        """
        from proton import Message

        sent = 0
        for resource, operation, arguments in requests:
            properties = {"_AMQ_ResourceName": resource, "_AMQ_OperationName": operation}
            message = Message(
                properties=properties, body=json.dumps(arguments), reply_to=self.reply_to, correlation_id=str(sent)
            )
            self._sender.link.send(message)
            sent += 1
        answers: list[Any] = [None] * sent
        for _ in range(sent):
            answer = self._answers.receive(timeout=30)
            self._answers.accept()
            value = json.loads(answer.body) if answer.body else None
            if not answer.properties["_AMQ_OperationSucceeded"]:
                if str(value[0]).startswith(tolerate):
                    continue
                raise RuntimeError(f"management operation {answer.correlation_id} failed: {value}")
            answers[int(answer.correlation_id)] = value[0] if value else None
        return answers

    def listed(self, operation: str) -> list[dict[str, Any]]:
        """All queues (`listQueues`) or addresses (`listAddresses`) of the broker."""
        ((text),) = self.call([("broker", operation, ["", 1, 100_000])])
        found: list[dict[str, Any]] = json.loads(text)["data"]
        return found
