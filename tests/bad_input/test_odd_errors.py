"""Exceptions whose own methods raise: each is an ordinary failure of a handler, and the worker continues."""

from __future__ import annotations

import io
import logging
import sys
import types
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lightbus import Lightbus, Reject, Retry, errors
from lightbus.cli.logs import JSONLines, Lines
from lightbus.testing import TestBus
from tests.bus import OrderPlaced, dead_letters, eventually, running

pytestmark = pytest.mark.anyio


class Broken(Exception):
    """Raised by the methods of the exceptions below."""


class Panic(BaseException):
    """Some extension modules raise such errors: a BaseException that is not an Exception."""


def raising(names: tuple[str, ...], base: type[BaseException] = Exception, what: type[BaseException] = Broken) -> Any:
    """A class with these attributes, which raise."""

    def method(self: Any, *_: Any) -> Any:
        raise what("broken")

    members = {name: method if name in ("__str__", "__repr__", "__getattr__") else property(method) for name in names}
    return type("Odd", (base,), members)


class ApiError(Exception):
    def __init__(self) -> None:
        super().__init__("the API refused it")
        self.data = {"code": 7}

    def __getattr__(self, name: str) -> Any:
        return self.__dict__["data"][name]


class OddText(str):
    def encode(self, *_: Any, **__: Any) -> bytes:
        raise Broken

    def rstrip(self, *_: Any) -> str:
        raise Broken

    def __format__(self, _: str) -> str:
        raise Broken


class SaysOddText(Exception):
    def __str__(self) -> str:
        return OddText("odd text")


class OddMeta(type):
    @property
    def __name__(cls) -> str:
        raise Broken


class OddlyNamed(Exception, metaclass=OddMeta):
    pass


def with_module(module: object) -> BaseException:
    cls = type("Odd", (Exception,), {})
    cls.__module__ = module  # type: ignore[assignment]
    return cls("no")


def with_notes(notes: object) -> BaseException:
    error = ValueError("no")
    error.__notes__ = notes  # type: ignore[assignment]
    return error


def in_a_cycle() -> BaseException:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    return first


def nested(depth: int) -> BaseException:
    error: Exception = ValueError("innermost")
    for _ in range(depth):
        error = ExceptionGroup("group", [error])
    return error


def caused(cause: BaseException) -> BaseException:
    error = ValueError("no")
    error.__cause__ = cause
    return error


class OddLoader:
    def get_source(self, _: str) -> str:
        raise Broken


def from_an_odd_module() -> BaseException:
    """An exception whose source lines cannot be read."""
    module = types.ModuleType("odd_module")
    module.__loader__ = OddLoader()  # type: ignore[assignment]
    exec(compile("def fail():\n    raise ValueError('no')", f"<odd {uuid.uuid4()}>", "exec"), module.__dict__)
    try:
        module.fail()
    except ValueError as error:
        return error
    raise AssertionError


ODD: dict[str, Callable[[], BaseException]] = {
    "str": lambda: raising(("__str__",))(),
    "str-and-repr": lambda: raising(("__str__", "__repr__"))(),
    "str-panics": lambda: raising(("__str__",), what=Panic)(),
    "getattr": ApiError,
    "getattr-raises": lambda: raising(("__getattr__",))("no"),
    "notes": lambda: raising(("__notes__",))("no"),
    "notes-panic": lambda: raising(("__notes__",), what=Panic)("no"),
    "notes-odd": lambda: with_notes([raising(("__str__", "__repr__"))(), 7]),
    "notes-no-list": lambda: with_notes(7),
    "cause": lambda: raising(("__cause__",))("no"),
    "context": lambda: raising(("__context__", "__suppress_context__"))("no"),
    "traceback": lambda: raising(("__traceback__",))("no"),
    "with-traceback": lambda: raising(("with_traceback",))("no"),
    "class": lambda: raising(("__class__",))("no"),
    "dict": lambda: raising(("__dict__", "args"))("no"),
    "odd-text": SaysOddText,
    "surrogates": lambda: ValueError("\udcff\ud800"),
    "named-by-surrogates": lambda: type("Odd\ud800", (Exception,), {})("no"),
    "name": lambda: OddlyNamed("no"),
    "module-number": lambda: with_module(7),
    "module-none": lambda: with_module(None),
    "syntax-bytes": lambda: SyntaxError("bad", ("f", 1, 2, b"bytes")),
    "syntax-odd": lambda: SyntaxError("bad", ("f", "line", None, 7)),
    "syntax-filename": lambda: SyntaxError("bad", (7, 10**30, -1, "text")),
    "cause-cycle": in_a_cycle,
    "odd-cause": lambda: caused(ApiError()),
    "odd-in-a-group": lambda: ExceptionGroup("group", [ApiError(), raising(("__str__",))()]),
    "nested-group": lambda: nested(5000),
    "wide-group": lambda: ExceptionGroup("group", [ValueError(n) for n in range(2000)]),
    "loader": from_an_odd_module,
    "reject": lambda: Reject(raising(("__str__", "__repr__"))()),
    "system-exit": lambda: SystemExit(raising(("__str__", "__repr__"))()),
    "attribute-suggestion": lambda: AttributeError("no", name="x", obj=raising(("__dir__", "__dict__"))()),
}


class Log(logging.StreamHandler[io.StringIO]):
    """The log records, and the errors while they were handled."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__(io.StringIO())
        self.setFormatter(formatter)
        self.broken: list[logging.LogRecord] = []

    def handleError(self, record: logging.LogRecord) -> None:
        self.broken.append(record)


@pytest.fixture
def logs() -> Iterator[list[Log]]:
    """The log as a worker writes it, in both forms, and as the logging module does."""
    logger = logging.getLogger("lightbus")
    handlers = [Log(formatter) for formatter in (Lines("", False), JSONLines(""), logging.Formatter())]
    for handler in handlers:
        logger.addHandler(handler)
    yield handlers
    for handler in handlers:
        logger.removeHandler(handler)


@pytest.mark.parametrize("plain", [False, True], ids=["async", "plain"])
@pytest.mark.parametrize("odd", ODD)
async def test_an_exception_that_cannot_be_printed_is_dead_lettered_and_the_next_event_is_handled(
    odd: str, plain: bool, logs: list[Log]
) -> None:
    app = Lightbus("shop", url=f"memory://{uuid.uuid4().hex}", retry=Retry(delays=(0.02,)))
    app.event(OrderPlaced)
    handled: list[int] = []

    def act(order: OrderPlaced) -> None:
        if order.number == 1:
            raise ODD[odd]()
        handled.append(order.number)

    async def act_in_the_loop(order: OrderPlaced) -> None:
        act(order)

    app.on("order.placed", name="act")(act if plain else act_in_the_loop)
    async with running(app):
        await app.publish_many([OrderPlaced(number=1), OrderPlaced(number=2)])
        (dead,) = await dead_letters(app)
        await app.publish(OrderPlaced(number=3))
        await eventually(lambda: sorted(handled), [2, 3])
    headers = dead.properties["headers"]
    assert headers["lightbus-error-type"]
    if odd != "reject":
        assert headers["lightbus-error-traceback"].count("Traceback (most recent call last)") >= 1
        assert ", in act" in headers["lightbus-error-traceback"] or "..." in headers["lightbus-error-traceback"]
    for log in logs:
        assert "dead-lettered to shop.dead" in log.stream.getvalue()
        assert not log.broken


@pytest.mark.parametrize("odd", ODD)
def test_every_error_function_accepts_any_exception(odd: str) -> None:
    try:
        raise ODD[odd]()
    except BaseException as error:  # noqa: BLE001
        caught = error
    assert errors.summary(caught)
    assert errors.type_name(caught)
    assert errors.format_traceback(errors.without_machinery(caught))
    assert errors.tells_where(caught) in (True, False)
    exc_info, frames = errors.for_log(caught)
    assert exc_info is caught or frames.startswith("\nTraceback")
    for text in (errors.summary(caught), errors.type_name(caught), frames):
        text.encode()


def test_a_traceback_with_frames_only_explains_why() -> None:
    try:
        raise ApiError
    except ApiError as error:
        shown = errors.format_traceback(error)
    assert shown.startswith("Traceback (most recent call last):\n")
    assert "in test_a_traceback_with_frames_only_explains_why" in shown
    if sys.version_info < (3, 13):
        assert "ApiError: the API refused it\n" in shown
        assert "Python cannot print this exception: KeyError: '__notes__'" in shown


async def test_a_test_bus_shows_the_failure_too() -> None:
    app = Lightbus("shop", retry=Retry.none())
    app.event(OrderPlaced)

    @app.on("order.placed")
    async def act(order: OrderPlaced) -> None:
        raise ApiError

    async with TestBus(app) as bus:
        await app.publish(OrderPlaced(number=1))
        await bus.drain()
        (failed,) = bus.failed()
        assert failed.error == "ApiError: the API refused it"
        (dead,) = bus.dead()
        assert dead.error == "ApiError: the API refused it"
