"""The socket of a connection: connects within a limit, then never blocks."""

from __future__ import annotations

import select
import socket
import ssl
from collections.abc import Mapping
from time import monotonic
from typing import Any

Endpoint = tuple[int, int, int, Any]
"""Family, type, protocol and address of a socket, as `socket.getaddrinfo` returns them."""

WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
USER_TIMEOUT = 30
"""Seconds that sent data may stay unacknowledged by the peer's system."""

_READ_SIZE = 65536
_READS_AT_ONCE = 4


class Stream:
    """A connected socket, with TLS if the URL asks for it."""

    def __init__(self, sock: socket.socket, host: str) -> None:
        self.host = host
        self._socket: socket.socket | None = sock
        self._tls = isinstance(sock, ssl.SSLSocket)
        sock.setblocking(False)
        self._ready = select.poll()
        self._ready.register(sock, select.POLLIN | select.POLLOUT)

    @property
    def is_open(self) -> bool:
        return self._socket is not None

    def fileno(self) -> int:
        """
        Raises:
            ConnectionError: it is closed.
        """
        return self._open().fileno()

    def _open(self) -> socket.socket:
        if self._socket is None:
            raise ConnectionAbortedError("the connection is closed")
        return self._socket

    def receive(self) -> list[bytes]:
        """What has arrived, up to 256 KiB, without waiting.

        Raises:
            ConnectionResetError: the broker closed the connection.
            OSError: the connection was lost.
        """
        sock = self._open()
        pieces: list[bytes] = []
        for _ in range(_READS_AT_ONCE):  # TLS returns one record (16 KiB at most) per call
            try:
                piece = sock.recv(_READ_SIZE)
            except WOULD_BLOCK:
                break
            if not piece and not pieces:
                raise ConnectionResetError("the broker closed the connection without giving a reason")
            pieces.append(piece)
            if not piece or (len(piece) < _READ_SIZE and not self._tls):
                break
        return pieces

    def send(self, data: bytes | bytearray | memoryview) -> int:
        """Send what the system takes at once. Returns how many bytes.

        Raises:
            OSError: the connection was lost.
        """
        try:
            return self._open().send(data)
        except WOULD_BLOCK:
            return 0

    def wait_writable(self, seconds: float) -> bool:
        """Wait until it can be written or read. Returns whether there is something to read.

        Raises:
            TimeoutError: neither, within `seconds`.
        """
        ready = self._ready.poll(max(0.0, seconds) * 1000)
        if not ready:
            raise TimeoutError(f"the broker at {self.host} does not read from the connection")
        return ready[0][1] != select.POLLOUT

    def close(self) -> None:
        """Close the descriptor only: in a forked child, a shutdown, or TLS's, would end the parent's connection."""
        sock, self._socket = self._socket, None
        if sock is not None:
            sock.close()


def connect(endpoint: Endpoint, host: str, deadline: float, tls: Mapping[str, Any] | None) -> Stream:
    """Connect, until `deadline` (monotonic).

    Args:
        host: for messages.
        tls: the options of kombu's `ssl`: server_hostname, cert_reqs, ca_certs, certfile, keyfile.

    Raises:
        OSError: no connection (TimeoutError: in time); ssl.SSLError for TLS.
    """
    family, kind, protocol, address = endpoint
    sock = socket.socket(family, kind, protocol)
    try:
        sock.settimeout(max(0.001, deadline - monotonic()))
        sock.connect(address)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT * 1000)
        if tls is not None:
            sock.settimeout(max(0.001, deadline - monotonic()))
            sock = _context(tls).wrap_socket(sock, server_hostname=tls.get("server_hostname"))
    except BaseException:
        sock.close()
        raise
    return Stream(sock, host)


def _context(tls: Mapping[str, Any]) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=tls.get("ca_certs"))
    if tls.get("cert_reqs") == ssl.CERT_NONE:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if tls.get("certfile"):
        context.load_cert_chain(tls["certfile"], tls.get("keyfile"))
    return context
