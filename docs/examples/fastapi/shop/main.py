"""The shop over HTTP: fastapi takes an order, the worker does the rest. Try it: uvicorn shop.main:api"""

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
    async with bus:  # connects now, so that a wrong URL ends the start; at the end, waits for what is on its way
        yield


api = FastAPI(lifespan=lifespan)


class NewOrder(BaseModel):
    email: str


@api.put("/orders/{order_id}", status_code=202)  # the client chooses the id, so that it may ask twice
async def place_order(order_id: UUID, order: NewOrder) -> dict[str, str]:
    receipt = await bus.publish(OrderPlaced(order_id=order_id, email=order.email))
    return {"event": receipt.id}


@api.exception_handler(PublishError)
async def not_published(request: Request, error: Exception) -> JSONResponse:
    # Not for certain: a publish that timed out may have arrived. The client repeats it, with the same order_id.
    detail = "The order could not be taken. Try again."
    return JSONResponse({"detail": detail}, status_code=503, headers={"Retry-After": "5"})
