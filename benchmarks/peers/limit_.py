"""The limit: a reader that only receives bytes (without acks, or with as few as possible), and a writer that only sends
them (no confirm).

Neither decodes anything. They do the minimum of any Python client on one connection.
"""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import amqp
from amqp import spec

from benchmarks import broker, payload
from benchmarks.broker import publish_frames, settings
from benchmarks.plan import Plan, cpu_seconds

MARKER = b"somebody@example.com"
"""Once in each message."""
READ = 1 << 18
LIMIT = 60.0


def run(plan: Plan) -> dict[str, Any]:
    return write(plan) if plan.handler == "write" else read(plan, ack=plan.handler == "read-ack")


def _connect(plan: Plan) -> tuple[amqp.Connection, amqp.Channel, socket.socket]:
    connection = amqp.Connection(**settings(plan.url))
    connection.connect()
    channel = connection.channel()
    channel.queue_declare(plan.name, durable=True, auto_delete=False, arguments={"x-queue-type": plan.queue_type})
    sock = connection.transport.sock
    sock.settimeout(LIMIT)
    return connection, channel, sock


def read(plan: Plan, *, ack: bool) -> dict[str, Any]:
    """Counts a marker in what arrives, so that it knows when to stop; the marker may lie across two pieces.

    An ack settles all that has arrived since the last one, as soon as that is a quarter of the prefetch.
    """
    _, channel, sock = _connect(plan)
    if ack:
        assert plan.prefetch is not None
        channel.basic_qos(0, plan.prefetch, False)
    channel.send_method(spec.Basic.Consume, "BssbbbbF", (0, plan.name, "", False, not ack, False, True, None))
    seen, acked, rest = 0, 0, b""
    warm: tuple[int, float, float] | None = None
    while True:
        piece = rest + sock.recv(READ)
        if len(piece) == len(rest):
            raise ConnectionError("the broker closed the connection")
        seen += piece.count(MARKER)
        rest = piece[-len(MARKER) + 1 :]
        if ack and seen - acked >= plan.prefetch // 4:  # type: ignore[operator]
            channel.basic_ack(seen, multiple=True)
            acked = seen
        if warm is None:
            if seen >= plan.warm:
                warm = (seen, time.perf_counter(), cpu_seconds())
        elif seen >= plan.warm + plan.count:
            return {
                "events": seen - warm[0],
                "wall": time.perf_counter() - warm[1],
                "cpu": cpu_seconds() - warm[2],
                "handled": seen,
                "right": True,
            }


def write(plan: Plan) -> dict[str, Any]:
    """Sends prepared frames; the reply to a passive declare shows that the broker has read all of them."""
    _, channel, sock = _connect(plan)
    body = _order(payload.FIRST)
    frames = publish_frames(channel.channel_id, "", plan.name, {"delivery_mode": 2}, body)
    batch = frames * 100
    began, cpu = time.perf_counter(), cpu_seconds()
    for _ in range(0, plan.count, 100):
        sock.sendall(batch)
    channel.queue_declare(plan.name, passive=True)
    ended, cpu = time.perf_counter(), cpu_seconds() - cpu
    sent = -(-plan.count // 100) * 100
    broker.until_waiting(plan.url, plan.name, sent)  # closing the channel earlier could lose the last ones
    return {"events": sent, "wall": ended - began, "cpu": cpu, "sent": sent}


def _order(number: int) -> bytes:
    return json.dumps(payload.make("order", number), separators=(",", ":")).encode()
