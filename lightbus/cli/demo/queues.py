"""The queues of the demo's services on the broker."""

from __future__ import annotations

import contextlib

import amqp.exceptions

from lightbus.cli.demo.services import LISTENERS, PUBLISHER, topology_of
from lightbus.connection.diagnosis import LOST
from lightbus.connection.dial import BrokerAddresses


class Queues:
    """Asks the broker for their lengths and consumers, and deletes them at the end."""

    def __init__(self, broker: BrokerAddresses, prefix: str) -> None:
        """
        Args:
            prefix: of the names of the apps. Without one, the broker is a file that is deleted with its folder.
        """
        self.broker = broker
        self.prefix = prefix
        self.connection = broker.connect("lightbus demo")
        self.topologies = {name: topology_of(name, prefix) for name in (*LISTENERS, PUBLISHER)}

    def _state(self, name: str) -> tuple[int, int]:
        """(messages, consumers) of a queue, 0 if it does not exist yet."""
        channel = self.connection.channel()
        try:
            found = channel.queue_declare(name, passive=True)
        except amqp.exceptions.NotFound:
            return 0, 0
        channel.close()
        return found.message_count, found.consumer_count

    def consumers(self, service: str) -> int:
        return self._state(f"{self.prefix}{service}.main")[1]

    def waiting(self) -> int:
        """The number of events in the queues of the services, including their retry queues."""
        return sum(
            self._state(queue.name)[0]
            for service in LISTENERS
            for queue in self.topologies[service].queues
            if not queue.name.endswith(".dead")
        )

    def dead(self) -> int:
        """The number of dead letters."""
        return self._state(f"{self.prefix}inbox.dead")[0]

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
