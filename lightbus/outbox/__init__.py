"""Outbox and inbox: nothing between a database and the bus is lost, or done twice.

For SQLAlchemy 2; `lightbus.django` has the same for Django's ORM. Needs `lightbus-amqp[outbox]`; `rows`, `store` and
`relay`, which are for any library, do not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightbus.outbox.inbox import Inbox
    from lightbus.outbox.outbox import Outbox
    from lightbus.outbox.relay import Relay
    from lightbus.outbox.tables import metadata
else:

    def __getattr__(name: str) -> object:
        """Import a public name on first use: SQLAlchemy need not be installed for the modules of this package that do
        without it.
        """
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = found
        return found


__all__ = ["Inbox", "Outbox", "Relay", "metadata"]

_HOMES = {"Inbox": "inbox", "Outbox": "outbox", "Relay": "relay", "metadata": "tables"}
