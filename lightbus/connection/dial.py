"""Connect to the first node of a broker that answers, with TLS if its URL asks for it.

Each address is tried, and each IP address of its host.
"""

# kombu has no types:
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import errno
import importlib.util
import logging
import os
import random
import socket
import ssl
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote, urlsplit

import attrs
import kombu.connection

from lightbus import errors
from lightbus.connection.address import (
    CONNECT_TIMEOUT,
    EMBEDDED,
    HEARTBEAT,
    REQUIRE_VARIABLE,
    URL_VARIABLE,
    Address,
    parse_address,
    urls_of,
)
from lightbus.connection.diagnosis import FATAL, LOST, describe
from lightbus.transport import Connection

logger = logging.getLogger("lightbus")

AVOID_FOR = 60.0
"""Seconds for which an endpoint that failed is tried last. A higher value would leave a restarted node without
connections until the others fail."""
FAILED = 1000
"""Failed endpoints that are remembered; if there are more, all are forgotten."""


@attrs.frozen
class Endpoint:
    """One IP address of a broker's host, or an embedded broker's file."""

    address: Address
    target: tuple[int, int, int, Any] | None = None
    """Family, type, protocol and address, as for a socket; None for an embedded broker."""
    shown: str = ""
    """The IP address, if the host has several."""


warned = False
"""Whether this process has logged that LIGHTBUS_URL is not set, or another process does."""


@attrs.define
class BrokerAddresses:
    """One broker address, or the addresses of several nodes of one cluster."""

    addresses: tuple[Address, ...] = attrs.field(on_setattr=attrs.setters.frozen)
    unset: bool = attrs.field(default=False, eq=False, kw_only=True)
    """Whether LIGHTBUS_URL is not set, and this is the default."""
    worked: bool = attrs.field(default=False, init=False, eq=False, repr=False)
    """Whether a connection was opened before. Then a refusal may be temporary: it was allowed once."""
    _failed: dict[Endpoint, tuple[float, bool]] = attrs.field(factory=dict, init=False, eq=False, repr=False)
    """Endpoints whose last attempt failed: when (monotonic), and whether with an error in `FATAL`. They are tried last
    for a while, since one that hangs costs time."""

    @classmethod
    def parse(cls, url: str | Sequence[str], *, folder: str | None = None) -> BrokerAddresses:
        """
        Args:
            folder: the folder for relative paths; by default the working directory.

        Raises:
            errors.InvalidURL, errors.UnsupportedBroker: a URL is invalid or not supported.
        """
        urls = urls_of(url)
        if not urls:
            raise errors.InvalidURL("The list of broker URLs is empty. Pass at least one.")
        if len(urls) > 1 and any(not str(one).strip() for one in urls):
            raise errors.InvalidURL(
                "One of the broker URLs is empty: remove the extra ';', or set the missing variable."
            )
        return cls(tuple(parse_address(one, folder) for one in urls))

    @classmethod
    def from_environment(cls, *, folder: str | None = None) -> BrokerAddresses:
        """The broker in LIGHTBUS_URL; if that is not set or empty, the embedded broker in the user's default file.

        Raises:
            errors.InvalidURL, errors.UnsupportedBroker: as for `parse`; or LIGHTBUS_REQUIRE_URL forbids the embedded
                broker.
        """
        url = os.environ.get(URL_VARIABLE, "")
        if url.strip():
            return cls.parse(url, folder=folder)
        if os.environ.get(REQUIRE_VARIABLE, "").strip().lower() not in ("", "0", "no", "false", "off"):
            raise errors.InvalidURL(
                f"{URL_VARIABLE} is {'empty' if url or URL_VARIABLE in os.environ else 'not set'}, and "
                f"{REQUIRE_VARIABLE} is set, so the embedded broker is not allowed. Set {URL_VARIABLE}, as in "
                "amqp://user:password@host:5672/vhost, or give the app a url=."
            )
        return attrs.evolve(cls.parse(EMBEDDED), unset=True)

    def warn_if_unset(self) -> None:
        """Log it once per process: in production it is a mistake that nothing else reveals."""
        global warned
        if self.unset and not warned:
            warned = True
            from lightbus.transport.sqlite.place import locate, short_path

            logger.warning(
                "%s is not set: using the embedded broker, a file on this machine (%s). In production, set "
                "it, and %s=1.",
                URL_VARIABLE,
                short_path(locate(EMBEDDED).path),
                REQUIRE_VARIABLE,
            )

    @property
    def masked(self) -> str:
        return ";".join(address.masked for address in self.addresses)

    def connect(self, name: str) -> Connection:
        """A new connection to the first endpoint that accepts it: the addresses in random order, all IP addresses of
        each host. After a refusal, too, the next one is tried.

        Raises:
            errors.BrokerError: none did; the error has the answer of each. It is in `FATAL` only if all errors are.
        """
        failures: list[tuple[Endpoint, BaseException]] = []
        for endpoint in self._endpoints(failures):
            try:
                connection = connect_to(endpoint, name)
            except (errors.BrokerError, *LOST) as error:
                self._note_failure(endpoint, describe(error, endpoint.address))
                failures.append((endpoint, error))
            else:
                self._failed.pop(endpoint, None)
                return connection
        described, cause = _none_of(failures)
        if cause is described:
            raise described
        raise described from cause.with_traceback(None)  # kombu's frames do not help

    def _endpoints(self, failures: list[tuple[Endpoint, BaseException]]) -> Iterator[Endpoint]:
        last: list[Endpoint] = []
        for address in random.sample(self.addresses, len(self.addresses)):
            try:
                found = _resolve(address)
            except (OSError, UnicodeError) as error:
                failures.append((Endpoint(address), error))
                continue
            failed = self._failed_lately()
            last += [endpoint for endpoint in found if endpoint in failed]
            yield from [endpoint for endpoint in found if endpoint not in last]
        yield from last

    def avoid(self, connection: Connection, error: errors.BrokerError) -> bool:
        """Its node answers, but cannot be used: try the others first the next time. Returns whether there is another
        one without a fatal error.
        """
        endpoint: Endpoint | None = getattr(connection, "reached", None)
        if endpoint is None:
            return False
        self._note_failure(endpoint, error)
        refused = {one.address for one, fatal in self._failed_lately().items() if fatal}
        return any(address not in refused for address in self.addresses if address != endpoint.address)

    def _note_failure(self, endpoint: Endpoint, error: errors.BrokerError) -> None:
        if len(self._failed) >= FAILED:
            self._failed.clear()
        self._failed[endpoint] = time.monotonic(), isinstance(error, FATAL)

    def _failed_lately(self) -> dict[Endpoint, bool]:
        since = time.monotonic() - AVOID_FOR
        return {endpoint: fatal for endpoint, (when, fatal) in self._failed.copy().items() if when > since}


def _resolve(address: Address) -> list[Endpoint]:
    if address.port is None:
        return [Endpoint(address)]
    host = unquote(urlsplit(address.plain).hostname or "")
    found = socket.getaddrinfo(host, address.port, socket.AF_UNSPEC, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    targets = [*dict.fromkeys((family, kind, protocol, target) for family, kind, protocol, _, target in found)]
    if host == "localhost":  # on one machine, brokers always listen on IPv4: that answer counts
        targets = [target for target in targets if target[0] == socket.AF_INET] or targets
    return [Endpoint(address, target, str(target[3][0]) if len(targets) > 1 else "") for target in targets]


def _none_of(failures: Sequence[tuple[Endpoint, BaseException]]) -> tuple[errors.BrokerError, BaseException]:
    """One error for all, and its cause. The same error of several IP addresses of a host is mentioned once."""
    alike: dict[tuple[Address, str], list[tuple[Endpoint, BaseException]]] = {}
    for endpoint, error in failures:
        alike.setdefault((endpoint.address, str(describe(error, endpoint.address))), []).append((endpoint, error))
    described = [
        describe(group[0][1], group[0][0].address, ", ".join(endpoint.shown for endpoint, _ in group))
        for group in alike.values()
    ]
    kinds = {type(one) for one in described}
    cause = failures[0][1]
    if len(described) == 1:
        return described[0], cause
    kind: type[errors.BrokerError] = errors.BrokerUnreachable
    if len(kinds) == 1 or all(isinstance(one, FATAL) for one in described):
        kind = type(described[0])
    return kind(" ".join(str(one) for one in described)), cause


def connect_to(endpoint: Endpoint, name: str) -> Connection:
    """Connect to this endpoint only, or raise what the transport raises."""
    address = endpoint.address
    options = address.options
    transport_options: dict[str, Any] = {"client_properties": {"connection_name": name}}
    settings: dict[str, Any] = {
        "heartbeat": round(float(options.get("heartbeat", HEARTBEAT))),
        "connect_timeout": float(options.get("connect_timeout", CONNECT_TIMEOUT)),
        "transport_options": transport_options,
    }
    if endpoint.target is not None:
        transport_options["endpoint"] = endpoint.target
    if address.tls:
        settings["ssl"] = _tls(urlsplit(address.plain).hostname or "localhost", options)
    elif endpoint.target is not None:
        settings["login_method"] = "PLAIN"
    _check_library(address)
    client = kombu.connection.Connection(address.plain, transport=address.broker.transport, **settings)
    connection: Connection = client.transport.establish_connection()
    connection.reached = endpoint
    return connection


def _check_library(address: Address) -> None:
    """
    Raises:
        errors.UnsupportedBroker: the library of the broker's transport is not installed.
    """
    broker = address.broker
    if broker.library and importlib.util.find_spec(broker.library) is None:
        raise errors.UnsupportedBroker(
            f"{address.scheme}:// needs the extra: pip install 'lightbus-amqp[{broker.extra}]'"
        )


def _tls(host: str, options: Mapping[str, str]) -> dict[str, Any]:
    """TLS settings. The server's certificate is always verified: against the system's CAs, or those in `?cafile=`.

    Raises:
        errors.TLSRefused: a file in the URL cannot be read.
    """
    for option in ("cafile", "certfile", "keyfile"):
        if option in options:
            _check_readable(option, options[option])
    return {
        "server_hostname": host,
        "cert_reqs": ssl.CERT_REQUIRED,
        "ca_certs": options.get("cafile"),
        "certfile": options.get("certfile"),
        "keyfile": options.get("keyfile"),
    }


def _check_readable(option: str, path: str) -> None:
    # Python's own error does not name the file, and looks as if the broker were not running.
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        raise errors.TLSRefused(
            f"The broker URL's {option}={path} cannot be read: {error.strerror}. Use a PEM file that this user can "
            "read."
        ) from error


def address_of(connection: Connection, broker: BrokerAddresses) -> Address:
    """The one of the broker's addresses that a connection uses."""
    endpoint: Endpoint | None = getattr(connection, "reached", None)
    return broker.addresses[0] if endpoint is None else endpoint.address
