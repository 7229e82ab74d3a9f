"""The AMQP transport with a scripted peer: however a stream is split, the deliveries are the same."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import amqp.exceptions
import pytest
from amqp import serialization
from amqp.method_framing import frame_writer
from hypothesis import given, settings
from hypothesis import strategies as st

from lightbus.transport import UNREADABLE, Delivery, Publication, Unencodable
from lightbus.transport.amqp import channel as channels
from lightbus.transport.amqp import wire as amqp_wire
from lightbus.transport.amqp.connection import Connection
from tests.patience import LIMIT, within

FRAME_MAX = 4096
HEARTBEAT = b"\x08\x00\x00\x00\x00\x00\x00\xce"


class FakeBroker:
    """The other end of a connection, one frame at a time."""

    def __init__(self, limit: float = LIMIT) -> None:
        ours, self.socket = socket.socketpair()
        self.socket.settimeout(LIMIT)
        transport = SimpleNamespace(sock=ours, connected=True, connect_timeout=5, connect=lambda: None)

        class Connected(Connection):
            def Transport(self, *args: Any, **kwargs: Any) -> Any:
                return transport

        properties = {"product": "Fake", "version": "1", "capabilities": {"connection.blocked": True}}
        self.method(0, (10, 10), "ooFSS", 0, 9, properties, "PLAIN", "en_US")
        self.method(0, (10, 30), "BlB", 100, FRAME_MAX, 0)
        self.method(0, (10, 41), "s", "")
        self.connection = Connected(login_method="PLAIN", write_timeout=limit, operation_timeout=limit)
        self.connection.connect()

    def channel(self) -> Any:
        self.method(len(self.connection.channels), (20, 11), "S", "")
        return self.connection.channel()

    def consume(self, channel: Any, deliveries: list[Delivery]) -> None:
        self.method(channel.channel_id, (60, 21), "s", f"{channel.channel_id}.1")
        channel.consume("q", deliveries.append, on_cancel=print)

    def method(self, *args: Any) -> None:
        self.socket.sendall(method(*args))

    def close(self) -> None:
        self.connection.collect()
        self.socket.close()


@pytest.fixture
def broker() -> Iterator[FakeBroker]:
    fake = FakeBroker()
    yield fake
    fake.close()


@pytest.fixture
def silent_broker() -> Iterator[FakeBroker]:
    """The connection waits for a second only."""
    fake = FakeBroker(limit=1)
    yield fake
    fake.close()


def frame(kind: int, channel: int, payload: bytes) -> bytes:
    return struct.pack(">BHI", kind, channel, len(payload)) + payload + b"\xce"


def method(channel: int, signature: tuple[int, int], types: str, *values: Any) -> bytes:
    return frame(1, channel, struct.pack(">HH", *signature) + serialization.dumps(types, values))


def message_frames(channel: int, tag: int, properties: bytes, body: bytes, sizes: list[int]) -> list[bytes]:
    """A delivery's frames; its body in frames of these sizes (and the rest)."""
    frames = [
        method(channel, (60, 60), "sLbss", f"{channel}.1", tag, tag % 2, "billing", "invoice.paid"),
        frame(2, channel, struct.pack(">HHQ", 60, 0, len(body)) + properties),
    ]
    while body:
        size = min(sizes.pop() if sizes else FRAME_MAX - 8, FRAME_MAX - 8)
        frames.append(frame(3, channel, body[:size]))
        body = body[size:]
    return frames


def drain(connection: Connection) -> None:
    with contextlib.suppress(TimeoutError):
        while True:
            connection.drain_events(0)


bodies = st.one_of(st.binary(max_size=20), st.integers(0, 12000).map(lambda size: bytes(range(256)) * (size // 256)))


@settings(max_examples=150, deadline=None)
@given(
    messages=st.lists(st.tuples(bodies, st.lists(st.integers(1, 4000), max_size=3)), max_size=6),
    others=st.lists(st.tuples(bodies, st.lists(st.integers(1, 4000), max_size=3)), max_size=6),
    cuts=st.lists(st.integers(1, 3000), min_size=1, max_size=40),
    data=st.data(),
)
def test_a_stream_gives_the_same_deliveries_wherever_it_is_cut(
    messages: list[tuple[bytes, list[int]]],
    others: list[tuple[bytes, list[int]]],
    cuts: list[int],
    data: st.DataObject,
) -> None:
    broker = FakeBroker()
    received: list[list[Delivery]] = [[], []]
    acks: list[tuple[int, bool]] = []
    queues: list[list[bytes]] = [[], []]
    for index, sent in enumerate((messages, others)):
        channel = broker.channel()
        channel.on_ack = lambda tag, multiple: acks.append((tag, multiple))
        broker.consume(channel, received[index])
        for tag, (body, sizes) in enumerate(sent, 1):
            properties = amqp_wire.encode_properties({"message_id": str(tag)})
            queues[index] += message_frames(index + 1, tag, properties, body, list(sizes))
    stream = b""
    while queues[0] or queues[1]:  # frames of several channels may come in any order
        index = data.draw(st.sampled_from([index for index in (0, 1) if queues[index]]))
        stream += queues[index].pop(0) + data.draw(st.sampled_from([b"", b"", HEARTBEAT]))
    stream += method(1, (60, 80), "Lb", 7, True)
    position = 0
    while position < len(stream):
        size = cuts[position % len(cuts)]
        broker.socket.sendall(stream[position : position + size])
        position += size
        drain(broker.connection)
    for index, sent in enumerate((messages, others)):
        assert [delivery.body for delivery in received[index]] == [body for body, _ in sent]
        assert [delivery.delivery_tag for delivery in received[index]] == list(range(1, len(sent) + 1))
        for delivery in received[index]:
            assert delivery.properties == {"message_id": str(delivery.delivery_tag)}
            assert delivery.redelivered == (delivery.delivery_tag % 2 == 1)
            assert (delivery.exchange, delivery.routing_key) == ("billing", "invoice.paid")
    assert acks == [(7, True)]
    broker.close()


def test_one_delivery_survives_every_cut(broker: FakeBroker) -> None:
    channel = broker.channel()
    deliveries: list[Delivery] = []
    broker.consume(channel, deliveries)
    stream = b"".join(message_frames(1, 1, amqp_wire.encode_properties({"type": "a"}), b"body", []))
    for cut in range(len(stream)):
        broker.socket.sendall(stream[:cut])
        drain(broker.connection)
        assert len(deliveries) == cut
        broker.socket.sendall(stream[cut:])
        drain(broker.connection)
        assert (deliveries[cut].body, deliveries[cut].properties) == (b"body", {"type": "a"})


def test_a_cancel_in_one_piece_with_consume_ok_calls_on_cancel(broker: FakeBroker) -> None:
    channel = broker.channel()
    cancelled: list[str] = []
    broker.socket.sendall(method(1, (60, 21), "s", "1.1") + method(1, (60, 30), "sb", "1.1", False))
    channel.consume("q", print, on_cancel=cancelled.append)
    assert cancelled == ["1.1"]


def test_deliveries_in_one_piece_with_consume_ok_are_not_lost(broker: FakeBroker) -> None:
    channel = broker.channel()
    delivery = b"".join(message_frames(1, 1, amqp_wire.encode_properties({}), b"at once", []))
    broker.socket.sendall(method(1, (60, 21), "s", "1.1") + delivery)
    deliveries: list[Delivery] = []
    channel.consume("q", deliveries.append, on_cancel=print)
    assert [delivery.body for delivery in deliveries] == [b"at once"]


def test_confirms_and_returns_reach_their_callbacks_in_order(broker: FakeBroker) -> None:
    channel = broker.channel()
    seen: list[object] = []
    channel.on_ack = lambda tag, multiple: seen.append(("ack", tag, multiple))
    channel.on_nack = lambda tag, multiple: seen.append(("nack", tag, multiple))
    channel.on_return = lambda message_id: seen.append(("return", message_id))
    properties = amqp_wire.encode_properties({"message_id": "m-1"})
    returned = method(1, (60, 50), "Bsss", 312, "NO_ROUTE", "billing", "invoice.paid")
    header = frame(2, 1, struct.pack(">HHQ", 60, 0, 1) + properties)
    broker.socket.sendall(returned + header + frame(3, 1, b"x") + method(1, (60, 80), "Lb", 1, False))
    broker.method(1, (60, 120), "Lbb", 3, True, False)
    drain(broker.connection)
    assert seen == [("return", "m-1"), ("ack", 1, False), ("nack", 3, True)]


def test_malformed_properties_do_not_close_the_connection(broker: FakeBroker) -> None:
    channel = broker.channel()
    deliveries: list[Delivery] = []
    broker.consume(channel, deliveries)
    for tag, properties in enumerate((b"\x80\x00\x05abc", b"\x80\x00\x01\xff", amqp_wire.encode_properties({})), 1):
        broker.socket.sendall(b"".join(message_frames(1, tag, properties, b"body", [2])))
    drain(broker.connection)
    assert [delivery.body for delivery in deliveries] == [b"body"] * 3
    assert deliveries[0].properties == {UNREADABLE: "content_type and what follows it"}
    assert deliveries[1].properties == {"content_type": b"\xff"}
    assert deliveries[2].properties == {}


def test_the_brokers_error_ends_a_get_at_once_although_a_callback_is_set(broker: FakeBroker) -> None:
    channel = broker.channel()
    closed: list[Exception] = []
    channel.on_closed = closed.append
    broker.method(channel.channel_id, (20, 40), "BsBB", 404, "NOT_FOUND - no queue", 60, 70)
    with pytest.raises(amqp.exceptions.NotFound, match="no queue"):
        channel.get("missing")
    assert closed == []


def test_frames_behind_an_error_are_dispatched_by_the_next_call(broker: FakeBroker) -> None:
    first, second = broker.channel(), broker.channel()
    acks: list[int] = []
    second.on_ack = lambda tag, multiple: acks.append(tag)
    broker.socket.sendall(
        method(1, (20, 40), "BsBB", 404, "NOT_FOUND - no exchange", 60, 40) + method(2, (60, 80), "Lb", 1, False)
    )
    with pytest.raises(amqp.exceptions.NotFound, match="no exchange"):
        broker.connection.drain_events(LIMIT)
    broker.connection.drain_events(LIMIT)
    assert acks == [1]
    with pytest.raises(amqp.exceptions.RecoverableConnectionError, match="closed"):
        first.publish([Publication("", "q", b"", {})])


@pytest.mark.parametrize(
    "stream",
    [
        b"HTTP/1.1 400 Bad Request\r\n",
        b"AMQP\x00\x00\x09\x01",
        b"\x01\x00\x01\x7f\xff\xff\xff" + b"x" * 9,
        HEARTBEAT[:-1] + b"!",
    ],
)
def test_a_peer_that_does_not_speak_amqp_is_an_error_at_once(broker: FakeBroker, stream: bytes) -> None:
    broker.socket.sendall(stream)
    with pytest.raises(amqp.exceptions.UnexpectedFrame, match="does not speak AMQP"):
        broker.connection.drain_events(LIMIT)
    assert not broker.connection.connected


def test_every_call_on_a_closed_connection_is_an_error(broker: FakeBroker) -> None:
    broker.socket.close()
    with pytest.raises(ConnectionResetError):
        broker.connection.drain_events(LIMIT)
    with pytest.raises(amqp.exceptions.RecoverableConnectionError, match="closed"):
        broker.connection.drain_events(LIMIT)


def test_the_brokers_reason_is_raised_although_the_broker_is_gone(broker: FakeBroker) -> None:
    broker.method(0, (10, 50), "BsBB", 320, "CONNECTION_FORCED - shutdown", 0, 0)
    broker.socket.close()
    with pytest.raises(amqp.exceptions.ConnectionForced, match="shutdown"):
        broker.connection.drain_events(LIMIT)
    assert not broker.connection.connected


def test_a_peer_that_does_not_read_ends_a_publish_in_time(silent_broker: FakeBroker) -> None:
    channel = silent_broker.channel()
    with within(1), pytest.raises(TimeoutError, match="does not read"):
        channel.publish([Publication("", "q", b"x" * 10_000_000, {})])
    assert not silent_broker.connection.connected
    with pytest.raises(amqp.exceptions.RecoverableConnectionError):
        channel.basic_ack(1)


def test_a_peer_that_does_not_answer_ends_a_method_in_time_by_name(silent_broker: FakeBroker) -> None:
    channel = silent_broker.channel()
    with pytest.raises(TimeoutError, match=r"queue\.declare-ok within 1 s"):
        channel.queue_declare("q")


def test_a_flood_does_not_extend_the_limit_of_a_method(silent_broker: FakeBroker) -> None:
    channel = silent_broker.channel()
    connection = silent_broker.connection

    def chatter(*_: object) -> None:
        silent_broker.method(1, (60, 80), "Lb", 1, False)

    channel.on_ack = chatter
    chatter()
    with pytest.raises(TimeoutError, match=r"queue\.purge-ok"):
        channel.queue_purge("q")
    assert connection.connected


def test_data_that_arrives_during_a_publish_is_dispatched_later(silent_broker: FakeBroker) -> None:
    channel = silent_broker.channel()
    acks: list[int] = []
    channel.on_ack = lambda tag, multiple: acks.append(tag)
    silent_broker.method(1, (60, 80), "Lb", 1, False)
    with pytest.raises(TimeoutError, match="does not read"):
        channel.publish([Publication("", "q", b"x" * 10_000_000, {})])
    assert acks == []
    silent_broker.connection.drain_events(0)
    assert acks == [1]


def test_an_unencodable_message_leaves_nothing_of_its_batch_sent(broker: FakeBroker) -> None:
    channel = broker.channel()
    while_opening = broker.socket.recv(65536)
    assert while_opening
    good, bad = Publication("", "q", b"1", {}), Publication("", "q", b"2", {"message_id": "x" * 256})
    with pytest.raises(ValueError, match="256 bytes long"):
        channel.publish([good, bad])
    broker.socket.setblocking(False)
    with pytest.raises(BlockingIOError):
        broker.socket.recv(1)


def test_headers_that_do_not_fit_a_frame_are_refused_before_anything_is_sent(broker: FakeBroker) -> None:
    channel = broker.channel()
    while_opening = broker.socket.recv(65536)
    assert while_opening
    overhead = len(amqp_wire.encode_properties({"message_id": "", "headers": {"large": ""}}))
    fits, does_not = (
        Publication("", "q", b"", {"message_id": "", "headers": {"large": "x" * (FRAME_MAX - 20 - overhead + more)}})
        for more in (0, 1)
    )
    for publish in (channel.publish, channel.publish_nowait):
        with pytest.raises(Unencodable, match="4,077 bytes; the broker takes 4,076 at most") as caught:
            publish([fits, does_not])
        assert caught.value.publication is does_not
    broker.socket.setblocking(False)
    with pytest.raises(BlockingIOError):
        broker.socket.recv(1)
    channel.publish([fits])
    assert len(broker.socket.recv(65536)) > FRAME_MAX


@pytest.mark.parametrize("split", [100, 5000, 100_000])
def test_a_header_frame_that_is_larger_than_agreed_is_read(broker: FakeBroker, split: int) -> None:
    """RabbitMQ adds x-death or x-delivery-count to a message whose headers filled a frame."""
    channel = broker.channel()
    deliveries: list[Delivery] = []
    broker.consume(channel, deliveries)
    large = amqp_wire.encode_properties({"headers": {"large": "x" * 3 * FRAME_MAX}})
    stream = method(channel.channel_id, (60, 60), "sLbss", f"{channel.channel_id}.1", 1, True, "shop", "order.placed")
    stream += frame(2, channel.channel_id, struct.pack(">HHQ", 60, 0, 2) + large) + frame(3, channel.channel_id, b"{}")
    for start in range(0, len(stream), split):
        assert not deliveries
        broker.socket.sendall(stream[start : start + split])
        broker.connection.drain_nowait()
    assert deliveries[0].properties["headers"] == {"large": "x" * 3 * FRAME_MAX}


def test_publish_nowait_refuses_large_messages(broker: FakeBroker) -> None:
    channel = broker.channel()
    while_opening = broker.socket.recv(65536)
    assert while_opening
    fits, does_not = (Publication("", "q", b"x" * (FRAME_MAX - 8 + more), {}) for more in (0, 1))
    assert not channel.publish_nowait([fits, does_not])
    assert not channel.publish_nowait([fits] * 300)  # over 1 MiB: it would block an event loop too long
    broker.socket.setblocking(False)
    with pytest.raises(BlockingIOError):
        broker.socket.recv(1)
    assert channel.publish_nowait([fits])
    assert broker.socket.recv(65536).endswith(frame(3, channel.channel_id, fits.body))


# --- properties -------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
values = st.recursive(
    st.one_of(texts, st.booleans(), st.none(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=5,
)
octets = st.integers(0, 255)
properties = st.fixed_dictionaries(
    {},
    optional={
        "content_type": texts,
        "content_encoding": texts,
        "headers": st.dictionaries(texts, values, max_size=5),
        "delivery_mode": octets,
        "priority": octets,
        "correlation_id": texts,
        "reply_to": texts,
        "expiration": texts,
        "message_id": texts,
        "timestamp": st.integers(0, 2**64 - 1),
        "type": texts,
        "user_id": texts,
        "app_id": texts,
    },
)


def py_amqp_names(properties: dict[str, Any]) -> dict[str, Any]:
    """The same properties under py-amqp's names."""
    return {"application_headers" if name == "headers" else name: value for name, value in properties.items()}


def written_by_py_amqp(message: amqp.Message) -> bytes:
    """The properties in the header frame of a publish."""
    written = bytearray()
    connection = SimpleNamespace(frame_max=131072, bytes_sent=0)
    write = frame_writer(connection, SimpleNamespace(write=written.extend))
    write(1, 1, (60, 40), b"", message)
    _, _, method_size = struct.unpack_from(">BHI", written)
    start = method_size + 8
    _, _, size = struct.unpack_from(">BHI", written, start)
    return bytes(written[start + 19 : start + 7 + size])


@settings(deadline=None)
@given(properties)
def test_py_amqp_reads_the_properties_that_we_write(given_properties: dict[str, Any]) -> None:
    written = amqp_wire.encode_properties(given_properties)
    read, end = serialization.decode_properties_basic(written, 0)
    assert (read, end) == (py_amqp_names(given_properties), len(written))


@settings(deadline=None)
@given(properties)
def test_we_read_the_properties_that_py_amqp_writes(given_properties: dict[str, Any]) -> None:
    written = written_by_py_amqp(amqp.Message(b"", **py_amqp_names(given_properties)))
    assert amqp_wire.decode_properties(written) == given_properties


@settings(deadline=None)
@given(properties, st.data())
def test_truncated_properties_are_read_up_to_their_end(given_properties: dict[str, Any], data: st.DataObject) -> None:
    written = amqp_wire.encode_properties(given_properties)
    read = amqp_wire.decode_properties(written[: data.draw(st.integers(0, len(written) - 1))])
    assert read.pop(UNREADABLE)
    headers = read.pop("headers", {})
    assert headers.items() <= given_properties.get("headers", {}).items()
    assert read.items() <= given_properties.items()


@settings(deadline=None)
@given(st.one_of(st.binary(max_size=80), st.builds(bytes.__add__, st.just(b"\x20\x80"), st.binary(max_size=80))))
def test_any_bytes_decode_to_properties_that_can_be_encoded_again(data: bytes) -> None:
    read = amqp_wire.decode_properties(data)
    read.pop(UNREADABLE, None)
    again = amqp_wire.decode_properties(amqp_wire.encode_properties(read))
    assert repr(again) == repr(read)  # a NaN is not equal to itself


def sized(octets: bytes) -> bytes:
    return struct.pack(">I", len(octets)) + octets


SIZES = {b"tbB": 1, b"suU": 2, b"Iif": 4, b"D": 5, b"TlLd": 8, b"V": 0}
table_values = st.one_of(
    *(
        st.tuples(st.sampled_from([bytes((letter,)) for letter in letters]), st.binary(min_size=size, max_size=size))
        for letters, size in SIZES.items()
    ),
    st.tuples(st.sampled_from([b"S", b"x"]), st.binary(max_size=20).map(sized)),
).map(b"".join)


def in_a_table(items: dict[bytes, bytes]) -> bytes:
    table = b"".join(bytes((len(name),)) + name + value for name, value in items.items())
    return struct.pack(">I", len(table)) + table


@settings(deadline=None)
@given(st.dictionaries(st.binary(max_size=60), table_values, max_size=6), st.binary(max_size=20))
def test_header_names_and_values_of_every_type_can_be_decoded_and_encoded_again(
    items: dict[bytes, bytes], correlation_id: bytes
) -> None:
    written = b"\x24\x80" + in_a_table(items) + bytes((len(correlation_id),)) + correlation_id + b"\x03m-1"
    read = amqp_wire.decode_properties(written)
    assert UNREADABLE not in read
    assert read["message_id"] == "m-1"
    assert read["correlation_id"] in (correlation_id, correlation_id.decode(errors="replace"))
    names = {name.decode(errors="backslashreplace") for name in items}
    assert set(read["headers"]) == names
    assert repr(amqp_wire.decode_properties(amqp_wire.encode_properties(read))) == repr(read)


@pytest.mark.parametrize(
    ("encoded", "value"),
    [
        (b"T" + struct.pack(">Q", 1_700_000_000), datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)),
        (b"T" + struct.pack(">Q", 1_700_000_000_000), 1_700_000_000_000),
        (b"T" + struct.pack(">q", -62_135_596_800), -62_135_596_800),
        (b"s" + struct.pack(">h", -5), -5),
        (b"S\0\0\0\x02\xff\xfe", b"\xff\xfe"),
        (b"x\0\0\0\x02ab", b"ab"),
        (b"D\x02\0\0\0\x32", Decimal("0.50")),
        (b"F" + in_a_table({b"gr\xf6sse": b"V"}), {"gr\\xf6sse": None}),
        (b"A\0\0\0\x03t\x01V", [True, None]),
    ],
)
def test_header_values_of_other_programs_are_decoded(encoded: bytes, value: Any) -> None:
    properties = b"\x20\x80" + in_a_table({b"first": b"t\x01", b"odd": encoded, b"last": b"t\0"}) + b"\x03m-1"
    assert amqp_wire.decode_properties(properties) == {
        "headers": {"first": True, "odd": value, "last": False},
        "message_id": "m-1",
    }


def test_an_unreadable_header_is_named_and_no_property_is_lost() -> None:
    properties = b"\x20\x80" + in_a_table({b"first": b"t\x01", b"odd": b"?", b"last": b"t\0"}) + b"\x03m-1"
    assert amqp_wire.decode_properties(properties) == {
        "headers": {"first": True},
        "message_id": "m-1",
        UNREADABLE: "the headers from 'odd' on",
    }


def test_of_headers_with_the_same_name_the_first_counts() -> None:
    """RabbitMQ replaces the first with its own header, so the second is the publisher's."""
    two = b"\x07x-deathI\x00\x00\x00\x01" + b"\x07x-deathI\x00\x00\x00\x02"
    inner = b"\x01tF" + struct.pack(">I", len(two)) + two
    table = two + inner + b"\x01ZI\x00\x00\x00\x03"
    read = amqp_wire.decode_properties(b"\x20\x80" + struct.pack(">I", len(table)) + table + b"\x03m-1")
    assert read == {
        "headers": {"x-death": 1, "t": {"x-death": 1}, "Z": 3},
        "message_id": "m-1",
        amqp_wire.UNREADABLE: "another header 'x-death'",
    }


def test_deeply_nested_headers_are_named_and_no_property_is_lost() -> None:
    table = b""
    for _ in range(3000):
        table = b"\x00F" + struct.pack(">I", len(table)) + table
    table += b"\x04lastt\x01"
    read = amqp_wire.decode_properties(b"\x20\x80" + struct.pack(">I", len(table)) + table + b"\x03m-1")
    assert read == {"headers": {"last": True}, "message_id": "m-1", UNREADABLE: "the header ''"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"message_id": "x" * 256}, "message_id.*256 bytes"),
        ({"message_id": 7}, "message_id=7"),
        ({"priority": 256}, "priority=256"),
        ({"timestamp": -1}, "timestamp=-1"),
        ({"headers": {"a": object()}}, "headers"),
        ({"headers": {"a" * 256: 1}}, "headers"),
        ({"application_headers": {}}, "no property 'application_headers'"),
    ],
)
def test_the_error_names_a_property_that_cannot_be_encoded(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        amqp_wire.encode_properties(wrong)


def test_names_that_are_not_utf_8_are_kept() -> None:
    name = b"\xff\xfe".decode(errors="surrogateescape")
    sent = amqp_wire.encode_publish(1, Publication("x", name, b"", {}), 131072)
    start = sent.index(b"\x01x")
    assert amqp_wire.decode_names(sent[start : start + 5]) == ("x", name)


@pytest.mark.parametrize(
    ("headers", "offset"), [({"x-stream-offset": 3}, 3), ({"x-stream-offset": "3"}, 7), ({}, 7), ("no table", 7)]
)
def test_the_offset_of_a_message_in_a_stream(headers: object, offset: int) -> None:
    no_channel: Any = None
    delivery = Delivery(no_channel, 1, False, "", "", {"headers": headers}, b"")
    assert channels._offset(delivery, 7) == offset


def test_properties_that_cannot_be_read_do_not_end_the_reading_of_a_stream() -> None:
    def malformed() -> dict[str, Any]:
        raise ValueError("malformed")

    no_channel: Any = None
    assert channels._offset(Delivery(no_channel, 1, False, "", "", malformed, b""), 7) == 7
