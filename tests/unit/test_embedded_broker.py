"""The embedded broker: the AMQP model in an SQLite file."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import kombu
import pytest
from amqp import exceptions as amqp_errors
from hypothesis import given, settings
from hypothesis import strategies as st

from lightbus import errors
from lightbus.pattern import topic_matches
from lightbus.transport import Delivery, Publication
from lightbus.transport.sqlite import store as store
from lightbus.transport.sqlite.channel import Channel
from lightbus.transport.sqlite.connection import Connection, Transport
from lightbus.transport.sqlite.control import advance_clock
from lightbus.transport.sqlite.place import forget_memory, locate
from lightbus.transport.sqlite.tables import decode_table, encode_properties
from tests.patience import LIMIT as SOON
from tests.patience import sometimes_within, within


class Client:
    """A connection with one channel, which records its callbacks."""

    def __init__(self, url: str) -> None:
        self.connection: Connection = kombu.Connection(url, transport=Transport).transport.establish_connection()
        self.channel: Channel = self.connection.channel()
        self.calls: list[tuple[Any, ...]] = []
        self.got: list[Delivery] = []
        self.channel.on_ack = lambda tag, multiple: self.calls.append(("ack", tag, multiple))
        self.channel.on_nack = lambda tag, multiple: self.calls.append(("nack", tag, multiple))
        self.channel.on_return = lambda message_id: self.calls.append(("return", message_id))

    def exchange(self, name: str, type: str = "topic", **options: Any) -> None:
        self.channel.exchange_declare(name, type, **{"durable": True, "auto_delete": False} | options)

    def queue(self, name: str, *keys: str, exchange: str = "app", **arguments: Any) -> None:
        """Declare a queue; its arguments are written as x_message_ttl."""
        given = {key.replace("_", "-"): value for key, value in arguments.items()}
        self.channel.queue_declare(name, durable=True, auto_delete=False, arguments=given)
        for key in keys:
            self.channel.queue_bind(name, exchange, key)

    def publish(self, exchange: str, routing_key: str, *bodies: bytes, **properties: Any) -> None:
        self.channel.publish([Publication(exchange, routing_key, body, dict(properties)) for body in bodies or (b"x",)])

    def send(self, queue: str, *bodies: bytes, **properties: Any) -> None:
        self.publish("", queue, *bodies, **properties)

    def consume(self, queue: str, **options: Any) -> str:
        cancelled = lambda tag: self.calls.append(("cancel", tag))  # noqa: E731
        return self.channel.consume(queue, self.got.append, on_cancel=cancelled, **options)

    def bodies(self) -> list[bytes]:
        return [delivery.body for delivery in self.got]

    def until(self, done: Callable[[], Any]) -> None:
        """Drain events until `done()` is true."""
        deadline = time.monotonic() + SOON
        while not done():
            with contextlib.suppress(TimeoutError):
                self.connection.drain_events(min(0.2, deadline - time.monotonic()))
            assert time.monotonic() < deadline, f"not within {SOON} s: {self.calls} {self.bodies()}"

    def settle(self) -> None:
        """Dispatch everything that has arrived."""
        with contextlib.suppress(TimeoutError):
            while True:
                self.connection.drain_events(0)

    def ready(self, queue: str) -> int:
        return self.channel.queue_declare(queue, passive=True).message_count

    def take(self, queue: str) -> list[bytes]:
        """Get and ack everything in a queue."""
        bodies: list[bytes] = []
        while (delivery := self.channel.get(queue)) is not None:
            bodies.append(delivery.body)
            self.channel.basic_ack(delivery.delivery_tag)
        return bodies


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "file":
        yield f"sqlite:///{tmp_path}/bus.db"
    else:
        name = uuid.uuid4().hex
        yield f"memory://{name}"
        forget_memory(name)


@pytest.fixture
def connect(url: str) -> Iterator[Callable[[], Client]]:
    clients: list[Client] = []

    def connect() -> Client:
        clients.append(Client(url))
        return clients[-1]

    yield connect
    for client in clients:
        client.connection.close()


@pytest.fixture
def client(connect: Callable[[], Client]) -> Client:
    client = connect()
    client.exchange("app")
    return client


@pytest.fixture
def other(connect: Callable[[], Client]) -> Client:
    return connect()


# --- topic patterns ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "key", "matches"),
    [
        ("user.registered", "user.registered", True),
        ("user.*", "user.registered", True),
        ("user.*", "user", False),
        ("user.*", "user.a.b", False),
        ("user.#", "user", True),
        ("user.#", "user.a.b", True),
        ("#", "", True),
        ("*", "", False),
        ("", "", True),
        ("", "a", False),
        ("a.*.b", "a..b", True),
        ("a.#.b", "a.b", True),
        ("#.a.#.b", "x.a.y.b.b", True),
        ("*.#", "a", True),
        ("*.*", ".", True),
    ],
)
def test_a_topic_pattern_matches_as_in_amqp(pattern: str, key: str, matches: bool) -> None:
    assert topic_matches(pattern, key) is matches


def _reference(pattern: list[str], words: list[str]) -> bool:
    if not pattern:
        return not words
    if pattern[0] == "#":
        return any(_reference(pattern[1:], words[skip:]) for skip in range(len(words) + 1))
    return bool(words) and pattern[0] in ("*", words[0]) and _reference(pattern[1:], words[1:])


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["a", "b", "", "*", "#"]), max_size=6).map(".".join),
    st.lists(st.sampled_from(["a", "b", "c", ""]), max_size=6).map(".".join),
)
def test_topic_matching_agrees_with_an_exhaustive_search(pattern: str, key: str) -> None:
    split = lambda text: text.split(".") if text else []  # noqa: E731
    assert topic_matches(pattern, key) is _reference(split(pattern), split(key))


def test_a_pattern_with_many_hashes_matches_quickly() -> None:
    assert not topic_matches(".".join(["#", "a"] * 200 + ["b"]), ".".join(["a"] * 2000))


# --- URLs -------------------------------------------------------------------------------------


def test_a_path_after_three_slashes_is_relative_and_after_four_absolute(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate("sqlite:///data/bus.db").path == tmp_path / "data" / "bus.db"
    assert locate("sqlite:////var/my%20bus.db").path == Path("/var/my bus.db")


def test_a_url_without_a_path_is_a_file_in_the_users_state_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    client = Client("sqlite://")
    path = locate("sqlite://").path
    client.connection.close()
    assert path.is_relative_to(tmp_path)
    assert path.is_file()
    assert path.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("url", ["sqlite://host/bus.db", "sqlite:///bus.db?mode=ro", "redis://", "memory://a?b=c"])
def test_a_url_with_a_host_options_or_another_scheme_is_refused(url: str) -> None:
    with pytest.raises(errors.InvalidURL, match=r"Use|use|Remove"):
        locate(url)


# --- kombu ------------------------------------------------------------------------------------


def test_kombu_declares_publishes_and_consumes(url: str) -> None:
    with kombu.Connection(url, transport=Transport) as connection:
        channel = connection.channel()
        app = kombu.Exchange("billing", "topic")(channel)
        app.declare()
        bus = kombu.Exchange("bus", "topic")(channel)
        bus.declare()
        bus.bind_to(app, "#")
        queue = kombu.Queue("q", exchange=bus, routing_key="user.#", message_ttl=60)(channel)
        queue.declare()
        got: list[Any] = []
        connection.Producer(channel).publish({"id": 1}, exchange="billing", routing_key="user.new", headers={"a": 1})
        with connection.Consumer([queue], callbacks=[lambda body, message: got.append((body, message))]):
            connection.drain_events(timeout=SOON)
        body, message = got[0]
        assert (body, message.headers, message.delivery_info["exchange"]) == ({"id": 1}, {"a": 1}, "billing")
        message.ack()
        connection.Producer(channel).publish("again", exchange="", routing_key="q")
        message = queue.get()
        assert message is not None
        assert message.payload == "again"
        message.reject()
        assert queue.get() is None
        assert queue.purge() == 0
        queue.delete()
        with pytest.raises(amqp_errors.NotFound):
            queue.queue_declare(passive=True)


# --- exchanges and bindings -------------------------------------------------------------------


def test_a_topic_exchange_routes_by_pattern(client: Client) -> None:
    client.queue("all", "#")
    client.queue("users", "user.*")
    client.publish("app", "user.new", b"1")
    client.publish("app", "order.new", b"2")
    assert client.take("all") == [b"1", b"2"]
    assert client.take("users") == [b"1"]


def test_direct_and_fanout_exchanges_route(client: Client) -> None:
    client.exchange("direct", "direct")
    client.exchange("fanout", "fanout")
    client.queue("q", "red", exchange="direct")
    client.queue("r", "ignored", exchange="fanout")
    for exchange in ("direct", "fanout"):
        client.publish(exchange, "red", exchange.encode())
        client.publish(exchange, "blue", exchange.encode())
    assert client.take("q") == [b"direct"]
    assert client.take("r") == [b"fanout", b"fanout"]


def test_a_headers_exchange_matches_all_or_any(client: Client) -> None:
    client.exchange("h", "headers")
    for queue, arguments in {
        "all": {"x-match": "all", "a": 1, "b": "x"},
        "any": {"x-match": "any", "a": 1, "b": "x"},
        "present": {"a": None},
        "nothing": {},
    }.items():
        client.queue(queue)
        client.channel.queue_bind(queue, "h", "", arguments=arguments)
    client.publish("h", "", b"both", headers={"a": 1, "b": "x"})
    client.publish("h", "", b"one", headers={"a": 1})
    client.publish("h", "", b"bool", headers={"a": True})
    client.publish("h", "", b"none")
    assert client.take("all") == [b"both"]
    assert client.take("any") == [b"both", b"one"]
    assert client.take("present") == [b"both", b"one", b"bool"]
    assert client.take("nothing") == [b"both", b"one", b"bool", b"none"]


def test_a_queue_gets_a_message_once_from_several_bindings_and_from_a_cycle(client: Client) -> None:
    client.exchange("bus")
    client.channel.exchange_bind("bus", "app", "#")
    client.channel.exchange_bind("app", "bus", "#")
    client.queue("q", "#", "a.*", "a.b")
    client.channel.queue_bind("q", "bus", "#")
    client.publish("app", "a.b")
    assert client.take("q") == [b"x"]


def test_an_internal_exchange_gets_messages_from_other_exchanges_only(client: Client) -> None:
    client.exchange("lightbus", internal=True)
    client.channel.exchange_bind("lightbus", "app", "#")
    client.queue("q", "#", exchange="lightbus")
    client.publish("app", "a")
    delivery = client.channel.get("q")
    assert delivery is not None
    assert delivery.exchange == "app"
    message = "ACCESS_REFUSED - cannot publish to internal exchange 'lightbus' in vhost '/'"
    with pytest.raises(amqp_errors.AccessRefused, match=message):
        client.publish("lightbus", "a")


def test_an_alternate_exchange_gets_messages_that_match_no_binding(client: Client) -> None:
    client.exchange("lost", "fanout")
    client.exchange("first", arguments={"alternate-exchange": "lost"})
    client.queue("known", "a", exchange="first")
    client.queue("unknown", "", exchange="lost")
    client.publish("first", "a", b"a")
    client.publish("first", "b", b"b")
    assert (client.take("known"), client.take("unknown")) == ([b"a"], [b"b"])


def test_headers_exchanges_with_binary_levels_give_any_delay(client: Client) -> None:
    """This is how Lightbus delays a publication (docs/delayed.md)."""
    client.queue("q", "#")
    below = "app"
    for level in range(3):
        name = f"delay.{level}"
        client.exchange(name, "headers", arguments={"alternate-exchange": below})
        client.queue(name, x_message_ttl=2**level * 40, x_dead_letter_exchange=below)
        client.channel.queue_bind(name, name, "", arguments={f"bit{level}": True})
        below = name
    started = time.monotonic()
    client.publish("delay.2", "user.new", b"5", headers={"bit2": True, "bit0": True})
    client.consume("q")
    client.until(lambda: client.got)
    assert time.monotonic() - started >= 0.2
    assert client.got[0].routing_key == "user.new"


def test_unbinding_and_deleting_stop_routing(client: Client) -> None:
    client.exchange("bus")
    client.channel.exchange_bind("bus", "app", "#")
    client.queue("q", "#", exchange="bus")
    client.channel.exchange_unbind("bus", "app", "#")
    client.publish("app", "a")
    client.channel.queue_unbind("q", "bus", "#")
    client.publish("bus", "a")
    assert client.take("q") == []
    client.channel.exchange_delete("bus")
    with pytest.raises(amqp_errors.NotFound):
        client.publish("bus", "a")


def test_another_connection_sees_a_new_binding_at_once(client: Client, other: Client) -> None:
    other.publish("app", "a", b"early")
    client.queue("q", "#")
    other.publish("app", "a", b"late")
    assert client.take("q") == [b"late"]


def test_an_auto_delete_exchange_is_deleted_with_its_last_binding(client: Client) -> None:
    client.exchange("brief", auto_delete=True)
    client.queue("q", "#", exchange="brief")
    client.channel.queue_delete("q")
    with pytest.raises(amqp_errors.NotFound):
        client.channel.exchange_declare("brief", "topic", passive=True)


# --- errors with RabbitMQ's messages ----------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.publish("none", "a"), "NOT_FOUND - no exchange 'none' in vhost '/'"),
        (lambda c: c.channel.exchange_declare("none", "topic", passive=True), "NOT_FOUND - no exchange 'none'"),
        (lambda c: c.channel.queue_declare("none", passive=True), "NOT_FOUND - no queue 'none' in vhost '/'"),
        (lambda c: c.channel.queue_bind("none", "app", "#"), "NOT_FOUND - no queue 'none'"),
        (lambda c: c.channel.exchange_bind("app", "none", "#"), "NOT_FOUND - no exchange 'none'"),
        (lambda c: c.channel.get("none"), "NOT_FOUND - no queue 'none'"),
        (lambda c: c.consume("none"), "NOT_FOUND - no queue 'none'"),
    ],
)
def test_an_unknown_queue_or_exchange_is_404(client: Client, call: Callable[[Client], Any], message: str) -> None:
    with pytest.raises(amqp_errors.NotFound, match=message) as caught:
        call(client)
    assert caught.value.reply_code == 404


def test_declaring_again_is_allowed_and_with_other_arguments_is_406(client: Client) -> None:
    client.queue("q", x_message_ttl=1)
    client.queue("q", x_message_ttl=1)
    client.exchange("app")
    expected = "PRECONDITION_FAILED - inequivalent arg '{}' for {} in vhost '/': received {} but current is {}"
    for call, message in [
        (lambda: client.queue("q", x_message_ttl=2), ("x-message-ttl", "queue 'q'", "'2'", "'1'")),
        (lambda: client.queue("q"), ("x-message-ttl", "queue 'q'", "none", "the value '1' of type 'signedint'")),
        (lambda: client.exchange("app", durable=False), ("durable", "exchange 'app'", "'false'", "'true'")),
        (lambda: client.exchange("app", "direct"), ("type", "exchange 'app'", "'direct'", "'topic'")),
    ]:
        with pytest.raises(amqp_errors.PreconditionFailed) as caught:
            call()
        assert str(caught.value) == expected.format(*message)


def test_an_error_undoes_the_whole_batch(client: Client) -> None:
    client.queue("q", "#")
    with pytest.raises(amqp_errors.NotFound):
        client.channel.publish([Publication("app", "a", b"1", {}), Publication("none", "a", b"2", {})])
    assert client.ready("q") == 0


# --- publishing -------------------------------------------------------------------------------


def test_drain_events_dispatches_returns_before_confirms(client: Client) -> None:
    client.queue("q", "known")
    client.channel.confirm_select()
    client.publish("app", "known", b"1", b"2", message_id="a")
    client.publish("app", "unknown", b"3", message_id="b")
    assert client.calls == []
    client.settle()
    assert client.calls == [("ack", 2, True), ("return", "b"), ("ack", 3, False)]


def test_a_message_that_is_not_mandatory_is_not_returned(client: Client) -> None:
    client.channel.publish([Publication("app", "a", b"", {"message_id": "a"}, mandatory=False)])
    client.settle()
    assert client.calls == []


def test_a_full_queue_nacks_and_other_queues_get_the_message(client: Client) -> None:
    client.queue("small", "#", x_max_length=2, x_overflow="reject-publish")
    client.queue("large", "#")
    client.channel.confirm_select()
    client.publish("app", "a", b"1", b"2", b"3", b"4")
    client.publish("app", "a", b"5")
    client.settle()
    assert client.calls == [("ack", 2, True), ("nack", 4, True), ("nack", 5, False)]
    assert client.take("small") == [b"1", b"2"]
    assert client.take("large") == [b"1", b"2", b"3", b"4", b"5"]


def test_a_queue_that_drops_its_head_keeps_the_newest(client: Client) -> None:
    client.queue("dead")
    client.queue("q", x_max_length=2, x_dead_letter_exchange="", x_dead_letter_routing_key="dead")
    client.send("q", b"1", b"2", b"3")
    dead = client.channel.get("dead")
    assert client.take("q") == [b"2", b"3"]
    assert dead is not None
    assert dead.properties["headers"]["x-death"][0]["reason"] == "maxlen"


_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30)).map(lambda time: time.replace(microsecond=0, tzinfo=UTC)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.dictionaries(st.text(), _values, max_size=4))
def test_headers_are_unchanged_after_encoding_and_decoding(headers: dict[str, Any]) -> None:
    assert decode_table(encode_properties({"headers": headers})) == {"headers": headers}


def test_a_naive_datetime_is_utc_and_is_decoded_with_its_time_zone() -> None:
    table = {"headers": {"time": datetime(2024, 1, 2, 3, 4, 5)}}
    read = decode_table(encode_properties(table))
    assert read == {"headers": {"time": datetime(2024, 1, 2, 3, 4, 5, tzinfo=UTC)}}


@pytest.mark.parametrize(
    ("properties", "message"),
    [({"headers": {"a": object()}}, "cannot be encoded"), ({"colour": "red"}, "AMQP has no property 'colour'")],
)
def test_a_property_or_type_that_amqp_does_not_have_is_refused(
    client: Client, properties: dict[str, Any], message: str
) -> None:
    client.queue("q", "#")
    with pytest.raises(ValueError, match=message):
        client.publish("app", "a", **properties)


def test_a_large_body_arrives_whole(client: Client) -> None:
    client.queue("q", "#")
    body = os.urandom(10_000_000)
    client.publish("app", "a", body)
    assert client.take("q") == [body]


# --- consuming --------------------------------------------------------------------------------


def test_messages_arrive_in_order_up_to_the_prefetch(client: Client) -> None:
    client.queue("q")
    client.send("q", *(b"%d" % number for number in range(10)))
    client.channel.basic_qos(0, 3, False)
    client.consume("q")
    client.settle()
    assert client.bodies() == [b"0", b"1", b"2"]
    client.channel.basic_ack(client.got[1].delivery_tag, multiple=True)
    client.settle()
    assert client.bodies() == [b"0", b"1", b"2", b"3", b"4"]


def test_unacked_messages_return_in_front_and_acked_ones_do_not(client: Client, other: Client) -> None:
    client.queue("q")
    client.send("q", b"1", b"2", b"3")
    client.consume("q")
    client.settle()
    client.channel.basic_ack(1)
    client.connection.close()
    other.send("q", b"4")
    other.consume("q")
    other.until(lambda: len(other.got) == 3)
    assert [(d.body, d.redelivered) for d in other.got] == [(b"2", True), (b"3", True), (b"4", False)]
    assert other.got[0].properties["headers"] == {"x-delivery-count": 1}


def test_closing_a_channel_requeues_its_messages(client: Client) -> None:
    client.queue("q")
    client.send("q", b"1")
    channel = client.connection.channel()
    assert channel.get("q") is not None
    channel.close()
    assert client.take("q") == [b"1"]


def test_a_requeued_message_returns_to_its_place(client: Client) -> None:
    client.queue("q")
    client.send("q", b"1", b"2")
    first = client.channel.get("q")
    assert first is not None
    client.channel.basic_reject(first.delivery_tag, requeue=True)
    assert client.take("q") == [b"1", b"2"]


def test_an_unknown_delivery_tag_is_406(client: Client) -> None:
    for call in (client.channel.basic_ack, client.channel.basic_nack):
        with pytest.raises(amqp_errors.PreconditionFailed, match="unknown delivery tag 7"):
            call(7)


def test_a_consumer_without_acks_holds_nothing(client: Client) -> None:
    client.queue("q")
    client.send("q", b"1", b"2")
    client.channel.basic_qos(0, 1, False)
    client.consume("q", no_ack=True)
    client.settle()
    client.connection.close()
    assert client.bodies() == [b"1", b"2"]


def test_a_cancelled_consumer_gets_no_more_messages(client: Client) -> None:
    client.queue("q")
    tag = client.consume("q")
    assert client.channel.queue_declare("q", passive=True).consumer_count == 1
    client.channel.basic_cancel(tag)
    client.send("q", b"1")
    client.settle()
    assert client.got == []
    assert client.channel.queue_declare("q", passive=True).consumer_count == 0


def test_deleting_a_queue_cancels_consumers_of_other_connections(client: Client, other: Client) -> None:
    client.queue("q")
    tag = other.consume("q")
    client.channel.queue_delete("q")
    client.queue("q")
    other.until(lambda: other.calls)
    assert other.calls == [("cancel", tag)]


def test_competing_consumers_share(client: Client, other: Client) -> None:
    client.queue("q")
    for each in (client, other):
        each.channel.basic_qos(0, 5, False)
        each.consume("q")
    client.send("q", *(b"%d" % number for number in range(10)))
    client.settle()
    other.settle()
    assert len(client.got) == len(other.got) == 5
    assert {*client.bodies(), *other.bodies()} == {b"%d" % number for number in range(10)}


def test_an_exclusive_consumer_is_the_only_one(client: Client, other: Client) -> None:
    client.queue("q")
    client.consume("q", exclusive=True)
    with pytest.raises(amqp_errors.AccessRefused, match="in exclusive use"):
        other.consume("q")


def test_an_exclusive_queue_is_refused_to_others_and_deleted_with_its_connection(client: Client, other: Client) -> None:
    name = client.channel.queue_declare("", exclusive=True).queue
    assert name.startswith("amq.gen-")
    for call in (lambda: other.channel.queue_declare(name, passive=True), lambda: other.consume(name)):
        with pytest.raises(amqp_errors.ResourceLocked, match="RESOURCE_LOCKED - cannot obtain exclusive access"):
            call()
    client.connection.close()
    with pytest.raises(amqp_errors.NotFound):
        other.channel.queue_declare(name, passive=True)


def test_an_auto_delete_queue_is_deleted_with_its_last_consumer(client: Client) -> None:
    client.channel.queue_declare("q", auto_delete=True)
    tags = [client.consume("q"), client.consume("q")]
    client.channel.basic_cancel(tags[0])
    assert client.ready("q") == 0
    client.channel.basic_cancel(tags[1])
    with pytest.raises(amqp_errors.NotFound):
        client.ready("q")


def test_purge_and_delete_return_the_number_of_ready_messages(client: Client) -> None:
    client.queue("q")
    client.send("q", b"1", b"2", b"3")
    assert client.channel.get("q") is not None
    assert client.ready("q") == 2
    assert client.channel.queue_purge("q") == 2
    client.send("q", b"4")
    other = client.connection.channel()
    with pytest.raises(amqp_errors.PreconditionFailed):
        other.queue_delete("q", if_empty=True)
    assert client.channel.queue_delete("q") == 1


def test_an_error_closes_its_channel_and_requeues_what_it_held(client: Client) -> None:
    client.queue("q")
    client.send("q", b"1")
    other = client.connection.channel()
    assert other.get("q") is not None
    assert client.ready("q") == 0
    with pytest.raises(amqp_errors.NotFound):
        other.queue_declare("missing", passive=True)
    assert client.ready("q") == 1
    assert list(client.connection.channels.values()) == [client.channel]


def test_a_callback_may_close_the_channel(client: Client) -> None:
    client.queue("q")
    client.send("q", b"1", b"2")
    got: list[bytes] = []

    def close(delivery: Delivery) -> None:
        got.append(delivery.body)
        client.channel.close()

    client.channel.consume("q", close, on_cancel=lambda _: None)
    client.settle()
    assert got == [b"1"]


@pytest.mark.parametrize("end", ["cancel", "close"])
def test_a_consumer_that_a_callback_ends_is_not_reported_as_cancelled(client: Client, other: Client, end: str) -> None:
    client.queue("q")
    tag = client.consume("q")
    publishing = client.connection.channel()
    publishing.confirm_select()
    publishing.on_ack = lambda *_: client.channel.basic_cancel(tag) if end == "cancel" else client.channel.close()
    publishing.publish([Publication("", "q", b"1", {})])  # its confirm is dispatched before the deletion is noticed
    other.channel.queue_delete("q")
    client.settle()
    assert client.calls == []


# --- dead letters and time --------------------------------------------------------------------


def test_a_rejected_message_is_dead_lettered_with_x_death_headers(client: Client) -> None:
    client.queue("dead")
    client.queue("q", "#", x_dead_letter_exchange="", x_dead_letter_routing_key="dead")
    client.publish("app", "user.new", b"1", message_id="m", expiration="60000", headers={"mine": 1})
    delivery = client.channel.get("q")
    assert delivery is not None
    client.channel.basic_reject(delivery.delivery_tag, requeue=False)
    dead = client.channel.get("dead")
    assert dead is not None
    assert (dead.exchange, dead.routing_key, dead.body, dead.redelivered) == ("", "dead", b"1", False)
    assert "expiration" not in dead.properties
    assert dead.properties["message_id"] == "m"
    headers = dead.properties["headers"]
    death = headers.pop("x-death")[0]
    assert isinstance(death.pop("time"), datetime)
    assert death == {
        "count": 1,
        "reason": "rejected",
        "queue": "q",
        "exchange": "app",
        "routing-keys": ["user.new"],
        "original-expiration": "60000",
    }
    assert headers["mine"] == 1
    assert headers["x-first-death-queue"] == "q"


def test_a_message_over_the_delivery_limit_is_dead_lettered(client: Client) -> None:
    client.queue("dead")
    client.queue("q", x_delivery_limit=2, x_dead_letter_exchange="", x_dead_letter_routing_key="dead")
    client.send("q", b"1")
    deliveries = 0
    while (delivery := client.channel.get("q")) is not None:
        deliveries += 1
        client.channel.basic_nack(delivery.delivery_tag)
    dead = client.channel.get("dead")
    assert deliveries == 3
    assert dead is not None
    assert dead.properties["headers"]["x-death"][0]["reason"] == "delivery_limit"


def test_x_death_counts_deaths_in_the_same_queue(client: Client) -> None:
    client.queue("q", x_dead_letter_exchange="", x_dead_letter_routing_key="wait")
    client.queue("wait", x_message_ttl=0, x_dead_letter_exchange="", x_dead_letter_routing_key="q")
    client.send("q", b"1")
    for _ in range(2):
        delivery = client.channel.get("q")
        assert delivery is not None
        client.channel.basic_reject(delivery.delivery_tag, requeue=False)
    delivery = client.channel.get("q")
    assert delivery is not None
    deaths = [(d["queue"], d["reason"], d["count"]) for d in delivery.properties["headers"]["x-death"]]
    assert deaths == [("wait", "expired", 2), ("q", "rejected", 2)]


def test_a_message_in_a_dead_letter_cycle_is_dropped(client: Client) -> None:
    client.queue("a", x_message_ttl=0, x_dead_letter_exchange="", x_dead_letter_routing_key="b")
    client.queue("b", x_message_ttl=0, x_dead_letter_exchange="", x_dead_letter_routing_key="a")
    client.send("a", b"1")
    client.settle()
    assert (client.ready("a"), client.ready("b")) == (0, 0)


def test_a_retry_queue_returns_messages_on_time_while_one_client_drains(client: Client, other: Client) -> None:
    client.queue("q")
    client.queue("retry", x_message_ttl=150, x_dead_letter_exchange="", x_dead_letter_routing_key="q")
    other.consume("q")

    def come_back() -> float:
        started = time.monotonic()
        client.send("retry", b"1")
        other.until(lambda: other.got)
        other.channel.basic_ack(other.got.pop().delivery_tag)
        took = time.monotonic() - started
        assert took >= 0.15
        return took

    sometimes_within(0.5, come_back)


def test_the_shorter_ttl_of_queue_and_message_applies(client: Client) -> None:
    client.queue("q", x_message_ttl=60_000)
    client.send("q", b"brief", expiration="0")
    client.send("q", b"long", expiration="120000")
    assert client.take("q") == [b"long"]
    with pytest.raises(amqp_errors.PreconditionFailed, match="invalid expiration 'soon'"):
        client.send("q", expiration="soon")


def test_an_unroutable_dead_letter_is_held_only_with_strategy_at_least_once(client: Client) -> None:
    for strategy in ("at-most-once", "at-least-once"):
        client.queue(
            strategy,
            x_dead_letter_exchange="",
            x_dead_letter_routing_key="late",
            x_dead_letter_strategy=strategy,
            x_overflow="reject-publish",
        )
        client.send(strategy, strategy.encode(), b"behind")
        delivery = client.channel.get(strategy)
        assert delivery is not None
        client.channel.basic_reject(delivery.delivery_tag, requeue=False)
        assert client.take(strategy) == [b"behind"]
    client.queue("late")
    client.consume("late")
    client.until(lambda: client.got)
    assert client.bodies() == [b"at-least-once"]


def test_the_clock_of_a_memory_broker_can_be_moved() -> None:
    client = Client("memory://clock")
    client.queue("q")
    client.queue("retry", x_message_ttl=600_000, x_dead_letter_exchange="", x_dead_letter_routing_key="q")
    client.send("retry", b"1")
    client.consume("q")
    client.settle()
    assert client.got == []
    advance_clock("memory://clock", 600)
    client.connection.drain_events(SOON)
    assert client.bodies() == [b"1"]
    client.connection.close()
    forget_memory("clock")


def test_the_clock_of_a_file_cannot_be_moved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only that of a memory"):
        advance_clock(f"sqlite:///{tmp_path}/bus.db", 1)


# --- waiting ----------------------------------------------------------------------------------


def test_waiting_for_nothing_times_out(client: Client) -> None:
    started = time.monotonic()
    with within(0.1), pytest.raises(TimeoutError):
        client.connection.drain_events(0.1)
    assert time.monotonic() - started >= 0.1


def test_an_interrupt_ends_the_next_wait(client: Client) -> None:
    client.connection.interrupt()
    client.connection.drain_events(SOON)
    with pytest.raises(TimeoutError):
        client.connection.drain_events(0)


def test_an_interrupt_ends_the_current_wait(client: Client) -> None:
    timer = threading.Timer(0.05, client.connection.interrupt)
    timer.start()
    client.connection.drain_events(SOON)
    timer.join()


def test_a_message_from_another_thread_wakes_at_once(client: Client, url: str) -> None:
    client.queue("q")
    client.consume("q")

    def publish() -> None:
        publisher = Client(url)
        publisher.send("q", repr(time.monotonic()).encode())
        publisher.connection.close()

    def wake() -> float:
        thread = threading.Thread(target=publish)
        thread.start()
        client.connection.drain_events(SOON)
        took = time.monotonic() - float(client.got.pop().body)
        thread.join()
        return took

    sometimes_within(0.1, wake)


def test_threads_share_a_memory_broker_without_losing_messages(url: str, client: Client) -> None:
    client.queue("q", "#")

    def publish(number: int) -> None:
        publisher = Client(url)
        for round in range(10):
            publisher.publish("app", "a", *(b"%d-%d-%d" % (number, round, index) for index in range(10)))
        publisher.connection.close()

    threads = [threading.Thread(target=publish, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    client.consume("q")
    client.until(lambda: len(client.got) == 400)
    for thread in threads:
        thread.join()
    assert len(set(client.bodies())) == 400


def test_waiting_uses_almost_no_cpu(connect: Callable[[], Client], client: Client) -> None:
    client.queue("q")
    waiting = [connect(), connect()]
    for each in waiting:
        each.consume("q")

    def wait(each: Client) -> None:
        with contextlib.suppress(TimeoutError):
            each.connection.drain_events(2)

    def processor_time() -> float:
        threads = [threading.Thread(target=wait, args=(each,)) for each in waiting]
        used = time.process_time()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.process_time() - used

    sometimes_within(0.02, processor_time)


# --- processes --------------------------------------------------------------------------------

CHILD = """
import os, signal, sys, time
from tests.unit.test_embedded_broker import Client
client = Client({url!r})
report = lambda *values: print(*values, flush=True)
"""


class Child:
    """Another process with its own client."""

    def __init__(self, url: str, code: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD.format(url=url) + code],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )

    def read_line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def file_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/bus.db"


@pytest.fixture
def child(file_url: str) -> Iterator[Callable[[str], Child]]:
    children: list[Child] = []

    def start(code: str) -> Child:
        children.append(Child(file_url, code))
        return children[-1]

    yield start
    for child in children:
        child.kill()
        assert child.process.stdout is not None
        child.process.stdout.close()


@pytest.fixture
def here(file_url: str) -> Iterator[Client]:
    client = Client(file_url)
    client.exchange("app")
    client.queue("q", "#")
    yield client
    client.connection.close()


HOLDS_THREE = """
client.channel.queue_declare("mine", exclusive=True)
client.consume("q")
client.until(lambda: len(client.got) == 3)
report("holding")
while True:
    client.settle()
    time.sleep(0.01)
"""


def test_messages_of_a_killed_process_are_redelivered_within_about_a_second(
    here: Client, child: Callable[[str], Child]
) -> None:
    here.send("q", b"1", b"2", b"3")
    victim = child(HOLDS_THREE)
    assert victim.read_line() == "holding"
    here.consume("q")
    here.settle()
    assert here.got == []
    victim.kill()
    with within(2):
        here.until(lambda: len(here.got) == 3)
    assert all(delivery.redelivered for delivery in here.got)
    with pytest.raises(amqp_errors.NotFound):
        here.channel.queue_declare("mine", passive=True)


def test_a_stopped_process_keeps_its_messages(here: Client, child: Callable[[str], Child]) -> None:
    here.send("q", b"1", b"2", b"3")
    sleeper = child(HOLDS_THREE)
    assert sleeper.read_line() == "holding"
    os.kill(sleeper.process.pid, signal.SIGSTOP)
    here.consume("q")
    with pytest.raises(TimeoutError):
        here.connection.drain_events(2)  # long enough for several checks for dead clients


def test_the_next_connection_finds_a_process_that_died_earlier(
    file_url: str, here: Client, child: Callable[[str], Child]
) -> None:
    here.send("q", b"1", b"2", b"3")
    victim = child(HOLDS_THREE)
    assert victim.read_line() == "holding"
    here.connection.close()
    victim.kill()
    late = Client(file_url)
    assert late.ready("q") == 3
    late.connection.close()


def test_killing_a_publisher_loses_no_confirmed_message(here: Client, child: Callable[[str], Child]) -> None:
    here.consume("q")
    confirmed = 0
    for _ in range(3):
        publisher = child(
            """
client.channel.confirm_select()
confirmed = 0
while True:
    client.publish("app", "a", *(b"%d" % os.getpid() for _ in range(10)))
    client.settle()
    confirmed += 10
    report(confirmed)
"""
        )
        lines = 0
        while lines < 20:
            lines = int(publisher.read_line()) // 10
        publisher.process.kill()
        assert publisher.process.stdout is not None
        last = [line for line in publisher.process.stdout.read().splitlines() if line]
        confirmed += int(last[-1]) if last else lines * 10
    here.until(lambda: len(here.got) >= confirmed)


def test_a_message_from_another_process_wakes_within_milliseconds(here: Client, child: Callable[[str], Child]) -> None:
    here.queue("back")
    child("""
client.consume("q")
while True:
    client.until(lambda: client.got)
    client.send("back", repr(time.time()).encode())
    client.channel.basic_ack(client.got.pop().delivery_tag)
""")
    here.consume("back", no_ack=True)

    def wake() -> float:
        waits: list[float] = []
        for _ in range(9):
            sent = time.time()
            here.publish("app", "a")
            here.until(lambda: here.got)
            waits.append(float(here.got.pop().body) - sent)
        return statistics.median(waits)

    sometimes_within(0.02, wake)


def test_two_processes_transfer_each_message_once(here: Client, child: Callable[[str], Child]) -> None:
    here.channel.basic_qos(0, 100, False)
    here.consume("q")
    child("""
for start in range(0, 5000, 100):
    client.publish("app", "a", *(b"%d" % number for number in range(start, start + 100)))
report("done")
""")
    seen: list[int] = []
    while len(seen) < 5000:
        here.until(lambda: here.got)
        seen += [int(delivery.body) for delivery in here.got]
        here.channel.basic_ack(here.got[-1].delivery_tag, multiple=True)
        here.got.clear()
    assert seen == list(range(5000))


def _in_fork(action: Callable[[], None]) -> int:
    """Run the action in a forked child, and return its exit code: 0, or 1 if it raised."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forking_while_other_threads_publish_works_in_parent_and_child(file_url: str, here: Client) -> None:
    stop = threading.Event()

    def publish() -> None:
        publisher = Client(file_url)
        while not stop.is_set():
            publisher.publish("app", "a", *[b"parent"] * 20)
        publisher.connection.close()

    def child() -> None:
        signal.alarm(int(SOON))
        own = Client(file_url)
        own.publish("app", "a", b"child")
        own.connection.close()

    here.consume("q", no_ack=True)
    thread = threading.Thread(target=publish)
    thread.start()
    try:
        assert [_in_fork(child) for _ in range(20)] == [0] * 20
    finally:
        stop.set()
        thread.join()
    here.until(lambda: here.bodies().count(b"child") == 20)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_does_not_disturb_the_parents_connection(file_url: str, here: Client) -> None:
    here.send("q", b"1")
    here.consume("q")
    here.settle()

    def child() -> None:
        with pytest.raises(amqp_errors.RecoverableConnectionError):
            here.connection.drain_events(0)
        here.connection.collect()
        own = Client(file_url)
        assert own.ready("q") == 0
        own.send("q", b"from the child")
        own.connection.close()

    assert _in_fork(child) == 0
    here.channel.basic_ack(here.got[0].delivery_tag)
    here.until(lambda: len(here.got) == 2)
    assert here.bodies() == [b"1", b"from the child"]


def test_a_forked_child_does_not_make_its_dead_parent_look_alive(here: Client, child: Callable[[str], Child]) -> None:
    here.send("q", b"1", b"2", b"3")
    parent = child(
        HOLDS_THREE.replace(
            'report("holding")',
            """
pid = os.fork()
if pid == 0:
    os.close(1)
    time.sleep(30)
    os._exit(0)
report(pid)""",
        )
    )
    grandchild = int(parent.read_line())
    parent.kill()
    try:
        here.consume("q")
        here.until(lambda: len(here.got) == 3)
    finally:
        os.kill(grandchild, signal.SIGKILL)


def test_a_connection_whose_pipe_was_removed_is_closed_with_a_reason(
    tmp_path: Path, here: Client, file_url: str
) -> None:
    here.send("q", b"1")
    here.consume("q")
    here.settle()
    for wake_pipe in (tmp_path / "bus.db.clients").iterdir():
        wake_pipe.unlink()
    other = Client(file_url)
    assert other.ready("q") == 1
    with pytest.raises(amqp_errors.ConnectionForced, match="took the connection for dead"):
        here.publish("app", "a")
    here.connection.collect()
    other.connection.close()


# --- the file ---------------------------------------------------------------------------------


def test_the_file_is_private_and_no_other_files_are_left(tmp_path: Path, file_url: str) -> None:
    client = Client(file_url)
    client.queue("q")
    client.send("q")
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    client.connection.close()
    assert modes == {"bus.db": 0o600, "bus.db-shm": 0o600, "bus.db-wal": 0o600, "bus.db.clients": 0o700}
    assert list((tmp_path / "bus.db.clients").iterdir()) == []
    assert not (tmp_path / "bus.db-wal").exists()


def test_queues_and_messages_remain_after_the_last_connection(file_url: str) -> None:
    first = Client(file_url)
    first.queue("q")
    first.send("q", b"1")
    first.connection.close()
    second = Client(file_url)
    assert second.take("q") == [b"1"]
    second.connection.close()


def _make_other_program(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE theirs (a)")


def _make_newer(path: Path) -> None:
    Client(f"sqlite:///{path}").connection.close()
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 99")


def _make_damaged(path: Path) -> None:
    client = Client(f"sqlite:///{path}")
    client.queue("q")
    client.connection.close()
    data = bytearray(path.read_bytes())
    data[100:4096] = os.urandom(3996)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b"Dear diary, " * 1000), "not an SQLite file: point the broker URL"),
        (_make_other_program, "is a database of another program.*Use another file"),
        (_make_newer, "schema version 99.*Use the Lightbus that wrote it"),
        (_make_damaged, "restore it from a backup"),
    ],
)
def test_the_error_names_a_file_that_cannot_be_used_and_the_file_is_unchanged(
    tmp_path: Path, file_url: str, make: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / "bus.db"
    make(path)
    before = path.read_bytes()
    with pytest.raises(errors.BrokerFileError, match=message) as caught:
        Client(file_url)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before


def test_the_error_names_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(errors.BrokerFileError, match=f"the folder {tmp_path}/none does not exist. Create it"):
        Client(f"sqlite:///{tmp_path}/none/bus.db")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_the_error_names_a_file_without_write_permission(tmp_path: Path, file_url: str) -> None:
    Client(file_url).connection.close()
    (tmp_path / "bus.db").chmod(0o400)
    with pytest.raises(errors.BrokerFileError, match="Check the permissions"):
        Client(file_url)


def test_a_full_disk_is_an_error_and_loses_no_confirmed_message(here: Client) -> None:
    here.channel.confirm_select()
    here.publish("app", "a", b"small")
    here.settle()
    database = here.connection.store.session.file.get()
    pages = database.execute("PRAGMA page_count").fetchone()[0]
    database.execute(f"PRAGMA max_page_count = {pages + 1}")
    with pytest.raises(errors.BrokerFileError, match=r"full.*Free disk space"):
        here.publish("app", "a", b"x" * 100_000)
    database.execute("PRAGMA max_page_count = 1000000")
    here.publish("app", "a", b"after")
    here.settle()
    assert here.calls == [("ack", 1, False), ("ack", 2, False)]
    assert here.take("q") == [b"small", b"after"]


def test_a_file_locked_for_too_long_is_a_lost_connection(
    tmp_path: Path, here: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = here.connection.store.session.file.get()
    database.execute("PRAGMA busy_timeout = 50")
    with contextlib.closing(sqlite3.connect(tmp_path / "bus.db", isolation_level=None)) as blocker:
        blocker.execute("BEGIN IMMEDIATE")
        with pytest.raises(amqp_errors.RecoverableConnectionError, match="locked by another process"):
            here.publish("app", "a")
        blocker.execute("ROLLBACK")
    here.publish("app", "a")
    assert here.ready("q") == 1
