"""Catalogues for tests: a small bus with every kind of flaw, and a bus of any size."""

from __future__ import annotations

import json
import time
from decimal import Decimal
from typing import Any, Literal

import msgspec
from pydantic import BaseModel, Field

from lightbus import Lightbus, Message
from lightbus.catalog import catalog
from lightbus.catalog.catalog import Catalog, Ignored
from lightbus.catalog.contract import Contract, Listener, PublishedEvent, contract_of, from_json, to_json


class Line(msgspec.Struct):
    article: str
    price: Decimal
    count: int = 1


class Card(msgspec.Struct, tag="card"):
    number: str


class Transfer(msgspec.Struct, tag="transfer"):
    iban: str
    parts: tuple[int, str] = (1, "x")


class Comment(msgspec.Struct):
    text: str
    answers: list[Comment] = []  # msgspec copies it


class Placed(msgspec.Struct):
    """A customer has placed an order."""

    lines: list[Line]
    email: str
    payment: Card | Transfer
    comments: list[Comment]
    status: Literal["new", "paid"] = "new"


class Cancelled(msgspec.Struct):
    order: int


class Cash(BaseModel):
    kind: Literal["cash"] = "cash"


class Cheque(BaseModel):
    kind: Literal["cheque"] = "cheque"
    bank: str


class Paid(BaseModel):
    amount: Decimal
    how: Cash | Cheque = Field(discriminator="kind")


class Article(msgspec.Struct):
    article: str


class Wanted(msgspec.Struct):
    lines: list[Article]


def apps(url: str | dict[str, str] = "memory://") -> list[Lightbus]:
    """`shop` publishes, `billing` does both, `audit` only handles.

    Args:
        url: of the broker; or one for each app.
    """
    urls = url if isinstance(url, dict) else dict.fromkeys(("shop", "billing", "audit"), url)
    shop, billing, audit = (Lightbus(name, url=urls[name]) for name in ("shop", "billing", "audit"))
    shop.event("order.placed", version=2)(Placed)
    shop.event("order.cancelled")(Cancelled)
    billing.event("invoice.paid")(Paid)

    @billing.on("order.placed", source="shop")
    def invoice(order: Wanted) -> None:
        """Send an invoice."""

    @billing.on("order.paced", queue="slow")
    def misspelt(message: Message) -> None: ...

    @billing.on("#", source="shopp")
    def unknown(message: Message) -> None: ...

    @audit.on("order.placed", "invoice.*")
    def note(body: dict[str, Any]) -> None: ...

    return [shop, billing, audit]


def small() -> Catalog:
    """The three apps, and a contract that is ignored."""
    written = [to_json(contract_of(one, release)) for one, release in zip(apps(), ("2026.11", "", "7"), strict=True)]
    found = [from_json(json.loads(json.dumps(one))) for one in written]  # as other programs see it
    return catalog.of(found, [Ignored("mallory", 1.0, "it says that it is of 'shop'. Check who uses this user.")])


def large(count: int) -> Catalog:
    """So many apps with four events and four handlers each."""
    schema = {"$ref": "#/$defs/Body", "$defs": {"Body": {"type": "object", "properties": {"id": {"type": "string"}}}}}
    kinds = ("created", "changed", "closed", "archived")
    return catalog.of(
        [
            Contract(
                f"service-{number}",
                f"{number}.1",
                time.time(),
                "1.0",
                [PublishedEvent(f"thing{number}.{kind}", 1, "", schema) for kind in kinds],
                [
                    Listener(
                        f"on_{kind}",
                        [f"thing{(number * 7 + 3 * at) % count}.{kind}"],
                        None,
                        f"service-{number}.main",
                        "",
                        schema,
                    )
                    for at, kind in enumerate(kinds[:3])
                ]
                + [Listener("on_any", [f"thing{(number + 1) % count}.*"], None, f"service-{number}.slow", "", schema)],
            )
            for number in range(count)
        ]
    )
