"""Tests of the shop and of billing, without a broker. Try it: pytest"""

import uuid
from typing import Any

import anyio.to_thread
import billing.bus
import pytest
import shop.bus
import shop.main
import sqlalchemy as sa
import stock
from httpx2 import ASGITransport, AsyncClient

from lightbus.testing import TestBus

pytestmark = pytest.mark.anyio
ORDER = "3f6c0f0e-8f5a-4a51-9a3b-0d9a3c1e7b10"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def count(service: Any, table: Any) -> int:
    async with service.sessions() as session:
        found: int = await session.scalar(sa.select(sa.func.count()).select_from(table))
        return found


async def test_an_order_and_its_event_are_committed_together() -> None:
    order = f"/orders/{uuid.uuid4()}"
    async with TestBus(shop.bus.bus) as on_bus, AsyncClient(transport=ASGITransport(shop.main.api)) as client:
        for _ in range(2):  # the client repeats its request
            answer = await client.put(f"http://shop{order}", json={"cents": 950})
            assert answer.status_code == 201
        await shop.bus.outbox.relay.drain()
        assert [placed.cents for placed in on_bus.published(shop.bus.OrderPlaced)] == [950]


async def test_a_rolled_back_order_has_no_event() -> None:
    async with TestBus(shop.bus.bus) as on_bus:
        async with shop.bus.sessions() as session:
            shop.bus.outbox.add(session, shop.bus.OrderPlaced(order_id=uuid.uuid4(), cents=950))
            await session.flush()
            await session.rollback()
        await shop.bus.outbox.relay.drain()
        assert on_bus.published(shop.bus.OrderPlaced) == []


async def test_a_duplicate_writes_no_second_invoice() -> None:
    async with TestBus(billing.bus.bus) as on_bus:
        invoices = await count(billing.bus, billing.bus.Invoice)
        event_id = str(uuid.uuid4())
        for _ in range(2):
            await on_bus.publish("order.placed", {"order_id": ORDER, "cents": 950}, source="shop", id=event_id)
            await on_bus.drain()
        await billing.bus.outbox.relay.drain()
        assert await count(billing.bus, billing.bus.Invoice) == invoices + 1
        assert [str(one.order_id) for one in on_bus.published(billing.bus.InvoiceWritten)] == [ORDER]


async def test_a_rejected_order_leaves_nothing_behind() -> None:
    async with TestBus(billing.bus.bus) as on_bus:
        invoices = await count(billing.bus, billing.bus.Invoice)
        await on_bus.publish("order.placed", {"order_id": ORDER, "cents": 0}, source="shop")
        await on_bus.drain()
        await billing.bus.outbox.relay.drain()
        assert [dead.error for dead in on_bus.dead("bill")] == ["Reject: nothing to pay"]
        assert await count(billing.bus, billing.bus.Invoice) == invoices
        assert on_bus.published(billing.bus.InvoiceWritten) == []


async def test_a_repository_works_in_the_transaction_of_the_inbox() -> None:
    async with TestBus(stock.bus) as on_bus:
        event_id = str(uuid.uuid4())
        for _ in range(2):
            await on_bus.publish("order.placed", {"order_id": ORDER}, source="shop", id=event_id)
            await on_bus.drain()
        await anyio.to_thread.run_sync(stock.count_stock)
        await stock.outbox.relay.drain()
        assert on_bus.published(stock.StockReserved) == [stock.StockReserved(order_id=ORDER)]
        assert on_bus.published(stock.StockCounted) == [stock.StockCounted(reserved=1)]
