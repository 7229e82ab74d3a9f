"""The bytes of AMQP 1.0 messages: what we write and what any program may write."""

from __future__ import annotations

import struct
import uuid
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightbus.transport import UNREADABLE, Publication
from lightbus.transport.activemq import message
from tests.patience import within

TIME = datetime(2023, 11, 14, 22, 13, 20, 123000, tzinfo=UTC)
TIMES = st.datetimes(datetime(1970, 1, 1), timezones=st.just(UTC)).map(
    lambda time: time.replace(microsecond=time.microsecond // 1000 * 1000, fold=0)
)
DECIMALS = st.builds(
    lambda sign, number, exponent: Decimal((sign, tuple(map(int, str(number))), exponent)),
    st.integers(0, 1),
    st.integers(0, 10**34 - 1),
    st.integers(-6176, 6111),
)
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60)  # proton ends at a NUL
ascii_texts = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60)
scalars = st.one_of(
    texts,
    st.text("aé", min_size=250, max_size=260),
    st.booleans(),
    st.none(),
    st.integers(-(2**63), 2**64 - 1),
    st.integers(-200, 200),
    st.floats(allow_nan=False),
    st.binary(max_size=20),
    TIMES,
    DECIMALS,
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=5,
)
THE_PREFIXES = ("_AMQ_", "JMSX", "JMS_")
"""Headers with such names are in another section, as lists and tables are: Artemis would act on them."""
header_names = st.one_of(
    texts.filter(lambda name: name not in ("x-death", "x-delivery-count")),
    st.builds(str.__add__, st.sampled_from(THE_PREFIXES), st.text("aG", max_size=3)),
)


def properties_with(header_values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {},
        optional={
            "content_type": ascii_texts,
            "content_encoding": ascii_texts,
            "headers": st.dictionaries(header_names, header_values, max_size=5),
            "delivery_mode": st.sampled_from([1, 2]),
            "priority": st.integers(0, 255),
            "correlation_id": texts,
            "reply_to": texts,
            "expiration": st.integers(0, 2**32 - 1).map(str),
            "message_id": texts,
            "timestamp": st.integers(0, 2**53),
            "type": texts,
            "user_id": texts,
            "app_id": texts,
            "cluster_id": texts,
        },
    )


def publication(properties: dict[str, Any], body: bytes = b"{}") -> Publication:
    return Publication("shop", "order.placed", body, properties)


def encode(properties: dict[str, Any], body: bytes = b"{}", subject: str = "order.placed") -> bytes:
    return message.encode(publication(properties, body), subject)


def section(code: int, value: bytes) -> bytes:
    return b"\x00\x53" + bytes((code,)) + value


def compound(code: int, *items: bytes) -> bytes:
    """A list, a map or an array with 4-byte sizes."""
    encoded = b"".join(items)
    return bytes((code,)) + struct.pack(">II", len(encoded) + 4, len(items)) + encoded


def symbol(text: str) -> bytes:
    return b"\xa3" + bytes((len(text),)) + text.encode()


def string(text: str) -> bytes:
    return b"\xa1" + bytes((len(text.encode()),)) + text.encode()


def application(**headers: bytes) -> bytes:
    items = [part for name, value in headers.items() for part in (string(name), value)]
    return section(0x74, compound(0xD1, *items))


def fields(*values: bytes) -> bytes:
    return section(0x73, compound(0xD0, *values))


DATA = section(0x75, b"\xa0\x02{}")
NULL = b"\x40"


# --- both directions --------------------------------------------------------------------------


@settings(deadline=None)
@given(properties_with(values), st.binary(max_size=600), texts)
def test_a_message_arrives_as_it_was_sent(properties: dict[str, Any], body: bytes, subject: str) -> None:
    received = message.split(encode(properties, body, subject))
    assert (received.body, received.subject) == (body, subject)
    assert (received.orig_address, received.orig_queue, received.deliveries) == (None, None, 0)
    assert repr(dict(sorted(received.properties().items()))) == repr(dict(sorted(with_tables_last(properties).items())))


def with_tables_last(properties: dict[str, Any]) -> dict[str, Any]:
    """The headers of the other section are behind those of the first."""

    def is_apart(header: tuple[str, Any]) -> bool:
        return header[0].startswith(THE_PREFIXES) or isinstance(header[1], (list, dict))

    headers = properties.get("headers")
    if headers is None:
        return properties
    return {**properties, "headers": dict(sorted(headers.items(), key=is_apart))}


@settings(deadline=None)
@given(properties_with(scalars), texts, st.integers(0, 2**31), st.integers(0, 2**31))
def test_proton_reads_what_we_write(properties: dict[str, Any], subject: str, ttl: int, delay: int) -> None:
    proton = pytest.importorskip("proton")
    read = proton.Message()
    read.decode(message.encode(publication(properties), subject, ttl=ttl, delay=delay))
    assert (bytes(read.body), read.subject, read.ttl) == (b"{}", subject, ttl / 1000)
    assert read.annotations[proton.symbol("x-opt-delivery-delay")] == delay
    for ours, theirs in {"message_id": "id", "correlation_id": "correlation_id", "reply_to": "reply_to"}.items():
        assert getattr(read, theirs) == properties.get(ours)
    for name in ("type", "app_id", "cluster_id"):
        key = proton.symbol(f"x-opt-lightbus-{name.replace('_', '-')}")
        assert read.annotations.get(key) == properties.get(name)
    assert read.user_id == properties.get("user_id", "").encode()
    assert read.content_type == properties.get("content_type", "None")  # proton's symbol of an absent one
    assert read.content_encoding == properties.get("content_encoding", "None")
    assert read.creation_time == pytest.approx(properties.get("timestamp", 0), rel=1e-15)  # a float
    assert read.durable == (properties.get("delivery_mode") == 2)
    assert read.priority == properties.get("priority", 4)
    headers = (read.properties or {}) | read.annotations.get(proton.symbol("x-opt-lightbus-headers"), {})
    assert headers.keys() == properties.get("headers", {}).keys()
    for name, value in properties.get("headers", {}).items():
        if isinstance(value, bytes):
            assert bytes(headers[name]) == value
        elif isinstance(value, datetime):
            assert headers[name] == round(value.timestamp() * 1000)
        elif not isinstance(value, Decimal):  # proton does not decode those
            assert headers[name] == value


TABLES = {"list": [1, "two", {"three": None}], "table": {}}
"""Headers that are in a section that others are not in."""


@settings(deadline=None)
@given(
    st.dictionaries(
        header_names.filter(lambda name: name not in TABLES),
        st.one_of(texts, st.booleans(), st.none(), st.integers(-(2**63), 2**63 - 1)),
    ),
    ascii_texts,
    st.binary(max_size=300),
    st.booleans(),
)
def test_we_read_what_proton_writes(headers: dict[str, Any], content_type: str, body: bytes, durable: bool) -> None:
    proton = pytest.importorskip("proton")
    sent = proton.Message(body=body, id="m-1", subject="order.placed", durable=durable, priority=7, ttl=1.5)
    sent.inferred = True
    sent.user_id, sent.reply_to, sent.correlation_id, sent.creation_time = b"shop", "answers", "c-1", 1_700_000_000
    sent.content_type, sent.properties = proton.symbol(content_type), headers
    sent.annotations = {
        proton.symbol("x-opt-ORIG-ADDRESS"): "lightbus.exchange.shop",
        proton.symbol("x-opt-ORIG-QUEUE"): "lightbus-bus",
        proton.symbol("x-opt-ORIG-MESSAGE-ID"): proton.ulong(7),
        proton.symbol("x-opt-lightbus-headers"): TABLES,
    }
    received = message.split(bytes(sent.encode()))
    assert (received.body, received.subject) == (body, "order.placed")
    assert (received.orig_address, received.orig_queue) == ("lightbus.exchange.shop", "lightbus-bus")
    read = received.properties()
    assert read.pop("headers") == TABLES | headers
    assert read.pop("content_type", "") == content_type
    assert read.pop("delivery_mode", 1) == (2 if durable else 1)
    assert read == {
        "message_id": "m-1",
        "user_id": "shop",
        "reply_to": "answers",
        "correlation_id": "c-1",
        "timestamp": 1_700_000_000,
        "priority": 7,
        "expiration": "1500",
    }


@pytest.mark.parametrize(
    ("body", "octets"),
    [("grün", "grün".encode()), (b"\xff", b"\xff"), ("x" * 300, b"x" * 300), (None, b""), (b"", b"")],
)
def test_we_read_the_bodies_of_proton(body: object, octets: bytes) -> None:
    proton = pytest.importorskip("proton")
    received = message.split(bytes(proton.Message(body=body).encode()))
    assert (received.body, received.properties().get(UNREADABLE)) == (octets, None)


@pytest.mark.parametrize("body", [5, {"a": 1}, [1, 2], True])
def test_a_body_that_is_no_octets_is_kept_as_it_was_encoded(body: object) -> None:
    proton = pytest.importorskip("proton")
    encoded = bytes(proton.Message(body=body).encode())
    received = message.split(encoded)
    assert received.body
    assert encoded.endswith(received.body)
    assert received.properties()[UNREADABLE] == "the body"


# --- encoding ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"message_id": "x" * 256}, "message_id.*256 bytes"),
        ({"message_id": 7}, "message_id=7"),
        ({"correlation_id": []}, "correlation_id"),
        ({"type": ["a"]}, "type"),
        ({"app_id": "é" * 128}, "app_id.*256 bytes"),
        ({"reply_to": b"\xff"}, "reply_to"),
        ({"content_type": "é"}, "content_type.*ascii"),
        ({"priority": 256}, "priority=256"),
        ({"delivery_mode": "2"}, "delivery_mode='2'"),
        ({"timestamp": -1}, "timestamp=-1"),
        ({"expiration": "soon"}, "expiration='soon'"),
        ({"expiration": "4294967296"}, "expiration"),
        ({"expiration": 5}, "expiration=5"),
        ({"headers": {"a": object()}}, "no type for a object"),
        ({"headers": {"a" * 256: 1}}, "256 bytes"),
        ({"headers": {"a": {5: 1}}}, "headers"),
        ({"headers": {"a": 2**64}}, "headers"),
        ({"headers": {"a": "\ud800"}}, "headers"),
        ({"headers": {"a": Decimal("NaN")}}, "headers"),
        ({"headers": {"a": Decimal("1" * 35)}}, "at most 34 digits"),
        ({"headers": []}, "headers"),
        ({"application_headers": {}}, "no property 'application_headers'"),
        ({"type": "a", UNREADABLE: "b"}, "no property 'unreadable'"),
    ],
)
def test_the_error_names_a_property_that_cannot_be_encoded(wrong: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        encode({"message_id": "m-1", **wrong})


def test_a_routing_key_has_255_bytes_at_most() -> None:
    assert message.split(encode({}, subject="k" * 255)).subject == "k" * 255
    with pytest.raises(ValueError, match=r"the routing key 'k.*256 bytes"):
        encode({}, subject="k" * 256)


def test_headers_have_128_kib_at_most() -> None:
    encode({"headers": {"a": "x" * (message.LARGEST - 100)}})
    with pytest.raises(ValueError, match="131,072 is the most"):
        encode({"headers": {"a": "x" * message.LARGEST}})


def test_headers_are_nested_64_deep_at_most() -> None:
    def nested(depth: int) -> dict[str, Any]:
        value: Any = []
        for _ in range(depth - 1):
            value = [value]
        return {"headers": {"a": value}}

    assert message.split(encode(nested(64))).properties() == nested(64)
    with pytest.raises(ValueError, match="more than 64"):
        encode(nested(65))
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ValueError, match="more than 64"):
        encode({"headers": {"a": endless}})


def test_an_equal_value_of_another_type_is_encoded_as_its_own_type() -> None:
    for value in (1, True, 1.0):
        read = message.split(encode({"headers": {"a": value}})).properties()["headers"]["a"]
        assert (read, type(read)) == (value, type(value))
    encode({"timestamp": 1})
    assert message.split(encode({"timestamp": 2**60})).properties() == {"timestamp": 2**63 // 1000}
    with pytest.raises(ValueError, match="timestamp"):
        encode({"timestamp": 1.0})


def test_the_ttl_of_a_call_counts_and_not_the_property() -> None:
    sent = message.encode(publication({"expiration": "5"}), "a", ttl=7)
    assert message.split(sent).properties() == {"expiration": "7"}


# --- decoding ---------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(properties_with(values), st.data())
def test_a_truncated_message_is_an_error_or_has_no_wrong_property(
    properties: dict[str, Any], data: st.DataObject
) -> None:
    written = encode(properties)
    try:
        received = message.split(written[: data.draw(st.integers(0, len(written) - 1))])
    except ValueError:
        return
    read = received.properties()
    read.pop(UNREADABLE, None)
    headers = read.pop("headers", {})
    assert headers.items() <= properties.get("headers", {}).items()
    assert read.items() <= properties.items()


def checked(data: bytes) -> None:
    """What can be read can be sent again, as in a copy for a retry."""
    try:
        received = message.split(data)
    except ValueError:
        return
    read = received.properties()
    read.pop(UNREADABLE, None)
    (read.get("headers") or {}).pop("x-delivery-count", None)
    again = message.split(encode(read, received.body))
    assert again.body == received.body
    assert repr(again.properties()) == repr(with_tables_last(read))  # a NaN is not equal to itself


MUTATED = encode(
    {
        "content_type": "application/json",
        "headers": {"n": 1, "t": "text", "list": [1, {"a": None}], "d": Decimal("0.5"), "at": TIME, "b": b"\xff"},
        "delivery_mode": 2,
        "priority": 1,
        "correlation_id": "c-1",
        "message_id": "m-1",
        "timestamp": 1_700_000_000,
        "type": "order.placed",
        "user_id": "shop",
        "app_id": "shop",
    }
)


@settings(deadline=None, max_examples=500)
@given(st.lists(st.tuples(st.integers(0, len(MUTATED) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_changed_octets_are_an_error_or_can_be_sent_again(changes: list[tuple[int, int]]) -> None:
    data = bytearray(MUTATED)
    for position, octet in changes:
        data[position] = octet
    checked(bytes(data))


@settings(deadline=None, max_examples=300)
@given(st.sampled_from([0x70, 0x72, 0x73, 0x74, 0x75, 0x76, 0x77, 0x78]), st.binary(max_size=80))
def test_any_octets_of_a_section_are_an_error_or_can_be_sent_again(code: int, data: bytes) -> None:
    checked(section(code, data))


fixed = [b"\x40", b"\x41", b"\x42", b"\x43", b"\x44", b"\x45"]
sizes = {1: b"\x50\x51\x52\x53\x54\x55\x56", 2: b"\x60\x61", 4: b"\x70\x71\x72\x73\x74", 8: b"\x80\x81\x82\x83\x84"}
sizes[16] = b"\x94\x98"
amqp_values = st.recursive(
    st.one_of(
        st.sampled_from(fixed),
        *(
            st.tuples(st.sampled_from(list(codes)), st.binary(min_size=size, max_size=size)).map(
                lambda parts: bytes((parts[0],)) + parts[1]
            )
            for size, codes in sizes.items()
        ),
        st.tuples(st.sampled_from(list(b"\xa0\xa1\xa3")), st.binary(max_size=20)).map(
            lambda parts: bytes((parts[0], len(parts[1]))) + parts[1]
        ),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: compound(0xD0, *items)),
        st.lists(inner, max_size=4).map(lambda items: compound(0xD1, *items)),
        st.tuples(inner.filter(lambda value: value[0] != 0), inner).map(lambda parts: b"\x00" + parts[0] + parts[1]),
        st.tuples(st.integers(0, 255), inner).map(lambda parts: compound(0xF0, bytes((parts[0],)), parts[1])),
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=300)
@given(amqp_values, st.lists(amqp_values, max_size=12), st.integers(0, 9))
def test_values_of_every_type_are_read_in_every_place(header: bytes, items: list[bytes], place: int) -> None:
    odd = [*([NULL] * place), *items]
    annotations = section(0x72, compound(0xD1, symbol("x-opt-lightbus-type"), header, symbol("other"), header))
    checked(annotations + fields(*odd) + application(first=b"\x41", odd=header, last=b"\x42") + DATA)
    try:
        read = message.split(application(first=b"\x41", odd=header, last=b"\x42") + DATA).properties()
    except ValueError:
        return
    assert read["headers"].items() >= {"first": True, "last": False}.items()
    assert "odd" in read["headers"] or read[UNREADABLE] == "the header 'odd'"


def test_an_empty_message_is_read() -> None:
    received = message.split(b"")
    assert (received.body, received.subject, received.properties()) == (b"", "", {})


@pytest.mark.parametrize(
    ("encoded", "value"),
    [
        (b"\x80" + struct.pack(">Q", 2**64 - 1), 2**64 - 1),
        (b"\x60\x00\x05", 5),
        (b"\x73\x00\x00\x00\xe9", "é"),
        (b"\x56\x01", True),
        (b"\x83" + struct.pack(">q", 1_700_000_000_123), TIME),
        (b"\x83" + struct.pack(">q", 2**62), 2**62),
        (b"\x98" + uuid.UUID(int=5).bytes, str(uuid.UUID(int=5))),
        (b"\xa1\x02\xff\xfe", b"\xff\xfe"),
        (symbol("sym"), "sym"),
        (b"\x94\x30\x3c" + bytes(13) + b"\x32", Decimal("0.50")),
        (b"\xe0\x04\x02\x54\x01\x02", [1, 2]),
        (b"\xf0\x00\x00\x00\x07\x00\x00\x00\x02\xa1\x00\x00", ["", ""]),
        (b"\x00\xa3\x01a\x54\x05", 5),
        (b"\x45", []),
    ],
)
def test_header_values_of_other_programs_are_decoded(encoded: bytes, value: Any) -> None:
    read = message.split(application(first=b"\x41", odd=encoded) + DATA).properties()
    assert read == {"headers": {"first": True, "odd": value}}


@pytest.mark.parametrize(
    ("encoded", "value"),
    [
        (b"\x80" + struct.pack(">Q", 300), "300"),
        (b"\x44", "0"),
        (b"\x98" + uuid.UUID(int=5).bytes, str(uuid.UUID(int=5))),
        (b"\xa0\x01a", "a"),
        (b"\xa0\x01\xff", b"\xff"),
        (b"\xb1\x00\x00\x00\x01a", "a"),
    ],
)
def test_ids_of_other_programs_are_texts(encoded: bytes, value: Any) -> None:
    received = message.split(fields(encoded, NULL, NULL, string("key"), NULL, encoded) + DATA)
    assert received.subject == "key"
    assert received.properties() == {"message_id": value, "correlation_id": value}


def test_properties_that_no_copy_could_have_are_left_out_and_described() -> None:
    long = b"\xb1\x00\x00\x01\x00" + b"x" * 256
    early = b"\x83" + struct.pack(">q", -1)
    received = message.split(fields(long, long, NULL, NULL, NULL, string("c-1"), string("é"), NULL, NULL, early) + DATA)
    assert received.properties() == {
        "correlation_id": "c-1",
        UNREADABLE: "message_id, user_id, content_type, timestamp",
    }


def test_of_headers_with_the_same_name_the_first_counts() -> None:
    twice = section(0x74, compound(0xD1, string("a"), b"\x54\x01", string("a"), b"\x54\x02")) + DATA
    assert message.split(twice).properties() == {"headers": {"a": 1}, UNREADABLE: "another header 'a'"}


def test_a_header_with_too_many_levels_is_described_and_no_other_is_lost() -> None:
    value = b"\x45"
    for _ in range(3000):
        value = compound(0xD0, value)
    described = b"\x00\x41" * 3000 + b"\x41"
    read = message.split(application(deep=value, described=described, last=b"\x41") + DATA).properties()
    assert read == {"headers": {"described": True, "last": True}, UNREADABLE: "the header 'deep'"}


@pytest.mark.parametrize(
    "encoded",
    [
        b"\xf0\x00\x00\x00\x05\xff\xff\xff\xff\x40",
        b"\xf0\x00\x00\x00\x05\xff\xff\xff\xff\x45",
        b"\xd0\x00\x00\x00\x04\xff\xff\xff\xff",
        b"\x84" + bytes(8),
        b"\x94" + b"\x60" + bytes(15),
    ],
)
def test_a_value_that_claims_too_much_is_described(encoded: bytes) -> None:
    with within(1):
        read = message.split(application(odd=encoded, last=b"\x41") + DATA).properties()
    assert read == {"headers": {"last": True}, UNREADABLE: "the header 'odd'"}


def test_headers_that_are_too_large_are_not_read() -> None:
    received = message.split(application(large=compound(0xD0, b"\x45" * message.LARGEST)) + DATA)
    assert received.body == b"{}"
    assert received.properties() == {"headers": {}, UNREADABLE: "the headers from 'the first one' on"}


def test_a_description_is_short() -> None:
    many = section(0x74, compound(0xD1, *([string("a"), b"\x41"] * 20_000))) + DATA
    read = message.split(many).properties()
    assert read["headers"] == {"a": True}
    assert len(read[UNREADABLE]) < 1100


def test_several_data_sections_are_one_body_and_a_footer_is_no_part_of_it() -> None:
    footer = section(0x78, compound(0xD1, symbol("a"), b"\x41"))
    assert message.split(DATA + section(0x75, b"\xb0\x00\x00\x00\x01!") + footer).body == b"{}!"
    assert message.split(section(0x77, string("{}")) + footer).body == b"{}"
    assert message.split(footer).body == b""


def test_a_sequence_is_kept_as_it_was_encoded() -> None:
    sequences = section(0x76, compound(0xD0, b"\x41")) * 2
    received = message.split(sequences + section(0x78, b"\xc1\x01\x00"))
    assert (received.body, received.properties()) == (sequences, {UNREADABLE: "the body"})


def test_descriptors_may_be_names_or_long_numbers() -> None:
    data = b"\x00" + symbol("amqp:properties:list") + compound(0xD0, string("m-1"))
    data += b"\x00\x80" + struct.pack(">Q", 0x75) + b"\xa0\x02{}"
    received = message.split(data)
    assert (received.body, received.properties()) == (b"{}", {"message_id": "m-1"})


def origin(*items: bytes) -> bytes:
    return section(0x72, compound(0xD1, *items)) + DATA


def test_only_the_brokers_annotation_is_an_origin() -> None:
    forged = symbol("x-opt-ORIG-ADDRESS") + string("lightbus.exchange.evil")
    real = (symbol("x-opt-ORIG-ADDRESS"), string("lightbus.exchange.shop"))
    in_a_value = (symbol("a"), b"\xa0" + bytes((len(forged),)) + forged)
    as_a_string = (string("x-opt-ORIG-ADDRESS"), string("lightbus.exchange.evil"))
    assert message.split(origin(*in_a_value, *as_a_string, *real)).orig_address == "lightbus.exchange.shop"
    assert message.split(origin(*in_a_value, *as_a_string)).orig_address is None
    properties = application(**{"x-opt-ORIG-ADDRESS": string("lightbus.exchange.evil")})
    assert message.split(properties + DATA).orig_address is None


@pytest.mark.parametrize(
    "data",
    [
        origin(*([symbol("x-opt-ORIG-ADDRESS"), string("lightbus.exchange.shop")] * 2)),
        origin(symbol("x-opt-ORIG-ADDRESS"), b"\x41"),
        origin(symbol("x-opt-ORIG-QUEUE"), NULL),
        origin()[: -len(DATA)] * 2 + DATA,
        fields(string("m-1")) + origin(),
        origin(symbol("a"), b"\xa0" + bytes((255,)) + bytes(255))[:200],
        origin(symbol("a"), b"\xb0" + struct.pack(">I", message.LARGEST) + bytes(message.LARGEST)),
        section(0x70, compound(0xC0 | 0x10, b"\x54\x05")) + DATA,
        section(0x70, b"\xd0" + struct.pack(">II", 1000, 0) + bytes(996)) + DATA,
        section(0x79, b"\x45"),
        DATA + fields(),
        fields(NULL, NULL, NULL, b"\x54\x05") + DATA,
        b"\x00\x45\x45",
        b"hello",
        b"\x00",
        section(0x73, NULL) + DATA,
        DATA * 10_001,
    ],
)
def test_what_is_not_a_message_is_an_error(data: bytes) -> None:
    with within(1), pytest.raises(ValueError, match=r"not a message of AMQP 1\.0"):
        message.split(data)


def test_deliveries_are_counted_by_the_broker_alone() -> None:
    forged = application(**{"x-delivery-count": b"\x54\x09", "x-death": b"\x45", "a": b"\x41"}) + DATA
    assert message.split(forged).properties() == {"headers": {"a": True}}
    header = section(0x70, compound(0xD0, b"\x41", NULL, NULL, NULL, b"\x52\x03"))
    received = message.split(header + forged)
    assert received.deliveries == 3
    deaths = [{"queue": "billing.main", "reason": "delivery_limit"}]
    assert received.properties(deaths) == {
        "delivery_mode": 2,
        "headers": {"a": True, "x-delivery-count": 3, "x-death": deaths},
    }
