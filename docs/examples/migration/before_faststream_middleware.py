"""Before: a FastStream middleware reads a tenant, and adds it to what is published. Needs faststream[rabbit]."""

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

from faststream import BaseMiddleware, PublishCommand, StreamMessage
from faststream.rabbit import RabbitBroker

current_tenant: ContextVar[str | None] = ContextVar("current_tenant", default=None)


class Tenant(BaseMiddleware):
    async def consume_scope(
        self, call_next: Callable[[StreamMessage[Any]], Awaitable[Any]], msg: StreamMessage[Any]
    ) -> Any:
        token = current_tenant.set(msg.headers.get("tenant"))
        try:
            return await call_next(msg)
        finally:
            current_tenant.reset(token)

    async def publish_scope(self, call_next: Callable[[PublishCommand], Awaitable[Any]], cmd: PublishCommand) -> Any:
        if (tenant := current_tenant.get()) is not None:
            cmd.headers.setdefault("tenant", tenant)
        return await call_next(cmd)


broker = RabbitBroker("amqp://guest:guest@localhost:5672/", middlewares=[Tenant])


@broker.subscriber("orders")
async def charge(order: dict) -> None:
    await broker.publish({"order_id": order["order_id"]}, "charged")
