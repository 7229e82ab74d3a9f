"""The publisher over a scripted connection: confirms, returns, refusals, and messages that cannot be encoded."""

from __future__ import annotations

import asyncio
import atexit
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import amqp.exceptions
import anyio
import anyio.to_thread
import pytest

from lightbus import Receipt, errors
from lightbus.connection.dial import BrokerAddresses
from lightbus.message import new_id
from lightbus.publishing.confirms import WINDOW
from lightbus.publishing.publisher import Publisher, close_at_exit
from lightbus.transport import Publication, Unencodable
from tests.patience import LIMIT, wait_until, within

Script = Callable[["ScriptedChannel", int, Publication], None]


class ScriptedChannel:
    """Accepts what is published, and answers each message as scripted, in the connection's thread."""

    def __init__(self, connection: ScriptedConnection) -> None:
        self.connection = connection
        self.tag = 0

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **options: arguments[0] if name.startswith("prepare") else None

    def publish(self, publications: Sequence[Publication]) -> None:
        for publication in publications:
            if "unencodable" in publication.properties["headers"]:
                raise Unencodable("the property headers cannot be encoded", publication)
        for publication in publications:
            self.tag += 1
            self.connection.broker.published.append(publication)
            self.connection.answers.append((self, self.tag, publication))
        self.connection.interrupt()


class ScriptedConnection:
    blocked = False

    def __init__(self, broker: ScriptedBroker) -> None:
        self.broker = broker
        self.answers: list[tuple[ScriptedChannel, int, Publication]] = []
        self.woken = threading.Event()

    def channel(self) -> ScriptedChannel:
        return ScriptedChannel(self)

    def drain_events(self, timeout: float | None = None) -> None:
        if not self.woken.wait(timeout):
            raise TimeoutError
        self.woken.clear()
        answers, self.answers = self.answers, []
        for answer in answers:
            self.broker.script(*answer)

    def interrupt(self) -> None:
        self.woken.set()

    def watched(self) -> None: ...

    def heartbeat_tick(self) -> None: ...

    def close(self) -> None: ...

    def collect(self) -> None: ...


class ScriptedBroker:
    masked = "scripted://"
    addresses = BrokerAddresses.parse("memory://scripted").addresses
    worked = False

    def __init__(self) -> None:
        self.script: Script = ack
        self.published: list[Publication] = []
        self.connections = 0
        self.away = threading.Event()
        self.why: errors.BrokerError = errors.BrokerUnreachable("nobody is there")

    def warn_if_unset(self) -> None: ...

    def connect(self, name: str, **options: Any) -> ScriptedConnection:
        if self.away.is_set():
            raise self.why
        self.connections += 1
        return ScriptedConnection(self)


def ack(channel: ScriptedChannel, tag: int, publication: Publication) -> None:
    channel.on_ack(tag, False)


def one_is_gone(channel: ScriptedChannel, tag: int, publication: Publication) -> None:
    if publication.routing_key == "gone":
        channel.on_return(publication.properties["message_id"])
    channel.on_ack(tag, False)


def publication(headers: dict[str, Any] | None = None, message_id: str | None = None, key: str = "a.b") -> Publication:
    return Publication(
        "billing", key, b"{}", {"message_id": message_id or new_id(), "headers": headers or {}, "type": key}
    )


@pytest.fixture
def broker() -> ScriptedBroker:
    return ScriptedBroker()


@pytest.fixture
def publisher(broker: ScriptedBroker) -> Iterator[Publisher]:
    publisher = Publisher("billing", cast(BrokerAddresses, broker), timeout=LIMIT, queue_type="quorum")
    yield publisher
    publisher.close(0.1)


def test_a_confirm_becomes_a_receipt(publisher: Publisher) -> None:
    one = publication()
    assert publisher.publish_sync(one) == Receipt(one.properties["message_id"], routed=True)


def test_a_return_before_the_ack_means_that_no_queue_received_it(publisher: Publisher, broker: ScriptedBroker) -> None:
    def unroutable(channel: ScriptedChannel, tag: int, publication: Publication) -> None:
        channel.on_return(publication.properties["message_id"])
        channel.on_ack(tag, False)

    broker.script = unroutable
    assert publisher.publish_sync(publication()).routed is False


def test_a_nack_fails_its_message_only(publisher: Publisher, broker: ScriptedBroker) -> None:
    def full(channel: ScriptedChannel, tag: int, publication: Publication) -> None:
        (channel.on_nack if publication.routing_key == "full" else channel.on_ack)(tag, False)

    broker.script = full
    with pytest.raises(errors.PublishManyError) as caught:
        publisher.publish_many_sync([publication(), publication(key="full"), publication()])
    assert [type(outcome) for outcome in caught.value.outcomes] == [Receipt, errors.PublishNacked, Receipt]


def test_one_multiple_ack_confirms_all_up_to_it(publisher: Publisher, broker: ScriptedBroker) -> None:
    def every_tenth(channel: ScriptedChannel, tag: int, publication: Publication) -> None:
        if tag % 10 == 0:
            channel.on_ack(tag, True)

    broker.script = every_tenth
    many = [publication() for _ in range(100)]
    receipts = publisher.publish_many_sync(many)
    assert [receipt.id for receipt in receipts] == [one.properties["message_id"] for one in many]


def test_confirms_out_of_order_reach_the_right_message(publisher: Publisher, broker: ScriptedBroker) -> None:
    waiting: list[tuple[ScriptedChannel, int, Publication]] = []

    def backwards(*answer: Any) -> None:
        waiting.append(answer)
        if len(waiting) == 20:
            for channel, tag, publication in reversed(waiting):
                if tag % 2:
                    channel.on_return(publication.properties["message_id"])
                channel.on_ack(tag, False)

    broker.script = backwards
    receipts = publisher.publish_many_sync([publication() for _ in range(20)])
    assert [receipt.routed for receipt in receipts] == [False, True] * 10


def test_after_a_lost_connection_unconfirmed_messages_are_published_again_with_the_same_id(
    publisher: Publisher, broker: ScriptedBroker
) -> None:
    def dies_once(channel: ScriptedChannel, tag: int, publication: Publication) -> None:
        if broker.connections == 1:
            raise ConnectionResetError("peer")
        channel.on_ack(tag, False)

    broker.script = dies_once
    one = publication()
    assert publisher.publish_sync(one).routed
    assert [sent.properties["message_id"] for sent in broker.published] == [one.properties["message_id"]] * 2


def test_a_message_that_cannot_be_encoded_is_refused_and_does_not_block_others(publisher: Publisher) -> None:
    with pytest.raises(errors.PublishRefused, match="cannot be encoded"):
        publisher.publish_sync(publication({"unencodable": 1}), timeout=LIMIT)
    assert publisher.publish_sync(publication(), timeout=LIMIT).routed


def test_among_many_only_the_one_that_cannot_be_encoded_is_refused(publisher: Publisher) -> None:
    many = [publication({"unencodable": 1} if place == 7 else None) for place in range(20)]
    with pytest.raises(errors.PublishManyError) as caught:
        publisher.publish_many_sync(many, timeout=LIMIT)
    refused = [place for place, one in enumerate(caught.value.outcomes) if isinstance(one, errors.PublishRefused)]
    assert refused == [7]


def test_of_several_messages_the_one_that_the_broker_refuses_is_found(
    publisher: Publisher, broker: ScriptedBroker
) -> None:
    def refuses(channel: ScriptedChannel, tag: int, publication: Publication) -> None:
        if publication.routing_key == "bad":
            raise amqp.exceptions.PreconditionFailed("invalid expiration")
        channel.on_ack(tag, False)

    broker.script = refuses
    with pytest.raises(errors.PublishManyError) as caught:
        publisher.publish_many_sync([publication(), publication(key="bad"), publication()], timeout=LIMIT)
    assert [type(one) for one in caught.value.outcomes] == [Receipt, errors.PublishRefused, Receipt]


def test_of_two_messages_with_one_id_each_gets_its_own_return(publisher: Publisher, broker: ScriptedBroker) -> None:
    """Two handlers of one delivery that fail together publish copies with one message id."""

    broker.script = one_is_gone
    for keys in (["gone", "there"], ["there", "gone"]):
        message_id = new_id()
        receipts = publisher.publish_many_sync([publication(message_id=message_id, key=key) for key in keys])
        assert [receipt.routed for receipt in receipts] == [key == "there" for key in keys]


def test_a_message_that_is_never_confirmed_blocks_neither_others_nor_its_own_next_attempt(
    publisher: Publisher, broker: ScriptedBroker
) -> None:
    first_try = True

    def forgets_once(channel: ScriptedChannel, tag: int, publication: Publication) -> None:
        nonlocal first_try
        if publication.properties["message_id"] == "lost" and first_try:
            first_try = False
        else:
            channel.on_ack(tag, False)

    broker.script = forgets_once
    with ThreadPoolExecutor(1) as threads:
        lost = threads.submit(publisher.publish_sync, publication(message_id="lost"), timeout=5)
        wait_until(lambda: broker.published, "it is sent")
        assert publisher.publish_sync(publication(), timeout=LIMIT).routed
        assert not lost.done()
        assert isinstance(lost.exception(), errors.PublishTimeout)
    assert publisher.publish_sync(publication(message_id="lost"), timeout=LIMIT).routed


def test_a_timeout_of_a_sent_message_has_an_unknown_outcome(publisher: Publisher, broker: ScriptedBroker) -> None:
    broker.script = lambda *answer: None
    publisher.open(LIMIT)
    began = time.monotonic()
    with within(2), pytest.raises(errors.PublishTimeout, match="outcome is unknown"):
        publisher.publish_sync(publication(), timeout=2)
    assert time.monotonic() - began >= 2


def test_the_refused_message_may_be_an_abandoned_one(publisher: Publisher, broker: ScriptedBroker) -> None:
    given_up = threading.Event()

    def refuses_late(channel: ScriptedChannel, tag: int, publication: Publication) -> None:
        if any(sent.routing_key == "bad" for sent in broker.published) and broker.connections == 1:
            if publication.routing_key != "bad":
                assert given_up.wait(LIMIT)
                raise amqp.exceptions.PreconditionFailed("invalid expiration")
        else:
            channel.on_ack(tag, False)

    broker.script = refuses_late
    assert publisher.publish_sync(publication()).routed
    with ThreadPoolExecutor(2) as threads:
        bad = threads.submit(publisher.publish_sync, publication(key="bad"), timeout=3)
        wait_until(lambda: len(broker.published) == 2, "it is sent")
        assert isinstance(bad.exception(LIMIT), errors.PublishTimeout)
        innocent = threads.submit(publisher.publish_sync, publication())
        wait_until(lambda: len(broker.published) == 3, "both are in flight")
        given_up.set()
        assert innocent.result(LIMIT).routed


@pytest.mark.parametrize("how", ["publish_sync", "publish_many_sync", "publish", "publish_many"])
@pytest.mark.parametrize(
    ("state", "kind"),
    [
        ("no connection", errors.PublishUnreachable),
        ("no confirm", errors.PublishTimeout),
        ("alarm", errors.PublishBlocked),
        ("nack", errors.PublishNacked),
        ("not encodable", errors.PublishRefused),
    ],
)
def test_all_ways_to_publish_fail_with_the_same_error(
    publisher: Publisher,
    broker: ScriptedBroker,
    monkeypatch: pytest.MonkeyPatch,
    state: str,
    kind: type[errors.PublishError],
    how: str,
) -> None:
    def nack(channel: ScriptedChannel, tag: int, publication: Publication) -> None:
        channel.on_nack(tag, False)

    publisher.open(LIMIT)
    match state:
        case "no connection":
            publisher.close()
            broker.away.set()
        case "no confirm":
            broker.script = lambda *answer: None
        case "alarm":
            monkeypatch.setattr(ScriptedConnection, "blocked", True)
        case _:
            broker.script = nack
    one = publication({"unencodable": 1} if state == "not encodable" else None)
    timeout = LIMIT if state in ("nack", "not encodable") else 0.1
    with pytest.raises(errors.PublishError) as caught:
        publish_in_way(publisher, how, one, timeout)
    error = caught.value
    if isinstance(error, errors.PublishManyError):
        (error,) = error.outcomes  # type: ignore[assignment]
    assert type(error) is kind
    assert one.properties["message_id"] in str(error)
    assert not publisher.window.waiting


def test_each_caller_gets_its_own_error_when_the_publisher_is_closed(
    publisher: Publisher, broker: ScriptedBroker
) -> None:
    broker.script = lambda *answer: None
    with ThreadPoolExecutor(2) as threads:
        stopped = [threads.submit(publisher.publish_sync, publication()) for _ in range(2)]
        wait_until(lambda: len(broker.published) == 2, "both are sent")
        publisher.close(0.1)
        first, second = (one.exception(LIMIT) for one in stopped)
    assert isinstance(first, errors.PublisherClosed)
    assert isinstance(second, errors.PublisherClosed)
    assert first is not second


@pytest.mark.parametrize("how", ["timeout", "cancelled", "cancelled among many", "interrupted among many"])
def test_an_abandoned_message_is_removed(publisher: Publisher, broker: ScriptedBroker, how: str) -> None:
    """In a long outage it would fill the memory, delay the program's end, and be sent later than anybody expects."""

    def interrupted() -> Iterator[Publication]:
        yield from (publication() for _ in range(3))
        raise KeyboardInterrupt

    async def cancelled() -> None:
        with anyio.move_on_after(0.01):
            await publisher.publish(publication())

    async def cancelled_among_many() -> None:
        with anyio.move_on_after(0.01):
            await publisher.publish_many([publication() for _ in range(1500)])

    broker.away.set()
    match how:
        case "timeout":
            with pytest.raises(errors.PublishUnreachable):
                publisher.publish_sync(publication(), timeout=0.01)
        case "cancelled":
            anyio.run(cancelled)
        case "cancelled among many":
            anyio.run(cancelled_among_many)
        case _:
            with pytest.raises(KeyboardInterrupt):
                publisher.publish_many_sync(cast(Sequence[Publication], interrupted()))
    assert not publisher.window.waiting
    broker.away.clear()
    one = publication()
    assert publisher.publish_sync(one).routed
    assert broker.published == [one]


def _publish_and_cancel(publisher: Publisher, broker: ScriptedBroker, count: int, how: str) -> None:
    """Publish `count` messages that the broker does not confirm, and cancel once all are sent."""
    broker.script = lambda *answer: None

    def wait_until_sent() -> None:
        wait_until(lambda: len(broker.published) == count, "all are sent")

    async def cancel_all() -> None:
        async with anyio.create_task_group() as tasks:
            if how == "one by one":
                for _ in range(count):
                    tasks.start_soon(publisher.publish, publication())
            else:
                tasks.start_soon(publisher.publish_many, [publication() for _ in range(count)])
            await anyio.to_thread.run_sync(wait_until_sent)
            tasks.cancel_scope.cancel()

    def interrupted() -> Iterator[Publication]:
        yield from (publication() for _ in range(count))
        wait_until_sent()
        raise KeyboardInterrupt

    if how == "among many, without an event loop":
        with pytest.raises(KeyboardInterrupt):
            publisher.publish_many_sync(cast(Sequence[Publication], interrupted()))
    else:
        anyio.run(cancel_all)


@pytest.mark.parametrize("how", ["one by one", "among many", "among many, without an event loop"])
def test_a_message_that_was_cancelled_after_it_was_sent_is_not_sent_again(
    publisher: Publisher, broker: ScriptedBroker, how: str
) -> None:
    def dies_once(channel: ScriptedChannel, tag: int, publication: Publication) -> None:
        if broker.connections == 1:
            raise ConnectionResetError("peer")
        channel.on_ack(tag, False)

    _publish_and_cancel(publisher, broker, 20, how)
    broker.script = dies_once
    one = publication()
    assert publisher.publish_sync(one).routed
    assert broker.published[20:] == [one, one]


@pytest.mark.parametrize("how", ["one by one", "among many"])
def test_a_window_full_of_cancelled_messages_does_not_stop_the_publisher(
    publisher: Publisher, broker: ScriptedBroker, how: str
) -> None:
    """Web clients that disconnect while the broker confirms nothing."""
    _publish_and_cancel(publisher, broker, WINDOW, how)
    broker.script = ack
    one = publication()
    with within(1):
        assert publisher.publish_sync(one).routed
    assert broker.published[WINDOW:] == [one]


def test_if_no_thread_can_be_started_nothing_is_sent_later(
    publisher: Publisher, broker: ScriptedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")  # Linux, at a container's pids limit

    async def publish() -> None:
        await publisher.publish(publication())

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        for attempt in (lambda: publisher.publish_sync(publication()), lambda: anyio.run(publish)):
            with pytest.raises(
                errors.PublishUnreachable,
                match=r"was not sent: the thread that connects could not be started.*pids limit",
            ):
                attempt()
    one = publication()
    assert publisher.publish_sync(one).routed
    assert broker.published == [one]


def publish_in_way(publisher: Publisher, how: str, one: Publication, timeout: float | None = None) -> None:
    """Publish by any of the four methods, where no event loop runs."""

    async def publish() -> None:
        await publisher.publish(one, timeout=timeout)

    async def publish_many() -> None:
        await publisher.publish_many([one], timeout=timeout)

    match how:
        case "publish":
            asyncio.run(publish())
        case "publish_many":
            asyncio.run(publish_many())
        case "publish_many_sync":
            publisher.publish_many_sync([one], timeout=timeout)
        case _:
            publisher.publish_sync(one, timeout=timeout)


@pytest.mark.parametrize("how", ["publish_sync", "publish_many_sync", "publish", "publish_many"])
def test_a_logging_handler_that_publishes_in_the_connections_own_thread_gets_an_error_at_once(
    publisher: Publisher, broker: ScriptedBroker, how: str
) -> None:
    failures: list[Exception] = []

    class ToTheBus(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            try:
                publish_in_way(publisher, how, publication(key="log.written"))
            except errors.PublishError as error:
                failures.append(error)

    def dies_once(channel: ScriptedChannel, tag: int, publication: Publication) -> None:
        if broker.connections == 1:
            raise ConnectionResetError("peer")
        channel.on_ack(tag, False)

    broker.script = dies_once
    to_the_bus = ToTheBus(logging.WARNING)
    logging.getLogger("lightbus").addHandler(to_the_bus)
    try:
        assert publisher.publish_sync(publication()).routed
    finally:
        logging.getLogger("lightbus").removeHandler(to_the_bus)
    assert [type(failure) for failure in failures] == [errors.PublishWouldDeadlock]
    assert "QueueHandler" in str(failures[0])
    assert broker.connections == 2


def test_a_signal_handler_that_interrupts_a_send_of_its_thread_gets_an_error_at_once(
    publisher: Publisher, broker: ScriptedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: list[Exception] = []

    def publish_nowait(channel: ScriptedChannel, publications: Sequence[Publication]) -> bool:
        if not failures:  # as a signal handler that runs here
            with pytest.raises(errors.PublishWouldDeadlock, match="Set a flag") as caught:
                publisher.publish_sync(publication(key="stopping"))
            failures.append(caught.value)
        channel.publish(publications)
        return True

    monkeypatch.setattr(ScriptedChannel, "publish_nowait", publish_nowait, raising=False)
    publisher.open(LIMIT)
    one = publication()
    assert publisher.publish_sync(one).routed
    assert (len(failures), broker.published, broker.connections) == (1, [one], 1)


def test_a_signal_handler_that_interrupts_the_start_of_the_thread_gets_an_error_at_once(
    publisher: Publisher, broker: ScriptedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def interrupted_start(thread: threading.Thread) -> None:
        with pytest.raises(errors.PublishWouldDeadlock):
            publisher.publish_sync(publication(key="stopping"))
        start(thread)

    one = publication()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", interrupted_start)
        assert publisher.publish_sync(one).routed
    assert broker.published == [one]


FATAL = [errors.AccessRefused, errors.TLSRefused, errors.TopologyConflict, errors.BrokerFileError]


@pytest.mark.parametrize("kind", FATAL)
def test_a_refusal_of_the_first_connection_fails_at_once(
    publisher: Publisher, broker: ScriptedBroker, kind: type[errors.BrokerError]
) -> None:
    broker.why = kind("the password is wrong")
    broker.away.set()
    with within(0), pytest.raises(errors.PublisherRefused, match=r"not sent\. the password is wrong") as refused:
        publisher.publish_sync(publication(), timeout=LIMIT)
    assert refused.value.__cause__ is broker.why


@pytest.mark.parametrize("kind", FATAL)
def test_after_a_connection_that_worked_a_refusal_is_retried_until_the_timeout(
    publisher: Publisher, broker: ScriptedBroker, kind: type[errors.BrokerError]
) -> None:
    publisher.open(LIMIT)
    publisher.close()
    broker.why = kind("the password is wrong")
    broker.away.set()
    with within(5), pytest.raises(errors.PublishUnreachable, match=r"within 5 s\. the password is wrong") as late:
        publisher.publish_sync(publication(), timeout=5)
    assert late.value.__cause__ is broker.why
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(publisher.publish_sync, publication(), timeout=LIMIT)
        wait_until(lambda: publisher.error is broker.why, "it was refused")
        assert not waiting.done()
        broker.away.clear()
        assert waiting.result(LIMIT).routed


def test_an_unknown_outcome_after_a_lost_connection_names_the_reason_for_the_outage(
    publisher: Publisher, broker: ScriptedBroker
) -> None:
    def dies(channel: ScriptedChannel, tag: int, publication: Publication) -> None:
        broker.why = errors.AccessRefused("the password is wrong")
        broker.away.set()
        raise ConnectionResetError("peer")

    broker.script = dies
    with pytest.raises(errors.PublishTimeout, match=r"outcome is unknown.*the password is wrong"):
        publisher.publish_sync(publication(), timeout=5)


@pytest.mark.parametrize(
    ("refusal", "kind"),
    [
        (amqp.exceptions.PreconditionFailed("invalid expiration"), errors.PublishRefused),
        (amqp.exceptions.AccessRefused("access to exchange refused"), errors.PublisherRefused),
        (amqp.exceptions.NotFound("no exchange"), errors.PublisherRefused),
    ],
)
def test_a_refused_message_and_a_refused_publisher_are_different_errors(
    publisher: Publisher, broker: ScriptedBroker, refusal: Exception, kind: type[errors.PublishError]
) -> None:
    def refuses(channel: ScriptedChannel, tag: int, publication: Publication) -> None:
        raise refusal

    broker.script = refuses
    with pytest.raises(errors.PublishRefused) as refused:
        publisher.publish_sync(publication(), timeout=LIMIT)
    assert type(refused.value) is kind


def test_confirms_are_right_after_a_caller_was_interrupted_while_sending(
    publisher: Publisher, broker: ScriptedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a signal handler: Ctrl-C in a shell, the time limit of a job."""
    interruptions = [KeyboardInterrupt]

    def publish_nowait(channel: ScriptedChannel, publications: Sequence[Publication]) -> bool:
        if interruptions:
            raise interruptions.pop()
        channel.publish(publications)
        return True

    monkeypatch.setattr(ScriptedChannel, "publish_nowait", publish_nowait, raising=False)
    publisher.open(LIMIT)
    with pytest.raises(KeyboardInterrupt):
        publisher.publish_sync(publication())
    broker.script = one_is_gone
    for key in ("gone", "there", "gone"):
        assert publisher.publish_sync(publication(key=key)).routed == (key == "there")
    assert broker.connections == 2


def test_a_caller_that_was_interrupted_just_before_sending_blocks_nobody(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher.open(LIMIT)

    class Interrupted:
        lock: Any = publisher.sending

        def acquire(self, *, blocking: bool) -> bool:
            assert self.lock.acquire(blocking=True)
            raise KeyboardInterrupt

        def release(self) -> None:
            self.lock.release()

        def __enter__(self) -> None:
            self.lock.acquire()

        def __exit__(self, *_: object) -> None:
            self.lock.release()

    with monkeypatch.context() as patched:
        patched.setattr(publisher, "sending", Interrupted())
        with pytest.raises(KeyboardInterrupt):
            publisher.publish_sync(publication())
    assert publisher.publish_sync(publication()).routed


def test_a_publisher_that_could_not_be_closed_in_time_publishes_again_later(
    publisher: Publisher, broker: ScriptedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, asked = threading.Event(), threading.Event()

    def answer_late(name: str) -> ScriptedConnection:
        asked.set()
        answers.wait(LIMIT)
        raise errors.BrokerUnreachable("no answer in time")

    with monkeypatch.context() as patched:
        patched.setattr(broker, "connect", answer_late)
        with pytest.raises(errors.PublishUnreachable):
            publisher.publish_sync(publication(), timeout=0.01)
        assert asked.wait(LIMIT)
        publisher.close(0.01)
        assert publisher.alive
    answers.set()
    wait_until(lambda: not publisher.alive, "its thread has ended")
    assert publisher.publish_sync(publication()).routed


def test_an_interruption_at_the_start_leaves_one_thread(
    publisher: Publisher, broker: ScriptedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start
    others = {*threading.enumerate()}

    def started_and_interrupted(thread: threading.Thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", started_and_interrupted)
        with pytest.raises(KeyboardInterrupt):
            publisher.publish_sync(publication())
    assert publisher.publish_sync(publication()).routed
    started = [thread.name for thread in threading.enumerate() if thread not in others]
    assert started.count(publisher.name) == 1


def test_many_threads_each_get_their_own_receipt(publisher: Publisher) -> None:
    with ThreadPoolExecutor(16) as threads:
        many = [publication() for _ in range(400)]
        receipts = list(threads.map(publisher.publish_sync, many))
    assert [receipt.id for receipt in receipts] == [one.properties["message_id"] for one in many]


def test_a_second_interruption_ends_the_wait_at_exit_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    at_exit: list[Callable[[], None]] = []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    interrupted = []

    def close(self: Publisher) -> None:
        interrupted.append(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(Publisher, "close", close)
    publisher = Publisher("billing", BrokerAddresses("memory://"), timeout=1, queue_type="classic")
    close_at_exit(publisher)
    at_exit[-1]()
    assert interrupted == [publisher]
