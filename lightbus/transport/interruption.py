"""Ends the wait of a connection's owner, from any thread. Safe against signal handlers that raise."""

from __future__ import annotations

import socket

from lightbus import errors


class Interruption:
    """Has a descriptor that is readable from `set` to `clear`, for the owner's poll."""

    def __init__(self) -> None:
        self._is_set = False
        self._writer, self._reader = socket.socketpair()
        self._writer.setblocking(False)
        self._reader.setblocking(False)

    def fileno(self) -> int:
        return self._reader.fileno()

    def set(self) -> None:
        """From any thread, at any time, also after `close`."""
        if not self._is_set:
            self._is_set = True  # one byte is enough for any number of calls
            try:
                self._writer.send(b"\0")
            except BaseException as error:
                if isinstance(error, OSError) and not errors.is_from_deeper(error):  # closed
                    return
                self._is_set = False  # a signal handler raised: it is unknown whether the byte was sent
                raise

    def clear(self) -> None:
        """By the owner, when the descriptor is readable."""
        # In this order, a `set` in between costs one idle turn. In the other order, it is lost.
        self._reader.recv(64)
        self._is_set = False

    def close(self) -> None:
        self._writer.close()
        self._reader.close()
