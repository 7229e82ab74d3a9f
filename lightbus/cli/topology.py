"""`lightbus topology`: what an app needs on its broker."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import click

if TYPE_CHECKING:
    from lightbus import Lightbus

EPILOG = """\b
Example:
  lightbus topology permissions billing.bus:app
"""

PERMISSIONS_EPILOG = """\b
Examples:
  lightbus topology permissions billing.bus:app
  lightbus topology permissions billing.bus:app --user billing-prod --vhost events
  lightbus topology permissions billing.bus:app | ssh broker sh

\b
The whole way, once for each app, on the broker's machine:
  rabbitmqctl add_user billing                           (it asks for the password)
  lightbus topology permissions billing.bus:app | sh
Then, where the app runs: LIGHTBUS_URL=amqps://billing:PASSWORD@host/VHOST
"""


@click.group(short_help="What an app needs on its broker.", epilog=EPILOG)
def topology() -> None:
    """What an app needs on its broker."""


@topology.command(short_help="The least that an app's own broker user needs.", epilog=PERMISSIONS_EPILOG)
@click.argument("target", metavar="MODULE:ATTR")
@click.option("--user", help="The broker's user.  [default: the app's name]")
@click.option("--vhost", help="The virtual host.  [default: the one in the app's URL]")
@click.option("--json", "as_json", is_flag=True, help="A JSON object: user, vhost, configure, write, read.")
def permissions(target: str, user: str | None, vhost: str | None, as_json: bool) -> None:
    """Print the rabbitmqctl line that lets an app do what it must, as a user of its own, and nothing else.

    Such a user may configure, write and read what bears the app's name, hear the bus, and hear the apps that its
    handlers name with source=. It cannot speak in another app's name, nor to the bus directly, nor read another app's
    queues: so the source of an event is vouched for by the broker.

    The bus exchange itself, lightbus, must be there: start any app once as a user who may configure it.
    """
    from lightbus.cli import logs
    from lightbus.cli import target as targets

    logs.configure("error")
    app = targets.load_app(target)
    user = app.name if user is None else user
    vhost = _vhost(app) if vhost is None else vhost
    configure, write, read = rules(app)
    if as_json:
        click.echo(json.dumps({"user": user, "vhost": vhost, "configure": configure, "write": write, "read": read}))
    else:
        click.echo(shlex.join(["rabbitmqctl", "set_permissions", "-p", vhost, user, configure, write, read]))
    if others := sources(app):
        click.echo(
            f"Note: reading the exchange of {', '.join(others)} (for source=) covers the queue of the same name, which "
            "this user could read as well, and its binding to the bus, which it could remove: RabbitMQ's permissions "
            "go by name. Where apps do not trust each other so far, leave source= out and look at Message.source.",
            err=True,
        )


def rules(app: Lightbus) -> tuple[str, str, str]:
    """Configure, write and read, as regular expressions over names."""
    from lightbus.topology import BUS

    own = rf"{app.name}(\..+)?"
    return rf"^{own}$", rf"^({own}|{BUS})$", rf"^({'|'.join([own, BUS, *sources(app)])})$"


def sources(app: Lightbus) -> list[str]:
    """The other apps that handlers name with source=."""
    return sorted({one.source for one in app.handlers.values() if one.source} - {app.name})


def _vhost(app: Lightbus) -> str:
    address = app.broker.addresses[0]
    return "/" if address.embedded else unquote(urlsplit(address.plain).path[1:]) or "/"
