"""Lightbus: what an app declares, and how it refuses what cannot work."""

from __future__ import annotations

import asyncio
import uuid

import anyio

from lightbus import Lightbus


def test_an_app_that_is_started_by_asyncio_rather_than_anyio_hears_its_events() -> None:
    app = Lightbus("billing", url=f"memory://{uuid.uuid4().hex}")
    heard: list[dict[str, object]] = []

    @app.event
    class InvoicePaid:
        invoice_id: str

    @app.on(InvoicePaid)
    async def note(paid: dict[str, object]) -> None:
        heard.append(paid)
        done.set()

    async def main() -> None:
        consumer = app.consumer()
        async with app, anyio.create_task_group() as tasks:
            await tasks.start(consumer.run)
            await app.publish(InvoicePaid(invoice_id="i-1"))
            with anyio.fail_after(5):
                await done.wait()
            await consumer.stop(5)

    done = anyio.Event()
    asyncio.run(main())
    assert heard == [{"invoice_id": "i-1"}]
