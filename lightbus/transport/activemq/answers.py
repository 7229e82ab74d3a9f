"""Artemis' error conditions as errors of py-amqp, which the rest of Lightbus knows. Pure."""

from __future__ import annotations

from typing import Any

from amqp import exceptions as amqp_errors

NOT_FOUND = "amqp:not-found"
REFUSED = "amqp:unauthorized-access"
MISSING = (NOT_FOUND, "amqp:resource-deleted")
FORCED = "amqp:connection:forced"

PUBLISH = (60, 40)
"""AMQP 0-9-1's number of `basic.publish`: the error is about a publication."""

_OF_CHANNELS: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(MISSING, (amqp_errors.NotFound, "NOT_FOUND")),
    REFUSED: (amqp_errors.AccessRefused, "ACCESS_REFUSED"),
    "amqp:resource-locked": (amqp_errors.ResourceLocked, "RESOURCE_LOCKED"),
}
_OF_CONNECTIONS: dict[str, tuple[Any, str]] = {
    FORCED: (amqp_errors.ConnectionForced, "CONNECTION_FORCED"),
    REFUSED: (amqp_errors.AccessRefused, "ACCESS_REFUSED"),
    "amqp:not-allowed": (amqp_errors.NotAllowed, "NOT_ALLOWED"),
    "amqp:resource-limit-exceeded": (amqp_errors.ResourceError, "RESOURCE_ERROR"),
}


_NO_PERMISSION = "AMQ229032"
"""Artemis' code, which also comes with other conditions."""


def is_refused(condition: str, description: str) -> bool:
    """Whether a permission is missing."""
    return condition == REFUSED or _NO_PERMISSION in description


def channel_error(condition: str, description: str, method: tuple[int, int] | None = None) -> Exception:
    """The error of a link or a session. The connection stays open."""
    condition = REFUSED if is_refused(condition, description) else condition
    kind, word = _OF_CHANNELS.get(condition, (amqp_errors.PreconditionFailed, "PRECONDITION_FAILED"))
    return _error(kind, f"{word} - {description or condition}", method)


def connection_error(condition: str, description: str) -> Exception:
    """The error that ended a connection."""
    condition = REFUSED if is_refused(condition, description) else condition
    if _OTHER_SELECTOR in description:
        return precondition_failed(description)
    kind, word = _OF_CONNECTIONS.get(condition, (amqp_errors.InternalError, "INTERNAL_ERROR"))
    return _error(kind, f"{word} - {description or condition}")


_OTHER_SELECTOR = "filter mismatch"


def not_found(what: str, name: str, why: str = "") -> Exception:
    return _error(amqp_errors.NotFound, f"NOT_FOUND - no {what} '{name}'{f': {why}' if why else ''}")


def access_refused(why: str) -> Exception:
    return _error(amqp_errors.AccessRefused, f"ACCESS_REFUSED - {why}")


def precondition_failed(why: str) -> Exception:
    return _error(amqp_errors.PreconditionFailed, f"PRECONDITION_FAILED - {why}")


def not_implemented(why: str) -> Exception:
    return _error(amqp_errors.AMQPNotImplementedError, f"NOT_IMPLEMENTED - {why}")


def closed(what: str) -> Exception:
    return _error(amqp_errors.RecoverableConnectionError, f"{what} already closed")


def _error(kind: Any, text: str, method: tuple[int, int] | None = None) -> Exception:
    error: Exception = kind(text, method, None, kind.code or None)
    return error
