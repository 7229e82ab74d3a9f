"""A connection to Artemis over AMQP 1.0: qpid-proton's engine on a socket of this module.

proton keeps the protocol's state (frames, sessions, links, windows, idle timeouts) and never touches the socket. Here,
what arrives is pushed into it, what it wants to send is written, and its events become calls of the channels.

| module | subject |
|---|---|
| `connection` | waiting, time limits, closing |
| `engine` | proton's engine: reading, writing, events |
| `channel` | publish, consume, settle |
| `links` | one address to send to, one queue to receive from |
| `declarations` | exchanges, queues and bindings as addresses and selectors |
| `management` | requests to the broker's management address |
| `transactions` | what counts the deliveries to a process that dies |
| `stream` | the socket |
| `message`, `selector`, `names`, `answers`, `broker_xml` | pure values |

Every wait has a limit in seconds: `connect_timeout` (TCP, TLS and the handshake in total), `OPERATION_TIMEOUT` (a
request and its answer) and `WRITE_TIMEOUT` (256 KiB).

Differences from RabbitMQ: docs/howto/activemq.md.
"""

from __future__ import annotations

import contextlib
import itertools
import select
import socket
from collections import deque
from collections.abc import Callable, Generator, Mapping
from time import monotonic
from typing import Any
from urllib.parse import unquote, urlsplit

import amqp
import amqp.exceptions

from lightbus.transport import OnUnsent
from lightbus.transport.activemq import stream
from lightbus.transport.activemq.channel import OPERATION_TIMEOUT, Channel
from lightbus.transport.activemq.declarations import Declarations
from lightbus.transport.activemq.engine import Engine
from lightbus.transport.activemq.links import Incoming, Outgoing
from lightbus.transport.activemq.management import Management
from lightbus.transport.activemq.transactions import Transactions
from lightbus.transport.interruption import Interruption
from lightbus.transport.kombu_calls import KombuTransport, ignore

DEFAULT_PORT = 5672
CONNECT_TIMEOUT = 5.0
CLOSE_TIMEOUT = 3.0
STALLED_FOR = 1.0
"""Seconds without credit after which the broker counts as blocked."""


class Connection:
    """See `lightbus.transport.Connection`. One thread owns it, or an event loop in its place."""

    def __init__(
        self,
        endpoint: stream.Endpoint,
        host: str,
        *,
        user: str | None,
        password: str | None,
        name: str,
        tls: Mapping[str, Any] | None,
        heartbeat: float,
        connect_timeout: float,
    ) -> None:
        """
        Raises:
            OSError: the host did not answer (TimeoutError: within `connect_timeout`).
            amqp.exceptions.AMQPError: the broker refused, or does not speak AMQP 1.0.
        """
        self.client: Any = None  # kombu's connection
        self.reached: Any = None
        self.host = host
        self.blocked = False
        self.may_wait = True
        self.on_unsent: OnUnsent = ignore
        self.channels: dict[int, Channel] = {}
        self._numbers = itertools.count(1)
        self._link_numbers = itertools.count(1)
        self._ready: deque[Callable[[], object]] = deque()
        """Callbacks for what has arrived."""
        self._deadline: float | None = None
        """When (monotonic) the current requests must have ended."""
        self._stalled_since: float | None = None
        self._interruption = Interruption()
        self.engine = Engine(self, host, name, user, password, idle=2 * heartbeat)
        self.management = Management(self, user or "")
        self.declarations = Declarations(self.management)
        self.transactions = Transactions(self)
        try:
            self._connect(endpoint, tls, connect_timeout)
        except BaseException:
            self.collect()
            raise

    def _connect(self, endpoint: stream.Endpoint, tls: Mapping[str, Any] | None, seconds: float) -> None:
        deadline = monotonic() + seconds
        connected = stream.connect(endpoint, self.host, deadline, tls)
        self._poll, self._read_poll = select.poll(), select.poll()
        self._poll.register(connected.fileno(), select.POLLIN)
        self._poll.register(self._interruption, select.POLLIN)
        self._read_poll.register(connected.fileno(), select.POLLIN)
        self.engine.open(connected)
        self.wait_for(lambda: self.engine.is_open, "the AMQP handshake", max(0.0, deadline - monotonic()), of=seconds)

    @property
    def connected(self) -> bool:
        return not self.engine.is_closed and self.engine.error is None

    @property
    def links(self) -> dict[str, Incoming | Outgoing]:
        """All links of all channels, by name."""
        return self.engine.links

    @property
    def server_properties(self) -> Mapping[str, Any]:
        """`product` and `version`, as strings."""
        return self.engine.server_properties

    def channel(self) -> Channel:
        _ = self.engine.stream  # raises, if it is closed
        number = next(self._numbers)
        self.channels[number] = channel = Channel(self, number)
        return channel

    def link_name(self, what: str) -> str:
        """A name that no other link of this connection has."""
        return f"{next(self._link_numbers)} {what}"

    # --- waiting ------------------------------------------------------------------------------

    def drain_events(self, timeout: float | None = None) -> None:
        """Wait up to `timeout` seconds for something to arrive, then dispatch *everything* that has arrived.

        Returns after that, or as soon as `interrupt()` is called (or was called before).
        """
        deadline = None if timeout is None else monotonic() + timeout
        opened = self.engine.stream
        self.engine.flush()
        if self.dispatch():  # what is left of the last call, or arrived during a request
            return
        while True:
            ready = self._poll.poll(None if deadline is None else max(0.0, deadline - monotonic()) * 1000)
            if not ready:
                raise TimeoutError("nothing arrived")
            interrupted = False
            for descriptor, _ in ready:
                if descriptor == opened.fileno():
                    self.engine.read()
                else:
                    self._interruption.clear()
                    interrupted = True
            if self._flush_and_dispatch() or interrupted:
                return

    def wait_for(
        self, is_over: Callable[[], bool], what: str, seconds: float = OPERATION_TIMEOUT, *, of: float | None = None
    ) -> None:
        """Read and write until `is_over`, for the answer to a request. Callbacks are left to the next `drain_events`.

        Args:
            of: the whole limit, for the message, where a part of it is over.

        Raises:
            TimeoutError: it takes longer than `seconds`, or than `limit` allows.
            Exception: why the connection has ended.
        """
        deadline = monotonic() + seconds
        if self._deadline is not None:
            deadline = min(deadline, self._deadline)
        self.engine.flush(wait=True)
        while not is_over():
            _ = self.engine.stream  # raises, if the connection has ended
            left = deadline - monotonic()
            if left <= 0 or not self._read_poll.poll(left * 1000):
                raise TimeoutError(f"the broker at {self.host} did not complete {what} within {of or seconds:.3g} s")
            self.engine.read()
            if not is_over():
                self.engine.flush(wait=True)

    @contextlib.contextmanager
    def limit(self, seconds: float) -> Generator[None]:
        """End all requests inside within `seconds` in total."""
        before, self._deadline = self._deadline, monotonic() + seconds
        try:
            yield
        finally:
            self._deadline = before

    def flush(self) -> None:
        """Write what is to be sent."""
        self.engine.flush()

    def interrupt(self) -> None:
        """Let the current or the next `drain_events` return at once. From any thread, at any time."""
        self._interruption.set()

    def dispatch_later(self, callback: Callable[[], object]) -> None:
        """Call it in the next `drain_events`."""
        self._ready.append(callback)

    def _flush_and_dispatch(self) -> bool:
        """What has arrived may be credit, for what waits; or why the connection has ended, which comes last."""
        if self.engine.error is None:
            self.engine.flush()
        return self.dispatch()

    def dispatch(self) -> bool:
        """Call what is ready. An exception leaves the rest to the next call. A callback may close the connection."""
        ready = self._ready
        waiting = len(ready)
        for _ in range(waiting):
            if not ready:
                break
            ready.popleft()()
        if self.engine.is_closed:
            return True
        if self.engine.error is not None:
            raise self.engine.error
        if waiting:
            self.engine.flush()
        return waiting > 0

    # --- for an event loop: see `lightbus.transport.WatchedConnection` --------------------------

    def watched(self) -> Connection:
        return self

    def fileno(self) -> int:
        return self.engine.stream.fileno()

    def drain_nowait(self) -> None:
        self.engine.read()
        self._flush_and_dispatch()

    def catch_up(self) -> bool:
        self.engine.flush()
        return self.dispatch()

    # --- heartbeats, closing ------------------------------------------------------------------

    def heartbeat_tick(self, rate: int = 2) -> None:
        self.engine.tick()
        self.engine.flush()
        stalled = any(isinstance(link, Outgoing) and link.waiting for link in self.links.values())
        now = monotonic()
        if not stalled:
            self._stalled_since = None
        elif self._stalled_since is None:
            self._stalled_since = now
        self.blocked = self._stalled_since is not None and now - self._stalled_since >= STALLED_FOR

    def close(self) -> None:
        """Close with the protocol's handshake, within `CLOSE_TIMEOUT`."""
        if self.engine.is_closed:
            return
        try:
            # If the peer is gone or silent, the connection is closed anyway.
            with contextlib.suppress(OSError, amqp.exceptions.AMQPError), self.limit(CLOSE_TIMEOUT):
                for channel in [*self.channels.values()]:
                    channel.settle_declarations()
                    channel.give_back()
                self.wait_for(lambda: not self.transactions.are_ending, "returning messages")
                self.engine.close()
                self.wait_for(lambda: self.engine.error is not None, "close")
        finally:
            self.collect()

    def collect(self) -> None:
        """Drop the connection without closing it at the broker: after a fault, or in a forked child."""
        self.engine.drop()
        self._interruption.close()
        for channel in [*self.channels.values()]:
            channel.drop()
        self.channels.clear()
        self._ready.clear()


class Transport(KombuTransport):
    """The class for `kombu.Connection(transport=...)`."""

    driver_type = "lightbus-activemq"
    driver_name = "python-qpid-proton"

    def establish_connection(self) -> Connection:
        client = self.client
        parts = urlsplit(client.hostname)
        options = dict(client.transport_options or {})
        host = unquote(parts.hostname or "localhost")
        endpoint = options.get("endpoint")
        if endpoint is None:
            port = parts.port or DEFAULT_PORT
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            endpoint = family, kind, protocol, address
        tls = client.ssl if isinstance(client.ssl, Mapping) else None
        connection = Connection(
            endpoint,
            host,
            user=None if parts.username is None else unquote(parts.username),
            password=None if parts.password is None else unquote(parts.password),
            name=str(options.get("client_properties", {}).get("connection_name", "lightbus")),
            tls=tls,
            heartbeat=float(client.heartbeat or 10),
            connect_timeout=float(client.connect_timeout or CONNECT_TIMEOUT),
        )
        connection.client = client
        return connection
