"""A web app that publishes, with its metrics. Try it: uvicorn web_fastapi:api, then open /metrics."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from prometheus_client import make_asgi_app

from lightbus import Lightbus
from lightbus.telemetry.prometheus import Metrics

bus = Lightbus("shop")
Metrics(bus)


@bus.event
class OrderPlaced:
    order_id: int


@asynccontextmanager
async def lifespan(api: FastAPI) -> AsyncIterator[None]:
    async with bus:
        yield


api = FastAPI(lifespan=lifespan)
api.mount("/metrics", make_asgi_app())


@api.put("/orders/{order_id}", status_code=202)
async def place(order_id: int) -> dict[str, str]:
    receipt = await bus.publish(OrderPlaced(order_id=order_id))
    return {"event": receipt.id}
