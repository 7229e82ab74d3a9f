"""Encoding events, and decoding deliveries of any program."""

from __future__ import annotations

import contextlib
import enum
import string
import uuid
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any, Literal, cast

import attrs
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightbus import errors
from lightbus.event import EventType, define
from lightbus.message import Message
from lightbus.transport import Channel, Delivery, Properties
from lightbus.wire import codec
from tests.patience import LIMIT


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@attrs.frozen
class Line:
    article: str
    count: int


@attrs.frozen
class Everything:
    text: str
    whole: int
    real: float
    yes: bool
    price: Decimal
    at: datetime
    day: date
    lasting: timedelta
    id: uuid.UUID
    colour: Colour
    blob: bytes
    line: Line
    maybe: int | None
    either: int | str
    lines: list[Line]
    counts: dict[str, int]
    tags: set[str]
    pair: tuple[int, str]
    some: tuple[int, ...]
    loose: Any


everything = define(Everything, "everything.happened", 2)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
int64 = st.integers(-(2**63), 2**63 - 1)
lines = st.builds(Line, article=texts, count=int64)
json_values = st.recursive(
    st.none() | st.booleans() | int64 | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


def delivery_of(
    body: bytes = b"{}", *, exchange: str = "auth", key: str = "user.registered", properties: Any = None, **options: Any
) -> Delivery:
    return Delivery(
        cast(Channel, None), 1, False, exchange, key, {} if properties is None else properties, body, **options
    )


def malformed() -> Properties:
    raise ValueError("a table ends too early")


# --- bodies


@given(
    st.builds(
        Everything,
        text=texts,
        whole=int64,
        real=st.floats(allow_nan=False, allow_infinity=False),
        yes=st.booleans(),
        price=st.decimals(allow_nan=False, allow_infinity=False),
        at=st.datetimes(timezones=st.just(UTC)),
        day=st.dates(),
        lasting=st.timedeltas(timedelta(days=-10_000), timedelta(days=10_000)),
        id=st.uuids(),
        colour=st.sampled_from(Colour),
        blob=st.binary(max_size=50),
        line=lines,
        maybe=st.none() | int64,
        either=int64 | texts,
        lines=st.lists(lines, max_size=3),
        counts=st.dictionaries(texts, int64, max_size=3),
        tags=st.sets(texts, max_size=3),
        pair=st.tuples(int64, texts),
        some=st.lists(int64, max_size=3).map(tuple),
        loose=json_values,
    )
)
def test_any_event_comes_back_as_it_was(event: Everything) -> None:
    assert codec.decode(Everything, codec.encode(everything, event)) == event


@attrs.frozen
class Tree:
    branches: list[Tree]
    weight: float | None


def event_of(field: Any) -> tuple[EventType, Any]:
    event_type = define(type("Happened", (), {"__annotations__": {"what": field}}), None, 1)
    return event_type, event_type.cls


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (int, "1"),
        (int, 1.5),
        (int, 2.0),
        (int, True),
        (int, None),
        (str, 1),
        (str, None),
        (float, "1.0"),
        (float, float("nan")),
        (float | None, float("nan")),  # msgspec writes null, which this type accepts
        (int | None, float("nan")),
        (Literal["a", None], float("nan")),
        (list[tuple[str, float | None]], [("a", float("inf"))]),
        (object, [float("nan")]),
        (Tree, Tree([Tree([], float("nan"))], 1.0)),
        (dict[str, Any], {"deep": [1.0, {"ratio": float("inf")}]}),
        (float, float("inf")),
        (bool, 1),
        (Decimal, "one"),
        (datetime, "yesterday"),
        (datetime, 1700000000),
        (uuid.UUID, "not one"),
        (Colour, "green"),
        (bytes, "not base64!"),
        (list[int], ["1"]),
        (dict[str, int], {"a": "b"}),
        (Line, {"article": "a"}),
        (Line, {"article": "a", "count": "1"}),
        (tuple[int, str], (1,)),
        (str, "\ud800"),
        (Any, object()),
        (Any, 1j),
    ],
)
def test_a_value_of_a_wrong_type_fails_the_publish_and_names_the_event(field: Any, value: Any) -> None:
    event_type, cls = event_of(field)
    with pytest.raises(errors.InvalidPayload, match=r"event 'happened' was not sent: .* fields of Happened"):
        codec.encode(event_type, cls(what=value))


def test_a_wrong_value_is_named_by_its_path() -> None:
    event_type, cls = event_of(list[Line])
    with pytest.raises(errors.InvalidPayload, match=r"\$\.what\[1\]\.count"):
        codec.encode(event_type, cls(what=[Line("a", 1), Line("b", cast(int, "2"))]))


@pytest.mark.parametrize(
    ("field", "value", "received"),
    [
        # JSON has one type of string and one of number. Handlers get what decodes as the field's type.
        (Decimal, 1.5, Decimal("1.5")),
        (Decimal, 3, Decimal(3)),
        (Decimal, "9.50", Decimal("9.50")),
        (float, 1, 1.0),
        (int, 2**70, 2**70),
        (str, datetime(2024, 1, 2, tzinfo=UTC), "2024-01-02T00:00:00Z"),
        (str, Decimal("1.0"), "1.0"),
        (str, uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (str, Colour.RED, "red"),
        (str, b"abc", "YWJj"),
        (datetime, "2024-01-02T00:00:00Z", datetime(2024, 1, 2, tzinfo=UTC)),
        (datetime, datetime(2024, 1, 2), datetime(2024, 1, 2)),  # naive stays naive
        (Colour, "red", Colour.RED),
        (list[int], (1, 2), [1, 2]),
        (set[int], [1, 1], {1}),
        (Line, {"article": "a", "count": 1, "more": 2}, Line("a", 1)),
    ],
    ids=repr,
)
def test_a_value_that_reads_back_as_its_fields_type_is_accepted(field: Any, value: Any, received: Any) -> None:
    event_type, cls = event_of(field)
    what = codec.decode(cls, codec.encode(event_type, cls(what=value))).what
    assert what == received
    assert type(what) is type(received)


def test_a_recursive_event_is_refused() -> None:
    event_type, cls = event_of(Any)
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(errors.InvalidPayload):
        codec.encode(event_type, cls(what=loop))


def test_a_body_over_16_mb_is_refused_on_both_sides() -> None:
    event_type, cls = event_of(str)
    with pytest.raises(errors.BodyTooLarge, match=r"16,777,2\d\d bytes"):
        codec.encode(event_type, cls(what="x" * codec.MAX_BODY_BYTES))
    body = b" " * (codec.MAX_BODY_BYTES + 1)
    nobody: Any = None
    for read in (
        lambda: codec.decode(dict, body),
        lambda: codec.payload_reader(dict)(Delivery(nobody, 0, False, "", "", {}, body)),
    ):
        with pytest.raises(errors.DecodeError, match="bytes") as caught:
            read()
        assert caught.value.__cause__ is None


@given(st.binary(max_size=200))
def test_no_body_raises_anything_but_a_decode_error(body: bytes) -> None:
    for wanted in (Everything, Line, dict[str, Any]):
        with contextlib.suppress(errors.DecodeError):
            codec.decode(wanted, body)


@pytest.mark.parametrize(
    "body",
    [b"", b"null", b"[]", b'"a"', b"{", b"\x80\x04K\x01.", b"[" * 100_000, b'{"a":' * 100_000, b"\xff", b"{} {}"],
)
def test_a_body_that_is_not_one_json_object_is_a_decode_error(body: bytes) -> None:
    with pytest.raises(errors.DecodeError, match="Line"):
        codec.decode(Line, body)


def test_unknown_fields_are_ignored() -> None:
    assert codec.decode(Line, b'{"article": "a", "count": 1, "colour": "red"}') == Line("a", 1)


def test_loose_data_becomes_an_event_where_it_fits() -> None:
    event_type, cls = event_of(int)
    assert codec.build_event(event_type, {"what": "5"}) == cls(what=5)
    assert codec.build_event(event_type, b'{"what": 5}') == cls(what=5)
    for wrong in ({"what": "x"}, {}, b'{"what": "5"}', b"{", b"[1]"):
        with pytest.raises(errors.InvalidPayload, match="happened"):
            codec.build_event(event_type, cast(Any, wrong))


# --- properties of a new event


def test_a_new_event_has_its_source_name_and_time() -> None:
    properties = codec.event_properties("billing", everything, {"tenant": "a"})
    assert properties["app_id"] == "billing"
    assert properties["type"] == "everything.happened"
    assert properties["delivery_mode"] == 2
    assert properties["content_type"] == "application/json"
    assert properties["headers"] == {"lightbus-version": 2, "tenant": "a"}
    assert properties["correlation_id"] == properties["message_id"]
    assert abs(datetime.now(UTC).timestamp() - properties["timestamp"]) < LIMIT


def test_an_event_published_by_a_handler_keeps_correlation_and_causation() -> None:
    first = codec.event_properties("auth", everything, None)
    token = codec.current_run.set((delivery_of(properties=first), None, None))
    try:
        second = codec.event_properties("billing", everything, None)
    finally:
        codec.current_run.reset(token)
    assert second["headers"]["lightbus-causation"] == first["message_id"]
    assert second["correlation_id"] == first["correlation_id"]
    assert second["message_id"] != first["message_id"]


@pytest.mark.parametrize(
    "headers",
    [
        {"lightbus-attempt": 1},
        {"x-death": "a"},
        {5: "a"},
        {"a" * 256: "a"},
        {"a": object()},
        {"a": ["b"]},
        {"a": 2**63},
        {"a": "\ud800"},
        {"\ud800": "a"},
        {"a": datetime(1969, 12, 31, tzinfo=UTC)},
    ],
)
def test_headers_that_cannot_be_sent_fail_the_publish(headers: Any) -> None:
    with pytest.raises(errors.InvalidPayload, match="was not sent: the header"):
        codec.event_properties("billing", everything, headers)


# --- the envelope


def test_a_message_with_only_a_routing_key_is_read() -> None:
    message = codec.read_message("billing", delivery_of(b'{"id": 1}'))
    assert (message.event, message.source, message.version, message.attempt) == ("user.registered", "auth", 1, 1)
    assert message.correlation_id == message.id
    assert message.causation_id is None
    assert message.headers == {}
    assert message.body == b'{"id": 1}'
    assert abs((datetime.now(UTC) - message.time).total_seconds()) < LIMIT


def test_a_message_without_an_id_gets_one_and_keeps_it() -> None:
    delivery = delivery_of()
    message_id = codec.read_message("billing", delivery).id
    assert codec.read_message("billing", delivery).id == message_id
    assert codec.read_cause(delivery)[0] == message_id
    assert codec.copy_properties("billing", delivery, None, 2, "billing")["message_id"] == message_id


@pytest.mark.parametrize("bad_id", ["", 5, None, b"x"], ids=repr)
def test_a_copy_of_a_message_with_an_invalid_id_keeps_the_generated_one(bad_id: Any) -> None:
    delivery = delivery_of(properties={"message_id": bad_id})
    copy = codec.copy_properties("billing", delivery, None, 2, "billing")
    assert isinstance(copy["message_id"], str)
    assert copy["message_id"] == codec.read_message("billing", delivery).id != ""


def test_the_source_is_the_exchange_not_a_header() -> None:
    forged = {
        "app_id": "bank",
        "headers": {
            "lightbus-source": "bank",
            "lightbus-routing-key": "money.moved",
            "lightbus-attempt": 99,
            "lightbus-handler": "steal",
        },
    }
    envelope = codec.read_envelope("billing", delivery_of(properties=forged))
    assert envelope == codec.Envelope("user.registered", "auth", 1, None)
    # the internal exchange of another app is not trusted
    other = codec.read_envelope("billing", delivery_of(exchange="auth.internal", properties=forged))
    assert other == codec.Envelope("user.registered", "auth", 1, None)


def test_the_source_of_a_delayed_event_is_its_app() -> None:
    assert codec.read_envelope("billing", delivery_of(exchange="auth.delay.3")).source == "auth"


def test_a_retried_copy_keeps_its_event_source_and_attempt() -> None:
    first = delivery_of(properties=codec.event_properties("auth", everything, {"tenant": "a"}))
    copy = codec.copy_properties("billing", first, "open_account", 2, "billing.main")
    again = delivery_of(exchange="billing.internal", key="main", properties=copy)
    assert codec.read_envelope("billing", again) == codec.Envelope("user.registered", "auth", 2, "open_account")
    one, two = codec.read_message("billing", first), codec.read_message("billing", again)
    assert attrs.evolve(one, attempt=2) == two


hostile_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5)
    | st.datetimes() | st.decimals(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip
header_names = st.sampled_from(
    [
        codec.VERSION,
        codec.CAUSATION,
        codec.ATTEMPT,
        codec.HANDLER,
        codec.SOURCE,
        codec.ROUTING_KEY,
        "x-death",
        "lightbus-delay-3",
    ]
) | st.text(max_size=8)
hostile_properties = st.dictionaries(
    st.sampled_from(
        ["content_type", "headers", "delivery_mode", "correlation_id", "message_id", "timestamp", "type", "app_id",
         "user_id", "expiration", "priority", "reply_to"]
    ),
    hostile_values | st.dictionaries(header_names, hostile_values, max_size=4),
)  # fmt: skip


@given(
    hostile_properties,
    st.sampled_from(["auth", "billing", "billing.internal", "auth.delay.1", ""]),
    st.text(max_size=5),
)
def test_hostile_properties_raise_nothing_but_decode_errors_and_give_an_envelope_of_the_right_types(
    properties: Properties, exchange: str, key: str
) -> None:
    delivery = delivery_of(exchange=exchange, key=key, properties=properties)
    message = codec.read_message("billing", delivery)
    for field in attrs.fields(Message):
        value = getattr(message, field.name)
        match field.type:
            case "str":
                assert type(value) is str, field.name
            case "int":
                assert type(value) is int, field.name
                assert value >= (field.name != "delay")
            case "str | None":
                assert value is None or type(value) is str, field.name
            case "datetime":
                assert value.tzinfo is UTC
    assert not [name for name in message.headers if name.startswith(("lightbus-", "x-death"))]
    assert codec.read_cause(delivery) == (message.id, message.correlation_id)
    copy = codec.copy_properties("billing", delivery, "handler", 2, "billing")
    assert copy["message_id"] == message.id
    assert copy["headers"]["lightbus-attempt"] == 2
    assert copy["headers"]["lightbus-source"] == message.source
    assert "user_id" not in copy
    assert "expiration" not in copy


def test_malformed_properties_are_a_decode_error_and_can_still_be_dead_lettered() -> None:
    delivery = delivery_of(properties=malformed)
    with pytest.raises(errors.DecodeError, match="a table ends too early"):
        codec.read_message("billing", delivery)
    assert codec.read_envelope("billing", delivery).event == "user.registered"
    copy = codec.copy_properties("billing", delivery, None, 1, "billing")
    assert copy["headers"]["lightbus-routing-key"] == "user.registered"
    assert copy["message_id"]
    assert codec.read_cause(delivery)[0]


@pytest.mark.parametrize(
    ("redelivered", "headers", "returns"),
    [
        (True, {"x-delivery-count": 3}, 3),
        (True, {}, 0),
        (True, None, 0),
        (True, "not a table", 0),
        (False, {"x-delivery-count": 3}, 0),  # written by a publisher: it was not returned
        (True, {"x-delivery-count": "3"}, 0),
        (True, {"x-delivery-count": True}, 0),
        (True, {"x-delivery-count": 3.5}, 0),
    ],
)
def test_returns_are_counted_by_the_broker(redelivered: bool, headers: Any, returns: int) -> None:
    delivery = delivery_of(properties={"headers": headers})
    delivery.redelivered = redelivered
    assert codec.read_returns(delivery) == returns


def test_malformed_properties_count_as_no_returns() -> None:
    delivery = delivery_of(properties=malformed)
    delivery.redelivered = True
    assert codec.read_returns(delivery) == 0


# --- copies


def test_a_copy_has_no_broker_headers_and_no_forged_headers() -> None:
    headers = {
        "x-death": [{"count": 1}],
        "x-first-death-queue": "q",
        "x-last-death-reason": "expired",
        "x-delivery-count": 3,
        "x-acquired-count": 3,
        "x-tenant": "kept: a program of its own may use it",
        "traceparent": "00-1-2-01",
        "lightbus-version": 2,
        "lightbus-causation": "c",
        "lightbus-attempt": 50,
        "lightbus-handler": "forged",
        "lightbus-source": "forged",
        "lightbus-error-type": "forged",
        "lightbus-delay-4": 1,
    }
    copy = codec.copy_properties("billing", delivery_of(properties={"headers": headers}), None, 2, "billing.slow")
    assert copy["headers"] == {
        "x-tenant": "kept: a program of its own may use it",
        "traceparent": "00-1-2-01",
        "lightbus-version": 2,
        "lightbus-causation": "c",
        "lightbus-attempt": 2,
        "lightbus-source": "auth",
        "lightbus-routing-key": "user.registered",
        "lightbus-queue": "billing.slow",
    }
    assert headers["lightbus-attempt"] == 50, "the delivery itself stays as it came"


def test_a_copy_is_persistent_and_keeps_the_publishers_properties() -> None:
    first = codec.event_properties("auth", everything, None) | {
        "delivery_mode": 1,
        "user_id": "auth",
        "expiration": "1",
    }
    copy = codec.copy_properties("billing", delivery_of(properties=first), "h", 2, "billing")
    assert copy["delivery_mode"] == 2
    for name in ("message_id", "correlation_id", "timestamp", "type", "app_id", "content_type"):
        assert copy[name] == first[name]
    assert "user_id" not in copy
    assert "expiration" not in copy


@pytest.mark.parametrize(("seconds", "milliseconds"), [(1.5, "1500"), (0.0001, "1"), (600, "600000")])
def test_an_expiration_is_in_milliseconds_and_never_zero(seconds: float, milliseconds: str) -> None:
    copy = codec.copy_properties("billing", delivery_of(), "h", 2, "billing", seconds)
    assert copy["expiration"] == milliseconds


# --- the reason of a dead letter


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even this")


def raised(error: Exception) -> Exception:
    def deeper(depth: int) -> None:
        if depth:
            deeper(depth - 1)
        raise error

    try:
        deeper(20)
    except type(error) as caught:
        return caught
    return error


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x" * 10_000_000),
        ValueError("😀" * 100_000),
        ValueError("\ud800" * 100_000),
        ValueError(string.printable),
        ExceptionGroup("many", [ValueError("x" * 10_000) for _ in range(50)]),
        Unprintable(),
        type("E" * 10_000, (Exception,), {})("?"),
    ],
    ids=lambda error: type(error).__name__[:20],
)
def test_error_headers_are_bounded_whatever_the_error(error: Exception) -> None:
    headers = codec.error_headers(raised(error))
    assert all(isinstance(value, str) for value in headers.values())
    assert sum(len(name) + len(value.encode()) + 10 for name, value in headers.items()) < 6000


def test_error_headers_have_the_type_the_message_and_the_traceback() -> None:
    headers = codec.error_headers(raised(errors.Reject("no such user")))
    assert headers["lightbus-error-type"] == "lightbus.errors.Reject"
    assert headers["lightbus-error-message"] == "no such user"
    assert "in deeper" in headers["lightbus-error-traceback"]
    assert headers["lightbus-error-traceback"].rstrip().endswith("no such user")
    assert codec.error_headers(KeyError("a"))["lightbus-error-type"] == "KeyError"
    assert datetime.fromisoformat(headers["lightbus-error-time"]).tzinfo is not None


@attrs.frozen
class Even:
    number: int

    def __attrs_post_init__(self) -> None:
        if self.number % 2:
            raise ValueError("an odd number")


@attrs.frozen
class Looked:
    table: dict[str, int]

    def __attrs_post_init__(self) -> None:
        _ = self.table["a"]


def test_whatever_a_class_raises_the_body_cannot_be_read() -> None:
    with pytest.raises(errors.DecodeError, match="cannot be read as Looked: KeyError: 'a'"):
        codec.decode(Looked, b'{"table": {}}')


def decode_error(body: bytes) -> errors.DecodeError:
    with pytest.raises(errors.DecodeError) as caught:
        codec.decode(Even, body)
    return caught.value.with_traceback(caught.tb.tb_next)  # without this test's own frame, as in a worker


def test_a_lightbus_error_has_a_message_and_no_frames_of_lightbus() -> None:
    headers = codec.error_headers(decode_error(b'{"number": "one"}'))
    assert "Expected `int`, got `str` - at `$.number`" in headers["lightbus-error-message"]
    assert headers["lightbus-error-traceback"] == ""


def test_a_lightbus_error_keeps_the_frames_of_the_application() -> None:
    shown = codec.error_headers(decode_error(b'{"number": 1}'))["lightbus-error-traceback"]
    assert "in __attrs_post_init__" in shown
    assert "ValueError: an odd number" in shown
    assert "codec.py" not in shown.replace("test_codec.py", "")


def test_the_end_of_a_long_traceback_is_kept() -> None:
    headers = codec.error_headers(raised(ValueError("x" * 10_000 + " the end")))
    assert headers["lightbus-error-traceback"].startswith("... ")
    assert headers["lightbus-error-traceback"].rstrip().endswith("the end")
    assert headers["lightbus-error-message"].endswith(" ...")


def test_decoding_needs_no_type_to_be_registered() -> None:
    assert codec.payload_reader(dict[str, Any])(delivery_of(b'{"a": [1, null]}')) == {"a": [1, None]}
    assert msgspec.json.encode({"a": 1}) == b'{"a":1}'


def test_a_decimal_from_json_keeps_all_its_digits() -> None:
    @attrs.frozen
    class Priced:
        amount: Decimal

    event_type = define(Priced, "priced", 1)
    event = codec.build_event(event_type, b'{"amount": 12345678901234567890.123456789}')
    assert event == Priced(Decimal("12345678901234567890.123456789"))


def test_headers_larger_than_a_frame_are_refused() -> None:
    with pytest.raises(errors.InvalidPayload, match=r"headers have .* bytes, the limit is 65,536"):
        codec.event_properties("billing", define(type("Big", (), {}), "big", 1), {"note": "x" * 70_000})


def test_the_attempt_of_a_first_delivery_is_known_without_its_properties() -> None:
    def properties() -> Properties:
        raise AssertionError("decoding them costs more than the rest of an outcome")

    delivery = Delivery(cast("Channel", None), 1, False, "auth", "user.registered", properties, b"{}")
    assert codec.attempt_of("billing", delivery) == 1
