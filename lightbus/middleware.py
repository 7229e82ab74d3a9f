"""Middleware: code around a handler, such as a transaction or log context. Composed once, when a worker starts.

Each layer calls the next one through `call_next`. The innermost layer decodes the event and calls the handler, so a
middleware also sees decoding errors, `Reject`, timeouts and cancellation.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Any, Final, Protocol

import attrs

from lightbus import errors
from lightbus.handler import Handler, check_call, is_async, is_context_manager, is_generator
from lightbus.message import Message, arrived
from lightbus.transport import Delivery
from lightbus.wire import codec


class Next(Protocol):
    """`await call_next()` runs the rest: further middleware, then the handler. It raises what they raise."""

    def __call__(self) -> Awaitable[None]: ...


class NextSync(Protocol):
    """`call_next()` runs the rest: further middleware, then the sync handler. It raises what they raise."""

    def __call__(self) -> None: ...


Handle = Callable[[Message, Next], Awaitable[object]]
HandleSync = Callable[[Message, NextSync], object]

SKIPPED: Final = object()
"""What a run returns whose handler was not called, since a middleware did not call `call_next`."""

_Layer = Callable[[Delivery, Message], Coroutine[Any, Any, Any]]
"""A middleware with what is inside of it, or the handler itself."""
_LayerSync = Callable[[Delivery, Message], Any]


@attrs.frozen
class Middleware:
    """One middleware, with a form for async handlers, for sync handlers, or both."""

    name: str
    handle: Handle | None
    handle_sync: HandleSync | None


def read_all(targets: Any, owner: str) -> list[Middleware]:
    """
    Raises:
        errors.InvalidMiddleware: not a list, or one of them is no middleware: see `read`.
    """
    if isinstance(targets, str | bytes) or not isinstance(targets, Iterable):
        shown = getattr(targets, "__qualname__", None) or repr(targets)
        raise errors.InvalidMiddleware(f"{owner}: middleware={shown} is not a list. Use a list: middleware=[{shown}].")
    return [read(one, owner) for one in targets]


def read(target: Any, owner: str) -> Middleware:
    """A middleware from what the user gives: a function (async or not), or an object with `handle` and `handle_sync`.
    A class is instantiated without arguments.

    Raises:
        errors.InvalidMiddleware: it is none of these; names it, and says how to write it.
    """
    name = getattr(target, "__qualname__", None) or type(target).__qualname__
    if isinstance(target, type):
        try:
            target = target()
        except TypeError as error:
            if errors.is_from_deeper(error):  # raised in its __init__
                raise
            raise errors.InvalidMiddleware(
                f"{owner}: middleware {name} cannot be instantiated without arguments ({error}). "
                f"Pass an instance: app.middleware({name}(...))."
            ) from error
    handle: Any = getattr(target, "handle", None)
    handle_sync: Any = getattr(target, "handle_sync", None)
    if handle is None and handle_sync is None:
        if not callable(target):
            raise errors.InvalidMiddleware(
                f"{owner}: {target!r} is not a middleware. Use an async function (message, call_next), or an object "
                "with the methods handle and handle_sync."
            )
        if is_async(target):
            handle = target
        else:
            handle_sync = target
    for form, function, wants_async in (("handle", handle, True), ("handle_sync", handle_sync, False)):
        if function is not None:
            _check(function, f"{owner}: middleware {name}", form, wants_async=wants_async)
    return Middleware(name, handle, handle_sync)


def _check(function: Any, owner: str, form: str, *, wants_async: bool) -> None:
    if not callable(function):
        raise errors.InvalidMiddleware(f"{owner}: its {form} is not a method.")
    if is_generator(function):
        raise errors.InvalidMiddleware(
            f"{owner} is a generator. Call call_next() where you would yield; a generator can be a dependency "
            "(Depends)."
        )
    if is_context_manager(function):
        raise errors.InvalidMiddleware(
            f"{owner} is decorated with @contextmanager or @asynccontextmanager, so nothing would enter what it "
            "returns. Remove the decorator, and call call_next() where you would yield."
        )
    if is_async(function) is not wants_async:
        raise errors.InvalidMiddleware(
            f"{owner}: {form} must be {'async def' if wants_async else 'def, not async def'}. handle wraps async "
            "handlers, handle_sync wraps sync handlers."
        )
    check_call(function, owner, ("message", "call_next"), errors.InvalidMiddleware)


def around(app: str, handler: Handler, stack: Sequence[Middleware]) -> Handler:
    """The handler within this middleware, the first one outermost.

    Raises:
        errors.InvalidMiddleware: one has no form for this kind of handler.
    """
    lacking = next((one for one in stack if (one.handle if handler.is_async else one.handle_sync) is None), None)
    if lacking is not None:
        raise errors.InvalidMiddleware(_what_is_missing(app, handler, lacking))
    return attrs.evolve(
        handler,
        function=_compose(handler, stack) if handler.is_async else _compose_sync(handler, stack),
        arguments=_delivery_and_message(app),
    )


def _what_is_missing(app: str, handler: Handler, middleware: Middleware) -> str:
    if handler.is_async:
        return (
            f"app {app!r}: middleware {middleware.name} is a sync function, and cannot wrap the async handler "
            f"{handler.name!r}. Make it `async def` (and await call_next()), or write a class with both forms: "
            "async def handle(self, message, call_next) and def handle_sync(self, message, call_next)."
        )
    return (
        f"app {app!r}: middleware {middleware.name} is async, and cannot wrap the sync handler {handler.name!r}, which "
        "runs in a thread. Make the handler `async def`, or write a class with both forms: "
        "async def handle(self, message, call_next) and def handle_sync(self, message, call_next)."
    )


def the_delivery(delivery: Delivery) -> tuple[Delivery]:
    """The arguments of a function that reads the delivery itself."""
    return (delivery,)


def _delivery_and_message(app: str) -> Callable[[Delivery], tuple[Delivery, Message]]:
    """The arguments of a layer."""
    read = codec.read_message
    return lambda delivery: (delivery, arrived(read, app, delivery))


def refuse_unfinished(returned: object, owner: str, *, may_be_entered: bool = False) -> None:
    """Refuse what a function returns instead of running: nothing awaits, iterates or enters it.

    Args:
        may_be_entered: accept a context manager, as many objects are one (a database session, a file).

    Raises:
        errors.MiddlewareError: says what it is, and what to write.
    """
    if inspect.isawaitable(returned):
        if inspect.iscoroutine(returned):
            returned.close()
        what, advice = "an awaitable, which is not awaited", "Await it in an `async def`, or call sync code"
    elif isinstance(returned, Generator | AsyncGenerator):
        what, advice = "a generator, which is not iterated", "Write the code into the function, without yield"
    elif isinstance(returned, AbstractContextManager | AbstractAsyncContextManager) and not may_be_entered:
        what, advice = "a context manager, which is not entered", "Enter it in the function, with a `with` statement"
    else:
        return
    raise errors.MiddlewareError(
        f"{owner} returned {what}. {advice}; if a decorator or a lambda hides that, use a function that does it."
    )


# --- async handlers ---------------------------------------------------------------------------


def _compose(handler: Handler, stack: Iterable[Middleware]) -> _Layer:
    arguments, function = handler.arguments, handler.function

    def innermost(delivery: Delivery, message: Message) -> Coroutine[Any, Any, Any]:
        coroutine: Coroutine[Any, Any, Any] = function(*arguments(delivery))
        return coroutine

    layer: _Layer = innermost
    for middleware in reversed([*stack]):
        layer = _layer(middleware, layer)
    return layer


def _layer(middleware: Middleware, inner: _Layer) -> _Layer:
    name, handle = middleware.name, middleware.handle
    assert handle is not None

    async def layer(delivery: Delivery, message: Message) -> Any:
        following = _Following(name, inner, delivery, message)
        try:
            returned = await handle(message, following.call)
        finally:
            if not following.ended:
                following.close()
        if not following.ended:
            following.check_ended()
            if returned is not None:
                refuse_unfinished(returned, f"middleware {name}")
        return following.result

    return layer


class _Following:
    """The rest of a run, as one middleware calls it: once, and with `await`."""

    __slots__ = ("_coroutine", "_delivery", "_error", "_inner", "_message", "_name", "ended", "result")

    def __init__(self, name: str, inner: _Layer, delivery: Delivery, message: Message) -> None:
        self._name = name
        self._inner = inner
        self._delivery = delivery
        self._message = message
        self._coroutine: Coroutine[Any, Any, None] | None = None
        self._error: BaseException | None = None
        self.ended = False
        """Whether the rest has returned, or has raised an `Exception`."""
        self.result: Any = SKIPPED
        """What the rest has returned, None if it has raised; `SKIPPED` where it was not called."""

    def call(self) -> Coroutine[Any, Any, None]:
        if self._coroutine is not None:
            raise _called_twice(self._name)
        self._coroutine = coroutine = self._run()
        return coroutine

    async def _run(self) -> None:
        try:
            self.result = await self._inner(self._delivery, self._message)
        except Exception:
            self.ended, self.result = True, None  # called, so not skipped if the middleware catches the error
            raise
        except BaseException as error:
            self._error = error
            raise
        self.ended = True

    def close(self) -> None:
        """Without a warning of Python's about a coroutine that was never awaited: `check_ended` says it better."""
        if self._coroutine is not None and inspect.getcoroutinestate(self._coroutine) == inspect.CORO_CREATED:
            self._coroutine.close()

    def check_ended(self) -> None:
        """
        Raises:
            errors.MiddlewareError: the middleware has called it and returned, but it did not end.
        """
        if self.ended or self._coroutine is None:
            return
        if self._error is not None:
            raise errors.MiddlewareError(
                f"middleware {self._name} returned normally although the handler was cancelled "
                f"({type(self._error).__name__}), so the event does not count as handled. Raise an error after a time "
                "limit of your own, and let other cancellation pass."
            ) from self._error
        raise errors.MiddlewareError(
            f"middleware {self._name} returned before the handler had ended. Write `await call_next()`."
        )


def _called_twice(name: str) -> errors.MiddlewareError:
    return errors.MiddlewareError(
        f"middleware {name} called call_next twice. An event's handler runs once per attempt: raise an error, and its "
        "retry schedule (retry=) runs it again."
    )


# --- sync handlers ----------------------------------------------------------------------------


def _compose_sync(handler: Handler, stack: Iterable[Middleware]) -> _LayerSync:
    arguments, function, name = handler.arguments, handler.function, handler.name

    def innermost(delivery: Delivery, message: Message) -> Any:
        returned = function(*arguments(delivery))
        if returned is not None and inspect.isawaitable(returned):
            if inspect.iscoroutine(returned):
                returned.close()
            raise errors.MiddlewareError(
                f"handler {name!r} is a sync function that returns an awaitable, which sync middleware cannot wrap. "
                "Make it `async def`; if a decorator hides that, give its wrapper `async def` too."
            )
        return returned

    layer: _LayerSync = innermost
    for middleware in reversed([*stack]):
        layer = _layer_sync(middleware, layer)
    return layer


def _layer_sync(middleware: Middleware, inner: _LayerSync) -> _LayerSync:
    name, handle = middleware.name, middleware.handle_sync
    assert handle is not None

    def layer(delivery: Delivery, message: Message) -> Any:
        following = _FollowingSync(name, inner, delivery, message)
        returned = handle(message, following.call)
        if returned is not None:
            refuse_unfinished(returned, f"middleware {name}", may_be_entered=following.result is not SKIPPED)
        return following.result

    return layer


class _FollowingSync:
    """The rest of a run, as one sync middleware calls it: once."""

    __slots__ = ("_called", "_delivery", "_inner", "_message", "_name", "result")

    def __init__(self, name: str, inner: _LayerSync, delivery: Delivery, message: Message) -> None:
        self._name = name
        self._inner = inner
        self._delivery = delivery
        self._message = message
        self._called = False
        self.result: Any = SKIPPED
        """What the rest has returned, None if it has raised; `SKIPPED` where it was not called."""

    def call(self) -> None:
        if self._called:
            raise _called_twice(self._name)
        self._called, self.result = True, None  # called, so not skipped if the middleware catches the error
        self.result = self._inner(self._delivery, self._message)
