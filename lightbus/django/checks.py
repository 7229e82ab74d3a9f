"""System checks: `manage.py check`, and before most other commands."""

from __future__ import annotations

import importlib
from operator import attrgetter
from typing import Any

from django.core.checks import CheckMessage, Error
from django.db import connections

from lightbus import errors
from lightbus.app import Lightbus
from lightbus.django.database import VENDORS
from lightbus.django.inbox import Inbox
from lightbus.django.outbox import DjangoRelay
from lightbus.django.target import VARIABLE, name_of_app


def check_the_app(**_: Any) -> list[CheckMessage]:
    """The setting LIGHTBUS_APP names an app, whose outbox and inbox are in databases that can have them."""
    name = name_of_app()
    if name is None:  # only the commands need it
        return []
    try:
        app = _load(name)
    except Exception as error:  # noqa: BLE001 - the user's module may raise anything
        return [Error(f"{VARIABLE}={name!r} cannot be imported: {errors.summary(error)}", id="lightbus.E001")]
    if not isinstance(app, Lightbus):
        hint = "Name the module and the attribute, as in shop.bus:app."
        return [Error(f"{VARIABLE}={name!r} is not a Lightbus app.", hint=hint, id="lightbus.E001")]
    found: set[str] = {one.using for one in app.services if isinstance(one, DjangoRelay | Inbox)}
    return [
        Error(
            f"The outbox or inbox of app {app.name!r} is in DATABASES[{using!r}], which is {vendor}.",
            hint="Use PostgreSQL, MySQL, MariaDB or SQLite.",
            id="lightbus.E002",
        )
        for using in sorted(found)
        if (vendor := connections[using].vendor) not in VENDORS
    ]


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    app = attrgetter(attribute or "app")(importlib.import_module(module))
    if isinstance(app, Lightbus):
        app.load()
    return app
