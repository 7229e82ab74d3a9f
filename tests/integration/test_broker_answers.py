"""What RabbitMQ answers to what cannot be: each answer is described by what it says, with the next step that fits."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

import amqp.exceptions
import anyio
import pytest

from lightbus import Lightbus, errors
from lightbus.connection.address import Address
from lightbus.connection.diagnosis import LOST, describe
from lightbus.connection.dial import BrokerAddresses
from lightbus.transport import Channel, Connection, Publication
from tests.bus import connected, eventually
from tests.rabbitmq import Node

pytestmark = pytest.mark.rabbitmq

QUORUM = {"x-queue-type": "quorum"}


def _declare(channel: Channel, queue: str, **arguments: Any) -> Any:
    return channel.queue_declare(queue, durable=True, auto_delete=False, arguments=arguments)


def _redeclare(connection: Connection) -> None:
    _declare(connection.channel(), "here", **QUORUM)
    _declare(connection.channel(), "here", **{"x-queue-type": "classic"})


def _redeclare_exchange(connection: Connection) -> None:
    connection.channel().exchange_declare("amq.topic", "direct", durable=True, auto_delete=False)


def _argument(connection: Connection) -> None:
    _declare(connection.channel(), "here", **QUORUM, **{"x-max-priority": 5})


def _reserved(connection: Connection) -> None:
    _declare(connection.channel(), "amq.main", **QUORUM)


def _unknown_tag(connection: Connection) -> None:
    connection.channel().basic_ack(77)
    _wait(connection)


def _too_large(connection: Connection) -> None:
    channel = connection.channel()
    channel.publish([Publication("amq.topic", "a", b"x" * 33_600_000, {}, mandatory=False)])
    _wait(connection)


def _odd_property(connection: Connection) -> None:
    channel = connection.channel()
    channel.publish([Publication("amq.topic", "a", b"x", {"user_id": "somebody"}, mandatory=False)])
    _wait(connection)


def _missing(connection: Connection) -> None:
    connection.channel().consume("nowhere", lambda _: None, on_cancel=lambda _: None)


def _same_tag(connection: Connection) -> None:
    channel = connection.channel()
    _declare(channel, "here", **QUORUM)
    for _ in range(2):
        channel.consume("here", lambda _: None, on_cancel=lambda _: None, consumer_tag="one")


def _in_exclusive_use(connection: Connection) -> None:
    channel = connection.channel()
    _declare(channel, "here", **{"x-queue-type": "classic"})
    channel.consume("here", lambda _: None, on_cancel=lambda _: None, exclusive=True)
    channel.consume("here", lambda _: None, on_cancel=lambda _: None)


def _exchange_type(connection: Connection) -> None:
    connection.channel().exchange_declare("here", "x-no-such", durable=True, auto_delete=False)


def _wait(connection: Connection) -> None:
    with suppress(TimeoutError):
        connection.drain_events(30)


PROVOKED: dict[str, tuple[Callable[[Connection], object], type[errors.BrokerError], str]] = {
    "other queue type": (_redeclare, errors.TopologyConflict, "rabbitmqctl delete_queue"),
    "other exchange type": (_redeclare_exchange, errors.TopologyConflict, "delete the exchange"),
    "argument that it does not take": (_argument, errors.UnsupportedBroker, "does not support"),
    "exchange type that it does not know": (_exchange_type, errors.UnsupportedBroker, "does not support"),
    "reserved name": (_reserved, errors.AccessRefused, "begin with 'amq.'"),
    "unknown delivery tag": (_unknown_tag, errors.BrokerError, "the broker refused the request"),
    "message over the limit": (_too_large, errors.LimitReached, "max_message_size"),
    "property that it refuses": (_odd_property, errors.BrokerError, "the broker refused the request"),
    "no such queue": (_missing, errors.TopologyMissing, "Start a worker"),
    "consumer tag again": (_same_tag, errors.BrokerError, "report it"),
    "queue in exclusive use": (_in_exclusive_use, errors.AccessRefused, "list_consumers"),
}


@pytest.mark.parametrize("case", PROVOKED)
def test_an_answer_is_described_by_what_it_says(case: str, rabbitmq_url: str) -> None:
    provoke, expected, step = PROVOKED[case]
    with _connection(rabbitmq_url) as (connection, address):
        with pytest.raises(amqp.exceptions.AMQPError) as raised:
            provoke(connection)
        _check(describe(raised.value, address), expected, step)


def test_a_queue_of_another_connection_is_not_a_broker_that_is_away(rabbitmq_url: str) -> None:
    with connected(rabbitmq_url) as other, _connection(rabbitmq_url) as (connection, address):
        other.channel().queue_declare("here", exclusive=True, auto_delete=False)
        with pytest.raises(amqp.exceptions.ResourceLocked) as raised:
            _declare(connection.channel(), "here", **QUORUM)
        _check(describe(raised.value, address), errors.TopologyConflict, "owner_pid")


def _check(described: errors.BrokerError, expected: type[errors.BrokerError], step: str) -> None:
    assert type(described) is expected, described
    assert step in str(described)
    assert ("other arguments" in str(described)) == ("inequivalent arg" in str(described))
    assert "Is the broker running there?" not in str(described)


@contextmanager
def _connection(url: str) -> Iterator[tuple[Connection, Address]]:
    broker = BrokerAddresses.parse(url)
    connection = broker.connect("test")
    try:
        yield connection, broker.addresses[0]
    finally:
        with suppress(*LOST), closing(connection):
            pass


@pytest.mark.anyio
async def test_a_limit_of_queues_is_named_and_the_worker_starts_once_it_is_raised(
    rabbitmq: Node, rabbitmq_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """max-queues of the virtual host: nothing exists with other arguments, and nothing is to be deleted for that."""
    vhost = rabbitmq_url.rpartition("/")[2]
    app = Lightbus("billing", url=rabbitmq_url)
    app.on("order.placed")(lambda: None)
    limit = json.dumps({"max-queues": 3})
    await anyio.to_thread.run_sync(lambda: rabbitmq.ctl("set_vhost_limits", "-p", vhost, limit))
    consumer = app.consumer()
    with caplog.at_level(logging.ERROR, "lightbus"):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(consumer.run)
            await eventually(lambda: "queue limit in vhost" in caplog.text)
            await anyio.to_thread.run_sync(lambda: rabbitmq.ctl("clear_vhost_limits", "-p", vhost))
            await eventually(lambda: all(queue_consumer.consumer_tag for queue_consumer in consumer.consumers))
            await consumer.stop(5)
    assert "set_vhost_limits" in caplog.text
    assert "other arguments" not in caplog.text
    assert "delete the exchange" not in caplog.text
