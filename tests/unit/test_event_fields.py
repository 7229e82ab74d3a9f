"""Every field of an event class is sent and arrives, for every kind of class; or the class is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any, ClassVar, Generic, NamedTuple, TypedDict, TypeVar

import attrs
import msgspec
import pydantic
import pydantic.dataclasses
import pytest

from lightbus import Lightbus, errors
from lightbus.wire import codec

T = TypeVar("T")
Make = Callable[[type[Any]], type[Any]]


def plain(cls: type[Any]) -> type[Any]:
    return cls


def mutable_dataclass(cls: type[Any]) -> type[Any]:
    return dataclasses.dataclass(cls)


def frozen_dataclass(cls: type[Any]) -> type[Any]:
    return dataclasses.dataclass(frozen=True, slots=True, kw_only=True)(cls)


ATTRS: list[Make] = [plain, attrs.define, attrs.frozen, attrs.define(slots=False)]  # type: ignore[list-item]
KINDS: list[Make] = [*ATTRS, mutable_dataclass, frozen_dataclass]


@pytest.fixture
def app() -> Lightbus:
    return Lightbus("shop", url="memory://event-fields")


def on_the_wire(app: Lightbus, event: object) -> Any:
    (event_type,) = (one for one in app.events.values() if one.cls is type(event))
    body = codec.encode(event_type, event)
    assert codec.decode(event_type.cls, body) == event
    return json.loads(body)


def refused(app: Lightbus, cls: type[Any]) -> str:
    with pytest.raises(errors.InvalidEvent) as caught:
        app.event(cls)
    assert not app.events
    return str(caught.value)


# --- sent -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", KINDS)
def test_every_field_is_sent(app: Lightbus, make: Make) -> None:
    class OrderPlaced:
        limit: ClassVar[int] = 5
        tenant: str
        number: int = 0
        text_limit: ClassVar = 3

    cls = app.event(make(OrderPlaced))
    assert on_the_wire(app, cls(tenant="acme", number=7)) == {"tenant": "acme", "number": 7}


@pytest.mark.parametrize("make", KINDS)
def test_fields_of_a_base_of_the_same_kind_are_sent(app: Lightbus, make: Make) -> None:
    class Base:
        tenant: str

    made = app.event(make(Base))

    class OrderPlaced(made):  # type: ignore[valid-type, misc]  # made on the way
        number: int

    cls = app.event(make(OrderPlaced))
    assert on_the_wire(app, cls(tenant="acme", number=7)) == {"tenant": "acme", "number": 7}
    assert on_the_wire(app, made(tenant="acme")) == {"tenant": "acme"}


def test_fields_of_structs_are_sent_by_the_names_that_they_are_given(app: Lightbus) -> None:
    class Base(msgspec.Struct, rename="camel", kw_only=True):
        _private_name: str
        tags: list[str] = []

    class OrderPlaced(Base, tag="placed"):
        number: int

    app.event(OrderPlaced)
    sent = on_the_wire(app, OrderPlaced(_private_name="a", tags=["b"], number=7))
    assert sent == {"type": "placed", "_privateName": "a", "tags": ["b"], "number": 7}


def test_private_fields_of_dataclasses_are_sent(app: Lightbus) -> None:
    @app.event
    @dataclasses.dataclass
    class OrderPlaced:
        _tenant: str

    assert on_the_wire(app, OrderPlaced(_tenant="acme")) == {"_tenant": "acme"}


def test_fields_with_init_false_are_sent(app: Lightbus) -> None:
    @app.event
    @dataclasses.dataclass
    class OrderPlaced:
        price: int
        doubled: int = dataclasses.field(init=False, default=0)
        tags: list[str] = dataclasses.field(init=False, default_factory=list)

        def __post_init__(self) -> None:
            self.doubled = 2 * self.price

    @app.event
    @attrs.define
    class OrderPaid:
        price: int = attrs.field(alias="cost")
        doubled: int = attrs.field(init=False, default=9)

    assert on_the_wire(app, OrderPlaced(3)) == {"price": 3, "doubled": 6, "tags": []}
    assert on_the_wire(app, OrderPaid(cost=3)) == {"price": 3, "doubled": 9}


def test_fields_of_generic_classes_named_tuples_and_typed_dicts_are_sent(app: Lightbus) -> None:
    @app.event
    class OrderPlaced:
        page: Page[int]
        point: Point
        note: Note

    event = OrderPlaced(page=Page(items=[1]), point=Point(1, 2), note={"_text": "x"})  # type: ignore[call-arg]
    assert on_the_wire(app, event) == {"page": {"items": [1]}, "point": [1, 2], "note": {"_text": "x"}}


@attrs.frozen
class Page(Generic[T]):
    items: list[T]


class Point(NamedTuple):
    x: int
    y: int = 0


class Note(TypedDict):
    _text: str


def test_events_of_a_plain_class_do_not_share_a_default_list(app: Lightbus) -> None:
    @app.event
    class Base:
        roles: dict[str, list[str]] = {"admin": ["root"]}  # noqa: RUF012

    @app.event
    class OrderPlaced(Base):
        tags: list[str] = []  # noqa: RUF012
        made: list[str] = attrs.field(factory=list)

    fresh = {"roles": {"admin": ["root"]}, "tags": [], "made": []}
    first = OrderPlaced()
    first.tags.append("alice's")
    first.roles["admin"].append("alice")
    assert on_the_wire(app, OrderPlaced()) == fresh
    received = codec.decode(OrderPlaced, b"{}")
    received.tags.append("carol's")
    received.roles["admin"].append("carol")
    assert codec.decode(OrderPlaced, b"{}") == OrderPlaced()
    assert on_the_wire(app, OrderPlaced()) == fresh


# --- inherited --------------------------------------------------------------------------------


class Tenanted:
    """A mixin without a decorator."""

    limit: ClassVar[int] = 5
    tenant: str
    tags: list[str] = []  # noqa: RUF012
    _cache: dict[str, str]


class Audited:
    by: str = "nobody"


class Boxed(Generic[T]):
    item: T


def test_fields_of_a_plain_base_are_sent(app: Lightbus) -> None:
    @app.event
    class OrderPlaced(Tenanted):
        number: int

    event = OrderPlaced(tenant="acme", number=7)  # type: ignore[call-arg]
    assert on_the_wire(app, event) == {"tenant": "acme", "tags": [], "number": 7}
    event.tags.append("alice's")
    assert OrderPlaced(tenant="acme", number=7).tags == []  # type: ignore[call-arg]


def test_fields_of_several_bases_are_sent_whatever_has_a_default(app: Lightbus) -> None:
    @app.event
    class OrderPlaced(Audited, Tenanted, Boxed[int]):
        number: int

    event = OrderPlaced(item=3, tenant="acme", number=7)  # type: ignore[call-arg]
    assert on_the_wire(app, event) == {"by": "nobody", "item": 3, "tenant": "acme", "tags": [], "number": 7}
    with pytest.raises(errors.InvalidPayload, match="item"):
        codec.encode(app.events["order.placed"], OrderPlaced(item="x", tenant="acme", number=7))  # type: ignore


def test_fields_of_the_bases_of_a_base_are_sent(app: Lightbus) -> None:
    class Middle(Tenanted):
        number: int

    @app.event
    class OrderPlaced(Middle):
        tenant = "acme"  # a new default, without a new annotation

    assert on_the_wire(app, OrderPlaced(number=7)) == {"tenant": "acme", "tags": [], "number": 7}  # type: ignore


@pytest.mark.parametrize("make", KINDS)
def test_a_new_default_needs_no_new_annotation(app: Lightbus, make: Make) -> None:
    class Base:
        tenant: str

    class OrderPlaced(make(Base)):  # type: ignore[misc]  # made on the way
        tenant = "acme"
        number: int

    made = app.event(OrderPlaced)
    assert on_the_wire(app, made(number=7)) == {"tenant": "acme", "number": 7}
    assert on_the_wire(app, made(number=7, tenant="other")) == {"tenant": "other", "number": 7}


def test_an_event_that_only_inherits_sends_the_fields_of_its_base(app: Lightbus) -> None:
    @app.event
    class OrderPlaced(Audited):
        pass

    assert on_the_wire(app, OrderPlaced(by="alice")) == {"by": "alice"}  # type: ignore[call-arg]


def test_fields_of_a_base_that_is_an_event_are_sent_with_those_of_a_mixin(app: Lightbus) -> None:
    @app.event
    class OrderPlaced(Tenanted):
        number: int

    @app.event
    class OrderPaid(Audited, OrderPlaced):
        price: int

    sent = on_the_wire(app, OrderPaid(tenant="acme", number=7, price=5))  # type: ignore[call-arg]
    assert sent == {"tenant": "acme", "tags": [], "number": 7, "by": "nobody", "price": 5}
    sent = on_the_wire(app, OrderPlaced(tenant="acme", number=7))  # type: ignore[call-arg]
    assert sent == {"tenant": "acme", "tags": [], "number": 7}


@pytest.mark.parametrize("frozen", [False, True])
def test_a_plain_event_class_over_a_dataclass_becomes_one(app: Lightbus, frozen: bool) -> None:
    @dataclasses.dataclass(frozen=frozen)
    class Base:
        currency: str = "EUR"

    @app.event
    class OrderPlaced(Tenanted, Base):
        number: int
        lines: list[int] = []  # noqa: RUF012

    event = OrderPlaced(tenant="acme", number=7)  # type: ignore[call-arg]
    sent = {"currency": "EUR", "tenant": "acme", "tags": [], "number": 7, "lines": []}
    assert on_the_wire(app, event) == sent
    event.lines.append(1)
    assert on_the_wire(app, OrderPlaced(tenant="acme", number=7)) == sent  # type: ignore[call-arg]


def test_fields_of_structs_and_pydantic_models_are_inherited(app: Lightbus) -> None:
    class Base(msgspec.Struct):
        tenant: str

    @app.event
    class OrderPlaced(Base):
        number: int

    @app.event("model.made")
    class Model(pydantic.BaseModel):
        number: int
        _cache: int = 0

    @app.event
    class OrderPaid(Audited, Model):
        limit: ClassVar[int] = 5
        price: int

    assert on_the_wire(app, OrderPlaced(tenant="acme", number=7)) == {"tenant": "acme", "number": 7}
    assert on_the_wire(app, OrderPaid(by="alice", number=7, price=5)) == {"by": "alice", "number": 7, "price": 5}


# --- refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", ATTRS)
def test_private_fields_that_would_not_be_sent_are_refused(app: Lightbus, make: Make) -> None:
    class OrderPlaced:
        number: int
        _tenant: str = "nobody"

    message = refused(app, make(OrderPlaced))
    assert "OrderPlaced._tenant begins with '_'" in message
    assert "Rename it to 'tenant'" in message


@attrs.frozen
class Money:
    amount: int
    _currency: str = "EUR"


@dataclasses.dataclass
class DataBase:
    tenant: str = "none"


@attrs.define
class AttrsBase:
    tenant: str = "none"


class PlainBase:
    tenant: str = "none"


class Undecorated(DataBase):
    number: int = 0


@attrs.define(kw_only=True)
class AttrsOfData(DataBase):
    number: int


@dataclasses.dataclass
class DataOfAttrs(AttrsBase):
    number: int = 0


@attrs.define(kw_only=True)
class AttrsOfPlain(PlainBase):
    number: int


@dataclasses.dataclass
class DataOfPlain(PlainBase):
    number: int = 0


class StructOfPlain(PlainBase, msgspec.Struct):
    number: int = 0


class TupleAndMore(Point):
    z: int = 0


@attrs.define
class SharedDefault:
    tags: list[str] = []  # noqa: RUF008


class SharedTuple(NamedTuple):
    tags: list[str] = []  # noqa: RUF012


@attrs.define
class Price:
    amount: int


@attrs.define
class SharedValue:
    price: Price = Price(5)  # noqa: RUF009


@dataclasses.dataclass
class NeverSet:
    currency: str = dataclasses.field(init=False, default="EUR")


LOSSY: list[tuple[type[Any], str, str]] = [
    (AttrsOfData, "AttrsOfData is an attrs class and a dataclass at once", "one kind"),
    (DataOfAttrs, "DataOfAttrs is an attrs class and a dataclass at once", "one kind"),
    (
        AttrsOfPlain,
        "PlainBase.tenant is annotated, but is not a field of AttrsOfPlain",
        "Make PlainBase an attrs class too",
    ),
    (DataOfPlain, "PlainBase.tenant is annotated, but is not a field of DataOfPlain", "Make PlainBase a dataclass too"),
    (StructOfPlain, "PlainBase.tenant is annotated", "Make PlainBase a msgspec.Struct too"),
    (Undecorated, "Undecorated.number is annotated, but is not a field", "Make Undecorated a dataclass too"),
    (TupleAndMore, "TupleAndMore.z is annotated", "ClassVar"),
    (SharedDefault, "the default of SharedDefault.tags is a list", "attrs.field(factory=list)"),
    (SharedTuple, "the default of SharedTuple.tags is a list", "a tuple"),
    (SharedValue, "the default of SharedValue.price is a Price", "attrs.field(factory=lambda: ...)"),
    (NeverSet, "NeverSet.currency has init=False and a default", "default_factory"),
]
EVENTS = [one for one in LOSSY if one[0] not in (Undecorated, TupleAndMore, SharedTuple)]
WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "field": lambda cls: cls,
    "optional": lambda cls: cls | None,
    "list": lambda cls: list[cls],
    "dict": lambda cls: dict[str, tuple[cls, ...]],
    "generic": lambda cls: Page[cls],
}


@pytest.mark.parametrize(("cls", "what", "fix"), EVENTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_class_that_would_lose_a_field_is_refused(app: Lightbus, cls: type[Any], what: str, fix: str) -> None:
    message = refused(app, cls)
    assert what in message
    assert fix in message


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize(
    ("cls", "what", "fix"),
    [*LOSSY, (Money, "Money._currency begins", "Rename it to 'currency'")],
    ids=lambda v: str(v)[:20],
)
def test_a_nested_class_that_would_lose_a_field_is_refused(
    app: Lightbus, cls: type[Any], what: str, fix: str, wrap: Callable[[Any], Any]
) -> None:
    message = refused(app, attrs.make_class("OrderPlaced", {"inner": attrs.field(type=wrap(cls))}))
    assert what in message
    assert fix in message


def test_a_plain_event_class_with_bases_of_two_kinds_is_refused(app: Lightbus) -> None:
    class OrderPlaced(DataBase, Priced):
        number: int

    message = refused(app, OrderPlaced)
    assert "at once" in message


@attrs.define
class Priced:
    price: int


def test_a_base_with_its_own_init_is_refused(app: Lightbus) -> None:
    class Base:
        tenant: str

        def __init__(self) -> None:
            self.tenant = "acme"

    class OrderPlaced(Base):
        number: int

    message = refused(app, OrderPlaced)
    assert "Base, a base of OrderPlaced, defines __init__, which would not run" in message


def test_an_inherited_field_that_a_property_hides_is_refused(app: Lightbus) -> None:
    class OrderPlaced(PlainBase):
        @property
        def tenant(self) -> str:  # type: ignore[override]
            return "acme"

    assert "OrderPlaced.tenant is a property, but a base" in refused(app, OrderPlaced)


def test_a_plain_class_over_a_pydantic_dataclass_is_refused(app: Lightbus) -> None:
    @pydantic.dataclasses.dataclass
    class Base:
        tenant: str

    class OrderPlaced(Base):
        number: int

    assert "Decorate it with @pydantic.dataclasses.dataclass too" in refused(app, OrderPlaced)


def test_an_array_like_struct_is_refused(app: Lightbus) -> None:
    class OrderPlaced(msgspec.Struct, array_like=True):
        number: int

    assert "array_like" in refused(app, OrderPlaced)


# --- payloads of handlers ---------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "what", "fix"), LOSSY, ids=lambda value: getattr(value, "__name__", ""))
def test_a_handlers_payload_class_that_would_lose_a_field_is_refused(
    app: Lightbus, cls: type[Any], what: str, fix: str
) -> None:
    def handle(order: Any) -> None: ...

    handle.__annotations__["order"] = dict[str, cls] if cls is TupleAndMore else cls  # type: ignore[valid-type]
    with pytest.raises(errors.InvalidHandler) as caught:
        app.on("order.placed")(handle)
    assert "'order: " in str(caught.value)
    assert what in str(caught.value)
    assert fix in str(caught.value)


def test_a_handler_may_read_a_private_field(app: Lightbus) -> None:
    """Only encoding leaves it out. Payloads of other programs may have an `_id`."""

    @attrs.frozen
    class Document:
        _id: str

    app.on("document.stored")(lambda document: None)

    def handle(document: Document) -> None: ...

    app.on("document.stored")(handle)
    assert codec.decode(Document, b'{"_id": "x"}') == Document("x")
