"""qpid-proton's blocking client on Artemis, as its documentation shows it: json.loads and json.dumps, no types.

It waits for each confirm before it sends again.

It uses the address and the queue of a Lightbus app of the same name, so that the broker does the same work. It runs
with the Python of Lightbus, which has the same proton.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

from proton import Message, Timeout
from proton.utils import BlockingConnection

from benchmarks import payload
from benchmarks.plan import Plan, handler

CREDIT = 500


def _connect(plan: Plan) -> BlockingConnection:
    url = urlsplit(plan.url)._replace(scheme="amqp").geturl()
    return BlockingConnection(url, timeout=60, allowed_mechs="PLAIN")


@contextlib.contextmanager
def consuming(plan: Plan, meter: Callable[[int], None]) -> Iterator[None]:
    handle = handler(plan, meter, dict)
    stopping = threading.Event()

    def consume() -> None:
        connection = _connect(plan)
        receiver = connection.create_receiver(f"lightbus.bus::{plan.name}.main", credit=CREDIT)
        while not stopping.is_set():
            with contextlib.suppress(Timeout):
                message = receiver.receive(timeout=0.1)  # kept, because `body` is a view of its memory
                handle(json.loads(bytes(message.body)))
                receiver.accept()
        connection.close()

    thread = threading.Thread(target=consume)
    thread.start()
    yield
    stopping.set()
    thread.join()


def make(plan: Plan, number: int, index: int) -> Any:
    return payload.make(plan.kind, number, plan.size)


@contextlib.contextmanager
def publishing_sync(plan: Plan, *, declare: bool) -> Iterator[Any]:
    connection = _connect(plan)
    sender = connection.create_sender(f"lightbus.exchange.{plan.name}")
    subject = f"{plan.event_name()}.{plan.name}"

    def send(event: Any) -> None:
        # `inferred`: the bytes are a data section, as those of Lightbus.
        sender.send(
            Message(
                json.dumps(event).encode(),
                inferred=True,
                durable=True,
                subject=subject,
                content_type="application/json",
            )
        )

    yield send
    connection.close()
