"""RabbitMQ: its answers, and the commands that show what is on it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from lightbus import errors
from lightbus.connection.brokers.row import URL, Answer, Broker, Scheme, Verdict

OLDEST = (3, 10)
NEWEST_MAJOR = 4


def ctl(command: str, vhost: str, *arguments: str) -> str:
    """A command to copy. It names the virtual host: another one may have a queue with the same name."""
    return shlex.join(["rabbitmqctl", command, *([] if vhost == "/" else ["--vhost", vhost]), *arguments])


def _resolution(message: str, url: URL) -> str:
    """
    Args:
        message: "inequivalent arg 'x' for queue 'q' in vhost 'v': received ...".
    """
    queue = re.search(r" for queue '(.+?)' in vhost ", message)
    if queue:
        way = (
            f"once it is empty and has no consumers: {ctl('delete_queue', url.vhost, queue[1])}, and restart the "
            "app, which declares it again"
        )
    else:
        way = (
            "while nothing publishes, delete the exchange, and restart the workers of all apps that subscribe to it: "
            "they bind to it again"
        )
    return f"Declare it as it exists. Or {way}."


def _version(server: Mapping[str, Any]) -> Verdict:
    product, number = str(server.get("product", "unknown")), str(server.get("version", "unknown"))
    what = f"{product} {number}"
    if product != "RabbitMQ":
        step = "Lightbus is tested with RabbitMQ 3.10 to 4.x and with its embedded broker."
        return Verdict("warn", f"{what}.", step)
    numbers = tuple(int(part) for part in number.split(".")[:2] if part.isdigit())
    if len(numbers) == 2 and numbers < OLDEST:
        return Verdict("fail", f"{what} is older than 3.10.", "Upgrade RabbitMQ: events could be lost.")
    if len(numbers) < 2 or numbers[0] > NEWEST_MAJOR:
        return Verdict("warn", f"{what} is not known here.", "Lightbus is tested with 3.10 to 4.x.")
    return Verdict("ok", f"{what} (Lightbus needs 3.10 to 4.x).")


def _keeps_forged_deaths(server: Mapping[str, Any]) -> bool:
    """RabbitMQ before 4.0 does."""
    major = str(server.get("version", "")).partition(".")[0]
    return server.get("product") == "RabbitMQ" and not (major.isdigit() and int(major) >= 4)


_ANSWERS = (
    # "connection limit (1) is reached", "has reached the maximum allowed limit of (8)", "queue limit in ..."
    Answer(
        r"(queue|exchange) limit\b.*\breached",
        errors.LimitReached,
        "a limit is reached",
        "Delete unused queues and exchanges, or raise it (rabbitmqctl set_vhost_limits, or rabbitmq.conf).",
    ),
    Answer(
        r"limit\b.*\breached|reached\b.*\b(limit|channel_max)",
        errors.LimitReached,
        "a limit is reached",
        "Close unused connections (`rabbitmqctl list_connections user peer_host client_properties`), or raise it "
        "(rabbitmqctl set_user_limits or set_vhost_limits, or rabbitmq.conf).",
    ),
    Answer(
        r"^403 .*login",
        errors.AccessRefused,
        "it refused the user name or password",
        "Check LIGHTBUS_URL; RabbitMQ accepts 'guest' only from the same machine.",
    ),
    Answer(
        r"^403 .*reserved prefix",
        errors.AccessRefused,
        "the name is reserved by the broker",
        "Names that begin with 'amq.' are reserved. Choose another one.",
    ),
    Answer(
        r"^403 .*exclusive use",
        errors.AccessRefused,
        "another consumer has exclusive access to the queue",
        "Find it with `rabbitmqctl list_consumers`, and stop it.",
    ),
    Answer(
        r"^403 .*(internal|default) exchange",
        errors.AccessRefused,
        "no client may do that",
        "Clients may not publish to an internal exchange, nor change the default one.",
    ),
    Answer(
        r"^403 ",
        errors.AccessRefused,
        "permission missing",
        "Grant the app's user access to its own names: `lightbus topology permissions MODULE:ATTR` prints the "
        "rabbitmqctl set_permissions line.",
    ),
    Answer(
        r"^404 .*(is down|inaccessible|stopped|not available|no leader)",
        errors.BrokerUnreachable,
        "the queue is not available",
        "Its node is down or starting: `rabbitmqctl cluster_status`.",
    ),
    Answer(
        r"vhost '[^']*' is down",
        errors.BrokerUnreachable,
        "the virtual host is down",
        "It is starting, or failed to start: check the broker's log, then `rabbitmqctl restart_vhost`.",
    ),
    Answer(
        r"^530 .*vhost",
        errors.AccessRefused,
        "no such virtual host, or this user has no access to it",
        "Create it with `rabbitmqctl add_vhost`, grant access with `rabbitmqctl set_permissions`.",
    ),
    Answer(
        r"^404 ",
        errors.TopologyMissing,
        "it does not exist",
        "Start a worker of the app that owns it: the worker declares it. Check the virtual host, too.",
    ),
    Answer(
        r"^405 ",
        errors.TopologyConflict,
        "another connection has an exclusive queue of this name",
        "Find it with `rabbitmqctl list_queues name exclusive owner_pid`, and stop the program that owns it.",
    ),
    Answer(
        r"message size|^311 ",
        errors.LimitReached,
        "a message is larger than the broker accepts",
        "Publish a link to the data instead, or raise max_message_size in rabbitmq.conf.",
    ),
    Answer(
        r"acknowledgement .* timed out",
        errors.LimitReached,
        "an event was not acknowledged within the broker's consumer timeout, and is delivered again",
        "Keep the timeout= of handlers below consumer_timeout in rabbitmq.conf (30 minutes by default), or raise that.",
    ),
    Answer(
        r"^506 ",
        errors.LimitReached,
        "the broker lacks a resource",
        "Check `rabbitmq-diagnostics alarms` and the broker's log.",
    ),
    Answer(
        r"invalid (arg|property)|unknown exchange type|feature.?flag|deprecated|not support|^540 ",
        errors.UnsupportedBroker,
        "it does not support a feature that Lightbus needs",
        "Lightbus is tested with RabbitMQ 3.10 to 4.x. After an upgrade run `rabbitmqctl enable_feature_flag all`.",
    ),
    Answer(
        r"^320 ",
        errors.BrokerUnreachable,
        "the broker closed the connection",
        "It is shutting down, or an operator closed the connection.",
    ),
    Answer(
        r"^541 ",
        errors.BrokerUnreachable,
        "the broker reported an internal error",
        "Check its log and `rabbitmqctl cluster_status`: a node may be down, or still starting.",
    ),
    Answer(
        r"^406 ",
        errors.BrokerError,
        "the broker refused the request",
        "Check its log and its policies: `rabbitmqctl list_policies` and `list_operator_policies`.",
    ),
    Answer(
        r"",
        errors.BrokerError,
        "the broker rejected the data as malformed",
        "Check for a proxy in between that changes the data. Otherwise, this is a bug in Lightbus: please report it.",
    ),
)

RABBITMQ = Broker(
    name="RabbitMQ",
    transport="lightbus.transport.amqp.connection:Transport",
    schemes=(Scheme("amqp", 5672), Scheme("amqps", 5671, tls=True), Scheme("pyamqp", 5672, alias=True)),
    virtual_hosts=True,
    messaging_system="rabbitmq",
    permissions="rabbitmqctl",
    reports_unrouted=True,
    place=lambda url: url.masked,
    trial="dead-lettering",
    answers=_ANSWERS,
    names_refused_logins=False,
    conflict="inequivalent arg",
    resolution=_resolution,
    no_tls="Is this the port for amqp://? RabbitMQ's defaults are 5671 for amqps:// and 5672 for amqp://.",
    login_step="Check the user, its password and its virtual host in LIGHTBUS_URL.",
    bindings="AMQP cannot list them",
    list_bindings=lambda vhost: ctl("list_bindings", vhost, "source_name", "routing_key", "destination_name"),
    list_consumers=lambda vhost: ctl("list_consumers", vhost),
    alarms="rabbitmq-diagnostics alarms",
    queue_health="rabbitmq-queues quorum_status NAME",
    queue_lengths="see `rabbitmqctl list_queues name messages policy`",
    no_bus="no app has run here yet",
    no_bus_step="Start a worker once, as a user with permission to configure it.",
    no_catalog_step="Run once, as a user with permission to configure it: lightbus catalog",
    version=_version,
    keeps_forged_deaths=_keeps_forged_deaths,
)
