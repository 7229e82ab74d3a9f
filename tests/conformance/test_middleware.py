"""Middleware surrounds handlers: it sees what they raise, and what it raises decides. Observers get each outcome."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import anyio
import anyio.to_thread
import attrs
import pytest

from lightbus import Lightbus, Message, Next, NextSync, Outcome, Reject, Retry, current_message, errors
from tests.bus import OrderCancelled, OrderPlaced, dead_letters, eventually, left_in, reason, returned, running
from tests.patience import LIMIT

pytestmark = pytest.mark.anyio

MakeApp = Callable[..., Lightbus]
BOTH_LOOPS = pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
BOTH_KINDS = pytest.mark.parametrize("kind", ["async", "sync"])


class Notes:
    """A middleware with both forms, which notes when it begins and how the rest ended."""

    def __init__(self, name: str, notes: list[str]) -> None:
        self.name = name
        self.notes = notes

    async def handle(self, message: Message, call_next: Next) -> None:
        with self.around(message):
            await call_next()

    def handle_sync(self, message: Message, call_next: NextSync) -> None:
        with self.around(message):
            call_next()

    @contextlib.contextmanager
    def around(self, message: Message) -> Iterator[None]:
        self.notes.append(f"{self.name} begins {message.event}")
        try:
            yield
        except BaseException as error:
            self.notes.append(f"{self.name} sees {type(error).__name__}")
            raise
        self.notes.append(f"{self.name} ends")


@attrs.frozen
class OrderCancelledWithReason:
    """Does not fit `order.placed`."""

    why: str


def handle(app: Lightbus, kind: str, function: Callable[[OrderPlaced], object], **options: Any) -> None:
    """Register a handler that calls this function, async or sync."""
    if kind == "async":

        async def handler(order: OrderPlaced) -> None:
            function(order)
    else:

        def handler(order: OrderPlaced) -> None:  # type: ignore[misc]
            function(order)

    app.on("order.placed", name="handler", **options)(handler)


@BOTH_LOOPS
@BOTH_KINDS
async def test_the_first_middleware_is_the_outermost_and_a_handlers_own_are_inside(
    kind: str, shop: Lightbus, billing: Lightbus
) -> None:
    notes: list[str] = []
    billing.middleware(Notes("first", notes))
    billing.middleware(Notes("second", notes))
    handle(billing, kind, lambda _: notes.append("handler"), middleware=[Notes("own", notes)])
    async with running(shop, billing, queues=["main"]):
        await shop.publish(OrderPlaced(number=1))
        await eventually(lambda: "first ends" in notes)
    assert notes == [
        "first begins order.placed",
        "second begins order.placed",
        "own begins order.placed",
        "handler",
        "own ends",
        "second ends",
        "first ends",
    ]
    assert await left_in(billing) == []


async def test_an_async_function_wraps_async_handlers_and_runs_in_their_context(
    shop: Lightbus, billing: Lightbus
) -> None:
    seen: list[tuple[str, int]] = []

    @billing.middleware
    async def note(message: Message, call_next: Next) -> None:
        seen.append((message.event, message.attempt))
        await call_next()

    handled: list[int] = []
    handle(billing, "async", lambda order: handled.append(order.number))
    async with running(shop, billing, queues=["main"]):
        await shop.publish_many([OrderPlaced(number=number) for number in range(100)])
        await eventually(lambda: sorted(handled), list(range(100)))
    assert seen == [("order.placed", 1)] * 100


async def test_a_sync_function_wraps_sync_handlers_in_their_thread(shop: Lightbus, billing: Lightbus) -> None:
    threads: list[tuple[str, int]] = []

    @billing.middleware
    def note(message: Message, call_next: NextSync) -> None:
        threads.append(("middleware", threading.get_ident()))
        call_next()

    handle(billing, "sync", lambda _: threads.append(("handler", threading.get_ident())))
    async with running(shop, billing, queues=["main"]):
        await shop.publish(OrderPlaced(number=1))
        await eventually(lambda: len(threads), 2)
    (outer, outer_thread), (inner, inner_thread) = threads
    assert (outer, inner) == ("middleware", "handler")
    assert outer_thread == inner_thread != threading.get_ident()


@BOTH_LOOPS
@BOTH_KINDS
async def test_middleware_sees_what_the_handler_raises_and_the_event_is_retried(
    kind: str, shop: Lightbus, billing: Lightbus
) -> None:
    notes: list[str] = []
    billing.middleware(Notes("outer", notes))

    def fail(order: OrderPlaced) -> None:
        raise ValueError(f"no stock for {order.number}")

    handle(billing, kind, fail)
    async with running(shop, billing, queues=["main"]):
        await shop.publish(OrderPlaced(number=9))
        (dead,) = await dead_letters(billing)
    assert reason(dead) == "ValueError: no stock for 9"
    assert notes == ["outer begins order.placed", "outer sees ValueError"] * 3


@BOTH_KINDS
@pytest.mark.parametrize(
    ("given", "seen", "expected"),
    [
        ("rejected", "Reject", "Reject: never"),
        ("undecodable", "DecodeError", "lightbus.errors.DecodeError"),
    ],
)
async def test_middleware_sees_rejects_and_decoding_errors(
    kind: str, given: str, seen: str, expected: str, shop: Lightbus, billing: Lightbus
) -> None:
    notes: list[str] = []
    billing.middleware(Notes("outer", notes))

    def reject(order: OrderPlaced) -> None:
        raise Reject("never")

    handle(billing, kind, reject, retry=Retry.none())
    if given == "undecodable":
        billing.handlers.clear()
        if kind == "async":

            @billing.on("order.placed", retry=Retry.none())
            async def handler(order: OrderCancelledWithReason) -> None: ...
        else:

            @billing.on("order.placed", retry=Retry.none())
            def handler(order: OrderCancelledWithReason) -> None: ...

    async with running(shop, billing, queues=["main"]):
        await shop.publish(OrderPlaced(number=1))
        (dead,) = await dead_letters(billing)
    assert expected in reason(dead)
    assert notes == ["outer begins order.placed", f"outer sees {seen}"]


@BOTH_LOOPS
async def test_middleware_sees_the_cancellation_of_a_handler_that_exceeds_its_timeout(
    shop: Lightbus, billing: Lightbus, anyio_backend: str
) -> None:
    notes: list[str] = []
    billing.middleware(Notes("outer", notes))

    @billing.on("order.placed", timeout=0.1, retry=Retry.none())
    async def hang(order: OrderPlaced) -> None:
        await anyio.sleep_forever()

    async with running(shop, billing, queues=["main"]):
        await shop.publish(OrderPlaced(number=1))
        (dead,) = await dead_letters(billing)
    assert reason(dead).startswith("lightbus.errors.HandlerTimeout: handler 'hang' ran longer than its timeout")
    assert notes == [
        "outer begins order.placed",
        "outer sees CancelledError" if anyio_backend == "asyncio" else "outer sees Cancelled",
    ]


@BOTH_KINDS
async def test_what_a_middleware_raises_decides(kind: str, shop: Lightbus, billing: Lightbus) -> None:
    handled: list[int] = []

    class Refuse:
        async def handle(self, message: Message, call_next: Next) -> None:
            await call_next()
            raise Reject("after the handler")

        def handle_sync(self, message: Message, call_next: NextSync) -> None:
            call_next()
            raise Reject("after the handler")

    billing.middleware(Refuse)  # a class is instantiated
    handle(billing, kind, lambda order: handled.append(order.number))
    async with running(shop, billing, queues=["main"]):
        await shop.publish(OrderPlaced(number=1))
        (dead,) = await dead_letters(billing)
    assert handled == [1]
    assert reason(dead) == "lightbus.errors.Reject: after the handler"


@BOTH_LOOPS
@BOTH_KINDS
async def test_an_event_is_skipped_if_a_middleware_does_not_call_next(
    kind: str, shop: Lightbus, billing: Lightbus
) -> None:
    outcomes: list[Outcome] = []
    handled: list[int] = []

    class OnlyEven:
        async def handle(self, message: Message, call_next: Next) -> None:
            if b'"number":2' in message.body:
                await call_next()

        def handle_sync(self, message: Message, call_next: NextSync) -> None:
            if b'"number":2' in message.body:
                call_next()

    billing.observe(outcomes.append)
    billing.middleware(Notes("outer", []))
    billing.middleware(OnlyEven())
    handle(billing, kind, lambda order: handled.append(order.number))
    async with running(shop, billing, queues=["main"]):
        await shop.publish_many([OrderPlaced(number=1), OrderPlaced(number=2)])
        await eventually(lambda: len(outcomes), 2)
    assert handled == [2]
    assert sorted(outcome.kind for outcome in outcomes) == ["handled", "skipped"]
    assert await left_in(billing) == []
    assert await left_in(billing, "billing.dead") == []


@BOTH_LOOPS
@BOTH_KINDS
async def test_an_event_is_handled_if_a_middleware_catches_what_the_handler_raises(
    kind: str, shop: Lightbus, billing: Lightbus
) -> None:
    outcomes: list[Outcome] = []

    class Ignore:
        async def handle(self, message: Message, call_next: Next) -> None:
            with contextlib.suppress(KeyError):
                await call_next()

        def handle_sync(self, message: Message, call_next: NextSync) -> None:
            with contextlib.suppress(KeyError):
                call_next()

    def fail(order: OrderPlaced) -> None:
        raise KeyError(order.number)

    billing.observe(outcomes.append)
    billing.middleware(Ignore)
    handle(billing, kind, fail)
    async with running(shop, billing, queues=["main"]):
        await shop.publish(OrderPlaced(number=1))
        await eventually(lambda: [outcome.kind for outcome in outcomes], ["handled"])
    assert await left_in(billing) == []
    assert await left_in(billing, "billing.dead") == []


# --- wrong middleware: the event fails, with an error that names the middleware -----------------


class Twice:
    async def handle(self, message: Message, call_next: Next) -> None:
        await call_next()
        await call_next()

    def handle_sync(self, message: Message, call_next: NextSync) -> None:
        call_next()
        call_next()


@BOTH_LOOPS
@BOTH_KINDS
async def test_a_middleware_that_calls_next_twice_fails_after_one_run(
    kind: str, shop: Lightbus, billing: Lightbus
) -> None:
    handled: list[int] = []
    billing.middleware(Twice())
    handle(billing, kind, lambda order: handled.append(order.number), retry=Retry.none())
    async with running(shop, billing, queues=["main"]):
        await shop.publish(OrderPlaced(number=1))
        (dead,) = await dead_letters(billing)
    assert handled == [1]
    assert reason(dead).startswith("lightbus.errors.MiddlewareError: middleware Twice called call_next twice.")


@BOTH_LOOPS
@pytest.mark.filterwarnings("error::RuntimeWarning")
async def test_a_middleware_that_does_not_await_next_fails_and_nothing_is_lost(
    shop: Lightbus, billing: Lightbus
) -> None:
    handled: list[int] = []

    @billing.middleware
    async def forgets(message: Message, call_next: Next) -> None:
        call_next()  # type: ignore[unused-coroutine]

    handle(billing, "async", lambda order: handled.append(order.number), retry=Retry.none())
    async with running(shop, billing, queues=["main"]):
        await shop.publish(OrderPlaced(number=1))
        (dead,) = await dead_letters(billing)
    assert handled == []
    assert "returned before the handler had ended. Write `await call_next()`." in reason(dead)
    assert "forgets" in reason(dead)


@BOTH_LOOPS
async def test_a_middleware_that_hides_a_timeout_does_not_make_the_event_handled(
    shop: Lightbus, billing: Lightbus
) -> None:
    @billing.middleware
    async def swallow(message: Message, call_next: Next) -> None:
        try:
            await call_next()
        except BaseException:  # noqa: BLE001
            return

    @billing.on("order.placed", timeout=0.1, retry=Retry.none())
    async def hang(order: OrderPlaced) -> None:
        await anyio.sleep_forever()

    async with running(shop, billing, queues=["main"]):
        await shop.publish(OrderPlaced(number=1))
        (dead,) = await dead_letters(billing)
    assert reason(dead).startswith("lightbus.errors.HandlerTimeout: handler 'hang' ran longer than its timeout")


async def test_a_time_limit_in_a_middleware_that_raises_nothing_does_not_make_the_event_handled(
    shop: Lightbus, billing: Lightbus
) -> None:
    @billing.middleware
    async def limit(message: Message, call_next: Next) -> None:
        with anyio.move_on_after(0.05):
            await call_next()

    @billing.on("order.placed", retry=Retry.none())
    async def hang(order: OrderPlaced) -> None:
        await anyio.sleep_forever()

    async with running(shop, billing, queues=["main"]):
        await shop.publish(OrderPlaced(number=1))
        (dead,) = await dead_letters(billing)
    assert "returned normally although the handler was cancelled (CancelledError)" in reason(dead)


async def test_an_app_is_refused_at_start_if_its_middleware_cannot_wrap_a_handler(billing: Lightbus) -> None:
    @billing.middleware
    async def note(message: Message, call_next: Next) -> None:
        await call_next()

    handle(billing, "sync", lambda _: None)
    with pytest.raises(errors.InvalidMiddleware) as raised:
        billing.consumer()
    assert "is async, and cannot wrap the sync handler 'handler', which runs in a thread" in str(raised.value)
    assert "async def handle(self, message, call_next) and def handle_sync(self, message, call_next)" in str(
        raised.value
    )


# --- the current message ----------------------------------------------------------------------


@BOTH_LOOPS
@BOTH_KINDS
async def test_the_current_message_is_known_in_what_a_handler_calls_and_nowhere_else(
    kind: str, shop: Lightbus, billing: Lightbus
) -> None:
    seen: list[Message | None] = []
    handle(billing, kind, lambda _: seen.append(current_message()))
    async with running(shop, billing, queues=["main"]):
        receipt = await shop.publish(OrderPlaced(number=1))
        await eventually(lambda: len(seen), 1)
        assert current_message() is None
    (message,) = seen
    assert message is not None
    assert (message.id, message.event, message.source, message.attempt) == (receipt.id, "order.placed", "shop", 1)


# --- before a publish -------------------------------------------------------------------------


async def test_on_publish_sees_each_event_and_may_add_headers(shop: Lightbus, billing: Lightbus) -> None:
    published: list[object] = []
    received: list[tuple[int, object, object]] = []

    @shop.on_publish
    def tenant(event: object, headers: dict[str, Any]) -> None:
        published.append(event)
        headers["tenant"] = "acme"

    @billing.on("order.placed")
    async def note(order: OrderPlaced, message: Message) -> None:
        received.append((order.number, message.headers.get("tenant"), message.headers.get("mine")))
        if message.attempt == 1:
            raise ValueError("once")

    events = [OrderPlaced(number=number) for number in range(4)]
    async with running(shop, billing, queues=["main"]):
        await shop.publish(events[0], headers={"mine": "yes"})
        await shop.publish_many(events[1:3])
        await anyio.to_thread.run_sync(shop.publish_sync, events[3])
        await eventually(lambda: len(received), 8)
    assert published == events  # and not for the copies of failed events
    assert sorted(received) == sorted(
        [(0, "acme", "yes")] * 2 + [(number, "acme", None) for number in (1, 2, 3) for _ in range(2)]
    )


async def test_nothing_is_sent_if_on_publish_raises(shop: Lightbus, billing: Lightbus) -> None:
    @shop.on_publish
    def refuse(event: object, headers: dict[str, Any]) -> None:
        if isinstance(event, OrderPlaced) and event.number == 1:
            raise RuntimeError("no tenant")

    handled: list[int] = []
    handle(billing, "async", lambda order: handled.append(order.number))
    async with running(shop, billing, queues=["main"]):
        with pytest.raises(RuntimeError, match="no tenant"):
            await shop.publish(OrderPlaced(number=1))
        await shop.publish(OrderPlaced(number=2))
        await eventually(lambda: handled, [2])


# --- outcomes ---------------------------------------------------------------------------------


@BOTH_LOOPS
@BOTH_KINDS
async def test_each_attempt_has_an_outcome(kind: str, shop: Lightbus, billing: Lightbus) -> None:
    outcomes: list[Outcome] = []
    billing.observe(outcomes.append)

    def work(order: OrderPlaced) -> None:
        message = current_message()
        assert message is not None
        if order.number == 2 or message.attempt == 1:
            raise ValueError(f"attempt {message.attempt}")

    handle(billing, kind, work)
    async with running(shop, billing, queues=["main"]):
        receipts = [await shop.publish(OrderPlaced(number=number)) for number in (1, 2)]
        await dead_letters(billing)
        await eventually(lambda: len(outcomes), 5)
    shown = [
        [
            (one.kind, one.attempt, one.delay, None if one.error is None else str(one.error))
            for one in outcomes
            if one.message.id == receipt.id
        ]
        for receipt in receipts
    ]
    assert shown == [
        [("retried", 1, 0.05, "attempt 1"), ("handled", 2, None, None)],
        [("retried", 1, 0.05, "attempt 1"), ("retried", 2, 0.1, "attempt 2"), ("dead", 3, None, "attempt 3")],
    ]
    assert {(one.app, one.handler, one.queue) for one in outcomes} == {("billing", "handler", "billing.main")}
    assert all(one.seconds > 0 for one in outcomes)


@BOTH_LOOPS
async def test_an_attempt_is_redelivered_if_the_worker_is_cancelled_before_its_copy_is_confirmed(
    shop: Lightbus, billing: Lightbus, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes: list[Outcome] = []
    billing.observe(outcomes.append)
    copying = anyio.Event()

    def fail(order: OrderPlaced) -> None:
        raise ValueError("no stock")

    async def never_confirm(publication: object, **_: object) -> None:
        copying.set()
        await anyio.sleep_forever()

    handle(billing, "async", fail)
    monkeypatch.setattr(billing.publisher, "publish", never_confirm)
    async with running(shop), anyio.create_task_group() as tasks:
        await tasks.start(billing.consumer().run)
        await shop.publish(OrderPlaced(number=1))
        await copying.wait()
        tasks.cancel_scope.cancel()
    assert [(one.kind, str(one.error)) for one in outcomes] == [("redelivered", "no stock")]
    assert len(await returned(billing)) == 1


async def test_an_attempt_whose_copy_the_broker_refuses_is_dead_and_not_retried(
    shop: Lightbus, billing: Lightbus, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes: list[Outcome] = []
    billing.observe(outcomes.append)

    def fail(order: OrderPlaced) -> None:
        raise ValueError("no stock")

    async def refuse(publication: object, **_: object) -> NoReturn:
        raise errors.PublishRefused("too large")

    handle(billing, "async", fail)
    monkeypatch.setattr(billing.publisher, "publish", refuse)
    async with running(shop, billing, queues=["main"]):
        await shop.publish(OrderPlaced(number=1))
        await dead_letters(billing)
        await eventually(lambda: [(one.kind, one.delay) for one in outcomes], [("dead", None)])


async def test_each_publish_has_an_outcome_where_its_caller_waits(shop: Lightbus, billing: Lightbus) -> None:
    outcomes: list[tuple[str, str, int]] = []

    def note(outcome: Outcome) -> None:
        assert outcome.receipt is not None
        outcomes.append((outcome.kind, outcome.receipt.id, threading.get_ident()))

    shop.observe(note)
    handle(billing, "async", lambda _: None)
    async with running(shop, billing, queues=["main"]):
        first = await shop.publish(OrderPlaced(number=1))
        many = await shop.publish_many([OrderPlaced(number=2), OrderCancelled(number=3)])
    assert outcomes == [("published", receipt.id, threading.get_ident()) for receipt in (first, *many)]


async def test_the_outcome_of_a_publish_has_its_delay(shop: Lightbus) -> None:
    outcomes: list[Outcome] = []
    shop.observe(outcomes.append)
    await shop.publish(OrderPlaced(number=1))
    await shop.publish(OrderPlaced(number=2), delay=5)
    assert [one.delay for one in outcomes] == [None, 5]


async def test_an_event_that_no_handler_matches_has_an_outcome_without_a_handler(
    shop: Lightbus, make_app: MakeApp
) -> None:
    before, outcomes = make_app("billing"), []
    before.on("order.*", name="any")(lambda: None)
    async with running(before, queues=["main"]):
        pass
    after = make_app("billing", retry=Retry.none())
    after.observe(outcomes.append)
    after.on("order.cancelled", name="cancelled")(lambda: None)
    async with running(shop, after, queues=["main"]):
        await shop.publish(OrderPlaced(number=1))
        await eventually(lambda: [(one.kind, one.handler) for one in outcomes], [("dead", None)])
    assert isinstance(outcomes[0].error, errors.NoHandler)


async def test_an_observer_that_raises_changes_nothing(
    shop: Lightbus, billing: Lightbus, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[str] = []

    def broken(outcome: Outcome) -> None:
        raise RuntimeError("the metrics are broken")

    billing.observe(broken)
    billing.observe(lambda outcome: seen.append(outcome.kind))
    handle(billing, "async", lambda _: None)
    async with running(shop, billing, queues=["main"]):
        await shop.publish(OrderPlaced(number=1))
        await eventually(lambda: seen, ["handled"])
    assert await left_in(billing) == []
    (record,) = [one for one in caplog.records if "observer of app 'billing' failed" in one.getMessage()]
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None


async def test_a_handler_left_behind_after_its_timeout_has_one_outcome(shop: Lightbus, billing: Lightbus) -> None:
    outcomes: list[Outcome] = []
    billing.observe(outcomes.append)
    release = threading.Event()
    handle(billing, "sync", lambda _: release.wait(LIMIT), timeout=1, retry=Retry.none())
    async with running(shop, billing, queues=["main"]):
        await shop.publish(OrderPlaced(number=1))
        await eventually(lambda: [one.kind for one in outcomes], ["dead"])
        release.set()
        await shop.publish(OrderPlaced(number=2))
        await eventually(lambda: [one.kind for one in outcomes], ["dead", "handled"])
    assert outcomes[0].seconds >= 1
    assert isinstance(outcomes[0].error, errors.HandlerTimeout)
