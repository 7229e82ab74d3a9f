"""The window of unconfirmed messages: pure, so without threads, a connection or a clock."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from types import FrameType

import amqp.exceptions
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lightbus import errors
from lightbus.publishing.confirms import ConfirmWindow, PendingPublish, Refusal
from lightbus.publishing.connection import RENEW_AFTER, RENEW_EVERY, RENEW_WAIT, ChannelRenewal
from lightbus.transport import Publication

SIZE = 5
REFUSED = Refusal()
UNCERTAIN = Refusal(uncertain=True)


def message(message_id: str, *, body: bytes = b"{}", delay_level: int | None = None) -> PendingPublish:
    properties = {"message_id": message_id, "headers": {}, "type": "order.placed"}
    return PendingPublish(Publication("shop", "order.placed", body, properties), delay_level)


def messages(count: int) -> list[PendingPublish]:
    return [message(str(number)) for number in range(count)]


def window_with(waiting: Iterable[PendingPublish], size: int = SIZE) -> ConfirmWindow:
    window = ConfirmWindow(size)
    window.waiting.extend(waiting)
    return window


def ids(pending: Iterable[PendingPublish]) -> list[str]:
    return [one.publication.properties["message_id"] for one in pending]


def sent_all(count: int = SIZE) -> tuple[ConfirmWindow, list[PendingPublish]]:
    """A window whose messages, with the tags from 1, are all sent."""
    sent = messages(count)
    window = window_with(sent, size=max(count, SIZE))
    assert window.take(count) == sent
    return window, sent


# --- what may be sent next --------------------------------------------------------------------


def test_messages_are_taken_in_order_and_get_the_tags_from_1() -> None:
    window, sent = sent_all(3)
    assert window.unconfirmed == {1: sent[0], 2: sent[1], 3: sent[2]}
    assert all(pending.sent for pending in sent)
    assert not window.waiting
    assert not window.taken


def test_no_more_are_taken_than_asked_for() -> None:
    window = window_with(messages(5))
    assert ids(window.take(2)) == ["0", "1"]
    assert ids(window.take(2)) == ["2", "3"]
    assert ids(window.waiting) == ["4"]


def test_a_full_window_takes_none_until_a_confirm_makes_room() -> None:
    window = window_with(messages(SIZE + 2))
    assert len(window.take(SIZE + 2)) == SIZE
    assert window.full
    assert window.take(SIZE) == []
    window.ack(2, multiple=True)
    assert not window.full
    assert ids(window.take(SIZE)) == [str(SIZE), str(SIZE + 1)]
    assert [*window.unconfirmed] == [3, 4, 5, 6, 7]


def test_an_empty_window_takes_none() -> None:
    window = ConfirmWindow(SIZE)
    assert window.take(SIZE) == []
    assert not window.busy


def test_the_default_size_is_1000() -> None:
    assert ConfirmWindow().size == 1000


def test_abandoned_messages_are_not_taken() -> None:
    waiting = messages(4)
    window = window_with(waiting)
    waiting[1].abandoned = True  # its caller could not remove it: `take` just had
    assert ids(window.take(SIZE)) == ["0", "2", "3"]


def test_the_next_message_fills_the_place_of_an_abandoned_one() -> None:
    waiting = messages(SIZE + 1)
    window = window_with(waiting)
    waiting[0].abandoned = True
    assert ids(window.take(SIZE)) == ["1", "2", "3", "4", "5"]


# --- abandoned --------------------------------------------------------------------------------


def test_an_abandoned_message_that_waits_is_removed() -> None:
    waiting = messages(3)
    window = window_with(waiting)
    window.abandon(waiting[1])
    assert ids(window.waiting) == ["0", "2"]


def test_an_abandoned_message_that_is_sent_stays_until_its_confirm() -> None:
    window, sent = sent_all(2)
    window.abandon(sent[0])
    assert [*window.unconfirmed] == [1, 2]
    window.ack(1, multiple=False)
    assert [*window.unconfirmed] == [2]


def test_withdrawing_tells_whether_the_message_was_waiting() -> None:
    window = window_with(waiting := messages(2))
    window.take(1)
    assert not window.withdraw(waiting[0])
    assert window.withdraw(waiting[1])
    assert not window.withdraw(waiting[1])


def test_a_window_is_busy_while_a_caller_waits() -> None:
    window = window_with(waiting := messages(1))
    assert window.busy
    window.take(1)
    assert window.busy
    window.ack(1, multiple=False)
    assert window.busy  # its caller does not know yet
    window.finished.clear()
    assert not window.busy
    window.waiting.extend(waiting := messages(2))
    window.take(1)
    for pending in waiting:
        window.abandon(pending)
    assert not window.busy


def test_a_window_is_stuck_if_it_is_full_and_its_oldest_message_was_abandoned() -> None:
    window, sent = sent_all()
    assert not window.stuck
    window.abandon(sent[1])
    assert not window.stuck
    window.abandon(sent[0])
    assert window.stuck
    window.ack(3, multiple=False)
    assert not window.stuck


# --- acks and nacks ---------------------------------------------------------------------------


def test_a_single_ack_confirms_one_message() -> None:
    window, sent = sent_all()
    window.ack(3, multiple=False)
    assert window.finished == [sent[2]]
    assert [*window.unconfirmed] == [1, 2, 4, 5]


def test_a_multiple_ack_confirms_all_up_to_its_tag() -> None:
    window, sent = sent_all()
    window.ack(3, multiple=True)
    assert window.finished == sent[:3]
    assert [*window.unconfirmed] == [4, 5]


def test_a_multiple_ack_leaves_out_what_was_confirmed_before() -> None:
    window, sent = sent_all()
    for tag in (2, 4):
        window.ack(tag, multiple=False)
    window.ack(4, multiple=True)
    assert window.finished == [sent[1], sent[3], sent[0], sent[2]]
    assert [*window.unconfirmed] == [5]


def test_acks_in_every_order_finish_each_message_once() -> None:
    for order in itertools.permutations(range(1, 5)):
        window, sent = sent_all(4)
        for tag in order:
            window.ack(tag, multiple=False)
        assert window.finished == [sent[tag - 1] for tag in order]
        assert not window.unconfirmed


@pytest.mark.parametrize("multiple", [False, True])
@pytest.mark.parametrize("tag", [0, 1, 99])
def test_an_ack_of_an_unknown_tag_confirms_nothing_that_is_not_sent(tag: int, multiple: bool) -> None:
    window = window_with(messages(2))
    window.ack(tag, multiple)
    assert not window.finished
    assert len(window.waiting) == 2


def test_a_nack_fails_its_messages_only() -> None:
    window, sent = sent_all()
    window.ack(1, multiple=False)
    window.nack(3, multiple=True)
    window.ack(5, multiple=True)
    assert [type(one.error) for one in sent] == [
        type(None),
        errors.PublishNacked,
        errors.PublishNacked,
        type(None),
        type(None),
    ]
    assert sent[1].error is not sent[2].error
    assert "(1): the broker refused it" in str(sent[1].error)


# --- returns and messages with one id ---------------------------------------------------------


def test_a_return_marks_the_message_with_its_id() -> None:
    window, sent = sent_all(3)
    window.mark_returned("1")
    window.mark_returned("unknown")
    window.ack(3, multiple=True)
    assert [one.returned for one in sent] == [False, True, False]


def test_a_return_after_the_ack_marks_nothing() -> None:
    window, sent = sent_all(1)
    window.ack(1, multiple=False)
    window.mark_returned("0")
    assert not sent[0].returned


def test_two_messages_with_one_id_are_not_in_flight_together() -> None:
    twins = [message("a"), message("a"), message("b")]
    window = window_with(twins)
    assert window.take(SIZE) == [twins[0], twins[2]]
    assert [*window.waiting] == [twins[1]]
    window.mark_returned("a")
    window.ack(1, multiple=False)
    assert window.take(SIZE) == [twins[1]]
    window.ack(3, multiple=True)
    assert [one.returned for one in twins] == [True, False, False]


def test_three_messages_with_one_id_keep_their_order() -> None:
    twins = [message("a") for _ in range(3)]
    window = window_with(twins)
    for tag, twin in enumerate(twins, 1):
        assert window.take(SIZE) == [twin]
        window.ack(tag, multiple=False)


def test_a_message_does_not_wait_for_an_abandoned_one_with_its_id() -> None:
    first, second = message("a"), message("a")
    window = window_with([first, second])
    window.take(1)
    window.abandon(first)
    assert window.take(SIZE) == [second]
    window.mark_returned("a")
    window.ack(1, multiple=False)  # the late confirm of the first
    assert second.returned
    window.mark_returned("a")
    assert window.unconfirmed == {2: second}


def test_a_message_held_for_its_twin_does_not_block_the_window() -> None:
    window = window_with([message("a"), *(message("a") for _ in range(SIZE)), message("b")], size=2)
    assert ids(window.take(SIZE)) == ["a", "b"]


# --- put back ---------------------------------------------------------------------------------


def test_what_was_put_back_is_taken_again_with_the_same_tags() -> None:
    window = window_with(waiting := messages(3))
    window.put_back(window.take(2))
    assert [*window.waiting] == waiting
    assert not any(pending.sent for pending in waiting)
    assert not window.unconfirmed
    assert window.take(3) == waiting
    assert [*window.unconfirmed] == [1, 2, 3]


def test_putting_back_leaves_what_was_sent_before() -> None:
    window = window_with(waiting := messages(3))
    window.take(1)
    window.put_back(window.take(2))
    assert window.unconfirmed == {1: waiting[0]}
    assert window.take(2) == waiting[1:]
    assert [*window.unconfirmed] == [1, 2, 3]


def test_a_message_that_cannot_be_encoded_is_refused_after_it_was_put_back() -> None:
    window = window_with(waiting := messages(3))
    window.put_back(window.take(3))
    assert window.withdraw(waiting[1])
    window.refuse(waiting[1], errors.PublishRefused("cannot be encoded"))
    assert window.finished == [waiting[1]]
    assert window.take(3) == [waiting[0], waiting[2]]


# --- levels of delay --------------------------------------------------------------------------


def test_a_delayed_message_waits_until_its_level_is_declared() -> None:
    delayed, other = message("a", delay_level=3), message("b")
    window = window_with([delayed, other])
    assert window.take(SIZE) == [other]
    assert (window.wanted_delay_level, window.declared_delay_level) == (3, -1)
    window.declared_delay_level = 3
    assert window.take(SIZE) == [delayed]


def test_the_highest_level_that_waits_is_wanted() -> None:
    window = window_with([message(str(level), delay_level=level) for level in (0, 7, 2)])
    assert window.take(SIZE) == []
    assert window.wanted_delay_level == 7
    assert ids(window.waiting) == ["0", "7", "2"]


def test_a_level_that_cannot_be_declared_fails_what_needs_it_only() -> None:
    waiting = [message("a", delay_level=1), message("b"), message("c", delay_level=5), message("d", delay_level=6)]
    window = window_with(waiting)
    window.declared_delay_level = 1
    assert ids(window.take(1)) == ["a"]
    window.take(1)
    window.take(1)
    window.fail_delayed(lambda: errors.PublisherRefused("no permission"))
    assert [type(one.error) for one in waiting] == [type(None), type(None), *[errors.PublisherRefused] * 2]
    assert window.finished == waiting[2:]
    assert not window.waiting
    assert window.wanted_delay_level == 1


def test_on_a_new_connection_levels_are_declared_again() -> None:
    window = window_with([message("a", delay_level=2)])
    window.declared_delay_level = window.wanted_delay_level = 2
    window.begin_connection()
    assert window.take(SIZE) == []
    assert window.wanted_delay_level == 2


# --- a channel or a connection ends -----------------------------------------------------------


def test_what_is_unconfirmed_is_sent_again_first_and_in_order() -> None:
    window = window_with(waiting := messages(SIZE))
    window.take(3)
    window.ack(2, multiple=False)
    assert window.take_back(None) == (2, [])
    window.begin_channel()
    assert window.take(SIZE) == [waiting[0], *waiting[2:]]
    assert [*window.unconfirmed] == [1, 2, 3, 4]


def test_an_old_return_does_not_count_for_the_next_attempt() -> None:
    window, sent = sent_all(1)
    window.mark_returned("0")
    window.take_back(None)
    assert not sent[0].returned


def test_what_was_abandoned_is_not_sent_again() -> None:
    window, sent = sent_all(3)
    window.abandon(sent[1])
    assert window.take_back(None) == (2, [])
    assert [*window.waiting] == [sent[0], sent[2]]


def test_a_message_that_was_sent_before_still_counts_as_sent() -> None:
    """Its outcome stays unknown, though it waits to be sent again."""
    window, sent = sent_all(1)
    window.take_back(None)
    assert sent[0].sent


# --- refusals ---------------------------------------------------------------------------------


def error_of(kind: type[amqp.exceptions.AMQPError], text: str = "reason") -> amqp.exceptions.AMQPError:
    return kind(text)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("error", "refusal"),
    [
        (error_of(amqp.exceptions.PreconditionFailed, "invalid expiration"), Refusal()),
        (error_of(amqp.exceptions.AccessRefused), Refusal()),
        (error_of(amqp.exceptions.NotFound), Refusal(uncertain=True)),
        (error_of(amqp.exceptions.InternalError), Refusal(uncertain=True)),
        (
            error_of(amqp.exceptions.PreconditionFailed, "message size 2000 is larger than configured max size 1000"),
            Refusal(size_limit=1000),
        ),
        (error_of(amqp.exceptions.ConnectionForced), None),
        (error_of(amqp.exceptions.ResourceError), None),
        (ConnectionResetError("peer"), None),
        (TimeoutError(), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_which_errors_are_refusals_of_a_message(error: BaseException, refusal: Refusal | None) -> None:
    assert Refusal.of(error) == refusal


def test_a_message_that_is_refused_alone_is_the_refused_one() -> None:
    window, sent = sent_all(1)
    assert window.take_back(REFUSED) == (0, sent)
    assert not window.waiting
    window.refuse(sent[0], errors.PublishRefused("reason"))
    assert window.finished == sent


def test_a_refusal_that_is_uncertain_counts_the_second_time() -> None:
    window, sent = sent_all(1)
    assert window.take_back(UNCERTAIN) == (1, [])
    window.begin_channel()
    window.waiting.append(message("next"))
    assert window.take(SIZE) == sent  # alone again, or it would not be known which one is refused
    assert window.take_back(UNCERTAIN) == (0, sent)


def refuse_until_done(window: ConfirmWindow, bad: Sequence[PendingPublish]) -> list[list[PendingPublish]]:
    """A broker that refuses the bad ones, and acks all others. Returns what was in flight each time."""
    flights: list[list[PendingPublish]] = []
    while window.waiting:
        assert len(flights) < 100, "never done"
        window.begin_channel()
        tag = 0
        while batch := window.take(SIZE):
            flights.append(batch)
            for pending in batch:
                tag += 1
                if pending in bad:
                    _, refused = window.take_back(REFUSED)
                    for one in refused:
                        window.refuse(one, errors.PublishRefused("reason"))
                    break
                window.ack(tag, multiple=False)
            else:
                continue
            break
    return flights


def test_one_of_several_that_is_refused_is_found_by_sending_one_at_a_time() -> None:
    for place in range(4):
        waiting = messages(4)
        window = window_with(waiting)
        flights = refuse_until_done(window, [waiting[place]])
        assert [one.error is not None for one in waiting] == [number == place for number in range(4)]
        assert all(len(flight) == 1 for flight in flights[1:])
        assert window.one_by_one == 0


def test_all_refused_ones_are_found() -> None:
    for bad in itertools.product([False, True], repeat=4):
        waiting = messages(4)
        window = window_with(waiting)
        refuse_until_done(window, list(itertools.compress(waiting, bad)))
        assert [one.error is not None for one in waiting] == [*bad]
        assert sorted(ids(window.finished)) == ids(waiting)
        assert window.one_by_one == 0


def test_while_messages_are_sent_one_at_a_time_new_ones_wait_behind_them() -> None:
    window, sent = sent_all(3)
    window.take_back(REFUSED)
    window.begin_channel()
    window.waiting.append(new := message("new"))
    for tag, pending in enumerate(sent, 1):
        assert window.take(SIZE) == [pending]
        assert window.take(SIZE) == []
        window.ack(tag, multiple=False)
    assert window.one_by_one == 0
    assert window.take(SIZE) == [new]


def test_an_abandoned_message_is_one_less_to_send_one_at_a_time() -> None:
    window, sent = sent_all(3)
    window.take_back(REFUSED)
    window.begin_channel()
    assert window.one_by_one == 3
    sent[0].abandoned = True  # between two steps of `take`
    assert window.take(SIZE) == [sent[1]]
    assert window.one_by_one == 2


def test_abandoned_messages_in_flight_do_not_count_as_sent_one_at_a_time() -> None:
    window, sent = sent_all(3)
    window.abandon(sent[2])
    assert window.take_back(REFUSED) == (2, [])
    assert window.one_by_one == 2


def test_an_abandoned_message_that_is_refused_alone_is_not_sent_again() -> None:
    window, sent = sent_all(1)
    window.abandon(sent[0])
    assert window.take_back(REFUSED) == (0, sent)


def test_a_size_limit_refuses_all_larger_bodies_at_once_and_no_other() -> None:
    sizes = (10, 1001, 1000, 5000)
    waiting = [message(str(size), body=b"x" * size) for size in sizes]
    window = window_with(waiting)
    window.take(SIZE)
    assert window.take_back(Refusal(size_limit=1000)) == (2, [waiting[1], waiting[3]])
    assert ids(window.waiting) == ["10", "1000"]
    assert window.one_by_one == 0


# --- the end ----------------------------------------------------------------------------------


def test_failing_all_fails_what_waits_and_what_is_unconfirmed_each_with_its_own_error() -> None:
    window = window_with(waiting := messages(4))
    window.take(2)
    window.fail_all(lambda: errors.PublisherClosed("closed"))
    assert all(isinstance(pending.error, errors.PublisherClosed) for pending in waiting)
    assert len({id(pending.error) for pending in waiting}) == 4
    assert sorted(ids(window.finished)) == ids(waiting)
    assert not window.waiting
    assert not window.unconfirmed


def test_after_failing_all_new_messages_are_sent_together() -> None:
    window, _ = sent_all(3)
    window.take_back(REFUSED)
    window.fail_all(lambda: errors.PublisherClosed("closed"))
    window.begin_connection()
    window.waiting.extend(messages(3))
    assert len(window.take(SIZE)) == 3


# --- a signal handler that raises between two steps -------------------------------------------


class Interrupted(TimeoutError):
    """What a signal handler raises: a TimeoutError, as the usual time limit of a job."""


def interrupted_at(point: int, function: Callable[[], object]) -> bool:
    """Call it, and raise at its nth call or return, as a signal handler may. False: it has fewer."""
    points = itertools.count(1)

    def look(frame: FrameType, event: str, argument: object) -> None:
        if event != "c_call" and frame.f_globals["__name__"] == ConfirmWindow.__module__ and next(points) == point:
            raise Interrupted

    sys.setprofile(look)
    try:
        function()
    except Interrupted:
        return True
    finally:
        sys.setprofile(None)
    return False


def test_an_interruption_between_taking_and_sending_loses_nothing() -> None:
    """At each point, what was taken is sent again on the next channel: each message once."""
    for point in itertools.count(1):
        waiting = [*messages(3), message("1"), message("late", delay_level=1)]
        window = window_with(waiting)
        if not interrupted_at(point, lambda: window.take(SIZE)):  # noqa: B023
            break
        assert window.busy
        window.take_back(None)
        assert not window.taken
        window.begin_connection()
        window.declared_delay_level = 1
        first = window.take(SIZE)
        window.ack(len(first), multiple=True)
        again = window.take(SIZE)
        assert sorted(ids([*first, *again])) == ["0", "1", "1", "2", "late"], f"point {point}"
        assert {*map(id, first), *map(id, again)} == {*map(id, waiting)}, f"point {point}"
    assert point > 10


def test_messages_taken_by_an_interrupted_sender_stay_before_those_that_wait() -> None:
    window = window_with(waiting := messages(4))
    window.taken.extend([window.waiting.popleft(), window.waiting.popleft()])
    assert window.take_back(None) == (2, [])
    assert [*window.waiting] == waiting


def test_an_abandoned_message_of_an_interrupted_sender_is_not_sent_again() -> None:
    window = window_with(waiting := messages(2))
    window.taken.append(window.waiting.popleft())
    window.abandon(waiting[0])
    assert window.take_back(None) == (0, [])
    assert [*window.waiting] == waiting[1:]


# --- any sequence of steps --------------------------------------------------------------------


class Broker(RuleBasedStateMachine):
    """Any sequence of steps, compared with a model that keeps what the broker has got, by tag."""

    @initialize()
    def begin(self) -> None:
        self.window = ConfirmWindow(4)
        self.flight: dict[int, PendingPublish] = {}
        self.tag = 0
        self.all: list[PendingPublish] = []
        self.acked: list[PendingPublish] = []
        self.nacked: list[PendingPublish] = []

    @rule(twin=st.booleans(), level=st.sampled_from([None, 0, 1]))
    def publish(self, twin: bool, level: int | None) -> None:
        name = ids(self.all[-1:])[0] if twin and self.all else str(len(self.all))
        pending = message(name, delay_level=level)
        self.all.append(pending)
        self.window.waiting.append(pending)

    @rule(most=st.integers(1, 6))
    def send(self, most: int) -> None:
        for pending in self.window.take(most):
            self.tag += 1
            self.flight[self.tag] = pending

    @rule(most=st.integers(1, 6))
    def send_nothing(self, most: int) -> None:
        self.window.put_back(self.window.take(most))

    @rule()
    def declare(self) -> None:
        self.window.declared_delay_level = self.window.wanted_delay_level

    @precondition(lambda self: self.flight)
    @rule(data=st.data(), multiple=st.booleans(), ack=st.booleans())
    def confirm(self, data: st.DataObject, multiple: bool, ack: bool) -> None:
        tag = data.draw(st.sampled_from([*self.flight]))
        (self.window.ack if ack else self.window.nack)(tag, multiple)
        confirmed = [one for one in self.flight if (one <= tag if multiple else one == tag)]
        (self.acked if ack else self.nacked).extend(self.flight.pop(one) for one in confirmed)

    @precondition(lambda self: self.all)
    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        self.window.abandon(data.draw(st.sampled_from(self.all)))

    @rule(refusal=st.sampled_from([None, REFUSED, UNCERTAIN]))
    def lose(self, refusal: Refusal | None) -> None:
        _, refused = self.window.take_back(refusal)
        for pending in refused:
            assert [*self.flight.values()] == [pending]
            self.window.refuse(pending, errors.PublishRefused("reason"))
        self.window.begin_channel()
        self.flight, self.tag = {}, 0

    @invariant()
    def the_window_knows_what_is_in_flight(self) -> None:
        assert self.window.unconfirmed == self.flight
        assert len(self.flight) <= self.window.size

    @invariant()
    def no_two_with_one_id_are_in_flight_unless_one_was_abandoned(self) -> None:
        wanted = ids(pending for pending in self.flight.values() if not pending.abandoned)
        assert len(wanted) == len(set(wanted))

    @invariant()
    def each_message_is_in_one_place(self) -> None:
        window = self.window
        places = [*window.waiting, *window.unconfirmed.values(), *window.finished]
        assert len(places) == len({*map(id, places)})
        assert not window.taken
        missing = {*map(id, self.all)} - {*map(id, places)}
        assert all(pending.abandoned for pending in self.all if id(pending) in missing)

    @invariant()
    def outcomes_are_right(self) -> None:
        assert all(pending.error is None for pending in self.acked)
        assert all(isinstance(pending.error, errors.PublishNacked) for pending in self.nacked)
        finished = {*map(id, self.window.finished)}
        assert {*map(id, self.acked), *map(id, self.nacked)} <= finished


TestAnySequenceOfSteps = Broker.TestCase
TestAnySequenceOfSteps.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


# --- when the channel is replaced -------------------------------------------------------------


def test_a_channel_is_replaced_some_time_after_a_nack() -> None:
    renewal = ChannelRenewal()
    assert not renewal.due(0.0)
    renewal.nacked(10.0)
    assert not renewal.due(10.0 + RENEW_AFTER - 0.1)
    assert renewal.due(10.0 + RENEW_AFTER)


def test_a_later_nack_does_not_postpone_the_renewal() -> None:
    renewal = ChannelRenewal()
    renewal.nacked(10.0)
    renewal.nacked(10.0 + RENEW_AFTER)
    assert renewal.due(10.0 + RENEW_AFTER)


def test_a_channel_is_not_replaced_again_at_once() -> None:
    renewal = ChannelRenewal()
    renewal.nacked(10.0)
    renewal.done(12.0)
    assert not renewal.due(100.0)
    renewal.nacked(12.5)
    assert not renewal.due(12.0 + RENEW_EVERY - 0.1)
    assert renewal.due(12.0 + RENEW_EVERY)


def test_a_renewal_waits_for_confirms_but_not_forever() -> None:
    renewal = ChannelRenewal()
    renewal.nacked(10.0)
    due = 10.0 + RENEW_AFTER
    assert not renewal.overdue(due + RENEW_WAIT)
    assert renewal.overdue(due + RENEW_WAIT + 0.1)
    renewal.postpone(20.0)
    assert not renewal.due(20.0 + RENEW_EVERY - 0.1)
    assert renewal.due(20.0 + RENEW_EVERY)
