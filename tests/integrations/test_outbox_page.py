"""docs/howto/outbox.md: what the page promises beside its example."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import attrs
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from lightbus import Lightbus
from lightbus.outbox import Outbox, Relay, metadata, statements
from lightbus.outbox.rows import Row
from lightbus.testing import TestBus
from tests.patience import LIMIT

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@attrs.frozen
class Placed:
    number: int


def shop_with(engine: sa.Engine) -> tuple[Lightbus, Outbox]:
    metadata.create_all(engine)
    app = Lightbus("shop")
    app.event("order.placed")(Placed)
    return app, Outbox(app, engine)


async def test_a_sync_session_that_blocks_the_event_loop_does_not_wait_for_the_relay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/shop.db")
    app, outbox = shop_with(engine)
    assert outbox.relay is not None
    claim, locked, resume = statements.claim, threading.Event(), threading.Event()

    def hold(*args: Any) -> list[Row]:
        rows = claim(*args)
        locked.set()
        resume.wait(LIMIT)
        return rows

    monkeypatch.setattr(statements, "claim", hold)
    async with TestBus(app) as bus:
        await anyio.to_thread.run_sync(locked.wait, LIMIT)
        resume.set()
        with Session(engine) as session, session.begin():
            outbox.add(session, Placed(number=1))
        await outbox.relay.drain()
        assert bus.published(Placed) == [Placed(number=1)]
    engine.dispose()


async def test_drain_waits_for_the_batch_that_the_relay_of_the_testbus_is_sending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/shop.db")
    app, outbox = shop_with(engine)
    relay = outbox.relay
    assert isinstance(relay, Relay)
    entered, release, drained = anyio.Event(), anyio.Event(), False
    async with TestBus(app) as bus:
        publish_many = app.publisher.publish_many

        async def slowly(*args: Any, **options: Any) -> Any:
            entered.set()
            await release.wait()
            return await publish_many(*args, **options)

        monkeypatch.setattr(app.publisher, "publish_many", slowly)
        with Session(engine) as session, session.begin():
            outbox.add(session, Placed(number=1))
        await entered.wait()
        with anyio.move_on_after(0.5):
            await relay.drain()
            drained = True
        assert not drained
        release.set()
        await relay.drain()
        assert bus.published(Placed) == [Placed(number=1)]
    engine.dispose()
