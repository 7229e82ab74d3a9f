"""Checks of a broker itself: its version, and the encryption."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from lightbus import errors
from lightbus.connection.address import Address
from lightbus.inspection.finding import Finding


def unreachable_step(error: errors.BrokerError, address: Address) -> str:
    """The next step if a broker cannot be reached."""
    match error:
        case errors.LimitReached():
            return "See above: a limit is reached, or too low."
        case errors.AccessRefused():
            return address.broker.login_step
        case errors.TLSRefused():
            return "Check the port, and the certificate's names and dates; ?cafile= names the authority that signed it."
        case errors.BrokerFileError():
            return "See above; the file is unchanged."
        case _:
            return "Check the host and port in LIGHTBUS_URL, that the broker runs, and the network in between."


def version(address: Address, server: Mapping[str, Any]) -> Finding:
    """Whether Lightbus supports the broker's version.

    Args:
        server: the server properties that the broker has sent.
    """
    verdict = address.broker.version(server)
    return Finding(verdict.level, "version", verdict.text, verdict.step)


def encryption(address: Address) -> Iterator[Finding]:
    """Whether a connection to this address is encrypted."""
    if address.port is None:
        return
    host = urlsplit(address.plain).hostname or "localhost"
    if address.tls:
        yield Finding("ok", "TLS", f"{host}: encrypted, and the certificate was verified.")
    elif _is_loopback(host):
        yield Finding("ok", "TLS", f"{host}: not encrypted, on this machine.")
    else:
        yield Finding(
            "warn",
            "TLS",
            f"{host}: passwords and events cross the network unencrypted.",
            f"Use {address.broker.tls_scheme}:// in LIGHTBUS_URL.",
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
