"""The HTTP API of the shop: it publishes an event for each order. Try it: uvicorn shop.main:api"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from lightbus.errors import PublishError
from shop.bus import OrderPlaced, bus


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    async with bus:  # connects at startup, or raises; at shutdown, waits for unconfirmed publishes
        yield


api = FastAPI(lifespan=lifespan)


class NewOrder(BaseModel):
    email: str


@api.put("/orders/{order_id}", status_code=202)  # the client chooses the id: it may repeat a request
async def place_order(order_id: UUID, order: NewOrder) -> dict[str, str]:
    receipt = await bus.publish(OrderPlaced(order_id=order_id, email=order.email))
    return {"event": receipt.id}


@api.exception_handler(PublishError)
async def not_published(request: Request, error: Exception) -> JSONResponse:
    # A publish that timed out may have arrived. The client repeats the request with the same order_id.
    detail = "The order could not be taken. Try again."
    return JSONResponse({"detail": detail}, status_code=503, headers={"Retry-After": "5"})
