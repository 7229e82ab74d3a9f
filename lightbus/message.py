"""The values that users get: a `Message` in a handler, and the `Receipt` of a publish."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import attrs


@attrs.frozen(kw_only=True, eq=False)
class Message:
    """The envelope of one delivery.

    Declare it by annotation: `async def open_account(user: NewUser, message: Message)`.
    """

    id: str
    """Unique for each published event (a UUIDv7, or the publisher's `id=`), the same on every copy, retry and
    redelivery."""
    event: str
    """The event's name: the routing key that it was published with."""
    source: str
    """The app that published it: the exchange it came through. The broker verifies it if each app has its own user."""
    time: datetime
    """When it was published (or the publisher's `time=`), to the second, in UTC; of other programs that do not set it,
    the time of arrival."""
    version: int
    """The version of the event's class, from 1."""
    attempt: int
    """Which attempt of this handler this is, from 1. A redelivery after a crash does not count: see `redelivered`."""
    correlation_id: str
    """The id of the first event in the chain that led here, or the `correlation_id=` that it was published with."""
    causation_id: str | None
    """The id of the event whose handler published this one; None if no handler did."""
    headers: Mapping[str, Any]
    """The custom headers that the publisher set."""
    body: bytes
    """The payload as it arrived, undecoded."""
    redelivered: bool
    """True if the broker has delivered it before, and that delivery was not acknowledged."""
    delay: int = 0
    """For how many seconds the broker held it back before its first attempt, as its publisher asked with `delay=`. 0 on
    later attempts."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Message):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in _FIELDS)

    __hash__ = None  # type: ignore[assignment]  # its headers are a dict


_FIELDS = tuple(field.name for field in attrs.fields(Message))
_set = object.__setattr__


class ArrivedMessage(Message):
    """A message whose fields are read when the first one is asked for: middleware may need none of them.

    `arrived` makes one: `__init__` is that of a Message, for `attrs.evolve`.
    """

    __slots__ = ("_source",)
    __qualname__ = "Message"

    _source: tuple[Callable[[str, Any], Message], str, Any]
    """How it is read, and from what."""

    def __getattr__(self, name: str) -> Any:  # called for a slot that is not set
        if name not in _FIELDS:
            raise AttributeError(f"'Message' object has no attribute {name!r}")
        read, app, delivery = self._source
        message = read(app, delivery)
        for field in _FIELDS:
            _set(self, field, getattr(message, field))
        return getattr(message, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, ({name: getattr(self, name) for name in _FIELDS},)


def arrived(read: Callable[[str, Any], Message], app: str, delivery: Any) -> Message:
    """The message of a delivery, which `read(app, delivery)` reads when its first field is asked for."""
    message = _new(ArrivedMessage)
    _set_source(message, (read, app, delivery))
    return message


def sent(read: Callable[[str, Any], Message], app: str, publication: Any, event: str) -> Message:
    """The same of a publication, whose event is known: it is there without reading."""
    message = arrived(read, app, publication)
    _set_event(message, event)
    return message


_new = object.__new__
_set_source = ArrivedMessage.__dict__["_source"].__set__  # the slot's own: faster than `_set`
_get_source = ArrivedMessage.__dict__["_source"].__get__
_set_event = Message.__dict__["event"].__set__


def origin_of(message: Message) -> Any:
    """The delivery (or the publication) that a message was made from: the same object for a handler's run and for its
    `Outcome`. None for a message that was made otherwise.
    """
    try:
        return _get_source(message)[2]
    except (AttributeError, TypeError):
        return None


def _rebuild(fields: dict[str, Any]) -> Message:
    return Message(**fields)


@attrs.frozen
class Receipt:
    """What the broker confirmed."""

    id: str
    """The event's id: `Message.id` where it is handled."""
    routed: bool
    """False if no queue anywhere was bound for it, so it was dropped. Not an error.
    Always True with a delay: the delay queue takes it."""


# Ids must be unique, not secret, so this generator is enough: `os.urandom` would cost a system call per event.
# It is separate from `random`, so that a program's `random.seed(1)` does not repeat ids.
_random = random.Random()
os.register_at_fork(after_in_child=_random.seed)


def new_id() -> str:
    """A UUIDv7 (RFC 9562): 48 bits of milliseconds, so that ids sort by time, then 74 random bits."""
    milliseconds = time.time_ns() // 1_000_000
    bits = _random.getrandbits(74)
    text = f"{milliseconds & 0xFFFF_FFFF_FFFF:012x}7{bits >> 62:03x}{0b10 << 62 | bits & 0x3FFF_FFFF_FFFF_FFFF:016x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
