"""Outbox and inbox for Django's ORM, and the commands `lightbus_worker` and `lightbus_relay`.

Add "lightbus.django" to INSTALLED_APPS. Needs `lightbus-amqp[django]`. It imports the core, `lightbus.outbox` and the
command line; nothing imports it.

`lightbus.django:app` is the app of the setting LIGHTBUS_APP, with Django set up: for the commands of `lightbus`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightbus.django.inbox import Inbox
from lightbus.django.outbox import Outbox

if TYPE_CHECKING:
    from lightbus.app import Lightbus

    app: Lightbus
else:

    def __getattr__(name: str) -> object:
        if name != "app":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from lightbus.django import target

        return target.set_up()


__all__ = ["Inbox", "Outbox"]
