"""What a relay needs of a database: read rows, and settle them, in one transaction. One implementation a library."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Generic, Protocol, TypeVar

import attrs
from anyio.lowlevel import RunVar

from lightbus.outbox.rows import Row

T = TypeVar("T")

CHANNEL = "lightbus_outbox"
"""Of NOTIFY, on PostgreSQL."""
LEASE = 60.0
"""Seconds for which a relay owns rows on a database without SKIP LOCKED (SQLite). After a crash, they wait this long.
A relay has sent them, or has given up, before that: see `relay.PUBLISH_TIMEOUT`."""


@attrs.frozen
class Refused:
    """What the broker has refused."""

    error: str
    retry_at: float | None
    """When the relay tries again, in seconds since 1970; None sets the row aside."""


@attrs.frozen(kw_only=True)
class Depth:
    """What waits in an outbox."""

    waiting: int
    """Rows that are to be sent."""
    oldest_seconds: float
    """The age of the oldest of them; 0 if there is none."""
    set_aside: int
    """Rows that the broker has refused for good."""


@attrs.frozen(kw_only=True)
class Problem:
    """A row that the broker has refused, for `lightbus outbox list`."""

    id: int
    event: str
    message_id: str
    added_at: float
    attempts: int
    error: str
    set_aside: bool
    body: bytes
    retry_at: float | None = None
    """When the relay tries again, in seconds since 1970; None if it is set aside."""


class Batch(Protocol):
    """Rows that this relay alone has, until it settles them or its transaction ends."""

    rows: Sequence[Row]

    async def settle(self, sent: Sequence[int], refused: Mapping[int, Refused]) -> None:
        """Delete what was sent, note what was refused, release the rest. Ids; commits."""
        ...


class Store(Protocol):
    """The outbox of one app in one database."""

    name: str
    """The database, for logs, without a password."""

    def claim(self, limit: int, after: int) -> AbstractAsyncContextManager[Batch]:
        """Up to `limit` rows that no other relay has: those whose retry is due, then new ones with an id over `after`.
        At the end of the block, what was not settled is released."""
        ...

    def notifications(self) -> AsyncGenerator[None]:
        """Yields once it listens, then whenever rows were committed. Ends if the database does not notify."""
        ...

    async def depth(self) -> Depth: ...

    async def problems(self, limit: int) -> list[Problem]:
        """The oldest rows that the broker has refused."""
        ...

    async def retry(self, ids: Sequence[int] | None) -> int:
        """Have rows that were set aside sent again: these, or all. Returns how many."""
        ...

    async def purge(self, ids: Sequence[int] | None) -> int:
        """Delete rows that were set aside: these, or all. Returns how many."""
        ...

    def is_temporary(self, error: BaseException) -> bool:
        """Whether the database may answer again: then the relay goes on."""
        ...

    def describe(self, error: BaseException) -> str:
        """The error in one line; with the next step, where the table is missing."""
        ...


class PerLoop(Generic[T]):
    """An object for each event loop: a lock or a limiter works in one only, and an outbox outlives it."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made = RunVar[T](f"lightbus_outbox_{id(self)}")

    def get(self) -> T:
        try:
            return self._made.get()
        except LookupError:
            made = self._make()
            self._made.set(made)
            return made


def health(depth: Depth | None) -> dict[str, Any]:
    if depth is None:
        return {"waiting": None, "oldest_seconds": None, "set_aside": None}
    return {
        "waiting": depth.waiting,
        "oldest_seconds": round(depth.oldest_seconds, 1),
        "set_aside": depth.set_aside,
    }
