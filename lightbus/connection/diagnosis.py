"""What a failed connection or a refused method means: an error that names the cause and the next step."""

from __future__ import annotations

import errno
import os
import re
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
    match error:
        case OSError() if error.errno in (errno.EMFILE, errno.ENFILE):
            return errors.LimitReached(f"No connection to {where}: {too_many_files(error)}")
        case errors.BrokerError():
            return error
        case ssl.SSLError() if getattr(error, "reason", "") in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST"):
            return errors.TLSRefused(
                f"{where}: the server does not speak TLS ({error.reason}). {address.broker.no_tls}"
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


def _is_answer(error: amqp.exceptions.AMQPError) -> bool:
    """Whether the broker sent this error; else the client library raised it, about the data that it received."""
    known = (amqp.exceptions.AccessRefused, amqp.exceptions.NotAllowed, amqp.exceptions.NotFound)
    return isinstance(error, known) or re.match("[A-Z_]+ - ", message_of(error)) is not None


def _describe_answer(error: amqp.exceptions.AMQPError, where: str, address: Address) -> errors.BrokerError:
    """Explain a broker's error by its text: one code has many causes; 406 is used for conflicts, limits and bugs."""
    message, broker = message_of(error), address.broker
    if is_conflict(message, address):
        return errors.TopologyConflict(
            f"It exists on the broker with other arguments than this app declares: {message}. "
            f"{broker.resolution(message, address)}"
        )
    no_method = getattr(error, "method", None) is None  # the connection was closed in the middle of logging in
    if isinstance(error, amqp.exceptions.AccessRefused) and no_method and not broker.names_refused_logins:
        message = f"login refused: {message}"
    text = f"{type(error).code} {message}"
    answer = next(one for one in broker.answers if re.search(one.pattern, text, re.IGNORECASE))
    return answer.error(f"{where}: {answer.cause} ({message}). {answer.step}")


def is_conflict(message: str, address: Address) -> bool:
    """Whether something exists on the broker with other arguments, by the broker's text."""
    return re.search(address.broker.conflict, message) is not None


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
