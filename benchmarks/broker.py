"""The suite's own hands on the broker: copies messages into queues, counts what waits there, purges.

py-amqp only, and no part of Lightbus: what fills the queues is not what is measured.
"""

from __future__ import annotations

import contextlib
import re
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote, urlsplit

import amqp
import attrs

from benchmarks import payload

_UUID = re.compile(rb"(?<![0-9a-f])[0-9a-f]{8}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{12}(?![0-9a-f])")
_NUMBER = str(payload.SEED).encode()


def settings(url: str) -> dict[str, Any]:
    parts = urlsplit(url)
    return {
        "host": f"{parts.hostname}:{parts.port}",
        "userid": parts.username,
        "password": parts.password,
        "virtual_host": unquote(parts.path[1:]) or "/",
        "connect_timeout": 10,
        "read_timeout": 60,
        "write_timeout": 60,
        "login_method": "PLAIN",
    }


@contextlib.contextmanager
def channel(url: str) -> Iterator[amqp.Channel]:
    connection = amqp.Connection(**settings(url))
    connection.connect()
    try:
        yield connection.channel()
    finally:
        connection.close()


@attrs.frozen
class Template:
    """A message that a contestant has published itself, to be copied with other ids and numbers in the same places."""

    exchange: str
    routing_key: str
    properties: bytes
    body: bytes
    persistent: bool

    def copies(self, channel_id: int) -> Callable[[int], bytes]:
        """Makes the frames of a copy, by its index."""
        frames = publish_frames(channel_id, self.exchange, self.routing_key, self.properties, self.body)
        places = sorted(
            [(match.end() - 12, match.end(), "id") for match in _UUID.finditer(frames)]
            + [(match.start(), match.end(), "number") for match in re.finditer(_NUMBER, frames)]
        )
        parts, kinds, position = [], [], 0
        for start, end, kind in places:
            parts.append(frames[position:start])
            kinds.append(kind)
            position = end
        parts.append(frames[position:])

        def copy(index: int) -> bytes:
            values = {"id": b"%012x" % index, "number": b"%09d" % (payload.FIRST + index)}
            pieces = [parts[0]]
            for kind, part in zip(kinds, parts[1:], strict=True):
                pieces += (values[kind], part)
            return b"".join(pieces)

        return copy


def publish_frames(
    channel_id: int, exchange: str, routing_key: str, properties: dict[str, Any] | bytes, body: bytes
) -> bytes:
    """A whole basic.publish: its method, header and body frames."""
    if isinstance(properties, dict):
        properties = amqp.Message(body, **properties)._serialize_properties()
    names = b"".join(bytes((len(name.encode()),)) + name.encode() for name in (exchange, routing_key))
    method = b"\x00\x3c\x00\x28\x00\x00" + names + b"\x00"
    header = struct.pack(">HHQ", 60, 0, len(body)) + properties
    size = 131072 - 8  # RabbitMQ's frame_max
    bodies = [(3, body[start : start + size]) for start in range(0, len(body), size)]
    return b"".join(
        struct.pack(">BHI", kind, channel_id, len(content)) + content + b"\xce"
        for kind, content in [(1, method), (2, header), *bodies]
    )


def take(url: str, queue: str, count: int, timeout: float = 30) -> list[Template]:
    """All that a contestant has published as examples.

    Raises:
        TimeoutError: they were not there within `timeout` seconds.
    """
    templates: list[Template] = []
    deadline = time.monotonic() + timeout
    with channel(url) as on:
        while len(templates) < count:
            message = on.basic_get(queue, no_ack=True)
            if message is None:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"queue {queue!r} has {len(templates)} of {count} messages after {timeout:g} s")
                time.sleep(0.02)
                continue
            body = message.body.encode() if isinstance(message.body, str) else bytes(message.body)
            info = message.delivery_info
            templates.append(
                Template(
                    info["exchange"],
                    info["routing_key"],
                    amqp.Message(body, **message.properties)._serialize_properties(),
                    body,
                    message.properties.get("delivery_mode") == 2,
                )
            )
    return templates


AT_ONCE = 2000


def fill(url: str, templates: list[Template], count: int) -> None:
    """Publish `count` copies, to where the contestant published the originals; returns once all are confirmed.

    Without confirms a quorum queue may lose the last ones, when the channel closes.
    """
    confirmed = 0

    def on_ack(tag: int, multiple: bool) -> None:
        nonlocal confirmed
        confirmed = max(confirmed, tag) if multiple else confirmed + 1

    with channel(url) as on:
        on.confirm_select()
        on.events["basic_ack"].add(on_ack)
        copies = [template.copies(on.channel_id) for template in templates]
        start = 0
        while start < count:
            pieces, size = [], 0
            while start < count and len(pieces) < AT_ONCE and size < 4_000_000:
                pieces.append(copies[start % len(copies)](start))
                size += len(pieces[-1])
                start += 1
            on.connection.transport.sock.sendall(b"".join(pieces))
            _drain_until(on, lambda sent=start: confirmed >= sent)  # type: ignore[misc]


def _drain_until(on: amqp.Channel, done: Callable[[], bool], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not done():
        on.connection.drain_events(timeout=max(0.01, deadline - time.monotonic()))


def waiting(url: str, queue: str) -> int:
    """Messages that are ready, without those that a consumer has in hand."""
    with channel(url) as on:
        return int(on.queue_declare(queue, passive=True).message_count)


def until_waiting(url: str, queue: str, count: int, timeout: float = 30, *, fewer: int = 0) -> int:
    """Wait until so many messages wait, or up to so many fewer; returns how many do at the end."""
    deadline = time.monotonic() + timeout
    with channel(url) as on:
        while True:
            there = int(on.queue_declare(queue, passive=True).message_count)
            if count - fewer <= there <= count or time.monotonic() > deadline:
                return there
            time.sleep(0.02)


def purge(url: str, queue: str) -> None:
    """Empty a queue, if it is there."""
    with channel(url) as on, contextlib.suppress(amqp.exceptions.NotFound):
        on.queue_purge(queue)
