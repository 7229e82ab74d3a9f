"""A publish has one outcome for observers, also if its caller is cancelled."""

from __future__ import annotations

import threading

import pytest

from lightbus import Outcome, errors
from lightbus.connection.dial import BrokerAddresses
from lightbus.publishing.confirms import PendingPublish
from lightbus.publishing.observed import ObservedPublisher
from lightbus.transport import Publication
from lightbus.wire import codec

CANCELLED = InterruptedError("the web client has gone")


class Unconnected(ObservedPublisher):
    """The tests send and confirm in place of the connection."""

    def ensure_started(self) -> None: ...

    def send_or_wake(self) -> None: ...


class Publishing:
    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        broker = BrokerAddresses.parse("memory://")
        self.publisher = Unconnected("shop", broker, timeout=1.0, queue_type="quorum", observe=self.outcomes.append)

    def submit(self, exchange: str = "shop") -> PendingPublish:
        lock = threading.Lock()
        lock.acquire()
        pending = PendingPublish(Publication(exchange, "order.placed", b"{}", {"message_id": "7"}), lock=lock)
        self.publisher.submit(pending)
        return pending

    def send(self) -> None:
        self.publisher.window.take(10)

    def confirm(self) -> None:
        self.publisher.window.ack(1, False)
        self.publisher.announce()

    @property
    def kinds(self) -> list[str]:
        return [outcome.kind for outcome in self.outcomes]


@pytest.fixture
def publishing() -> Publishing:
    return Publishing()


def test_a_publish_that_is_cancelled_before_it_is_sent_has_failed(publishing: Publishing) -> None:
    pending = publishing.submit()
    publishing.publisher.abandon(pending, CANCELLED)
    assert publishing.kinds == ["failed"]
    assert publishing.outcomes[0].error is CANCELLED
    assert not publishing.publisher.busy


def test_a_publish_that_is_cancelled_after_it_was_sent_is_reported_with_its_confirm(publishing: Publishing) -> None:
    pending = publishing.submit()
    publishing.send()
    publishing.publisher.abandon(pending, CANCELLED)
    assert publishing.kinds == []
    assert publishing.publisher.busy
    publishing.confirm()
    assert publishing.kinds == ["published"]
    assert not publishing.publisher.busy


def test_a_publish_that_is_cancelled_after_its_confirm_was_published(publishing: Publishing) -> None:
    pending = publishing.submit()
    publishing.send()
    publishing.confirm()
    assert publishing.kinds == []  # its caller reports it
    publishing.publisher.abandon(pending, CANCELLED)
    assert publishing.kinds == ["published"]


def test_a_cancelled_publish_has_failed_if_its_connection_is_lost_before_the_confirm(publishing: Publishing) -> None:
    pending = publishing.submit()
    publishing.send()
    publishing.publisher.abandon(pending, CANCELLED)
    publishing.publisher.lost(ConnectionResetError("the broker has gone"))
    assert publishing.kinds == ["failed"]
    assert isinstance(publishing.outcomes[0].error, ConnectionResetError)


def test_a_publish_that_timed_out_has_no_second_outcome_when_its_confirm_arrives(publishing: Publishing) -> None:
    pending = publishing.submit()
    publishing.send()
    with pytest.raises(errors.PublishTimeout):
        publishing.publisher.outcome(pending, 1.0, False)
    publishing.confirm()
    assert publishing.kinds == ["failed"]


def test_a_copy_for_a_retry_has_no_outcome_here(publishing: Publishing) -> None:
    pending = publishing.submit("shop.internal")
    publishing.send()
    publishing.confirm()
    publishing.publisher.outcome(pending, 1.0, True)
    assert publishing.kinds == []


def test_the_event_of_a_publish_is_known_before_its_message_is_read(
    publishing: Publishing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading the whole message costs several microseconds."""
    publishing.publisher.abandon(publishing.submit(), CANCELLED)
    (outcome,) = publishing.outcomes
    with monkeypatch.context() as unreadable:
        unreadable.delattr(codec, "read_message")
        assert outcome.message.event == "order.placed"
    assert (outcome.message.id, outcome.message.event) == ("7", "order.placed")
