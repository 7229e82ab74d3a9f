"""Checks of a broker itself: its version, and the encryption."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from lightbus import errors
from lightbus.connection.address import Address
from lightbus.inspection.finding import Finding, Level

OLDEST = (3, 10)
NEWEST_MAJOR = 4


def unreachable_step(error: errors.BrokerError) -> str:
    """The next step if a broker cannot be reached."""
    match error:
        case errors.LimitReached():
            return "See above: a limit is reached, or too low."
        case errors.AccessRefused():
            return "Check the user, its password and its virtual host in LIGHTBUS_URL."
        case errors.TLSRefused():
            return "Check the port, and the certificate's names and dates; ?cafile= names the authority that signed it."
        case errors.BrokerFileError():
            return "See above; the file is unchanged."
        case _:
            return "Check the host and port in LIGHTBUS_URL, that the broker runs, and the network in between."


def version(server: Mapping[str, Any]) -> Finding:
    """Whether Lightbus supports the broker's version.

    Args:
        server: the server properties that the broker has sent.
    """
    product, number = str(server.get("product", "unknown")), str(server.get("version", "unknown"))
    what = f"{product} {number}"
    if product != "RabbitMQ":
        level: Level = "ok" if "Lightbus" in product else "warn"
        step = "" if level == "ok" else "Lightbus is tested with RabbitMQ 3.10 to 4.x and with its embedded broker."
        return Finding(level, "version", f"{what}.", step)
    numbers = tuple(int(part) for part in number.split(".")[:2] if part.isdigit())
    if len(numbers) == 2 and numbers < OLDEST:
        return Finding("fail", "version", f"{what} is older than 3.10.", "Upgrade RabbitMQ: events could be lost.")
    if len(numbers) < 2 or numbers[0] > NEWEST_MAJOR:
        return Finding("warn", "version", f"{what} is not known here.", "Lightbus is tested with 3.10 to 4.x.")
    return Finding("ok", "version", f"{what} (Lightbus needs 3.10 to 4.x).")


def encryption(address: Address) -> Iterator[Finding]:
    """Whether a connection to this address is encrypted."""
    if address.embedded:
        return
    host = urlsplit(address.plain).hostname or "localhost"
    if address.scheme == "amqps":
        yield Finding("ok", "TLS", f"{host}: encrypted, and the certificate was verified.")
    elif _is_loopback(host):
        yield Finding("ok", "TLS", f"{host}: not encrypted, on this machine.")
    else:
        yield Finding(
            "warn",
            "TLS",
            f"{host}: passwords and events cross the network unencrypted.",
            "Use amqps:// in LIGHTBUS_URL.",
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
