"""Refuses bodies that take quadratic time to decode: sets and dicts of numbers that all have the same hash.

Python hashes strings with a secret, but numbers by a public rule. So anyone can write thousands of numbers that
collide: each is then compared with all before it, in one call that blocks the event loop. A large body for a type with
such sets or dicts is checked before it is decoded. All other bodies are decoded directly, at no cost.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import msgspec
import msgspec.inspect

from lightbus import pydantic_models

HARMLESS_BYTES = 8 * 1024
"""A body up to this size decodes within about 20 ms, whatever it contains."""
MOST_COLLIDING = 100
"""Different numbers with the same hash. Ordinary data does not even have three."""
MOST_COMPOSITE = 1_000
"""Arrays and objects in a large body, for a type with a set of them: their hashes are not known before decoding."""

_NUMBERS = (
    msgspec.inspect.IntType,
    msgspec.inspect.DecimalType,
    msgspec.inspect.UUIDType,
    msgspec.inspect.AnyType,
)
_HASHED_BY_RULE = (*_NUMBERS, msgspec.inspect.FloatType, msgspec.inspect.DateTimeType, msgspec.inspect.TimeDeltaType)
_COMPOSITE = (msgspec.inspect.TupleType, msgspec.inspect.VarTupleType, msgspec.inspect.FrozenSetType)

_plain = msgspec.json.Decoder(float_hook=Decimal)


class GuardedDecoder:
    """A decoder for a type whose decoding colliding numbers can slow down."""

    def __init__(self, decode: Callable[[bytes], Any], *, composite: bool) -> None:
        self._decode = decode
        self._composite = composite

    def decode(self, body: bytes) -> Any:
        """
        Raises:
            ValueError: the body would take too long, or is not of the type (msgspec.ValidationError).
        """
        if len(body) > HARMLESS_BYTES:
            _refuse_collisions(body, self._composite)
        return self._decode(body)


def guard(decoder: msgspec.json.Decoder[Any]) -> msgspec.json.Decoder[Any] | GuardedDecoder:
    """The decoder itself; or a guarded one, if its type has sets or dicts of values that can be made to collide."""
    elements = list(_hashed(msgspec.inspect.type_info(decoder.type)))
    composite = any(_holds(one, _is_composite) and _holds(one, _is_by_rule) for one in elements)
    if composite or any(_holds(one, _is_number) for one in elements):
        return GuardedDecoder(decoder.decode, composite=composite)
    return decoder


def guard_model(coder: pydantic_models.Coder) -> pydantic_models.Coder:
    """The same for a type that Pydantic decodes."""
    if any(not one <= _HASHED_WITH_SECRET for one in coder.hashed):
        composite = any(one & _COMPOSITE_MODELS for one in coder.hashed)
        coder.decode = GuardedDecoder(coder.decode, composite=composite).decode
    return coder


_HASHED_WITH_SECRET = {"str", "bytes", "bool", "none", "literal", "enum", "nullable", "union", "url", "multi-host-url"}
"""Of Pydantic's schemas: these values have a hash that nobody can predict, or there are few of them."""
_COMPOSITE_MODELS = {"tuple", "frozenset", "model", "dataclass", "named-tuple", "call", "any"}


def _is_number(info: Any) -> bool:
    return isinstance(info, _NUMBERS)


def _is_by_rule(info: Any) -> bool:
    return isinstance(info, _HASHED_BY_RULE)


def _is_composite(info: Any) -> bool:
    return isinstance(info, _COMPOSITE) or hasattr(info, "fields")


def _hashed(info: msgspec.inspect.Type) -> Iterator[msgspec.inspect.Type]:
    """The parts of a type whose values are hashed: elements of sets, and keys of dicts."""
    for part in _all(info):
        if isinstance(part, (msgspec.inspect.SetType, msgspec.inspect.FrozenSetType)):
            yield part.item_type
        elif isinstance(part, msgspec.inspect.DictType) and not isinstance(part.key_type, msgspec.inspect.AnyType):
            yield part.key_type  # every JSON key is a string


def _holds(info: msgspec.inspect.Type, wanted: Callable[[Any], bool]) -> bool:
    return any(wanted(part) for part in _all(info))


def _all(info: msgspec.inspect.Type) -> Iterator[msgspec.inspect.Type]:
    """A type, and all types in it."""
    seen: set[int] = set()
    left: list[Any] = [info]
    while left:
        part = left.pop()
        if isinstance(part, tuple):
            left += part
        elif isinstance(part, msgspec.inspect.Field):
            left.append(part.type)
        elif isinstance(part, msgspec.inspect.Type) and id(part) not in seen:
            seen.add(id(part))  # a class may be recursive
            yield part
            left += [getattr(part, name) for name in part.__struct_fields__]


def _refuse_collisions(body: bytes, composite: bool) -> None:
    hashes: Counter[int] = Counter()
    kinds: dict[int, set[str]] = {}
    containers = 0
    left = [_plain.decode(body)]
    while left:
        value = left.pop()
        if isinstance(value, (list, dict)):
            containers += 1
            left += value
            if isinstance(value, dict):
                left += value.values()
        elif (number := _hash(value)) is not None:
            hashes[number] += 1
            if hashes[number] > MOST_COLLIDING:  # the same number many times is harmless
                different = kinds.setdefault(number, set())
                different.add(str(value))
                if len(different) > MOST_COLLIDING:
                    raise ValueError(
                        f"more than {MOST_COLLIDING} of its numbers have the same hash, which ordinary data does not "
                        "have: decoding them into a set or into keys would take too long"
                    )
    if composite and containers > MOST_COMPOSITE:
        raise ValueError(
            f"it has {containers:,} arrays and objects in {len(body):,} bytes; a type with a set of these accepts at "
            f"most {MOST_COMPOSITE:,} in a large body, because decoding could take too long. Use a list."
        )


def _hash(value: Any) -> int | None:
    """The hash that it has if it is decoded as a number or a UUID; None if it has none."""
    if isinstance(value, str):
        try:
            value = uuid.UUID(value) if len(value) in (32, 36) else Decimal(value)
        except (ValueError, ArithmeticError):
            return None
    try:
        return hash(value)
    except (TypeError, ValueError):  # a signalling NaN
        return None
