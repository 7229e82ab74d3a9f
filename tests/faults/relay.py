"""A relay alone: `python -m tests.faults.relay psycopg|asyncpg`. It stops gracefully on SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys

import anyio

from tests.faults.orders import open_engine, patch_clock, shop


async def main(driver: str) -> None:
    _, outbox = shop(open_engine(asynchronous=driver == "asyncpg"))
    stopping = anyio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    print("Ready:", flush=True)
    await outbox.relay.run(stopping)
    print(f"sent {outbox.relay.sent}", flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    patch_clock()
    asyncio.run(main(sys.argv[1]))
