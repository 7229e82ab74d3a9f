"""What can happen to an event: it is acked, retried, or dead-lettered with a reason, but never lost."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from lightbus import Lightbus, Message, Reject, Retry
from lightbus.transport import Publication
from tests.bus import (
    LIMIT,
    QUICK,
    OrderCancelled,
    OrderPlaced,
    dead_letters,
    eventually,
    left_in,
    reason,
    running,
    stranger,
)

pytestmark = pytest.mark.anyio

MakeApp = Callable[..., Lightbus]


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_an_event_is_acked_when_its_handler_returns(shop: Lightbus, billing: Lightbus) -> None:
    received: list[int] = []
    billing.on("order.placed")(_collects(received))
    async with running(shop, billing):
        await shop.publish_many([OrderPlaced(number=n) for n in range(300)])
        await eventually(lambda: len(received), 300)
    assert sorted(received) == list(range(300))
    assert await left_in(billing) == []
    assert await left_in(billing, "billing.dead") == []


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_an_event_whose_handler_raises_is_retried_and_then_dead_lettered(
    shop: Lightbus, billing: Lightbus
) -> None:
    attempts: list[tuple[int, str, str, str, bool, float]] = []

    @billing.on("order.placed")
    async def fail(order: OrderPlaced, message: Message) -> None:
        attempts.append(
            (message.attempt, message.id, message.event, message.source, message.redelivered, time.monotonic())
        )
        raise ValueError(f"no stock for {order.number}")

    async with running(shop, billing):
        receipt = await shop.publish(OrderPlaced(number=9), headers={"tenant": "acme"})
        (dead,) = await dead_letters(billing)
    assert [attempt[:5] for attempt in attempts] == [(n, receipt.id, "order.placed", "shop", False) for n in (1, 2, 3)]
    # The clocks of the queue and of this test start at slightly different times.
    assert attempts[1][5] - attempts[0][5] > 0.045
    assert attempts[2][5] - attempts[1][5] > 0.095
    headers = dead.properties["headers"]
    assert reason(dead) == "ValueError: no stock for 9"
    assert "raise ValueError" in headers["lightbus-error-traceback"]
    assert headers["lightbus-handler"] == "fail"
    assert headers["lightbus-attempt"] == 3
    assert headers["lightbus-source"] == "shop"
    assert headers["lightbus-routing-key"] == "order.placed"
    assert headers["lightbus-queue"] == "billing.main"
    assert headers["tenant"] == "acme"
    assert dead.properties["message_id"] == receipt.id
    assert dead.body == b'{"note":"","number":9}'
    assert await left_in(billing) == []


async def test_an_event_is_acked_when_a_retry_succeeds(shop: Lightbus, billing: Lightbus) -> None:
    attempts: list[int] = []

    @billing.on("order.placed")
    async def fail_twice(message: Message) -> None:
        attempts.append(message.attempt)
        if message.attempt < 3:
            raise ConnectionError("the bank does not answer")

    async with running(shop, billing) as bus:
        await shop.publish(OrderPlaced(number=1))
        await eventually(lambda: attempts, [1, 2, 3])
        await bus.quiet(billing)
    assert await left_in(billing, "billing.dead") == []
    assert attempts == [1, 2, 3]


async def test_sync_functions_are_retried(shop: Lightbus, billing: Lightbus) -> None:
    attempts: list[int] = []

    @billing.on("order.placed")
    def fail(message: Message) -> None:
        attempts.append(message.attempt)
        raise ValueError("no")

    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1))
        (dead,) = await dead_letters(billing)
    assert attempts == [1, 2, 3]
    assert reason(dead) == "ValueError: no"


POLICIES: dict[str, tuple[Retry | None, Exception, int]] = {
    "none": (Retry.none(), ValueError("x"), 1),
    "one delay": (Retry(delays=(0.05,)), ValueError("x"), 2),
    "three delays": (Retry(delays=(0.05, 0.05, 0.05)), ValueError("x"), 4),
    "on this error": (Retry(delays=(0.05,), on=ConnectionError), ConnectionResetError("x"), 2),
    "on another error": (Retry(delays=(0.05,), on=ConnectionError), ValueError("x"), 1),
    "on these errors": (Retry(delays=(0.05,), on=(ConnectionError, ValueError)), ValueError("x"), 2),
    "never on this error": (Retry(delays=(0.05,), never=LookupError), KeyError("x"), 1),
    "never on another": (Retry(delays=(0.05,), never=LookupError), ValueError("x"), 2),
    "jitter": (Retry(delays=(0.05,), jitter=0.9), ValueError("x"), 2),
    "the app's": (None, ValueError("x"), 3),
    "the app's, rejected": (None, Reject("x"), 1),
}
"""The retry policy, the error, and the number of attempts."""


async def test_the_policy_decides_the_number_of_attempts(shop: Lightbus, billing: Lightbus) -> None:
    attempts: dict[str, list[int]] = {name: [] for name in POLICIES}

    def fail_as(name: str, policy: Retry | None, error: Exception) -> None:
        @billing.on("order.placed", name=name, retry=policy)
        async def fail(message: Message) -> None:
            attempts[name].append(message.attempt)
            raise error

    for name, (policy, error, _) in POLICIES.items():
        fail_as(name, policy, error)
    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1))
        dead = await dead_letters(billing, len(POLICIES))
    wanted = {name: count for name, (_, _, count) in POLICIES.items()}
    assert attempts == {name: list(range(1, count + 1)) for name, count in wanted.items()}
    headers = [letter.properties["headers"] for letter in dead]
    assert {one["lightbus-handler"]: one["lightbus-attempt"] for one in headers} == wanted


async def test_a_rejected_event_is_a_dead_letter_at_once_with_its_reason(shop: Lightbus, billing: Lightbus) -> None:
    @billing.on("order.placed")
    async def refuse(message: Message) -> None:
        raise Reject("we do not deliver there")

    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1))
        (dead,) = await dead_letters(billing)
    assert reason(dead) == "lightbus.errors.Reject: we do not deliver there"


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_an_async_handler_that_exceeds_its_timeout_is_cancelled_and_retried(
    shop: Lightbus, billing: Lightbus
) -> None:
    attempts: list[int] = []

    @billing.on("order.placed", timeout=0.1, retry=Retry(delays=(0.05,)))
    async def sleep(message: Message) -> None:
        attempts.append(message.attempt)
        await anyio.sleep(30)

    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1))
        (dead,) = await dead_letters(billing)
    assert attempts == [1, 2]
    assert "HandlerTimeout: handler 'sleep' ran longer than its timeout of 0.1 s" in reason(dead)
    assert "timeout=" in reason(dead)


async def test_a_late_handler_does_not_shorten_the_timeout_of_the_next(shop: Lightbus, billing: Lightbus) -> None:
    attempts: list[tuple[int, int]] = []

    @billing.on("order.placed", timeout=0.5)
    async def handle(order: OrderPlaced, message: Message) -> None:
        if order.number == 0:
            with contextlib.suppress(anyio.get_cancelled_exc_class()):  # it cleans up and returns
                await anyio.sleep(LIMIT)
        else:
            await anyio.sleep(0.01)
        attempts.append((order.number, message.attempt))

    async with running(shop, billing, concurrency=1):
        await shop.publish_many([OrderPlaced(number=number) for number in range(4)])
        await eventually(lambda: len(attempts), 4)
    assert attempts == [(number, 1) for number in range(4)]


async def test_a_sync_handler_that_exceeds_its_timeout_is_retried_and_delays_no_other(
    shop: Lightbus, billing: Lightbus
) -> None:
    attempts: list[int] = []
    received: list[int] = []
    end = threading.Event()

    @billing.on("order.placed", timeout=0.1, retry=Retry(delays=(0.05,) * 30))  # on a busy machine the third is late
    def block(message: Message) -> None:
        attempts.append(message.attempt)
        if message.attempt < 3:
            end.wait(LIMIT)

    billing.on("order.cancelled")(_collects(received))
    async with running(shop, billing, concurrency=1):
        await shop.publish(OrderPlaced(number=1))
        await shop.publish(OrderCancelled(number=2))
        await eventually(lambda: (attempts[:3], received), ([1, 2, 3], [2]))
        end.set()
    assert await left_in(billing, "billing.dead") == []


async def test_a_timeout_error_of_the_handler_keeps_its_message(shop: Lightbus, billing: Lightbus) -> None:
    @billing.on("order.placed", retry=Retry.none())
    async def fail() -> None:
        with anyio.fail_after(0.01):
            await anyio.sleep(5)

    @billing.on("order.cancelled", retry=Retry.none())
    async def fail_otherwise() -> None:
        raise TimeoutError("the bank took too long")

    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1))
        await shop.publish(OrderCancelled(number=1))
        dead = await dead_letters(billing, 2)
    assert {reason(one) for one in dead} == {"TimeoutError: ", "TimeoutError: the bank took too long"}


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_a_reject_in_a_task_group_is_a_dead_letter_at_once_with_its_reason(
    shop: Lightbus, billing: Lightbus, caplog: pytest.LogCaptureFixture
) -> None:
    attempts: list[int] = []

    async def refuse(order: OrderPlaced) -> None:
        raise Reject(f"nothing to pay for {order.number}")

    async def fail() -> None:
        with anyio.CancelScope(shield=True):  # also if the other task has ended the group
            await anyio.lowlevel.checkpoint()
        raise OSError("the bank is away")

    @billing.on("order.placed")
    async def charge(order: OrderPlaced, message: Message) -> None:
        attempts.append(message.attempt)
        async with anyio.create_task_group() as tasks:
            if order.number == 2:
                tasks.start_soon(fail)
            tasks.start_soon(refuse, order)

    async with running(shop, billing):
        await shop.publish_many([OrderPlaced(number=1), OrderPlaced(number=2)])
        dead = await dead_letters(billing, 2)
    assert attempts == [1, 1]
    assert {reason(one) for one in dead} == {f"lightbus.errors.Reject: nothing to pay for {n}" for n in (1, 2)}
    logged = [record for record in caplog.records if "dead-lettered" in record.getMessage()]
    assert ["Reject: nothing to pay for" in record.getMessage() for record in logged] == [True, True]
    traces = [str(one.properties["headers"].get("lightbus-error-traceback")) for one in dead]
    assert sum("the bank is away" in trace for trace in traces) == 1  # the other failures are included


class Panic(BaseException):
    """Like the panic of a Rust extension."""


LEAVE: dict[str, Callable[[], None]] = {
    "SystemExit: 3": lambda: sys.exit(3),
    "KeyError: 'gone'": lambda: _raise(KeyError("gone")),
    "KeyboardInterrupt: ": lambda: _raise(KeyboardInterrupt()),
    "GeneratorExit: ": lambda: _raise(GeneratorExit()),
    "tests.conformance.test_outcomes.Panic: index out of bounds": lambda: _raise(Panic("index out of bounds")),
    "SystemExit: of a group": lambda: _raise(BaseExceptionGroup("", [ValueError("two"), SystemExit("of a group")])),
    "ExceptionGroup: both": lambda: _raise(ExceptionGroup("both", [ValueError("one"), ValueError("two")])),
}


async def test_no_exception_of_a_handler_ends_the_worker(shop: Lightbus, billing: Lightbus) -> None:
    received: list[int] = []

    def leave_as(name: str, leave: Callable[[], None]) -> None:
        @billing.on("order.placed", name=f"{name}, async", retry=Retry.none())
        async def leave_the_loop() -> None:
            leave()

        @billing.on("order.placed", name=f"{name}, plain", retry=Retry.none())
        def leave_the_thread() -> None:
            leave()

    for name, leave in LEAVE.items():
        leave_as(name, leave)
    billing.on("order.cancelled")(_collects(received))
    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1))
        dead = await dead_letters(billing, 2 * len(LEAVE))
        await shop.publish(OrderCancelled(number=2))
        await eventually(lambda: received, [2])
    assert len(dead) == 2 * len(LEAVE)
    for letter in dead:
        name = letter.properties["headers"]["lightbus-handler"].rpartition(",")[0]
        assert reason(letter).startswith(name)


@pytest.mark.parametrize(("policy", "attempts"), [(QUICK, 1), (Retry(delays=(0.05,), on=BaseException), 2)])
async def test_a_base_exception_is_retried_only_by_policy_and_affects_no_other_event(
    shop: Lightbus, billing: Lightbus, policy: Retry, attempts: int
) -> None:
    began: list[int] = []
    received: list[int] = []

    @billing.on("order.placed", retry=policy)
    async def panic(order: OrderPlaced, message: Message) -> None:
        if order.number == 3:
            began.append(message.attempt)
            raise Panic
        await eventually(lambda: began)  # these run concurrently
        received.append(order.number)

    async with running(shop, billing):
        await shop.publish_many([OrderPlaced(number=number) for number in range(6)])
        await dead_letters(billing)
        await eventually(lambda: sorted(received), [0, 1, 2, 4, 5])
    assert began == list(range(1, attempts + 1))
    assert await left_in(billing) == []


async def test_a_handler_that_cancels_itself_fails_without_stopping_the_worker(make_app: MakeApp) -> None:
    import asyncio

    shop = make_app("shop")
    shop.event(OrderPlaced)

    @shop.on("order.placed", retry=Retry.none())
    async def await_what_was_cancelled() -> None:
        task = asyncio.ensure_future(asyncio.sleep(30))
        asyncio.get_running_loop().call_soon(task.cancel)
        await task

    async with running(shop):
        await shop.publish(OrderPlaced(number=1))
        (dead,) = await dead_letters(shop)
        await shop.publish(OrderPlaced(number=2))
        await dead_letters(shop)
    assert "CancelledError" in reason(dead)


async def test_a_failing_handler_never_reruns_the_other_handlers(shop: Lightbus, billing: Lightbus) -> None:
    runs: dict[str, list[int]] = {"good": [], "bad": [], "also_good": []}

    @billing.on("order.placed")
    async def good(message: Message) -> None:
        runs["good"].append(message.attempt)

    @billing.on("order.*")
    async def bad(message: Message) -> None:
        runs["bad"].append(message.attempt)
        raise ValueError("no")

    @billing.on("#")
    def also_good(message: Message) -> None:
        if message.source == "shop":
            runs["also_good"].append(message.attempt)

    async with running(shop, billing) as bus:
        await shop.publish(OrderPlaced(number=1))
        (dead,) = await dead_letters(billing)
        await bus.quiet(billing)
    assert runs == {"good": [1], "bad": [1, 2, 3], "also_good": [1]}
    assert dead.properties["headers"]["lightbus-handler"] == "bad"


async def test_two_failing_handlers_are_each_retried_and_dead_lettered(shop: Lightbus, billing: Lightbus) -> None:
    runs: dict[str, list[int]] = {"one": [], "two": []}

    @billing.on("order.placed", retry=Retry(delays=(0.05,)))
    async def one(message: Message) -> None:
        runs["one"].append(message.attempt)
        raise ValueError("one")

    @billing.on("order.placed", retry=Retry(delays=(0.05, 0.05)))
    def two(message: Message) -> None:
        runs["two"].append(message.attempt)
        raise ValueError("two")

    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1))
        dead = await dead_letters(billing, 2)
    assert runs == {"one": [1, 2], "two": [1, 2, 3]}
    assert {reason(letter) for letter in dead} == {"ValueError: one", "ValueError: two"}


@pytest.mark.parametrize(("level", "traces"), [(logging.INFO, 1), (logging.DEBUG, 3)], ids=["info", "debug"])
async def test_each_attempt_is_logged_with_its_traceback_at_debug_level(
    shop: Lightbus, billing: Lightbus, caplog: pytest.LogCaptureFixture, level: int, traces: int
) -> None:
    @billing.on("order.placed")
    async def fail(order: OrderPlaced) -> None:
        raise LookupError("nothing there")

    async with running(shop, billing):
        with caplog.at_level(level, "lightbus"):
            await shop.publish(OrderPlaced(number=1))
            await dead_letters(billing)
            failures = "fail failed on"
            await eventually(lambda: len([one for one in caplog.records if failures in one.getMessage()]), 3)
    logged = [record for record in caplog.records if failures in record.getMessage() and record.exc_info]
    assert len(logged) == traces
    assert logged[-1].levelno == logging.ERROR


async def test_an_event_that_no_handler_matches_is_retried_and_the_warning_names_unbind(
    shop: Lightbus, billing: Lightbus, caplog: pytest.LogCaptureFixture
) -> None:
    billing.on("order.placed")(lambda: None)
    async with running(shop, billing), stranger(billing) as channel:
        # A binding of a handler that was removed.
        await anyio.to_thread.run_sync(channel.queue_bind, "billing.main", "lightbus", "order.cancelled")
        with caplog.at_level(logging.WARNING, "lightbus"):
            await shop.publish(OrderCancelled(number=1))
            (dead,) = await dead_letters(billing)
    assert "NoHandler" in reason(dead)
    assert "'order.cancelled'" in reason(dead)
    assert dead.properties["headers"]["lightbus-attempt"] == 3
    warnings = [record.getMessage() for record in caplog.records if "order.cancelled" in record.getMessage()]
    assert "lightbus unbind" in warnings[0]
    assert len(warnings) == 3


async def test_a_rolling_deployment_adds_the_handler_in_time(shop: Lightbus, make_app: MakeApp) -> None:
    old = make_app("billing", retry=Retry(delays=(0.3,) * 30))
    new = make_app("billing", retry=Retry(delays=(0.3,) * 30))
    received: list[int] = []
    old.on("order.placed")(lambda: None)
    new.on("order.placed", "order.cancelled")(_collects(received))
    async with running(shop, old), stranger(old) as channel:
        await anyio.to_thread.run_sync(channel.queue_bind, "billing.main", "lightbus", "order.cancelled")
        await shop.publish(OrderCancelled(number=8))
    async with running(new):
        await eventually(lambda: received, [8])


async def test_a_retry_of_a_removed_handler_becomes_a_dead_letter_that_names_it(
    shop: Lightbus, make_app: MakeApp
) -> None:
    old, new = (make_app("billing", retry=Retry(delays=(3,))) for _ in range(2))
    failed = anyio.Event()

    @old.on("order.placed")
    async def removed_later() -> None:
        failed.set()
        raise ValueError("no")

    new.on("order.placed", name="another")(lambda: None)
    async with running(shop, old):
        await shop.publish(OrderPlaced(number=1))
        await failed.wait()
    async with running(new):
        (dead,) = await dead_letters(new)
    assert "'removed_later'" in reason(dead)


async def test_a_failing_handler_does_not_stop_later_events(shop: Lightbus, billing: Lightbus) -> None:
    received: list[int] = []

    @billing.on("order.placed")
    async def fail_on_odd(order: OrderPlaced) -> None:
        if order.number % 2:
            raise ValueError(order.number)
        received.append(order.number)

    async with running(shop, billing):
        await shop.publish_many([OrderPlaced(number=n) for n in range(100)])
        dead = await dead_letters(billing, 50)
        await eventually(lambda: len(received), 50)
    assert {reason(letter) for letter in dead} == {f"ValueError: {n}" for n in range(1, 100, 2)}
    assert sorted(received) == list(range(0, 100, 2))


@pytest.mark.impossible_on_artemis("a queue cannot be full and refuse what others take")
@pytest.mark.parametrize(
    ("delays", "key", "became"),
    [((), "dead", "dead-lettered to billing.dead"), ((0.05,), "retry.50ms", "retry in 0.05 s")],
)
async def test_the_outcome_of_a_failure_is_logged_when_the_copy_is_confirmed(
    shop: Lightbus,
    billing: Lightbus,
    caplog: pytest.LogCaptureFixture,
    delays: tuple[float, ...],
    key: str,
    became: str,
) -> None:
    @billing.on("order.placed", retry=Retry(delays=delays))
    def charge() -> None:
        raise LookupError("no account")

    def logged(words: str) -> list[str]:
        return [record.getMessage() for record in caplog.records if words in record.getMessage()]

    def let_a_full_queue_refuse() -> None:
        arguments = {"x-max-length": 1, "x-overflow": "reject-publish"}
        channel.queue_declare("full", durable=True, auto_delete=False, arguments=arguments)
        channel.publish([Publication("", "full", b"", {}, mandatory=False)])
        channel.queue_bind("full", "billing.internal", key)

    async with running(shop, billing), stranger(billing) as channel:
        await anyio.to_thread.run_sync(let_a_full_queue_refuse)
        await shop.publish(OrderPlaced(number=1))
        (late,) = await eventually(lambda: logged("is not confirmed yet")[:1])
        assert "charge failed on 'order.placed'" in late
        assert f"LookupError: no account; its copy for billing.{key} is not confirmed yet" in late
        assert not logged(became)
        await anyio.to_thread.run_sync(channel.queue_unbind, "full", "billing.internal", key)
        (whole, *_) = await eventually(lambda: logged(became))
    assert whole.startswith("charge failed on 'order.placed'")
    assert whole.endswith(f"attempt 1: LookupError: no account; {became}")


async def test_an_error_that_cannot_be_printed_is_still_a_dead_letter(shop: Lightbus, billing: Lightbus) -> None:
    class Unprintable(Exception):
        def __str__(self) -> str:
            raise RuntimeError("not even this")

    @billing.on("order.placed", retry=Retry.none())
    async def fail() -> None:
        raise Unprintable

    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1))
        (dead,) = await dead_letters(billing)
    assert "Unprintable" in dead.properties["headers"]["lightbus-error-type"]


async def test_a_very_long_error_is_truncated_to_fit_a_header(shop: Lightbus, billing: Lightbus) -> None:
    @billing.on("order.placed", retry=Retry.none())
    async def fail() -> None:
        raise ValueError("ü" * 1_000_000)

    async with running(shop, billing):
        await shop.publish(OrderPlaced(number=1))
        (dead,) = await dead_letters(billing)
    assert reason(dead).startswith("ValueError: üüü")
    assert sum(len(str(value)) for value in dead.properties["headers"].values()) < 8000


def _collects(received: list[int]) -> Callable[[dict[str, Any]], None]:
    def collect(payload: dict[str, Any]) -> None:
        received.append(payload["number"])

    return collect


def _raise(error: BaseException) -> None:
    raise error
