"""A relay alone: `python -m tests.faults.relay psycopg|asyncpg`. It stops gracefully on SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys

import anyio

from lightbus.outbox import Relay
from tests.faults.orders import open_engine, patch_clock, shop

SENDS = "It sends."
"""Printed once it has sent something."""


async def note_the_first(relay: Relay) -> None:
    while not relay.sent:  # noqa: ASYNC110 - it is a counter
        await anyio.sleep(0.02)
    print(SENDS, flush=True)


async def main(driver: str) -> None:
    _, outbox = shop(open_engine(asynchronous=driver == "asyncpg"))
    stopping = anyio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    print("Ready:", flush=True)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(note_the_first, outbox.relay)
        await outbox.relay.run(stopping)
        tasks.cancel_scope.cancel()
    print(f"sent {outbox.relay.sent}", flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    patch_clock()
    asyncio.run(main(sys.argv[1]))
