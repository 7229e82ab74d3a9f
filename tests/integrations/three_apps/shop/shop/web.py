"""The HTTP API: uvicorn shop.web:api"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel
from shop.bus import Order, OrderPlaced, create_tables, outbox, sessions


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    await create_tables()
    yield


api = FastAPI(lifespan=lifespan)


class NewOrder(BaseModel):
    cents: int


@api.put("/orders/{order_id}", status_code=201)
async def place_order(order_id: str, order: NewOrder) -> dict[str, str]:
    async with sessions.begin() as session:
        if await session.get(Order, order_id) is None:
            session.add(Order(id=order_id, cents=order.cents))
            outbox.add(session, OrderPlaced(id=order_id, cents=order.cents))
            await session.flush()
        if order.cents <= 0:
            raise HTTPException(409, "nothing to pay")  # rolls back: the order and its event
    return {"order": order_id}
