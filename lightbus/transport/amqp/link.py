"""The socket of a connection: never blocks, and knows the time limit of the current operation."""

# py-amqp has no types:
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import select
import ssl
from typing import Any

import amqp.exceptions

WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)

_READ_SIZE = 65536
_READS_AT_ONCE = 4


class Link:
    """The socket, as reading and writing share it."""

    def __init__(self, host: str, *, tls: bool) -> None:
        self.host = host
        self.tls = tls
        self.deadline: float | None = None
        """When (monotonic) the current operation must have ended. None: it has no limit."""
        self.writable = select.poll()
        """Also reports what can be read."""
        self.transport: Any = None
        """py-amqp's transport: the socket, and whether it is connected. Set before it connects. None: not set yet, or
        closed."""

    def opened(self) -> None:
        """The transport is connected: from here on, no call on its socket blocks."""
        self.transport.sock.setblocking(False)
        self.writable.register(self.transport.sock, select.POLLIN | select.POLLOUT)

    @property
    def socket(self) -> Any:
        """
        Raises:
            amqp.exceptions.RecoverableConnectionError: the connection is closed, or was lost.
        """
        if self.transport is None or not self.transport.connected:
            raise amqp.exceptions.RecoverableConnectionError("connection already closed")
        return self.transport.sock

    def lose(self) -> None:
        """The connection is unusable from now on."""
        self.transport.connected = False

    def close(self) -> None:
        transport, self.transport = self.transport, None
        if transport is not None and transport.sock is not None:
            # Not `transport.close()`: in a forked child, its shutdown and its TLS goodbye would end the connection for
            # the parent, too.
            transport.sock.close()
            transport.connected = False

    def receive(self) -> list[bytes]:
        """What has arrived, up to 256 KiB, without waiting.

        Raises:
            ConnectionResetError: the broker closed the connection.
            OSError or amqp.exceptions.AMQPError: the connection was lost.
        """
        sock = self.socket
        pieces: list[bytes] = []
        # TLS returns one record (16 KiB at most) per call, and buffers nothing if the call asks for more than that.
        for _ in range(_READS_AT_ONCE):
            try:
                piece = sock.recv(_READ_SIZE)
            except WOULD_BLOCK:
                break
            except OSError:
                self.lose()
                raise
            pieces.append(piece)
            if not piece or (len(piece) < _READ_SIZE and not self.tls):
                break
        if pieces == [b""]:
            self.lose()
            raise ConnectionResetError("the broker closed the connection without giving a reason")
        return pieces
