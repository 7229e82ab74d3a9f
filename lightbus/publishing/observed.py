"""A publisher that is observed: an `Outcome` per event, for apps that have called `app.observe`."""

from __future__ import annotations

import time

from lightbus import errors
from lightbus.connection.dial import BrokerAddresses
from lightbus.connection.loop_reader import Loop
from lightbus.message import Receipt
from lightbus.outcome import Observe, Outcome
from lightbus.publishing.confirms import PendingPublish
from lightbus.publishing.publisher import Publisher
from lightbus.transport import StoredPublication
from lightbus.wire import codec, topology
from lightbus.wire.topology import QueueType


class ObservedPublisher(Publisher):
    """Reports what came of each publish: where its caller waits, in the same thread or event loop.

    A caller that is cancelled waits no more. Its publish is reported when the broker confirms it, in the thread or loop
    that reads the confirm.
    """

    def __init__(
        self, app: str, broker: BrokerAddresses, *, timeout: float, queue_type: QueueType, observe: Observe
    ) -> None:
        self._observe = observe
        self._internal = topology.internal_name(app)
        self._began: dict[PendingPublish, float] = {}
        """When each was submitted (monotonic clock), until it is reported."""
        self._settled: set[PendingPublish] = set()
        """Those with an outcome that are not reported yet."""
        super().__init__(app, broker, timeout=timeout, queue_type=queue_type)

    def forget(self) -> None:
        super().forget()
        self._began, self._settled = {}, set()

    @property
    def busy(self) -> bool:
        """Also while a publish whose caller was cancelled may still be confirmed."""
        return super().busy or any(pending in self._began for pending in self.window.unconfirmed.copy().values())

    def submit(self, pending: PendingPublish) -> None:
        self._began[pending] = time.monotonic()
        super().submit(pending)

    def outcome(self, pending: PendingPublish, limit: float, in_time: bool) -> Receipt:
        try:
            receipt = super().outcome(pending, limit, in_time)
        except errors.PublishError as error:
            self._report(pending, error=error)
            raise
        self._report(pending, receipt=receipt)
        return receipt

    def abandon(self, pending: PendingPublish, error: BaseException) -> None:
        super().abandon(pending, error)
        if pending in self._settled:
            self._report_settled(pending)
        elif all(one is not pending for one in self.window.unconfirmed.copy().values()):
            self._report(pending, error=error)

    def announce(self, here: Loop | None = None) -> None:
        for pending in self.window.finished.copy():
            self._settled.add(pending)  # first: `abandon` may run in another thread
            if pending.abandoned:
                self._report_settled(pending)
        super().announce(here)

    def _take_back(self, error: BaseException) -> int:
        again = super()._take_back(error)
        for pending in list(self._began):
            if pending.abandoned and pending not in self._settled:  # it is not sent again
                self._report(pending, error=error)
        return again

    def _report_settled(self, pending: PendingPublish) -> None:
        receipt = None
        if pending.error is None:
            receipt = Receipt(pending.publication.properties["message_id"], not pending.returned)
        self._report(pending, error=pending.error, receipt=receipt)

    def _report(
        self, pending: PendingPublish, *, error: BaseException | None = None, receipt: Receipt | None = None
    ) -> None:
        self._settled.discard(pending)
        began = self._began.pop(pending, None)
        publication = pending.publication
        # Reported already; or a copy for a retry, which the consuming side reports.
        if began is None or publication.exchange == self._internal:
            return
        seconds, waited = time.monotonic() - began, None
        if isinstance(publication, StoredPublication):
            waited = max(0.0, time.time() - seconds - publication.added_at)
        self._observe(
            Outcome(
                kind="failed" if receipt is None else "published",
                app=self.app,
                message=codec.message_sent(self.app, publication),
                seconds=seconds,
                error=error,
                delay=topology.delay_of(publication.properties.get("headers") or {}) or None,
                receipt=receipt,
                waited=waited,
            )
        )
