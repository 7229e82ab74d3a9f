"""The workers of two apps in one process. Try it: python both.py"""

import signal
from functools import partial

import anyio
import audit
from billing import bus as billing

from lightbus.worker import serve


async def main() -> None:
    stop = anyio.Event()
    async with anyio.create_task_group() as tasks:
        for app in (billing.app, audit.app):
            ready = partial(print, f"{app.name} is ready", flush=True)
            tasks.start_soon(partial(serve, app, stop=stop, on_started=ready))
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                stop.set()  # running handlers finish
                break


if __name__ == "__main__":
    anyio.run(main)
