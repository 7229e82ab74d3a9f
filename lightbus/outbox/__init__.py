"""Outbox and inbox: nothing between a database and the bus is lost, or done twice.

For SQLAlchemy 2; `lightbus.django` has the same for Django's ORM. Needs `lightbus-amqp[outbox]`.
"""

from __future__ import annotations

from lightbus.outbox.inbox import Inbox
from lightbus.outbox.outbox import Outbox
from lightbus.outbox.relay import Relay
from lightbus.outbox.tables import metadata

__all__ = ["Inbox", "Outbox", "Relay", "metadata"]
