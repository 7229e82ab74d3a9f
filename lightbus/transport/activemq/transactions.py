"""Transactions of a connection: what is acknowledged in one returns to its queue, and counts, when its client dies.

When a client dies, Artemis (2.40.0) closes its consumers in two threads. If the wrong one is first, the delivery does
not count: of 27 deliveries to processes that died, 13 did. What is acknowledged in a transaction is rolled back, and
always counts: 3,075 of 3,075. An event that crashes its workers would come for ever if none counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import cproton
from proton import Condition, Delivery, Described, Message, Sender, Terminus, ulong

from lightbus.transport.activemq.engine import Engine
from lightbus.transport.activemq.links import ACCEPTED, Incoming, Outgoing, Sent, Transfer

DECLARE, DISCHARGE = ulong(0x31), ulong(0x32)
DECLARED, TRANSACTIONAL = 0x33, 0x34
"""The numbers that AMQP 1.0 gives these types (part 4, transactions)."""

Transaction = bytes
"""Its id."""
OnBegun = Callable[[Transaction | None], object]


class Owner(Protocol):
    """What the transactions need from their connection."""

    engine: Engine

    @property
    def links(self) -> dict[str, Incoming | Outgoing]: ...

    def link_name(self, what: str) -> str: ...


class Coordinator(Outgoing):
    """The link to the broker's coordinator."""

    def __init__(self, owner: Transactions, link: Sender) -> None:
        super().__init__(owner, link, "", "")
        self._begun = owner.begun

    def _set_target(self, address: str, capability: str) -> None:
        self.link.target.type = Terminus.COORDINATOR

    def outcome(self, transfer: Transfer) -> None:
        """The broker has begun a transaction, or ended one."""
        if cproton.pn_delivery_remote_state(transfer) != DECLARED:
            super().outcome(transfer)
            return
        sent = self.unsettled.pop(cproton.pn_delivery_tag(transfer))
        found = Delivery(transfer).remote.data
        cproton.pn_delivery_settle(transfer)
        self._begun(sent, bytes(found[0]))


class Transactions:
    """Begins and ends them, without waiting."""

    def __init__(self, owner: Owner) -> None:
        self._connection = owner
        self._link: Coordinator | None = None
        self._sent = 0
        self._beginning: dict[int, OnBegun] = {}
        self._ending: set[int] = set()

    @property
    def are_ending(self) -> bool:
        """Whether the broker has not answered all of `end`."""
        return bool(self._ending)

    def begin(self, on_begun: OnBegun) -> None:
        """Begin one.

        Args:
            on_begun: is called with it, or with None if the broker begins none.
        """
        self._beginning[self._sent + 1] = on_begun
        self._send(DECLARE, [None])

    def end(self, transaction: Transaction, *, failed: bool) -> None:
        """Commit it; or, if it has failed, roll it back."""
        self._ending.add(self._sent + 1)
        self._send(DISCHARGE, [transaction, failed])

    def _send(self, what: ulong, fields: list[Any]) -> None:
        self._sent += 1
        if self._link is None:
            owner = self._connection
            sender = owner.engine.session.sender(owner.link_name("transactions"))
            self._link = owner.links[sender.name] = Coordinator(self, sender)
        self._link.put(Sent(self._sent, "", False), Message(body=Described(what, fields)).encode())
        self._link.push()

    # --- what the link reports

    def begun(self, sent: Sent, transaction: Transaction) -> None:
        self._beginning.pop(sent.number)(transaction)

    def accepted(self, sent: Sent) -> None:
        """It has ended."""
        self._answered(sent)

    def unroutable(self, sent: Sent) -> None:
        self._answered(sent)

    def rejected(self, link: Outgoing, sent: Sent, condition: Condition | None) -> None:
        """It could not be committed: what it acknowledged comes again."""
        self._answered(sent)

    def _answered(self, sent: Sent) -> None:
        on_begun = self._beginning.pop(sent.number, None)
        self._ending.discard(sent.number)
        if on_begun is not None:
            on_begun(None)

    def sender_closed(self, link: Outgoing, condition: Condition | None) -> None:
        self._link = None
        link.link.close()
        for sent in link.take_back():
            self._answered(sent)


def enlist(transfer: Transfer, transaction: Transaction) -> None:
    """Acknowledge a message in a transaction. The broker answers with the same state."""
    delivery = Delivery(transfer)
    delivery.local.data = [transaction, Described(ulong(ACCEPTED), [])]
    delivery.update(TRANSACTIONAL)


def leave_to(transfer: Transfer, transaction: Transaction) -> None:
    """Settle what is enlisted, without another outcome: then a rollback returns it to its queue. What is not settled
    returns to its consumer, and if that is closed, nobody gets it before the broker restarts.
    """
    cproton.pn_data_clear(cproton.pn_disposition_data(cproton.pn_delivery_local(transfer)))
    delivery = Delivery(transfer)
    delivery.local.data = [transaction]
    delivery.update(TRANSACTIONAL)
    cproton.pn_delivery_settle(transfer)


def is_enlisted(transfer: Transfer) -> bool:
    """Whether the broker has answered."""
    return cproton.pn_delivery_remote_state(transfer) == TRANSACTIONAL
