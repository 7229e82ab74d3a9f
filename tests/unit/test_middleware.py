"""What `@app.middleware`, `@app.on_publish` and `app.observe` accept, and what the errors say."""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import pickle
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime
from typing import Annotated, Any, cast

import anyio
import attrs
import pytest

from lightbus import Depends, Lightbus, Message, Next, NextSync, Outcome, errors
from lightbus import app as apps
from lightbus.handler import Handler
from lightbus.message import arrived, origin_of
from lightbus.transport import Channel, Delivery
from lightbus.wire import codec


@pytest.fixture
def app() -> Lightbus:
    return Lightbus("billing", url="memory://")


async def an_async_one(message: Message, call_next: Next) -> None:
    await call_next()


def a_sync_one(message: Message, call_next: NextSync) -> None:
    call_next()


async def a_generator(message: Message, call_next: Next) -> AsyncIterator[None]:
    yield


def a_sync_generator(message: Message, call_next: NextSync) -> Iterator[None]:
    yield


async def without_call_next(message: Message) -> None: ...


class NeedsArguments:
    def __init__(self, tenant: str) -> None: ...

    async def handle(self, message: Message, call_next: Next) -> None: ...


class WrongForm:
    def handle(self, message: Message, call_next: Next) -> None: ...


class WrongSyncForm:
    async def handle_sync(self, message: Message, call_next: Next) -> None: ...


class NotMethods:
    handle = 7


class Iterates:
    def __call__(self, message: Message, call_next: NextSync) -> Iterator[None]:
        yield


@contextlib.contextmanager
def a_context_manager(message: Message, call_next: NextSync) -> Iterator[None]:
    yield


@contextlib.asynccontextmanager
async def an_async_context_manager(message: Message, call_next: Next) -> AsyncIterator[None]:
    yield


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (7, "7 is not a middleware. Use an async function (message, call_next)"),
        (NeedsArguments, "Pass an instance: app.middleware(NeedsArguments(...))."),
        (a_generator, "is a generator. Call call_next() where you would yield"),
        (a_sync_generator, "is a generator. Call call_next() where you would yield"),
        (Iterates(), "is a generator. Call call_next() where you would yield"),
        (functools.partial(a_sync_generator), "is a generator. Call call_next() where you would yield"),
        (a_context_manager, "is decorated with @contextmanager or @asynccontextmanager"),
        (an_async_context_manager, "is decorated with @contextmanager or @asynccontextmanager"),
        (without_call_next, "is called with two arguments, (message, call_next), which it does not take"),
        (lambda: None, "is called with two arguments, (message, call_next), which it does not take"),
        (WrongForm(), "handle must be async def"),
        (WrongSyncForm(), "handle_sync must be def, not async def"),
        (NotMethods(), "its handle is not a method"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else getattr(value, "__name__", type(value).__name__),
)
def test_what_cannot_be_a_middleware_is_refused(target: Any, expected: str, app: Lightbus) -> None:
    with pytest.raises(errors.InvalidMiddleware) as raised:
        app.middleware(target)
    assert expected in str(raised.value)
    assert str(raised.value).startswith("app 'billing': ")


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (
            lambda message, call_next: an_async_one(message, call_next),
            "returned an awaitable, which is not awaited. Await",
        ),
        (
            lambda message, call_next: a_sync_generator(message, call_next),
            "returned a generator, which is not iterated",
        ),
        (lambda message, call_next: a_generator(message, call_next), "returned a generator, which is not iterated"),
        (lambda message, call_next: a_context_manager(message, call_next), "returned a context manager, which is not"),
    ],
    ids=["awaitable", "generator", "async-generator", "context-manager"],
)
def test_what_a_middleware_returns_instead_of_running_is_an_error(target: Any, expected: str, app: Lightbus) -> None:
    app.middleware(target)
    app.on("order.placed", name="plain")(lambda: None)
    (config,) = app.subscriptions()
    with pytest.raises(errors.MiddlewareError) as raised:
        run(config.handlers["plain"])
    assert str(raised.value).startswith("middleware ")
    assert expected in str(raised.value)

    async def around_async(message: Message, call_next: Next) -> Any:
        return target(message, call_next)

    other = Lightbus("shop", url="memory://")
    other.middleware(around_async)

    @other.on("order.placed")
    async def handle() -> None: ...

    (config,) = other.subscriptions()
    with pytest.raises(errors.MiddlewareError, match=expected):
        anyio.run(run, config.handlers["handle"])


def test_what_a_middleware_returns_after_call_next_is_ignored(app: Lightbus) -> None:
    @app.middleware
    def opened(message: Message, call_next: NextSync) -> Any:
        call_next()
        return contextlib.nullcontext()  # as many objects, such as a session, are context managers

    calls: list[int] = []
    app.on("order.placed", name="plain")(lambda: calls.append(1))
    (config,) = app.subscriptions()
    run(config.handlers["plain"])
    assert calls == [1]


def test_a_decorator_that_contextlib_makes_is_no_context_manager(app: Lightbus) -> None:
    @contextlib.contextmanager
    def transaction() -> Iterator[None]:
        yield

    @app.middleware
    @transaction()
    def in_transaction(message: Message, call_next: NextSync) -> None:
        call_next()

    @transaction()
    def connection() -> int:
        return 1

    @app.on("order.placed")
    def handle(number: Annotated[int, Depends(connection)]) -> None: ...


def run(handler: Handler) -> Any:
    return handler.function(*handler.arguments(delivered(dict)))


def test_what_on_publish_returns_is_not_awaited_and_so_an_error(app: Lightbus) -> None:
    @app.event("order.placed")
    class Order:
        number: int

    async def add(event: object, headers: dict[str, Any]) -> None: ...

    app.on_publish(lambda event, headers: add(event, headers))  # type: ignore[arg-type,return-value]
    with pytest.raises(errors.MiddlewareError, match=r"event not sent: .*lambda.* returned an awaitable"):
        app.publish_sync(Order(number=1))


def test_a_decorated_middleware_stays_what_it_is(app: Lightbus) -> None:
    assert app.middleware(an_async_one) is an_async_one
    assert app.on_publish(set_tenant) is set_tenant
    assert app.observe(ignore) is ignore


def set_tenant(event: object, headers: dict[str, Any]) -> None:
    headers["tenant"] = "acme"


def ignore(outcome: Outcome) -> None: ...


def test_a_sync_middleware_cannot_wrap_an_async_handler(app: Lightbus) -> None:
    app.middleware(a_sync_one)

    @app.on("order.placed")
    async def handle() -> None: ...

    with pytest.raises(errors.InvalidMiddleware) as raised:
        app.subscriptions()
    assert str(raised.value) == (
        "app 'billing': middleware a_sync_one is a sync function, and cannot wrap the async handler 'handle'. Make it "
        "`async def` (and await call_next()), or write a class with both forms: async def handle(self, message, "
        "call_next) and def handle_sync(self, message, call_next)."
    )


def test_an_error_in_a_middlewares_constructor_is_the_users(app: Lightbus) -> None:
    class Counts:
        def __init__(self) -> None:
            self.count = 1 + cast(int, "1")

    with pytest.raises(TypeError, match="unsupported operand") as raised:
        app.middleware(Counts)
    assert not isinstance(raised.value, errors.InvalidMiddleware)


def test_a_handlers_own_middleware_is_checked_where_it_is_declared(app: Lightbus) -> None:
    with pytest.raises(errors.InvalidMiddleware, match="7 is not a middleware"):
        app.on("order.placed", middleware=[7])(lambda: None)
    assert app.handlers == {}


@pytest.mark.parametrize(
    ("given", "shown"), [(a_sync_one, "a_sync_one"), ("log", "'log'"), (b"log", "b'log'"), (None, "None"), (7, "7")]
)
def test_a_handlers_own_middleware_is_a_list(given: Any, shown: str, app: Lightbus) -> None:
    with pytest.raises(errors.InvalidMiddleware) as raised:
        app.on("order.placed", middleware=given)(lambda: None)
    assert str(raised.value) == f"app 'billing': middleware={shown} is not a list. Use a list: middleware=[{shown}]."


def test_handlers_without_middleware_stay_as_they_are(app: Lightbus) -> None:
    app.on("order.placed", name="bare")(lambda: None)
    app.on("order.placed", name="wrapped", middleware=[a_sync_one])(lambda: None)
    (config,) = app.subscriptions()
    assert config.handlers["bare"] is app.handlers["bare"]
    assert config.handlers["wrapped"] is not app.handlers["wrapped"]


@pytest.mark.parametrize(
    "function",
    [7, an_async_one, lambda: None, lambda event: None, a_sync_generator, a_context_manager],
    ids=["number", "async", "none", "one", "generator", "context-manager"],
)
def test_on_publish_takes_a_sync_function_of_two_arguments(function: Any, app: Lightbus) -> None:
    with pytest.raises(errors.InvalidMiddleware, match=r"\(event, headers\)"):
        app.on_publish(function)


def test_a_header_of_on_publish_is_checked_as_any_other(app: Lightbus) -> None:
    @app.event("order.placed")
    class Order:
        number: int

    @app.on_publish
    def wrong(event: object, headers: dict[str, Any]) -> None:
        headers["x-tenant"] = "acme"

    with pytest.raises(errors.InvalidPayload, match="the header 'x-tenant' begins with"):
        app.publish_sync(Order(number=1))


def test_on_publish_is_not_called_with_what_is_no_event(app: Lightbus) -> None:
    seen: list[object] = []
    app.on_publish(lambda event, headers: seen.append(event))
    with pytest.raises(errors.UnknownEvent):
        app.publish_sync("paid")
    assert seen == []


def test_observe_refuses_an_async_function(app: Lightbus) -> None:
    async def note(outcome: Outcome) -> None: ...

    with pytest.raises(errors.InvalidOption, match="takes a sync function, not an async one"):
        app.observe(note)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (None, r"observe\(\) takes a sync function \(outcome\), not None"),
        (3, r"observe\(\) takes a sync function \(outcome\), not 3"),
        (lambda outcome: (yield), r"observe\(\) takes a sync function \(outcome\), not <function"),
        (lambda: None, r"is called with one argument, \(outcome\), which it does not take \(too many positional"),
    ],
    ids=["none", "number", "generator", "no-arguments"],
)
def test_observe_takes_a_sync_function_of_one_argument(function: Any, expected: str, app: Lightbus) -> None:
    with pytest.raises(errors.InvalidOption, match=expected):
        app.observe(function)
    assert app.observer is None


def test_observe_takes_any_callable(app: Lightbus) -> None:
    for function in ([].append, collections.deque[Outcome]().append, functools.partial(ignore), print):
        assert app.observe(cast(Any, function)) is function


def test_observe_must_come_before_the_first_publish() -> None:
    with Lightbus("billing", url="memory://middleware-first-publish") as app:

        @app.event("order.placed")
        class Order:
            number: int

        app.publish_sync(Order(number=1))
        with pytest.raises(errors.InvalidOption, match="must be called before the app's first publish"):
            app.observe(ignore)


# --- a message whose fields are read when they are needed -----------------------------------------


def delivered(properties: Callable[[], dict[str, Any]]) -> Delivery:
    return Delivery(cast(Channel, None), 1, True, "shop", "order.placed", properties, b"{}")


def test_a_message_reads_its_properties_when_a_field_is_asked_for() -> None:
    reads: list[int] = []

    def properties() -> dict[str, Any]:
        reads.append(1)
        return {"message_id": "7", "headers": {"tenant": "acme"}, "timestamp": 0}

    message = codec.message_of("billing", delivered(properties))
    assert isinstance(message, Message)
    assert reads == []
    assert (message.id, message.headers, message.redelivered) == ("7", {"tenant": "acme"}, True)
    assert len(reads) == 1


def test_such_a_message_is_equal_to_one_that_was_read_at_once() -> None:
    delivery = delivered(lambda: {"message_id": "7", "headers": {}, "timestamp": 0})
    message = codec.message_of("billing", delivery)
    whole = codec.read_message("billing", delivery)
    assert message == whole
    assert whole == codec.message_of("billing", delivery)
    assert repr(codec.message_of("billing", delivery)) == repr(whole)
    assert pickle.loads(pickle.dumps(codec.message_of("billing", delivery))) == whole  # noqa: S301
    assert copy.deepcopy(codec.message_of("billing", delivery)) == whole
    assert attrs.evolve(codec.message_of("billing", delivery), attempt=2) == attrs.evolve(whole, attempt=2)
    assert message != "7"
    with pytest.raises(AttributeError, match="'Message' object has no attribute 'payload'"):
        _ = codec.message_of("billing", delivery).payload  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        message.id = "8"  # type: ignore[misc]
    with pytest.raises(TypeError):
        hash(message)


@pytest.mark.parametrize("properties", [{}, {"timestamp": 2**62}, {"timestamp": "today"}])
def test_a_message_without_a_time_has_one_to_the_second_that_stays(
    properties: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    delivery = delivered(lambda: properties)
    monkeypatch.setattr(codec.time, "time", lambda: 1_700_000_000.9)
    first = codec.message_of("billing", delivery).time
    monkeypatch.setattr(codec.time, "time", lambda: 1_700_000_009.9)
    assert codec.message_of("billing", delivery).time == first == datetime.fromtimestamp(1_700_000_000, UTC)


# --- hooks for telemetry ----------------------------------------------------------------------


def test_functions_of_on_create_get_each_new_app(monkeypatch: pytest.MonkeyPatch) -> None:
    created: list[str] = []
    monkeypatch.setattr(apps, "on_create", [lambda app: created.append(f"{app!r}")])
    first = Lightbus("billing")
    Lightbus("stats")
    assert created == ["<Lightbus 'billing': 0 events, 0 handlers>", "<Lightbus 'stats': 0 events, 0 handlers>"]
    assert first in apps.existing_apps()


def test_an_app_that_nobody_holds_is_not_kept_by_the_list_of_existing_apps() -> None:
    def names() -> list[str]:
        return [app.name for app in apps.existing_apps()]

    app = Lightbus("short-lived")
    assert "short-lived" in names()
    del app
    assert "short-lived" not in names()


def test_prepare_says_so_to_the_functions_of_on_publish(app: Lightbus) -> None:
    seen: list[bool] = []
    app.on_publish(lambda event, headers: seen.append(apps.preparing.get()))
    paid = app.event(type("InvoicePaid", (), {"__annotations__": {"id": int}}))
    app.prepare(paid(id=1))
    with pytest.raises(errors.InvalidOption):
        app.prepare(paid(id=1), id="")
    with app:
        app.publish_sync(paid(id=1))
    assert seen == [True, True, False]


def test_wrap_handlers_gets_a_handler_with_its_middleware_and_the_last_one_is_outermost(app: Lightbus) -> None:
    ran: list[str] = []

    @app.middleware
    def note(message: Message, call_next: NextSync) -> None:
        ran.append("middleware")
        call_next()

    @app.on("invoice.paid")
    def book(payload: dict[str, int]) -> None:
        ran.append("handler")

    def wrap(name: str) -> Callable[[Handler], Handler]:
        def around(one: Handler) -> Handler:
            def wrapped(*arguments: Any) -> Any:
                ran.append(name)
                return one.function(*arguments)

            return attrs.evolve(one, function=wrapped)

        return around

    app.wrap_handlers(wrap("first"))
    app.wrap_handlers(wrap("second"))
    one = app.subscriptions()[0].handlers["book"]
    one.function(*one.arguments(arrival(b'{"id": 1}')))
    assert ran == ["second", "first", "middleware", "handler"]
    assert app.handlers["book"].function is book


def test_a_message_knows_the_delivery_that_it_was_read_from(app: Lightbus) -> None:
    delivery = arrival(b"{}")
    message = arrived(codec.read_message, "billing", delivery)
    assert origin_of(message) is delivery
    assert message.event == "invoice.paid"
    assert origin_of(message) is delivery
    assert origin_of(attrs.evolve(message, attempt=2)) is None
    assert origin_of(codec.read_message("billing", delivery)) is None


def arrival(body: bytes) -> Delivery:
    return Delivery(cast(Channel, None), 1, False, "shop", "invoice.paid", {}, body)
