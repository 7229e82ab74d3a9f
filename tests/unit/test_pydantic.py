"""Pydantic models as events and payloads: what is sent, what is read, and the errors."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import attrs
import jsonschema
import pydantic
import pytest
import typing_extensions
from pydantic import AliasChoices, AliasPath, BaseModel, ConfigDict, Field, SecretStr, computed_field
from pydantic.alias_generators import to_camel

from lightbus import Lightbus, errors
from lightbus.cli import events, schema
from lightbus.pydantic_models import MOST_LISTED, Coder
from lightbus.transport import Delivery
from lightbus.wire import codec
from lightbus.wire.collisions import MOST_COLLIDING, MOST_COMPOSITE, guard_model
from tests.patience import LIMIT

T = TypeVar("T")


class Kind(Enum):
    CARD = "card"


class Address(BaseModel):
    """Where a user lives."""

    street: str
    zip: int


class Everything(BaseModel):
    text: str
    number: int
    ratio: float
    amount: Decimal
    at: datetime
    on: date
    lasts: timedelta
    id: uuid.UUID
    kind: Kind
    raw: bytes
    mode: Literal["a", "b"]
    address: Address
    addresses: list[Address]
    by_name: dict[str, Address]
    numbers: set[int]
    pair: tuple[int, str]
    maybe: int | None
    anything: Any


class Card(BaseModel):
    kind: Literal["card"]
    number: str


class Cash(BaseModel):
    model_config = ConfigDict(extra="forbid")

    kind: Literal["cash"]
    amount: Decimal


Payment = Annotated[Card | Cash, Field(discriminator="kind")]


Deep = typing_extensions.TypeAliasType("Deep", "dict[str, Deep | int]")


class Page(BaseModel, Generic[T]):
    items: list[T]


@pytest.fixture
def app() -> Lightbus:
    return Lightbus("shop", url="memory://pydantic")


def body_of(app: Lightbus, event: object) -> bytes:
    (event_type,) = (one for one in app.events.values() if one.cls is type(event))
    return codec.encode(event_type, event)


def not_sent(app: Lightbus, event: object) -> str:
    with pytest.raises(errors.InvalidPayload) as caught:
        body_of(app, event)
    return str(caught.value)


def read(payload_type: Any, body: object) -> Any:
    nobody: Any = None
    given = body if isinstance(body, bytes) else json.dumps(body).encode()
    return codec.payload_reader(payload_type)(Delivery(nobody, 0, False, "", "", {}, given))


def not_read(payload_type: Any, body: object) -> str:
    with pytest.raises(errors.DecodeError) as caught:
        read(payload_type, body)
    return str(caught.value)


def refused(app: Lightbus, cls: type[Any]) -> str:
    with pytest.raises(errors.InvalidEvent) as caught:
        app.event(cls)
    assert not app.events
    return str(caught.value)


# --- sent and read ----------------------------------------------------------------------------


def test_every_type_is_sent_and_read(app: Lightbus) -> None:
    app.event(Everything)
    address = Address(street="Main St", zip=12)
    event = Everything(
        text="ä",
        number=1,
        ratio=0.5,
        amount=Decimal("12345678901234567890.10"),
        at=datetime(2026, 1, 1, tzinfo=UTC),
        on=date(2026, 1, 1),
        lasts=timedelta(seconds=90),
        id=uuid.UUID(int=5),
        kind=Kind.CARD,
        raw=b"raw",
        mode="a",
        address=address,
        addresses=[address],
        by_name={"home": address},
        numbers={1, 2},
        pair=(1, "x"),
        maybe=None,
        anything={"a": [1]},
    )
    assert codec.decode(Everything, body_of(app, event)) == event


def test_a_model_stays_the_class_that_it_is(app: Lightbus) -> None:
    class UserMoved(BaseModel):
        user_id: int

    assert app.event(UserMoved) is UserMoved
    event = UserMoved(user_id=1)
    event.user_id = 2  # not frozen, unless its model_config says so
    assert body_of(app, event) == b'{"user_id":2}'


def test_a_pydantic_dataclass_is_validated_by_pydantic(app: Lightbus) -> None:
    @app.event
    @pydantic.dataclasses.dataclass
    class UserMoved:
        user_id: int = Field(alias="userId", gt=0)

    assert body_of(app, UserMoved(userId=1)) == b'{"userId":1}'  # type: ignore[call-arg]
    assert "userId: Input should be greater than 0" in not_read(UserMoved, {"userId": -1})


def test_generic_models_are_sent_and_read(app: Lightbus) -> None:
    app.event("page.made")(Page[Address])
    event = Page[Address](items=[Address(street="x", zip=1)])
    assert read(Page[Address], body_of(app, event)) == event
    assert "items[0].zip: Field required" in not_read(Page[Address], {"items": [{"street": "x"}]})


def test_aliases_are_the_names_in_the_body(app: Lightbus) -> None:
    @app.event
    class UserMoved(BaseModel):
        model_config = ConfigDict(alias_generator=to_camel, validate_by_name=True)

        user_id: int
        new_street: str = Field(
            validation_alias=AliasChoices("newStreet", "street"), serialization_alias="newStreet", default=""
        )

    assert body_of(app, UserMoved(user_id=1, new_street="x")) == b'{"userId":1,"newStreet":"x"}'
    assert read(UserMoved, {"userId": 1, "street": "x"}).new_street == "x"


def test_the_configuration_decides_about_aliases(app: Lightbus) -> None:
    @app.event
    class UserMoved(BaseModel):
        model_config = ConfigDict(validate_by_name=True, validate_by_alias=False)

        user_id: int = Field(alias="userId")

    assert body_of(app, UserMoved(user_id=1)) == b'{"user_id":1}'  # type: ignore[call-arg]


def test_a_handler_may_read_a_part_of_another_value() -> None:
    class Street(BaseModel):
        street: str = Field(validation_alias=AliasPath("address", "street"))

    assert read(Street, {"address": {"street": "x"}}).street == "x"


def test_unknown_fields_are_ignored_kept_or_refused_as_the_model_says() -> None:
    class Keeps(BaseModel):
        model_config = ConfigDict(extra="allow")

    assert read(Card, {"kind": "card", "number": "1", "more": 2}) == Card(kind="card", number="1")
    assert read(Keeps, {"more": 2}).more == 2
    assert (
        not_read(Cash, {"kind": "cash", "amount": 1, "more": 2})
        == "the body cannot be read as Cash: more: Extra inputs are not permitted"
    )


def test_extra_fields_that_a_model_allows_are_sent(app: Lightbus) -> None:
    @app.event
    class UserMoved(BaseModel):
        model_config = ConfigDict(extra="allow")

    assert body_of(app, UserMoved(more=2)) == b'{"more":2}'  # type: ignore[call-arg]


def test_computed_fields_are_sent_and_private_attributes_are_not(app: Lightbus) -> None:
    @app.event
    class UserMoved(BaseModel):
        email: str
        _cache: int = 0

        @computed_field
        def domain(self) -> str:
            return self.email.partition("@")[2]

    assert body_of(app, UserMoved(email="a@b.c")) == b'{"email":"a@b.c","domain":"b.c"}'


def test_a_discriminated_union_is_read_as_one_of_its_models() -> None:
    assert read(Payment, {"kind": "card", "number": "1"}) == Card(kind="card", number="1")
    assert read(Payment, {"kind": "cash", "amount": "1.50"}) == Cash(kind="cash", amount=Decimal("1.50"))
    assert not_read(Payment, {"kind": "card"}) == "the body cannot be read as Card | Cash: card.number: Field required"
    assert "'gold' found using 'kind' does not match" in not_read(Payment, {"kind": "gold"})


def test_a_named_union_is_read() -> None:
    named = typing_extensions.TypeAliasType("Named", Payment)  # `type Named = ...` from Python 3.12 on
    assert read(named, {"kind": "card", "number": "1"}) == Card(kind="card", number="1")
    assert not_read(named, {"kind": "card"}) == "the body cannot be read as Named: card.number: Field required"


def test_unions_lists_and_optional_models_are_read() -> None:
    assert read(Card | None, b"null") is None
    assert read(list[Card], [{"kind": "card", "number": "1"}]) == [Card(kind="card", number="1")]
    assert isinstance(read(Cash | Card, {"kind": "card", "number": "1"}), Card)


def test_a_field_is_written_with_the_fields_of_its_type(app: Lightbus) -> None:
    class Detailed(Address):
        country: str

    @app.event
    class UserMoved(BaseModel):
        to: Address

    event = UserMoved(to=Detailed(street="x", zip=1, country="NL"))
    assert body_of(app, event) == b'{"to":{"street":"x","zip":1}}'


def test_the_model_decides_how_strict_it_is() -> None:
    class Strict(BaseModel):
        model_config = ConfigDict(strict=True)

        number: int
        at: datetime

    assert read(Address, {"street": "x", "zip": "12"}).zip == 12
    assert not_read(Strict, {"number": "12", "at": "2026-01-01T00:00:00Z"}).endswith(
        "number: Input should be a valid integer"
    )
    assert read(Strict, {"number": 12, "at": "2026-01-01T00:00:00Z"}).number == 12


def test_validators_run_on_both_sides(app: Lightbus) -> None:
    @app.event
    class Booked(BaseModel):
        start: int
        end: int

        @pydantic.model_validator(mode="after")
        def check(self) -> Booked:
            if self.end < self.start:
                raise ValueError("it ends before it starts")
            return self

    event = Booked(start=1, end=2)
    event.end = 0
    assert "not sent: Value error, it ends before it starts. Set the fields of Booked" in not_sent(app, event)
    assert not_read(Booked, {"start": 1, "end": 0}).endswith("Booked: Value error, it ends before it starts")


def test_a_validator_that_cannot_read_what_the_model_writes_is_named(app: Lightbus) -> None:
    @app.event
    class Tagged(BaseModel):
        tags: list[str]

        @pydantic.field_validator("tags", mode="before")
        @classmethod
        def split(cls, value: Any) -> Any:
            return value.split(",")

    message = not_sent(app, Tagged(tags="a,b"))  # type: ignore[arg-type]
    assert "a validator cannot read what the model writes (AttributeError: 'list' object has no" in message


def test_a_validator_that_fails_only_where_types_are_converted_is_named(app: Lightbus) -> None:
    raised = iter([ValueError("only what is strict"), KeyError("not there")])

    @app.event
    class Tagged(BaseModel):
        tag: str

        @pydantic.field_validator("tag")
        @classmethod
        def look(cls, value: Any) -> Any:
            raise next(raised)

    message = not_sent(app, Tagged.model_construct(tag="a"))
    assert "a validator cannot read what the model writes (KeyError: 'not there')" in message


# --- bad values -------------------------------------------------------------------------------


def test_an_instance_that_was_constructed_without_validation_is_not_sent(app: Lightbus) -> None:
    app.event(Address)
    assert "event 'address' was not sent: zip: Field required." in not_sent(app, Address.model_construct(street="x"))


@pytest.mark.parametrize(
    ("value", "words"),
    [("5", "zip: Input should be a valid integer."), (None, "zip: "), (object(), "unknown type: <class 'object'>")],
)
def test_an_instance_with_a_value_of_another_type_is_not_sent(app: Lightbus, value: Any, words: str) -> None:
    app.event(Address)
    event = Address(street="x", zip=1)
    event.zip = value
    assert words in not_sent(app, event)


def test_a_value_that_is_the_same_in_json_is_sent(app: Lightbus) -> None:
    @app.event
    class Booked(BaseModel):
        on: date

    event = Booked(on=date(2026, 1, 1))
    event.on = "2026-01-02"  # type: ignore[assignment]
    assert body_of(app, event) == b'{"on":"2026-01-02"}'


def test_a_type_that_does_not_read_strictly_what_it_writes_is_sent(app: Lightbus) -> None:
    @app.event
    class Counted(BaseModel):
        lasts: timedelta
        number: Annotated[int, pydantic.PlainSerializer(str)]

        model_config = ConfigDict(ser_json_timedelta="float")

    event = Counted(lasts=timedelta(seconds=90), number=5)
    assert codec.decode(Counted, body_of(app, event)) == event


def test_an_error_has_one_line_for_each_field(app: Lightbus) -> None:
    app.event(Address)
    assert not_sent(app, Address.model_construct(street=1, zip="x")) == (
        "event 'address' was not sent: 2 errors (street, zip):\n"
        "  street: Input should be a valid string\n"
        "  zip: Input should be a valid integer\n"
        "Set the fields of Address to values of their declared types."
    )
    assert not_read(Address, {"zip": "x"}) == (
        "the body cannot be read as Address: 2 errors (street, zip):\n"
        "  street: Field required\n"
        "  zip: Input should be a valid integer, unable to parse string as an integer"
    )


def test_an_error_shows_no_values_and_no_url() -> None:
    class Account(BaseModel):
        password: Annotated[str, Field(max_length=3)]

    message = not_read(Account, {"password": "hunter2"})
    assert "hunter2" not in message
    assert "pydantic.dev" not in message


def test_an_error_lists_the_first_fields_and_counts_the_others() -> None:
    message = not_read(list[Address], [{}] * 50)
    assert message.count("\n") == 11
    assert message.endswith("  ... and 90 more")


def test_too_many_errors_are_only_counted() -> None:
    many = MOST_LISTED // 2 + 1
    assert not_read(list[Address], [{}] * many).endswith(f"{2 * many:,} errors, which are too many to list")


def test_names_in_an_error_are_printable_and_short() -> None:
    message = not_read(Cash, {"kind": "cash", "amount": 1, "a\nb\x1b[31m": 1, "c" * 5000: 2})
    assert "a\\nb\\x1b[31m: Extra inputs" in message
    deep: Any = {"k" * 1000: None}
    for _ in range(50):
        deep = {"k" * 1000: deep}
    nested = pydantic.create_model("Nested", deep=(Deep, ...))
    assert len(not_read(nested, {"deep": deep})) < 4000
    assert len(message) < 400


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "Invalid JSON"),
        (b"no JSON", "Invalid JSON"),
        (b"[]", "Input should be an object"),
        (b'"text"', "Input should be an object"),
        (b"\xff", "Invalid JSON"),
        (b'{"street": "\xff", "zip": 1}', "Invalid JSON"),
        (b'{"street": "\\ud800", "zip": 1}', "Invalid JSON"),
        (b"[" * 100_000, "recursion limit exceeded"),
        (b" " * (codec.MAX_BODY_BYTES + 1), "the limit is 16,777,216"),
    ],
)
def test_a_body_that_is_not_the_json_of_an_object_is_an_error(body: bytes, words: str) -> None:
    assert words in not_read(Address, body)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_json_cannot_represent_is_not_sent(app: Lightbus, number: float) -> None:
    @app.event
    class Measured(BaseModel):
        value: float | None

    @app.event
    class Counted(BaseModel):
        model_config = ConfigDict(ser_json_inf_nan="constants")

        value: float

    @app.event
    class Written(BaseModel):
        model_config = ConfigDict(ser_json_inf_nan="strings")

        value: float
        note: str | None = None

    assert codec.decode(Written, body_of(app, Written(value=number))).value == pytest.approx(number, nan_ok=True)
    assert "a NaN or an infinity" in not_sent(app, Measured(value=number))
    assert "a NaN or an infinity" in not_sent(app, Counted(value=number))
    assert body_of(app, Measured(value=None)) == b'{"value":null}'


def test_bytes_that_are_no_text_need_base64(app: Lightbus) -> None:
    @app.event
    class Stored(BaseModel):
        raw: bytes

    @app.event
    class StoredWell(BaseModel):
        model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

        raw: bytes

    assert "invalid utf-8" in not_sent(app, Stored(raw=b"\xff"))
    event = StoredWell(raw=b"\xff\xfe")
    assert codec.decode(StoredWell, body_of(app, event)) == event


def test_a_body_over_the_limit_is_not_sent(app: Lightbus) -> None:
    app.event("page.made")(Page[str])
    with pytest.raises(errors.BodyTooLarge, match="16,777,216"):
        body_of(app, Page[str](items=["x" * codec.MAX_BODY_BYTES]))


@pytest.mark.parametrize("kind", [set[int], frozenset[Decimal], dict[int, int], set[tuple[int, int]], set[Any]])
def test_numbers_with_the_same_hash_are_refused(kind: Any) -> None:
    prime = sys.hash_info.modulus
    numbers = [prime * one for one in range(1, 20 * MOST_COLLIDING)]
    pairs: Any = [[number, 0] for number in numbers] if kind == set[tuple[int, int]] else numbers
    values: Any = {str(number): 1 for number in numbers} if kind == dict[int, int] else pairs
    model = pydantic.create_model("Numbers", values=(kind, ...))
    assert "same hash" in not_read(model, {"values": values})


class Cell(BaseModel, frozen=True):
    row: int
    column: int = 0


class UsedTwice(BaseModel):
    cells: set[Cell]
    others: set[Cell] = set()


class Node(BaseModel, frozen=True):
    row: int
    cells: frozenset[Node] = frozenset()


@pytest.mark.parametrize("model", [UsedTwice, Node])
def test_a_model_that_is_used_more_than_once_is_guarded_too(model: type[BaseModel]) -> None:
    prime = sys.hash_info.modulus
    colliding = [{"row": prime * one} for one in range(1, 20 * MOST_COLLIDING)]
    many = [{"row": one} for one in range(2 * MOST_COMPOSITE)]
    assert "same hash" in not_read(model, {"row": 1, "cells": colliding})
    assert "Use a list" in not_read(model, {"row": 1, "cells": many})


def test_an_enum_that_is_used_more_than_once_needs_no_guard() -> None:
    class Kinds(BaseModel):
        kinds: set[Kind]
        last: Kind | None = None

    coder = Coder(Kinds)
    unguarded = coder.decode
    assert coder.hashed == [{"enum"}]
    assert guard_model(coder).decode == unguarded


def test_whatever_a_validator_raises_the_body_cannot_be_read(app: Lightbus) -> None:
    class Broken(BaseModel):
        raised: str = ""

        @pydantic.model_validator(mode="before")
        @classmethod
        def look(cls, value: Any) -> Any:
            if "reject" in value:
                raise errors.Reject("not ours")
            return value["not there"]

    assert not_read(Broken, {}) == "the body cannot be read as Broken: KeyError: 'not there'"
    with pytest.raises(errors.DecodeError, match="cannot be read as Broken: KeyError") as caught:
        codec.decode(Broken, b"{}")
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(errors.Reject, match="not ours"):  # the user's own reason
        read(Broken, {"reject": True})
    app.event(Broken)
    with pytest.raises(errors.InvalidPayload, match="event 'broken': KeyError: 'not there'"):
        codec.build_event(app.events["broken"], b"{}")


# --- refused at declaration -------------------------------------------------------------------


def test_a_field_that_is_written_and_read_by_different_names_is_refused(app: Lightbus) -> None:
    class UserMoved(BaseModel):
        user_id: int = Field(default=0, validation_alias="id")

    class UserLeft(BaseModel):
        moved: list[UserMoved]

    message = refused(app, UserLeft)
    assert "UserMoved.user_id is written as 'user_id', but read from 'id', so it would be lost" in message
    assert "Use alias='user_id'" in message


def test_a_secret_is_refused_unless_a_serializer_reveals_it(app: Lightbus) -> None:
    class UserMoved(BaseModel):
        token: SecretStr | None

    assert "UserMoved.token is a secret, which is written as '**********'" in refused(app, UserMoved)

    class UserLeft(BaseModel):
        token: SecretStr

        @pydantic.field_serializer("token")
        def reveal(self, token: SecretStr) -> str:
            return token.get_secret_value()

    app.event(UserLeft)
    assert body_of(app, UserLeft(token=SecretStr("x"))) == b'{"token":"x"}'


def test_a_required_field_that_is_excluded_is_refused(app: Lightbus) -> None:
    class UserMoved(BaseModel):
        user_id: int = Field(exclude=True)

    assert "UserMoved.user_id is required, but has exclude=True" in refused(app, UserMoved)


def test_a_computed_field_of_a_model_that_forbids_others_is_refused(app: Lightbus) -> None:
    class UserMoved(BaseModel):
        model_config = ConfigDict(extra="forbid")

        @computed_field
        def domain(self) -> str:
            return ""

    assert "UserMoved.domain is a computed field" in refused(app, UserMoved)


def test_a_root_model_is_refused(app: Lightbus) -> None:
    class Numbers(pydantic.RootModel[list[int]]):
        pass

    assert "Numbers is a RootModel, but an event is a JSON object" in refused(app, Numbers)


def test_a_type_that_json_cannot_represent_is_refused(app: Lightbus) -> None:
    class UserMoved(BaseModel):
        model_config = ConfigDict(arbitrary_types_allowed=True)

        app: Lightbus

    assert "UserMoved.app has the type Lightbus, which JSON cannot represent" in refused(app, UserMoved)


def test_a_type_that_cannot_be_resolved_is_refused(app: Lightbus) -> None:
    class UserMoved(BaseModel):
        what: Elsewhere  # type: ignore[name-defined]  # noqa: F821

    assert "'Elsewhere' is not defined. Import or define" in refused(app, UserMoved)

    def handle(user: Any) -> None: ...

    handle.__annotations__["user"] = UserMoved
    with pytest.raises(errors.InvalidHandler, match="'user: UserMoved' cannot be filled: name 'Elsewhere'"):
        app.on("user.moved")(handle)


def test_a_model_within_a_class_of_another_kind_is_refused(app: Lightbus) -> None:
    @pydantic.dataclasses.dataclass
    class Validated:
        number: Annotated[int, Field(gt=0)]

    for part in (Address, Validated):
        made = attrs.make_class("UserMoved", {"part": attrs.field(type=part)})
        message = refused(app, made)
        assert f"UserMoved.part has the type {part.__name__} (a Pydantic model)" in message
        assert "Make UserMoved a Pydantic model too" in message

        def handle(user: Any) -> None: ...

        handle.__annotations__["user"] = made
        with pytest.raises(errors.InvalidHandler, match="Make the class of the parameter a Pydantic model too"):
            app.on("user.moved")(handle)


# --- what the commands show -------------------------------------------------------------------


class Moved(BaseModel):
    """A user has moved."""

    model_config = ConfigDict(validate_by_name=True)

    user_id: int = Field(alias="userId")
    to: Address
    tags: list[str] = Field(default_factory=list)
    amount: Decimal = Decimal("1.50")
    parent: Moved | None = None

    @computed_field
    def street(self) -> str:
        return self.to.street


def test_the_json_schema_is_what_is_sent(app: Lightbus) -> None:
    app.event(Moved)
    document = schema.schema_of("shop", app.events["moved"])
    event = Moved(user_id=1, to=Address(street="x", zip=1))
    jsonschema.Draft202012Validator.check_schema(document)
    jsonschema.validate(json.loads(body_of(app, event)), document)
    with pytest.raises(jsonschema.ValidationError, match="userId"):
        jsonschema.validate({"to": {"street": "x", "zip": 1}, "street": "x"}, document)
    assert document["title"] == "moved"
    assert document["$defs"]["Address"]["description"] == "Where a user lives."


def test_the_fields_are_listed_by_their_names_in_the_body(app: Lightbus) -> None:
    assert [*events.fields(Moved)] == [
        {"name": "userId", "type": "int", "required": True},
        {"name": "to", "type": "Address", "required": True},
        {"name": "tags", "type": "list[str]", "required": False, "default_factory": "list"},
        {"name": "amount", "type": "Decimal", "required": False, "default": "1.50"},
        {"name": "parent", "type": "Moved | None", "required": False, "default": None},
        {"name": "street", "type": "str", "required": False, "computed": True},
    ]


# --- not imported -----------------------------------------------------------------------------

WITHOUT_MODELS = """
import sys
from dataclasses import dataclass
from lightbus import Lightbus
from lightbus.testing import TestBus
app = Lightbus("billing", url="memory://")
@app.event
class InvoicePaid:
    number: int
@app.on("invoice.paid")
def handle(paid: InvoicePaid): ...
with TestBus(app) as bus:
    app.publish_sync(InvoicePaid(number=1))
    bus.drain_sync()
    assert bus.handled("handle")
print(*sorted(one for one in sys.modules if "pydantic" in one))
"""


def test_an_app_without_models_does_not_import_pydantic(tmp_path: Path) -> None:
    root = Path(codec.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_MODELS], capture_output=True, text=True, check=False, cwd=root, timeout=LIMIT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["lightbus.pydantic_models"]
