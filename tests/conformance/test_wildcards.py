"""`*` is one word, `#` any number of words: in Lightbus, in the embedded broker and in RabbitMQ."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightbus import Lightbus, Message
from lightbus.pattern import topic_matches
from lightbus.transport import Connection, Publication
from lightbus.transport.activemq import selector
from tests.bus import connected, eventually, running
from tests.patience import wait_until

WORDS = ("a", "b", "ab", "user", "x-1")

words = st.sampled_from(WORDS)
keys = st.lists(words, min_size=1, max_size=5).map(".".join)
patterns = st.lists(st.one_of(words, st.just("*"), st.just("#")), min_size=1, max_size=5).map(".".join)

odd_words = st.sampled_from(("a", "b", "", "*", "#", "ab"))
odd_keys = st.lists(odd_words, max_size=4).map(".".join)
"""Keys and patterns that only other clients use: empty, with empty words, with `*` and `#` in keys."""


@pytest.mark.anyio
async def test_handlers_get_the_events_that_their_patterns_match(make_app: Callable[..., Lightbus]) -> None:
    shop, stats = make_app("shop"), make_app("stats")
    names = ["order", "order.placed", "order.line.added", "orders.placed", "invoice.placed", "user.signed.up"]
    classes = {name: shop.event(name)(type("Event", (), {"__annotations__": {}})) for name in names}
    received: dict[str, set[str]] = defaultdict(set)
    wanted = {
        "order.placed": {"order.placed"},
        "order.*": {"order.placed"},
        "*.placed": {"order.placed", "orders.placed", "invoice.placed"},
        "order.#": {"order", "order.placed", "order.line.added"},
        "#.placed": {"order.placed", "orders.placed", "invoice.placed"},
        "#": set(names),
        "*": {"order"},
        "*.*.*": {"order.line.added", "user.signed.up"},
        "order.*.#": {"order.placed", "order.line.added"},
        "#.signed.#": {"user.signed.up"},
    }

    def handle(pattern: str) -> None:
        @stats.on(pattern, name=f"handle {pattern}")
        async def note(message: Message) -> None:
            if message.source == "shop" and message.event in names:
                received[pattern].add(message.event)

    for pattern in wanted:
        handle(pattern)
    async with running(shop, stats) as bus:
        for cls in classes.values():
            await shop.publish(cls())
        await bus.quiet(stats)
        await eventually(lambda: dict(received), wanted)


class TopicExchange:
    """A topic exchange of the broker, which shows which patterns match which keys."""

    def __init__(self, connection: Connection, accepts: Callable[[str], bool]) -> None:
        """
        Args:
            accepts: whether the broker takes a pattern. Artemis does not take all of them.
        """
        self.connection = connection
        self.accepts = accepts
        self.channel = channel = connection.channel()
        self.published = 0
        self.unconfirmed: set[int] = set()
        channel.on_ack = self._confirm
        channel.confirm_select()
        self.queues: dict[str, str] = {}
        channel.exchange_declare("topics", "topic", durable=False, auto_delete=False)

    def _confirm(self, tag: int, multiple: bool) -> None:
        self.unconfirmed -= {one for one in self.unconfirmed if one == tag or (multiple and one < tag)}

    def _all_are_confirmed(self) -> bool:
        with contextlib.suppress(TimeoutError):
            self.connection.drain_events(0.02)
        return not self.unconfirmed

    def matches(self, patterns: Sequence[str], keys: Sequence[str]) -> set[tuple[str, str]]:
        """The pairs (pattern, key) that match: there is a queue for each pattern, and a message for each key."""
        for pattern in patterns:
            if pattern not in self.queues:
                queue = self.queues[pattern] = f"q{len(self.queues)}"
                self.channel.queue_declare(queue, durable=False, auto_delete=False, exclusive=True, nowait=True)
                self.channel.queue_bind(queue, "topics", pattern, nowait=True)
        publications = [Publication("topics", key, key.encode(), {"message_id": "m"}, mandatory=False) for key in keys]
        self.unconfirmed.update(range(self.published + 1, self.published + len(publications) + 1))
        self.published += len(publications)
        self.channel.publish(publications)
        # When a later synchronous method has its reply, RabbitMQ has all messages in their queues.
        self.channel.exchange_declare("topics", "topic", durable=False, auto_delete=False, passive=True)
        wait_until(self._all_are_confirmed, "confirms")
        found = set()
        for pattern in self.queues:
            while (delivery := self.channel.get(self.queues[pattern])) is not None:
                self.channel.basic_ack(delivery.delivery_tag)
                if pattern in patterns:
                    found.add((pattern, delivery.body.decode()))
        return found


def test_matching_is_the_same_as_in_the_broker(broker_url: str) -> None:
    """Compares with the broker: ten patterns and thirty keys at once, because each query needs a round trip."""
    with connected(broker_url) as connection:
        _compare(TopicExchange(connection, _is_expressible if "activemq" in broker_url else lambda _: True))


def _is_expressible(pattern: str) -> bool:
    """Whether a selector of Artemis can express it. Which ones, tests/unit/test_activemq_selector.py checks."""
    try:
        return bool(selector.clause("topics", pattern))
    except ValueError:
        return False


def _compare(exchange: TopicExchange) -> None:
    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.lists(st.one_of(patterns, odd_keys), min_size=5, max_size=10, unique=True),
        st.lists(st.one_of(keys, odd_keys), min_size=20, max_size=30, unique=True),
    )
    def ask(some_patterns: list[str], some_keys: list[str]) -> None:
        some_patterns = [one for one in some_patterns if exchange.accepts(one)]
        found = exchange.matches(some_patterns, some_keys)
        computed = {(p, k) for p in some_patterns for k in some_keys if topic_matches(p, k)}
        assert computed == found

    ask()


@given(keys)
def test_a_hash_matches_every_key(key: str) -> None:
    assert topic_matches("#", key)
    assert topic_matches(f"#.{key}.#", key)
    assert topic_matches(key, key)


@given(patterns, keys)
def test_a_star_matches_what_its_word_matches(pattern: str, key: str) -> None:
    if topic_matches(pattern, key):
        assert topic_matches(pattern.replace("user", "*"), key)
        assert topic_matches(f"{pattern}.#", key)
        assert topic_matches(f"{pattern}.*", f"{key}.more")


def test_many_hashes_are_fast() -> None:
    assert not topic_matches(".".join(["#", "a"] * 60), ".".join(["a"] * 100 + ["b"]))
