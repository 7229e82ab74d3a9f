"""The HTTP API of the shop. It needs the database, and no broker. Try it: uvicorn shop.main:api"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

from fastapi import FastAPI
from pydantic import BaseModel

from shop.bus import Order, OrderPlaced, create_tables, engine, outbox, sessions


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    await create_tables()
    yield
    await engine.dispose()


api = FastAPI(lifespan=lifespan)


class NewOrder(BaseModel):
    cents: int


@api.put("/orders/{order_id}", status_code=201)  # the client chooses the id: it may repeat a request
async def place_order(order_id: UUID, order: NewOrder) -> dict[str, str]:
    async with sessions.begin() as session:  # one transaction: the order and its event, or neither
        if await session.get(Order, order_id) is None:
            session.add(Order(id=order_id, cents=order.cents))
            outbox.add(session, OrderPlaced(order_id=order_id, cents=order.cents))
    return {"order": str(order_id)}
