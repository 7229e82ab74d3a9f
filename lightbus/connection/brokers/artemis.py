"""ActiveMQ Artemis: its answers, with the texts of 2.40.0, and where to look at what is on it.

Its administrator declares what all apps share, in broker.xml. A queue's bindings are its selector.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lightbus import errors
from lightbus.connection.brokers.row import URL, Answer, Broker, Scheme, Verdict

PRODUCT = "apache-activemq-artemis"
TESTED = (2, 40)

_AS_OPERATOR = (
    "run a worker of the app once as an operator (a user with the permission `edit` on mops.broker.updateQueue), which "
    "changes them"
)
_ADMINISTRATOR = "`lightbus topology artemis` prints it, for broker.xml."
_GRANT = "`lightbus topology permissions MODULE:ATTR --format artemis` prints the security-settings, for broker.xml."


def _resolution(message: str, _url: URL) -> str:
    """
    Args:
        message: "Queue: billing.main filter mismatch [...] is different than existing filter [...]".
    """
    queue = re.search(r"\bqueue:? '?([^\s']+)", message, re.IGNORECASE)
    name = queue[1] if queue else "NAME"
    return (
        f"If the app's bindings have changed, {_AS_OPERATOR}. If another program made the queue: once it is empty and "
        f"has no consumers, `artemis queue delete --name {name}`, and restart the app, which declares it again."
    )


def _version(server: Mapping[str, Any]) -> Verdict:
    product, number = str(server.get("product", "unknown")), str(server.get("version", "unknown"))
    what = f"{product} {number}"
    step = "Lightbus is tested with ActiveMQ Artemis 2.40."
    if product != PRODUCT:
        return Verdict("warn", f"{what}.", step)
    numbers = tuple(int(part) for part in number.split(".")[:2] if part.isdigit())
    if len(numbers) < 2 or numbers < TESTED or numbers[0] > TESTED[0]:
        return Verdict("warn", f"{what} is not known here.", step)
    return Verdict("ok", f"{what} (Lightbus is tested with 2.40).")


_ANSWERS = (
    Answer(
        r"cannot be used on Artemis|make a selector of",
        errors.UnsupportedBroker,
        "Artemis cannot express a binding",
        "Change the pattern of the handler.",
    ),
    Answer(
        r"AMQ22911[01]\b|too many (sessions|queues)",
        errors.LimitReached,
        "a limit of this user is reached",
        "Close unused connections, or raise max-sessions or max-queues in the resource-limit-settings of broker.xml.",
    ),
    Answer(
        r"AMQ229102\b|AMQ229119\b|resource.limit.exceeded|\bis full\b|max-disk-usage|^506 ",
        errors.LimitReached,
        "the broker's disk, or an address, is full",
        "Free the disk, or consume what waits (`artemis queue stat`). The limits are max-disk-usage, global-max-size "
        "and max-size-bytes in broker.xml.",
    ),
    Answer(
        r"message.size|too large|bigger than|^311 ",
        errors.LimitReached,
        "a message is larger than the broker accepts",
        "Publish a link to the data instead. (Headers must fit into journal-buffer-size, in broker.xml.)",
    ),
    Answer(
        r"^403 .*(login|AMQ[12]29031\b|unable to validate user|authentication failed)|authentication failed",
        errors.AccessRefused,
        "it refused the user name or password",
        "Check LIGHTBUS_URL. The broker reads users from artemis-users.properties and their roles from "
        "artemis-roles.properties, or from the JAAS realm in login.config.",
    ),
    Answer(
        r"updateQueue",
        errors.AccessRefused,
        "the queue has other bindings, which this user may not change",
        f"{_AS_OPERATOR[0].upper()}{_AS_OPERATOR[1:]}. Then restart the app.",
    ),
    Answer(
        r"permission='CREATE_ADDRESS'.*address lightbus\.(bus|dead|catalog)\b",
        errors.TopologyMissing,
        "the administrator's part of the bus is missing",
        _ADMINISTRATOR,
    ),
    Answer(
        r"does not have permission|AMQ11901[567]\b|unauthorized.access|^403 .*permission",
        errors.AccessRefused,
        "permission missing",
        f"{_GRANT} The app's user has its role in artemis-roles.properties.",
    ),
    Answer(
        r"AMQ229200\b|maximum consumer limit|exclusive use",
        errors.AccessRefused,
        "another consumer has exclusive access to the queue",
        "Find it in the console's list of consumers, and stop it.",
    ),
    Answer(
        r"^403 ",
        errors.AccessRefused,
        "the broker does not allow that",
        f"{_GRANT} Check the broker's log (log/artemis.log), too.",
    ),
    Answer(
        r"routing type|AMQ229207\b",
        errors.TopologyConflict,
        "an address has another routing type than Lightbus needs",
        f"While nothing uses it, delete it, and declare it as the administrator's part does: {_ADMINISTRATOR}",
    ),
    Answer(
        r"divert|queue:? '?lightbus\.catalog\b",
        errors.TopologyMissing,
        "the administrator's part of the bus is missing",
        _ADMINISTRATOR,
    ),
    Answer(
        r"^404 .*(queue|::)|AMQ229017\b|AMQ229067\b|queue deleted",
        errors.TopologyMissing,
        "it does not exist",
        "Start a worker of the app that owns it: the worker declares it.",
    ),
    Answer(
        r"lightbus\.(bus|dead|catalog)\b.*does not exist|AMQ119002\b|AMQ119010\b|AMQ229203\b"
        r"|^404 .*lightbus\.(bus|dead|catalog)\b",
        errors.TopologyMissing,
        "the administrator's part of the bus is missing",
        _ADMINISTRATOR,
    ),
    Answer(
        r"^404 ",
        errors.TopologyMissing,
        "it does not exist",
        "Start a worker of the app that owns it: the worker declares it.",
    ),
    Answer(
        r"^405 |AMQ229082\b",
        errors.TopologyConflict,
        "another connection has an exclusive queue of this name",
        "Find it in the console's list of consumers, and stop the program that owns it.",
    ),
    Answer(
        r"invalid filter|AMQ229020\b|invalid.field|not.implemented|not support|capability|^540 ",
        errors.UnsupportedBroker,
        "it does not support a feature that Lightbus needs",
        "Lightbus is tested with ActiveMQ Artemis 2.40.",
    ),
    Answer(
        r"AMQ229014\b|connection TTL",
        errors.BrokerUnreachable,
        "this process sent no heartbeat in time",
        "Was it stopped, or is this machine busy? ?heartbeat= in LIGHTBUS_URL sets the time.",
    ),
    Answer(
        r"AMQ2292(3[678]|40)\b|redirect",
        errors.BrokerUnreachable,
        "a connection router of the broker refused or redirected the connection",
        "Lightbus does not follow redirects: set the URLs of all nodes, joined by ';'.",
    ),
    Answer(
        r"^320 |connection.forced|AMQ229034\b|closed by management|admin's request",
        errors.BrokerUnreachable,
        "the broker closed the connection",
        "It is starting or shutting down, or an operator closed the connection.",
    ),
    Answer(
        r"^541 ",
        errors.BrokerUnreachable,
        "the broker reported an internal error",
        "Check its log (log/artemis.log).",
    ),
    Answer(
        r"^(406|530) ",
        errors.BrokerError,
        "the broker refused the request",
        "Check its log (log/artemis.log).",
    ),
    Answer(
        r"",
        errors.BrokerError,
        "the broker rejected the data as malformed",
        "Check for a proxy in between that changes the data. Otherwise, this is a bug in Lightbus: please report it.",
    ),
)

ARTEMIS = Broker(
    name="ActiveMQ Artemis",
    transport="lightbus.transport.activemq.connection:Transport",
    schemes=(Scheme("activemq", 5672), Scheme("activemqs", 5671, tls=True)),
    virtual_hosts=False,
    library="proton",
    extra="activemq",
    messaging_system="activemq",
    permissions="artemis",
    reports_unrouted=False,
    place=lambda url: url.masked,
    trial="subscription",
    answers=_ANSWERS,
    names_refused_logins=True,
    conflict="filter mismatch|different filter|inequivalent arg",
    resolution=_resolution,
    no_tls="Is this the port of an acceptor without sslEnabled=true? Without TLS, the scheme is activemq://.",
    login_step="Check the user and its password in LIGHTBUS_URL.",
    bindings="they are in the selector of each queue",
    list_bindings=lambda _vhost: "The console's list of queues shows it (Filter)",
    list_consumers=lambda _vhost: "the console's list of consumers",
    alarms="see max-disk-usage and global-max-size in broker.xml, and log/artemis.log",
    queue_health="artemis queue stat",
    queue_lengths="see `artemis queue stat`, and address-full-policy in broker.xml",
    no_bus="the administrator's part of the bus is missing",
    no_bus_step=_ADMINISTRATOR,
    no_catalog_step=_ADMINISTRATOR,
    version=_version,
    keeps_forged_deaths=lambda _server: True,  # the transport makes the header, and takes the source from the publisher
)
