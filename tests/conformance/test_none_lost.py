"""Twenty thousand events from four concurrent publishers to two apps: each app handles every event."""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from lightbus import Lightbus
from tests.bus import OrderPlaced, dead_letters, eventually, left_in, running
from tests.conformance.conftest import declare_orders

EACH = 5000


@pytest.mark.anyio
@pytest.mark.parametrize("broker", ["sqlite", pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)])
async def test_twenty_thousand_events_are_each_handled_by_both_apps(
    broker: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = f"sqlite:///{tmp_path}/bus.db" if broker == "sqlite" else request.getfixturevalue("rabbitmq_url")
    shop = declare_orders(Lightbus("shop", url=url, publish_timeout=60))
    apps = [Lightbus("billing", url=url), Lightbus("stats", url=url)]
    received: dict[str, Counter[int]] = {app.name: Counter() for app in apps}
    for app in apps:

        @app.on("order.placed")
        async def note(order: OrderPlaced, *, counter: Counter[int] = received[app.name]) -> None:
            counter[order.number] += 1

    def events(publisher: int) -> list[OrderPlaced]:
        return [OrderPlaced(number=publisher * EACH + n) for n in range(EACH)]

    async def publish_in_tasks() -> None:
        queue = iter(events(0))

        async def publish() -> None:
            for event in queue:
                assert (await shop.publish(event)).routed

        async with anyio.create_task_group() as tasks:
            for _ in range(200):
                tasks.start_soon(publish)

    async def publish_in_bulk() -> None:
        assert all(receipt.routed for receipt in await shop.publish_many(events(1)))

    def publish_in_threads(publisher: int) -> None:
        with ThreadPoolExecutor(20) as threads:
            assert all(receipt.routed for receipt in threads.map(shop.publish_sync, events(publisher)))

    async with running(shop, *apps):
        start = time.monotonic()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(publish_in_tasks)
            tasks.start_soon(publish_in_bulk)
            tasks.start_soon(anyio.to_thread.run_sync, publish_in_threads, 2)
            tasks.start_soon(anyio.to_thread.run_sync, publish_in_threads, 3)
        published = time.monotonic() - start
        await eventually(lambda: [len(counter) for counter in received.values()], [4 * EACH] * 2, limit=180)
        handled = time.monotonic() - start
    for name, counter in received.items():
        assert set(counter) == set(range(4 * EACH))
        duplicates = counter.total() - len(counter)
        print(f"{broker}, {name}: {duplicates} duplicates; published in {published:.1f} s, handled in {handled:.1f} s")
        assert duplicates == 0  # at-least-once allows duplicates, but there is no fault here
    for app in apps:
        assert await left_in(app) == []
        assert await dead_letters(app, 0) == []
