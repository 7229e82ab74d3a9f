"""A channel that the broker leaves in a bad state: it nacks everything, while a new one would not."""

from __future__ import annotations

import contextlib
import time

from lightbus import errors
from lightbus.message import new_id
from lightbus.publishing.publisher import Publisher
from lightbus.transport import Publication
from tests.patience import LIMIT, wait_until
from tests.unit.test_publisher_unit import ScriptedBroker, ScriptedChannel


def publication() -> Publication:
    return Publication("shop", "order.placed", b"{}", {"message_id": new_id(), "headers": {}})


def test_a_channel_that_only_nacks_is_replaced_and_the_connection_is_not() -> None:
    """RabbitMQ 3.10.8 does that when a quorum queue's leader dies: see `cluster_nodes_killed`."""
    broker = ScriptedBroker()
    channels: list[ScriptedChannel] = []

    def nack_on_the_first(channel: ScriptedChannel, tag: int, _: Publication) -> None:
        if channel not in channels:
            channels.append(channel)
        (channel.on_nack if channel is channels[0] else channel.on_ack)(tag, False)

    broker.script = nack_on_the_first
    publisher = Publisher("shop", broker, timeout=LIMIT, queue_type="quorum")  # type: ignore[arg-type]

    def is_confirmed() -> bool:
        with contextlib.suppress(errors.PublishNacked):
            return publisher.publish_sync(publication()).routed
        return False

    wait_until(is_confirmed, "the channel is replaced")
    assert (len(channels), broker.connections) == (2, 1)
    publisher.close()


def test_a_nack_does_not_cause_other_messages_to_be_published_twice() -> None:
    broker = ScriptedBroker()
    refused: list[int] = []

    def nack_one(channel: ScriptedChannel, tag: int, _: Publication) -> None:
        if tag % 50 == 7:
            refused.append(tag)
            channel.on_nack(tag, False)
        else:
            channel.on_ack(tag, False)

    broker.script = nack_one
    publisher = Publisher("shop", broker, timeout=LIMIT, queue_type="quorum")  # type: ignore[arg-type]
    begin, count, nacked = time.monotonic(), 0, 0
    while time.monotonic() - begin < 2.5:
        batch = [publication() for _ in range(10)]
        count += 10
        try:
            publisher.publish_many_sync(batch)
        except errors.PublishManyError as error:
            nacked += sum(isinstance(outcome, errors.PublishNacked) for outcome in error.outcomes)
        time.sleep(0.002)
    publisher.close()
    ids = [one.properties["message_id"] for one in broker.published]
    assert len(ids) == len(set(ids)) == count
    assert nacked == len(refused)
    assert nacked > 0
    assert broker.connections == 1
