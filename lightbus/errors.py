"""Every exception that Lightbus raises. Each message names the thing, the cause and the next step."""

from __future__ import annotations

import difflib
import functools
import inspect
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from types import FrameType, TracebackType
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class LightbusError(Exception):
    """The base class of all Lightbus errors."""


# --- a user's exception, which may break whatever is asked of it: nothing here does ------------

_traceback_of: Callable[[BaseException], TracebackType | None] = BaseException.__dict__["__traceback__"].__get__
_name_of: Callable[[type], str] = type.__dict__["__name__"].__get__
_qualified_name_of: Callable[[type], str] = type.__dict__["__qualname__"].__get__
_module_of: Callable[[type], object] = type.__dict__["__module__"].__get__

FRAMES_SHOWN = 50


def message_of(error: BaseException) -> str:
    """What an error says."""
    try:
        text = "".join((str(error),))  # a str, where it is of a subclass
    except BaseException as broken:  # noqa: BLE001  # whatever its `__str__` raises
        return f"(its __str__ raised {_name_of(type(broken))})"
    return text.encode(errors="backslashreplace").decode()


def summary(error: BaseException) -> str:
    """Its type and what it says, on a line where that is one line."""
    return f"{_printable(_name_of(type(error)))}: {message_of(error)}"


def type_name(error: BaseException) -> str:
    """With its module, unless it is Python's own."""
    module = _module_of(type(error))
    name = _printable(_qualified_name_of(type(error)))
    return f"{_printable(module)}.{name}" if isinstance(module, str) and module != "builtins" else name


def _printable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


def has_traceback(error: BaseException) -> bool:
    return _traceback_of(error) is not None


def is_a(error: BaseException, types: type | tuple[type, ...]) -> bool:
    """`isinstance`, without a look at `__class__`, which an exception may have replaced."""
    return issubclass(type(error), types)


_members_of: Callable[[BaseException], tuple[BaseException, ...]] = BaseExceptionGroup.__dict__["exceptions"].__get__


def members(error: BaseException) -> tuple[BaseException, ...]:
    """What a group (of a TaskGroup, mostly) holds; nothing where it is none."""
    return _members_of(error) if is_a(error, BaseExceptionGroup) else ()


def without_groups(error: BaseException) -> BaseException:
    """The one exception within groups of one; else the group."""
    while len(inner := members(error)) == 1:
        error = inner[0]
    return error


def format_traceback(
    error: BaseException, adapt: Callable[[traceback.TracebackException], bool] = lambda _: True
) -> str:
    """As Python prints it. Where the exception breaks that, its frames only, and why.

    Args:
        adapt: may change what is printed; False for nothing at all.
    """
    try:
        told = traceback.TracebackException.from_exception(error)
        return "".join(told.format()) if adapt(told) else ""
    except BaseException as broken:  # noqa: BLE001  # its attributes, notes, loaders ... raise whatever they like
        return _frames_only(error, broken)


def _frames_only(error: BaseException, broken: BaseException) -> str:
    trace = _traceback_of(error)
    frames = [(one.tb_frame.f_code, one.tb_lineno) for one in _walk(trace)]
    lines = ["Traceback (most recent call last):"]
    if len(frames) > FRAMES_SHOWN:
        lines.append(f"  ... {len(frames) - FRAMES_SHOWN:,} frames")
    lines += [f'  File "{code.co_filename}", line {line}, in {code.co_name}' for code, line in frames[-FRAMES_SHOWN:]]
    lines += [summary(error), f"(Only the frames: Python cannot print this exception: {summary(broken)})"]
    return _printable("\n".join(lines)) + "\n"


def _walk(trace: TracebackType | None) -> Iterator[TracebackType]:
    while trace is not None:
        yield trace
        trace = trace.tb_next


def for_log(error: BaseException | None) -> tuple[BaseException | None, str]:
    """What to give to logging as `exc_info`; and, where its handlers would break over that, what to append instead."""
    if error is None:
        return None, ""
    broken: list[BaseException] = []
    try:
        for line in traceback.TracebackException.from_exception(error).format():
            line.encode()  # no log file takes a lone surrogate
    except BaseException as raised:  # noqa: BLE001  # as above
        broken.append(raised)
    return (None, "\n" + _frames_only(error, broken[0]).rstrip()) if broken else (error, "")


def is_from_deeper(error: BaseException) -> bool:
    """Whether code below the frame that catches the error has raised it, and not a built-in function called there.

    Python runs a signal's handler between two instructions of the main thread, and the handler may raise anything: the
    usual time limit of a job raises TimeoutError, which is an OSError. So `except OSError` around `sock.send(data)` may
    also catch what was raised after all was sent.
    """
    trace = error.__traceback__
    return trace is not None and trace.tb_next is not None


_MACHINERY = frozenset({"lightbus", "anyio", "asyncio", "trio", "uvloop", "contextlib", "threading"})

E = TypeVar("E", bound=BaseException)


def without_machinery(error: E) -> E:
    """The error, with its traceback from the user's first frame on, where there is one: ours before it tell nothing."""
    trace = _traceback_of(error)
    while trace is not None and is_machinery(trace.tb_frame):
        trace = trace.tb_next
    if trace is not None:
        BaseException.with_traceback(error, trace)
    return error


def tells_where(error: BaseException) -> bool:
    """Whether its traceback, `without_machinery`, says more than its message: of our own errors where it begins with
    the user's code, but for a Reject, which was meant.
    """
    if not is_a(error, LightbusError):
        return True
    trace = _traceback_of(error)
    return not is_a(error, Reject) and trace is not None and not is_machinery(trace.tb_frame)


def is_machinery(frame: FrameType) -> bool:
    """Whether the code is Lightbus' own, or of what runs it."""
    name = frame.f_globals.get("__name__")
    return isinstance(name, str) and name.partition(".")[0] in _MACHINERY


# --- what an application declares -------------------------------------------------------------


class DeclarationError(LightbusError):
    """An invalid declaration, raised at import."""


class InvalidName(DeclarationError, ValueError):
    """An app, event, queue or pattern name that AMQP or Lightbus cannot use."""


class InvalidEvent(DeclarationError, TypeError):
    """A class that cannot be an event: one of its fields cannot be written as JSON and read back."""


class DuplicateEvent(DeclarationError, ValueError):
    """Two event classes of one app claim the same name."""


class InvalidHandler(DeclarationError, TypeError):
    """A function that cannot be a handler: its parameters cannot be filled."""


class InvalidOption(DeclarationError, ValueError):
    """An option (of the app, a handler, a retry policy, a publish) has an invalid value, or is unknown."""


_UNEXPECTED = re.compile(r"got an unexpected keyword argument '(.+?)'")


def explains_options(what: str, meant: Mapping[str, str]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make of Python's TypeError over an unknown option an InvalidOption that names the options there are.

    It adds a call: so for what declares, and not for what publishes.

    Args:
        what: the function, as a user calls it.
        meant: what to do instead of options that others have.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **options: P.kwargs) -> R:
            try:
                return function(*args, **options)
            except TypeError as error:
                found = None if is_from_deeper(error) else _UNEXPECTED.search(str(error))
                if found is None:
                    raise
                unknown = found[1]
            raise InvalidOption(_unknown_option(what, unknown, function, meant))

        return call

    return decorate


def _unknown_option(what: str, unknown: str, function: Callable[..., Any], meant: Mapping[str, str]) -> str:
    parameters = inspect.signature(function).parameters.values()
    options = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY or one.name == "delays"]
    near = difflib.get_close_matches(unknown, options, n=1)
    advice = meant.get(unknown) or (f"Did you mean {near[0]}=?" if near else "")
    return " ".join(filter(None, (f"{what} has no option {unknown!r}.", advice, f"It has: {'=, '.join(options)}=.")))


class UnknownEvent(LightbusError, LookupError):
    """An event was published that the app has not declared."""


class InvalidPayload(LightbusError, ValueError):
    """An event's values do not have the types that its class declares. Nothing was sent."""


class BodyTooLarge(InvalidPayload):
    """An event's body is larger than the broker accepts. Nothing was sent."""


class PublishInEventLoop(LightbusError, RuntimeError):
    """`publish_sync` was called where an event loop runs, which it would block."""


# --- the broker -------------------------------------------------------------------------------


class BrokerError(LightbusError):
    """The broker cannot be used."""


class InvalidURL(BrokerError, ValueError):
    """A broker URL that cannot be read."""


class UnsupportedBroker(BrokerError):
    """A URL of a transport that lacks AMQP's exchanges, queues and bindings, or a broker that cannot do what Lightbus
    asks of it."""


class BrokerUnreachable(BrokerError):
    """No connection: no server is listening, or the network does not reach it. A retry may help."""


class AccessRefused(BrokerError):
    """Wrong credentials, a virtual host that does not exist, or a missing permission."""


class LimitReached(BrokerError):
    """The broker allows no more connections, channels or queues, no message of that size, or this process no more open
    files. A retry may help."""


class TLSRefused(BrokerError):
    """The broker's certificate, or the client's, was not accepted."""


class TopologyConflict(BrokerError):
    """A queue or exchange exists with other arguments than the app declares, or is exclusive to another connection."""


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

    def __reduce__(self) -> tuple[Any, ...]:
        """Else a copy, or what comes out of another process, would be made of the message alone."""
        return type(self), (*self.args, self.outcomes), self.__dict__


class PublishTimeout(PublishError, TimeoutError):
    """No confirm within the timeout. The outcome is unknown: the event may still arrive."""


class PublishNacked(PublishError):
    """The broker refused the event (a queue is full, or has no quorum). It may have reached other queues."""


class PublishBlocked(PublishTimeout):
    """The broker blocked publishers (a memory or disk alarm) until the timeout. The event was not sent."""


class PublishUnreachable(PublishTimeout):
    """There was no connection to the broker until the timeout. The event was not sent."""


class PublishRefused(PublishError):
    """The broker refused this event because of its size or one of its properties. See also PublisherRefused."""


class PublisherRefused(PublishRefused):
    """The broker refuses all of this app's publishes: access, TLS, topology, file or URL. The cause is chained."""


class PublishWouldDeadlock(PublishError, RuntimeError):
    """`publish_sync` was called where waiting would stop the publisher itself: in the thread of a connection (a logging
    handler), or in a signal handler or finalizer that interrupted a publish of the same thread. Nothing was sent.
    """


class PublisherClosed(PublishError):
    """The app was closed, or the interpreter ended, before the confirm. The message has the details."""


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
    """An event arrived that no handler of the app matches: a rolling deployment, or a binding that is no longer
    needed."""


class UnverifiedOrigin(NoHandler):
    """A retried copy or a dead letter was moved between queues by hand, or an event came to the bus by a queue that
    dead-letters to it: its source is not verified."""


# --- the worker -------------------------------------------------------------------------------


class TargetError(LightbusError):
    """`MODULE:ATTR` is not a Lightbus app."""


class WorkerError(LightbusError):
    """The worker cannot continue."""


# --- testing ----------------------------------------------------------------------------------


class TestBusError(LightbusError):
    """A TestBus is used incorrectly."""

    __test__ = False  # pytest would take it for a test where it is imported


class DrainTimeout(TestBusError, TimeoutError):
    """An event was still waiting or being handled when `TestBus.drain` timed out; the message says which."""


class UnexpectedDeadLetters(TestBusError, AssertionError):
    """A TestBus ended with dead letters that the test did not check."""
