"""A signal's handler that raises, at every point of a publish where Python may run one: in the real publisher over a
scripted connection, and in the real one to RabbitMQ.

Python runs signal handlers where a function begins or returns, or a built-in one has returned: `sys.setprofile` sees
all of these points.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import cast

import attrs
import pytest

from lightbus import Lightbus, Receipt, errors
from lightbus.connection.dial import BrokerAddresses
from lightbus.publishing.publisher import Publisher
from lightbus.transport import Publication
from tests.bus import OrderPlaced, connected
from tests.patience import LIMIT
from tests.unit.test_publisher_unit import ScriptedBroker, ScriptedChannel, one_is_gone, publication


class JobTooSlow(TimeoutError):
    """What the usual alarm raises: a TimeoutError, and so an OSError."""


def interrupted_at(point: int, function: Callable[[], object], module: str) -> bool | None:
    """Call it, and raise at its nth point in Lightbus. True: that left it; False: it did not; None: it has fewer."""
    raised = False
    points = itertools.count(1)

    def look(frame: FrameType, event: str, argument: object) -> None:
        nonlocal raised
        name = str(frame.f_globals.get("__name__"))
        if not raised and event != "c_call" and name.startswith(module) and next(points) == point:
            raised = True
            raise JobTooSlow

    sys.setprofile(look)
    try:
        function()
    except JobTooSlow:
        return True
    finally:
        sys.setprofile(None)
    return False if raised else None


def publish_nowait(channel: ScriptedChannel, publications: Sequence[Publication]) -> bool:
    channel.publish(publications)
    return True


@pytest.mark.parametrize("connected_before", [True, False])
@pytest.mark.parametrize("many", [False, True], ids=["publish_sync", "publish_many_sync"])
def test_an_interruption_at_any_point_leaves_outcomes_that_are_right(
    monkeypatch: pytest.MonkeyPatch, many: bool, connected_before: bool
) -> None:
    monkeypatch.setattr(ScriptedChannel, "publish_nowait", publish_nowait, raising=False)
    for point in itertools.count(1):
        broker = ScriptedBroker()
        broker.script = one_is_gone
        publisher = Publisher("interrupted", cast(BrokerAddresses, broker), timeout=LIMIT, queue_type="quorum")
        if connected_before:
            publisher.open(LIMIT)
        stopped = publication()

        def publish() -> None:
            if many:
                publisher.publish_many_sync([stopped])  # noqa: B023
            else:
                publisher.publish_sync(stopped)  # noqa: B023

        left = interrupted_at(point, publish, "lightbus")
        if left is None:
            publisher.close(LIMIT)
            break
        assert left, f"point {point}: the exception of the signal's handler was swallowed"
        for key in ("gone", "there", "gone"):
            assert publisher.publish_sync(publication(key=key)).routed == (key == "there"), f"point {point}"
        assert [thread.name for thread in threading.enumerate()].count(publisher.name) == 1, f"point {point}"
        publisher.close(LIMIT)
        ids = [sent.properties["message_id"] for sent in broker.published]
        assert ids.count(stopped.properties["message_id"]) <= 1, f"point {point}: sent again, with nobody waiting"
    assert point > 20


@pytest.mark.rabbitmq
def test_on_rabbitmq_an_interruption_at_any_point_of_a_send_never_confirms_what_was_refused(rabbitmq_url: str) -> None:
    full = {"x-max-length": 0, "x-overflow": "reject-publish"}
    with connected(rabbitmq_url) as connection:
        channel = connection.channel()
        channel.exchange_declare("shop", "topic", durable=True, auto_delete=False)
        channel.queue_declare("full", durable=True, auto_delete=False, arguments=full)
        channel.queue_bind("full", "shop", "order.placed")
        for point in itertools.count(1):
            app = Lightbus("shop", url=rabbitmq_url, publish_timeout=LIMIT)
            app.event(OrderPlaced)
            app.event("order.free")(OrderFree)
            with app:
                left = interrupted_at(
                    point,
                    lambda: app.publish_many_sync([OrderFree(number=1)]),  # noqa: B023
                    "lightbus.transport.amqp",
                )
                assert left is not False, f"point {point}: the exception of the signal's handler was swallowed"
                with pytest.raises(errors.PublishManyError) as caught:
                    app.publish_many_sync([OrderFree(number=2), OrderPlaced(number=3), OrderFree(number=4)])
                kinds = [type(outcome) for outcome in caught.value.outcomes]
                assert kinds == [Receipt, errors.PublishNacked, Receipt], f"point {point}"
            if left is None:
                break
    assert point > 10


@attrs.frozen(kw_only=True)
class OrderFree:
    number: int
