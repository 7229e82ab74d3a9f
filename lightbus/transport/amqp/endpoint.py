"""py-amqp's transports, connected to a given address instead of a host name."""

# py-amqp has no types:
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import socket
from time import monotonic
from typing import Any

import amqp.transport

Endpoint = tuple[int, int, int, Any]
"""Family, type, protocol and address of a socket, as `socket.getaddrinfo` returns them."""


class _ToEndpoint:
    """Connects to `endpoint` until `deadline` (monotonic). The rest of the time is for TLS."""

    endpoint: Endpoint
    deadline: float
    sock: Any
    connect_timeout: float

    def _connect(self, host: str, port: int, timeout: float | None) -> None:
        family, kind, protocol, address = self.endpoint
        self.sock = socket.socket(family, kind, protocol)
        try:
            self.sock.settimeout(max(0.001, self.deadline - monotonic()))
            self.sock.connect(address)
        except BaseException:
            self.sock.close()
            self.sock = None
            raise
        self.connect_timeout = max(0.001, self.deadline - monotonic())


class _Tcp(_ToEndpoint, amqp.transport.TCPTransport):
    pass


class _Tls(_ToEndpoint, amqp.transport.SSLTransport):
    pass


def to_endpoint(endpoint: Endpoint, deadline: float, host: str, *, tls: Any, **options: Any) -> Any:
    """A transport that connects to `endpoint`. `host` is for the error messages and the certificate."""
    transport: Any = (_Tls if tls else _Tcp)(host, ssl=tls, **options)
    transport.endpoint, transport.deadline = endpoint, deadline
    return transport
