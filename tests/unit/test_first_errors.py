"""docs/howto/first-errors.md quotes messages: each one is raised here and compared with the page."""

from __future__ import annotations

import asyncio
import gc
import logging
import re
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import anyio
import anyio.to_thread
import attrs
import pytest

from lightbus import Lightbus, errors
from lightbus.cli import banner
from lightbus.consuming.routes import Routes
from lightbus.consuming.slots import ThreadSlot
from lightbus.consuming.subscription import Subscription
from lightbus.consuming.threads import Pool, PoolOwner
from lightbus.consuming.turns import Turns
from lightbus.transport import Channel, Delivery
from lightbus.wire import codec
from lightbus.worker.worker import Worker
from tests.patience import wait_until
from tests.rabbitmq import free_port

PAGE = (Path(__file__).parents[2] / "docs" / "howto" / "first-errors.md").read_text()
SECTIONS = {
    heading.replace("\\", ""): [" ".join(block.split()) for block in re.findall(r"```text\n(.*?)```", text, re.DOTALL)]
    for heading, text in re.findall(r"^##+ ([^\n]+)\n(.*?)(?=^##|\Z)", PAGE, re.DOTALL | re.MULTILINE)
}

CASES: dict[str, Callable[[Lightbus], object]] = {}


def case(heading: str) -> Callable[[Callable[[Lightbus], object]], Callable[[Lightbus], object]]:
    def keep(function: Callable[[Lightbus], object]) -> Callable[[Lightbus], object]:
        CASES[heading] = function
        return function

    return keep


@attrs.frozen
class User:
    email: str


class Connection:
    pass


class UserRegistered:
    pass


def with_invoices(app: Lightbus) -> type[Any]:
    @app.event
    class InvoicePaid:
        invoice_id: str
        amount: int

    return InvoicePaid


@case('Lightbus("Billing Service")')
def _(app: Lightbus) -> None:
    Lightbus("Billing Service")


@case("A handler with a parameter for each field")
def _(app: Lightbus) -> None:
    @app.on("user.registered")
    async def welcome(user_id: int, email: str) -> None: ...


@case("A handler with two payloads")
def _(app: Lightbus) -> None:
    @app.on("user.registered")
    async def welcome(user: User, message) -> None: ...  # type: ignore[no-untyped-def]


@case("@app.on without an event")
def _(app: Lightbus) -> None:
    @app.on
    async def welcome(user: User) -> None: ...


@case("@app.on a method")
def _(app: Lightbus) -> None:
    class Service:
        @app.on("user.registered")
        async def welcome(self, user: User) -> None: ...


@case("An event whose fields have no types")
def _(app: Lightbus) -> None:
    @app.event
    class UserGone:
        user_id = 0


@case("An event with a custom __init__")
def _(app: Lightbus) -> None:
    @app.event
    class UserGone:
        def __init__(self, user_id: int) -> None:
            self.user_id = user_id


@case("An event with a private field")
def _(app: Lightbus) -> None:
    @app.event
    class UserGone:
        user_id: int
        _tenant: str


@case("An event that JSON cannot represent")
def _(app: Lightbus) -> None:
    @app.event
    class UserGone:
        connection: Connection


@case("A class that is not an event")
def _(app: Lightbus) -> None:
    with_invoices(app)
    app.publish_sync(UserRegistered())


@case("An event of another app")
def _(app: Lightbus) -> None:
    app.publish_sync(Lightbus("auth", url="memory://").event(type("UserRegistered", (), {}))())


@case("A name, or a dict, instead of an event")
def _(app: Lightbus) -> None:
    with_invoices(app)
    app.publish_sync("invoice.paid")


@case('InvoicePaid("i-1", 950)')
def _(app: Lightbus) -> None:
    error = None
    try:
        with_invoices(app)("i-1", 950)
    except TypeError as raised:  # here, its name contains the function in which it is defined
        error = TypeError(str(raised).replace("with_invoices.<locals>.", ""))
    assert error is not None
    raise error


@case("A value of the wrong type")
def _(app: Lightbus) -> None:
    app.publish_sync(with_invoices(app)(invoice_id="i-1", amount="much"))


@case("publish_sync where an event loop runs")
def _(app: Lightbus) -> None:
    event = with_invoices(app)(invoice_id="i-1", amount=950)

    async def main() -> None:
        app.publish_sync(event)

    asyncio.run(main())


@case("publish without await")
def _(app: Lightbus) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        app.publish(with_invoices(app)(invoice_id="i-1", amount=950))  # type: ignore[unused-coroutine]
        gc.collect()
    (never_awaited,) = [one for one in caught if issubclass(one.category, RuntimeWarning)]
    raise never_awaited.category(str(never_awaited.message))


@case("An invalid URL")
def _(app: Lightbus) -> None:
    _ = Lightbus("billing", url="localhost:5672").broker


@case("A payload that the handler cannot read")
def _(app: Lightbus) -> None:
    @attrs.frozen
    class Order:
        dish: str

    codec.decode(Order, b'{"dishes": "calzone"}')


@case("A handler that takes too long")
def _(app: Lightbus) -> None:
    from lightbus.consuming.slots import timeout_error

    app.on("user.registered", name="welcome")(lambda: None)
    raise timeout_error((None, app.handlers["welcome"], None))  # type: ignore[arg-type]


@case("No handler for an event")
def _(app: Lightbus) -> None:
    app.on("user.registered", name="welcome")(lambda: None)
    (config,) = app.subscriptions()
    delivery = Delivery(cast(Channel, None), 1, False, "auth", "user.registered", {}, b"{}")
    raise Routes(app.name, config).why_none(delivery)


@pytest.mark.parametrize("heading", CASES)
def test_the_page_quotes_the_message(heading: str) -> None:
    app = Lightbus("billing", url="memory://")
    with pytest.raises((errors.LightbusError, TypeError, Warning)) as caught:
        CASES[heading](app)
    assert SECTIONS[heading] == [f"{type(caught.value).__name__}: {caught.value}"]


def test_each_message_of_the_page_is_raised() -> None:
    others = {"No broker", "The handler never runs", IN_A_LOGGING_HANDLER}
    assert {heading for heading, messages in SECTIONS.items() if messages} == {*CASES, *others}


def test_a_publish_without_a_broker_logs_the_reason_soon_and_raises_it_at_the_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    port = free_port()
    app = Lightbus("billing", url=f"amqp://guest:guest@localhost:{port}/")
    event = with_invoices(app)(invoice_id="i-1", amount=950)
    with caplog.at_level(logging.WARNING, "lightbus"), pytest.raises(errors.PublishUnreachable) as caught:
        app.publish_sync(event, timeout=3)

    def is_logged() -> bool:
        with pytest.raises(errors.PublishUnreachable):
            app.publish_sync(event, timeout=0.5)
        return bool(caplog.messages)

    wait_until(is_logged, "the reason is logged")
    assert is_logged()

    def as_shown(text: str) -> str:
        text = re.sub(r"[0-9a-f]{8}-[-0-9a-f]{27}", "ID", text.replace(f":{port}/", ":5672/"))
        return re.sub(r"within \S+ s", "within 10 s", text)

    in_the_end, soon = SECTIONS["No broker"]
    assert f"PublishUnreachable: {as_shown(str(caught.value))}" == as_shown(in_the_end)
    assert [as_shown(one) for one in caplog.messages] == [soon], "once for as long as it lasts"


IN_A_LOGGING_HANDLER = "publish_sync in a logging handler or a signal handler"


def test_a_publish_in_the_thread_of_a_connection_raises_with_the_next_step() -> None:
    app = Lightbus("billing", url="memory://")
    raised: list[errors.PublishError] = []

    @app.event
    class LogWritten:
        text: str

    class ToTheBus(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            with pytest.raises(errors.PublishWouldDeadlock) as caught:
                app.publish_sync(LogWritten(text=record.getMessage()))
            raised.append(caught.value)

    handler = ToTheBus()
    logging.getLogger("lightbus").addHandler(handler)
    try:
        with app:
            connection = app.publisher.connection
            assert connection is not None
            connection.drain_events = _lost  # type: ignore[method-assign]
            app.publish_sync(LogWritten(text="first"))
    finally:
        logging.getLogger("lightbus").removeHandler(handler)
    message = re.sub(r"[0-9a-f]{8}-[-0-9a-f]{27}", "ID", f"PublishWouldDeadlock: {raised[0]}")
    assert [message] == [re.sub(r"[0-9a-f]{8}-[-0-9a-f]{27}", "ID", one) for one in SECTIONS[IN_A_LOGGING_HANDLER]]


def _lost(timeout: float | None = None) -> None:
    raise ConnectionResetError("by the peer")


def test_a_banner_shows_the_file_of_the_embedded_broker_with_a_tilde(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    line = "embedded (SQLite file {}); set LIGHTBUS_URL to use RabbitMQ"
    assert banner.broker_line(Lightbus("billing", url="sqlite://").broker) == line.format("~/state/lightbus/bus.db")
    elsewhere = tmp_path.parent / "bus.db"
    assert banner.broker_line(Lightbus("billing", url=f"sqlite:///{elsewhere}").broker) == line.format(elsewhere)


def test_a_banner_without_handlers_shows_where_to_add_them() -> None:
    app = Lightbus("billing", url="memory://")
    lines = banner.lines(app, "billing.bus:app", app.consumer())
    assert " ".join(lines[-1].split()) == SECTIONS["The handler never runs"][0]


@pytest.mark.parametrize("declared", [True, False])
def test_a_worker_warns_of_a_pattern_that_almost_matches_an_event_of_its_app(declared: bool) -> None:
    app = Lightbus("billing", url="memory://")
    invoice_paid = with_invoices(app) if declared else None
    app.on("invoice.payed", name="book")(lambda: None)
    app.on("invoice.payed", source="shop", name="of_another")(lambda: None)
    app.on("invoice.*", "invoice.#", "order.placed", "invoice.paid", name="rightly")(lambda: None)
    if invoice_paid is not None:
        app.on(invoice_paid, name="by_class")(lambda: None)
    assert Worker(app).misspelt() == (SECTIONS["The handler never runs"][1:] if declared else [])


def test_a_missing_broker_is_reported_without_the_frames_of_threads_and_libraries() -> None:
    app = Lightbus("billing", url=f"amqp://guest:guest@127.0.0.1:{free_port()}/", publish_timeout=3)
    with pytest.raises(errors.BrokerUnreachable) as caught, app:
        pass
    text = "".join(traceback.format_exception(caught.value))
    assert "ConnectionRefusedError" in text
    assert re.findall(r"lightbus/([\w/]+).py", text) == ["app", "publishing/publisher"]
    assert "kombu" not in text


def test_a_log_shows_the_line_of_the_users_code_that_raised_a_lightbus_error() -> None:
    app = Lightbus("billing", url="memory://")
    invoice_paid = with_invoices(app)

    async def blocks() -> None:
        app.publish_sync(invoice_paid(invoice_id="i-1", amount=1))

    async def means_it() -> None:
        raise errors.Reject("nothing to pay")

    async def reads() -> None:
        codec.decode(User, b"no JSON")

    def caught(function: Callable[[], Any]) -> BaseException:
        with pytest.raises(errors.LightbusError) as raised:
            asyncio.run(function())
        trace = raised.tb
        while trace.tb_frame.f_code is not function.__code__:
            assert trace.tb_next is not None
            trace = trace.tb_next
        if function is reads:  # a worker does this itself
            assert trace.tb_next is not None
            trace = trace.tb_next
        return raised.value.with_traceback(trace)

    assert errors.tells_where(ValueError("no"))
    assert [errors.tells_where(caught(one)) for one in (blocks, means_it, reads)] == [True, False, False]


def test_a_traceback_of_a_dead_letter_begins_with_the_users_code() -> None:
    error = _error_of_a_handler_in_a_thread()
    assert "lightbus/consuming/threads.py" in "".join(traceback.format_exception(error))
    shown = codec.error_headers(errors.without_machinery(error))[codec.ERROR_TRACEBACK]
    first, *_ = re.findall(r'File "(.+)", line', shown)
    assert first == __file__
    assert "raise ValueError" in shown


def test_a_traceback_without_user_code_is_unchanged() -> None:
    try:
        codec.decode(User, b"no JSON")
    except errors.DecodeError as error:
        ours = error.with_traceback(error.__traceback__.tb_next if error.__traceback__ else None)
        before = ours.__traceback__
        assert before is not None
        assert errors.without_machinery(ours).__traceback__ is before


def _error_of_a_handler_in_a_thread() -> ValueError:
    app = Lightbus("billing", url="memory://")

    @app.on("user.registered")
    def welcome() -> None:
        raise ValueError("no")

    subscription = Subscription(*app.subscriptions())
    delivery = Delivery(cast(Channel, None), 1, False, "auth", "user.registered", {}, b"{}")
    subscription.channels = (delivery.channel,)

    async def handle() -> BaseException | None:
        turns = Turns(subscription)
        turns.plain.append((delivery, app.handlers["welcome"], None))
        slot = ThreadSlot(subscription, anyio.CancelScope())
        pool = Pool(subscription, turns, cast(PoolOwner, None))  # which is asked for nothing: the handler fails
        await anyio.to_thread.run_sync(pool.serve, slot)
        return slot.error

    error = asyncio.run(handle())
    assert isinstance(error, ValueError)
    return error
