"""`TestBus`, as the tests of an application use it."""

from __future__ import annotations

import re
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import anyio
import attrs
import pytest

from lightbus import Lightbus, Message, Reject, Retry, errors
from lightbus.testing import TestBus
from tests.patience import LIMIT, wait_until

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@attrs.frozen
class Order:
    order_id: str
    amount: Decimal = Decimal(1)


class Billing:
    """An app that a test may ask to fail."""

    def __init__(self, **options: Any) -> None:
        self.app = app = Lightbus("billing", **options)
        self.on_order: Callable[[Order, Message], object] = lambda order, message: None

        @app.event
        class InvoicePaid:
            invoice_id: str
            amount: Decimal

        @app.event("invoice.due")
        class ReminderDue:
            invoice_id: str

        self.InvoicePaid: Any = InvoicePaid
        self.ReminderDue: Any = ReminderDue

        @app.on("order.placed", source="shop")
        async def charge(order: Order, message: Message) -> None:
            self.on_order(order, message)
            await app.publish(InvoicePaid(invoice_id=order.order_id, amount=order.amount))

        @app.on(ReminderDue)
        def remind(reminder: ReminderDue) -> None:
            pass

        self.charge, self.remind = charge, remind


@pytest.fixture
def billing() -> Billing:
    return Billing()


def fail_until(attempt: int) -> Callable[[Order, Message], None]:
    def on_order(order: Order, message: Message) -> None:
        if message.attempt < attempt:
            raise ValueError("not yet")

    return on_order


async def place(bus: TestBus, order_id: str = "o-1") -> None:
    await bus.publish("order.placed", {"order_id": order_id}, source="shop")


async def test_what_is_published_is_handled_by_the_other_app(billing: Billing) -> None:
    reports = Lightbus("reports")

    @reports.on("invoice.#")
    def report(invoice: dict) -> None:  # type: ignore[type-arg]
        pass

    async with TestBus(billing.app, reports) as bus:
        await billing.app.publish(billing.InvoicePaid(invoice_id="i-1", amount=Decimal("9.50")))
        await bus.drain()
        [handled] = bus.handled(report)
    assert (handled.handler, handled.event, handled.payload) == (
        "report",
        "invoice.paid",
        {"invoice_id": "i-1", "amount": "9.50"},
    )
    assert (handled.attempt, handled.app, handled.message.source) == (1, "reports", "billing")


async def test_published_gives_instances_of_what_the_apps_declared(billing: Billing) -> None:
    async with TestBus(billing.app) as bus:
        await place(bus)
        await bus.drain()
        paid = billing.InvoicePaid(invoice_id="o-1", amount=Decimal(1))
        assert bus.published(billing.InvoicePaid) == [paid]
        assert bus.published("invoice.paid") == [paid]
        assert bus.published("order.*") == [{"order_id": "o-1"}]
        # An event of the handler may be confirmed before the test's own publish has returned.
        invoice, order = sorted(bus.published(), key=lambda one: one.event)
        assert (order.event, order.source, order.routed) == ("order.placed", "shop", True)
        assert (invoice.event, invoice.source, invoice.routed) == ("invoice.paid", "billing", False)
        assert invoice.message.causation_id == order.message.id


async def test_routed_is_as_in_production(billing: Billing) -> None:
    async with TestBus(billing.app):
        unrouted = await billing.app.publish(billing.InvoicePaid(invoice_id="i-1", amount=Decimal(1)))
        routed = await billing.app.publish(billing.ReminderDue(invoice_id="i-1"))
    assert (unrouted.routed, routed.routed) == (False, True)


async def test_retries_run_without_waiting(billing: Billing) -> None:
    billing.on_order = fail_until(5)
    async with TestBus(billing.app) as bus:
        await place(bus)
        await bus.drain(timeout=LIMIT)  # the retry delays add up to 756 s
        assert [one.attempt for one in bus.handled("charge")] == [5]
        assert [(one.attempt, one.error) for one in bus.failed("charge")] == [
            (attempt, "ValueError: not yet") for attempt in (1, 2, 3, 4)
        ]
        assert bus.dead() == []


async def test_a_dead_letter_has_its_error_payload_and_traceback(billing: Billing) -> None:
    billing.on_order = fail_until(100)
    async with TestBus(billing.app) as bus:
        await place(bus)
        await bus.drain()
        [dead] = bus.dead("charge")
        for same in (bus.dead(), bus.dead(billing.charge), bus.dead("order.placed"), bus.dead("order.*")):
            assert same == [dead]
        assert bus.dead(billing.ReminderDue) == bus.dead("remind") == []
    assert (dead.event, dead.handler, dead.attempt) == ("order.placed", "charge", 6)
    assert dead.payload == Order("o-1")
    assert (dead.error, dead.error_type) == ("ValueError: not yet", "ValueError")
    assert (dead.message.event, dead.message.source) == ("order.placed", "shop")
    assert repr(dead) == "<Dead charge on order.placed, attempt 6: ValueError: not yet>"
    assert str(dead).startswith(f"{dead!r}\nOrder(order_id='o-1', amount=Decimal('1'))\nTraceback")
    assert str(dead).endswith("ValueError: not yet")
    assert 'raise ValueError("not yet")' in str(dead)


async def test_a_dead_letter_with_an_unreadable_payload_has_the_raw_payload(billing: Billing) -> None:
    async with TestBus(billing.app) as bus:
        await bus.publish("order.placed", b"no JSON", source="shop")
        await bus.publish("order.placed", {"amount": 1}, source="shop")
        await bus.drain()
        # Separate tasks publish them, in any order.
        payloads = [dead.payload for dead in bus.dead()]
        assert sorted(payloads, key=str) == [b"no JSON", {"amount": 1}]


async def test_a_delayed_event_arrives_when_the_test_advances_the_clock(billing: Billing) -> None:
    async with TestBus(billing.app) as bus:
        await billing.app.publish(billing.ReminderDue(invoice_id="i-1"), delay=3600)
        await bus.drain()
        assert [one.delay for one in bus.published()] == [3600]
        await bus.advance(3599)
        assert bus.handled("remind") == []
        await bus.advance(1)
        assert len(bus.handled("remind")) == 1


async def test_delays_and_limits_may_be_timedeltas(billing: Billing) -> None:
    async with TestBus(billing.app, timeout=timedelta(seconds=LIMIT)) as bus:
        await billing.app.publish(billing.ReminderDue(invoice_id="i-1"), delay=timedelta(hours=1))
        await billing.app.publish(billing.ReminderDue(invoice_id="i-2"), delay=timedelta(0))
        await bus.publish("order.placed", {"order_id": "o-1"}, source="shop", delay=timedelta(0))
        await bus.drain(timeout=timedelta(seconds=LIMIT))
        assert [one.payload.invoice_id for one in bus.handled("remind")] == ["i-2"]
        await bus.advance(timedelta(hours=1))
        assert sorted(one.payload.invoice_id for one in bus.handled("remind")) == ["i-1", "i-2"]


async def test_an_event_from_outside_has_the_given_envelope(billing: Billing) -> None:
    time = datetime(2026, 5, 4, 12, tzinfo=UTC)
    async with TestBus(billing.app) as bus:
        order = {"order_id": "o-1"}
        await bus.publish("order.placed", order, source="shop", id="m-1", correlation_id="c-1", time=time)
        await bus.drain()
        (message,) = [one.message for one in bus.handled("charge")]
        assert (message.id, message.correlation_id, message.time) == ("m-1", "c-1", time)
        with pytest.raises(errors.InvalidOption, match=r"time=.*it has no timezone"):
            await bus.publish("order.placed", order, source="shop", time=time.replace(tzinfo=None))


async def test_advance_stops_at_each_due_event(billing: Billing) -> None:
    """Events that are published meanwhile fall due in their turn."""
    again = Lightbus("again")

    @again.event
    class Tick:
        number: int

    @again.on(Tick)
    async def tick(now: Tick) -> None:
        await again.publish(Tick(number=now.number + 1), delay=10)

    async with TestBus(again) as bus:
        await again.publish(Tick(number=1), delay=10)
        await bus.advance(35)
        assert [one.payload.number for one in bus.handled(tick)] == [1, 2, 3]


async def test_drain_expires_retries_but_not_delayed_events(billing: Billing) -> None:
    billing.on_order = fail_until(6)
    async with TestBus(billing.app) as bus:
        await billing.app.publish(billing.ReminderDue(invoice_id="i-1"), delay=1)
        await place(bus)
        await bus.drain()
        assert len(bus.handled("charge")) == 1
        assert bus.handled("remind") == []


async def test_reject_is_a_dead_letter_at_once(billing: Billing) -> None:
    def reject(order: Order, message: Message) -> None:
        raise Reject("nothing to pay")

    billing.on_order = reject
    async with TestBus(billing.app) as bus:
        await place(bus)
        await bus.drain()
        assert [(one.attempt, one.error) for one in bus.dead()] == [(1, "Reject: nothing to pay")]


async def test_unchecked_dead_letters_fail_the_test(billing: Billing) -> None:
    billing.on_order = fail_until(100)

    async def test() -> None:
        async with TestBus(billing.app) as bus:
            await place(bus)
            await bus.drain()
            bus.dead("remind")  # not the one that exists

    with pytest.raises(errors.UnexpectedDeadLetters) as caught:
        await test()
    assert str(caught.value).startswith("1 dead letter that the test did not check.")
    assert "bus.dead('charge')" in str(caught.value)
    assert 'raise ValueError("not yet")' in str(caught.value)
    async with TestBus(billing.app, allow_dead=True) as bus:
        await place(bus)
        await bus.drain()


async def test_the_same_id_twice_is_a_duplicate(billing: Billing) -> None:
    async with TestBus(billing.app) as bus:
        for _ in range(2):
            await bus.publish("order.placed", {"order_id": "o-1"}, source="shop", id="m-1", headers={"tenant": "a"})
        await bus.drain()
        assert [(one.message.id, one.message.headers) for one in bus.handled("charge")] == [
            ("m-1", {"tenant": "a"})
        ] * 2


async def test_lifespans_run_around_the_handlers() -> None:
    steps: list[str] = []

    @asynccontextmanager
    async def lifespan(app: Lightbus) -> AsyncGenerator[None]:
        async with anyio.create_task_group():  # must be left in the task that entered it
            steps.append("open")
            yield
            steps.append("closed")

    billing = Billing(lifespan=lifespan)
    billing.on_order = lambda order, message: steps.append("handled")
    async with TestBus(billing.app) as bus:
        await place(bus)
        await bus.drain()
    assert steps == ["open", "handled", "closed"]
    async with TestBus(billing.app, lifespan=False):
        pass
    assert steps == ["open", "handled", "closed"]


@pytest.mark.parametrize("when", ["start", "end"])
async def test_a_lifespan_that_fails_fails_the_test(when: str) -> None:
    @asynccontextmanager
    async def lifespan(app: Lightbus) -> AsyncGenerator[None]:
        if when == "start":
            raise OSError("no database")
        yield
        raise OSError("no database")

    billing = Billing(lifespan=lifespan)
    with pytest.raises(OSError, match="no database"):
        async with TestBus(billing.app):
            assert when == "end"
    async with TestBus(Billing().app, lifespan=False):
        pass


async def test_handlers_run_in_the_tests_event_loop(billing: Billing) -> None:
    met = anyio.Event()
    billing.on_order = lambda order, message: met.set()
    async with TestBus(billing.app) as bus:
        await place(bus)
        with anyio.fail_after(LIMIT):
            await met.wait()  # also without a drain


async def test_an_app_gets_its_own_broker_back(billing: Billing) -> None:
    app = Lightbus("billing", url="memory://the-apps-own")
    async with app:
        before = app.broker, app.publisher
        for _ in range(2):
            async with TestBus(app):
                assert app.broker is not before[0]
            assert (app.broker, app.publisher) == before


async def test_a_reused_bus_starts_empty(billing: Billing) -> None:
    bus = TestBus(billing.app)
    for _ in range(2):
        async with bus:
            assert bus.published() == bus.handled() == bus.dead() == []
            await place(bus)
            await bus.drain()
            assert len(bus.handled()) == 1
    assert len(bus.handled()) == 1  # its records can be read afterwards


def test_a_sync_test_can_do_the_same(billing: Billing) -> None:
    billing.on_order = fail_until(2)
    with TestBus(billing.app) as bus:
        billing.app.publish_sync(billing.ReminderDue(invoice_id="i-1"), delay=60)
        bus.publish_sync("order.placed", {"order_id": "o-1"}, source="shop")
        bus.drain_sync()
        assert [one.attempt for one in bus.handled("charge")] == [2]
        bus.advance_sync(60)
        assert len(bus.handled("remind")) == 1


def test_a_sync_test_may_choose_trio() -> None:
    app = Lightbus("trees")
    found: list[str] = []

    @app.on("leaf.fell")
    async def see() -> None:
        import sniffio

        found.append(sniffio.current_async_library())

    with TestBus(app, backend="trio") as bus:
        bus.publish_sync("leaf.fell", {})
        bus.drain_sync()
    assert found == ["trio"]


def test_an_async_test_may_use_a_bus_that_a_sync_fixture_started(billing: Billing) -> None:
    async def test(bus: TestBus) -> None:
        await billing.app.publish(billing.ReminderDue(invoice_id="i-1"))
        await bus.drain()

    with TestBus(billing.app) as bus:
        anyio.run(test, bus)
        assert len(bus.handled("remind")) == 1


async def test_its_repr_shows_its_progress(billing: Billing) -> None:
    """pytest shows it beside `assert len(bus.handled(...)) == 1`."""
    billing.on_order = fail_until(2)
    bus = TestBus(billing.app)
    assert repr(bus) == "<TestBus of billing: not started>"
    async with bus:
        await billing.app.publish(billing.InvoicePaid(invoice_id="i-1", amount=Decimal(1)))
        assert repr(bus) == "<TestBus of billing: 1 published, 0 handled, not drained since>"
        await place(bus)
        await bus.drain()
        assert repr(bus) == "<TestBus of billing: 3 published, 1 handled, 1 failed>"
    assert repr(bus) == "<TestBus of billing: 3 published, 1 handled, 1 failed, ended>"


async def test_a_class_that_was_imported_twice_is_named_in_the_error(billing: Billing) -> None:
    async with TestBus(billing.app) as bus:
        with pytest.raises(errors.UnknownEvent, match=r"InvoicePaid, another class\. Import it from there\."):
            bus.published(Billing().InvoicePaid)


def test_nothing_is_left_behind(billing: Billing) -> None:
    before = {*threading.enumerate()}  # threads of other tests' apps
    with TestBus(billing.app) as bus:
        bus.publish_sync("order.placed", {"order_id": "o-1"}, source="shop")
        bus.drain_sync()

    def left() -> list[str]:
        return [thread.name for thread in {*threading.enumerate()} - before]

    wait_until(lambda: not [name for name in left() if name.startswith("lightbus")], "our threads end")
    assert len(left()) <= 1  # anyio keeps its worker thread for a while


# --- errors -------------------------------------------------------------------------------------


async def test_a_drain_timeout_reports_what_is_stuck() -> None:
    app = Lightbus("billing", concurrency=1, prefetch=1)
    begun, go_on = anyio.Event(), anyio.Event()

    @app.on("order.placed")
    async def charge(order: Order) -> None:
        begun.set()
        await go_on.wait()

    async with TestBus(app) as bus:
        await place(bus)
        await place(bus, "o-2")
        with anyio.fail_after(LIMIT):
            await begun.wait()
        with pytest.raises(errors.DrainTimeout) as caught:
            await bus.drain(timeout=0.3)
        go_on.set()
        await bus.drain()
    lines = str(caught.value).splitlines()
    assert lines[:2] == ["Not drained within 0.3 s.", "Still running:"]
    wanted = r'  charge of billing, for [\d.]+ s, attempt 1: order\.placed \{"order_id":"o-1"\}'
    assert re.fullmatch(wanted, lines[2])
    assert lines[3:] == [
        "In the queues:",
        "  billing.main: 1 event waiting, 1 in hand",
        "Provide what the handler waits for before draining, or set a longer drain(timeout=...).",
    ]


async def test_a_handler_that_handles_its_own_events_is_reported() -> None:
    app = Lightbus("echo")

    @app.event
    class Repeated:
        pass

    @app.on(Repeated)
    async def repeat(event: Repeated) -> None:
        await app.publish(Repeated())

    async with TestBus(app) as bus:
        for _ in range(10):
            await app.publish(Repeated())
        with pytest.raises(errors.DrainTimeout, match="Does a handler publish an event that it also handles"):
            await bus.drain(timeout=2)


async def test_an_app_can_be_in_one_bus_only(billing: Billing) -> None:
    async with TestBus(billing.app) as bus:
        with pytest.raises(
            errors.TestBusError, match=r"app 'billing' is already in a TestBus \(<TestBus of billing: "
        ) as caught:
            async with TestBus(Lightbus("shop"), billing.app):
                pass
        assert "TestBus(app, other_app)" in str(caught.value)
        with pytest.raises(errors.TestBusError, match="is already running"):
            async with bus:
                pass
        await place(bus)  # the first one still works
        await bus.drain()


def test_values_that_are_not_apps_are_refused() -> None:
    wrong: Any = "billing.bus:app"
    for apps, words in (
        ((), r"needs at least one app: TestBus\(app\)"),
        ((wrong,), "takes Lightbus apps, not 'billing.bus:app'. Import the app"),
        ((Lightbus("a"), Lightbus("a")), "two apps called 'a'"),
    ):
        with pytest.raises(errors.TestBusError, match=words):
            TestBus(*apps)
    with pytest.raises(errors.InvalidOption, match="timeout=-1"):
        TestBus(Lightbus("a"), timeout=-1)


async def test_unknown_names_are_errors_with_a_suggestion(billing: Billing) -> None:
    shop = Lightbus("shop")

    @shop.event
    class OrderPlaced:
        order_id: str

    class Other:
        pass

    async with TestBus(billing.app) as bus:
        for ask, words in (
            (
                lambda: bus.published("invoice.payed"),
                "No event 'invoice.payed' .* app 'billing'. Did you mean 'invoice.paid'",
            ),
            (
                lambda: bus.published(OrderPlaced),
                "OrderPlaced is not declared on app 'billing': it was declared on another app",
            ),
            (lambda: bus.published(Other), "Other is not declared on app 'billing': it is not an event class"),
        ):
            with pytest.raises(errors.UnknownEvent, match=words):
                ask()
        for ask, words in (
            (lambda: bus.handled("chrage"), r"bus.handled\('chrage'\): .* Did you mean 'charge'"),
            (lambda: bus.dead("invoice.deu"), "Did you mean 'invoice.due'"),
            (lambda: bus.failed(place), r"bus.failed\(place\): that is not a handler of app 'billing'. .*charge"),
        ):
            with pytest.raises(errors.TestBusError, match=words):
                ask()


async def test_publishing_an_event_without_a_handler_in_the_test_is_refused(billing: Billing) -> None:
    async with TestBus(billing.app) as bus:
        for event, source, words in (
            ("order.plced", "shop", "handles 'order.plced' from 'shop'. Did you mean 'order.placed'"),
            ("order.placed", "auth", "from 'auth'. It is handled from 'shop' only: source='shop'"),
            ("invoice.payd", "billing", "'invoice.payd' is not declared on app 'billing'. Did you mean 'invoice.paid'"),
        ):
            with pytest.raises(errors.UnknownEvent, match=words):
                await bus.publish(event, {}, source=source)
        with pytest.raises(errors.InvalidPayload, match="invoice_id"):
            await bus.publish("invoice.due", {"invoice_id": 7}, source="billing")


async def test_sync_methods_in_an_event_loop_name_the_async_ones(billing: Billing) -> None:
    bus = TestBus(billing.app)
    for call, words in (
        (bus.__enter__, r"Use `async with TestBus\(...\)`"),
        (bus.drain_sync, r"Use `await bus.drain\(\)`"),
        (lambda: bus.advance_sync(1), r"Use `await bus.advance\(...\)`"),
        (lambda: bus.publish_sync("a", {}), r"Use `await bus.publish\(...\)`"),
    ):
        with pytest.raises(errors.TestBusError, match=words):
            call()
    with pytest.raises(errors.TestBusError, match="enter it first"):
        await bus.drain()
    with pytest.raises(errors.TestBusError, match="enter it first"):
        bus.published()


async def test_a_handler_declared_after_the_start_is_an_error(billing: Billing) -> None:
    async with TestBus(billing.app) as bus:

        @billing.app.on("user.registered")
        def greet() -> None:
            pass

        with pytest.raises(errors.TestBusError, match="handler 'greet' of app 'billing' was declared after"):
            await bus.drain()


async def test_retries_keep_their_order() -> None:
    app = Lightbus("order")
    calls: list[str] = []

    @app.on("go", retry=Retry(delays=(100,)))
    def slowly() -> None:
        calls.append("slowly")
        if calls.count("slowly") < 2:
            raise ValueError

    @app.on("go", retry=Retry(delays=(1, 2)))
    def quickly() -> None:
        calls.append("quickly")
        if calls.count("quickly") < 3:
            raise ValueError

    async with TestBus(app) as bus:
        await bus.publish("go", {})
        await bus.drain()
    assert sorted(calls[:2]) == ["quickly", "slowly"]
    assert calls[2:] == ["quickly", "quickly", "slowly"]


async def test_an_app_outside_of_the_test_does_not_reach_its_own_broker(billing: Billing) -> None:
    shop = Lightbus("shop", url="amqp://production/")

    @shop.event
    class OrderPlaced:
        order_id: str

    async with TestBus(billing.app):
        with pytest.raises(errors.TestBusError, match=r"app 'shop' is not in the test \(<TestBus of billing: 0 pub"):
            await shop.publish(OrderPlaced(order_id="o-1"))
    assert shop.broker.masked == "amqp://production/"
