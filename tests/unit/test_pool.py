"""The threads of sync handlers: which one is called, which ones wait, and whether a result counts after a timeout."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import cast

import anyio
import pytest

from lightbus import Lightbus
from lightbus.consuming.slots import ThreadSlot
from lightbus.consuming.subscription import HandlerRun, Subscription, SubscriptionConfig
from lightbus.consuming.threads import Pool
from lightbus.consuming.turns import Turns
from lightbus.transport import Channel, Delivery
from tests.patience import LIMIT, wait_until

NOW = cast(Channel, object())
BEFORE = cast(Channel, object())
IN_THE_LOOP = cast(anyio.CancelScope, None)


class Threads:
    """A pool whose event loop is simulated here: each slot gets a thread, and what is done is only counted."""

    def __init__(self, handle: Callable[[], None], concurrency: int = 4) -> None:
        app = Lightbus("billing", url="memory://")
        app.on("order.placed")(handle)
        (self.handler,) = app.handlers.values()
        self.subscription = Subscription(
            SubscriptionConfig(
                name="billing.main",
                suffix="main",
                handlers=app.handlers,
                prefetch=100,
                concurrency=concurrency,
            )
        )
        self.subscription.channels = (NOW,)
        self.turns = Turns(self.subscription)
        self.pool = Pool(self.subscription, self.turns, self)
        self.on_start: Callable[[], object] = lambda: None
        self.threads: list[threading.Thread] = []
        self.begun: list[bool] = []
        self.changed = threading.Condition()

    def run(self, channel: Channel = NOW) -> HandlerRun:
        return (Delivery(channel, 1, False, "shop", "order.placed", {}, b"{}"), self.handler, None)

    def give(self, *runs: HandlerRun) -> None:
        self.turns.plain.extend(runs)
        self.pool.call()

    def start_thread(self) -> None:
        self.on_start()
        slot = ThreadSlot(self.subscription, IN_THE_LOOP, called=True)
        thread = threading.Thread(target=lambda: (self.pool.serve(slot), self.pool.give_room()), daemon=True)
        self.threads.append(thread)
        thread.start()

    def collect_done(self) -> None:
        with self.changed:
            self.pool.collecting = False
            while self.pool.done:
                self.begun.append(self.pool.done.popleft()[1])
            self.changed.notify_all()

    def room_is_free(self) -> None:
        """There are no async handlers."""

    def until(self, look: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(look, LIMIT)


@pytest.fixture
def made() -> Iterator[list[Threads]]:
    made: list[Threads] = []
    yield made
    for threads in made:
        threads.pool.close()
        for thread in threads.threads:
            thread.join(LIMIT)
            assert not thread.is_alive()
        assert threads.pool.running == 0


def test_a_thread_that_has_nothing_to_do_is_called_again_before_another_is_started(made: list[Threads]) -> None:
    threads = Threads(lambda: None)
    made.append(threads)
    for number in range(1, 50):
        threads.give(threads.run())
        threads.until(lambda number=number: len(threads.begun) == number)  # type: ignore[misc]
        wait_until(lambda: threads.pool.running == 0, "the thread has nothing to do")
    assert len(threads.threads) == 1


def test_threads_call_each_other_while_runs_wait_up_to_the_queues_concurrency(made: list[Threads]) -> None:
    together, alone = threading.Barrier(4), threading.Event()

    def meet() -> None:
        together.wait(LIMIT)
        alone.set()

    threads = Threads(meet)
    made.append(threads)
    threads.give(*[threads.run() for _ in range(40)])
    threads.until(lambda: len(threads.begun) == 40)
    assert alone.is_set()
    assert len(threads.threads) == 4


def test_a_run_of_an_earlier_epoch_is_not_begun(made: list[Threads]) -> None:
    handled: list[int] = []
    threads = Threads(lambda: handled.append(1), concurrency=1)
    made.append(threads)
    threads.give(threads.run(BEFORE), threads.run(), threads.run(BEFORE))
    threads.until(lambda: len(threads.begun) == 3)
    assert threads.begun == [False, True, False]
    assert handled == [1]


def test_a_closed_pool_takes_no_more_and_lets_its_threads_end(made: list[Threads]) -> None:
    threads = Threads(lambda: None)
    made.append(threads)
    threads.give(threads.run())
    threads.until(lambda: len(threads.begun) == 1)
    threads.pool.close()
    threads.give(threads.run())
    for thread in threads.threads:
        thread.join(LIMIT)
        assert not thread.is_alive()
    assert len(threads.begun) == 1


def test_either_the_handler_ends_in_time_or_it_is_given_up_never_both() -> None:
    threads = Threads(lambda: None)
    for attempt in range(1000):
        slot = ThreadSlot(threads.subscription, IN_THE_LOOP)
        run = threads.run()
        slot.begin(run, -1.0)  # its time is over already
        both = threading.Barrier(2)
        ended: list[bool] = []

        def end(slot: ThreadSlot, both: threading.Barrier, ended: list[bool], *, well: bool) -> None:
            both.wait(LIMIT)
            if well:
                ended.append(slot.end())
            else:
                slot.fail(ValueError("late"))
                ended.append(slot.error is not None)

        thread = threading.Thread(target=end, args=(slot, both, ended), kwargs={"well": attempt % 2 == 1})
        thread.start()
        both.wait(LIMIT)
        given_up = slot.exceeded(math.inf)
        thread.join(LIMIT)
        assert ended != [given_up]
        assert slot.exceeded(math.inf) is given_up
        assert (slot.run is run) is (given_up or attempt % 2 == 0)


class RunsThatArriveLate(deque[HandlerRun]):
    """Where a called thread finds nothing, since another thread has taken its run, more arrive before it waits."""

    def __init__(self, arrive: Callable[[], object]) -> None:
        super().__init__()
        self._arrive: Callable[[], object] | None = arrive

    def popleft(self) -> HandlerRun:
        try:
            return super().popleft()
        except IndexError:
            arrive, self._arrive = self._arrive, None
            if arrive is not None:
                arrive()
            raise


def test_a_called_thread_whose_run_was_taken_still_calls_the_next_one(made: list[Threads]) -> None:
    together = threading.Barrier(3)
    threads = Threads(lambda: _meet(together))
    made.append(threads)
    three = [threads.run() for _ in range(3)]
    threads.turns.plain = RunsThatArriveLate(lambda: threads.give(*three))
    threads.turns.plain.append(threads.run())
    taken: list[HandlerRun] = []

    def take_it() -> None:  # between the call and the thread's arrival
        if not taken:
            taken.append(threads.turns.plain.pop())

    threads.on_start = take_it
    threads.pool.call()
    threads.until(lambda: len(threads.begun) == 3)  # all at once, which the barrier needs
    assert not together.broken


def _meet(barrier: threading.Barrier) -> None:
    barrier.wait(LIMIT)
