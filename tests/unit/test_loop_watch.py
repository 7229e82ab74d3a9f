"""When is an event loop blocked? `BlockDetector` decides, without reading a clock."""

from __future__ import annotations

from lightbus.worker.loop_watch import LATE, BlockDetector

HANDLER, OTHER = object(), object()


class Looks:
    """Looks every fifth of a second, as `LoopWatch` does for a limit of one second."""

    def __init__(self) -> None:
        self.detector = BlockDetector(1.0)
        self.now = 100.0
        self.used = 5.0
        self.waited = 50.0
        self.detector.look(self.now, None, self.used, 0.0)

    def for_seconds(self, seconds: float, what: object, *, starved: float = 0.0) -> list[float]:
        """Look for so long; returns when a block was reported, in seconds from here.

        Args:
            starved: the part of the time in which the loop's thread waited for a processor.
        """
        began, reported = self.now, []
        for _ in range(round(seconds / self.detector.period)):
            self.now += self.detector.period
            self.waited += self.detector.period * starved
            if self.detector.look(self.now, what, self.used, 0.0 if what is None else self.waited):
                reported.append(round(self.now - began, 3))
        return reported

    def after_a_pause(
        self, seconds: float, what: object, *, used: float = 0.0, ran: float | None = None, answered: bool = False
    ) -> bool:
        """One look that comes this late."""
        ran = seconds + 1.0 if ran is None else ran
        self.now += seconds
        self.used += used
        waited = 0.0 if what is None else self.waited
        return self.detector.look(self.now, what, self.used, waited, ran=ran, answered=answered)


def test_a_block_is_reported_once_after_a_second() -> None:
    looks = Looks()
    assert looks.for_seconds(60.0, HANDLER) == [1.2]


def test_the_next_block_of_the_same_handler_is_reported_again() -> None:
    looks = Looks()
    assert looks.for_seconds(2.0, HANDLER) == [1.2]
    assert looks.for_seconds(0.2, None) == []
    assert looks.for_seconds(2.0, HANDLER) == [1.2]


def test_a_loop_that_answers_in_between_is_not_blocked() -> None:
    looks = Looks()
    for _ in range(10):
        assert looks.for_seconds(1.0, HANDLER) == []
        assert looks.for_seconds(0.2, None) == []


def test_many_short_handlers_are_not_one_that_blocks() -> None:
    looks = Looks()
    for _ in range(10):
        assert looks.for_seconds(0.8, HANDLER) == []
        assert looks.for_seconds(0.8, OTHER) == []


def test_a_process_that_was_stopped_is_not_blocked() -> None:
    """SIGSTOP, a suspended machine: no look came either."""
    looks = Looks()
    assert looks.for_seconds(0.4, HANDLER) == []
    for _ in range(2):
        assert not looks.after_a_pause(3600.0, HANDLER)
    looks = Looks()
    assert not looks.after_a_pause(3600.0, HANDLER)
    assert not looks.after_a_pause(0.2, None)


def test_a_handler_that_blocks_is_reported_also_after_a_stop() -> None:
    looks = Looks()
    assert looks.for_seconds(0.4, HANDLER) == []
    assert not looks.after_a_pause(3600.0, HANDLER)
    assert looks.for_seconds(1.0, HANDLER) == [0.6]  # 0.2 and the late look's 0.3 were counted


def test_time_without_a_processor_does_not_count() -> None:
    looks = Looks()
    assert looks.for_seconds(60.0, HANDLER, starved=1.0) == []
    looks = Looks()
    assert looks.for_seconds(60.0, HANDLER, starved=0.5) == [2.2]


def test_a_call_that_keeps_pythons_lock_is_reported_though_no_look_came_meanwhile() -> None:
    looks = Looks()
    assert looks.after_a_pause(5.0, HANDLER, used=4.0, answered=True)  # before it
    assert looks.for_seconds(5.0, HANDLER) == []
    looks = Looks()
    assert not looks.after_a_pause(5.0, HANDLER, used=0.5)
    looks = Looks()
    assert not looks.after_a_pause(5.0, OTHER, used=5.0, ran=0.1)  # it has begun since


def test_a_busy_handler_that_lets_others_run_is_not_blocked_though_looks_come_late() -> None:
    looks = Looks()
    for _ in range(100):
        assert not looks.after_a_pause(0.4, HANDLER, used=0.4, answered=True)


def test_a_late_look_counts_for_little() -> None:
    looks = Looks()
    assert looks.for_seconds(0.2, HANDLER) == []
    for number in range(1, 10):
        assert looks.after_a_pause(10.0, HANDLER) is (number == 4), number
    assert 3 * LATE * 0.2 < 1.0 < 4 * LATE * 0.2
