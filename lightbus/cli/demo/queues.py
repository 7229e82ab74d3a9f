"""The queues of the demo's services on the broker."""

from __future__ import annotations

import contextlib

from lightbus.cli.demo.services import LISTENERS, PUBLISHER, topology_of
from lightbus.connection.diagnosis import LOST
from lightbus.connection.dial import BrokerAddresses
from lightbus.inspection.states import QueueState, queue_states


class Queues:
    """Asks the broker for their lengths and consumers, and deletes them at the end."""

    def __init__(self, broker: BrokerAddresses, prefix: str) -> None:
        """
        Args:
            prefix: of the names of the apps. Without one, the broker is a file that is deleted with its folder.
        """
        self.broker = broker
        self.prefix = prefix
        self.topologies = {name: topology_of(name, prefix) for name in (*LISTENERS, PUBLISHER)}
        self.connection = broker.connect("lightbus demo")

    def _states(self, *names: str) -> list[QueueState]:
        return queue_states(self.connection, names)

    def consumers(self, service: str) -> int:
        return self._states(f"{self.prefix}{service}.main")[0].consumers

    def waiting(self) -> int:
        """The number of events in the queues of the services, including their retry queues."""
        names = [
            queue.name
            for service in LISTENERS
            for queue in self.topologies[service].queues
            if not queue.name.endswith(".dead")
        ]
        return sum(state.ready for state in self._states(*names))

    def dead(self) -> int:
        """The number of dead letters."""
        return self._states(f"{self.prefix}inbox.dead")[0].ready

    def delete(self) -> None:
        """Delete what the services have declared."""
        with contextlib.suppress(*LOST):
            self.connection.close()
        if not self.prefix:
            return
        connection = self.broker.connect("lightbus demo")
        for topology in self.topologies.values():
            for queue in topology.queues:
                connection.channel().queue_delete(queue.name)
            for exchange in topology.exchanges:
                connection.channel().exchange_delete(exchange.name)
        connection.close()
