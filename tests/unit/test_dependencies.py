"""Depends and State: what is refused at registration, and overriding."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import inspect
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator
from typing import Annotated, Any, cast

import attrs
import pytest

from lightbus import Depends, Lightbus, Message, State, errors
from lightbus.testing import TestBus
from lightbus.transport import Channel, Delivery


class Session:
    """What dependencies give."""


@attrs.frozen
class Order:
    number: int


async def open_session() -> AsyncGenerator[Session]:
    yield Session()


def make_session() -> Session:
    return Session()


OpenSession = Annotated[Session, Depends(open_session)]
MadeSession = Annotated[Session, Depends(make_session)]
DELIVERY = Delivery(cast(Channel, None), 1, False, "shop", "order.placed", {"message_id": "m-1"}, b'{"number": 1}')


@pytest.fixture
def app() -> Lightbus:
    return Lightbus("billing", url="memory://")


def run(app: Lightbus, name: str = "handle") -> None:
    """Run a handler as a worker does, on one event."""
    handler = app.subscriptions()[0].handlers[name]
    returned = handler.function(*handler.arguments(DELIVERY))
    if handler.is_async:
        asyncio.run(returned)


def value_of(app: Lightbus, dependency: Callable[..., Any]) -> Any:
    """What a handler gets from this dependency."""
    received: list[Any] = []

    async def handle(order: Order, value: Annotated[Any, Depends(dependency)]) -> None:
        received.append(value)

    app.on("order.placed")(handle)
    run(app)
    return received[0]


# --- what can be a dependency -----------------------------------------------------------------


class Sessions:
    def make(self) -> tuple[Sessions, str]:
        return self, "made"

    async def open(self) -> AsyncGenerator[tuple[Sessions, str]]:
        yield self, "opened"

    async def __call__(self, message: Message) -> tuple[Sessions, str]:
        return self, message.event


def test_a_method_of_an_instance_is_a_dependency(app: Lightbus) -> None:
    sessions = Sessions()
    assert value_of(app, sessions.make) == (sessions, "made")


def test_a_method_that_is_a_generator_is_a_dependency(app: Lightbus) -> None:
    sessions = Sessions()
    assert value_of(app, sessions.open) == (sessions, "opened")


def test_an_object_that_can_be_called_is_a_dependency(app: Lightbus) -> None:
    sessions = Sessions()
    assert value_of(app, sessions) == (sessions, "order.placed")


def test_an_object_that_cannot_be_hashed_is_a_dependency(app: Lightbus) -> None:
    @attrs.define
    class Maker:
        name: str

        def __call__(self) -> str:
            return self.name

    assert value_of(app, Maker("a maker")) == "a maker"


def test_a_partial_is_a_dependency(app: Lightbus) -> None:
    async def connect(host: str, message: Message, *, port: int) -> str:
        return f"{host}:{port} {message.event}"

    assert value_of(app, functools.partial(connect, "db", port=5432)) == "db:5432 order.placed"


def test_a_class_is_a_dependency_whose_constructor_has_dependencies(app: Lightbus) -> None:
    class Repository:
        def __init__(self, session: MadeSession, message: Message) -> None:
            self.session, self.event = session, message.event

    repository = value_of(app, Repository)
    assert isinstance(repository.session, Session)
    assert repository.event == "order.placed"


@attrs.frozen
class Settings:
    url: str = "sqlite://"


def test_parameters_with_a_default_keep_it(app: Lightbus) -> None:
    assert value_of(app, Settings) == Settings(url="sqlite://")


def test_a_dependency_after_a_parameter_with_a_default_is_filled(app: Lightbus) -> None:
    def connect(retries: int = 3, *, session: MadeSession, message: Message) -> tuple[int, Session, str]:
        return retries, session, message.event

    # A message that is keyword-only is not filled, and has no default here.
    with pytest.raises(errors.InvalidDependency, match="the keyword-only parameter 'message' cannot be filled"):
        value_of(app, connect)

    def right(message: Message, retries: int = 3, *, session: MadeSession) -> tuple[str, int, Session]:
        return message.event, retries, session

    event, retries, session = value_of(app, right)
    assert (event, retries, type(session)) == ("order.placed", 3, Session)


def test_the_parameters_come_in_any_order_and_the_record_has_the_payload() -> None:
    app = Lightbus("billing", url="memory://")
    received: list[Any] = []

    @app.on("order.placed")
    def handle(session: MadeSession, message: Message, order: Order) -> None:
        received.append((type(session), message.event, order))

    @app.on("order.placed")
    def no_payload(session: MadeSession) -> None: ...

    with TestBus(app) as bus:
        bus.publish_sync("order.placed", {"number": 1}, source="shop")
        bus.drain_sync()
        assert received == [(Session, "order.placed", Order(1))]
        assert [one.payload for one in bus.handled(handle)] == [Order(1)]
        assert [one.payload for one in bus.handled(no_payload)] == [{"number": 1}]


def test_an_app_does_not_keep_what_surrounds_its_handlers() -> None:
    def make_app() -> tuple[Lightbus, weakref.ref[Session]]:
        app, not_needed = Lightbus("billing", url="memory://"), Session()

        @app.on("order.placed")
        def handle(order: Order, session: MadeSession) -> None: ...

        return app, weakref.ref(not_needed)

    app, not_needed = make_app()
    gc.collect()
    assert not_needed() is None
    run(app)


def test_signatures_are_read_at_registration_only(app: Lightbus, monkeypatch: pytest.MonkeyPatch) -> None:
    @app.on("order.placed")
    async def handle(order: Order, session: OpenSession) -> None: ...

    monkeypatch.setattr(inspect, "signature", lambda *_: pytest.fail("a signature was read"))
    run(app)


# --- what is refused at registration ----------------------------------------------------------


def refused(register: Callable[[Any], object], function: Callable[..., Any]) -> str:
    with pytest.raises(errors.InvalidHandler) as caught:
        register(function)
    text = str(caught.value)
    assert text.startswith("handler 'handle' of app 'billing': ")
    return text.removeprefix("handler 'handle' of app 'billing': ")


def first(second: Annotated[object, Depends(second)]) -> None: ...
def second(third: Annotated[object, Depends(first)]) -> None: ...


def test_a_cycle_is_refused_with_the_way_around_it(app: Lightbus) -> None:
    def handle(order: Order, value: Annotated[object, Depends(first)]) -> None: ...

    assert refused(app.on("order.placed", name="handle"), handle) == (
        "dependency first depends on itself: first -> second -> first. Move what both need into a third one."
    )


def test_a_parameter_without_an_annotation_is_refused(app: Lightbus) -> None:
    def connect(host) -> None:  # type: ignore[no-untyped-def]
        ...

    def handle(order: Order, value: Annotated[object, Depends(connect)]) -> None: ...

    assert refused(app.on("order.placed", name="handle"), handle) == (
        "dependency connect: the parameter 'host' has no annotation. A dependency can have other dependencies "
        "(Annotated[..., Depends(...)]), the envelope (message: Message), the lifespan's value (State[...]), and "
        "parameters with a default. Only the handler gets the payload."
    )


def test_a_dependency_of_a_dependency_that_wants_the_payload_is_refused(app: Lightbus) -> None:
    def customer(order: Order) -> None: ...

    def account(customer: Annotated[None, Depends(customer)]) -> None: ...

    def handle(order: Order, account: Annotated[None, Depends(account)]) -> None: ...

    text = refused(app.on("order.placed", name="handle"), handle)
    assert text.startswith("dependency customer: the parameter 'order: Order' cannot be filled.")
    assert text.endswith("Only the handler gets the payload.")


def test_an_annotation_that_cannot_be_resolved_is_refused(app: Lightbus) -> None:
    def connect(host: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    def handle(order: Order, value: Annotated[object, Depends(connect)]) -> None: ...

    assert refused(app.on("order.placed", name="handle"), handle).startswith(
        "dependency connect: an annotation cannot be resolved (name 'Nowhere'"
    )


def test_stars_are_refused(app: Lightbus) -> None:
    def connect(*hosts: str) -> None: ...

    def handle(order: Order, value: Annotated[object, Depends(connect)]) -> None: ...

    assert refused(app.on("order.placed", name="handle"), handle) == (
        "dependency connect: '*hosts' cannot be filled. Name its parameters, and annotate each; or wrap it in a "
        "function."
    )


def test_a_method_without_its_instance_is_refused(app: Lightbus) -> None:
    def handle(order: Order, value: Annotated[object, Depends(Sessions.make)]) -> None: ...

    assert refused(app.on("order.placed", name="handle"), handle) == (
        "dependency Sessions.make: it is a method without its instance. Pass the method of an instance: "
        "Depends(sessions.open)."
    )


def test_depends_as_a_default_is_refused_with_the_right_form(app: Lightbus) -> None:
    def handle(order: Order, session: Session = Depends(make_session)) -> None:  # type: ignore[assignment]  # noqa: B008
        ...

    assert refused(app.on("order.placed", name="handle"), handle) == (
        "the parameter 'session' has Depends(make_session) as its default. Write `session: Annotated[TheType, "
        "Depends(the_function)]`, or for the lifespan's value `session: State[TheType]`, without a default: so type "
        "checkers know its type."
    )


def test_depends_as_a_default_of_a_dependency_is_refused(app: Lightbus) -> None:
    def repository(*, session: Session = Depends(make_session)) -> None:  # type: ignore[assignment]  # noqa: B008
        ...

    def handle(order: Order, value: Annotated[object, Depends(repository)]) -> None: ...

    assert refused(app.on("order.placed", name="handle"), handle).startswith(
        "dependency repository: the parameter 'session' has Depends(make_session) as its default."
    )


def test_depends_as_an_annotation_is_refused(app: Lightbus) -> None:
    def handle(order: Order, session) -> None:  # type: ignore[no-untyped-def]
        ...

    handle.__annotations__["session"] = Depends(make_session)
    assert "has Depends(make_session) as its annotation" in refused(app.on("order.placed", name="handle"), handle)


def test_state_without_a_type_is_refused(app: Lightbus) -> None:
    def handle(order: Order, pool: State) -> None:  # type: ignore[type-arg]
        ...

    assert "or for the lifespan's value `pool: State[TheType]`" in refused(
        app.on("order.placed", name="handle"), handle
    )


def test_a_default_beside_depends_is_refused(app: Lightbus) -> None:
    def handle(order: Order, session: MadeSession | None = None) -> None: ...

    handle.__annotations__["session"] = MadeSession
    assert refused(app.on("order.placed", name="handle"), handle) == (
        "the parameter 'session' has a default (None) that is never used, because Depends(make_session) always fills "
        "it. Remove the default."
    )


def test_depends_inside_of_another_type_is_refused(app: Lightbus) -> None:
    def handle(order: Order, session: MadeSession | None) -> None: ...

    text = refused(app.on("order.placed", name="handle"), handle)
    assert "has a marker inside of another type" in text
    assert "Put Annotated outside: `session: Annotated[TheType | None, Depends(the_function)]`." in text


def test_two_markers_are_refused(app: Lightbus) -> None:
    def handle(order: Order, session: Annotated[Session, Depends(make_session), Depends(open_session)]) -> None: ...

    assert "needs one marker, not Depends(make_session), Depends(open_session)" in refused(
        app.on("order.placed", name="handle"), handle
    )


def test_depends_without_a_function_is_refused(app: Lightbus) -> None:
    def handle(order: Order, session: Annotated[Session, Depends]) -> None: ...

    assert "needs one marker, not <class 'lightbus.dependencies.Depends'>" in refused(
        app.on("order.placed", name="handle"), handle
    )


def test_an_async_dependency_of_a_sync_handler_is_refused(app: Lightbus) -> None:
    def repository(session: OpenSession) -> None: ...

    def handle(order: Order, value: Annotated[None, Depends(repository)]) -> None: ...

    assert refused(app.on("order.placed", name="handle"), handle) == (
        "dependency open_session is async, but the handler is a sync function, which runs in a thread. Make the "
        "handler `async def`, or the dependency `def`."
    )


def test_a_context_manager_is_refused(app: Lightbus) -> None:
    managed = contextlib.asynccontextmanager(open_session)

    async def handle(order: Order, value: Annotated[Any, Depends(managed)]) -> None: ...

    assert refused(app.on("order.placed", name="handle"), handle) == (
        "dependency open_session is decorated with @contextmanager or @asynccontextmanager, so the handler would get "
        "the context manager, not entered. Remove the decorator: Depends takes the generator function itself."
    )


@pytest.mark.parametrize("value", [open_session(), make_session])
def test_a_dependency_that_was_called_already_is_refused(value: Any) -> None:
    if callable(value):
        value = (session for session in [value()])
    with pytest.raises(errors.InvalidDependency, match=r"pass the function without calling it, as in Depends\(\w+"):
        Depends(value)


def test_a_coroutine_is_refused_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    async def connect() -> None: ...

    with pytest.raises(errors.InvalidDependency, match="pass the function without calling it"):
        Depends(connect())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert [one for one in recwarn.list if issubclass(one.category, RuntimeWarning)] == []


def test_what_cannot_be_called_is_refused() -> None:
    with pytest.raises(errors.InvalidDependency, match=r"Depends\('session'\): pass a function that returns the value"):
        Depends("session")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def hides_async() -> Any:
    async def connect() -> None: ...

    return connect()


def hides_generator() -> Any:
    def connect() -> Generator[None]:
        yield

    return connect()


def hides_async_generator() -> Any:
    return open_session()


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (hides_async, "a coroutine"),
        (hides_generator, "a generator"),
        (hides_async_generator, "an async generator"),
    ],
)
@pytest.mark.parametrize("is_async", [True, False])
def test_a_sync_dependency_that_returns_something_unfinished_fails_the_event(
    app: Lightbus, function: Callable[..., Any], what: str, is_async: bool
) -> None:
    async def handle(value: Annotated[Any, Depends(function)]) -> None: ...

    def handle_plainly(value: Annotated[Any, Depends(function)]) -> None: ...

    app.on("order.placed", name="handle")(handle if is_async else handle_plainly)
    with pytest.raises(errors.DependencyError, match=f"is a sync function that returned {what}. Make it `async def`"):
        run(app)


def test_a_sync_handler_that_returns_an_awaitable_fails_the_event(app: Lightbus) -> None:
    async def handle_later() -> None: ...

    def handle(session: MadeSession) -> Any:
        return handle_later()

    app.on("order.placed")(handle)
    with pytest.raises(
        errors.DependencyError, match="'handle' of app 'billing' is a sync function that returned an aw"
    ):
        run(app)


# --- overriding -------------------------------------------------------------------------------


def shop_app() -> tuple[Lightbus, list[object]]:
    app = Lightbus("billing", url="memory://")
    received: list[object] = []

    def repository(session: MadeSession) -> tuple[str, object]:
        return "repository", session

    @app.on("order.placed")
    def handle(order: Order, session: MadeSession, repository: Annotated[object, Depends(repository)]) -> None:
        received.extend([session, repository])

    return app, received


def place(bus: TestBus) -> None:
    bus.publish_sync("order.placed", {"number": 1}, source="shop")
    bus.drain_sync()


def test_a_test_bus_overrides_a_dependency_wherever_it_is_asked_for_until_it_ends() -> None:
    app, received = shop_app()
    with TestBus(app) as bus:
        place(bus)
        bus.override(make_session, lambda: "fake")
        place(bus)
    with TestBus(app) as bus:
        place(bus)
    assert [one for one in received if one == "fake"] == ["fake"]
    assert received[3] == ("repository", "fake")
    assert isinstance(received[0], Session)
    assert isinstance(received[4], Session)


def test_the_replacement_may_be_a_generator_with_dependencies() -> None:
    app, received = shop_app()
    closed: list[str] = []

    def fake(message: Message, settings: Annotated[Settings, Depends(Settings)]) -> Generator[object]:
        yield message.event, settings
        closed.append("closed")

    with TestBus(app) as bus:
        bus.override(make_session, fake)
        place(bus)
    assert received[0] == ("order.placed", Settings())
    assert closed == ["closed"]


def test_an_async_generator_may_be_overridden_by_a_function(app: Lightbus) -> None:
    received: list[object] = []

    @app.on("order.placed")
    async def handle(session: OpenSession) -> None:
        received.append(session)

    with app.override(open_session, lambda: "fake"):
        run(app)
    run(app)
    assert received[0] == "fake"
    assert isinstance(received[1], Session)


def test_the_inner_one_of_two_overrides_counts(app: Lightbus) -> None:
    received: list[object] = []

    @app.on("order.placed")
    def handle(session: MadeSession) -> None:
        received.append(session)

    with app.override(make_session, lambda: "outer"):
        with app.override(make_session, lambda: "inner"):
            run(app)
        run(app)
    assert received == ["inner", "outer"]


def test_an_override_also_counts_for_handlers_that_are_registered_later(app: Lightbus) -> None:
    received: list[object] = []

    @app.on("order.placed")
    def handle(session: MadeSession) -> None: ...

    with app.override(make_session, lambda: "fake"):

        @app.on("order.placed")
        def later(session: MadeSession) -> None:
            received.append(session)

        run(app, "later")
    assert received == ["fake"]


def test_overriding_what_no_handler_asks_for_is_refused() -> None:
    app, _ = shop_app()
    with TestBus(app) as bus, pytest.raises(errors.InvalidDependency) as caught:
        bus.override(open_session, make_session)
    assert str(caught.value) == (
        "app 'billing': override(open_session, ...): no handler depends on it. Handlers depend on: make_session, "
        "repository."
    )


def test_a_replacement_that_is_not_a_function_is_refused() -> None:
    app, _ = shop_app()
    fake: Any = "fake"
    with TestBus(app) as bus, pytest.raises(errors.InvalidDependency, match="as in `lambda: fake`"):
        bus.override(make_session, fake)


def test_a_replacement_that_cannot_be_used_changes_nothing() -> None:
    app, received = shop_app()
    with TestBus(app) as bus:
        with pytest.raises(errors.InvalidDependency, match=r"make_session \(overridden by open_session\) is async"):
            bus.override(make_session, open_session)
        place(bus)
    assert isinstance(received[0], Session)


def test_overriding_before_the_test_bus_has_started_is_refused() -> None:
    app, _ = shop_app()
    with pytest.raises(errors.TestBusError, match="has not started"):
        TestBus(app).override(make_session, lambda: "fake")


# --- the lifespan's value ---------------------------------------------------------------------


class Pool: ...


@contextlib.asynccontextmanager
async def lifespan(app: Lightbus) -> AsyncIterator[Pool]:
    yield Pool()


@contextlib.asynccontextmanager
async def lifespan_of_nothing(app: Lightbus) -> AsyncIterator[None]:
    yield


def app_with(received: list[object], **options: Any) -> Lightbus:
    app = Lightbus("billing", url="memory://", **options)

    @app.on("order.placed")
    def handle(order: Order, pool: State[Pool]) -> None:
        received.append(pool)

    return app


def test_a_handler_gets_the_lifespans_value_in_a_test() -> None:
    received: list[object] = []
    app = app_with(received, lifespan=lifespan)
    with TestBus(app) as bus:
        place(bus)
        assert received == [app.state]
        assert isinstance(app.state, Pool)
    with pytest.raises(errors.NoState, match="app 'billing' has no state: no worker of it runs in this process"):
        app.state  # noqa: B018


def test_a_test_without_the_lifespan_sets_the_value_itself() -> None:
    received: list[object] = []
    app = app_with(received, lifespan=lifespan)
    with app.with_state("fake"), TestBus(app, lifespan=False) as bus:
        place(bus)
    assert received == ["fake"]


def test_a_lifespan_that_yields_nothing_fails_the_event_with_the_reason() -> None:
    app = app_with([], lifespan=lifespan_of_nothing)
    with TestBus(app) as bus:
        place(bus)
        [dead] = bus.dead()
    assert dead.error == (
        "NoState: app 'billing' has no state: its lifespan yields nothing. Yield the value, as in `yield pool`."
    )


def test_an_app_without_a_lifespan_does_not_start_where_its_value_is_asked_for() -> None:
    app = app_with([])
    with pytest.raises(errors.InvalidDependency) as caught:
        app.consumer()
    assert str(caught.value) == (
        "handler 'handle' of app 'billing' asks for the lifespan's value (State[...]), but the app has no lifespan. "
        "Pass one that yields the value: Lightbus(..., lifespan=...)."
    )
