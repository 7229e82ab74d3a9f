"""Lightbus: what an app declares, and how it refuses invalid declarations."""

from __future__ import annotations

import asyncio
import math
import re
import uuid
from datetime import timedelta
from typing import Any

import anyio
import anyio.to_thread
import attrs
import pytest

from lightbus import Lightbus, Retry, errors
from tests.patience import LIMIT


@pytest.fixture
def app() -> Lightbus:
    return Lightbus("billing", url=f"memory://{uuid.uuid4().hex}")


def test_an_app_started_with_asyncio_run_handles_its_events() -> None:
    app = Lightbus("billing", url=f"memory://{uuid.uuid4().hex}")
    received: list[dict[str, object]] = []

    @app.event
    class InvoicePaid:
        invoice_id: str

    @app.on(InvoicePaid)
    async def note(paid: dict[str, object]) -> None:
        received.append(paid)
        done.set()

    async def main() -> None:
        consumer = app.consumer()
        async with app, anyio.create_task_group() as tasks:
            await tasks.start(consumer.run)
            await app.publish(InvoicePaid(invoice_id="i-1"))
            with anyio.fail_after(LIMIT):
                await done.wait()
            await consumer.stop(5)

    done = anyio.Event()
    asyncio.run(main())
    assert received == [{"invoice_id": "i-1"}]


# --- declaring events


def test_an_event_is_declared_by_its_class_or_by_name(app: Lightbus) -> None:
    @app.event
    class InvoicePaid:
        id: int

    @app.event("user.registered", version=2)
    class Registered:
        id: int

    @app.event()
    class InvoiceSent:
        id: int

    @app.event(version=3)
    class InvoiceLost:
        id: int

    found = {name: (one.version, one.cls) for name, one in app.events.items()}
    assert found == {
        "invoice.paid": (1, InvoicePaid),
        "user.registered": (2, Registered),
        "invoice.sent": (1, InvoiceSent),
        "invoice.lost": (3, InvoiceLost),
    }


def test_a_second_event_of_the_same_name_is_refused(app: Lightbus) -> None:
    @app.event
    class InvoicePaid:
        id: int

    with pytest.raises(errors.DuplicateEvent, match=r"Receipt.*'invoice.paid' already \(.*InvoicePaid\).*another name"):

        @app.event("invoice.paid")
        class Receipt:
            id: int

    assert app.events["invoice.paid"].cls is InvoicePaid


def test_two_apps_may_declare_the_same_name(app: Lightbus) -> None:
    for one in (app, Lightbus("shop")):

        @one.event
        class InvoicePaid:
            id: int

        assert "invoice.paid" in one.events


@pytest.mark.parametrize("target", [5, ["a"], print, lambda: None, object()], ids=lambda target: type(target).__name__)
def test_an_event_that_is_not_a_class_is_refused(app: Lightbus, target: Any) -> None:
    with pytest.raises(errors.InvalidEvent, match=r"@app\.event takes a class, or an event's name"):
        app.event(target)
    with pytest.raises(errors.InvalidEvent, match="decorates a class"):
        app.event("a.b")(target)


@pytest.mark.parametrize("name", ["a b", "", "a.*", "a..b"])
def test_an_event_name_that_amqp_cannot_route_is_refused(app: Lightbus, name: str) -> None:
    with pytest.raises(errors.InvalidName):

        @app.event(name)
        class InvoicePaid:
            id: int

    assert app.events == {}


# --- declaring handlers


async def handle(payload: dict[str, Any]) -> None: ...


def test_two_handlers_of_one_name_are_refused(app: Lightbus) -> None:
    app.on("a.b")(handle)
    with pytest.raises(
        errors.InvalidHandler,
        match=r"handler 'handle' of app 'billing': a handler with this name already exists.*name=",
    ):
        app.on("a.c")(handle)
    app.on("a.c", name="handle_again")(handle)
    assert sorted(app.handlers) == ["handle", "handle_again"]


def test_on_without_parentheses_is_explained(app: Lightbus) -> None:
    with pytest.raises(errors.InvalidHandler, match=r"as in @app.on\('user.registered'\)"):
        app.on(handle)  # type: ignore[arg-type]
    with pytest.raises(errors.InvalidHandler, match="name at least one event"):
        app.on()(handle)


@pytest.mark.parametrize("target", [5, None, b"a", ["a"]], ids=repr)
def test_on_with_an_invalid_pattern_is_refused(app: Lightbus, target: Any) -> None:
    with pytest.raises(errors.InvalidName, match="topic pattern"):
        app.on(target)(handle)


@pytest.mark.parametrize(
    "options",
    [
        {"timeout": 0},
        {"timeout": -1},
        {"timeout": 1501},
        {"timeout": math.nan},
        {"timeout": math.inf},
        {"timeout": "5"},
        {"timeout": True},
        {"concurrency": 0},
        {"concurrency": 10_001},
        {"concurrency": 1.5},
        {"concurrency": True},
        {"retry": 5},
        {"retry": (1, 5)},
        {"queue": "main"},
        {"queue": "dead"},
        {"queue": "Slow"},
        {"queue": "a.b"},
        {"queue": 5},
        {"source": "Auth"},
        {"source": "a.b"},
        {"source": "lightbus"},
        {"name": 5},
        {"name": ""},
        {"name": "a" * 256},
        {"name": "a\n"},
        {"name": "\ud800"},
    ],
    ids=lambda options: repr(options)[:30],
)
def test_an_invalid_handler_option_is_refused(app: Lightbus, options: dict[str, Any]) -> None:
    with pytest.raises((errors.InvalidOption, errors.InvalidName)) as caught:
        app.on("a.b", **options)(handle)
    (value,) = options.values()
    assert repr(value)[:40] in str(caught.value)
    assert app.handlers == {}


# --- the app


@pytest.mark.parametrize(
    "options",
    [
        {"prefetch": 0},
        {"prefetch": 65536},
        {"prefetch": True},
        {"prefetch": "100"},
        {"concurrency": 0},
        {"concurrency": None},
        {"publish_timeout": 0},
        {"publish_timeout": 3601},
        {"publish_timeout": math.nan},
        {"publish_timeout": "10"},
        {"publish_timeout": None},
        {"queue_type": "stream"},
        {"queue_type": None},
        {"retry": 5},
        {"retry": [1, 5]},
    ],
    ids=str,
)
def test_an_invalid_app_option_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(errors.InvalidOption, match=r"Lightbus\('billing'\)") as caught:
        Lightbus("billing", **options)
    (value,) = options.values()
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("name", ["Billing", "a.b", "", "lightbus", 5, None])
def test_an_app_name_that_amqp_or_lightbus_cannot_use_is_refused(name: Any) -> None:
    with pytest.raises(errors.InvalidName, match="app name"):
        Lightbus(name)


def test_nothing_connects_at_construction() -> None:
    app = Lightbus("billing", url="amqp://nobody:secret@127.0.0.1:1//")
    app.on("a.b")(handle)
    assert app.topology().queues
    assert "secret" not in repr(app)


def test_the_url_is_the_apps_then_the_environments_then_the_embedded_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTBUS_URL", "amqp://user:secret@rabbit/")
    assert Lightbus("billing", url="memory://a").broker.masked == "memory://a"
    assert Lightbus("billing").broker.masked == "amqp://user:**@rabbit/"
    monkeypatch.delenv("LIGHTBUS_URL")
    assert Lightbus("billing").broker.masked == "sqlite://"


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("nonsense", errors.InvalidURL),
        ("amqp://host:port/", errors.InvalidURL),
        ("amqp://host/?colour=red", errors.InvalidURL),
        ("amqp://user:secret@host:port/", errors.InvalidURL),
        ("redis://localhost", errors.UnsupportedBroker),
        (["amqp://a/", 5], errors.InvalidURL),
    ],
    ids=str,
)
def test_a_url_that_cannot_be_used_is_refused_when_it_is_needed(url: Any, error: type[Exception]) -> None:
    app = Lightbus("billing", url=url)
    with pytest.raises(error) as caught:
        _ = app.broker
    assert "secret" not in str(caught.value)


def test_a_queue_has_each_pattern_of_its_handlers_once(app: Lightbus) -> None:
    app.on("a.*", "b.c", name="one", retry=Retry(delays=(2, 1)))(handle)
    app.on("a.*", name="two", source="auth")(handle)
    app.on("a.*", name="three", retry=Retry.none())(handle)
    app.on("#", name="four", queue="slow")(handle)
    main, slow = app.consumed_queues()
    assert main.patterns == (("lightbus", "a.*"), ("lightbus", "b.c"), ("auth", "a.*"))
    assert main.delays == (1, 2, 5, 30, 120, 600)
    assert (slow.name, slow.patterns, slow.delays) == ("billing.slow", (("lightbus", "#"),), (1, 5, 30, 120, 600))


def test_a_consumer_of_a_queue_that_the_app_does_not_have_is_refused(app: Lightbus) -> None:
    app.on("#", queue="slow")(handle)
    with pytest.raises(errors.InvalidOption, match=r"no queue 'fast'\. It has: main, slow"):
        app.consumer(queues=["fast"])


# --- publishing with errors


async def publish_each(app: Lightbus, event: object, **options: Any) -> list[BaseException]:
    """The errors of `publish` and `publish_sync`: they must be the same."""
    raised: list[BaseException] = []
    for attempt in (lambda: app.publish(event, **options), lambda: anyio.to_thread.run_sync(in_thread)):

        def in_thread() -> None:
            app.publish_sync(event, **options)

        with pytest.raises(errors.LightbusError) as caught:
            await attempt()
        raised.append(caught.value)
    assert [str(one) for one in raised] == [str(raised[0])] * 2
    return raised


@pytest.fixture
def billing(app: Lightbus) -> Lightbus:
    app.event("invoice.paid")(attrs.frozen(type("InvoicePaid", (), {"__annotations__": {"id": int}})))
    return app


class InvoicePayed:
    pass


class Unrelated:
    pass


@Lightbus("shop", url="memory://").event
class OfShop:
    pass


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (
            InvoicePayed(),
            r"InvoicePayed is not declared on app 'billing'. Did you mean 'invoice.paid' \(InvoicePaid\)\?",
        ),
        ({"id": 1}, r"A dict is not an event. Publish an instance of one of: InvoicePaid\(...\)\."),
        ("invoice.pai", r"'invoice.pai' is not declared on app 'billing'. Did you mean 'invoice.paid'"),
        ("invoice.paid", r"'invoice.paid' is only the event's name. Publish an instance of it: InvoicePaid\(...\)"),
        (Unrelated(), r"Unrelated is not declared.*publish one of: invoice.paid"),
        (Unrelated, r"Unrelated is a class. Publish an instance of it: Unrelated\(...\)"),
        (OfShop(), r"OfShop is an event of another app, and 'billing' can publish only its own events"),
        (None, "A NoneType is not an event"),
    ],
)
@pytest.mark.anyio
async def test_an_event_that_is_not_declared_is_refused_with_a_suggestion(
    billing: Lightbus, event: object, words: str
) -> None:
    for error in await publish_each(billing, event):
        assert isinstance(error, errors.UnknownEvent)
        assert re.search(words, str(error))


@pytest.mark.anyio
async def test_an_app_without_events_explains_how_to_declare_one(app: Lightbus) -> None:
    for error in await publish_each(app, Unrelated()):
        assert "It declares no events yet: decorate a class with @app.event." in str(error)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"delay": -1}, errors.InvalidOption),
        ({"delay": 31 * 24 * 3600}, errors.InvalidOption),
        ({"delay": "5"}, errors.InvalidOption),
        ({"timeout": 0}, errors.InvalidOption),
        ({"timeout": math.inf}, errors.InvalidOption),
        ({"headers": {"x-death": 1}}, errors.InvalidPayload),
        ({"headers": {"a": []}}, errors.InvalidPayload),
    ],
    ids=str,
)
@pytest.mark.anyio
async def test_a_publish_with_an_invalid_option_is_refused(
    billing: Lightbus, options: dict[str, Any], error: type[Exception]
) -> None:
    event = billing.events["invoice.paid"].cls(1)
    assert all(isinstance(one, error) for one in await publish_each(billing, event, **options))


@pytest.mark.anyio
async def test_one_invalid_event_of_many_is_refused_before_the_app_connects(
    billing: Lightbus, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(_: Lightbus) -> None:
        pytest.fail("the app asked for its publisher")

    cls = billing.events["invoice.paid"].cls
    monkeypatch.setattr(Lightbus, "publisher", property(connect))
    with pytest.raises(errors.InvalidPayload, match=r"Expected `int`, got `str`.*id"):
        await billing.publish_many([cls(1), cls("2")])


@pytest.mark.anyio
async def test_publish_sync_in_an_event_loop_names_publish(billing: Lightbus) -> None:
    event = billing.events["invoice.paid"].cls(1)
    with pytest.raises(errors.PublishInEventLoop, match=r"await app.publish\("):
        billing.publish_sync(event)
    with pytest.raises(errors.PublishInEventLoop, match=r"await app.publish_many\("):
        billing.publish_many_sync([event])


# --- timedeltas


def test_timeouts_and_delays_may_be_timedeltas() -> None:
    app = Lightbus("billing", publish_timeout=timedelta(seconds=3), retry=Retry(delays=(1, timedelta(minutes=2))))
    app.on("a.b", timeout=timedelta(minutes=5))(handle)
    assert app.publish_timeout == 3
    assert app.handlers["handle"].timeout == 300
    assert app.retry == Retry(delays=(1, 120))
    same = Lightbus("billing", retry=Retry(delays=(1, 120)))
    same.on("a.b")(handle)
    assert app.topology() == same.topology()  # the same retry queues


@pytest.mark.parametrize("value", [timedelta(0), timedelta(seconds=-1), timedelta(days=9)], ids=str)
def test_a_timedelta_out_of_range_is_refused(app: Lightbus, value: timedelta) -> None:
    with pytest.raises(errors.InvalidOption, match=r"publish timeout of datetime\.timedelta"):
        Lightbus("billing", publish_timeout=value)
    with pytest.raises(errors.InvalidOption, match=r"timeout=datetime\.timedelta"):
        app.on("a.b", timeout=value)(handle)
