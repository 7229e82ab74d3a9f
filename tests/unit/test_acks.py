"""Which acks are sent, against a model of a broker that closes the channel over any wrong one."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lightbus.consuming.acks import Settlements


class ModelBroker:
    """What RabbitMQ knows of one channel: the tags that it has delivered and not seen settled."""

    def __init__(self) -> None:
        self.delivered = 0
        self.outstanding: set[int] = set()

    def deliver(self) -> int:
        self.delivered += 1
        self.outstanding.add(self.delivered)
        return self.delivered

    def ack(self, tag: int, multiple: bool) -> set[int]:
        assert tag in self.outstanding, f"406 PRECONDITION_FAILED - unknown delivery tag {tag}"
        settled = {one for one in self.outstanding if one <= tag} if multiple else {tag}
        self.outstanding -= settled
        return settled

    def reject(self, tag: int) -> None:
        assert tag in self.outstanding, f"406 PRECONDITION_FAILED - unknown delivery tag {tag}"
        self.outstanding.discard(tag)


class Channel(RuleBasedStateMachine):
    """Deliveries arrive, end in any order, some by a reject; acks are taken now and then."""

    @initialize(hold=st.integers(0, 5))
    def open(self, hold: int) -> None:
        self.broker = ModelBroker()
        self.settlements = Settlements(hold)
        self.in_hand: list[int] = []
        self.done: set[int] = set()

    @rule(count=st.integers(1, 8))
    def deliver(self, count: int) -> None:
        self.in_hand += [self.broker.deliver() for _ in range(count)]

    @precondition(lambda self: self.in_hand)
    @rule(data=st.data())
    def end_well(self, data: st.DataObject) -> None:
        tags = data.draw(st.lists(st.sampled_from(self.in_hand), unique=True, min_size=1))
        self.in_hand = [tag for tag in self.in_hand if tag not in tags]
        self.done |= set(tags)
        self.settlements.settle(tags)

    @precondition(lambda self: self.in_hand)
    @rule(data=st.data())
    def reject(self, data: st.DataObject) -> None:
        tag = data.draw(st.sampled_from(self.in_hand))
        self.in_hand.remove(tag)
        self.broker.reject(tag)
        self.settlements.already_sent(tag)

    @rule(all_of_them=st.booleans())
    def take(self, all_of_them: bool) -> None:
        for tag, multiple in self.settlements.take(all_of_them=all_of_them):
            settled = self.broker.ack(tag, multiple)
            assert settled <= self.done, f"{sorted(settled - self.done)} were acked before they were handled"
        assert self.settlements.waiting <= self.settlements.hold
        if all_of_them:
            assert self.settlements.waiting == 0
            assert self.broker.outstanding == set(self.in_hand)

    @invariant()
    def nothing_in_hand_is_settled_on_the_broker(self) -> None:
        if hasattr(self, "broker"):
            assert set(self.in_hand) <= self.broker.outstanding

    def teardown(self) -> None:
        if not hasattr(self, "broker"):
            return
        self.settlements.settle(self.in_hand)
        self.done |= set(self.in_hand)
        for tag, multiple in self.settlements.take(all_of_them=True):
            assert self.broker.ack(tag, multiple) <= self.done
        assert self.broker.outstanding == set()
        assert self.settlements.waiting == 0


Channel.TestCase.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
TestChannel = Channel.TestCase


@given(st.permutations(range(1, 30)), st.integers(0, 30))
def test_whatever_order_handlers_end_in_all_are_acked_in_the_end(order: list[int], hold: int) -> None:
    broker, settlements = ModelBroker(), Settlements(hold)
    for _ in order:
        broker.deliver()
    for tag in order:
        settlements.settle([tag])
        for one, multiple in settlements.take():
            broker.ack(one, multiple)
    for one, multiple in settlements.take(all_of_them=True):
        broker.ack(one, multiple)
    assert broker.outstanding == set()


def test_contiguous_deliveries_are_acked_at_once() -> None:
    settlements = Settlements(hold=10)
    settlements.settle([3, 1, 2])
    assert settlements.take() == [(3, True)]
    settlements.settle([4])
    assert settlements.take() == [(4, False)]
    assert settlements.take() == []


def test_out_of_order_deliveries_wait_for_those_before_them_up_to_the_hold() -> None:
    settlements = Settlements(hold=2)
    settlements.settle([2, 3])
    assert settlements.take() == []
    assert settlements.waiting == 2
    settlements.settle([5])
    assert settlements.take() == [(2, False), (3, False), (5, False)]
    settlements.settle([1, 4])
    assert settlements.take() == [(4, True)]


def test_what_is_settled_after_a_tag_is_counted_in_and_out_of_order() -> None:
    settlements = Settlements(hold=0)
    settlements.settle([1, 2, 3, 7])
    settlements.take(all_of_them=True)  # 5 and 6 are left, and 4
    settlements.already_sent(9)
    assert [settlements.sent_after(tag) for tag in (0, 2, 3, 7, 9)] == [5, 3, 2, 1, 0]


def test_a_reject_between_acks_is_not_acked_again() -> None:
    settlements = Settlements(hold=10)
    settlements.settle([1, 3])
    settlements.already_sent(2)
    assert settlements.take() == [(3, True)]
    settlements.already_sent(4)
    assert settlements.take() == []
    settlements.settle([5])
    assert settlements.take() == [(5, False)]
