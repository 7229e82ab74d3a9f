"""The links of a channel: `Outgoing` sends messages to one address, `Incoming` receives those of one queue."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

import attrs
import cproton
from proton import Condition, Delivery, Described, Receiver, Sender, Terminus, symbol

from lightbus.transport import Delivery as Message
from lightbus.transport import OnCancel, OnDelivery

UNLIMITED = 1000
"""Messages that a consumer without a limit may hold."""
Transfer = object
"""A delivery, as proton's bindings know it: a wrapper for each would be a third of the CPU of an event. It is valid
until it is settled, or its connection is dropped."""
ACCEPTED, REJECTED, RELEASED = cproton.PN_ACCEPTED, cproton.PN_REJECTED, cproton.PN_RELEASED
_SELECTOR = symbol("apache.org:selector-filter:string")


def settle(transfer: Transfer, state: int) -> None:
    """Settle it with one of these states."""
    cproton.pn_delivery_update(transfer, state)
    cproton.pn_delivery_settle(transfer)


def settle_as_failed(transfer: Transfer) -> None:
    """Return it to its queue, where it counts as a delivery."""
    cproton.pn_disposition_set_failed(cproton.pn_delivery_local(transfer), True)
    settle(transfer, cproton.PN_MODIFIED)


@attrs.frozen
class Sent:
    """A publication on its way."""

    number: int
    """Its delivery tag, as the channel counts them."""
    message_id: str
    mandatory: bool


class OutgoingOwner(Protocol):
    """The channel, as a link that sends needs it."""

    def accepted(self, sent: Sent) -> None: ...

    def unroutable(self, sent: Sent) -> None: ...

    def rejected(self, link: Outgoing, sent: Sent, condition: Condition | None) -> None: ...

    def sender_closed(self, link: Outgoing, condition: Condition | None) -> None: ...


class Outgoing:
    """Sends to one address. What the broker gives no credit for waits here."""

    def __init__(self, owner: OutgoingOwner, link: Sender, address: str, capability: str) -> None:
        self.address = address
        self.link = link
        self.waiting: deque[tuple[Sent, bytes]] = deque()
        self.unsettled: dict[str, Sent] = {}
        """By delivery tag."""
        self._owner = owner
        link.source.address = link.name
        self._set_target(address, capability)
        link.open()

    def _set_target(self, address: str, capability: str) -> None:
        self.link.target.address = address
        _set_capability(self.link.target, capability)

    def put(self, sent: Sent, data: bytes) -> None:
        self.waiting.append((sent, data))

    def push(self) -> None:
        """Send what there is credit for."""
        link, waiting = self.link, self.waiting
        credit = min(link.credit, len(waiting)) if waiting else 0
        for _ in range(credit):
            sent, data = waiting.popleft()
            tag = str(sent.number)
            self.unsettled[tag] = sent
            link.delivery(tag)
            link.stream(data)
            link.advance()

    def outcome(self, transfer: Transfer) -> None:
        """The broker settled one of them, or sent its state."""
        state = cproton.pn_delivery_remote_state(transfer)
        if not state:
            return
        sent = self.unsettled.pop(cproton.pn_delivery_tag(transfer), None)
        if sent is not None:
            if state == ACCEPTED:
                self._owner.accepted(sent)
            else:
                self._owner.rejected(self, sent, Delivery(transfer).remote.condition)
        cproton.pn_delivery_settle(transfer)

    def opened(self) -> None:
        """The broker has answered. Credit follows."""

    def flowed(self) -> None:
        self.push()

    def closed(self, condition: Condition | None) -> None:
        self._owner.sender_closed(self, condition)

    def take_back(self) -> list[Sent]:
        """All that have no outcome, when the link is closed."""
        left = [*self.unsettled.values(), *(sent for sent, _ in self.waiting)]
        self.unsettled.clear()
        self.waiting.clear()
        return left


@attrs.define(eq=False)
class Consumer:
    """Who receives from a link."""

    tag: str
    no_ack: bool
    on_delivery: OnDelivery
    on_cancel: OnCancel


class IncomingOwner(Protocol):
    """The channel, as a link that receives needs it."""

    def arrived(self, link: Incoming, transfer: Transfer, data: bytes) -> None: ...

    def enlisted(self, link: Incoming) -> None: ...

    def receiver_closed(self, link: Incoming, condition: Condition | None) -> None: ...


class Incoming:
    """Receives from one queue, or from a subscription without a queue.

    A consumer that is cancelled leaves the link open until all that it holds is settled: the broker takes back what a
    closed link has not settled. The next consumer of the same queue uses the same link.
    """

    def __init__(
        self,
        owner: IncomingOwner,
        link: Receiver,
        address: str,
        queue: str,
        *,
        selector: str | None = None,
        browse: bool = False,
    ) -> None:
        self.queue = queue
        self.link = link
        self.consumer: Consumer | None = None
        self.unsettled = 0
        self.is_open = False
        """The broker has answered, and has not closed it."""
        self.waiting: deque[Message] = deque()
        """What is not handed over, since the broker has not enlisted it, or one before it; in order of arrival."""
        self.get: Callable[[Message], object] | None = None
        """Takes what arrives, in the place of a consumer."""
        self._owner = owner
        link.source.address = address
        link.target.address = link.name
        if selector is not None:
            link.source.filter.put_dict({symbol("jms-selector"): Described(_SELECTOR, selector)})
        if browse:
            link.source.distribution_mode = Terminus.DIST_MODE_COPY
        link.open()

    def give(self, count: int) -> None:
        """Let the broker send so many more."""
        self.link.flow(count)

    def read(self, link: object) -> None:
        """Take what has arrived completely.

        Args:
            link: this one, as proton's bindings know it.
        """
        while (
            not cproton.isnull(transfer := cproton.pn_link_current(link))
            and cproton.pn_delivery_readable(transfer)
            and not cproton.pn_delivery_partial(transfer)
        ):
            aborted = cproton.pn_delivery_aborted(transfer)
            _, data = (0, b"") if aborted else cproton.pn_link_recv(link, cproton.pn_delivery_pending(transfer))
            cproton.pn_link_advance(link)
            if aborted:
                cproton.pn_delivery_settle(transfer)
            else:
                self._owner.arrived(self, transfer, bytes(data))
        if self.waiting:
            self._owner.enlisted(self)

    def opened(self) -> None:
        self.is_open = self.link.remote_source.address is not None

    def flowed(self) -> None:
        """The broker has answered a drain; its owner waits for that."""

    def closed(self, condition: Condition | None) -> None:
        self._owner.receiver_closed(self, condition)
        self.is_open = False


def _set_capability(terminus: Terminus, capability: str) -> None:
    data = terminus.capabilities
    data.put_array(False, SYMBOL)
    data.enter()
    data.put_symbol(symbol(capability))
    data.exit()


SYMBOL = 21
"""proton's number of the type `symbol`."""
