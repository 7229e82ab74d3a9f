"""Names, exchanges, queues and bindings of an app."""

from __future__ import annotations

import math
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightbus import errors
from lightbus.options import MAX_DELAY
from lightbus.transport import Publication
from lightbus.wire import topology
from lightbus.wire.topology import Binding, ConsumedQueue, Topology

MAIN = ConsumedQueue("billing", "main", (("lightbus", "user.*"), ("auth", "user.deleted")), (1, 5.5, 600))
SLOW = ConsumedQueue("billing", "slow", (("lightbus", "#"),), (1,))


def queues(wanted: Topology) -> dict[str, dict[str, Any]]:
    assert len({queue.name for queue in wanted.queues}) == len(wanted.queues)
    return {queue.name: queue.arguments for queue in wanted.queues}


def exchanges(wanted: Topology) -> dict[str, str]:
    return {exchange.name: exchange.type for exchange in wanted.exchanges}


DEAD_LETTERING = {
    "x-dead-letter-exchange": "billing.internal",
    "x-dead-letter-strategy": "at-least-once",
    "x-overflow": "reject-publish",
}


# --- declarations


def test_an_app_that_only_publishes_has_an_exchange_bound_to_the_bus() -> None:
    wanted = topology.publishing("billing")
    assert [exchange.name for exchange in wanted.shared] == ["lightbus"]
    assert exchanges(wanted) == {"billing": "topic"}
    assert wanted.queues == ()
    assert wanted.bindings == (Binding("billing", "lightbus", "#"),)


def test_the_bus_exchange_is_an_internal_topic_and_the_only_internal_one() -> None:
    bus = topology.bus_exchange()
    assert (bus.name, bus.type, bus.internal) == ("lightbus", "topic", True)
    others = topology.consuming("billing", [MAIN, SLOW], "quorum").exchanges
    assert not any(exchange.internal for exchange in others)


def test_queues_have_the_documented_arguments() -> None:
    wanted = topology.consuming("billing", [MAIN, SLOW], "quorum")
    work = {"x-queue-type": "quorum", **DEAD_LETTERING, "x-dead-letter-routing-key": "dead", "x-delivery-limit": 20}
    step = {"x-queue-type": "quorum", **DEAD_LETTERING}
    assert queues(wanted) == {
        "billing.dead": {"x-queue-type": "quorum", "x-overflow": "reject-publish", "x-delivery-limit": 1_000_000},
        "billing.main": work,
        "billing.slow": work,
        "billing.retry.1s": {**step, "x-dead-letter-routing-key": "main", "x-message-ttl": 1000},
        "billing.retry.5500ms": {**step, "x-dead-letter-routing-key": "main", "x-message-ttl": 5500},
        "billing.retry.600s": {**step, "x-dead-letter-routing-key": "main", "x-message-ttl": 600_000},
        "billing.slow.retry.1s": {**step, "x-dead-letter-routing-key": "slow", "x-message-ttl": 1000},
    }
    assert exchanges(wanted) == {"billing": "topic", "billing.internal": "direct"}
    assert [exchange.name for exchange in wanted.shared] == ["lightbus", "auth"]


def test_a_retried_copy_returns_to_the_queue_it_came_from() -> None:
    wanted = topology.consuming("billing", [MAIN, SLOW], "quorum")
    internal = {binding.key: binding.destination for binding in wanted.bindings if binding.source == "billing.internal"}
    assert internal == {
        "dead": "billing.dead",
        "main": "billing.main",
        "slow": "billing.slow",
        "retry.1s": "billing.retry.1s",
        "retry.5500ms": "billing.retry.5500ms",
        "retry.600s": "billing.retry.600s",
        "slow.retry.1s": "billing.slow.retry.1s",
    }
    for queue in wanted.queues:
        target = queue.arguments.get("x-dead-letter-routing-key")
        assert target is None or target in internal, f"{queue.name} dead-letters to nowhere"


def test_patterns_are_bound_to_the_bus_or_to_the_source() -> None:
    wanted = topology.consuming("billing", [MAIN], "quorum")
    received = {
        (one.source, one.key)
        for one in wanted.bindings
        if one.destination == "billing.main" and one.source != "billing.internal"
    }
    assert received == {("lightbus", "user.*"), ("auth", "user.deleted")}


def test_bindings_and_queues_are_declared_once_each() -> None:
    wanted = topology.consuming("billing", [MAIN, SLOW], "quorum")
    keys = [attrs.astuple(binding) for binding in wanted.bindings]
    assert len(keys) == len({str(key) for key in keys})


def test_an_app_that_subscribes_to_itself_does_not_declare_its_exchange_passively() -> None:
    own = ConsumedQueue("billing", "main", (("billing", "invoice.*"),), ())
    wanted = topology.consuming("billing", [own], "quorum")
    assert [exchange.name for exchange in wanted.shared] == ["lightbus"]


def test_classic_queues_have_no_arguments_of_quorum_queues() -> None:
    wanted = topology.consuming("billing", [MAIN, SLOW], "classic")
    for name, arguments in queues(wanted).items():
        assert arguments["x-queue-type"] == "classic", name
        assert "x-delivery-limit" not in arguments
        assert "x-dead-letter-strategy" not in arguments
        assert arguments["x-overflow"] == "reject-publish"
    assert queues(wanted)["billing.main"]["x-dead-letter-exchange"] == "billing.internal"


def test_every_name_is_within_the_apps_own_permissions() -> None:
    for wanted in (topology.consuming("billing", [MAIN, SLOW], "quorum"), topology.delaying("billing", 21, "quorum")):
        for entity in (*wanted.exchanges, *wanted.queues):
            assert entity.name == "billing" or entity.name.startswith("billing.")


# --- names


@pytest.mark.parametrize("name", ["billing", "a", "a-b_c9", "a" * 100])
def test_an_app_name_is_a_lower_case_word(name: str) -> None:
    assert topology.check_app_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "Billing", "9a", "_a", "a.b", "a b", "a\n", "é", "lightbus", "a" * 101, "amq.topic", None, 5, b"a"]
)
def test_any_other_app_name_is_refused(name: object) -> None:
    with pytest.raises(errors.InvalidName, match="app name"):
        topology.check_app_name(name)


@pytest.mark.parametrize("suffix", ["main", "dead", "retry", "delay", "internal", "contract"])
def test_a_queue_cannot_take_a_name_that_lightbus_uses(suffix: str) -> None:
    with pytest.raises(errors.InvalidName, match="reserved by Lightbus"):
        topology.check_queue_suffix(suffix, "test")


@pytest.mark.parametrize("suffix", ["", "Slow", "a.b", "retry.5s", "a" * 101, None, 3])
def test_a_queues_suffix_is_a_lower_case_word(suffix: object) -> None:
    with pytest.raises(errors.InvalidName, match="as in 'slow'"):
        topology.check_queue_suffix(suffix, "test")


@pytest.mark.parametrize("pattern", ["user.registered", "user.*", "#", "*", "*.#.a", "#.#", "A-b_9.c", "a" * 255])
def test_a_topic_pattern_is_words_stars_and_hashes(pattern: str) -> None:
    assert topology.check_pattern(pattern, "test") == pattern


@pytest.mark.parametrize(
    "pattern", ["", ".", "a.", "a..b", "a*", "*a", "##", "a b", "user/*", "a\n", "a" * 256, None, 5]
)
def test_anything_else_is_not_a_topic_pattern(pattern: object) -> None:
    with pytest.raises(errors.InvalidName, match="topic pattern"):
        topology.check_pattern(pattern, "test")


@given(st.floats(0.001, MAX_DELAY), st.floats(0.001, MAX_DELAY))
def test_retry_queues_of_one_name_have_one_ttl(one: float, other: float) -> None:
    def ttl(delay: float) -> tuple[str, int]:
        queue = ConsumedQueue("billing", "main", (), (delay,))
        (found,) = [queue for queue in topology.consuming("billing", [queue], "quorum").queues if "retry" in queue.name]
        return found.name, found.arguments["x-message-ttl"]

    assert (ttl(one)[0] == ttl(other)[0]) == (ttl(one)[1] == ttl(other)[1])
    assert ttl(one)[0] == f"billing.{topology.retry_key('main', one)}"
    assert ttl(one)[1] >= 1


def test_the_longest_names_fit_amqp() -> None:
    app = suffix = "a" * 100
    key = topology.retry_key(suffix, MAX_DELAY - 0.001)
    assert len(f"{app}.{key}") <= 255


# --- delays


def walk(wanted: Topology, exchange: str, headers: dict[str, int]) -> tuple[str, int]:
    """Follow a delayed message as a broker would: (the exchange where it is due, milliseconds that it waited)."""
    by_name = {one.name: one for one in wanted.exchanges}
    waited, hops = 0, 0
    while by_name[exchange].type == "headers":
        hops += 1
        assert hops < 100, "a loop"
        (binding,) = [one for one in wanted.bindings if one.source == exchange]
        asked = {name: value for name, value in (binding.arguments or {}).items() if name != "x-match"}
        if asked.items() <= headers.items():
            (queue,) = [one for one in wanted.queues if one.name == binding.destination]
            waited += queue.arguments["x-message-ttl"]
            exchange = queue.arguments["x-dead-letter-exchange"]
            assert "x-dead-letter-routing-key" not in queue.arguments, "the event's routing key must survive"
        else:
            exchange = by_name[exchange].arguments["alternate-exchange"]
    return exchange, waited


@given(st.integers(1, MAX_DELAY))
def test_a_delayed_event_waits_exactly_its_delay_and_is_due(seconds: int) -> None:
    level = topology.delay_level(seconds)
    headers = topology.delay_headers(seconds)
    wanted = topology.delaying("billing", level, "quorum")
    assert walk(wanted, topology.delay_exchange("billing", level), headers) == ("billing.delay.due", seconds * 1000)
    due = {(one.destination, one.to_queue) for one in wanted.bindings if one.source == "billing.delay.due"}
    assert due == {("billing", False), ("billing.delay.unheard", True)}


@given(st.integers(1, MAX_DELAY))
def test_a_delayed_publication_keeps_its_content_and_its_delay_can_be_read_back(seconds: int) -> None:
    plain = Publication("billing", "invoice.due", b"{}", {"headers": {"tenant": "a"}, "message_id": "m-1"})
    delayed, level = topology.delayed(plain, seconds)
    assert (delayed.exchange, delayed.routing_key, delayed.body) == (f"billing.delay.{level}", "invoice.due", b"{}")
    assert (delayed.properties["message_id"], delayed.properties["headers"]["tenant"]) == ("m-1", "a")
    assert topology.delay_of(delayed.properties["headers"]) == seconds
    assert topology.delay_of({"tenant": "a"}) == 0


@given(st.integers(1, MAX_DELAY), st.integers(0, topology.DELAY_LEVELS - 1))
def test_levels_that_exist_do_not_change(seconds: int, other: int) -> None:
    few, more = sorted((topology.delay_level(seconds), other))
    small, large = topology.delaying("billing", few, "quorum"), topology.delaying("billing", more, "quorum")
    assert queues(small).items() <= queues(large).items()
    assert {str(one) for one in small.bindings} <= {str(one) for one in large.bindings}


@given(st.floats(0, MAX_DELAY, exclude_min=True) | st.integers(1, MAX_DELAY))
def test_a_delay_is_rounded_up_to_whole_seconds(delay: float) -> None:
    seconds = topology.delay_seconds(delay)
    assert seconds - 1 < delay <= seconds
    assert isinstance(seconds, int)
    assert 0 <= topology.delay_level(seconds) < topology.DELAY_LEVELS


@pytest.mark.parametrize("delay", [0, -1, math.nan, math.inf, MAX_DELAY + 1, "5", True, None, 1j])
def test_any_other_delay_is_refused(delay: object) -> None:
    with pytest.raises(errors.InvalidOption, match="delay="):
        topology.delay_seconds(delay)


def test_levels_dead_letter_at_least_once_and_last_twice_as_long_each() -> None:
    found = queues(topology.delaying("billing", 3, "quorum"))
    for level in range(4):
        arguments = found[f"billing.delay.{level}"]
        assert arguments["x-message-ttl"] == 1000 * 2**level
        assert arguments["x-dead-letter-strategy"] == "at-least-once"
        assert arguments["x-queue-type"] == "quorum"
