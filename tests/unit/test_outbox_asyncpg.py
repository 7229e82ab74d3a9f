"""SQLAlchemy 2.0 does not wrap what asyncpg raises while it connects, such as "the database system is starting up"."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import asyncpg
import pytest
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from lightbus import Lightbus
from lightbus.outbox import Inbox, sweep
from lightbus.outbox.engine import EngineStore
from tests.patience import LIMIT

pytestmark = pytest.mark.anyio

STARTING = asyncpg.CannotConnectNowError("the database system is starting up")
URL = "postgresql+asyncpg://nobody@127.0.0.1:9/none"


def test_the_relay_tries_again() -> None:
    store = EngineStore("shop", create_async_engine(URL))
    assert store.is_temporary(STARTING)
    assert store.is_temporary(asyncpg.InterfaceError("connection is closed"))
    assert not store.is_temporary(ValueError("a bug"))
    assert "the database system is starting up" in store.describe(STARTING)


async def test_a_sweep_that_fails_does_not_end_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    class Starting(AsyncSession):
        async def __aenter__(self) -> AsyncSession:
            raise STARTING

    monkeypatch.setattr(sweep, "FIRST_SWEEP", 0.0)
    swept = Inbox(Lightbus("shop"), async_sessionmaker(create_async_engine(URL), class_=Starting))
    stopping = anyio.Event()
    with anyio.fail_after(LIMIT):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(swept.run, stopping)
            while swept.trouble is None:
                await anyio.lowlevel.checkpoint()
            stopping.set()
    assert "the database system is starting up" in swept.trouble
