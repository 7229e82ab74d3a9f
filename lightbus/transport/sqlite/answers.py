"""AMQP's errors, with RabbitMQ's messages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from amqp import exceptions as amqp_errors

from lightbus.transport.kombu_calls import amqp_error

Kind = Literal["queue", "exchange"]
Arguments = Mapping[str, Any]


def same(value: Any, other: Any) -> bool:
    """Whether two arguments are equal for AMQP."""
    return type(value) is type(other) and bool(value == other)  # 1 is not True, as in AMQP


def not_found(kind: Kind, name: str) -> Exception:
    return amqp_error(amqp_errors.NotFound, f"NOT_FOUND - no {kind} '{name}' in vhost '/'")


def access_refused(what: str) -> Exception:
    return amqp_error(amqp_errors.AccessRefused, f"ACCESS_REFUSED - {what}")


def precondition_failed(what: str) -> Exception:
    return amqp_error(amqp_errors.PreconditionFailed, f"PRECONDITION_FAILED - {what}")


def not_for_streams(method: str, name: str) -> Exception:
    return amqp_error(
        amqp_errors.AMQPNotImplementedError,
        f"NOT_IMPLEMENTED - {method} not supported by stream queues queue '{name}' in vhost '/'",
    )


def resource_locked(name: str) -> Exception:
    return amqp_error(
        amqp_errors.ResourceLocked,
        f"RESOURCE_LOCKED - cannot obtain exclusive access to locked queue '{name}' in vhost '/'. It could be "
        "originally declared on another connection or the exclusive property value does not match that of the "
        "original declaration.",
    )


_AMQP_TYPES = {str: "longstr", bool: "bool", int: "signedint", float: "double"}
_NONE = object()


def assert_same(kind: Kind, name: str, current: Arguments, received: Arguments) -> None:
    """
    Raises:
        amqp.exceptions.PreconditionFailed: a declaration differs from what exists.
    """
    for key in (*current, *(key for key in received if key not in current)):
        old, new = current.get(key, _NONE), received.get(key, _NONE)
        if old is not _NONE and new is not _NONE and same(old, new):
            continue
        bare = old is not _NONE and new is not _NONE
        raise precondition_failed(
            f"inequivalent arg '{key}' for {kind} '{name}' in vhost '/': "
            f"received {_spell(new, bare)} but current is {_spell(old, bare)}"
        )


def _spell(value: Any, bare: bool) -> str:
    if value is _NONE:
        return "none"
    word = str(value).lower() if isinstance(value, bool) else str(value)
    return f"'{word}'" if bare else f"the value '{word}' of type '{_AMQP_TYPES.get(type(value), 'table')}'"


_COUNTS = ("x-message-ttl", "x-max-length", "x-expires", "x-max-length-bytes")


def check_queue_arguments(name: str, arguments: Arguments) -> None:
    """
    Raises:
        amqp.exceptions.PreconditionFailed: an argument of a queue is not valid.
    """
    for key in _COUNTS:
        value = arguments.get(key, 0)
        if type(value) is not int or value < 0:
            raise precondition_failed(f"invalid arg '{key}' for queue '{name}' in vhost '/': {value!r}")
    if arguments.get("x-queue-type") == "stream":
        age = arguments.get("x-max-age")
        if age is not None and not re.fullmatch("[0-9]+[YMDhms]", str(age)):
            raise precondition_failed(f"invalid arg 'x-max-age' for queue '{name}' in vhost '/': {age!r}")
    if "x-dead-letter-routing-key" in arguments and "x-dead-letter-exchange" not in arguments:
        raise precondition_failed(
            f"invalid arg 'x-dead-letter-routing-key' for queue '{name}' in vhost '/': routing_key_but_no_dlx_defined"
        )
