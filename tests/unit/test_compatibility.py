"""docs/reference/compatibility.md: each row of its tables, with real classes, encoded and decoded."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import itertools
import re
import uuid
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

import attrs
import msgspec
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field, create_model

from lightbus import Lightbus, errors
from lightbus.catalog import catalog, compatibility
from lightbus.catalog.compatibility import Break
from lightbus.catalog.contract import Contract, contract_of
from lightbus.catalog.differences import Kind
from lightbus.wire import codec

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "compatibility.md"

NAME = "order.placed"


def fields(_name: str = "Order", /, _options: dict[str, Any] | None = None, **given: Any) -> Any:
    """A class: `a=int` is required, `b=(str, "")` has a default."""
    described = [(name, *one) if isinstance(one, tuple) else (name, one) for name, one in given.items()]
    return msgspec.defstruct(_name, described, kw_only=True, **(_options or {}))


def publisher(cls: Any, name: str = NAME, version: int = 1) -> Contract:
    app = Lightbus("shop", url="memory://")
    if cls is not None:
        app.event(name, version=version)(cls)
    return contract_of(app)


def subscriber(reads: Any, pattern: str = NAME, source: str | None = None) -> Contract:
    app = Lightbus("billing", url="memory://")

    def invoice(order: Any) -> None: ...

    invoice.__annotations__["order"] = reads
    app.on(pattern, source=source)(invoice)
    return contract_of(app)


def checked(new: Contract, *others: Contract) -> list[Break]:
    return compatibility.check(new, catalog.of(list(others)))


def body_of(cls: Any, values: dict[str, Any]) -> bytes:
    app = Lightbus("shop", url="memory://")
    app.event(NAME)(cls)
    return codec.encode(app.events[NAME], cls(**values))


@attrs.frozen
class Change:
    """By the publisher, of the class of an event that a handler gets."""

    old: Any
    new: Any
    reads: Any
    event: dict[str, Any]
    """Of the new class, one that shows the effect."""

    def run(self) -> list[Break]:
        listener = subscriber(self.reads)
        assert checked(publisher(self.old), publisher(self.old), listener) == []
        return checked(publisher(self.new), publisher(self.old), listener)

    def is_read(self) -> bool:
        """Whether the handler can read the event, with all fields that the old publisher sent."""
        try:
            read = codec.decode(self.reads, body_of(self.new, self.event))
        except errors.DecodeError:
            return False
        return isinstance(read, dict) or all(getattr(read, name) is not LOST for name in read.__struct_fields__)


@attrs.frozen
class Subscription:
    """By the subscriber, of the class that its handler reads."""

    published: Any
    old: Any
    new: Any
    event: dict[str, Any]

    def run(self) -> list[Break]:
        shop = publisher(self.published)
        assert checked(subscriber(self.old), shop, subscriber(self.old)) == []
        return checked(subscriber(self.new), shop, subscriber(self.old))

    def is_read(self) -> bool:
        try:
            codec.decode(self.new, body_of(self.published, self.event))
        except errors.DecodeError:
            return False
        return True


LOST = None
"""The default of a field that is lost."""
INT = fields(a=int)
BOTH = fields(a=int, b=str)
PAID, REFUNDED = fields("Paid", {"tag": True}, a=int), fields("Refunded", {"tag": True}, b=int)
ITEM, SMALLER = fields("Item", x=int, y=int), fields("Item", x=int)
LONG, SHORT = Annotated[str, msgspec.Meta(max_length=9)], Annotated[str, msgspec.Meta(max_length=3)]
OPEN, CLOSED = Literal["open", "closed"], Literal["open"]
SENDER = fields("Order", {"rename": {"b": "a"}}, b=int)

PUBLISHER: dict[str, Change | Callable[[], list[Break]]] = {
    "Add a field with a default": Change(INT, fields(a=int, b=(str, "")), INT, {"a": 1, "b": "x"}),
    "Add a field without a default": Change(INT, BOTH, INT, {"a": 1, "b": "x"}),
    "Add a field; a handler's class forbids unknown fields": Change(
        INT, BOTH, fields("Order", {"forbid_unknown_fields": True}, a=int), {"a": 1, "b": "x"}
    ),
    "Remove a field that no handler reads": Change(BOTH, INT, INT, {"a": 1}),
    "Remove a field that a handler requires": Change(BOTH, INT, BOTH, {"a": 1}),
    "Remove a field that a handler reads with a default": Change(
        BOTH, INT, fields(a=int, b=(str | None, LOST)), {"a": 1}
    ),
    "Remove a field; the handler takes the whole body (`dict`)": Change(BOTH, INT, dict[str, Any], {"a": 1}),
    "Rename a field in the body": Change(INT, fields(c=int), INT, {"c": 1}),
    "Rename an attribute and keep its name in the body": Change(INT, SENDER, INT, {"b": 1}),
    "Change a type": Change(INT, fields(a=str), INT, {"a": "x"}),
    "Widen a type: `int` to `float`": Change(INT, fields(a=float), INT, {"a": 1.5}),
    "Narrow a type: `float` to `int`": Change(fields(a=float), INT, fields(a=float), {"a": 1}),
    "Add a type: `int` to `int | str`": Change(INT, fields(a=int | str), INT, {"a": "x"}),
    "Remove a type: `int | str` to `int`": Change(fields(a=int | str), INT, fields(a=int | str), {"a": 1}),
    "Allow null": Change(INT, fields(a=int | None), INT, {"a": None}),
    "No longer allow null": Change(fields(a=int | None), INT, fields(a=int | None), {"a": 1}),
    "No longer always write a field (`omit_defaults`)": Change(
        fields(a=(int, 0)), fields("Order", {"omit_defaults": True}, a=(int, 0)), INT, {}
    ),
    "Give a field a default, and still always write it": Change(INT, fields(a=(int, 0)), INT, {}),
    "Change a default": Change(fields(a=(int, 0)), fields(a=(int, 1)), INT, {}),
    "Add a value to an enum or `Literal`": Change(fields(a=CLOSED), fields(a=OPEN), fields(a=CLOSED), {"a": "closed"}),
    "Remove a value from an enum or `Literal`": Change(fields(a=OPEN), fields(a=CLOSED), fields(a=OPEN), {"a": "open"}),
    "Add a class to a tagged union": Change(
        fields(a=PAID), fields(a=PAID | REFUNDED), fields(a=PAID), {"a": REFUNDED(b=1)}
    ),
    "Remove a field of a nested class": Change(fields(a=ITEM), fields(a=SMALLER), fields(a=ITEM), {"a": SMALLER(x=1)}),
    "Change the type of a list's items": Change(
        fields(a=list[int]), fields(a=list[str]), fields(a=list[int]), {"a": ["x"]}
    ),
    "Change the type of a map's values": Change(
        fields(a=dict[str, int]), fields(a=dict[str, str]), fields(a=dict[str, int]), {"a": {"x": "y"}}
    ),
    "Loosen a limit, for example a longest length": Change(
        fields(a=SHORT), fields(a=LONG), fields(a=SHORT), {"a": "12345"}
    ),
    "Tighten a limit": Change(fields(a=LONG), fields(a=SHORT), fields(a=LONG), {"a": "123"}),
    "Remove an event that no handler gets": lambda: checked(
        publisher(None), publisher(INT), subscriber(INT, "user.registered")
    ),
    "Remove an event that a handler gets": lambda: checked(publisher(None), publisher(INT), subscriber(INT, "order.*")),
    "Remove an event; the handler takes the whole body (`dict`)": lambda: checked(
        publisher(None), publisher(INT), subscriber(dict[str, Any])
    ),
    "Publish a new event that a handler's wildcard matches and its class cannot read": lambda: checked(
        publisher(fields(c=int)), publisher(None), subscriber(INT, "order.*")
    ),
    "Raise the version": lambda: checked(publisher(INT, version=2), publisher(INT), subscriber(INT)),
}

NONE = fields()
SUBSCRIBER: dict[str, Subscription | Callable[[], list[Break]]] = {
    "Read a field that is always published": Subscription(BOTH, INT, BOTH, {"a": 1, "b": "x"}),
    "Require a field that is not published": Subscription(INT, INT, BOTH, {"a": 1}),
    "Read a field that is not published, with a default": Subscription(INT, INT, fields(a=int, b=(str, "")), {"a": 1}),
    "Require a field that is not always published": Subscription(
        fields("Order", {"omit_defaults": True}, a=(int, 0)), NONE, INT, {}
    ),
    "Read a field as another type": Subscription(INT, INT, fields(a=str), {"a": 1}),
    "Read fewer values of an enum or `Literal`": Subscription(
        fields(a=OPEN), fields(a=OPEN), fields(a=CLOSED), {"a": "closed"}
    ),
    "Do not accept null, which is published": Subscription(
        fields(a=int | None), fields(a=int | None), INT, {"a": None}
    ),
    "Forbid unknown fields, where others are published": Subscription(
        BOTH, INT, fields("Order", {"forbid_unknown_fields": True}, a=int), {"a": 1, "b": "x"}
    ),
    "Subscribe to a misspelt event": lambda: checked(subscriber(INT, "order.paced"), publisher(INT)),
    "Subscribe to an event that no app publishes yet": lambda: checked(
        subscriber(INT, "parcel.delivered"), publisher(INT)
    ),
    "Misspell the app in `source=`": lambda: checked(subscriber(INT, source="shopp"), publisher(INT)),
    "Name an app in `source=` that has no contract yet": lambda: checked(
        subscriber(INT, source="warehouse"), publisher(INT)
    ),
}
CASES: dict[str, Any] = PUBLISHER | SUBSCRIBER

TABLE = {
    row[0].replace(r"\|", "|"): (row[1], row[2].strip(" `"))
    for row in re.findall(r"^\| (.+?) \| (pass|break|note) \| (.*?) ?\|$", PAGE.read_text(), re.M)
}


def test_the_tables_have_the_cases_and_all_rules() -> None:
    assert list(TABLE) == list(CASES)
    rules = {rule for _, rule in TABLE.values() if rule}
    assert rules == {one.value for one in Kind} | {"gone", "pattern", "source", "default", "version"}


@pytest.mark.parametrize("change", CASES)
def test_a_change_has_the_result_in_the_table(change: str) -> None:
    result, rule = TABLE[change]
    case = CASES[change]
    found = case.run() if isinstance(case, Change | Subscription) else case()
    assert {(one.verdict, one.rule) for one in found} == ({(result, rule)} if rule else set())
    for one in found:
        if one.verdict == "break":
            assert one.handler == "billing.invoice"
            assert one.next


@pytest.mark.parametrize("change", [name for name, case in CASES.items() if isinstance(case, Change | Subscription)])
def test_a_handler_really_fails_or_loses_a_field_where_the_table_has_a_break(change: str) -> None:
    assert CASES[change].is_read() == (TABLE[change][0] != "break")


# --- further cases ----------------------------------------------------------------------------


def test_a_problem_of_the_deployed_contract_is_not_of_this_change() -> None:
    old, new = publisher(fields(a=int)), publisher(fields(a=int, c=int))
    (one,) = checked(new, old, subscriber(BOTH))
    assert (one.verdict, one.rule, one.field) == ("before", "missing", "b")


def test_a_problem_of_the_deployed_handler_is_not_of_this_change() -> None:
    shop = publisher(INT)
    (one,) = checked(subscriber(fields(a=int, b=str, c=(int, 0))), shop, subscriber(BOTH))[:1]
    assert (one.verdict, one.rule, one.field) == ("before", "missing", "b")


def test_without_a_deployed_contract_every_problem_is_new() -> None:
    (one,) = checked(publisher(INT), subscriber(BOTH))
    assert (one.verdict, one.rule, one.handler) == ("break", "missing", "billing.invoice")


def test_the_path_of_a_field_shows_lists_and_maps() -> None:
    old = fields(lines=list[ITEM], prices=dict[str, list[int]])
    new = fields(lines=list[SMALLER], prices=dict[str, list[str]])
    found = checked(publisher(new), publisher(old), subscriber(old))
    assert [(one.field, one.rule) for one in found] == [("lines[].y", "missing"), ("prices{}[]", "type")]


def test_a_renamed_field_that_is_required_has_a_hint_for_its_subscriber() -> None:
    found = checked(subscriber(fields(order_no=int)), publisher(fields(order_nr=int)))
    assert "Did you mean 'order_nr'?" in found[0].next


def test_an_event_that_another_app_publishes_is_not_gone_for_handlers_without_a_source() -> None:
    web = Lightbus("web", url="memory://")
    web.event(NAME)(INT)
    assert checked(publisher(None), publisher(INT), contract_of(web), subscriber(INT)) == []
    found = checked(publisher(None), publisher(INT), contract_of(web), subscriber(INT, source="shop"))
    assert [one.rule for one in found] == ["gone"]


def test_handlers_of_another_source_do_not_count() -> None:
    assert checked(publisher(fields(c=int)), publisher(INT), subscriber(INT, source="web")) == []


class Tree(msgspec.Struct):
    value: int
    children: list[Tree] = []


class Branch(msgspec.Struct):
    value: str
    children: list[Branch] = []


def test_recursive_classes_are_compared_once() -> None:
    assert checked(publisher(Tree), publisher(Tree), subscriber(Tree)) == []
    found = checked(publisher(Branch), publisher(Tree), subscriber(Tree))
    assert [(one.field, one.rule) for one in found] == [("value", "type")]


class Aliased(BaseModel):
    number: int = Field(alias="a")


def test_aliases_of_pydantic_are_names_in_the_body() -> None:
    assert checked(publisher(INT), publisher(INT), subscriber(Aliased)) == []
    found = checked(publisher(fields(number=int)), publisher(INT), subscriber(Aliased))
    assert [(one.field, one.rule) for one in found] == [("a", "missing")]


def test_text_is_no_date_and_a_date_is_text() -> None:
    text, date = fields(a=str), fields(a=datetime.datetime)
    assert checked(publisher(date), publisher(text), subscriber(text)) == []
    assert [one.rule for one in checked(publisher(text), publisher(date), subscriber(date))] == ["type"]


# --- any classes ------------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Fewer(enum.Enum):
    RED = "red"


SIMPLE: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(-(2**53), 2**53),
    float: st.floats(allow_nan=False, allow_infinity=False),
    str: st.text(max_size=5),
    bool: st.booleans(),
    Colour: st.sampled_from(Colour),
    Fewer: st.just(Fewer.RED),
    Literal["a", "b"]: st.sampled_from(["a", "b"]),
    Literal["a"]: st.just("a"),
    Literal["red", 1]: st.sampled_from(["red", 1]),
    datetime.datetime: st.datetimes(),
    datetime.date: st.dates(),
    uuid.UUID: st.uuids(),
    Decimal: st.decimals(allow_nan=False, allow_infinity=False, places=2),
}
NUMBERS = itertools.count()
"""msgspec cannot describe two classes with the same name of the same module."""
NAMES = ("a", "b", "c", "d")


@attrs.frozen
class Type:
    """A type, and its values."""

    annotation: Any
    values: st.SearchStrategy[Any] = attrs.field(eq=False)


SIMPLE_TYPES = st.sampled_from([Type(one, SIMPLE[one]) for one in (*SIMPLE, int, float, int, float)])


def containers(inner: st.SearchStrategy[Type]) -> st.SearchStrategy[Type]:
    return st.tuples(st.sampled_from(["list", "map", "null", "tuple"]), inner).map(lambda pair: contained(*pair))


def contained(container: str, one: Type) -> Type:
    inner: Any = one.annotation
    match container:
        case "list":
            return Type(list[inner], st.lists(one.values, max_size=2))
        case "map":
            return Type(dict[str, inner], st.dictionaries(st.text(max_size=3), one.values, max_size=2))
        case "null":
            return Type(inner | None, st.none() | one.values)
        case _:
            return Type(tuple[inner, int], st.tuples(one.values, st.integers(0, 9)))


def nested(inner: st.SearchStrategy[Type]) -> st.SearchStrategy[Type]:
    classes = st.tuples(
        st.sampled_from(["msgspec", "attrs"]),
        st.dictionaries(st.sampled_from("xy"), st.tuples(inner, st.booleans()), min_size=1),
    )
    return st.one_of(containers(inner), classes.map(lambda one: described(one[0], f"Nested{next(NUMBERS)}", one[1])))


FLAT = st.recursive(SIMPLE_TYPES, containers, max_leaves=3)
TYPES = st.recursive(SIMPLE_TYPES, nested, max_leaves=3)


def described(kind: str, name: str, given: dict[str, tuple[Type, bool]]) -> Type:
    """A class with these fields; those with True have the default None."""
    required = [(key, one.annotation) for key, (one, optional) in given.items() if not optional]
    optional = [(key, one.annotation | None) for key, (one, optional) in given.items() if optional]
    cls: Any
    match kind:
        case "msgspec" | "omits":
            everything = [*required, *((key, each, None) for key, each in optional)]
            cls = msgspec.defstruct(name, everything, kw_only=True, omit_defaults=kind == "omits")
        case "dataclass":
            everything = [*required, *((key, each, dataclasses.field(default=None)) for key, each in optional)]
            cls = dataclasses.make_dataclass(name, everything)
        case "attrs":
            made = {key: attrs.field(type=each) for key, each in required}
            made |= {key: attrs.field(type=each, default=None) for key, each in optional}
            cls = attrs.make_class(name, made)
        case _:
            cls = create_model(
                name, **{key: (each, ...) for key, each in required}, **{key: (each, None) for key, each in optional}
            )
    values = {
        key: one.values if not is_optional else st.none() | one.values for key, (one, is_optional) in given.items()
    }
    return Type(cls, st.fixed_dictionaries(values).map(lambda one: cls(**one)))


NEAR = {int: float, float: int, Fewer: Colour, Colour: Fewer, Literal["a"]: Literal["a", "b"], str: uuid.UUID}
"""Types that differ little: most of their values are the same in JSON."""


def near(one: tuple[Type, bool], step: int) -> tuple[Type, bool]:
    """A field that differs little."""
    changed, optional = one
    match step:
        case 0:
            return (contained("null", changed), False) if optional else (changed, True)
        case 1 if changed.annotation in NEAR:
            other = NEAR[changed.annotation]
            return Type(other, SIMPLE[other]), optional
        case 2:
            return contained("null", changed), optional
        case _:
            return one


@st.composite
def changes(draw: st.DrawFn, kinds: st.SearchStrategy[str], types: st.SearchStrategy[Type]) -> tuple[Type, Type, Type]:
    """An old event class, a new one, and one of a handler that reads some of the old fields."""
    field = st.tuples(types, st.booleans())
    old = draw(st.dictionaries(st.sampled_from(NAMES), field, min_size=1, max_size=3))
    new, reads = dict(old), {name: one for name, one in old.items() if draw(st.integers(0, 4))}
    for fields_of in (new, reads):
        if fields_of and draw(st.booleans()):
            name = draw(st.sampled_from(sorted(fields_of)))
            fields_of[name] = near(fields_of[name], draw(st.integers(0, 2)))
    if draw(st.booleans()):
        new |= draw(st.dictionaries(st.sampled_from(NAMES), field, max_size=1))
    if not draw(st.integers(0, 4)):
        new.pop(draw(st.sampled_from(sorted(new))))
    return (
        described(draw(kinds), "Order", old),
        described(draw(kinds), "Order", new),
        described(draw(kinds), "Wanted", reads),
    )


@pytest.mark.parametrize(
    ("kinds", "types"),
    [(["msgspec", "omits", "dataclass", "attrs"], TYPES), (["pydantic", "msgspec"], FLAT)],
    ids=["nested", "pydantic"],
)
def test_what_the_check_passes_can_be_decoded_by_the_handler(kinds: list[str], types: st.SearchStrategy[Type]) -> None:
    results: Counter[bool] = Counter()

    @settings(max_examples=100, phases=[Phase.generate], deadline=None, derandomize=True, database=None)
    @given(changes(st.sampled_from(kinds), types), st.data())
    def each(change: tuple[Type, Type, Type], data: st.DataObject) -> None:
        old, new, reads = change
        found = checked(publisher(new.annotation), publisher(old.annotation), subscriber(reads.annotation))
        passes = not any(one.verdict in ("break", "before") for one in found)
        results[passes] += 1
        if passes:
            app = Lightbus("shop", url="memory://")
            app.event(NAME)(new.annotation)
            for _ in range(3):
                codec.decode(reads.annotation, codec.encode(app.events[NAME], data.draw(new.values)))

    each()
    assert min(results[True], results[False]) > 10, results
