"""Event types: names, and which classes can be an event."""

from __future__ import annotations

import dataclasses
import enum
import string
import uuid
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, NewType, TypedDict, TypeVar

import attrs
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightbus import Lightbus, errors
from lightbus.event import check_name, default_name, define, event_type_of, field_names

T = TypeVar("T")
UserId = NewType("UserId", int)


class Colour(enum.Enum):
    RED = "red"


@attrs.frozen
class Address:
    street: str


@attrs.frozen
class Opaque:
    handle: Path


@attrs.frozen
class Page(Generic[T]):
    items: list[T]


class Shape(TypedDict):
    sides: int


class Point(NamedTuple):
    x: int
    y: int


class Node(msgspec.Struct):
    children: list[Node]
    socket: Any = None


app = Lightbus("plants")


@app.event
class Tree:
    name: str
    branches: list[Tree]
    parent: Tree | None = None


# --- names


@pytest.mark.parametrize(
    ("class_name", "name"),
    [
        ("UserRegistered", "user.registered"),
        ("HTTPCallFailed", "http.call.failed"),
        ("CallHTTP", "call.http"),
        ("Paid", "paid"),
        ("A", "a"),
        ("AB", "ab"),
        ("ABc", "a.bc"),
        ("OrderV2Shipped", "order.v2.shipped"),
        ("Order2", "order2"),
        ("Level3Reached", "level3.reached"),
        ("IPv6Assigned", "i.pv6.assigned"),
        ("user_registered", "user.registered"),
        ("_Private", "private"),
        ("userRegistered", "user.registered"),
        ("EURPriceSet", "eur.price.set"),
        ("S3ObjectCreated", "s3.object.created"),
        ("HTTP2Failed", "http2.failed"),
        ("Event2", "event2"),
        ("Import_", "import"),
    ],
)
def test_the_default_name_is_the_words_of_the_class_name(class_name: str, name: str) -> None:
    assert default_name(class_name) == name


words = st.builds(
    lambda first, rest: first + rest,
    st.sampled_from(string.ascii_uppercase),
    st.text(string.ascii_lowercase, min_size=1, max_size=8),
)


@given(st.lists(words, min_size=1, max_size=8))
def test_any_camel_case_name_is_its_words_joined_by_dots(parts: list[str]) -> None:
    assert default_name("".join(parts)) == ".".join(parts).lower()


@given(st.text(string.ascii_letters + string.digits + "_", min_size=1, max_size=40).filter(str.isidentifier))
def test_any_ascii_class_name_with_a_letter_or_digit_gives_a_valid_event_name(class_name: str) -> None:
    name = default_name(class_name)
    if class_name.strip("_"):
        assert check_name(name, "test") == name.lower()
        assert name.replace(".", "") == class_name.replace("_", "").lower()
    else:
        with pytest.raises(errors.InvalidName):
            check_name(name, "test")


@pytest.mark.parametrize("class_name", ["Größe", "Straße", "Δ", "ÉtéFini", "Page[int]"])
def test_a_class_name_with_unsupported_letters_needs_an_explicit_name(class_name: str) -> None:
    cls = type(class_name, (), {"__annotations__": {"x": int}})
    with pytest.raises(errors.InvalidName, match=r"is not allowed in an event name.*@app\.event\('user\.registered'\)"):
        define(cls, None, 1)
    assert define(cls, "order.size", 1).name == "order.size"


@pytest.mark.parametrize(
    ("name", "near"),
    [("User.Registered", "user.registered"), ("UserRegistered", "user.registered"), ("user.ID_set", "user.id.set")],
)
def test_capital_letters_in_an_event_name_are_refused_with_a_suggestion(name: str, near: str) -> None:
    cls = type("UserRegistered", (), {"__annotations__": {"x": int}})
    with pytest.raises(errors.InvalidName, match=f"capital letters.*Use '{near}'"):
        define(cls, name, 1)


@pytest.mark.parametrize(
    "name", ["", ".", "a.", ".a", "a..b", "a b", "a.*", "#", "é", "a\n", 5, None, ["a"], "a" * 256]
)
def test_a_name_that_cannot_be_a_routing_key_is_refused(name: object) -> None:
    with pytest.raises(errors.InvalidName, match="event"):
        check_name(name, "test")


def test_the_longest_name_has_255_bytes() -> None:
    assert check_name("a" * 255, "test") == "a" * 255


def test_an_explicit_name_overrides_and_a_version_is_kept() -> None:
    class Registered:
        id: int

    event_type = define(Registered, "user.registered", 3)
    assert (event_type.name, event_type.version) == ("user.registered", 3)
    assert event_type_of(event_type.cls) is event_type


@pytest.mark.parametrize("version", [0, -1, True, "1", 1.0, None])
def test_a_version_is_an_integer_from_1(version: object) -> None:
    class Paid:
        id: int

    with pytest.raises(errors.InvalidOption, match="version"):
        define(Paid, None, version)


# --- classes


def test_a_plain_class_becomes_a_frozen_slotted_keyword_only_attrs_class() -> None:
    class Paid:
        id: int
        note: str = ""

    cls = define(Paid, None, 1).cls
    event = cls(id=1)
    assert attrs.asdict(event) == {"id": 1, "note": ""}
    assert not hasattr(event, "__dict__")
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        event.id = 2
    with pytest.raises(TypeError, match="positional"):
        cls(1)


def test_a_plain_class_keeps_its_methods_module_and_docstring() -> None:
    class Paid:
        """Money came in."""

        id: int

        def doubled(self) -> int:
            return self.id * 2

    cls = define(Paid, None, 1).cls
    assert (cls.__doc__, cls.__module__, cls.__name__) == ("Money came in.", __name__, "Paid")
    assert cls(id=2).doubled() == 4


@attrs.define
class AttrsPaid:
    id: int


@dataclasses.dataclass
class DataclassPaid:
    id: int


class StructPaid(msgspec.Struct):
    id: int


@pytest.mark.parametrize("cls", [AttrsPaid, DataclassPaid, StructPaid])
def test_an_attrs_class_a_dataclass_and_a_struct_are_taken_as_they_are(cls: type[Any]) -> None:
    event_type = define(cls, "paid", 1)
    assert event_type.cls is cls
    assert cls(1).id == 1
    assert field_names(cls) == ["id"]


def test_a_subclass_of_an_event_is_not_that_event() -> None:
    class Paid:
        id: int

    cls = define(Paid, None, 1).cls
    child = type("Child", (cls,), {})
    assert event_type_of(child) is None


class Meta(type):
    """Like those of pydantic's, SQLAlchemy's and Django's models."""


@pytest.mark.parametrize(
    "cls",
    [
        Meta("Model", (), {"__annotations__": {"id": int}}),
        type("Mapping", (dict,), {}),
        type("Failed", (Exception,), {}),
        type("Pair", (tuple,), {}),
        enum.Enum("Choice", ["A"]),
    ],
    ids=lambda cls: cls.__name__,
)
def test_a_class_with_another_metaclass_or_of_a_builtin_kind_is_refused(cls: type[Any]) -> None:
    with pytest.raises(errors.InvalidEvent, match=rf"{cls.__name__}.*cannot be an event.*plain class"):
        define(cls, "some.event", 1)


def test_an_event_needs_no_fields() -> None:
    class Started:
        pass

    assert define(Started, None, 1).cls() is not None


# --- fields


@pytest.mark.parametrize(
    "field",
    [
        str, int, float, bool, bytes, None, Decimal, datetime, date, time, timedelta, uuid.UUID, Colour, UserId,
        Any, object, Literal["a", "b"], int | None, int | str, list[int], set[str], frozenset[int], tuple[int, str],
        tuple[int, ...], dict[str, Any], dict[str, object], dict[int, list[Address]], Address, Page[int], Page[Address],
        Shape, Point, Node, Annotated[int, msgspec.Meta(ge=0)],
    ],
    ids=str,
)  # fmt: skip
def test_a_field_may_have_any_type_that_json_can_represent(field: Any) -> None:
    cls = type("Happened", (), {"__annotations__": {"what": field}})
    assert define(cls, None, 1).name == "happened"


@pytest.mark.parametrize(
    ("field", "where", "named"),
    [
        (Path, "what", "Path"),
        (complex, "what", "complex"),
        (type, "what", "type"),
        (list[Path], "what", "Path"),
        (dict[str, Path], "what", "Path"),
        (set[complex], "what", "complex"),
        (tuple[int, Path], "what", "Path"),
        (tuple[Path, ...], "what", "Path"),
        (Path | None, "what", "Path"),
        (list[dict[str, int | list[Path]]], "what", "Path"),
        (Opaque, "what.handle", "Path"),
        (list[Opaque], "what.handle", "Path"),
        (Page[Opaque], "what.items.handle", "Path"),
        (Page[Path], "what.items", "Path"),
    ],
    ids=str,
)
def test_a_field_that_json_cannot_represent_is_refused_with_its_name_and_type(
    field: Any, where: str, named: str
) -> None:
    cls = type("Happened", (), {"__annotations__": {"what": field}})
    with pytest.raises(errors.InvalidEvent, match=rf"field Happened\.{where} has the type {named}\b"):
        define(cls, None, 1)


@pytest.mark.parametrize(
    "field", [str | datetime, Address | dict[str, Any], Address | Opaque, list[int] | set[int]], ids=str
)
def test_an_ambiguous_union_is_refused_with_its_field(field: Any) -> None:
    cls = type("Happened", (), {"__annotations__": {"id": int, "what": field}})
    with pytest.raises(errors.InvalidEvent, match=r"field Happened\.what"):
        define(cls, None, 1)


def test_an_event_may_hold_events_of_its_own_class() -> None:
    tree = Tree(name="oak", branches=[Tree(name="twig", branches=[])])
    body = msgspec.json.encode(tree)
    assert msgspec.json.decode(body, type=Tree) == tree


def test_a_recursive_class_is_checked_completely() -> None:
    @attrs.frozen
    class Chain:
        next: Chain | None
        handle: Path

    with pytest.raises(errors.InvalidEvent, match=r"Chain\.handle has the type Path"):
        define(Chain, None, 1)


def test_declaring_leaves_the_module_as_it_was() -> None:
    before = globals()["Address"]
    cls = attrs.frozen(type("Address", (), {"__annotations__": {"zip": str}, "__module__": __name__}))
    define(cls, "address.changed", 1)
    assert globals()["Address"] is before

    local = attrs.frozen(type("Nowhere", (), {"__annotations__": {"zip": str}, "__module__": __name__}))
    define(local, "nowhere.found", 1)
    assert "Nowhere" not in globals()


def test_a_type_imported_only_for_type_checkers_is_named_in_the_error() -> None:
    class Happened:
        what: Elsewhere  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(errors.InvalidEvent, match=r"Elsewhere.*Import or define that type"):
        define(Happened, None, 1)
