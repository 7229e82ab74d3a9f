"""proton's engine and its socket: what arrives becomes calls of links and sessions, what is to be sent is written."""

from __future__ import annotations

import atexit
import os
import uuid
from collections.abc import Mapping
from time import monotonic
from typing import Any, Protocol

import cproton
from proton import Condition, Connection, Event, Link, Session, Transport, TransportException

from lightbus.transport.activemq import answers
from lightbus.transport.activemq.links import Incoming, Outgoing
from lightbus.transport.activemq.stream import Stream
from lightbus.version import __version__

# At the exit, proton forgets its objects while connections may still have to be closed: the process would crash then.
atexit.unregister(cproton.clear_retained_objects)

WRITE_TIMEOUT = 5.0
"""Seconds in which the broker must read `WRITTEN_IN_TIME`."""
WRITTEN_IN_TIME = 262144
"""Bytes."""
MAX_FRAME = 131072
"""Bytes. Artemis' own default. It must take a selector, which Artemis repeats in its answer to an attach."""


class Owner(Protocol):
    """The connection, as its engine needs it."""

    may_wait: bool

    def on_unsent(self) -> object: ...


class Engine:
    """The protocol's state. Not thread-safe: the connection's owner, or the event loop in its place, uses it."""

    def __init__(self, owner: Owner, host: str, name: str, user: str | None, password: str | None, idle: float) -> None:
        """
        Args:
            user: None for an anonymous login.
            idle: seconds without anything from the broker, after which the connection is lost.
        """
        self.links: dict[str, Incoming | Outgoing] = {}
        """By name."""
        self.is_open = False
        """The broker has accepted the connection."""
        self.error: Exception | None = None
        """Why it has ended."""
        self._owner = owner
        self._process = os.getpid()
        self._stream: Stream | None = None
        self._ending: dict[str, Link] = {}
        """Links that are closed here, and not yet by the broker, by name."""
        self._collector = cproton.pn_collector()
        connection = cproton.pn_connection()
        cproton.pn_connection_collect(connection, self._collector)
        self._connection = Connection(connection)
        cproton.pn_decref(connection)  # the wrapper has another reference
        self._connection.container = f"{name} {uuid.uuid4().hex[:12]}"
        self._connection.hostname = host
        if user is not None:
            self._connection.user = user
            self._connection.password = password or ""
        self._connection.properties = {"product": "Lightbus", "version": __version__, "connection_name": name}
        self._transport = Transport()
        self._transport.max_frame_size = MAX_FRAME
        self._transport.idle_timeout = idle
        sasl = self._transport.sasl()
        sasl.allowed_mechs("ANONYMOUS" if user is None else "PLAIN")
        sasl.allow_insecure_mechs = True
        self._transport.bind(self._connection)
        self.session: Session = self._connection.session()
        """Of all channels. When a connection fails, Artemis (2.40.0) closes its sessions in order. For all but the
        first one, it hardly ever counts the deliveries outside of transactions."""

    def open(self, stream: Stream) -> None:
        """Begin the handshake on a connected socket."""
        self._stream = stream
        self._connection.open()
        self.session.open()
        self.tick()

    @property
    def server_properties(self) -> Mapping[str, str]:
        given = self._connection.remote_properties or {}
        return {str(key): str(value) for key, value in given.items()}

    @property
    def stream(self) -> Stream:
        """
        Raises:
            Exception: why the connection has ended.
        """
        if self.error is not None:
            raise self.error
        if self._stream is None:
            raise answers.closed("connection")
        return self._stream

    @property
    def is_closed(self) -> bool:
        return self._stream is None

    def end_links(self, links: list[Link]) -> None:
        """Close them.

        Args:
            links: they are kept until the broker has closed them. The caller must not keep them: the last reference to
                an object of proton may only be dropped by who uses the connection.
        """
        for link in links:
            self._ending[link.name] = link
            link.close()

    def tick(self) -> None:
        """Let proton look at the time: it sends what keeps the connection alive, and notices a silent broker."""
        self._transport.tick(monotonic())

    def close(self) -> None:
        """Begin to close. `error` is set when the broker has answered."""
        self._connection.close()

    def drop(self) -> None:
        """Close the socket at once."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()
        if os.getpid() != self._process:  # a fork may have interrupted proton
            return
        self.links.clear()
        self._ending.clear()
        self._transport.unbind()
        collector, self._collector = self._collector, None
        if collector is not None:
            cproton.pn_collector_free(collector)

    # --- reading and writing ------------------------------------------------------------------

    def read(self) -> None:
        """Take what has arrived, without waiting."""
        transport = self._transport
        try:
            for piece in self.stream.receive():
                view = memoryview(piece)
                while view and (capacity := transport.capacity()) > 0:
                    transport.push(view[:capacity])
                    view = view[capacity:]
                    self._collect()
        except TransportException as error:
            self._collect()
            self._fail(answers.connection_error("", str(error)))
        except OSError as error:
            self._collect()
            self._fail(error)
        self._collect()

    def flush(self, *, wait: bool = False) -> None:
        """Write what is to be sent. If the connection may not wait: what can be written at once.

        Raises:
            TimeoutError: the broker did not read in time.
            OSError: the connection is lost.
        """
        transport, deadline, left = self._transport, 0.0, WRITTEN_IN_TIME
        self._collect()
        while (pending := transport.pending()) > 0:
            data = transport.peek(pending)
            if not data:
                break
            try:
                sent = self.stream.send(data)
                if sent:
                    transport.pop(sent)
                    left -= sent
                    if left <= 0:
                        deadline, left = 0.0, WRITTEN_IN_TIME
                    continue
                if not (wait or self._owner.may_wait):
                    self._owner.on_unsent()
                    return
                deadline = deadline or monotonic() + WRITE_TIMEOUT
                readable = self.stream.wait_writable(deadline - monotonic())
            except OSError as error:
                self._fail(error)
                raise
            if readable:
                # Read now, dispatch later: a broker that cannot send its confirms may stop reading.
                self.read()

    def _fail(self, error: Exception) -> None:
        if self.error is None:
            # As a TimeoutError, it would mean to the callers of `drain_events` that nothing has arrived.
            self.error = ConnectionAbortedError(str(error)) if isinstance(error, TimeoutError) else error

    # --- events -------------------------------------------------------------------------------

    def _collect(self) -> None:
        """Turn proton's events into calls.

        Deliveries without `Event`, which makes five objects for each.
        """
        while self._collector is not None and not cproton.isnull(raw := cproton.pn_collector_peek(self._collector)):
            if cproton.pn_event_type(raw) == cproton.PN_DELIVERY:
                self._of_delivery(raw)
                cproton.pn_collector_pop(self._collector)
                continue
            event = Event.wrap(raw)
            kind = event.type
            if kind in _OF_LINKS:
                link = self.links.get(event.link.name)
                if link is not None:
                    self._of_link(kind, link)
                elif kind is not Event.LINK_FLOW and kind is not Event.LINK_REMOTE_OPEN:
                    ended = self._ending.pop(event.link.name, None)
                    if ended is not None:
                        ended.free()
            else:
                self._of_others(kind, event)
            cproton.pn_collector_pop(self._collector)

    def _of_delivery(self, event: object) -> None:
        ours = cproton.pn_event_link(event)
        link = self.links.get(cproton.pn_link_name(ours))
        if isinstance(link, Outgoing):
            link.outcome(cproton.pn_event_delivery(event))
        elif link is not None:
            link.read(ours)

    def _of_link(self, kind: Any, link: Incoming | Outgoing) -> None:
        if kind is Event.LINK_FLOW:
            link.flowed()
        elif kind is Event.LINK_REMOTE_OPEN:
            link.opened()
        else:
            self.links.pop(link.link.name, None)
            link.closed(link.link.remote_condition)

    def _of_others(self, kind: Any, event: Event) -> None:
        if kind is Event.SESSION_REMOTE_CLOSE:
            condition = event.session.remote_condition
            self._end(condition or Condition(answers.FORCED, "the broker closed the session"))
        elif kind is Event.CONNECTION_REMOTE_OPEN:
            self.is_open = True
        elif kind is Event.CONNECTION_REMOTE_CLOSE:
            self._end(
                self._connection.remote_condition or Condition(answers.FORCED, "the broker closed the connection")
            )
        elif kind is Event.TRANSPORT_ERROR:
            self._end(self._transport.condition)

    def _end(self, condition: Condition | None) -> None:
        name, description = ("", "") if condition is None else (condition.name, condition.description or "")
        if name == answers.REFUSED and not self.is_open:
            self._fail(answers.access_refused(f"login refused: {description}"))
        else:
            self._fail(answers.connection_error(name, description))


_OF_LINKS = (Event.LINK_FLOW, Event.LINK_REMOTE_OPEN, Event.LINK_REMOTE_CLOSE, Event.LINK_REMOTE_DETACH)
