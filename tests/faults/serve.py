"""Runs the app of handlers.py with `serve`: `python -m tests.faults.serve`. SIGUSR1 cancels `serve`."""

from __future__ import annotations

import asyncio
import contextlib
import signal

from lightbus.worker.worker import serve
from tests.faults.handlers import app


async def main() -> None:
    task = asyncio.ensure_future(serve(app, on_started=lambda: print("Ready:", flush=True)))
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task


if __name__ == "__main__":
    asyncio.run(main())
