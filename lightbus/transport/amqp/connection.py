"""A connection to RabbitMQ over py-amqp, which reads and writes in large pieces.

py-amqp reads a message with nine small `recv` calls and decodes it with generic tables. Here, the socket is read 64 KiB
at a time, and the four methods that come once per message (deliver, publish, ack, nack) are read and written by hand.
Everything else (handshake, declarations, errors) is py-amqp's.

| module | subject |
|---|---|
| `connection` | handshake, waiting, time limits, closing |
| `frames` | reading: bytes to calls of channels |
| `writer` | writing: everything within a limit, or at once from any thread |
| `link` | the socket that both share |
| `channel` | publish, consume, declare |
| `endpoint` | connecting to one IP address of a host |
| `wire` | bytes of properties and frames |

Every wait has a limit in seconds: `connect_timeout` (TCP, TLS and AMQP's handshake in total), `operation_timeout` (a
method and its answer) and `write_timeout` (up to 256 KiB). The last two are transport options.
"""

# py-amqp and kombu have no types:
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import contextlib
import platform
import select
import socket
import ssl
from collections.abc import Generator, Mapping
from time import monotonic
from typing import Any, cast

import amqp
import amqp.exceptions
import amqp.transport
import kombu.transport.pyamqp
from amqp import spec

from lightbus.transport import OnUnsent
from lightbus.transport.amqp.channel import Channel as AmqpChannel
from lightbus.transport.amqp.channel import ignore, method_name
from lightbus.transport.amqp.endpoint import Endpoint, to_endpoint
from lightbus.transport.amqp.frames import FrameReader
from lightbus.transport.amqp.link import Link
from lightbus.transport.amqp.writer import SocketWriter
from lightbus.transport.interruption import Interruption
from lightbus.version import __version__

CONNECT_TIMEOUT = 5.0
OPERATION_TIMEOUT = 10.0
WRITE_TIMEOUT = 5.0
CLOSE_TIMEOUT = 3.0
USER_TIMEOUT = 30
"""Seconds that sent data may stay unacknowledged by the peer's system. With py-amqp's 1 s, a short delay in the network
ends connections."""


class Connection(kombu.transport.pyamqp.Connection):
    """A connection that reads and writes in large pieces; see `lightbus.transport.Connection`."""

    Channel = AmqpChannel
    _transport: Any
    channels: Any
    frame_max: Any
    is_closing: Any
    bytes_sent: Any

    def __init__(
        self,
        *args: Any,
        operation_timeout: float = OPERATION_TIMEOUT,
        write_timeout: float = WRITE_TIMEOUT,
        connect_timeout: float | None = None,
        socket_settings: Mapping[int, int] | None = None,
        client_properties: Mapping[str, Any] | None = None,
        endpoint: Endpoint | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            endpoint: the address to connect to. Without it, the host is looked up.
        """
        settings = dict(socket_settings or {})
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            settings.setdefault(socket.TCP_USER_TIMEOUT, USER_TIMEOUT * 1000)
        kwargs["connect_timeout"] = connect_timeout or CONNECT_TIMEOUT
        kwargs["socket_settings"] = settings
        kwargs["client_properties"] = {**_product(), **(client_properties or {})}
        super().__init__(*args, **kwargs)
        self.endpoint = endpoint
        self.reached: Any = None
        self.operation_timeout = operation_timeout
        self.blocked = False
        self.may_wait = True
        self.on_unsent: OnUnsent = ignore
        self._link = Link(self.host, tls=bool(self.ssl))
        self._frames = FrameReader(self)
        self.writer = SocketWriter(self, self._link, write_timeout)
        self._interruption = Interruption()

    def connect(self, callback: Any = None) -> None:
        """Connect and shake hands.

        Raises:
            OSError: the host did not answer (TimeoutError: within `connect_timeout`).
            amqp.exceptions.AMQPError: the broker refused, or does not speak AMQP.
        """
        if self.connected:
            return
        deadline = monotonic() + (self.connect_timeout or CONNECT_TIMEOUT)
        try:
            tls = _verified(self.ssl, self.host)
            settings = self.socket_settings
            if self.endpoint is None:
                self._transport = self.Transport(self.host, self.connect_timeout, tls, socket_settings=settings)
            else:
                self._transport = to_endpoint(self.endpoint, deadline, self.host, tls=tls, socket_settings=settings)
            self._link.transport = self._transport
            self._transport.connect()
            # Nothing blocks from here on. (py-amqp sets one timeout for reads and writes, and changes it on each read.)
            self._link.opened()
            self._transport.write = self.writer.send
            self.frame_writer = self.frame_writer_cls(self, self._transport)
            self._poll, self._read_poll = select.poll(), select.poll()
            self._poll.register(self._transport.sock, select.POLLIN)
            self._poll.register(self._interruption, select.POLLIN)
            self._read_poll.register(self._transport.sock, select.POLLIN)
            with self.limit(max(0.0, deadline - monotonic()), "the AMQP handshake", of=self.connect_timeout):
                self._shake_hands()
        except BaseException:
            self.collect()
            raise

    def _shake_hands(self) -> None:
        try:
            while not self._handshake_complete:
                self.drain_events()
        except (OSError, amqp.exceptions.AMQPError):
            raise
        except Exception as error:  # from py-amqp: the frames only look like AMQP
            raise amqp.exceptions.UnexpectedFrame(
                f"the peer at {self.host} does not speak AMQP 0-9-1: {type(error).__name__}: {error}"
            ) from error

    def channel(self, channel_id: int | None = None, callback: Any = None) -> AmqpChannel:
        channel: Any = super().channel(channel_id, callback)  # an instance of `self.Channel`
        return cast("AmqpChannel", channel)

    def close(self, *_: Any, **__: Any) -> None:
        """Close with the protocol's handshake, within `CLOSE_TIMEOUT`."""
        if self._transport is None:
            return
        self.is_closing = True
        try:
            # If the peer is gone or silent, the connection is closed anyway.
            with contextlib.suppress(OSError, amqp.exceptions.AMQPError), self.limit(CLOSE_TIMEOUT, "connection.close"):
                self.send_method(spec.Connection.Close, "BsBB", (0, "", 0, 0))
                super().wait(spec.Connection.CloseOk)
        finally:
            self.is_closing = False
            self.collect()

    def collect(self) -> None:
        """Drop the connection without closing it at the broker: after a fault, or in a forked child."""
        self._transport = None
        self.writer.close()
        self._interruption.close()
        self._frames.clear()
        super().collect()

    # --- waiting ------------------------------------------------------------------------------

    def drain_events(self, timeout: float | None = None) -> None:
        """Wait up to `timeout` seconds for something to arrive, then dispatch *everything* that has arrived.

        Returns after that, or as soon as `interrupt()` is called (or was called before).
        Inside a method that waits for its answer, that method's limit applies, and the next call is interrupted.
        """
        if self._link.deadline is None:
            poll, deadline = self._poll, None if timeout is None else monotonic() + timeout
        else:
            poll, deadline = self._read_poll, self._link.deadline
            if monotonic() > deadline:
                raise TimeoutError
        if self.writer.unsent:
            self.writer.send(b"")
        if self._frames.dispatch():  # what is left of the last call, which ended in an error
            return
        while True:
            sock = self._link.socket
            ready = poll.poll(None if deadline is None else max(0.0, deadline - monotonic()) * 1000)
            if not ready:
                raise TimeoutError("nothing arrived")
            interrupted = False
            for descriptor, _ in ready:
                if descriptor == sock.fileno():
                    self.read()
                else:
                    self._interruption.clear()
                    interrupted = True
            if self._frames.dispatch() or interrupted:
                return

    def interrupt(self) -> None:
        """Let the current or the next `drain_events` return at once. From any thread, at any time."""
        self._interruption.set()

    # --- for an event loop: see `lightbus.transport.WatchedConnection` --------------------------

    def watched(self) -> Connection:
        return self

    def fileno(self) -> int:
        descriptor: int = self._link.socket.fileno()
        return descriptor

    def drain_nowait(self) -> None:
        self.read()
        self._frames.dispatch()

    def catch_up(self) -> bool:
        if self.writer.unsent:
            self.writer.send(b"")
        return self._frames.dispatch()

    # --- reading ------------------------------------------------------------------------------

    def read(self) -> None:
        """Read what has arrived, without waiting, for the next dispatch."""
        self._frames.feed(self._link.receive())
        self.bytes_recv += 1  # for heartbeat_tick, which only checks whether it changed

    def not_amqp(self, what: str) -> Exception:
        self._link.lose()
        return amqp.exceptions.UnexpectedFrame(f"the peer at {self.host} does not speak AMQP 0-9-1: {what}")

    def wait(self, method: Any, callback: Any = None, timeout: float | None = None, returns_tuple: bool = False) -> Any:
        """Wait for an answer, as py-amqp does, but with a limit."""
        with self.limit(timeout or self.operation_timeout, method_name(method)):
            return super().wait(method, callback, None, returns_tuple)

    @contextlib.contextmanager
    def limit(self, seconds: float, what: str, *, of: float | None = None) -> Generator[None]:
        """End all reads and writes inside within `seconds` in total, with a TimeoutError that names `what`.

        Args:
            of: the whole limit, for the message, where a part of it is over.
        """
        link = self._link
        before, link.deadline = link.deadline, monotonic() + seconds
        try:
            yield
        except TimeoutError as error:
            raise TimeoutError(
                f"the broker at {self.host} did not complete {what} within {of or seconds:.3g} s"
            ) from error
        finally:
            link.deadline = before

    # --- what the broker sends on its own -----------------------------------------------------

    def _x_close_ok(self) -> None:
        """Agree to the broker's close. The broker may be gone by now, but its reason is raised next in any case."""
        with contextlib.suppress(OSError):
            super()._x_close_ok()
        self.collect()

    def _on_blocked(self) -> None:
        self.blocked = True
        super()._on_blocked()

    def _on_unblocked(self) -> None:
        self.blocked = False
        super()._on_unblocked()


class Transport(kombu.transport.pyamqp.Transport):
    """The class for `kombu.Connection(transport=...)`."""

    Connection = Connection


def _product() -> dict[str, str]:
    """What RabbitMQ's management page shows about this connection."""
    driver = f"Python {platform.python_version()}, py-amqp {amqp.__version__}"
    return {"product": "Lightbus", "product_version": __version__, "version": __version__, "platform": driver}


def _verified(tls: Any, host: str) -> Any:
    """The options for TLS. The certificate must be for this host, unless they turn verification off."""
    if not tls:
        return False
    options = dict(tls) if isinstance(tls, Mapping) else {}
    if "context" not in options and options.get("cert_reqs") != ssl.CERT_NONE:
        options["server_hostname"] = options.get("server_hostname") or amqp.transport.to_host_port(host)[0]
    return options
