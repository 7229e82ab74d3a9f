"""`lightbus web`: the bus as a page."""

from __future__ import annotations

import importlib
import ipaddress
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lightbus.cli.catalog import reading

if TYPE_CHECKING:
    from lightbus import Lightbus
    from lightbus.connection.dial import BrokerAddresses

TOKEN = "LIGHTBUS_WEB_TOKEN"
EPILOG = """\b
Examples:
  lightbus web                                         (the broker in LIGHTBUS_URL)
  lightbus web billing.bus:app --allow-actions         (the broker of this app; retry and purge)
  lightbus web --from catalog.json                     (of lightbus catalog --json, without a broker)
  LIGHTBUS_WEB_TOKEN=$(openssl rand -hex 32) lightbus web --host 0.0.0.0

\b
Exit codes:
  0  stopped by Ctrl-C or SIGTERM
  1  the port is in use, or the extra [web] is not installed
  2  the command line or MODULE:ATTR is invalid
"""


@click.command(short_help="The bus as a page: apps, events, dead letters, live events.", epilog=EPILOG)
@click.argument("target", metavar="[MODULE:ATTR]", required=False)
@reading.from_option
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on. Others need a token.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8765, show_default=True, help="The port; 0 for any that is free."
)
@click.option(
    "--token-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help=f"A file with the token that readers need. Default: the token in {TOKEN}, or none.",
)
@click.option(
    "--allow-name",
    "names",
    multiple=True,
    metavar="NAME",
    help="A DNS name of this server, as browsers use it. Repeatable. IP addresses and localhost need none.",
)
@click.option("--allow-actions", is_flag=True, help="Dead letters can be retried and purged. Default: only read.")
def web(
    target: str | None,
    file: Path | None,
    host: str,
    port: int,
    token_file: Path | None,
    names: tuple[str, ...],
    allow_actions: bool,
) -> None:
    """Serve the bus as a page: a map of apps and events, schemas, handlers, dead letters, and live events.

    It listens on 127.0.0.1, so only this machine can open it. With another --host, readers need a token: they enter it
    in a form, or send it as `Authorization: Bearer`. Traffic is not encrypted: put a proxy with TLS before it.

    The page shows what the broker's user may see. It never shows the broker's password.
    """
    from lightbus import errors
    from lightbus.cli import logs

    token = _token(token_file)
    local = _is_local(host)
    if token is None and not local:
        raise click.UsageError(
            f"--host {host} lets other machines read the page, so it needs a token: set {TOKEN}, or give --token-file. "
            "A good one: openssl rand -hex 32"
        )
    check_extra()
    from lightbus.web import security, server
    from lightbus.web.source import Source

    if token is not None and len(token) < security.SHORTEST:
        raise click.UsageError(
            f"The token has {len(token)} characters; it needs {security.SHORTEST}. A good one: openssl rand -hex 32"
        )
    logs.configure("warning")
    if file is not None:
        from lightbus.catalog import catalog

        catalog.from_file(file)  # an unreadable one is an error now
    broker, app = _broker(target, file)
    try:
        listener = server.listen(host, port)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise errors.LightbusError(
            f"Cannot listen on {host}:{port}: {reason}. Choose another port: --port 0 takes any that is free."
        ) from error
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listener.getsockname()[1]}/"
    source = Source(broker, file, app)
    guard = security.Guard(token, frozenset(one.lower() for one in (*names, host)), local)

    def ready() -> None:
        click.echo(f"Lightbus web: {address}")
        click.echo(f"Bus: {source.place}. Ctrl-C ends it.", err=True)

    with listener:
        server.serve(listener, source, guard, actions=allow_actions, ready=ready)


def check_extra() -> None:
    """
    Raises:
        errors.LightbusError: the extra [web] is not installed.
    """
    from lightbus import errors

    try:
        importlib.import_module("lightbus.web.server")
    except ImportError as error:
        raise errors.LightbusError(
            f"`lightbus web` needs the extra [web] ({error}). Install it: pip install 'lightbus-amqp[web]'"
        ) from error


def _token(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get(TOKEN, "").strip() or None
    try:
        found = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"--token-file {file} cannot be read: {error}") from error
    if not found:
        raise click.UsageError(f"--token-file {file} is empty. Fill it: openssl rand -hex 32 > {file}")
    return found


def _is_local(host: str) -> bool:
    """Whether only this machine can connect to it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _broker(target: str | None, file: Path | None) -> tuple[BrokerAddresses | None, Lightbus | None]:
    from lightbus.cli import target as targets

    if target is not None:
        app = targets.load_app(target)
        return app.broker, app
    return (reading.default_broker() if file is None else None), None
