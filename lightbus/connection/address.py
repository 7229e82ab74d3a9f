"""A broker URL, parsed strictly. Its secrets never appear in errors or logs."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping, Sequence
from typing import NoReturn
from urllib.parse import ParseResult, SplitResult, parse_qsl, quote, unquote, unquote_to_bytes, urlsplit

import attrs
from kombu.transport import TRANSPORT_ALIASES

from lightbus import errors
from lightbus.connection.brokers.row import Broker
from lightbus.connection.brokers.table import SCHEMES, choices

URL_VARIABLE = "LIGHTBUS_URL"
REQUIRE_VARIABLE = "LIGHTBUS_REQUIRE_URL"
"""If it is 1, an unset or empty LIGHTBUS_URL is an error. For deployments."""
EMBEDDED = "sqlite://"
CONNECT_TIMEOUT = 5.0
HEARTBEAT = 10
"""Seconds. RabbitMQ recommends 5 to 20: a busy machine must not miss two, a dead peer must be noticed soon."""

OPTIONS = ("heartbeat", "connect_timeout", "cafile", "certfile", "keyfile")
_RANGES = {"heartbeat": (1.0, 3600.0), "connect_timeout": (0.1, 3600.0)}
"""Seconds. In AMQP 0 turns heartbeats off, so a dead broker would not be noticed."""


@attrs.frozen
class Address:
    """One parsed broker URL."""

    url: str = attrs.field(repr=False)
    scheme: str
    options: Mapping[str, str] = attrs.field(hash=False)

    def __reduce__(self) -> NoReturn:
        raise TypeError("A broker's address cannot be pickled: it may have a password.")

    @property
    def masked(self) -> str:
        """The URL without its password and query, for output and logs."""
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
        """The virtual host; "/" if the broker has none."""
        return (unquote(urlsplit(self.plain).path[1:]) or "/") if self.broker.virtual_hosts else "/"

    @property
    def broker(self) -> Broker:
        """What is particular to this kind of broker."""
        return SCHEMES[self.scheme][0]

    @property
    def tls(self) -> bool:
        return SCHEMES[self.scheme][1].tls

    @property
    def port(self) -> int | None:
        """None: the URL has no host."""
        default = SCHEMES[self.scheme][1].port
        return None if default is None else urlsplit(self.plain).port or default

    @property
    def place(self) -> str:
        """Where the broker is, for output, without the password."""
        return self.broker.place(self)

    @property
    def hint(self) -> str:
        """How to use another broker, after `place`."""
        return SCHEMES[self.scheme][1].hint

    @property
    def private(self) -> bool:
        """Only this process can use the broker."""
        return SCHEMES[self.scheme][1].private


_ESCAPE = (
    "In a user name, a password or a virtual host, write % / ? # @ : ; and spaces as %25 %2F %3F %23 %40 %3A %3B %20."
)
_SEVERAL = (
    "Join the URLs of several nodes by ';', each with its scheme, as in 'amqp://host-1;amqp://host-2'; or pass a list."
)


def parse_address(url: object, folder: str | None = None) -> Address:
    """Parse one URL. No error contains a part of it that could be a secret, even if it is not a URL at all.

    Args:
        folder: the folder for relative paths; by default the working directory. They become absolute here, so that
            later connections, also of other processes, use the same file after an `os.chdir`.

    Raises:
        errors.InvalidURL: it is not a URL, or has an unknown option.
        errors.UnsupportedBroker: the broker has no AMQP exchanges and bindings.
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
    if scheme not in SCHEMES:
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
    if SCHEMES[scheme][1].file and base.startswith("/") and base != "/":
        base = "/" + quote(os.fsencode(_absolute(os.fsdecode(unquote_to_bytes(os.fsencode(base[1:]))), folder)))
    return Address(f"{scheme}://{base}{'?' if query else ''}{query}", scheme, options)


_QUOTES = "'\"`\u2018\u2019\u201c\u201d"
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*")
_BROKEN_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_LABEL = re.compile(r"[A-Za-z0-9_-]{1,63}")
_NUMBER = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*")
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]*)?|\.[0-9]+")


def urls_of(given: object) -> Sequence[object]:
    if isinstance(given, Sequence) and not isinstance(given, str | bytes | bytearray | SplitResult | ParseResult):
        return given
    return _text_of(given).split(";")


def _text_of(url: object) -> str:
    """A URL as text. URL objects of pydantic, yarl and the standard library are accepted.

    Raises:
        errors.InvalidURL: it is of another type.
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
    """What is wrong with the part after `scheme://`, without quoting it; None if it is valid."""
    broker, given = SCHEMES[scheme]
    base, _, query = rest.partition("?")
    if "://" in rest:
        return f"it contains more than one URL. {_SEVERAL}"
    if any(character < " " or character == "\x7f" for character in rest):
        return "it contains a line break or another control character. Remove it."
    if "#" in rest or "@" in query:
        return f"it contains a '#', or an '@' after a '?'. {_ESCAPE}"
    if given.port is None:
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
    if problem is None and path and not broker.virtual_hosts:
        return f"a path follows its host, but {broker.name} has no virtual hosts. Remove what follows the host."
    if problem is None and not _urlsplit_accepts(rest):
        return f"it contains a character that Unicode normalizes to one of / ? # @ and :. {_ESCAPE}"
    return problem


def _is_text(rest: str) -> bool:
    try:
        unquote(rest, errors="strict").encode()
    except ValueError:
        return False
    return not _BROKEN_ESCAPE.search(rest)


def _urlsplit_accepts(rest: str) -> bool:
    """Whether Python, and so kombu, can parse it: their own errors would quote it."""
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
        return f"its host contains a ','. {_SEVERAL}"
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
        if _NUMBER.fullmatch(labels[-1]):  # the system would accept '0', '127.1' and '0x7f.1' as addresses
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
    """The options, and what is wrong with them, if anything."""
    known = f"Known are: {', '.join(OPTIONS)}."
    try:
        if query and _BROKEN_ESCAPE.search(query):
            raise ValueError
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query), errors="strict")
    except ValueError:
        pairs = None  # reported below: an error raised here would chain Python's, which quotes the URL
    if pairs is None:
        return {}, f"its options, after the '?', cannot be read. Use '?heartbeat=10&connect_timeout=5'. {_ESCAPE}"
    options = dict(pairs)
    for name in options:
        if name not in OPTIONS:
            near = errors.nearest(name, OPTIONS)
            which = f"the option {name!r}, which is not known. Did you mean {near!r}?" if near else "an unknown option."
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
    advice = f"Use {choices()}."
    if scheme in TRANSPORT_ALIASES or scheme in _OTHERS:
        what = (
            "it has no AMQP exchanges and bindings to route events"
            if scheme in TRANSPORT_ALIASES
            else "unknown broker type"
        )
        return f"{scheme}:// is not supported: {what}. {advice}"
    near = errors.nearest(scheme, SCHEMES)
    meant = f" Did you mean {near}://?" if near else ""
    return f"The URL's scheme, before '://', is not supported: unknown broker type.{meant} {advice}"


_OTHERS = frozenset(("http", "https", "nats", "mqtt", "mqtts", "kafka", "pulsar", "stomp", "tcp", "postgres", "mysql"))
