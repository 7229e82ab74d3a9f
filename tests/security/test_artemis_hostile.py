"""Hostile messages of AMQP 1.0 on Artemis: what the broker accepts is handled or dead-lettered.

`LIGHTBUS_HOSTILE` sets the number of messages.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import anyio.to_thread
import pytest

from lightbus import Lightbus, Message, Retry
from lightbus.transport import Publication
from lightbus.transport.activemq import message
from tests.bus import SENTINEL, eventually, running, take_all
from tests.conformance.conftest import declare_orders

pytestmark = [pytest.mark.artemis, pytest.mark.anyio]

COUNT = int(os.environ.get("LIGHTBUS_HOSTILE", "100"))

HEADERS: list[dict[str, Any]] = [
    {},
    {"x-death": [{"queue": "billing.main", "exchange": "shop", "reason": "rejected"}], "x-delivery-count": 7},
    {"_AMQ_ORIG_ADDRESS": "lightbus.exchange.bank", "_AMQ_SCHED_DELIVERY": 1 << 60, "JMSXGroupID": "shop"},
    {"lightbus-attempt": 99, "lightbus-handler": "charge", "lightbus-source": "bank", "lightbus-routing-key": "x.y"},
    {
        "nested": {"a": [{"b": [1, None, b"\xff", datetime(2026, 1, 1, tzinfo=UTC)]}]},
    },
    {"long": "x" * 30_000},
]
BODIES = [b"{}", b"", b"\xff\xfe", b"[" * 5000, b'{"number": 1e999}', b'{"number": 1}', b"x" * 300_000]


def hostile(chance: random.Random) -> bytes:
    """A message whose subject is `order.placed`, unless its octets were changed."""
    properties: dict[str, Any] = {"headers": chance.choice(HEADERS)}
    for name, values in {
        "message_id": ["m", "x" * 255, "é\n"],
        "delivery_mode": [1, 2],
        "timestamp": [0, 1 << 40],
        "type": ["order.placed", "\0"],
        "content_encoding": ["gzip", "deflate"],
        "reply_to": ["lightbus.exchange.bank"],
    }.items():
        if chance.random() < 0.4:
            properties[name] = chance.choice(values)
    publication = Publication("shop", "order.placed", chance.choice(BODIES), properties)
    data = bytearray(message.encode(publication, "order.placed"))
    if chance.random() < 0.5:
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(min(len(data), 400))] = chance.randrange(256)
    return bytes(data)


def throw(url: str, messages: Iterator[bytes]) -> tuple[int, int]:
    """Send these to the exchange of shop. Returns how many were accepted, and how many were not answered."""
    from proton import Delivery, ProtonException, Timeout
    from proton.utils import BlockingConnection

    accepted, unknown, connection, sender = 0, 0, None, None
    for data in messages:
        if sender is None:
            connection = BlockingConnection(url.replace("activemq:", "amqp:"), timeout=30, allowed_mechs="PLAIN")
            sender = connection.create_sender("lightbus.exchange.shop")
        try:
            link = sender.link
            delivery = link.delivery(link.delivery_tag())
            link.stream(data)
            link.advance()
            connection.wait(functools.partial(getattr, delivery, "settled"), timeout=2)
            accepted += delivery.remote_state == Delivery.ACCEPTED
        except Timeout:
            unknown, sender = unknown + 1, None
        except ProtonException:  # the broker has closed the connection or the link over it
            sender = None
    connection.close()
    return accepted, unknown


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_what_the_broker_accepts_is_handled_or_dead_lettered(
    artemis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    shop = declare_orders(Lightbus("shop", url=artemis_url))
    billing = Lightbus("billing", url=artemis_url, retry=Retry(delays=(0.01,)))
    handled = itertools.count()
    seen = 0

    @billing.on("#")
    async def charge(message: Message) -> None:
        nonlocal seen
        if message.event == SENTINEL:
            return
        json.loads(message.body)["number"]
        seen = next(handled) + 1

    chance = random.Random(17)
    async with running(shop, billing) as bus:
        (consumer,) = bus.consumers["billing"]
        accepted, unknown = await anyio.to_thread.run_sync(throw, artemis_url, (hostile(chance) for _ in range(COUNT)))
        assert accepted > COUNT / 3
        dead: list[Any] = []

        def ended() -> int:
            dead.extend(take_all(billing, "billing.dead"))
            return seen + len(dead)

        await eventually(lambda: ended() >= accepted)
        await bus.quiet(billing)
        assert consumer.connected
    assert "connection lost" not in caplog.text
    assert accepted <= len(dead) + seen <= accepted + unknown
