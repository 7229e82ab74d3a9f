"""A connection to Artemis over AMQP 1.0: qpid-proton's engine on a socket of this module.

proton keeps the protocol's state (frames, sessions, links, windows, idle timeouts) and never touches the socket. Here,
what arrives is pushed into it, what it wants to send is written, and its events become calls of the channels.

| module | subject |
|---|---|
| `connection` | handshake, waiting, time limits, closing |
| `channel` | publish, consume, settle |
| `links` | one address to send to, one queue to receive from |
| `declarations` | exchanges, queues and bindings as addresses and selectors |
| `management` | requests to the broker's management address |
| `stream` | the socket |
| `message`, `selector`, `names`, `answers`, `broker_xml` | pure values |

Every wait has a limit in seconds: `connect_timeout` (TCP, TLS and the handshake in total), `OPERATION_TIMEOUT` (a
request and its answer) and `WRITE_TIMEOUT` (all that is written at once).

Differences from RabbitMQ: docs/howto/activemq.md.
"""

from __future__ import annotations

import contextlib
import itertools
import select
import socket
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any
from urllib.parse import unquote, urlsplit

import amqp
import amqp.exceptions
from kombu.transport import base
from proton import Collector, Condition, Endpoint, Event, Session, TransportException
from proton import Connection as Engine
from proton import Transport as Driver

from lightbus import errors
from lightbus.transport import OnUnsent
from lightbus.transport.activemq import answers, stream
from lightbus.transport.activemq.channel import OPERATION_TIMEOUT, Channel
from lightbus.transport.activemq.declarations import Declarations
from lightbus.transport.activemq.links import Incoming, Outgoing
from lightbus.transport.activemq.management import Management
from lightbus.transport.activemq.stream import Stream
from lightbus.transport.kombu_channel import ignore
from lightbus.version import __version__

DEFAULT_PORT = 5672
CONNECT_TIMEOUT = 5.0
WRITE_TIMEOUT = 5.0
CLOSE_TIMEOUT = 3.0
MAX_FRAME = 131072
"""Bytes. Artemis' own default."""
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
        self.client: Any = None  # kombu's connection
        self.reached: Any = None
        self.host = host
        self.blocked = False
        self.may_wait = True
        self.on_unsent: OnUnsent = ignore
        self.channels: dict[int, Channel] = {}
        self.links: dict[str, Incoming | Outgoing] = {}
        """By name."""
        self.name = name
        self._numbers = itertools.count(1)
        self._link_numbers = itertools.count(1)
        self._ready: deque[Callable[[], object]] = deque()
        """Callbacks for what has arrived."""
        self._error: Exception | None = None
        """Why the connection has ended."""
        self._deadline: float | None = None
        """When (monotonic) the current operation must have ended."""
        self._stalled_since: float | None = None
        self._interrupted = False
        self._wake_up, self._woken = socket.socketpair()
        self._wake_up.setblocking(False)
        self._woken.setblocking(False)
        self._stream: Stream | None = None
        self.management = Management(self)
        self.declarations = Declarations(self.management)
        self._ending: list[Session] = []
        """Closed here, and not yet by the broker."""
        self._collector = Collector()
        self.engine = Engine()
        self.engine.collect(self._collector)
        self.engine.container = f"{name} {uuid.uuid4().hex[:12]}"
        self.engine.hostname = host
        if user is not None:
            self.engine.user = user
            self.engine.password = password or ""
        self.engine.properties = {"product": "Lightbus", "version": __version__, "connection_name": name}
        self._driver = Driver()
        self._driver.max_frame_size = MAX_FRAME
        self._driver.idle_timeout = 2 * heartbeat
        mechanism = "PLAIN" if user is not None else "ANONYMOUS"
        sasl = self._driver.sasl()
        sasl.allowed_mechs(mechanism)
        sasl.allow_insecure_mechs = True
        self._driver.bind(self.engine)
        try:
            self._connect(endpoint, tls, connect_timeout)
        except BaseException:
            self.collect()
            raise

    def _connect(self, endpoint: stream.Endpoint, tls: Mapping[str, Any] | None, seconds: float) -> None:
        deadline = monotonic() + seconds
        self._stream = stream.connect(endpoint, self.host, deadline, tls)
        self._poll, self._read_poll = select.poll(), select.poll()
        self._poll.register(self._stream.fileno(), select.POLLIN)
        self._poll.register(self._woken, select.POLLIN)
        self._read_poll.register(self._stream.fileno(), select.POLLIN)
        self.engine.open()
        self._driver.tick(monotonic())
        self._opened = False
        self.wait_for(lambda: self._opened, "the AMQP handshake", max(0.0, deadline - monotonic()), of=seconds)

    @property
    def connected(self) -> bool:
        return self._stream is not None and self._error is None

    @property
    def server_properties(self) -> Mapping[str, Any]:
        """`product` and `version`, as strings."""
        given = self.engine.remote_properties or {}
        return {str(key): str(value) for key, value in given.items()}

    def channel(self) -> Channel:
        self.check_open()
        number = next(self._numbers)
        self.channels[number] = channel = Channel(self, self.engine.session(), number)
        return channel

    def link_name(self, what: str) -> str:
        """A name that no other link of this connection has."""
        return f"{next(self._link_numbers)} {what}"

    def end_session(self, session: Session) -> None:
        """Close it once the broker has opened it: proton does not expect the answer to a session that it has closed."""
        self._ending.append(session)
        if not session.state & Endpoint.REMOTE_UNINIT:
            session.close()

    def check_open(self) -> Stream:
        """
        Raises:
            Exception: why the connection has ended.
        """
        if self._error is not None:
            raise self._error
        if self._stream is None:
            raise answers.closed("connection")
        return self._stream

    # --- waiting ------------------------------------------------------------------------------

    def drain_events(self, timeout: float | None = None) -> None:
        """Wait up to `timeout` seconds for something to arrive, then dispatch *everything* that has arrived.

        Returns after that, or as soon as `interrupt()` is called (or was called before).
        """
        deadline = None if timeout is None else monotonic() + timeout
        opened = self.check_open()
        self.flush()
        if self._dispatch():  # what is left of the last call, or arrived during a request
            return
        while True:
            ready = self._poll.poll(None if deadline is None else max(0.0, deadline - monotonic()) * 1000)
            if not ready:
                raise TimeoutError("nothing arrived")
            interrupted = False
            for descriptor, _ in ready:
                if descriptor == opened.fileno():
                    self._read()
                else:
                    self._woken.recv(64)
                    self._interrupted = False
                    interrupted = True
            self.flush()  # credit has arrived, for example
            if self._dispatch() or interrupted:
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
        self.flush(wait=True)
        while not is_over():
            self.check_open()
            left = deadline - monotonic()
            if left <= 0 or not self._read_poll.poll(left * 1000):
                raise TimeoutError(f"the broker at {self.host} did not complete {what} within {of or seconds:.3g} s")
            self._read()
            self.flush(wait=True)

    @contextlib.contextmanager
    def limit(self, seconds: float) -> Any:
        """End all requests inside within `seconds` in total."""
        before, self._deadline = self._deadline, monotonic() + seconds
        try:
            yield
        finally:
            self._deadline = before

    def interrupt(self) -> None:
        """Let the current or the next `drain_events` return at once. From any thread, at any time."""
        if not self._interrupted:
            self._interrupted = True  # one byte is enough for any number of calls
            try:
                self._wake_up.send(b"\0")
            except BaseException as error:
                if isinstance(error, OSError) and not errors.is_from_deeper(error):  # closed
                    return
                self._interrupted = False  # a signal handler raised: it is unknown whether the byte was sent
                raise

    # --- for an event loop: see `lightbus.transport.WatchedConnection` --------------------------

    def watched(self) -> Connection:
        return self

    def fileno(self) -> int:
        return self.check_open().fileno()

    def drain_nowait(self) -> None:
        self.check_open()
        self._read()
        self.flush()  # credit has arrived, for example
        self._dispatch()

    def catch_up(self) -> bool:
        self.check_open()
        self.flush()
        return self._dispatch()

    # --- reading and writing ------------------------------------------------------------------

    def _read(self) -> None:
        """Push what has arrived into the engine, and collect what follows from it."""
        driver = self._driver
        try:
            for piece in self.check_open().receive():
                view = memoryview(piece)
                while view:
                    capacity = driver.capacity()
                    if capacity <= 0:
                        break
                    driver.push(view[:capacity])
                    view = view[capacity:]
                    self._collect()
        except TransportException as error:
            self._collect()
            self._lost(answers.connection_error("", str(error)))
        except OSError as error:
            self._collect()
            self._lost(error)
        self._collect()

    def flush(self, *, wait: bool = False) -> None:
        """Write what the engine has to send. If the connection may not wait: what can be written at once.

        Raises:
            TimeoutError: the peer did not read in time.
            OSError: the connection is lost.
        """
        driver, deadline = self._driver, 0.0
        self._collect()
        while (pending := driver.pending()) > 0:
            data = driver.peek(pending)
            if not data:
                break
            try:
                sent = self.check_open().send(data)
                if sent:
                    driver.pop(sent)
                    continue
                if not (wait or self.may_wait):
                    self.on_unsent()
                    return
                deadline = deadline or monotonic() + WRITE_TIMEOUT
                readable = self.check_open().wait_writable(deadline - monotonic())
            except OSError as error:
                self._lost(error)
                raise
            if readable:
                # Read now, dispatch later: a broker that cannot send its confirms may stop reading.
                self._read()

    def _lost(self, error: Exception) -> None:
        if self._error is None:
            self._error = error

    def _collect(self) -> None:
        """Turn the engine's events into calls of links and channels."""
        collector = self._collector
        while (event := collector.peek()) is not None:
            kind = event.type
            if kind is Event.DELIVERY:
                delivery = event.delivery
                link = self.links.get(delivery.link.name)
                if isinstance(link, Outgoing):
                    link.outcome(delivery)
                elif link is not None:
                    link.read()
            elif kind in _OF_LINKS:
                link = self.links.get(event.link.name)
                if link is not None:
                    self._of_link(kind, link)
            elif kind is Event.SESSION_REMOTE_OPEN:
                if event.session in self._ending:
                    event.session.close()
            elif kind is Event.SESSION_REMOTE_CLOSE:
                self._session_closed(event.session)
            elif kind is Event.CONNECTION_REMOTE_OPEN:
                self._opened = True
            elif kind is Event.CONNECTION_REMOTE_CLOSE:
                condition = self.engine.remote_condition
                self._end(condition or Condition("amqp:connection:forced", "the broker closed the connection"))
            elif kind is Event.TRANSPORT_ERROR:
                self._end(self._driver.condition)
            collector.pop()

    def _of_link(self, kind: Any, link: Incoming | Outgoing) -> None:
        if kind is Event.LINK_FLOW:
            link.flowed()
        elif kind is Event.LINK_REMOTE_OPEN:
            if isinstance(link, Incoming):
                link.is_open = link.link.remote_source.address is not None
        else:
            self.links.pop(link.link.name, None)
            link.closed(link.link.remote_condition)

    def _session_closed(self, session: Session) -> None:
        if session in self._ending:
            self._ending.remove(session)
        for channel in [*self.channels.values()]:
            if channel.session == session:
                condition = session.remote_condition
                channel.fail(answers.channel_error(condition.name if condition else "", str(condition or "")))

    def _end(self, condition: Condition | None) -> None:
        name, description = ("", "") if condition is None else (condition.name, condition.description or "")
        if name == "amqp:unauthorized-access" and not self._opened:
            self._lost(answers.access_refused(f"login refused: {description}"))
        else:
            self._lost(answers.connection_error(name, description))

    def dispatch_later(self, callback: Callable[[], object]) -> None:
        """Call it in the next `drain_events`."""
        self._ready.append(callback)

    def _dispatch(self) -> bool:
        """Call what is ready. An exception leaves the rest to the next call."""
        waiting = len(self._ready)
        for _ in range(waiting):
            self._ready.popleft()()
        if waiting:
            self.flush()
        if self._error is not None:
            raise self._error
        return waiting > 0

    # --- heartbeats, closing ------------------------------------------------------------------

    def heartbeat_tick(self, rate: int = 2) -> None:
        self.check_open()
        self._driver.tick(monotonic())
        self.flush()
        self.check_open()
        stalled = any(isinstance(link, Outgoing) and link.stalled for link in self.links.values())
        now = monotonic()
        if not stalled:
            self._stalled_since = None
        elif self._stalled_since is None:
            self._stalled_since = now
        self.blocked = self._stalled_since is not None and now - self._stalled_since >= STALLED_FOR

    def close(self) -> None:
        """Close with the protocol's handshake, within `CLOSE_TIMEOUT`."""
        if self._stream is None:
            return
        try:
            if self._error is None:
                # If the peer is gone or silent, the connection is closed anyway.
                with contextlib.suppress(OSError, amqp.exceptions.AMQPError):
                    for channel in [*self.channels.values()]:
                        channel.settle_declarations()
                        channel.give_back()
                    self.engine.close()
                    self.wait_for(lambda: self._error is not None, "close", CLOSE_TIMEOUT)
        finally:
            self.collect()

    def collect(self) -> None:
        """Drop the connection without closing it at the broker: after a fault, or in a forked child."""
        if self._stream is not None:
            self._stream.close()
        self._stream = None
        self._wake_up.close()
        self._woken.close()
        for channel in [*self.channels.values()]:
            channel.drop()
        self.channels.clear()
        self.links.clear()
        self._ready.clear()
        self._ending.clear()
        self._driver.unbind()


_OF_LINKS = (Event.LINK_FLOW, Event.LINK_REMOTE_OPEN, Event.LINK_REMOTE_CLOSE, Event.LINK_REMOTE_DETACH)


class Transport(base.Transport):
    """The class for `kombu.Connection(transport=...)`: creates connections, and passes kombu's calls on to them."""

    client: Any = None  # kombu's connection
    can_parse_url = True
    driver_type = "lightbus-activemq"
    driver_name = "python-qpid-proton"
    connection_errors: Any = amqp.Connection.connection_errors
    channel_errors: Any = amqp.Connection.channel_errors
    recoverable_connection_errors = amqp.Connection.recoverable_connection_errors
    recoverable_channel_errors = amqp.Connection.recoverable_channel_errors

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

    def close_connection(self, connection: Connection) -> None:
        connection.client = None
        connection.close()

    def create_channel(self, connection: Connection) -> Channel:
        return connection.channel()

    def drain_events(self, connection: Connection, **kwargs: Any) -> None:
        connection.drain_events(**kwargs)

    def heartbeat_check(self, connection: Connection, rate: int = 2) -> None:
        connection.heartbeat_tick()

    def verify_connection(self, connection: Connection) -> Any:
        return connection.connected

    def driver_version(self) -> Any:
        return __version__

    def _collect(self, connection: Connection | None) -> None:
        if connection is not None:
            connection.collect()
