"""Every exception that Lightbus raises. Each message names the thing, the cause and the next step."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Callable, Iterable, Iterator
from types import FrameType, TracebackType
from typing import Any, TypeVar


class LightbusError(Exception):
    """The base class of all Lightbus errors."""


def nearest(given: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The name that a misspelt one probably means: for "Did you mean ...?".

    Args:
        cutoff: how similar the names must be, from 0 to 1.
    """
    found = difflib.get_close_matches(given, [*known], n=1, cutoff=cutoff)
    return found[0] if found else None


# --- reading any exception, also one whose own methods raise -----------------------------------

_traceback_of: Callable[[BaseException], TracebackType | None] = BaseException.__dict__["__traceback__"].__get__
_name_of: Callable[[type], str] = type.__dict__["__name__"].__get__
_qualified_name_of: Callable[[type], str] = type.__dict__["__qualname__"].__get__
_module_of: Callable[[type], object] = type.__dict__["__module__"].__get__

FRAMES_SHOWN = 50


def message_of(error: BaseException) -> str:
    """The message of an error."""
    try:
        text = "".join((str(error),))  # a plain str, if it is of a subclass
    except BaseException as broken:  # noqa: BLE001  # whatever its `__str__` raises
        return f"(its __str__ raised {_name_of(type(broken))})"
    return text.encode(errors="backslashreplace").decode()


def summary(error: BaseException) -> str:
    """Its type and message, as the last line of a traceback."""
    return f"{_printable(_name_of(type(error)))}: {message_of(error)}"


def type_name(error: BaseException) -> str:
    """The name of its class, with the module unless that is `builtins`."""
    module = _module_of(type(error))
    name = _printable(_qualified_name_of(type(error)))
    return f"{_printable(module)}.{name}" if isinstance(module, str) and module != "builtins" else name


def _printable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


def has_traceback(error: BaseException) -> bool:
    return _traceback_of(error) is not None


def is_a(error: BaseException, types: type | tuple[type, ...]) -> bool:
    """`isinstance`, without reading `__class__`, which an exception may replace."""
    return issubclass(type(error), types)


_members_of: Callable[[BaseException], tuple[BaseException, ...]] = BaseExceptionGroup.__dict__["exceptions"].__get__


def members(error: BaseException) -> tuple[BaseException, ...]:
    """The exceptions in a group (mostly of a TaskGroup); empty if it is not a group."""
    return _members_of(error) if is_a(error, BaseExceptionGroup) else ()


def without_groups(error: BaseException) -> BaseException:
    """The only exception within groups of one; otherwise the group."""
    while len(inner := members(error)) == 1:
        error = inner[0]
    return error


def format_traceback(
    error: BaseException,
    *,
    hidden: Callable[[FrameType], bool] | None = None,
    only_with_frames: bool = False,
) -> str:
    """As Python prints it. If the exception breaks that: only its frames, and why.

    Args:
        hidden: leave out the frames for which this is true, also those of causes and of a group's members.
        only_with_frames: return an empty string if no frame is left.
    """
    try:
        formatted = traceback.TracebackException.from_exception(error)
        if hidden is not None and not _hide_frames(formatted, error, hidden) and only_with_frames:
            return ""
        return "".join(formatted.format())
    except BaseException as broken:  # noqa: BLE001  # its attributes, notes and loaders may raise anything
        return _frames_only(error, broken)


def _hide_frames(
    formatted: traceback.TracebackException, error: BaseException, hidden: Callable[[FrameType], bool]
) -> bool:
    """Whether any frame is left."""
    any_left = False
    chain: list[tuple[traceback.TracebackException | None, BaseException | None]] = [(formatted, error)]
    while chain:
        formatted_one, one = chain.pop()
        if formatted_one is None or one is None:
            continue
        frames = [frame for frame, _ in traceback.walk_tb(one.__traceback__)]
        formatted_one.stack[:] = [
            line for line, frame in zip(formatted_one.stack, frames, strict=False) if not hidden(frame)
        ]
        any_left = any_left or bool(formatted_one.stack)
        chain += [(formatted_one.__cause__, one.__cause__), (formatted_one.__context__, one.__context__)]
        if isinstance(one, BaseExceptionGroup):
            chain += zip(formatted_one.exceptions or (), one.exceptions, strict=False)
    return any_left


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
    """The `exc_info` for logging. If its handlers would fail on it: None, and the text to append to the message."""
    if error is None:
        return None, ""
    broken: list[BaseException] = []
    try:
        for line in traceback.TracebackException.from_exception(error).format():
            line.encode()  # a log file cannot encode a lone surrogate
    except BaseException as raised:  # noqa: BLE001  # as above
        broken.append(raised)
    return (None, "\n" + _frames_only(error, broken[0]).rstrip()) if broken else (error, "")


def is_from_deeper(error: BaseException) -> bool:
    """Whether Python code below the frame that catches the error raised it, and not a built-in function called there.

    Python runs a signal handler between two instructions of the main thread, and the handler may raise anything. A time
    limit often raises TimeoutError, which is an OSError. So `except OSError` around `sock.send(data)` may also catch an
    error that was raised after all data was sent.
    """
    trace = error.__traceback__
    return trace is not None and trace.tb_next is not None


_MACHINERY = frozenset({"lightbus", "anyio", "asyncio", "trio", "uvloop", "contextlib", "threading"})

E = TypeVar("E", bound=BaseException)


def without_machinery(error: E) -> E:
    """The error, with a traceback that begins at the first frame of the user's code, if it has one."""
    trace = _traceback_of(error)
    while trace is not None and is_machinery(trace.tb_frame):
        trace = trace.tb_next
    if trace is not None:
        BaseException.with_traceback(error, trace)
    return error


def tells_where(error: BaseException) -> bool:
    """Whether its traceback, `without_machinery`, adds information to its message.

    That of a Lightbus error does if it begins in the user's code. That of a Reject does not: it was raised on purpose.
    """
    if not is_a(error, LightbusError):
        return True
    trace = _traceback_of(error)
    return not is_a(error, Reject) and trace is not None and not is_machinery(trace.tb_frame)


def is_machinery(frame: FrameType) -> bool:
    """Whether the code belongs to Lightbus, or to the event loop and threads that run it."""
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


class InvalidDependency(InvalidHandler):
    """A function in `Depends(...)` that cannot be a dependency: of this handler, or of any."""


class InvalidMiddleware(DeclarationError, TypeError):
    """`@app.middleware` or `middleware=` was given what cannot wrap the app's handlers."""


class InvalidOption(DeclarationError, ValueError):
    """An option (of the app, a handler, a retry policy, a publish) has an invalid value, or is unknown."""


class IncludeError(DeclarationError, ImportError):
    """A module of `Lightbus(include=)` cannot be imported."""


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
    """A URL of a transport that lacks AMQP's exchanges, queues and bindings, or a broker that lacks a feature that
    Lightbus needs."""


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
        """So that a copy, or an unpickled error from another process, keeps its outcomes."""
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
    """A delivery's body or properties cannot be decoded as the type that the handler expects."""


class Reject(LightbusError):
    """Raise it in a handler: the event can never be handled, and is dead-lettered at once, with this reason."""


class HandlerTimeout(LightbusError, TimeoutError):
    """A handler ran longer than its `timeout`."""


class HandlerCancelled(LightbusError):
    """A handler cancelled its own task, or awaited something that was cancelled."""


class MiddlewareError(LightbusError, RuntimeError):
    """A middleware called `call_next` twice, did not await it, hid a cancellation, or returned an awaitable, generator
    or context manager. The event counts as failed. If an `on_publish` function returned one: nothing was sent."""


class DependencyError(LightbusError, RuntimeError):
    """A dependency did not yield exactly once, or returned what cannot be used. The event counts as failed."""


class NoState(LightbusError, RuntimeError):
    """There is no value of the app's `lifespan`: no worker runs in this process, or the lifespan yields none."""


class NoHandler(LightbusError, LookupError):
    """An event arrived that no handler of the app matches: during a rolling deployment, or because of a binding that is
    no longer needed."""


class UnverifiedOrigin(NoHandler):
    """The source of an event is not verified: it was moved between queues by hand, or a queue dead-lettered it to the
    bus."""


# --- the worker -------------------------------------------------------------------------------


class TargetError(LightbusError):
    """`MODULE:ATTR` is not a Lightbus app."""


class WorkerError(LightbusError):
    """The worker cannot continue."""


# --- testing ----------------------------------------------------------------------------------


class TestBusError(LightbusError):
    """A TestBus is used incorrectly."""

    __test__ = False  # else pytest collects it as a test where it is imported


class DrainTimeout(TestBusError, TimeoutError):
    """An event was still waiting or being handled when `TestBus.drain` timed out; the message names it."""


class UnexpectedDeadLetters(TestBusError, AssertionError):
    """A TestBus ended with dead letters that the test did not check."""
