"""The brokers of the scenarios: each is started when it is first needed, and then shared."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

from lightbus.connection.dial import BrokerAddresses
from lightbus.transport import Connection
from tests import postgres, rabbitmq


class Stage:
    """`with Stage() as stage:`."""

    def __init__(self) -> None:
        self._node: rabbitmq.Node | None = None
        self._cluster: list[rabbitmq.Node] | None = None
        self._postgres: postgres.Postgres | None = None
        self._numbers = itertools.count(1)

    def __enter__(self) -> Stage:
        self._folder = tempfile.TemporaryDirectory(prefix="lightbus-stage-")
        return self

    def __exit__(self, *_: object) -> None:
        for node in reversed([*([self._node] if self._node else []), *(self._cluster or [])]):
            node.close()
        if self._postgres is not None:
            self._postgres.close()
        self._folder.cleanup()

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


def connect(url: str) -> Connection:
    """Connect like the tool of an operator."""
    return BrokerAddresses.parse(url).connect("tests: an operator")


def vhost_of(url: str) -> str:
    return url.partition("?")[0].rpartition("/")[2]
