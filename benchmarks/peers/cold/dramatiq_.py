"""dramatiq benchmarks.peers.cold.dramatiq_"""

from typing import Any

import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker

from .report import NAME, URL, handled


class BrokerAddresses(RabbitmqBroker):
    def _build_queue_arguments(self, queue_name: str) -> dict[str, Any]:
        return {**super()._build_queue_arguments(queue_name), "x-queue-type": "quorum"}


dramatiq.set_broker(BrokerAddresses(url=URL))


@dramatiq.actor(actor_name="order.placed", queue_name=NAME)
def handle(order: dict[str, Any]) -> None:
    handled(order["customer_id"])
