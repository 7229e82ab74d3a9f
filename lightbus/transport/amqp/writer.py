"""Writing: sends all data within a limit, or what can be sent at once, from any thread."""

from __future__ import annotations

import select
import threading
from time import monotonic
from typing import Protocol

from lightbus import errors
from lightbus.transport import OnUnsent
from lightbus.transport.amqp.link import WOULD_BLOCK, Link


class Sender(Protocol):
    """What a `SocketWriter` needs from its connection."""

    may_wait: bool
    on_unsent: OnUnsent

    def interrupt(self) -> None: ...

    def read(self) -> None:
        """Read what has arrived, for a later dispatch."""
        ...


class SocketWriter:
    """Sends the data of one connection.

    The user of the connection (its owner, or an event loop) calls `send`. Any thread may call `send_nowait`.
    """

    def __init__(self, connection: Sender, link: Link, timeout: float) -> None:
        self._connection = connection
        self._link = link
        self._timeout = timeout
        # Reentrant, so that it knows its owner: see `send_nowait`.
        self._sending = threading.RLock()
        self.unsent: bytes | memoryview = b""
        """The rest of what was begun by a caller that could not wait. The next `send` begins with it."""

    def send(self, data: bytes | memoryview) -> None:
        """Send everything within the limit. If the connection may not wait: what can be sent at once.

        Raises:
            TimeoutError: the peer did not read in time. A part is sent, so the connection is lost.
            OSError or amqp.exceptions.AMQPError: the connection is lost.
        """
        with self._sending:
            if self.unsent:
                data, self.unsent = b"".join((self.unsent, data)), b""
            self._send_all(memoryview(data))

    def _send_all(self, left: memoryview) -> None:
        link, connection = self._link, self._connection
        deadline = monotonic() + self._timeout
        if link.deadline is not None:
            deadline = min(deadline, link.deadline)
        while left:
            sock = link.socket
            try:
                left = left[sock.send(left) :]
            except WOULD_BLOCK:
                if not connection.may_wait:
                    self.unsent = bytes(left)
                    connection.on_unsent()
                    return
                ready = link.writable.poll(max(0.0, deadline - monotonic()) * 1000)
                if not ready or monotonic() > deadline:
                    link.lose()
                    raise TimeoutError(f"the broker at {link.host} does not read from the connection") from None
                if ready[0][1] != select.POLLOUT:
                    # Read now and dispatch later: a broker that cannot send its confirms may stop reading.
                    connection.read()
            except OSError:
                link.lose()
                raise

    def send_nowait(self, data: bytes) -> bool:
        """Send from any thread, if that needs no waiting. False: nothing was sent, and the owner must send it.

        So a publisher needs no switch to the owner's thread and back. What the system does not take at once is kept in
        `unsent`, for the owner.

        Raises:
            BaseException: a signal handler raised it. It is unknown what was sent: replace the connection.
        """
        if self._link.tls:  # a TLS session must not be used by two threads at once
            return False
        try:
            # Inside `try`, since a signal handler may raise right after it.
            if not self._sending.acquire(blocking=False):
                return False
            transport = self._link.transport
            if transport is None or not transport.connected or self.unsent:
                return False
            try:
                sent = transport.sock.send(data)
            except OSError as error:
                if errors.is_from_deeper(error):
                    raise
                return False  # it would block, or the connection is lost: the owner finds out
            if sent < len(data):
                self.unsent = memoryview(data)[sent:]
                self._connection.interrupt()
                self._connection.on_unsent()
            return True
        finally:
            try:
                self._sending.release()
            except RuntimeError as error:  # another thread holds it
                if errors.is_from_deeper(error):
                    raise

    def close(self) -> None:
        """Close the socket, but not while another thread sends: its data could go to a new socket with the same number.

        In a forked child, that thread does not exist, and its lock may stay locked: hence the limit.
        """
        if self._link.transport is None:
            return
        locked = self._sending.acquire(timeout=0.1)
        self._link.close()
        if locked:
            self._sending.release()
