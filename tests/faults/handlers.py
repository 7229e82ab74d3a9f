"""The app of the worker processes: `lightbus worker tests.faults.handlers:app`. The environment configures it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import anyio

from lightbus import Lightbus, Message, Retry
from lightbus.wire.codec import current_run
from tests.faults.events import ThingHappened
from tests.faults.ledger import HANDLED, Ledger

WORK = float(os.environ.get("FAULTS_WORK", "0"))
"""Seconds that handling an event takes."""

ledger = Ledger(Path(os.environ["FAULTS_LEDGER"]))
app = Lightbus("billing", retry=Retry(delays=(0.2, 0.5)))


@app.on("thing.happened", timeout=300)
async def handle(thing: ThingHappened, message: Message) -> None:
    what, _, seconds = thing.do.partition(":")
    ledger.write("began", thing.id, os.getpid())
    match what:
        case "crash":
            os._exit(99)
        case "block":  # a bug: nothing else runs in this event loop in the meantime
            time.sleep(float(seconds))  # noqa: ASYNC251
        case "hold":
            if not message.redelivered:
                await anyio.sleep(float(seconds))
        case "wrong ack":
            if not message.redelivered:
                run = current_run.get()
                assert run is not None
                run[0].channel.basic_ack(10**6)
        case "fail once":
            if message.attempt == 1:
                raise ValueError(f"{thing.id} fails at first")
        case "fail":
            raise ValueError(f"{thing.id} always fails")
    if WORK:
        await anyio.sleep(WORK)
    ledger.write(HANDLED, thing.id, os.getpid(), int(message.redelivered), message.attempt)
