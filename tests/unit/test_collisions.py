"""Numbers that were made to collide are refused before they are hashed; ordinary ones are decoded, at any size."""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum
from typing import Any, Literal, NamedTuple

import attrs
import msgspec
import pytest

from lightbus import Lightbus, errors
from lightbus.wire import codec
from lightbus.wire.collisions import HARMLESS_BYTES, MOST_COMPOSITE, GuardedDecoder, guard

PRIME = 2**61 - 1
"""The hash of a number is its value modulo this prime."""

COUNT = 1200


class Colour(Enum):
    RED = "red"


class Point(NamedTuple):
    x: int
    y: int


@dataclasses.dataclass(frozen=True)
class Inner:
    numbers: frozenset[int]


class Tree(msgspec.Struct):
    children: list[Tree]
    by_number: dict[int, str]


COLLIDING = [n * PRIME for n in range(1, COUNT + 1)]


def keys(text: Callable[[int], str]) -> str:
    return "{" + ",".join(f'"{text(n)}":1' for n in COLLIDING) + "}"


def elements(text: Callable[[int], str]) -> str:
    return "[" + ",".join(map(text, COLLIDING)) + "]"


def escaped(number: int) -> str:
    return "".join(f"\\u00{ord(digit):02x}" for digit in str(number))


MADE_TO_COLLIDE: dict[str, tuple[Any, str]] = {
    "dict-of-int": (dict[int, int], keys(str)),
    "dict-of-escaped-int": (dict[int, int], keys(escaped)),
    "dict-of-int-or-text": (dict[int | str, int], keys(str)),
    "dict-of-decimal": (dict[Decimal, int], keys(str)),
    "dict-of-uuid": (dict[uuid.UUID, int], keys(lambda n: str(uuid.UUID(int=n)))),
    "set-of-int": (set[int], elements(str)),
    "frozenset-of-int": (frozenset[int], elements(str)),
    "set-of-negative": (set[int], elements(lambda n: str(-n))),
    "set-of-anything": (set[Any], elements(str)),
    "set": (set, elements(str)),
    "set-of-decimal": (set[Decimal], elements(lambda n: f"{n}.00")),
    "set-of-decimal-text": (set[Decimal], elements(lambda n: f'"{n}e0"')),
    "set-of-uuid": (set[uuid.UUID], elements(lambda n: f'"{uuid.UUID(int=n).hex}"')),
    "set-of-tuples": (set[tuple[int, int]], elements(lambda n: f"[{n},1]")),
    "set-of-named-tuples": (set[Point], elements(lambda n: f"[{n},1]")),
    "in-a-list": (list[set[int]], f"[[],{elements(str)}]"),
    "in-a-class": (Inner, f'{{"numbers":{elements(str)}}}'),
    "in-a-tree": (Tree, f'{{"children":[{{"children":[],"by_number":{keys(str)}}}],"by_number":{{}}}}'),
}


@pytest.mark.parametrize("which", MADE_TO_COLLIDE)
def test_numbers_that_were_made_to_collide_are_refused(which: str) -> None:
    payload_type, body = MADE_TO_COLLIDE[which]
    with pytest.raises(errors.DecodeError, match="more than 100 of its numbers have the same hash"):
        codec.decode(payload_type, body.encode())


def test_a_large_body_may_have_few_composites_in_sets() -> None:
    body = json.dumps([[n, -n] for n in range(2 * MOST_COMPOSITE)]).encode()
    with pytest.raises(errors.DecodeError, match="Use a list"):
        codec.decode(set[tuple[int, int]], body)
    assert len(codec.decode(list[tuple[int, int]], body)) == 2 * MOST_COMPOSITE
    some = json.dumps([[n, 10**30 + n] for n in range(MOST_COMPOSITE - 1)]).encode()
    assert len(some) > HARMLESS_BYTES
    assert len(codec.decode(set[tuple[int, int]], some)) == MOST_COMPOSITE - 1


HONEST: dict[str, tuple[Any, Any]] = {
    "dict-of-int": (dict[int, str], dict.fromkeys(range(20000), "x")),
    "set-of-snowflakes": (set[int], {2 * 10**18 + n * 2**22 for n in range(20_000)}),
    "set-of-uuid": (set[uuid.UUID], {uuid.UUID(int=n * 2**64 + n) for n in range(5_000)}),
    "dict-of-decimal": (dict[Decimal, int], {Decimal(n) / 100: n for n in range(5_000)}),
    "one-number-over-and-over": (dict[int, list[int]], {n: [3 * PRIME] * 10 for n in range(5_000)}),
    "texts": (dict[str, set[str]], {str(n * PRIME): {str(n * PRIME)} for n in range(5_000)}),
}


@pytest.mark.parametrize("which", HONEST)
def test_ordinary_data_is_decoded_at_any_size(which: str) -> None:
    payload_type, value = HONEST[which]
    body = msgspec.json.encode(value)
    assert len(body) > HARMLESS_BYTES
    assert codec.decode(payload_type, body) == value


@pytest.mark.parametrize(
    "harmless",
    [
        dict[str, int],
        dict[Any, Any],
        dict,
        list[int],
        set[str],
        set[float],
        frozenset[bytes],
        set[datetime | float],
        dict[Colour, int],
        dict[Literal["a", "b"], int],
        set[tuple[str, str]],
        Any,
        Point,
    ],
)
def test_types_that_cannot_collide_are_not_guarded(harmless: Any) -> None:
    decoder = msgspec.json.Decoder(harmless)
    assert guard(decoder) is decoder


def test_events_and_payloads_without_such_types_are_not_guarded() -> None:
    @attrs.frozen
    class Order:
        number: int
        at: datetime
        lines: list[dict[str, Decimal]]

    decoder = msgspec.json.Decoder(Order)
    assert guard(decoder) is decoder
    assert isinstance(guard(msgspec.json.Decoder(Tree)), GuardedDecoder)


def test_a_body_that_subscribers_would_refuse_fails_the_publish() -> None:
    app = Lightbus("shop", url="memory://collisions")

    @app.event
    class OrderPlaced:
        lines: dict[int, int]

    event = OrderPlaced(lines={n * PRIME: 1 for n in range(1, COUNT)})
    with pytest.raises(errors.InvalidPayload, match=r"'order\.placed' was not sent: more than 100"):
        app.publish_sync(event)


def test_a_small_body_is_not_checked() -> None:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    assert codec.decode(dict[int, datetime], b'{"1": "2026-01-01T00:00:00Z"}') == {1: at}
