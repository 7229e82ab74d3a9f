"""A duplicate does not run a handler again: the ids of handled events are in a store such as Redis."""

import time
from collections.abc import Callable
from typing import Protocol

import anyio
import attrs

from lightbus import Lightbus, Message, Next

app = Lightbus("billing")


class Store(Protocol):
    """Three commands of Redis; `redis.asyncio.Redis(decode_responses=True)` has them."""

    async def get(self, name: str) -> str | None: ...
    async def set(self, name: str, value: str, *, ex: int, nx: bool = False) -> bool | None:
        """Set a value that expires after `ex` seconds. With `nx`, only if there is none: otherwise return None."""

    async def delete(self, name: str) -> object: ...


class MemoryStore:
    """The same in this process, for tests."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._values: dict[str, tuple[str, float]] = {}

    async def get(self, name: str) -> str | None:
        value, expires = self._values.get(name, ("", 0.0))
        return value if self._clock() < expires else None

    async def set(self, name: str, value: str, *, ex: int, nx: bool = False) -> bool | None:
        if nx and await self.get(name) is not None:
            return None
        self._values[name] = value, self._clock() + ex
        return True

    async def delete(self, name: str) -> object:
        return self._values.pop(name, None)


class StillRunning(Exception):
    """Another copy of the event is being handled, or its worker has crashed. The retry schedule tries again."""


class Once:
    """Skips an event that its handler has handled already."""

    def __init__(self, store: Store, handler: str, *, claim: int = 120, keep: int = 30 * 24 * 3600) -> None:
        """
        Args:
            claim: seconds for one run. More than the handler's timeout, and less than its whole retry schedule.
            keep: seconds for which the ids of handled events are kept.
        """
        self._store, self._handler, self._claim, self._keep = store, handler, claim, keep

    async def handle(self, message: Message, call_next: Next) -> None:
        key = f"{self._handler}:{message.id}"
        if await self._store.get(key) == "handled":
            return  # a duplicate: skipped
        if not await self._store.set(key, "running", ex=self._claim, nx=True):
            raise StillRunning(key)
        try:
            await call_next()
        except BaseException:  # also a timeout: the next attempt may run
            with anyio.CancelScope(shield=True):
                await self._store.delete(key)
            raise
        await self._store.set(key, "handled", ex=self._keep)


store: Store = MemoryStore()  # in production: redis.asyncio.from_url("redis://...", decode_responses=True)


@attrs.frozen
class Order:
    order_id: int


charged: list[int] = []


@app.on("order.placed", middleware=[Once(store, "charge")])
async def charge(order: Order) -> None:
    charged.append(order.order_id)
