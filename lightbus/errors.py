"""Every exception that Lightbus raises. Each message names the thing, the cause and the next step."""

from __future__ import annotations

from types import FrameType
from typing import Any, TypeVar


class LightbusError(Exception):
    """The base of everything that Lightbus raises on purpose."""


def words(error: BaseException) -> str:
    """What an error says. A user's exception may not even do that: its `__str__` raises."""
    try:
        return str(error)
    except Exception as broken:  # noqa: BLE001
        return f"(its __str__ raised {type(broken).__name__})"


_MACHINERY = frozenset({"lightbus", "anyio", "asyncio", "trio", "uvloop", "contextlib", "threading"})

E = TypeVar("E", bound=BaseException)


def without_machinery(error: E) -> E:
    """The error, with its traceback from the user's first frame on, where there is one: ours before it tell nothing."""
    trace = error.__traceback__
    while trace is not None and is_machinery(trace.tb_frame):
        trace = trace.tb_next
    return error if trace is None else error.with_traceback(trace)


def tells_where(error: BaseException) -> bool:
    """Whether its traceback, `without_machinery`, says more than its message: of our own errors where it begins with
    the user's code, but for a Reject, which was meant.
    """
    if not isinstance(error, LightbusError):
        return True
    trace = error.__traceback__
    return not isinstance(error, Reject) and trace is not None and not is_machinery(trace.tb_frame)


def is_machinery(frame: FrameType) -> bool:
    """Whether the code is Lightbus' own, or of what runs it."""
    return str(frame.f_globals.get("__name__")).partition(".")[0] in _MACHINERY


# --- what an application declares -------------------------------------------------------------


class DeclarationError(LightbusError):
    """An application's declaration cannot work: found at import, not in production."""


class InvalidName(DeclarationError, ValueError):
    """An app, event, queue or pattern name that AMQP or Lightbus cannot use."""


class InvalidEvent(DeclarationError, TypeError):
    """A class that cannot be an event: one of its fields cannot be written as JSON and read back."""


class DuplicateEvent(DeclarationError, ValueError):
    """Two event classes of one app claim the same name."""


class InvalidHandler(DeclarationError, TypeError):
    """A function that cannot be a handler: its parameters cannot be filled."""


class InvalidOption(DeclarationError, ValueError):
    """An option (of the app, a handler, a retry policy, a publish) has an invalid value."""


class UnknownEvent(LightbusError, LookupError):
    """An event was published that the app has not declared."""


class InvalidPayload(LightbusError, ValueError):
    """An event's values do not have the types that its class declares. Nothing was sent."""


class BodyTooLarge(InvalidPayload):
    """An event's body is larger than a broker takes. Nothing was sent."""


class PublishInEventLoop(LightbusError, RuntimeError):
    """`publish_sync` was called where an event loop runs, which it would block."""


# --- the broker -------------------------------------------------------------------------------


class BrokerError(LightbusError):
    """The broker cannot be used."""


class InvalidURL(BrokerError, ValueError):
    """A broker URL that cannot be read."""


class UnsupportedBroker(BrokerError):
    """A URL of a transport that lacks AMQP's exchanges, queues and bindings."""


class BrokerUnreachable(BrokerError):
    """No connection could be made: nothing listens, or the network does not lead there. Worth a retry."""


class AccessRefused(BrokerError):
    """Wrong credentials, a virtual host that is not there, or a permission that is missing."""


class TLSRefused(BrokerError):
    """The broker's certificate, or the client's, was not accepted."""


class TopologyConflict(BrokerError):
    """A queue or exchange exists with other arguments than the app declares."""


class TopologyMissing(BrokerError):
    """A queue or exchange that the operation needs does not exist."""


class BrokerFileError(BrokerError):
    """The embedded broker's file cannot be used: not writable, full, damaged or of another version."""


# --- publishing -------------------------------------------------------------------------------


class PublishError(LightbusError):
    """An event was not confirmed by the broker."""


class PublishManyError(PublishError):
    """Some events of a `publish_many` were not confirmed.

    `outcomes` has, in the order of the events, a Receipt or the PublishError for each.
    """

    def __init__(self, message: str, outcomes: list[Any]) -> None:
        super().__init__(message)
        self.outcomes = outcomes


class PublishTimeout(PublishError, TimeoutError):
    """No confirm within the timeout. The outcome is unknown: the event may yet arrive."""


class PublishNacked(PublishError):
    """The broker refused the event (a queue is full, or has no majority). It may have reached other queues."""


class PublishBlocked(PublishTimeout):
    """The broker blocked publishers (a memory or disk alarm) until the timeout. The event was not sent."""


class PublishUnreachable(PublishTimeout):
    """There was no connection to the broker until the timeout. The event was not sent."""


class PublishRefused(PublishError):
    """The broker refuses this app's publishes: access, topology or URL. The cause is chained."""


class PublisherClosed(PublishError):
    """The app was closed, or the interpreter ended, before the confirm. The message says what is known."""


# --- handling ---------------------------------------------------------------------------------


class DecodeError(LightbusError, ValueError):
    """A delivery's body or properties cannot be decoded as the type that the handler asks for."""


class Reject(LightbusError):
    """Raised by a handler: this event can never be handled; dead-letter it at once, with the reason."""


class HandlerTimeout(LightbusError, TimeoutError):
    """A handler ran longer than its `timeout`."""


class HandlerCancelled(LightbusError):
    """A handler cancelled the task that it ran in, or awaited something that was cancelled."""


class NoHandler(LightbusError, LookupError):
    """An event arrived that no handler of the app matches: a rolling deploy, or a leftover binding."""


# --- the worker -------------------------------------------------------------------------------


class TargetError(LightbusError):
    """`MODULE:ATTR` does not lead to a Lightbus app."""


class WorkerError(LightbusError):
    """The worker cannot continue."""


# --- testing ----------------------------------------------------------------------------------


class TestBusError(LightbusError):
    """A TestBus is used in a way that cannot work."""

    __test__ = False  # pytest would take it for a test where it is imported


class DrainTimeout(TestBusError, TimeoutError):
    """An event was still waiting or being handled when `TestBus.drain` timed out; the message says which."""


class UnexpectedDeadLetters(TestBusError, AssertionError):
    """A TestBus ended with dead letters that the test did not ask for."""
