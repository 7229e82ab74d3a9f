"""docs/examples/middleware does what docs/howto/middleware.md describes."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections import Counter
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import anyio
import pytest

from lightbus import Lightbus, Message, Next, NextSync, Retry, errors
from lightbus.testing import TestBus
from tests.integrations.example import EXAMPLES

pytestmark = pytest.mark.anyio
BOTH_LOOPS = pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
Load = Callable[[str], ModuleType]
PAGE = " ".join((EXAMPLES.parent / "howto" / "middleware.md").read_text().split())


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """`load("slow")`: the example's module, imported again for this test."""

    def load_one(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / "middleware" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load_one


async def place(bus: TestBus, *sources: str) -> None:
    for number, source in enumerate(sources, start=1):
        await bus.publish("order.placed", {"order_id": number}, source=source)
    await bus.drain()


@BOTH_LOOPS
async def test_slow_events_are_logged(
    load: Load, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, now = load("slow"), [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    module.app.handlers.clear()

    @module.app.on("order.placed")  # type: ignore[untyped-decorator]
    async def charge(message: Message) -> None:
        if message.source == "slow" and message.attempt == 1:
            now[0] += 0.6
            raise ValueError("slow, and then failed")

    with caplog.at_level(logging.WARNING, module.logger.name):
        async with TestBus(module.app) as bus:
            await place(bus, "shop")
            await place(bus, "slow")
            (_, second) = bus.handled("charge")
    slow = [record.getMessage() for record in caplog.records if record.name == module.logger.name]
    assert slow == [f"order.placed {second.message.id} took 0.6 s"]


@BOTH_LOOPS
async def test_a_class_wraps_both_kinds_and_a_handlers_own_middleware_only_that_handler(load: Load) -> None:
    module = load("both")
    added: list[int] = []
    add = module.counter.add
    module.counter.add = lambda number: (added.append(number), add(number))
    async with TestBus(module.app) as bus:
        await place(bus, "shop", "test")
        assert bus.failed() == []
    assert sorted(added) == [-1] * 4 + [1] * 4  # two handlers, two events
    assert module.counter.running == 0
    assert sorted(module.notes) == [
        "order 1: charged for shop",
        "order 1: printed for shop",
        "order 2: printed for test",
    ]
    module.notes.clear()
    module.note("charged", module.Order(order_id=3))
    assert module.notes == ["order 3: charged by hand"]


@BOTH_LOOPS
async def test_publishes_have_the_header_and_outcomes_are_counted(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELEASE", "1.2.3")
    module = load("hooks")
    async with TestBus(module.app) as bus:
        await place(bus, "shop")
        assert [(one.event, one.message.headers["release"]) for one in bus.published() if one.source == "billing"] == [
            ("order.charged", "1.2.3")
        ]
    assert module.counts == Counter({("published", None): 1, ("handled", "charge"): 1})


# --- what the page says of middleware ----------------------------------------------------------


@BOTH_LOOPS
async def test_the_time_of_a_middleware_counts_toward_the_timeout(anyio_backend: str) -> None:
    app, ran = Lightbus("billing", url="memory://"), list[int]()

    @app.middleware
    async def wait(message: Message, call_next: Next) -> None:
        await anyio.sleep_forever()
        await call_next()

    @app.on("order.placed", timeout=0.1, retry=Retry.none())
    async def charge() -> None:
        ran.append(1)

    async with TestBus(app) as bus:
        await place(bus, "shop")
        (dead,) = bus.dead("charge")
    assert dead.error_type == "lightbus.errors.HandlerTimeout"
    assert ran == []


# --- errors that the page shows ----------------------------------------------------------------


def shown(error: BaseException) -> None:
    """The page has this message, with the names of its examples."""
    text = " ".join(str(error).split())
    assert text in PAGE, text


async def asynchronous(message: Message, call_next: Next) -> None:
    await call_next()


def synchronous(message: Message, call_next: NextSync) -> None:
    call_next()


@pytest.mark.parametrize("middleware", [asynchronous, synchronous])
def test_the_errors_at_start_are_those_of_the_page(middleware: Callable[..., object]) -> None:
    app = Lightbus("billing", url="memory://")
    middleware.__qualname__ = "log_context"
    app.middleware(middleware)
    if middleware is asynchronous:
        app.on("order.placed", name="print_label")(lambda: None)
    else:

        @app.on("order.placed")
        async def charge() -> None: ...

    with pytest.raises(errors.InvalidMiddleware) as raised:
        app.consumer()
    shown(raised.value)
