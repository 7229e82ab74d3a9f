"""The watchdog's decision: what two looks at a queue say about a consumer."""

from __future__ import annotations

import math

from lightbus.consuming.watchdog import INTERVAL, SECOND_LOOK, Watch


def subscribed(now: float = 0.0) -> Watch:
    watch = Watch("billing")
    watch.subscribed(now)
    return watch


def test_an_idle_queue_is_proven_to_be_consumed_by_subscribing_again() -> None:
    """One consumer and nothing ready is also what RabbitMQ 3.10.8 says of a consumer that it delivers to in vain."""
    watch = subscribed()
    assert watch.look(30, ready=0, consumers=1, received=False, room=True) is None
    assert (watch.proven, watch.next_look, watch.renewal_due) == (None, 30 + INTERVAL, True)
    watch.renewed(31)
    assert (watch.proven, watch.renewal_due) == (31, False)


def test_no_consumer_at_two_looks_means_stalled() -> None:
    watch = subscribed()
    assert watch.look(30, ready=0, consumers=0, received=False, room=True) is None
    assert watch.next_look == 30 + SECOND_LOOK
    stalled = watch.look(32, ready=0, consumers=0, received=False, room=True)
    assert stalled == "the broker lists no consumer on the queue 'billing'"
    assert watch.proven is None


def test_events_that_wait_while_there_is_room_mean_stalled_even_beside_another_consumer() -> None:
    watch = subscribed()
    watch.look(30, ready=7, consumers=2, received=False, room=True)
    stalled = watch.look(32, ready=7, consumers=2, received=False, room=True)
    assert stalled == "7 events wait in the queue 'billing', but none is delivered"


def test_events_that_wait_do_not_mean_stalled_while_the_prefetch_is_full_or_some_arrive() -> None:
    watch = subscribed()
    for now in (30, 60, 90):
        assert watch.look(now, ready=7, consumers=1, received=False, room=False) is None
    assert watch.proven is None  # nor is it a proof
    for now in (120, 150, 180):
        assert watch.look(now, ready=7, consumers=1, received=True, room=True) is None
    assert watch.proven == 180


def test_a_suspicion_that_the_second_look_does_not_share_is_forgotten() -> None:
    watch = subscribed()
    watch.look(30, ready=1, consumers=1, received=False, room=True)
    assert watch.look(32, ready=0, consumers=1, received=True, room=True) is None
    assert watch.look(62, ready=1, consumers=1, received=False, room=True) is None


def test_only_a_proof_forgets_the_rebuilds_before_it() -> None:
    watch = subscribed()
    watch.rebuilds = 2
    watch.subscribed(40)
    assert watch.rebuilds == 2
    watch.look(70, ready=0, consumers=1, received=False, room=True)
    assert watch.rebuilds == 2
    watch.renewed(70)
    assert watch.rebuilds == 0


def test_nothing_is_looked_at_while_there_is_no_subscription() -> None:
    watch = subscribed()
    watch.ended()
    assert watch.next_look == math.inf
