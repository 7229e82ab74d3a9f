"""The embedded broker: a SQLite file, or memory. It behaves as RabbitMQ does, and answers in RabbitMQ's words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from lightbus.connection.brokers.rabbitmq import RABBITMQ
from lightbus.connection.brokers.row import URL, Scheme, Verdict


def _place(url: URL) -> str:
    if url.scheme == "memory":
        return "embedded, in memory: only this process can use it"
    from lightbus.transport.sqlite.place import locate, short_path

    return f"embedded (SQLite file {short_path(locate(url.plain).path)})"


def _resolution(_message: str, url: URL) -> str:
    if url.scheme == "memory":
        way = "restart this program: its in-memory broker is discarded"
    else:
        from lightbus.transport.sqlite.place import locate

        path = locate(url.plain).path
        way = f"stop all programs that use {path}, and delete that file (its messages are lost). Or use another file"
    return f"Declare it as it exists. Or {way}."


def _version(server: Mapping[str, Any]) -> Verdict:
    return Verdict("ok", f"{server['product']} {server['version']}.")


def _keeps_forged_deaths(_server: Mapping[str, Any]) -> bool:
    """It does, but has no users."""
    return False


def _no_command(_vhost: str) -> str:
    return ""


EMBEDDED = attrs.evolve(
    RABBITMQ,
    name="the embedded broker",
    transport="lightbus.transport.sqlite.connection:Transport",
    schemes=(
        Scheme("sqlite", file=True, hint="; set LIGHTBUS_URL to use RabbitMQ"),
        Scheme("memory", private=True),
    ),
    virtual_hosts=False,
    messaging_system="lightbus",  # the conventions have no name for it
    place=_place,
    resolution=_resolution,
    list_bindings=_no_command,
    list_consumers=_no_command,
    version=_version,
    keeps_forged_deaths=_keeps_forged_deaths,
)
