"""python -m benchmarks.peers.cold.aio_pika_"""

import asyncio
import json

import aio_pika

from .report import NAME, URL, handled


async def main() -> None:
    connection = await aio_pika.connect_robust(URL)
    channel = await connection.channel()
    await channel.set_qos(prefetch_count=100)
    queue = await channel.declare_queue(NAME, durable=True, arguments={"x-queue-type": "quorum"})
    async with queue.iterator() as messages:
        async for message in messages:
            async with message.process():
                handled(json.loads(message.body)["customer_id"])


asyncio.run(main())
