"""A publisher that is observed: an `Outcome` per event, for apps that have called `app.observe`."""

from __future__ import annotations

import time
from typing import Any

from lightbus import errors
from lightbus.connection.dial import BrokerAddresses
from lightbus.message import Receipt
from lightbus.outcome import Observe, Outcome
from lightbus.publishing.confirms import PendingPublish
from lightbus.publishing.publisher import Publisher
from lightbus.transport import Delivery, Publication
from lightbus.wire import codec, topology
from lightbus.wire.topology import QueueType


class ObservedPublisher(Publisher):
    """Reports what came of each publish, where its caller waits: in the same thread or event loop."""

    def __init__(
        self, app: str, broker: BrokerAddresses, *, timeout: float, queue_type: QueueType, observe: Observe
    ) -> None:
        self._observe = observe
        self._internal = topology.internal_name(app)
        super().__init__(app, broker, timeout=timeout, queue_type=queue_type)

    def submit(self, pending: PendingPublish) -> None:
        pending.began = time.monotonic()
        try:
            super().submit(pending)
        except errors.PublishError as error:
            self._report(pending, error=error)
            raise

    def outcome(self, pending: PendingPublish, limit: float, in_time: bool) -> Receipt:
        try:
            receipt = super().outcome(pending, limit, in_time)
        except errors.PublishError as error:
            self._report(pending, error=error)
            raise
        self._report(pending, receipt=receipt)
        return receipt

    def _report(
        self, pending: PendingPublish, *, error: errors.PublishError | None = None, receipt: Receipt | None = None
    ) -> None:
        publication = pending.publication
        if publication.exchange == self._internal:  # a copy for a retry: the consuming side reports it
            return
        self._observe(
            Outcome(
                kind="failed" if receipt is None else "published",
                app=self.app,
                message=codec.message_of(self.app, _as_delivery(publication)),
                seconds=time.monotonic() - pending.began,
                error=error,
                delay=topology.delay_of(publication.properties.get("headers") or {}) or None,
                receipt=receipt,
            )
        )


def _as_delivery(publication: Publication) -> Delivery:
    no_channel: Any = None
    properties = dict(publication.properties)
    return Delivery(no_channel, 0, False, publication.exchange, publication.routing_key, properties, publication.body)
