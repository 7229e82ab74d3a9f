"""A TCP proxy that simulates network faults: it cuts, stalls, delays or truncates connections."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from collections import deque

DEEP = 65536


class Link:
    """One connection through the proxy."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client = client
        self.server = server
        self.stalled = False
        self.truncate = False

    def close(self, *, reset: bool) -> None:
        for sock in (self.client, self.server):
            with contextlib.suppress(OSError):
                if reset:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


class Proxy:
    """`with Proxy(port) as proxy:` listens on `proxy.port`, and forwards to `port` on this machine.

    `links` are the connections in order.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.delay = 0.0
        """Seconds of additional delay, in each direction."""
        self.trap: bytes | None = None
        """When a client sends this, its connection is closed; see `cut_at`."""
        self._forward = False
        self.links: list[Link] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._closed = False

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._listener.close()
        self.cut()

    @property
    def living(self) -> list[Link]:
        return [link for link in self.links if link.client.fileno() >= 0]

    def cut(self) -> None:
        """Reset all present connections. New ones are forwarded."""
        for link in self.living:
            link.close(reset=True)

    def stall(self) -> None:
        """Forward nothing on the present connections, and do not close them, like a dead peer behind a router."""
        for link in self.living:
            link.stalled = True

    def truncate(self) -> None:
        """Forward only half of the next data from the broker, in the middle of a frame, then close."""
        for link in self.living:
            link.truncate = True

    def cut_at(self, data: bytes, *, forward: bool) -> None:
        """Close the connection of the next client that sends this: after the server has it (but the client gets no
        answer), or before. Then `trap` is None again."""
        self._forward = forward
        self.trap = data

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self.target), timeout=5)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            link = Link(client, server)
            self.links.append(link)
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._carry, args=(link, source, sink), daemon=True).start()

    def _carry(self, link: Link, source: socket.socket, sink: socket.socket) -> None:
        later: deque[tuple[float, bytes]] = deque()  # delayed data, and when it arrives
        try:
            while True:
                wait = max(0.0, later[0][0] - time.monotonic()) if later else 0.5
                readable, _, _ = select.select([source], [], [], min(wait, 0.5))
                if link.stalled:
                    time.sleep(0.2)
                    continue
                if readable:
                    data = source.recv(DEEP)
                    if not data:
                        break
                    if link.truncate and sink is link.client and len(data) > 20:
                        sink.sendall(data[: -(len(data) // 2) or None])
                        link.close(reset=False)
                        return
                    trap = self.trap
                    if trap is not None and source is link.client and trap in data:
                        self.trap = None
                        if self._forward:
                            sink.sendall(data)
                        link.close(reset=False)
                        return
                    later.append((time.monotonic() + self.delay, data))
                while later and later[0][0] <= time.monotonic():
                    sink.sendall(later.popleft()[1])
        except (OSError, ValueError):  # ValueError: select on a closed socket
            pass
        link.close(reset=False)
