"""What a failed connection or a refused method means: an error that names the cause and the next step."""

from __future__ import annotations

import errno
import os
import re
import shlex
import socket
import ssl

import amqp.exceptions
import kombu.exceptions

from lightbus import errors
from lightbus.connection.address import Address

LOST = (OSError, amqp.exceptions.AMQPError, kombu.exceptions.OperationalError)
"""What a transport raises when a connection or channel is lost."""

CHANNEL_LOST = amqp.exceptions.ChannelError
"""What a transport raises when a channel is lost and its connection stays open."""

FATAL = (
    errors.AccessRefused,
    errors.TLSRefused,
    errors.TopologyConflict,
    errors.UnsupportedBroker,
    errors.InvalidURL,
    errors.BrokerFileError,
)
"""Errors that another attempt does not resolve."""


def describe(error: BaseException, address: Address, endpoint: str = "") -> errors.BrokerError:
    """An error that explains a transport's error: what failed, the cause, the next step.

    Args:
        endpoint: the IP address, if the host has several.
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
                f"No connection to {where}: {message_of(error) or type(error).__name__}. Is the broker running there?"
            )


def _describe_limit(error: BaseException, where: str) -> errors.LimitReached | None:
    """A limit of the broker or the system was reached. That may happen, and end, at any time."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return errors.LimitReached(f"No connection to {where}: {too_many_files(error)}")
    if not isinstance(error, amqp.exceptions.AMQPError) or not _LIMIT.search(message := message_of(error)):
        return None
    if re.search(r"(queue|exchange) limit", message):
        step, how = "Delete unused queues and exchanges, or raise it", "set_vhost_limits"
    else:
        step = "Close unused connections (`rabbitmqctl list_connections user peer_host client_properties`)"
        step, how = f"{step}, or raise it", "set_user_limits or set_vhost_limits"
    return errors.LimitReached(
        f"{where}: a limit is reached ({message}). {step} (rabbitmqctl {how}, or rabbitmq.conf)."
    )


# RabbitMQ's: "connection limit (1) is reached", "has reached the maximum allowed limit of (8)", "queue limit in ..."
_LIMIT = re.compile(r"limit\b.*\breached|reached\b.*\b(limit|channel_max)")


def _is_answer(error: amqp.exceptions.AMQPError) -> bool:
    """Whether the broker sent this error; else the client library raised it, about the data that it received."""
    known = (amqp.exceptions.AccessRefused, amqp.exceptions.NotAllowed, amqp.exceptions.NotFound)
    return isinstance(error, known) or re.match("[A-Z_]+ - ", message_of(error)) is not None


def _describe_answer(error: amqp.exceptions.AMQPError, where: str, address: Address) -> errors.BrokerError:
    """Explain a broker's error by its text: one code has many causes; 406 is used for conflicts, limits and bugs."""
    message = message_of(error)
    if "inequivalent arg" in message:
        return errors.TopologyConflict(
            f"It exists on the broker with other arguments than this app declares: {message}. "
            f"{resolution(message, address)}"
        )
    no_method = getattr(error, "method", None) is None  # the connection was closed in the middle of logging in
    if isinstance(error, amqp.exceptions.AccessRefused) and no_method:
        message = f"login refused: {message}"
    text = f"{type(error).code} {message}"
    kind, cause, step = next(
        (kind, cause, step) for pattern, kind, cause, step in _ANSWERS if re.search(pattern, text, re.IGNORECASE)
    )
    return kind(f"{where}: {cause} ({message}). {step}")


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
"""The first whose pattern matches the code and text: the pattern, the error, the cause, the next step."""


def too_many_files(error: BaseException) -> str:
    """Explain EMFILE or ENFILE."""
    whose = "this process" if getattr(error, "errno", None) == errno.EMFILE else "this machine"
    return (
        f"{whose} has too many open files (sockets count too). Find the leak (lsof -p {os.getpid()}), or raise the "
        "limit (ulimit -n)."
    )


def message_of(error: BaseException) -> str:
    text = getattr(error, "reply_text", None) or getattr(error, "strerror", None) or str(error)
    return str(text).strip().rstrip(".")


def resolution(message: str, address: Address) -> str:
    """How to resolve a conflict: something exists on the broker with other arguments.

    Args:
        message: the broker's ("inequivalent arg 'x' for queue 'q' in vhost 'v': received ...").
    """
    queue = re.search(r" for queue '(.+?)' in vhost ", message)
    if address.scheme == "memory":
        way = "restart this program: its in-memory broker is discarded"
    elif address.embedded:
        from lightbus.transport.sqlite.place import locate

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
    """A command to copy. It names the virtual host: another one may have a queue with the same name."""
    return shlex.join(["rabbitmqctl", command, *([] if vhost == "/" else ["--vhost", vhost]), *arguments])
