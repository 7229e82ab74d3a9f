"""The brokers of the scenarios: each is started when it is first needed, and then shared."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

from lightbus.transport import Connection
from tests import artemis, bus, postgres, rabbitmq


class Stage:
    """`with Stage() as stage:`."""

    def __init__(self) -> None:
        self._node: rabbitmq.Node | None = None
        self._cluster: list[rabbitmq.Node] | None = None
        self._artemis: artemis.Artemis | None = None
        self._artemis_options = ""
        self._postgres: postgres.Postgres | None = None
        self._numbers = itertools.count(1)

    def __enter__(self) -> Stage:
        self._folder = tempfile.TemporaryDirectory(prefix="lightbus-stage-")
        return self

    def __exit__(self, *_: object) -> None:
        for node in reversed([*([self._node] if self._node else []), *(self._cluster or [])]):
            node.close()
        if self._artemis is not None:
            self._artemis.close()
        if self._postgres is not None:
            self._postgres.close()
        self._folder.cleanup()

    def url(self, broker: str = "rabbitmq", options: str = "", *, acceptor: str = "") -> str:
        """The URL of a fresh virtual host on the node, or of the Artemis broker, emptied.

        Args:
            broker: "rabbitmq" or "artemis".
            acceptor: options of Artemis' acceptor. A new broker has them, if the present one has others.
        """
        if broker == "rabbitmq":
            return self.vhost(options)
        if self._artemis is not None and self._artemis_options != acceptor:
            self._artemis.close()
            self._artemis = None
        if self._artemis is None:
            # What is confirmed is on the disk, as on a production broker.
            self._artemis, self._artemis_options = artemis.Artemis(options=acceptor, sync=True), acceptor
        if self._artemis.process is None:  # it is new, or a scenario has failed
            self._artemis.start()
        self._artemis.reset()
        return self._artemis.url() + options

    def server(self, broker: str = "rabbitmq") -> rabbitmq.Node | artemis.Artemis:
        """The server behind `url`."""
        if broker == "rabbitmq":
            return self.node
        assert self._artemis is not None, "`url` starts it"
        return self._artemis

    @property
    def node(self) -> rabbitmq.Node:
        """One node. It is running, unless a scenario has stopped it."""
        if self._node is None:
            self._node = rabbitmq.Node()
            self._node.start()
        return self._node

    def vhost(self, options: str = "") -> str:
        """The URL of a fresh virtual host on the node."""
        name = f"faults-{next(self._numbers)}"
        if self.node.process is None:  # after a failed scenario
            self.node.start()
        self.node.add_vhosts([name])
        return self.node.vhost_url(name) + options

    @property
    def cluster(self) -> list[rabbitmq.Node]:
        """Three running nodes of one cluster."""
        if self._cluster is None:
            if self._node is not None:  # three nodes are enough load for two cores
                self._node.stop()
            self._cluster = rabbitmq.start_cluster(3)
        return self._cluster

    def cluster_vhost(self, options: str = "") -> str:
        """The URLs of a fresh virtual host on all nodes of the cluster."""
        name = f"faults-{next(self._numbers)}"
        self.cluster[0].add_vhosts([name])
        return ";".join(node.vhost_url(name) + options for node in self.cluster)

    @property
    def postgres(self) -> postgres.Postgres:
        """A PostgreSQL cluster. It is running, unless a scenario has stopped it."""
        if self._postgres is None:
            self._postgres = postgres.Postgres("deadlock_timeout = 50ms\n")
            self._postgres.start()
        return self._postgres

    def database(self) -> str:
        """The URL of a fresh database on the cluster."""
        if self.postgres.process is None:  # after a failed scenario
            self.postgres.start()
        return self.postgres.url(self.postgres.create_database())

    def file(self) -> str:
        """The URL of an embedded broker whose file does not exist yet."""
        return f"sqlite:///{self.folder()}/bus.db"

    def folder(self) -> Path:
        folder = Path(self._folder.name) / str(next(self._numbers))
        folder.mkdir()
        return folder


class CannotRun(Exception):
    """The fault cannot be caused on this machine, or by this user."""


def connect(url: str) -> Connection:
    """Connect like the tool of an operator."""
    return bus.connect(url, "tests: an operator")


def vhost_of(url: str) -> str:
    return url.partition("?")[0].rpartition("/")[2]
