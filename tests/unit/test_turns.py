"""Which handler run is next where a handler has its own `concurrency`."""

from __future__ import annotations

from typing import cast

import pytest

from lightbus import Lightbus
from lightbus.consuming.subscription import HandlerRun, Subscription
from lightbus.consuming.turns import Turns
from lightbus.handler import Handler
from lightbus.transport import Channel, Delivery

NOW = cast(Channel, object())
BEFORE = cast(Channel, object())


async def in_the_loop() -> None: ...


def in_a_thread() -> None: ...


class Queue:
    """A queue with one handler that may run twice at once."""

    def __init__(self, function: object) -> None:
        app = Lightbus("billing", url="memory://")
        app.on("order.placed", concurrency=2)(function)  # type: ignore[type-var]
        (config,) = app.subscriptions()
        subscription = Subscription(config)
        subscription.channels = (NOW,)
        self.turns = Turns(subscription)
        (self.handler,) = app.handlers.values()

    def run(self, tag: int, channel: Channel = NOW) -> HandlerRun:
        return Delivery(channel, tag, False, "shop", "order.placed", {}, b"{}"), self.handler, None


def tags(runs: object) -> list[int]:
    return [run[0].delivery_tag for run in cast("list[HandlerRun]", runs)]


def test_runs_over_a_handlers_concurrency_wait_until_one_has_ended() -> None:
    queue = Queue(in_the_loop)
    assert [queue.turns.may_run(queue.run(tag)) for tag in range(4)] == [True, True, False, False]
    assert queue.turns.parked(queue.handler)
    assert queue.turns.release(queue.handler) is False  # its task looks at `ready` by itself
    assert tags(queue.turns.ready) == [2]
    assert queue.turns.may_run(queue.turns.ready.popleft())


def test_a_thread_gets_a_parked_run_with_its_turn() -> None:
    queue = Queue(in_a_thread)
    assert [queue.turns.take(queue.handler, queue.run(tag)) for tag in range(4)] == [True, True, False, False]
    assert queue.turns.release(queue.handler) is True
    assert tags(queue.turns.plain) == [2]
    assert queue.turns.take(queue.handler, queue.run(4)) is False  # the place is taken


@pytest.mark.parametrize("function", [in_the_loop, in_a_thread])
def test_a_release_without_parked_runs_frees_a_place(function: object) -> None:
    queue = Queue(function)
    assert [queue.turns.take(queue.handler, queue.run(tag)) for tag in range(2)] == [True, True]
    assert queue.turns.release(queue.handler) is False
    assert queue.turns.take(queue.handler, queue.run(2)) is True


def test_a_run_of_an_earlier_epoch_does_not_start_and_passes_its_turn_on() -> None:
    queue = Queue(in_the_loop)
    for tag in range(3):
        queue.turns.may_run(queue.run(tag))
    assert not queue.turns.may_run(queue.run(3, BEFORE))
    assert tags(queue.turns.ready) == [2]


def test_nothing_starts_after_clear() -> None:
    queue = Queue(in_the_loop)
    for tag in range(3):
        queue.turns.may_run(queue.run(tag))
    queue.turns.ready.append(queue.run(3))
    queue.turns.clear()
    assert not queue.turns.ready
    queue.turns.release(queue.handler)
    assert not queue.turns.ready


def test_handlers_without_a_limit_and_unmatched_deliveries_run_at_once() -> None:
    queue = Queue(in_the_loop)
    delivery, _, _ = queue.run(1)
    assert queue.turns.may_run((delivery, None, None))
    free = Lightbus("shop", url="memory://")
    free.on("order.placed")(in_the_loop)
    handler: Handler = free.handlers["in_the_loop"]
    assert all(queue.turns.may_run((delivery, handler, None)) for _ in range(10))
    assert not queue.turns.may_run((queue.run(2, BEFORE)[0], handler, None))
