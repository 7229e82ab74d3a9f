"""Handlers: which functions can be one, and how their parameters are filled."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Optional, TypedDict, cast

import anyio
import attrs
import msgspec
import pytest

from lightbus import Lightbus, Message, Retry, errors
from lightbus.handler import Handler
from lightbus.transport import Channel, Delivery

if TYPE_CHECKING:
    from pathlib import Path as OnlyForCheckers

NO_MESSAGE = cast(Message, None)
BODY = b'{"user_id": 1, "email": "a@b.c", "more": true}'


@attrs.frozen
class NewUser:
    user_id: int
    email: str


@dataclasses.dataclass
class DataclassUser:
    user_id: int


class StructUser(msgspec.Struct):
    user_id: int


class DictUser(TypedDict):
    user_id: int


def delivery(body: bytes = BODY) -> Delivery:
    return Delivery(cast(Channel, None), 1, False, "auth", "user.registered", {"message_id": "m-1"}, body)


@pytest.fixture
def app() -> Lightbus:
    return Lightbus("billing")


def registered(app: Lightbus) -> Handler:
    (handler,) = app.handlers.values()
    return handler


def call(app: Lightbus, body: bytes = BODY) -> Any:
    """Fill the one handler's parameters from a delivery and run it."""
    handler = registered(app)

    async def run() -> Any:
        returned = handler.function(*handler.arguments(delivery(body)))
        return await returned if inspect.isawaitable(returned) else returned

    return anyio.run(run)


# --- filling parameters


@pytest.mark.parametrize(
    ("wanted", "got"),
    [
        (NewUser, NewUser(1, "a@b.c")),
        (DataclassUser, DataclassUser(1)),
        (StructUser, StructUser(1)),
        (DictUser, {"user_id": 1}),
        (dict, {"user_id": 1, "email": "a@b.c", "more": True}),
        (dict[str, Any], {"user_id": 1, "email": "a@b.c", "more": True}),
        (dict[str, object], {"user_id": 1, "email": "a@b.c", "more": True}),
        (Mapping[str, Any], {"user_id": 1, "email": "a@b.c", "more": True}),
        (Any, {"user_id": 1, "email": "a@b.c", "more": True}),
        (NewUser | None, NewUser(1, "a@b.c")),
    ],
    ids=str,
)
def test_the_payload_is_decoded_as_its_annotation(app: Lightbus, wanted: Any, got: object) -> None:
    async def note(user):  # type: ignore[no-untyped-def]
        return user

    note.__annotations__["user"] = wanted
    app.on("user.registered")(note)
    assert call(app) == got


def test_without_an_annotation_the_payload_is_a_plain_dict(app: Lightbus) -> None:
    @app.on("user.registered")
    async def note(user):  # type: ignore[no-untyped-def]
        return user

    assert call(app) == {"user_id": 1, "email": "a@b.c", "more": True}


def test_the_envelope_is_passed_at_any_position(app: Lightbus) -> None:
    @app.on("user.registered")
    async def note(message: Message, user: NewUser, again: Message) -> tuple[str, int, str]:
        return message.id, user.user_id, again.source

    assert call(app) == ("m-1", 1, "auth")


def test_a_handler_may_take_the_envelope_alone_or_nothing_at_all(app: Lightbus) -> None:
    @app.on("user.registered")
    async def nothing() -> str:
        return "called"

    assert call(app) == "called"

    @Lightbus("other").on("user.registered")
    async def envelope(message: Message) -> None: ...


def test_parameters_with_defaults_keep_them(app: Lightbus) -> None:
    @app.on("user.registered")
    async def note(user: NewUser, limit: int = 5, *, more: str = "x") -> tuple[int, int, str]:
        return user.user_id, limit, more

    assert call(app) == (1, 5, "x")


def test_an_envelope_parameter_with_a_default_is_filled(app: Lightbus) -> None:
    @app.on("user.registered")
    async def note(user: NewUser, message: Message = NO_MESSAGE) -> str:
        return message.id

    assert call(app) == "m-1"


def test_string_annotations_may_name_local_classes(app: Lightbus) -> None:
    @attrs.frozen
    class Local:
        user_id: int

    @app.on("user.registered")
    async def note(user: Local) -> Local:
        assert note.__annotations__["user"] == "Local"
        return user

    assert call(app) == Local(1)


def test_a_wrong_payload_is_a_decode_error_with_the_path(app: Lightbus) -> None:
    @app.on("user.registered")
    async def note(user: NewUser) -> None: ...

    with pytest.raises(errors.DecodeError, match=r"NewUser.*\$\.user_id"):
        call(app, b'{"user_id": "1", "email": ""}')
    with pytest.raises(errors.DecodeError, match="NewUser"):
        call(app, b"[]")


# --- valid functions


class Service:
    def __init__(self) -> None:
        self.received: list[int] = []

    async def method(self, user: NewUser) -> int:
        self.received.append(user.user_id)
        return user.user_id

    def plain_method(self, user: NewUser) -> int:
        return user.user_id

    @staticmethod
    async def static(user: NewUser) -> int:
        return user.user_id

    @classmethod
    async def of_class(cls, user: NewUser) -> int:
        return user.user_id


class AsyncObject:
    async def __call__(self, user: NewUser) -> int:
        return user.user_id


class PlainObject:
    def __call__(self, user: NewUser) -> int:
        return user.user_id


async def with_more(prefix: str, user: NewUser, message: Message, *, suffix: str) -> int:
    assert (prefix, suffix, message.id) == ("a", "z", "m-1")
    return user.user_id


def plain(user: NewUser) -> int:
    return user.user_id


def timed(function: Callable[..., Awaitable[int]]) -> Callable[..., Awaitable[int]]:
    @functools.wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> int:
        return await function(*args, **kwargs)

    return wrapper


def logged(function: Callable[..., Any]) -> Callable[..., Any]:
    """Like many decorators: a sync wrapper, also around an async function."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


class DecoratedByObject:
    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self.function = function

    async def __call__(self, *args: Any) -> Any:
        return await self.function(*args)


async def handle(user: NewUser) -> int:
    return user.user_id


@pytest.mark.parametrize(
    "function",
    [
        handle,
        plain,
        Service().method,
        Service().plain_method,
        Service.static,
        Service.of_class,
        AsyncObject(),
        PlainObject(),
        functools.partial(with_more, "a", suffix="z"),
        functools.partial(functools.partial(with_more, "a"), suffix="z"),
        functools.partial(plain),
        functools.partial(AsyncObject()),
        timed(handle),
        timed(timed(handle)),
        logged(handle),
        logged(plain),
        functools.partial(timed(handle)),
        DecoratedByObject(handle),
    ],
    ids=lambda function: getattr(function, "__qualname__", type(function).__name__),
)
def test_anything_that_can_be_called_with_the_payload_is_a_handler(app: Lightbus, function: Callable[..., Any]) -> None:
    assert app.on("user.registered")(function) is function
    assert call(app) == 1


@pytest.mark.parametrize(
    ("function", "is_async"),
    [
        (handle, True),
        (AsyncObject(), True),
        (functools.partial(AsyncObject()), True),
        (DecoratedByObject(handle), True),
        (plain, False),
        (PlainObject(), False),
        (functools.partial(plain), False),
        (timed(handle), True),
        (logged(handle), False),
    ],
    ids=lambda value: getattr(value, "__qualname__", type(value).__name__),
)
def test_sync_callables_run_in_a_thread(app: Lightbus, function: Callable[..., Any], is_async: bool) -> None:
    app.on("user.registered")(function)
    assert registered(app).is_async is is_async


async def stream(user: NewUser) -> AsyncIterator[int]:
    yield 1


def generate(user: NewUser) -> Iterator[int]:
    yield 1


class StreamObject:
    async def __call__(self, user: NewUser) -> AsyncIterator[int]:
        yield 1


@pytest.mark.parametrize("function", [stream, generate, StreamObject(), functools.partial(stream)])
def test_a_generator_is_refused(app: Lightbus, function: Callable[..., Any]) -> None:
    with pytest.raises(errors.InvalidHandler, match="generator"):
        app.on("user.registered")(function)


@pytest.mark.parametrize("thing", [5, "note", None, NewUser], ids=repr)
def test_values_that_are_not_functions_are_refused(app: Lightbus, thing: Any) -> None:
    with pytest.raises(errors.InvalidHandler, match="not a function"):
        app.on("user.registered")(thing)


# --- invalid functions


async def two_payloads(user: NewUser, other: dict[str, Any]) -> None: ...
async def star(*args: Any) -> None: ...
async def stars(user: NewUser, **kwargs: Any) -> None: ...
async def keyword(user: NewUser, *, db: object) -> None: ...
async def scalar(user_id: int) -> None: ...
async def maybe_scalar(user_id: int | None) -> None: ...
async def text(body: str) -> None: ...
async def raw(body: bytes) -> None: ...
async def opaque(user: inspect.Signature) -> None: ...
async def opaque_inside(user: dict[str, inspect.Signature]) -> None: ...
async def for_checkers(user: OnlyForCheckers) -> None: ...
async def maybe_message(user: NewUser, message: Message | None) -> None: ...
async def optional_message(message: Optional[Message]) -> None: ...  # noqa: UP045  # the old spelling
async def annotated_message(message: Annotated[Message, "here"]) -> None: ...
async def late_message(user: NewUser, db: int = 0, message: Message = NO_MESSAGE) -> None: ...
async def alike(user: NewUser | DataclassUser) -> None: ...


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (two_payloads, "'other' cannot be filled: 'user' is already the payload"),
        (star, r"'\*args' cannot be filled"),
        (stars, r"'\*\*kwargs' cannot be filled"),
        (keyword, "keyword-only parameter 'db'"),
        (scalar, "'user_id: int' is a single value"),
        (maybe_scalar, r"'user_id: int \| None' is a single value"),
        (text, "'body: str' is a single value"),
        (raw, "'body: bytes' is a single value"),
        (opaque, "'user: Signature' cannot be filled"),
        (opaque_inside, r"'user: dict\[str, inspect.Signature\]' cannot be filled"),
        (for_checkers, "OnlyForCheckers.*Import or define"),
        (maybe_message, "the envelope as `message: Message`"),
        (optional_message, "declare it as 'message: Message'"),
        (annotated_message, "declare it as 'message: Message'"),
        (late_message, "'message' comes after 'db'"),
        (alike, "'user: "),
        (min, "parameters cannot be inspected"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_parameter_that_cannot_be_filled_is_refused_at_registration(
    app: Lightbus, function: Callable[..., Any], words: str
) -> None:
    with pytest.raises(errors.InvalidHandler, match=words) as caught:
        app.on("user.registered")(function)
    assert f"handler '{function.__name__}' of app 'billing'" in str(caught.value)
    assert app.handlers == {}, "what was refused is not registered"


# --- patterns


def test_a_handler_matches_its_patterns_and_its_source(app: Lightbus) -> None:
    @app.on("user.*", "invoice.#", source="auth")
    async def note(user: NewUser) -> None: ...

    handler = registered(app)
    assert handler.patterns == ("user.*", "invoice.#")
    assert handler.matches("auth", "user.registered")
    assert handler.matches("auth", "invoice")
    assert not handler.matches("auth", "user.a.b")
    assert not handler.matches("shop", "user.registered")


def test_an_event_class_is_the_same_as_its_name(app: Lightbus) -> None:
    @app.event("user.moved")
    class UserMoved:
        id: int

    @app.on(UserMoved, "user.moved", "user.left")
    async def note(user: dict[str, Any]) -> None: ...

    assert registered(app).patterns == ("user.moved", "user.left")


def test_on_a_class_that_is_not_an_event_is_an_error(app: Lightbus) -> None:
    with pytest.raises(errors.InvalidHandler, match="NewUser is not an event class"):
        app.on(NewUser)(handle)


def test_options_default_to_those_of_the_app(app: Lightbus) -> None:
    app.on("user.registered")(handle)
    handler = registered(app)
    assert (handler.retry, handler.timeout, handler.concurrency, handler.queue) == (Retry(), 60.0, None, "main")
    assert (handler.name, handler.function) == ("handle", handle)


@pytest.mark.parametrize(
    "given", [{"queue": "A b"}, {"source": "A b"}, {"retry": 3}, {"timeout": "soon"}, {"concurrency": 0}]
)
def test_an_option_is_checked_before_the_signature(given: dict[str, Any]) -> None:
    def wrong(first: dict[str, Any], second: dict[str, Any]) -> None: ...

    app = Lightbus("billing")
    with pytest.raises((errors.InvalidName, errors.InvalidOption)):
        app.on("order.placed", **given)(wrong)
    with pytest.raises(errors.InvalidHandler, match="'second' cannot be filled"):
        app.on("order.placed")(wrong)
