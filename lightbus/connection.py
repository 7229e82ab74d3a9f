"""A connection's life: open, declare, heartbeat, backoff, and again. One thread owns each connection.

py-amqp locks writes but not reads, so one at a time uses it; and heartbeats must go on while a handler blocks the
event loop, so the owner is never the loop's thread. But while the loop is quick to come, it reads in the thread's
place (`loop.Attention`): a change of threads costs more than an event.
"""

# kombu has no types:
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import contextlib
import difflib
import errno
import ipaddress
import logging
import os
import random
import re
import shlex
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn
from urllib.parse import ParseResult, SplitResult, parse_qsl, quote, unquote, unquote_to_bytes, urlsplit

import amqp.exceptions
import attrs
import kombu.connection
import kombu.entity
import kombu.exceptions
from kombu.transport import TRANSPORT_ALIASES

from lightbus import errors
from lightbus.loop import Attention, Loop
from lightbus.topology import BUS, Exchange, Topology
from lightbus.transport import Channel, Connection

logger = logging.getLogger("lightbus")

URL_VARIABLE = "LIGHTBUS_URL"
REQUIRE_VARIABLE = "LIGHTBUS_REQUIRE_URL"
"""Set to 1, it makes an unset or empty LIGHTBUS_URL an error, for deployments."""
EMBEDDED = "sqlite://"
CONNECT_TIMEOUT = 5.0
HEARTBEAT = 10
"""Seconds. Between 5 (a busy machine must not miss two) and 20 (a dead peer must not go unnoticed)."""
TICK = 1.0
AVOID_FOR = 60.0
"""Seconds for which an endpoint that failed is tried after the others. Not longer, or a node that was restarted would
get no connections until the others fail."""
FAILED = 1000
"""Remembered endpoints that failed; forgotten all at once when there are more."""
SLIPS = 60
"""Names at most that are tried in place of one that may have a typing error."""
LOST = (OSError, amqp.exceptions.AMQPError, kombu.exceptions.OperationalError)
"""What a transport raises when a connection or channel is gone."""

CHANNEL_LOST = amqp.exceptions.ChannelError
"""What a transport raises when a channel is gone, and its connection is well."""

_TRANSPORTS = {
    "amqp": "lightbus.transport.amqp:Transport",
    "pyamqp": "lightbus.transport.amqp:Transport",
    "amqps": "lightbus.transport.amqp:Transport",
    "sqlite": "lightbus.transport.sqlite:Transport",
    "memory": "lightbus.transport.sqlite:Transport",
}
_OPTIONS = ("heartbeat", "connect_timeout", "cafile", "certfile", "keyfile")
_RANGES = {"heartbeat": (1.0, 3600.0), "connect_timeout": (0.1, 3600.0)}
"""Seconds. AMQP turns heartbeats off with 0, and a dead broker would go unnoticed."""

FATAL = (
    errors.AccessRefused,
    errors.TLSRefused,
    errors.TopologyConflict,
    errors.UnsupportedBroker,
    errors.InvalidURL,
    errors.BrokerFileError,
)
"""Errors that another try will not mend."""


# --- the broker's address ---------------------------------------------------------------------


@attrs.frozen
class Address:
    """One broker URL, taken apart."""

    url: str = attrs.field(repr=False)
    scheme: str
    options: Mapping[str, str] = attrs.field(hash=False)

    def __reduce__(self) -> NoReturn:
        raise TypeError("A broker's address cannot be pickled: it may have a password.")

    @property
    def masked(self) -> str:
        """The URL without its password and query, for people and logs."""
        scheme, _, rest = self.plain.partition("://")
        userinfo, at, host = rest.rpartition("@")
        user, colon, _ = userinfo.partition(":")
        return f"{scheme}://{user}{':**' if colon else ''}{at}{host}"

    @property
    def plain(self) -> str:
        """The URL without its query."""
        return self.url.partition("?")[0]

    @property
    def vhost(self) -> str:
        """The virtual host, as rabbitmqctl wants it."""
        return "/" if self.embedded else unquote(urlsplit(self.plain).path[1:]) or "/"

    @property
    def embedded(self) -> bool:
        """For what people are told (a banner); no behaviour depends on it."""
        return self.scheme in ("sqlite", "memory")


_ESCAPE = (
    "In a user name, a password or a virtual host, write % / ? # @ : ; and spaces as %25 %2F %3F %23 %40 %3A %3B %20."
)
_SEVERAL = (
    "Join the URLs of several nodes by ';', each with its scheme, as in 'amqp://host-1;amqp://host-2'; or pass a list."
)


def parse_address(url: object, folder: str | None = None) -> Address:
    """Read one URL. No error shows a part of it that could be a secret, whatever it is that was given.

    Args:
        folder: what relative paths are relative to; by default the working directory. They become absolute here, once:
            later connections, and those of other processes, must not follow an `os.chdir` to another file.

    Raises:
        errors.InvalidURL: not a URL, or an option that is not known.
        errors.UnsupportedBroker: a broker without AMQP's model.
    """
    text = _text_of(url).strip()
    scheme, separator, rest = text.partition("://")
    scheme = scheme.lower()
    if text and (text[0] in _QUOTES or text[-1] in _QUOTES):
        raise errors.InvalidURL(
            "The value given is not a broker URL: it is enclosed in quotation marks. Remove them. (A shell removes "
            "them; an env file of Docker or systemd, or a secret, may keep them.)"
        )
    if not separator or not _SCHEME.fullmatch(scheme):
        raise errors.InvalidURL(
            "The value given is not a broker URL. Use 'amqp://user:password@host:5672/vhost', 'sqlite:///bus.db' or "
            f"'memory://'.{'' if text else ' It is empty.'}"
        )
    if scheme not in _TRANSPORTS:
        raise errors.UnsupportedBroker(_why_unsupported(scheme))
    problem = _problem_of(scheme, rest)
    if problem is not None:
        raise errors.InvalidURL(f"'{scheme}://...' is not a broker URL: {problem}")
    base, _, query = rest.partition("?")
    options, problem = _options_of(query)
    if problem is not None:
        raise errors.InvalidURL(f"'{scheme}://...' is not a broker URL: {problem}")
    for name in ("cafile", "certfile", "keyfile"):
        if options.get(name):
            options[name] = _absolute(options[name], folder)
    if scheme == "sqlite" and base.startswith("/") and base != "/":
        base = "/" + quote(os.fsencode(_absolute(os.fsdecode(unquote_to_bytes(os.fsencode(base[1:]))), folder)))
    return Address(f"{scheme}://{base}{'?' if query else ''}{query}", scheme, options)


_QUOTES = "'\"`\u2018\u2019\u201c\u201d"
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*")
_BROKEN_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_LABEL = re.compile(r"[A-Za-z0-9_-]{1,63}")
_NUMBER = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*")
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]*)?|\.[0-9]+")


def _urls_of(given: object) -> Sequence[object]:
    if isinstance(given, Sequence) and not isinstance(given, str | bytes | bytearray | SplitResult | ParseResult):
        return given
    return _text_of(given).split(";")


def _text_of(url: object) -> str:
    """What was given, as text: a URL object of pydantic, yarl or the standard library will do.

    Raises:
        errors.InvalidURL: it is something else.
    """
    if isinstance(url, str):
        return url
    if isinstance(url, SplitResult | ParseResult):
        return url.geturl()
    if isinstance(getattr(url, "scheme", None), str):
        return str(url)
    raise errors.InvalidURL(
        f"The value given is not a broker URL: its type is {type(url).__name__}. Pass a str, or a list of str."
    )


def _problem_of(scheme: str, rest: str) -> str | None:
    """What is wrong with what follows `scheme://`, without a word of it; None where it can be used."""
    embedded = scheme in ("sqlite", "memory")
    base, _, query = rest.partition("?")
    if "://" in rest:
        return f"it contains more than one URL. {_SEVERAL}"
    if any(character < " " or character == "\x7f" for character in rest):
        return "it contains a line break or another control character. Remove it."
    if "#" in rest or "@" in query:
        return f"it contains a '#', or an '@' after a '?'. {_ESCAPE}"
    if embedded:
        return (
            "it has a user name or a password, which a file URL cannot have." if "@" in base.partition("/")[0] else None
        )
    if any(character.isspace() for character in rest):
        return f"it contains a space. {_ESCAPE}"
    if not _is_text(rest):
        return f"it contains bytes that are not UTF-8, or a '%' that does not start an escape. {_ESCAPE}"
    authority, _, path = base.partition("/")
    if "@" in path:
        return f"an '@' comes after the host. {_ESCAPE}"
    userinfo, at, hostport = authority.rpartition("@")
    if "@" in userinfo:
        return f"it contains more than one '@'. {_ESCAPE} {_SEVERAL}"
    problem = (_problem_of_user(userinfo) if at else None) or _problem_of_host(hostport) or _problem_of_vhost(path)
    if problem is None and not _is_read_by_others(rest):
        return f"it contains a character that Unicode normalizes to one of / ? # @ and :. {_ESCAPE}"
    return problem


def _is_text(rest: str) -> bool:
    try:
        unquote(rest, errors="strict").encode()
    except ValueError:
        return False
    return not _BROKEN_ESCAPE.search(rest)


def _is_read_by_others(rest: str) -> bool:
    """Whether Python reads it, and so kombu: what those refuse, they quote."""
    try:
        urlsplit(f"amqp://{rest}")
    except ValueError:
        return False
    return True


def _problem_of_user(userinfo: str) -> str | None:
    user, colon, password = userinfo.partition(":")
    if not user or (colon and not password):
        return "its user name or its password is empty. (Is a variable not set?)"
    if any(character < " " for character in unquote(userinfo)):
        return "its user name or its password contains a control character (such as %0A, a line break)."
    return None


def _problem_of_host(hostport: str) -> str | None:
    end = hostport.rfind("]") + 1
    if hostport.startswith("[") and end:
        host, rest = hostport[:end], hostport[end:]
        colon, port = rest[:1], rest[1:]
    else:
        host, colon, port = hostport.partition(":")
    if colon not in ("", ":") or (colon and not (re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 65536)):
        return f"its port is not a number from 1 to 65535, or what comes before is not a host. {_ESCAPE}"
    if not host:
        return "it has no host. Use 'localhost' for a broker on this machine."
    if "," in host:
        return f"its host holds a ','. {_SEVERAL}"
    if not _is_host(host):
        return (
            "its host is not a host name or an IP address. (An IPv4 address has four numbers; an IPv6 address is in "
            f"brackets, as in 'amqp://[::1]/'.) {_ESCAPE}"
        )
    return None


def _is_host(host: str) -> bool:
    try:
        if host.startswith("["):
            ipaddress.IPv6Address(unquote(host[1:-1]))
            return True
        if not host.isascii():
            host = host.encode("idna").decode()
        labels = host.removesuffix(".").split(".")
        if _NUMBER.fullmatch(labels[-1]):  # the system would read '0', '127.1' and '0x7f.1' as addresses, too
            ipaddress.IPv4Address(host)
    except ValueError:
        return False
    return len(host) <= 253 and all(_LABEL.fullmatch(label) for label in labels)


def _problem_of_vhost(path: str) -> str | None:
    vhost = unquote(path)
    if len(vhost.encode()) > 255 or any(character < " " for character in vhost):
        return "its virtual host (what follows the host) is longer than 255 bytes, or contains a control character."
    return None


def _options_of(query: str) -> tuple[dict[str, str], str | None]:
    """The options, and what is wrong with them."""
    known = f"Known are: {', '.join(_OPTIONS)}."
    try:
        if query and _BROKEN_ESCAPE.search(query):
            raise ValueError
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query), errors="strict")
    except ValueError:
        pairs = None  # told below: Python's words, which an error from here would keep, quote the URL
    if pairs is None:
        return {}, f"its options, after the '?', cannot be read. Use '?heartbeat=10&connect_timeout=5'. {_ESCAPE}"
    options = dict(pairs)
    for name in options:
        if name not in _OPTIONS:
            near = difflib.get_close_matches(name, _OPTIONS, n=1)
            which = (
                f"the option {name!r}, which is not known. Did you mean {near[0]!r}?" if near else "an unknown option."
            )
            return {}, f"it has {which} {known}"
        if [one for one, _ in pairs].count(name) > 1:
            return {}, f"it has the option {name} more than once."
    for name, (lowest, highest) in _RANGES.items():
        if name in options and not (_SECONDS.fullmatch(options[name]) and lowest <= float(options[name]) <= highest):
            return {}, f"its option {name} is not a number of seconds from {lowest:g} to {highest:g}."
    empty = [name for name, value in options.items() if not value]
    return options, f"its option {empty[0]} is empty." if empty else None


def _absolute(path: str, folder: str | None) -> str:
    if os.path.isabs(path):
        return path
    try:
        return os.path.normpath(os.path.join(folder or os.getcwd(), path))
    except FileNotFoundError:
        raise errors.InvalidURL(
            f"The broker URL refers to the file {path!r}, relative to the working directory, which no longer exists. "
            "Use an absolute path."
        ) from None


def _why_unsupported(scheme: str) -> str:
    advice = "Use RabbitMQ (amqp:// or amqps://), or the embedded broker (sqlite:// or memory://)."
    if scheme in TRANSPORT_ALIASES or scheme in _OTHERS:
        what = (
            "it has no AMQP exchanges and bindings to route events"
            if scheme in TRANSPORT_ALIASES
            else "unknown broker type"
        )
        return f"{scheme}:// is not supported: {what}. {advice}"
    near = difflib.get_close_matches(scheme, _TRANSPORTS, n=1)
    meant = f" Did you mean {near[0]}://?" if near else ""
    return f"The URL's scheme, before '://', is not supported: unknown broker type.{meant} {advice}"


_OTHERS = frozenset(("http", "https", "nats", "mqtt", "mqtts", "kafka", "pulsar", "stomp", "tcp", "postgres", "mysql"))


@attrs.frozen
class Endpoint:
    """One IP address of a broker's host, or an embedded broker's file."""

    address: Address
    target: tuple[int, int, int, Any] | None = None
    """Family, type, protocol and address, as for a socket; None for an embedded broker."""
    shown: str = ""
    """The IP address, where the host has several."""


warned = False
"""Whether this process has logged that LIGHTBUS_URL is not set, or leaves that to another one."""


@attrs.define
class Broker:
    """Where to connect to: one address, or several of one cluster."""

    addresses: tuple[Address, ...] = attrs.field(on_setattr=attrs.setters.frozen)
    unset: bool = attrs.field(default=False, eq=False, kw_only=True)
    """Whether LIGHTBUS_URL is not set, and this is what is used instead."""
    worked: bool = attrs.field(default=False, init=False, eq=False, repr=False)
    """Whether a connection was opened once: then what is refused now was allowed, and may be allowed again."""
    _failed: dict[Endpoint, tuple[float, bool]] = attrs.field(factory=dict, init=False, eq=False, repr=False)
    """Those that failed when they were last tried: when (monotonic), and whether as in `FATAL`. For a while they come
    last: one that hangs costs time."""

    @classmethod
    def parse(cls, url: str | Sequence[str], *, folder: str | None = None) -> Broker:
        """
        Args:
            folder: what relative paths are relative to; by default the working directory.

        Raises:
            errors.InvalidURL, errors.UnsupportedBroker: a URL cannot be read or used.
        """
        urls = _urls_of(url)
        if not urls:
            raise errors.InvalidURL("The list of broker URLs is empty. Pass at least one.")
        if len(urls) > 1 and any(not str(one).strip() for one in urls):
            raise errors.InvalidURL(
                "One of the broker URLs is empty: remove the extra ';', or set the missing variable."
            )
        return cls(tuple(parse_address(one, folder) for one in urls))

    @classmethod
    def from_environment(cls, *, folder: str | None = None) -> Broker:
        """What LIGHTBUS_URL names; where it is not set or empty, the embedded broker in the user's file.

        Raises:
            errors.InvalidURL, errors.UnsupportedBroker: as `parse`; or LIGHTBUS_REQUIRE_URL forbids that file.
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
        """Log it, once in a process: in production it is a mistake that nothing else shows."""
        global warned
        if self.unset and not warned:
            warned = True
            from lightbus.transport.sqlite_store import locate, short_path

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
        """A new connection to the first that answers: the addresses in random order, each at all of its host's IP
        addresses. A refusal, too, leads to the next one.

        Raises:
            errors.BrokerError: none did; the error says what each said. Only where all failed in a way that another
                try will not mend, it is one of `FATAL`.
        """
        failures: list[tuple[Endpoint, BaseException]] = []
        for endpoint in self._endpoints(failures):
            try:
                connection = _connect(endpoint, name)
            except (errors.BrokerError, *LOST) as error:
                self._note_failure(endpoint, describe(error, endpoint.address))
                failures.append((endpoint, error))
            else:
                self._failed.pop(endpoint, None)
                return connection
        described, cause = _none_of(failures)
        if cause is described:
            raise described
        raise described from cause.with_traceback(None)  # kombu's frames say less than its type

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
        """Its node answers, but cannot be used: the next time, try the others first. Returns whether there are any that
        have not failed for good.
        """
        endpoint: Endpoint | None = getattr(connection, "reached", None)
        if endpoint is None:
            return False
        self._note_failure(endpoint, error)
        hopeless = {one.address for one, fatal in self._failed_lately().items() if fatal}
        return any(address not in hopeless for address in self.addresses if address != endpoint.address)

    def _note_failure(self, endpoint: Endpoint, error: errors.BrokerError) -> None:
        if len(self._failed) >= FAILED:
            self._failed.clear()
        self._failed[endpoint] = time.monotonic(), isinstance(error, FATAL)

    def _failed_lately(self) -> dict[Endpoint, bool]:
        since = time.monotonic() - AVOID_FOR
        return {endpoint: fatal for endpoint, (when, fatal) in self._failed.copy().items() if when > since}


def _resolve(address: Address) -> list[Endpoint]:
    if address.embedded:
        return [Endpoint(address)]
    parts = urlsplit(address.plain)
    host = unquote(parts.hostname or "")
    port = parts.port or (5671 if address.scheme == "amqps" else 5672)
    found = socket.getaddrinfo(host, port, socket.AF_UNSPEC, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    targets = [*dict.fromkeys((family, kind, protocol, target) for family, kind, protocol, _, target in found)]
    if host == "localhost":  # one machine, where RabbitMQ listens on IPv4 in any case: what it says there counts
        targets = [target for target in targets if target[0] == socket.AF_INET] or targets
    return [Endpoint(address, target, str(target[3][0]) if len(targets) > 1 else "") for target in targets]


def _none_of(failures: Sequence[tuple[Endpoint, BaseException]]) -> tuple[errors.BrokerError, BaseException]:
    """One error for all, and its cause. What several IP addresses of one host have said alike is said once."""
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


def _connect(endpoint: Endpoint, name: str) -> Connection:
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
    if address.scheme == "amqps":
        settings["ssl"] = _tls(urlsplit(address.plain).hostname or "localhost", options)
    elif not address.embedded:
        settings["login_method"] = "PLAIN"
    client = kombu.connection.Connection(address.plain, transport=_TRANSPORTS[address.scheme], **settings)
    connection: Connection = client.transport.establish_connection()
    connection.reached = endpoint
    return connection


def _tls(host: str, options: Mapping[str, str]) -> dict[str, Any]:
    """The peer is always verified: against the system's authorities, or those in `?cafile=`.

    Raises:
        errors.TLSRefused: a file that the URL names cannot be read.
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
    # Python's own error does not say which file, and looks like that of a broker that is away.
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


def describe(error: BaseException, address: Address, endpoint: str = "") -> errors.BrokerError:
    """A transport's error in words: the thing, the cause, the next step.

    Args:
        endpoint: which of the host's IP addresses it was, where it has several.
    """
    where = f"{address.masked} ({endpoint})" if endpoint else address.masked
    limit = _describe_limit(error, where)
    if limit is not None:
        return limit
    match error:
        case errors.BrokerError():
            return error
        case ssl.SSLError() if getattr(error, "reason", "") in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST"):
            return errors.TLSRefused(
                f"{where}: the server does not speak TLS ({error.reason}). Is this the port for amqp://? RabbitMQ's "
                "defaults are 5671 for amqps:// and 5672 for amqp://."
            )
        case ssl.SSLError():
            return errors.TLSRefused(
                f"{where}: TLS failed: {error}. Check that the host name matches the certificate, and that this "
                "machine trusts its CA. Set a CA file with ?cafile=..., a client certificate with "
                "?certfile=...&keyfile=..."
            )
        case amqp.exceptions.AMQPError() if _is_answer(error):
            return _describe_answer(error, where, address)
        case socket.gaierror():
            return errors.BrokerUnreachable(
                f"No connection to {where}: the host name cannot be resolved ({error.strerror})."
            )
        case TimeoutError():
            return errors.BrokerUnreachable(
                f"No connection to {where}: no answer in time. Is a broker listening there?"
            )
        case _:
            return errors.BrokerUnreachable(
                f"No connection to {where}: {_words(error) or type(error).__name__}. Is the broker running there?"
            )


def _describe_limit(error: BaseException, where: str) -> errors.LimitReached | None:
    """A limit that something has reached: what may be so at any time, and change at any time."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return errors.LimitReached(f"No connection to {where}: {too_many_files(error)}")
    if not isinstance(error, amqp.exceptions.AMQPError) or not _LIMIT.search(words := _words(error)):
        return None
    if re.search(r"(queue|exchange) limit", words):
        step, how = "Delete unused queues and exchanges, or raise it", "set_vhost_limits"
    else:
        step = "Close unused connections (`rabbitmqctl list_connections user peer_host client_properties`)"
        step, how = f"{step}, or raise it", "set_user_limits or set_vhost_limits"
    return errors.LimitReached(f"{where}: a limit is reached ({words}). {step} (rabbitmqctl {how}, or rabbitmq.conf).")


# RabbitMQ's: "connection limit (1) is reached", "has reached the maximum allowed limit of (8)", "queue limit in ..."
_LIMIT = re.compile(r"limit\b.*\breached|reached\b.*\b(limit|channel_max)")


def _is_answer(error: amqp.exceptions.AMQPError) -> bool:
    """Whether a broker has said so, and not our own reading of what came."""
    known = (amqp.exceptions.AccessRefused, amqp.exceptions.NotAllowed, amqp.exceptions.NotFound)
    return isinstance(error, known) or re.match("[A-Z_]+ - ", _words(error)) is not None


def _describe_answer(error: amqp.exceptions.AMQPError, where: str, address: Address) -> errors.BrokerError:
    """A broker's answer, by what it says: one code stands for many causes, 406 for conflicts, limits and bugs alike."""
    words = _words(error)
    if "inequivalent arg" in words:
        return errors.TopologyConflict(
            f"It exists on the broker with other arguments than this app declares: {words}. {way_out(words, address)}"
        )
    no_words = getattr(error, "method", None) is None  # the connection was closed in the middle of logging in
    if isinstance(error, amqp.exceptions.AccessRefused) and no_words:
        words = f"login refused: {words}"
    said = f"{type(error).code} {words}"
    kind, cause, step = next(
        (kind, cause, step) for pattern, kind, cause, step in _ANSWERS if re.search(pattern, said, re.IGNORECASE)
    )
    return kind(f"{where}: {cause} ({words}). {step}")


_ANSWERS: tuple[tuple[str, type[errors.BrokerError], str, str], ...] = (
    (
        r"^403 .*login",
        errors.AccessRefused,
        "it refused the user name or password",
        "Check LIGHTBUS_URL; RabbitMQ accepts 'guest' only from the same machine.",
    ),
    (
        r"^403 .*reserved prefix",
        errors.AccessRefused,
        "the name is reserved by the broker",
        "Names that begin with 'amq.' are reserved. Choose another one.",
    ),
    (
        r"^403 .*exclusive use",
        errors.AccessRefused,
        "another consumer has exclusive access to the queue",
        "Find it with `rabbitmqctl list_consumers`, and stop it.",
    ),
    (
        r"^403 .*(internal|default) exchange",
        errors.AccessRefused,
        "no client may do that",
        "Clients may not publish to an internal exchange, nor change the default one.",
    ),
    (
        r"^403 ",
        errors.AccessRefused,
        "permission missing",
        "Grant the app's user access to its own names: `lightbus topology permissions MODULE:ATTR` prints the "
        "rabbitmqctl set_permissions line.",
    ),
    (
        r"^404 .*(is down|inaccessible|stopped|not available|no leader)",
        errors.BrokerUnreachable,
        "the queue is not available",
        "Its node is down or starting: `rabbitmqctl cluster_status`.",
    ),
    (
        r"vhost '[^']*' is down",
        errors.BrokerUnreachable,
        "the virtual host is down",
        "It is starting, or failed to start: check the broker's log, then `rabbitmqctl restart_vhost`.",
    ),
    (
        r"^530 .*vhost",
        errors.AccessRefused,
        "no such virtual host, or this user has no access to it",
        "Create it with `rabbitmqctl add_vhost`, grant access with `rabbitmqctl set_permissions`.",
    ),
    (
        r"^404 ",
        errors.TopologyMissing,
        "it does not exist",
        "Start a worker of the app that owns it: the worker declares it. Check the virtual host, too.",
    ),
    (
        r"^405 ",
        errors.TopologyConflict,
        "another connection has an exclusive queue of this name",
        "Find it with `rabbitmqctl list_queues name exclusive owner_pid`, and stop the program that owns it.",
    ),
    (
        r"message size|^311 ",
        errors.LimitReached,
        "a message is larger than the broker accepts",
        "Publish a link to the data instead, or raise max_message_size in rabbitmq.conf.",
    ),
    (
        r"acknowledgement .* timed out",
        errors.LimitReached,
        "an event was not acknowledged within the broker's consumer timeout, and is delivered again",
        "Keep the timeout= of handlers below consumer_timeout in rabbitmq.conf (30 minutes by default), or raise that.",
    ),
    (
        r"^506 ",
        errors.LimitReached,
        "the broker lacks a resource",
        "Check `rabbitmq-diagnostics alarms` and the broker's log.",
    ),
    (
        r"invalid (arg|property)|unknown exchange type|feature.?flag|deprecated|not support|^540 ",
        errors.UnsupportedBroker,
        "it does not support a feature that Lightbus needs",
        "Lightbus is tested with RabbitMQ 3.10 to 4.x. After an upgrade run `rabbitmqctl enable_feature_flag all`.",
    ),
    (
        r"^320 ",
        errors.BrokerUnreachable,
        "the broker closed the connection",
        "It is shutting down, or an operator closed the connection.",
    ),
    (
        r"^541 ",
        errors.BrokerUnreachable,
        "the broker reported an internal error",
        "Check its log and `rabbitmqctl cluster_status`: a node may be down, or still starting.",
    ),
    (
        r"^406 ",
        errors.BrokerError,
        "the broker refused the request",
        "Check its log and its policies: `rabbitmqctl list_policies` and `list_operator_policies`.",
    ),
    (
        r"",
        errors.BrokerError,
        "the broker rejected the data as malformed",
        "Check for a proxy in between that changes the data. Otherwise, this is a bug in Lightbus: please report it.",
    ),
)
"""By the code and words of an answer, the first that fits: the pattern, the error, the cause, the next step."""


def too_many_files(error: BaseException) -> str:
    """EMFILE or ENFILE in words."""
    whose = "this process" if getattr(error, "errno", None) == errno.EMFILE else "this machine"
    return (
        f"{whose} has too many open files (sockets count too). Find the leak (lsof -p {os.getpid()}), or raise the "
        "limit (ulimit -n)."
    )


def _words(error: BaseException) -> str:
    text = getattr(error, "reply_text", None) or getattr(error, "strerror", None) or str(error)
    return str(text).strip().rstrip(".")


def address_of(connection: Connection, broker: Broker) -> Address:
    """Which of the broker's addresses a connection leads to."""
    endpoint: Endpoint | None = getattr(connection, "reached", None)
    return broker.addresses[0] if endpoint is None else endpoint.address


def way_out(words: str, address: Address) -> str:
    """What to do where something has other arguments.

    Args:
        words: the broker's ("inequivalent arg 'x' for queue 'q' in vhost 'v': received ...").
    """
    queue = re.search(r" for queue '(.+?)' in vhost ", words)
    if address.scheme == "memory":
        way = "restart this program: its in-memory broker is discarded"
    elif address.embedded:
        from lightbus.transport.sqlite_store import locate

        path = locate(address.plain).path
        way = f"stop all programs that use {path}, and delete that file (its messages are lost). Or use another file"
    elif queue:
        way = (
            f"once it is empty and has no consumers: {ctl('delete_queue', address.vhost, queue[1])}, and restart the "
            "app, which declares it again"
        )
    else:
        way = (
            "while nothing publishes, delete the exchange, and restart the workers of all apps that subscribe to it: "
            "they bind to it again"
        )
    return f"Declare it as it exists. Or {way}."


def ctl(command: str, vhost: str, *arguments: str) -> str:
    """What may be pasted: without its virtual host it would be about queues of the same name in another one."""
    return shlex.join(["rabbitmqctl", command, *([] if vhost == "/" else ["--vhost", vhost]), *arguments])


# --- declaring --------------------------------------------------------------------------------


def declare(connection: Connection, wanted: Topology) -> None:
    """Declare all of it; what is there already and equal stays as it is.

    Raises:
        amqp.exceptions.PreconditionFailed: something exists with other arguments.
        amqp.exceptions.AccessRefused: a permission is missing.
    """
    for exchange in wanted.shared:
        _declare_shared(connection, exchange)
    channel = connection.channel()
    for exchange in wanted.exchanges:
        _declare_exchange(channel, exchange)
    for queue in wanted.queues:
        kombu.entity.Queue(queue.name, durable=True, queue_arguments=queue.arguments).queue_declare(channel=channel)
    for binding in wanted.bindings:
        bind = channel.queue_bind if binding.to_queue else channel.exchange_bind
        bind(binding.destination, binding.source, binding.key, arguments=binding.arguments)
    channel.close()


def _declare_exchange(channel: Channel, exchange: Exchange, *, passive: bool = False) -> None:
    if exchange.internal:  # which kombu's entity knows nothing of
        channel.exchange_declare(exchange.name, exchange.type, passive, durable=True, auto_delete=False, internal=True)
    else:
        entity = kombu.entity.Exchange(exchange.name, exchange.type, durable=True, arguments=exchange.arguments)
        entity.declare(passive=passive, channel=channel)


def _declare_shared(connection: Connection, exchange: Exchange) -> None:
    """Passively first: a user with few permissions may use others' exchanges, but not declare them.

    Raises:
        errors.TopologyMissing: another app's is not there, and is not ours to declare. It comes when that app starts.
    """
    probe = connection.channel()
    try:
        _declare_exchange(probe, exchange, passive=True)
    except amqp.exceptions.NotFound:
        channel = connection.channel()
        try:
            _declare_exchange(channel, exchange)
        except amqp.exceptions.AccessRefused as error:
            if exchange.internal:
                raise
            raise errors.TopologyMissing(
                f"The exchange {exchange.name!r}, which a handler names with source=, does not exist, and this user "
                f"may not declare it. Check the app's name. The exchange is created when {exchange.name!r} first "
                "starts."
            ) from error
        channel.close()
        if not exchange.internal:
            near = near_exchange(connection, exchange.name)
            logger.warning(
                "No app %r has run on this broker yet: a handler names it with source=, and nothing arrives until it "
                "publishes. %s",
                exchange.name,
                f"Did you mean {near!r}, which exists?" if near else "Is it the right name?",
            )
    else:
        probe.close()


def exchange_exists(connection: Connection, name: str) -> bool:
    channel = connection.channel()
    try:
        channel.exchange_declare(name, "topic", passive=True)
    except amqp.exceptions.NotFound:
        return False
    channel.close()
    return True


def near_exchange(connection: Connection, name: str) -> str | None:
    """An exchange that is there, and may be what was meant by this name: the same but for one slip of the hand.

    AMQP cannot list exchanges, so each of the few is asked for.
    """
    slips = [name[:at] + name[at + 1] + name[at] + name[at + 2 :] for at in range(len(name) - 1)]
    slips += [name[:at] + name[at + 1 :] for at in range(len(name))]
    slips += [name[:at] + name[at] + name[at:] for at in range(len(name))] + [f"{name}s"]
    slips += [name.replace("_", "-"), name.replace("-", "_")]
    likely = [slip for slip in dict.fromkeys(slips) if slip not in ("", name, BUS)]
    return next((slip for slip in likely[:SLIPS] if exchange_exists(connection, slip)), None)


# --- the thread -------------------------------------------------------------------------------


class Backoff:
    """Pauses between tries: 0.1 s, doubled up to 5 s, each shortened at random so that many do not come at once."""

    def __init__(self, first: float = 0.1, highest: float = 5.0) -> None:
        self.first = first
        self.highest = highest
        self.failures = 0

    def next(self) -> float:
        pause = min(self.highest, self.first * 2.0 ** min(self.failures, 20))
        self.failures += 1
        return pause * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        self.failures = 0


_living: weakref.WeakSet[ConnectionThread] = weakref.WeakSet()


def _forget_after_fork() -> None:
    for thread in list(_living):
        thread.forget()


os.register_at_fork(after_in_child=_forget_after_fork)


class WakeUp:
    """What one thread waits for, and any other sets, once for each wait: a lock, since `threading.Event` is not to be
    interrupted. A signal's handler that raises in the middle of one leaves its inner lock held for ever.
    """

    __slots__ = ("_unset",)

    def __init__(self) -> None:
        self._unset = threading.Lock()
        self._unset.acquire()

    def set(self) -> None:
        try:
            self._unset.release()
        except RuntimeError as error:  # it is set
            if errors.is_from_deeper(error):
                raise

    def clear(self) -> None:
        self._unset.acquire(blocking=False)

    def wait(self, seconds: float) -> bool:
        """Wait for so long at most, and clear it. Returns whether it was set."""
        return self._unset.acquire(timeout=max(0.0, seconds))


_here = threading.local()


def own_thread() -> str | None:
    """The name of the connection whose own thread this is, if it is one's."""
    name: str | None = getattr(_here, "connection", None)
    return name


class StartInterrupted(RuntimeError):
    """A connection's thread is wanted where this very thread is just starting it."""


class ConnectionThread:
    """A thread that owns one connection and replaces it when it fails.

    Each connection is an *epoch*: nothing that belongs to an older one (a channel, a delivery tag) is used
    after it has ended, since a stale ack would settle a different message.
    """

    def __init__(self, broker: Broker, name: str) -> None:
        self.broker = broker
        self.name = name
        self.connection: Connection | None = None
        self.address = broker.addresses[0]
        """Where the connection leads to, or the last one led."""
        self.error: errors.BrokerError | None = None
        """Why there is no connection now."""
        self.epoch = 0
        self._start()
        _living.add(self)

    def _start(self) -> None:
        self.stopping = False
        self._thread: threading.Thread | None = None
        self._starting = threading.RLock()
        self._in_start = False
        self._running = threading.Lock()
        """Held by the thread that does the work. There is a second one where a start was interrupted so early that the
        first did not count as alive yet: it waits, and ends after it."""
        self._wake = WakeUp()
        self._woken = False
        self._using = threading.Lock()
        """Whoever holds it uses the connection: this thread, or the loop that attends."""
        self._loop: Loop | None = None
        self._attention: Attention | None = None
        self._standing_by = False
        self._visits_seen = 0
        self._own_until = 0.0
        self._open_since: float | None = None

    def forget(self) -> None:
        """In a forked child: the connection is the parent's. Let go of it without a word to the broker."""
        connection, self.connection = self.connection, None
        if connection is not None:
            with contextlib.suppress(Exception):  # whatever is wrong with it, it is not ours
                connection.collect()
        self._forget_attention()
        self._start()

    # what a role fills in

    def wanted(self) -> bool:
        """Whether a connection is needed now."""
        return True

    def opened(self, connection: Connection) -> None:
        """A new epoch begins: declare, open channels, subscribe."""
        raise NotImplementedError

    def work(self) -> float:
        """Send what is waiting; returns for how many seconds there will be nothing else to do."""
        raise NotImplementedError

    def read_in_loop(self) -> None:
        """Read what has arrived and hand it on, in the event loop that attends, which must not wait."""
        raise NotImplementedError

    def channel_closed(self, error: amqp.exceptions.ChannelError) -> bool:
        """The broker closed a channel. Returns whether the epoch goes on with another one."""
        return False

    def lost(self, error: BaseException) -> None:
        """The epoch has ended; `self.connection` is gone."""

    def failed(self, error: errors.BrokerError) -> None:
        """A new epoch could not begin."""

    def well_after(self, error: Exception) -> bool:
        """Whether the connection may be well though its epoch ends over this: then it is closed in good order."""
        return False

    def closing(self) -> None:
        """Say the last words on a connection that is about to be closed in good order."""

    # from any thread

    def ensure_started(self) -> None:
        """
        Raises:
            StartInterrupted: this very thread is starting it, which a signal's handler has interrupted.
            RuntimeError: no thread can be started.
        """
        thread = self._thread
        if thread is not None and thread.is_alive():  # `alive` would be a call more for each event
            return
        self.broker.warn_if_unset()
        with self._starting:
            if self._in_start:
                raise StartInterrupted
            if not self.alive:
                self.stopping = False
                self._in_start = True
                try:
                    # Kept before it is started, whatever interrupts that.
                    self._thread = threading.Thread(target=self._own, name=self.name, daemon=True)
                    self._thread.start()
                finally:
                    self._in_start = False

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def attended(self) -> bool:
        """Whether an event loop reads the connection now, and the thread stands by."""
        return self._standing_by

    def wake(self) -> None:
        """Let the thread look for work at once. Cheap where it was woken already."""
        if self._woken:
            return
        self._woken = True
        try:
            self._wake.set()
            connection = self.connection
            if connection is not None and not self._standing_by:
                connection.interrupt()
        except BaseException:  # a signal's handler raised: nobody knows how far it came
            self._woken = False
            raise

    def attended_by(self, loop: Loop) -> None:
        """From the loop's own thread: let it read the connection, unless another one does already."""
        if loop.can_watch and (self._loop is None or self._loop.ended):
            self._loop = loop
            self.wake()

    def keep_reading(self) -> None:
        """Somebody outside of the loop waits for what arrives: for a second now, nobody but the thread reads."""
        if self._attention is not None:
            self._own_until = time.monotonic() + TICK
            if self._standing_by:
                self.wake()

    def stop(self, timeout: float) -> None:
        """End the thread and close its connection, within `timeout` seconds."""
        thread = self._thread
        self.let_go()
        if thread is not None and thread.is_alive() and thread is not threading.current_thread():
            thread.join(timeout)
            if thread.is_alive():
                logger.warning("%s did not stop within %g s; the broker will close its connection.", self.name, timeout)
                return
        self._thread = None

    def let_go(self) -> None:
        """Let the thread close its connection and end, without waiting for it. For finalizers, in any thread."""
        self.stopping = True
        self._woken = False
        self.wake()

    # the thread itself

    def _own(self) -> None:
        _here.connection = self.name
        with self._running:
            self._run()

    def _run(self) -> None:
        backoff = Backoff()
        while not self.stopping:
            if not self.wanted():
                self._pause(TICK, until_wanted=True)
                continue
            self._open_since = None
            try:
                self._live()
            except errors.BrokerError as error:
                self._end(error)
                self.failed(error)
            except LOST as error:
                self._end(error)
            except Exception as error:
                # A mistake of our own must not end the thread silently: whoever waits for it would wait on.
                logger.exception("%s: unexpected error; reconnecting.", self.name)
                self._end(error)
            if self._open_since is not None and time.monotonic() - self._open_since > backoff.highest:
                backoff.reset()
            if not self.stopping:
                self._pause(backoff.next())

    def _live(self) -> None:
        """One epoch, from opening to the end."""
        connection = self.broker.connect(self.name)
        self.address = address_of(connection, self.broker)
        self.connection = connection
        with self._using:
            try:
                self._open(connection)
                self._work_on(connection)
            except Exception as error:
                if self.well_after(error):
                    with contextlib.suppress(*LOST):
                        self.closing()
                        connection.close()
                raise
            else:
                self.closing()
                self.connection = None
                with contextlib.suppress(*LOST):
                    connection.close()
            finally:
                self._end_attention()

    def _open(self, connection: Connection) -> None:
        try:
            self.opened(connection)
        except (errors.BrokerError, *LOST) as error:
            described = self._not_opened(connection, error)
            if described is error:
                raise
            raise described from error
        self.epoch += 1
        self.error = None
        self.broker.worked = True
        self._open_since = time.monotonic()

    def _work_on(self, connection: Connection) -> None:
        next_tick = time.monotonic() + TICK
        while not self.stopping:
            self._wake.clear()
            self._woken = False
            try:
                timeout = max(0.0, min(self.work(), next_tick - time.monotonic()))
                attention = self._present_attention(connection)
                if attention is None:
                    with contextlib.suppress(TimeoutError):
                        connection.drain_events(timeout)
                elif not attention.connection.catch_up():
                    self._stand_by(attention, timeout)
            except amqp.exceptions.ChannelError as error:
                if not self.channel_closed(error):
                    raise
                if self._attention is not None:
                    self._attention.resume()
            if time.monotonic() >= next_tick:
                self._look_whether_the_loop_comes(connection)
                connection.heartbeat_tick()
                next_tick = time.monotonic() + TICK

    def _not_opened(self, connection: Connection, error: BaseException) -> errors.BrokerError:
        described = describe(error, self.address)
        if self.broker.avoid(connection, described) and isinstance(described, FATAL):
            return errors.BrokerUnreachable(str(described))  # by this node: the others are yet to be tried
        return described

    # while an event loop attends

    def _present_attention(self, connection: Connection) -> Attention | None:
        """The event loop's attention, where it reads now. Where it does not but could, it is invited."""
        if self._loop is None or time.monotonic() < self._own_until:
            return None
        attention = self._attention
        if attention is not None and attention.loop.ended:
            self._forget_attention()
            attention = None
        if self._loop.ended:
            return None
        if attention is None:
            watched = connection.watched()
            if watched is None:
                return None
            watched.on_unsent = self.wake
            attention = Attention(self._loop, watched, using=self._using, read=self.read_in_loop, wake=self.wake)
            self._attention, self._visits_seen = attention, -1
        if attention.comes:
            return attention
        try:
            attention.invite()
        except RuntimeError:
            self._forget_attention()
        return None

    def _stand_by(self, attention: Attention, timeout: float) -> None:
        self._standing_by = True
        self._using.release()
        try:
            with contextlib.suppress(RuntimeError):  # it has ended, which is seen when it is missed
                attention.invite()
            if not self.stopping:
                self._wake.wait(timeout)
        finally:
            self._using.acquire()
            self._standing_by = False
        if attention.error is not None:
            raise attention.error

    def _look_whether_the_loop_comes(self, connection: Connection) -> None:
        attention = self._attention
        if attention is None or not attention.comes or time.monotonic() < self._own_until:
            return
        if attention.visits == self._visits_seen:
            # Nothing has arrived, or nobody looked: then the thread reads until the loop comes back.
            with contextlib.suppress(TimeoutError):
                connection.drain_events(0)
                attention.comes = False
        self._visits_seen = attention.visits

    def _forget_attention(self) -> None:
        """The loop has ended (or this is a forked child); the connection may live on."""
        attention, self._attention = self._attention, None
        if attention is not None:
            attention.forget()

    def _end_attention(self) -> None:
        attention, self._attention = self._attention, None
        if attention is not None:
            attention.end()

    def _end(self, error: BaseException) -> None:
        connection, self.connection = self.connection, None
        self.error = describe(error, self.address)
        if connection is not None:
            with contextlib.suppress(Exception):  # it is broken already: nothing that it says now matters
                connection.collect()
            self.lost(error)

    def _pause(self, seconds: float, *, until_wanted: bool = False) -> None:
        """Wait for so long, or (where nothing is wrong, just nothing to do) until a connection is wanted."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self._wake.clear()
            self._woken = False  # after the clear: whoever finds it True now has left work that is seen below
            if self.stopping or (until_wanted and self.wanted()):
                return
            self._wake.wait(left)
