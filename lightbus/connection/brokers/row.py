"""What a row of the table has: the schemes of a broker's URLs, what its errors mean, and where to look at it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import attrs

from lightbus import errors


class URL(Protocol):
    """What a row needs of an address (`connection.address.Address`)."""

    @property
    def scheme(self) -> str: ...

    @property
    def plain(self) -> str: ...

    @property
    def masked(self) -> str: ...

    @property
    def vhost(self) -> str: ...


@attrs.frozen
class Scheme:
    """A URL's scheme, before `://`."""

    name: str
    port: int | None = None
    """The port of a URL without one; None if such a URL has no host."""
    tls: bool = attrs.field(default=False, kw_only=True)
    file: bool = attrs.field(default=False, kw_only=True)
    """The URL's path is a file's."""
    private: bool = attrs.field(default=False, kw_only=True)
    """Only this process can use the broker."""
    alias: bool = attrs.field(default=False, kw_only=True)
    """Another name, which no error suggests."""
    hint: str = attrs.field(default="", kw_only=True)
    """What a worker's banner adds."""


class Answer(NamedTuple):
    """What an error of a broker means."""

    pattern: str
    """Matches the code and text, as in `404 NOT_FOUND - no queue 'q'`."""
    error: type[errors.BrokerError]
    cause: str
    step: str
    """What to do next."""


class Verdict(NamedTuple):
    """What `lightbus doctor` reports about a broker's version."""

    level: Literal["ok", "warn", "fail"]
    text: str
    step: str = ""


Trial = Literal["dead-lettering", "subscription"]
"""How `lightbus doctor` tries a broker: with a message that the broker dead-letters from one temporary queue
to another; or, where any message would reach handlers, only by subscribing."""


@attrs.frozen(kw_only=True)
class Broker:
    """A kind of broker."""

    name: str
    """Within a sentence."""
    transport: str
    """`module:class`, for kombu."""
    schemes: tuple[Scheme, ...]
    virtual_hosts: bool
    """What follows the host in a URL is the name of one."""
    library: str = ""
    """The module that its transport needs, if Lightbus does not always require it."""
    extra: str = ""
    """The extra that installs `library`."""
    messaging_system: str
    """OpenTelemetry's `messaging.system`."""
    permissions: Literal["rabbitmqctl", "artemis"]
    """The format in which `lightbus topology permissions` prints them."""
    reports_unrouted: bool
    """Its confirm tells whether a queue received the message."""
    place: Callable[[URL], str]
    """Where it is, for a worker's banner."""
    trial: Trial

    # --- its answers
    answers: tuple[Answer, ...]
    """The first whose pattern matches counts; the last one matches everything."""
    names_refused_logins: bool
    """False: a refused login has the text of any refused access."""
    conflict: str
    """Matches the text of an error if something exists with other arguments."""
    resolution: Callable[[str, URL], str]
    """How to resolve such a conflict, from the broker's text."""
    no_tls: str
    """The next step if the server does not speak TLS."""
    login_step: str
    """The next step if a login is refused."""

    # --- what an operator looks at: commands, or where to look
    bindings: str
    """Why `lightbus doctor` does not compare bindings: the rest of a sentence."""
    list_bindings: Callable[[str], str]
    """From the virtual host; "" if nothing lists them."""
    list_consumers: Callable[[str], str]
    """From the virtual host; "" if nothing lists them."""
    alarms: str
    """Why it accepts no messages."""
    queue_health: str
    """Whether a queue works."""
    queue_lengths: str
    """Whether a queue is full."""

    # --- what has to exist
    no_bus: str
    """What a missing bus exchange means."""
    no_bus_step: str
    no_catalog_step: str

    # --- by the server properties that it has sent
    version: Callable[[Mapping[str, Any]], Verdict]
    """Whether Lightbus supports its version."""
    keeps_forged_deaths: Callable[[Mapping[str, Any]], bool]
    """Whether it keeps an `x-death` header that a publisher has written."""

    @property
    def tls_scheme(self) -> str:
        """The scheme for an encrypted connection; "" if there is none."""
        return next((one.name for one in self.schemes if one.tls), "")
