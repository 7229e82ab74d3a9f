"""Where `lightbus catalog`, `who` and `web` get a catalogue from: a broker or a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import click

if TYPE_CHECKING:
    from lightbus.catalog.catalog import Catalog
    from lightbus.catalog.live import Live
    from lightbus.connection.dial import BrokerAddresses


from_option = click.option(
    "--from",
    "file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A snapshot (of lightbus catalog --json) in the place of the contracts on the broker. Without MODULE:ATTR, no "
    "broker is used.",
)


@attrs.frozen
class Reading:
    """A catalogue, and the live state of its queues."""

    catalog: Catalog
    live: Live | None
    """None: no broker was asked."""
    place: str
    """Where it is from, for a title: `on amqp://host/vhost` or `in catalog.json`."""


def read(target: str | None, file: Path | None) -> Reading:
    """
    Args:
        target: `MODULE:ATTR` of an app, whose broker is asked; None: the broker in LIGHTBUS_URL.
        file: a snapshot in the place of the contracts on the broker. Without `target`, no broker is asked.

    Raises:
        errors.CatalogError: the file or the contracts on the broker cannot be read.
        errors.BrokerError: the broker is not usable.
        errors.TargetError: there is no such app.
    """
    from lightbus.catalog import catalog, live
    from lightbus.cli import banner

    broker = None if file is not None and target is None else _broker_of(target)
    if file is not None:
        found, place = catalog.from_file(file), f"in {file}"
        if broker is not None:
            place = f"{place}; live state of {banner.broker_name(broker)}"
    else:
        assert broker is not None
        found, place = _from_broker(broker), f"on {banner.broker_name(broker)}"
    return Reading(found, None if broker is None else live.ask(broker, found), place)


def _broker_of(target: str | None) -> BrokerAddresses:
    from lightbus.cli import target as targets

    return default_broker() if target is None else targets.find_app(target).broker


def default_broker() -> BrokerAddresses:
    """The one in LIGHTBUS_URL. The command's first line shows it, so the warning about a missing URL is not logged."""
    from lightbus.connection import dial

    dial.warned = True
    return dial.BrokerAddresses.from_environment()


def _from_broker(broker: BrokerAddresses) -> Catalog:
    """The contracts on the broker."""
    from lightbus.catalog import storage

    return storage.read(broker)
