"""Read by type checkers, never run: dependencies and the lifespan's value."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager
from typing import Annotated, Any, assert_type

from lightbus import Depends, Lightbus, Message, State
from lightbus.testing import TestBus


class Pool:
    def connect(self) -> Session:
        return Session()


class Session: ...


@asynccontextmanager
async def lifespan(app: Lightbus) -> AsyncGenerator[Pool]:
    yield Pool()


app = Lightbus("billing", lifespan=lifespan)


async def open_session(pool: State[Pool], message: Message) -> AsyncGenerator[Session]:
    assert_type(pool, Pool)
    assert_type(message.id, str)
    yield pool.connect()


def make_session() -> Generator[Session]:
    yield Session()


async def load() -> Session:
    return Session()


OpenSession = Annotated[Session, Depends(open_session)]


@app.on("order.placed")
async def handle(
    order: dict[str, Any],
    session: OpenSession,
    loaded: Annotated[Session | None, Depends(load)],
    pool: State[Pool],
    *,
    made: Annotated[Session, Depends(make_session)],
) -> None:
    assert_type(session, Session)
    assert_type(loaded, Session | None)
    assert_type(pool, Pool)
    assert_type(made, Session)
    same: Pool = app.state
    assert_type(same, Pool)


Depends("session")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def fake() -> Session:
    return Session()


def override(bus: TestBus) -> None:
    bus.override(open_session, fake)
    bus.override(open_session, "fake")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with app.override(open_session, lambda: "fake"), app.with_state(Pool()):
        pass
