"""Invalid names, events, handlers and options are errors where they are written, at import."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, NamedTuple

import attrs
import msgspec
import pytest

from lightbus import Lightbus, Message, Retry, errors
from tests.bus import OrderPlaced


@pytest.fixture
def app() -> Lightbus:
    return Lightbus("billing", url="memory://declaring")


def _refused(error: type[errors.LightbusError], *words: str) -> Any:
    """Expect this error, with all of these words in it."""
    pattern = "(?s)" + "".join(f"(?=.*{re.escape(word)})" for word in words)
    return pytest.raises(error, match=pattern)


# --- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["bil.ling", "Billing", "1billing", "", "-billing", "bill ing", "bïlling", "billing\n", "a/b", "*", "#", None, 7],
    ids=repr,
)
def test_an_invalid_app_name_is_refused_with_an_example(name: Any) -> None:
    with _refused(errors.InvalidName, f"app name {name!r}", "no dots", "as in '"):
        Lightbus(name)


@pytest.mark.parametrize(
    ("name", "near"),
    [("Billing Service", "billing-service"), ("bil.ling", "bil-ling"), ("2fa", "fa"), ("", "billing"), (7, "billing")],
)
def test_the_error_suggests_a_valid_app_name(name: Any, near: str) -> None:
    Lightbus(near)
    with _refused(errors.InvalidName, f"as in {near!r}"):
        Lightbus(name)


def test_the_name_of_the_bus_and_long_names_are_refused() -> None:
    with _refused(errors.InvalidName, "'lightbus' is the name of the bus exchange", "Choose another"):
        Lightbus("lightbus")
    with _refused(errors.InvalidName, "longer than 100 characters", "Choose another"):
        Lightbus("a" * 101)


def test_the_name_amq_is_refused_as_app_and_as_source(app: Lightbus) -> None:
    with _refused(errors.InvalidName, "app name 'amq'", "'amq.'", "RabbitMQ reserves", "Choose another"):
        Lightbus("amq")
    with _refused(errors.InvalidName, "app name 'amq'"):
        app.on("a", source="amq")(lambda: None)
    Lightbus("amqp")
    Lightbus("amq-1")


def test_patterns_may_have_capital_letters(app: Lightbus) -> None:
    app.on("User.Registered", "Order.*")(lambda: None)


@pytest.mark.parametrize("queue", ["main", "dead", "retry", "delay", "internal"])
def test_reserved_queue_names_are_refused(app: Lightbus, queue: str) -> None:
    with _refused(errors.InvalidName, "handler 'handle' of app 'billing'", f"queue={queue!r}", "reserved by Lightbus"):
        app.on("a", queue=queue, name="handle")(lambda: None)


@pytest.mark.parametrize("queue", ["slow.er", "Slow", "", "s low", 7, "a" * 101], ids=repr)
def test_an_invalid_queue_name_is_refused(app: Lightbus, queue: Any) -> None:
    with _refused(errors.InvalidName, "queue=", "as in 'slow'"):
        app.on("a", queue=queue)(lambda: None)


@pytest.mark.parametrize(
    "pattern",
    ["", ".", "a.", ".a", "a..b", "user registered", "user.regist*", "#a", "a#", "**", "a/b", "ü", "a" * 256, "a\n"],
    ids=repr,
)
def test_an_invalid_topic_pattern_is_refused_with_an_example(app: Lightbus, pattern: str) -> None:
    with _refused(errors.InvalidName, "is not a topic pattern", "'*' matches one word", "'user.*'"):
        app.on(pattern)(lambda: None)


@pytest.mark.parametrize("source", ["bil.ling", "Auth", "lightbus", ""], ids=repr)
def test_an_invalid_source_is_refused(app: Lightbus, source: str) -> None:
    with _refused(errors.InvalidName, f"{source!r}"):
        app.on("a", source=source)(lambda: None)


@pytest.mark.parametrize("name", ["", "user.", "user..x", "user registered", "user.*", "#", "ü"], ids=repr)
def test_an_invalid_event_name_is_refused(app: Lightbus, name: Any) -> None:
    with _refused(errors.InvalidName, "event class", f"{name!r}", "is not a valid event name", "'user.registered'"):

        @app.event(name)
        class Anything:
            x: int


def test_an_event_name_of_more_than_255_bytes_is_refused(app: Lightbus) -> None:
    with _refused(errors.InvalidName, "has 256 characters", "255 bytes", "shorter"):

        @app.event("a" * 256)
        class Anything:
            x: int


@pytest.mark.parametrize("version", [0, -1, 1.5, "2", True, None], ids=repr)
def test_an_invalid_version_is_refused(app: Lightbus, version: Any) -> None:
    with _refused(errors.InvalidOption, "event 'anything'", f"version={version!r}", "of 1 or more"):

        @app.event(version=version)
        class Anything:
            x: int


# --- events -----------------------------------------------------------------------------------


def test_two_events_of_one_name_are_refused_with_the_place_of_the_first(app: Lightbus) -> None:
    app.event(OrderPlaced)
    with _refused(
        errors.DuplicateEvent, "app 'billing'", "'order.placed'", "tests.bus.OrderPlaced", "@app.event('...')"
    ):

        @app.event("order.placed")
        class Another:
            x: int


class Opaque:
    pass


class Colour(enum.Enum):
    RED = object()


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (Opaque, ("x", "Opaque", "JSON cannot represent")),
        (list[Opaque], ("x", "Opaque")),
        (dict[str, dict[str, Opaque]], ("x", "Opaque")),
        (Opaque | None, ("x", "Opaque")),
        (Callable[[], None], ("x",)),
        (threading.Lock, ()),
        (complex, ("complex",)),
        (Iterator[int], ("x",)),
        (str | bytes, ("more than one str-like type",)),
        (dict[tuple[int, int], str], ("x", "dict with keys that are not strings or numbers (Tuple)")),
        (dict[str, dict[list[int], str]], ("x", "dict with keys")),
        (dict[bool, str], ("x", "dict with keys")),
        (Colour, ("Enums must contain",)),
    ],
    ids=str,
)
def test_an_event_that_json_cannot_represent_is_refused_with_its_field(
    app: Lightbus, annotation: Any, words: tuple[str, ...]
) -> None:
    cls = type("Anything", (), {"__annotations__": {"fine": int, "x": annotation}})
    with _refused(errors.InvalidEvent, "event 'anything'", "Anything", *words):
        app.event(cls)
    assert app.events == {}


def test_a_field_deep_inside_is_named_by_its_path(app: Lightbus) -> None:
    @attrs.frozen
    class Inner:
        handle: Opaque

    cls = type("Outer", (), {"__annotations__": {"inner": list[Inner]}})
    with _refused(errors.InvalidEvent, "field Outer.inner.handle has the type Opaque", "Use str, int"):
        app.event(cls)


@pytest.mark.parametrize(
    "cls",
    [
        NamedTuple("Pair", [("x", int)]),
        enum.Enum("Colour", "RED GREEN"),
        type("Mapping", (dict,), {}),
        type("Text", (str,), {}),
        type("Failure", (Exception,), {}),
    ],
    ids=lambda cls: cls.__name__,
)
def test_a_class_of_another_kind_is_refused_with_what_to_use(app: Lightbus, cls: type) -> None:
    with _refused(errors.InvalidEvent, cls.__name__, "cannot be an event", "plain class with annotated fields"):
        app.event(cls)


def test_a_field_without_a_type_is_refused_by_name(app: Lightbus) -> None:
    @attrs.define
    class Untyped:
        x = attrs.field()

    with _refused(errors.InvalidEvent, "field Untyped.x has no type", "x: int"):
        app.event(Untyped)

    def handle(order: Untyped) -> None: ...

    with _refused(errors.InvalidHandler, "handler 'handle'", "'order: Untyped'", "field 'x' has no type"):
        app.on("a")(handle)


def test_fields_that_would_not_be_sent_are_refused(app: Lightbus) -> None:
    with _refused(errors.InvalidEvent, "UserGone.user_id has no type", "would not be sent", "`user_id: int`"):

        @app.event
        class UserGone:
            user_id = 1

    with _refused(errors.InvalidEvent, "UserBack defines __init__", "`user_id: int`", "dataclass"):

        @app.event
        class UserBack:
            def __init__(self, user_id: int) -> None:
                self.user_id = user_id


def test_a_plain_event_may_have_constants_and_methods_beside_its_fields(app: Lightbus) -> None:
    @app.event
    class Paid:
        CURRENCY = "EUR"
        amount: int

        def shown(self) -> str:
            return f"{self.amount} {self.CURRENCY}"

    assert Paid(amount=3).shown() == "3 EUR"

    @app.event
    class Emptied:
        def shown(self) -> str:
            return "empty"

    assert set(app.events) == {"paid", "emptied"}


def test_event_with_a_number_is_refused(app: Lightbus) -> None:
    with _refused(errors.InvalidEvent, "@app.event takes a class, or an event's name, not 7"):
        app.event(7)  # type: ignore[call-overload]


def test_event_on_a_function_is_refused(app: Lightbus) -> None:
    with _refused(errors.InvalidEvent, "@app.event decorates a class"):
        app.event("some.name")(lambda: None)  # type: ignore[type-var]


def test_a_type_that_is_not_imported_is_refused_with_its_name(app: Lightbus) -> None:
    with _refused(errors.InvalidEvent, "Anything", "Missing", "TYPE_CHECKING"):

        @app.event
        class Anything:
            x: Missing  # type: ignore[name-defined] # noqa: F821


def test_every_kind_of_value_class_can_be_an_event(app: Lightbus) -> None:
    @app.event
    class Plain:
        x: int

    @app.event
    @attrs.define
    class Attrs:
        x: int

    @app.event
    @dataclasses.dataclass
    class Data:
        x: int

    @app.event
    class Strict(msgspec.Struct):
        x: int

    @app.event
    class Nothing:
        pass

    assert set(app.events) == {"plain", "attrs", "data", "strict", "nothing"}


# --- handlers ---------------------------------------------------------------------------------


def takes_two_payloads(order: dict[str, Any], invoice: dict[str, Any]) -> None: ...


def takes_payload_and_envelope_unannotated(order: dict[str, Any], message) -> None: ...  # type: ignore[no-untyped-def]


def takes_args(*orders: Any) -> None: ...


def takes_kwargs(order: dict[str, Any], **more: Any) -> None: ...


def takes_keyword_only(order: dict[str, Any], *, tenant: str) -> None: ...


def takes_unknown(order: Missing) -> None: ...  # type: ignore[name-defined] # noqa: F821


def takes_opaque(order: Opaque) -> None: ...


def takes_int(order: int) -> None: ...


def takes_text(order: str | None) -> None: ...


def takes_none(order: None) -> None: ...


def takes_app(order: Lightbus) -> None: ...


async def generates(order: dict[str, Any]) -> AsyncIterator[int]:
    yield 1


def generates_plainly(order: dict[str, Any]) -> Iterator[int]:
    yield 1


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (takes_two_payloads, ("'invoice' cannot be filled: 'order' is already the payload", "message: Message")),
        (takes_payload_and_envelope_unannotated, ("'message' cannot be filled: 'order' is", "message: Message")),
        (takes_args, ("'*orders' cannot be filled",)),
        (takes_kwargs, ("more' cannot be filled",)),
        (takes_keyword_only, ("keyword-only parameter 'tenant'", "default")),
        (takes_unknown, ("Missing", "TYPE_CHECKING")),
        (takes_opaque, ("'order: Opaque' cannot be filled from JSON", "attrs class")),
        (takes_int, ("'order: int' is a single value", "an object with fields")),
        (takes_text, ("order:", "is a single value")),
        (takes_none, ("order:", "is a single value")),
        (takes_app, ("'order: Lightbus' cannot be filled from JSON", "envelope with Message")),
        (generates, ("is a generator", "Return instead of yielding")),
        (generates_plainly, ("is a generator", "Return instead of yielding")),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_handler_whose_parameters_cannot_be_filled_is_refused_with_the_parameter(
    app: Lightbus, function: Any, words: tuple[str, ...]
) -> None:
    with _refused(errors.InvalidHandler, f"handler '{function.__name__}' of app 'billing'", *words):
        app.on("order.placed")(function)
    assert app.handlers == {}


@pytest.mark.parametrize("thing", [None, "a name", 7, Opaque, Opaque()])
def test_values_that_are_not_functions_cannot_be_handlers(app: Lightbus, thing: Any) -> None:
    with _refused(errors.InvalidHandler, "of app 'billing'", "is not a function"):
        app.on("order.placed")(thing)


def test_on_without_an_event_is_refused_with_an_example(app: Lightbus) -> None:
    with _refused(errors.InvalidHandler, "@app.on('user.registered')"):
        app.on()(lambda: None)
    with _refused(errors.InvalidHandler, "@app.on('user.registered')"):

        @app.on
        def handle(order: dict[str, Any]) -> None: ...


def test_on_a_class_that_is_not_an_event_is_refused(app: Lightbus) -> None:
    with _refused(errors.InvalidHandler, "Opaque is not an event class", "@app.event"):
        app.on(Opaque)(lambda: None)


def test_two_handlers_of_one_name_are_refused(app: Lightbus) -> None:
    def handle() -> None: ...

    app.on("a")(handle)
    with _refused(errors.InvalidHandler, "'handle'", "already", "name="):
        app.on("b")(handle)
    app.on("b", name="handle_b")(handle)


def test_two_lambdas_need_names(app: Lightbus) -> None:
    app.on("a")(lambda: None)
    with _refused(errors.InvalidHandler, "'<lambda>'", "name="):
        app.on("b")(lambda: None)


def test_an_unbound_method_is_refused(app: Lightbus) -> None:
    with _refused(errors.InvalidHandler, "handler 'handle' of app 'billing' is a method", "(service.handle)"):

        class Service:
            @app.on("order.placed")
            def handle(self, order: dict[str, Any]) -> None: ...

    class Late:
        def handle(self, order: dict[str, Any]) -> None: ...

    app.on("order.placed")(Late().handle)
    assert set(app.handlers) == {"handle"}


# --- options ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Retry(delays=5), ("delays=5", "delays=(1, 5, 30)")),  # type: ignore[arg-type]
        (lambda: Retry(delays="15"), ("delays='15'",)),  # type: ignore[arg-type]
        (lambda: Retry(delays=(0,)), ("0", "0.001", "Retry.none()")),
        (lambda: Retry(delays=(-1,)), ("-1", "30 days")),
        (lambda: Retry(delays=(1, 2_592_001)), ("2592001", "30 days")),
        (lambda: Retry(delays=(float("nan"),)), ("nan", "not a number of seconds")),
        (lambda: Retry(delays=(float("inf"),)), ("inf", "not a number of seconds")),
        (lambda: Retry(delays=("1",)), ("'1'", "not a number of seconds")),  # type: ignore[arg-type]
        (lambda: Retry(delays=(True,)), ("True", "not a number of seconds")),
        (lambda: Retry(on="ValueError"), ("on='ValueError'", "not an exception class")),  # type: ignore[arg-type]
        (lambda: Retry(on=(ValueError, 7)), ("on=7", "not an exception class")),  # type: ignore[arg-type]
        (lambda: Retry(never=ValueError("x")), ("never=ValueError('x')", "not an exception class")),  # type: ignore[arg-type]
        (lambda: Retry(jitter=1), ("jitter=1", "from 0 up to (not including) 1")),
        (lambda: Retry(jitter=-0.1), ("jitter=-0.1",)),
        (lambda: Retry(jitter=float("nan")), ("jitter=nan",)),
        (lambda: Retry(jitter="much"), ("jitter='much'",)),  # type: ignore[arg-type]
    ],
)
def test_invalid_retry_delays_are_refused(make: Callable[[], Retry], words: tuple[str, ...]) -> None:
    with _refused(errors.InvalidOption, "Retry", *words):
        make()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prefetch": 0}, ("prefetch=0", "1 to 65,535")),
        ({"prefetch": 65536}, ("prefetch=65536",)),
        ({"prefetch": "many"}, ("prefetch='many'",)),
        ({"concurrency": 0}, ("concurrency=0", "1 to 10,000")),
        ({"concurrency": 1.5}, ("concurrency=1.5",)),
        ({"concurrency": True}, ("concurrency=True",)),
        ({"publish_timeout": 0}, ("publish timeout", "more than 0 and up to 3,600")),
        ({"publish_timeout": float("inf")}, ("publish timeout",)),
        ({"queue_type": "mirrored"}, ("queue_type='mirrored'", "'quorum' or 'classic'")),
        ({"retry": 5}, ("retry=5", "Retry(delays=(1, 5, 30))")),
        ({"retry": (1, 5)}, ("retry=(1, 5)", "Retry(delays=(1, 5, 30))")),
    ],
    ids=str,
)
def test_an_app_option_out_of_range_is_refused(options: dict[str, Any], words: tuple[str, ...]) -> None:
    with _refused(errors.InvalidOption, "Lightbus('billing')", *words):
        Lightbus("billing", **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"timeout": 0}, ("timeout=0", "up to 1500")),
        ({"timeout": 1501}, ("timeout=1501", "consumer timeout of 30 minutes", "Split work")),
        ({"timeout": float("nan")}, ("timeout=nan",)),
        ({"timeout": "1"}, ("timeout='1'",)),
        ({"concurrency": 0}, ("concurrency=0",)),
        ({"retry": 3}, ("retry=3", "Retry.none()")),
    ],
    ids=str,
)
def test_a_handler_option_out_of_range_is_refused(
    app: Lightbus, options: dict[str, Any], words: tuple[str, ...]
) -> None:
    with _refused(errors.InvalidOption, "handler 'handle' of app 'billing'", *words):
        app.on("a", name="handle", **options)(lambda: None)


UNKNOWN: dict[str, tuple[Callable[[Lightbus], object], tuple[str, ...]]] = {
    "Retry(max_retries=)": (lambda _: Retry(max_retries=3), ("Retry has no option 'max_retries'", "delays=(1, 5, 30)")),  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    "Retry(backoff=)": (lambda _: Retry(backoff=2), ("'backoff'", "delays=")),  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    "Retry(jiter=)": (lambda _: Retry(jiter=0.1), ("'jiter'", "Did you mean jitter=?")),  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    "on(retries=)": (lambda app: app.on("a", retries=3), ("'retries'", "retry=Retry(delays=")),  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    "on(queue_name=)": (lambda app: app.on("a", queue_name="slow"), ("'queue_name'", "queue=")),  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    "on(routing_key=)": (lambda app: app.on(routing_key="a"), ("'routing_key'", "@app.on('user.registered')")),  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    "on(sorce=)": (lambda app: app.on("a", sorce="shop"), ("'sorce'", "Did you mean source=?")),  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    "on(zzz=)": (lambda app: app.on("a", zzz=1), ("'zzz'", "It has: source=, queue=, retry=")),  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    "Lightbus(timeout=)": (lambda _: Lightbus("b", timeout=3), ("'timeout'", "publish_timeout=")),  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    "Lightbus(broker=)": (lambda _: Lightbus("b", broker="x"), ("'broker'", "url=")),  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_an_unknown_option_is_refused_with_what_to_use_instead(app: Lightbus, case: str) -> None:
    declare, words = UNKNOWN[case]
    with _refused(errors.InvalidOption, *words):
        declare(app)


def test_other_type_errors_are_not_changed(app: Lightbus) -> None:
    with pytest.raises(TypeError, match="name"):
        Lightbus()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]

    def lifespan_like(**_: object) -> None:
        raise TypeError("f() got an unexpected keyword argument 'retries'")

    class Odd(str):
        __slots__ = ()

        def __eq__(self, other: object) -> bool:
            lifespan_like()
            return True

        __hash__ = str.__hash__

    with pytest.raises(TypeError, match="got an unexpected keyword argument 'retries'"):
        Lightbus(Odd("billing"), queue_type=Odd("quorum"))  # type: ignore[arg-type]


def test_a_decorator_without_wraps_is_named_with_its_file_and_line(app: Lightbus) -> None:
    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return wrapper

    @timed
    def welcome(user: dict[str, Any]) -> None: ...

    with _refused(
        errors.InvalidHandler,
        "'*args' cannot be filled",
        "wrapper (",
        "test_declaring.py:",
        "'welcome'",
        "functools.wraps",
    ):
        app.on("a")(welcome)


def test_a_parameter_that_is_not_the_payload_is_named(app: Lightbus) -> None:
    def welcome(user: dict[str, Any], session: Any) -> None: ...

    with _refused(
        errors.InvalidHandler, "'session' cannot be filled", "'user' is already the payload", "message: Message"
    ):
        app.on("a")(welcome)


def test_an_aliased_message_annotation_is_recognized(app: Lightbus) -> None:
    def handle(envelope: Message, order: dict[str, Any]) -> None: ...

    with contextlib.nullcontext():
        app.on("a")(handle)
    assert set(app.handlers) == {"handle"}
