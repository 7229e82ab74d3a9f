"""How many events a consumer may hold, decided from what its handlers are seen to do."""

from __future__ import annotations

import heapq
import itertools
import math

import pytest

from lightbus.consuming.credit import BUDGET, PACE, PERIOD, REMEMBERED, STEP, Credit


class Worker:
    """A consumer of a queue in which there is always more, on a clock of its own; and its broker."""

    def __init__(self, credit: Credit, *, concurrency: int, takes: float) -> None:
        self.credit = credit
        self.concurrency, self.takes = concurrency, takes
        self.now = 0.0
        self.settled = 0
        self.most_held = 0
        self.waiting = 0
        self._ends: list[float] = []
        self._old, self._new, self._prefetch = 0, 0, credit.given
        self.prefetches: list[int] = []
        self._fill()

    @property
    def held(self) -> int:
        return self.waiting + len(self._ends)

    def _fill(self) -> None:
        """The broker delivers what the present consumer may hold; that of earlier ones is not counted there."""
        more = self._prefetch - self._new
        if more > 0:
            self.credit.arrived(self.now, self.settled)
            self._new += more
            self.waiting += more
        while self.waiting and len(self._ends) < self.concurrency:
            self.waiting -= 1
            heapq.heappush(self._ends, self.now + self.takes)
        self.most_held = max(self.most_held, self.held)

    def _look(self) -> None:
        full = self._new >= self._prefetch
        prefetch = self.credit.next_prefetch(self.now, self.held) if full else None
        if prefetch is not None:
            self.prefetches.append(prefetch)
            self._old, self._new, self._prefetch = self._old + self._new, 0, prefetch
        self._fill()

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while True:
            wake = self.now + self.credit.next_look(self.now, self.held)
            following = min(self._ends[0], max(wake, self.now + 1e-4))
            if following > end:
                self.now = end
                return
            self.now = following
            while self._ends and self._ends[0] <= self.now:
                heapq.heappop(self._ends)
                self.settled += 1
                if self._old:
                    self._old -= 1
                else:
                    self._new -= 1
            self.credit.measure(self.now, self.settled, self.held)
            self._look()


@pytest.mark.parametrize(
    ("concurrency", "takes", "held"),
    [
        (1, 0.25, 4),
        (1, 2.0, 1),
        (4, 0.05, 80),
        (32, 0.25, 128),
        (32, 1.0, 32),
        (32, 10.0, 32),
        (32, 0.001, 200),
        (1, 0.0001, 200),
    ],
)
def test_a_consumer_holds_a_seconds_work_but_as_much_as_may_run_at_once(
    concurrency: int, takes: float, held: int
) -> None:
    worker = Worker(Credit(200, concurrency), concurrency=concurrency, takes=takes)
    worker.run(10 * takes + 5)
    assert held / 2 <= worker.credit.window <= 1.25 * held + 1
    assert worker.most_held <= 1.5 * held + STEP + 1
    # And no handler had to wait for events, once it knew how fast they are.
    before = worker.settled
    worker.run(20 * takes)
    assert worker.settled - before >= 0.9 * 20 * concurrency


def test_a_subscription_begins_with_one_event_and_fast_handlers_get_all_at_once() -> None:
    credit = Credit(200, 32)
    assert (credit.window, credit.given) == (1, 1)
    credit.arrived(0.0, settled=0)
    credit.measure(0.002, settled=1, held=0)
    assert credit.next_prefetch(0.002, held=1) == 199  # the one that is held does not count for the next consumer
    assert not credit.due(1.0, held=1)


def test_while_no_handler_ends_it_grows_in_small_steps_up_to_what_may_run_at_once() -> None:
    worker = Worker(Credit(200, 32), concurrency=32, takes=60.0)
    held = [worker.held]
    for _ in range(40):
        worker.run(PACE)
        held.append(worker.held)
    assert held[-1] == worker.credit.window == 32
    assert max(later - earlier for earlier, later in itertools.pairwise(held)) <= STEP + 1
    assert len(worker.prefetches) == 8


def test_a_prefetch_is_the_most_whatever_may_run_at_once() -> None:
    worker = Worker(Credit(5, 32), concurrency=32, takes=0.1)
    worker.run(5)
    assert worker.credit.window == 5
    assert worker.most_held == 5


def test_handlers_that_become_slow_are_given_less_but_never_less_than_may_run_at_once() -> None:
    for concurrency, expected in ((1, 4), (32, 4)):  # 196 are held, and 200 are the most
        credit = Credit(200, concurrency)
        credit.window = credit.given = 200
        credit.arrived(0.0, settled=0)
        credit.measure(1.0, settled=4, held=196)
        assert credit.next_prefetch(1.0, held=196) == expected


def test_few_events_are_no_reason_to_take_fewer() -> None:
    credit = Credit(200, 1)
    credit.window = credit.given = 200
    for second in range(10):
        credit.arrived(second, settled=second)
        credit.measure(second + 0.25, settled=second + 1, held=0)
        assert credit.next_prefetch(second + 0.25, held=0) is None
    assert credit.window == 200


def test_what_is_measured_in_less_than_a_period_is_not_acted_on_while_there_is_more_to_do() -> None:
    credit = Credit(200, 1)
    credit.window = credit.given = 100
    credit.arrived(0.0, settled=0)
    credit.measure(PERIOD / 2, settled=1, held=99)
    assert credit.window == 100


def test_a_new_subscription_begins_with_one_again_or_as_before() -> None:
    credit = Credit(200, 32)
    credit.window = credit.given = 150
    credit.begin(credit.window)
    assert (credit.window, credit.given) == (150, 150)
    credit.begin(1)
    assert (credit.window, credit.given) == (1, 1)


@pytest.mark.parametrize("concurrency", [1, 2, 5, 8, 32, 100])
def test_whatever_was_measured_no_handler_stays_idle_while_long_ones_run(concurrency: int) -> None:
    """From every state in which a consumer can be full: it ends with as many as may run at once."""
    for window, given in itertools.product(range(1, 60), range(1, concurrency)):
        for held in range(given, concurrency):
            credit = Credit(200, concurrency)
            credit.window, credit.given = window, given
            now, full = 0.0, held
            while full < concurrency:
                now += 60.0
                prefetch = credit.next_prefetch(now, full)
                assert prefetch is not None, (window, given, held, full)
                full += prefetch


# --- large bodies

MEGABYTE = 1024 * 1024


def wide(budget: int = BUDGET) -> Credit:
    credit = Credit(200, 32, budget)
    credit.window = credit.given = 200
    return credit


def test_as_many_large_bodies_are_held_as_fit_into_half_of_the_budget() -> None:
    credit = wide()
    credit.large(0.0, 1 * MEGABYTE)
    credit.large(0.0, 14 * MEGABYTE)
    credit.large(0.0, 2 * MEGABYTE)
    assert credit.next_prefetch(0.0, held=150) == 2
    assert credit.next_prefetch(1.0, held=2) is None
    assert credit.next_look(1.0, held=2) == math.inf


def test_a_body_larger_than_the_budget_is_held_alone() -> None:
    credit = wide()
    credit.large(0.0, 100 * MEGABYTE)
    assert credit.next_prefetch(0.0, held=0) == 1


def test_a_large_body_is_expected_again_for_a_while_and_then_forgotten() -> None:
    credit = wide()
    credit.large(0.0, 14 * MEGABYTE)
    assert credit.next_prefetch(0.0, held=0) == 2
    credit.large(REMEMBERED + 1, 1 * MEGABYTE)
    assert credit.limit(REMEMBERED + 1) == 2
    credit.large(2 * REMEMBERED + 2, 1 * MEGABYTE)
    assert credit.limit(2 * REMEMBERED + 2) == 32
    assert credit.limit(5 * REMEMBERED) == 200
    assert credit.next_prefetch(5 * REMEMBERED, held=2) == 198


def test_large_bodies_and_long_handlers_do_not_grow_over_the_budget() -> None:
    credit = Credit(200, 32)
    credit.large(0.0, 14 * MEGABYTE)
    given = [credit.next_prefetch(second, held=min(2, second + 1)) for second in range(10)]
    assert [one for one in given if one is not None] == [1]  # beside the one that is held


# --- two workers


class Sharer:
    """One of the workers that share a queue: begins a little later than the other."""

    def __init__(self, concurrency: int, takes: float, late: float) -> None:
        self.credit, self.concurrency, self.takes, self.late = Credit(200, concurrency), concurrency, takes, late
        self.waiting = self.of_present_consumer = self.settled = self.given = 0
        self.prefetch = 1
        self.running: list[tuple[float, int]] = []
        self.consumer = 0
        self.jobs: list[int] = []

    @property
    def held(self) -> int:
        return len(self.jobs) + len(self.running)

    def may_take(self, now: float) -> bool:
        return now >= self.late and self.of_present_consumer < self.prefetch

    def take(self, now: float) -> None:
        self.credit.arrived(now, self.settled)
        self.of_present_consumer += 1
        self.given += 1
        self.jobs.append(self.consumer)

    def work(self, now: float) -> None:
        while self.jobs and len(self.running) < self.concurrency:
            heapq.heappush(self.running, (now + self.takes, self.jobs.pop(0)))
        while self.running and self.running[0][0] <= now:
            _, consumer = heapq.heappop(self.running)
            self.settled += 1
            self.of_present_consumer -= consumer == self.consumer
            self.credit.measure(now, self.settled, self.held)
        full = self.of_present_consumer >= self.prefetch
        if full and (prefetch := self.credit.next_prefetch(now, self.held)) is not None:
            self.prefetch, self.of_present_consumer, self.consumer = prefetch, 0, self.consumer + 1


@pytest.mark.parametrize("late", [0.0, 0.003, 0.02])
@pytest.mark.parametrize(("concurrency", "takes"), [(1, 0.25), (4, 0.25), (32, 0.25), (32, 2.0), (1, 1.5)])
def test_a_burst_of_slow_jobs_goes_half_to_each_of_two_workers(concurrency: int, takes: float, late: float) -> None:
    """As RabbitMQ gives it: in turn, to those that may take more."""
    workers = [Sharer(concurrency, takes, 0.0), Sharer(concurrency, takes, late)]
    left, now = 40, 0.0
    while left:
        for worker in workers:
            worker.work(now)
        while left and any(worker.may_take(now) for worker in workers):
            for worker in workers:
                if left and worker.may_take(now):
                    worker.take(now)
                    left -= 1
        now += 0.001
    assert abs(workers[0].given - 20) <= 3, [worker.given for worker in workers]


def test_the_prefetch_of_the_user_is_never_exceeded_while_consumers_change() -> None:
    for most, concurrency, takes in ((2, 32, 0.5), (5, 32, 0.1), (50, 4, 0.001), (200, 32, 0.01), (200, 1, 0.001)):
        worker = Worker(Credit(most, concurrency), concurrency=concurrency, takes=takes)
        worker.run(5)
        assert worker.most_held <= most
