"""Serves the pages with uvicorn."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from lightbus.web.security import Guard
from lightbus.web.site import site
from lightbus.web.source import Source

CONNECTIONS = 200
"""At once. Further ones are refused."""


def listen(host: str, port: int) -> socket.socket:
    """
    Args:
        port: 0 for any that is free.

    Raises:
        OSError: the address is in use, or not one of this machine.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(128)
    except OSError:
        found.close()
        raise
    return found


def serve(listener: socket.socket, source: Source, guard: Guard, *, actions: bool, ready: Callable[[], object]) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        ready: called when the first request can be answered.
    """
    server = _Server(listener, source, guard, actions=actions, ready=ready)
    server.run_until_signal()


class _Server(uvicorn.Server):
    def __init__(
        self,
        listener: socket.socket,
        source: Source,
        guard: Guard,
        *,
        actions: bool,
        ready: Callable[[], object],
    ) -> None:
        app = site(source, guard, actions=actions, is_over=lambda: self.should_exit)
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=CONNECTIONS,
                timeout_graceful_shutdown=2,
                loop="asyncio",
                ws="none",
            )
        )
        self._listener = listener
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # It logs a traceback for each page that still waits for the broker.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)

    def run_until_signal(self) -> None:
        # uvicorn raises the signal that ended it once more.
        before = {number: signal.signal(number, _ignore) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            asyncio.run(self.serve([self._listener]))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _ignore(_number: int, _frame: FrameType | None) -> None:
    pass
