"""A connection's life on a clock of its own, and what errors become in words."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Callable
from typing import Any, cast

import amqp.exceptions
import pytest

from lightbus import errors
from lightbus.connection import dial, thread
from lightbus.connection.address import parse_address
from lightbus.connection.diagnosis import FATAL, describe
from lightbus.connection.dial import BrokerAddresses
from lightbus.connection.thread import ConnectionThread
from lightbus.transport import Connection
from tests.patience import LIMIT, wait_until

ADDRESS = parse_address("amqp://ann:secret@rabbit/shop")


# --- backoff ----------------------------------------------------------------------------------


class Clock:
    waiting: Retrying
    """The thread whose pauses pass on this clock."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


class Retrying(ConnectionThread):
    """Connects by calling `connecting`, and stops after some pauses, which pass on a clock that nothing else moves."""

    def __init__(self, clock: Clock, connecting: Callable[[], Connection], attempts: int) -> None:
        super().__init__(cast(BrokerAddresses, Connecting(connecting)), "test")
        clock.waiting = self
        self.attempts = attempts
        self.pauses: list[float] = []

    def opened(self, connection: Connection) -> None: ...

    def work(self) -> float:
        return 0.0


class Connecting:
    """The broker's addresses, and what connecting to them does."""

    addresses = BrokerAddresses.parse("memory://never").addresses
    worked = False

    def __init__(self, connecting: Callable[[], Connection]) -> None:
        self.connecting = connecting

    def connect(self, name: str) -> Connection:
        return self.connecting()


class ClockedWakeUp:
    """Nobody sets it: each wait lasts for its whole time, on the clock."""

    clock: Clock

    def clear(self) -> None: ...

    def wait(self, seconds: float) -> bool:
        thread = self.clock.waiting
        thread.pauses.append(seconds)
        self.clock.now += seconds
        thread.stopping = len(thread.pauses) == thread.attempts
        return False


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (dial, thread):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(thread, "WakeUp", type("WakeUp", (ClockedWakeUp,), {"clock": clock}))
    monkeypatch.setattr(thread.random, "uniform", lambda low, high: high)  # pyright: ignore
    return clock


def test_pauses_grow_also_where_each_attempt_takes_longer_than_a_pause(clock: Clock) -> None:
    def times_out() -> Connection:
        clock.now += 15
        raise errors.BrokerUnreachable("no answer in time")

    thread = Retrying(clock, times_out, attempts=8)
    thread.run()
    assert thread.pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0])


@pytest.mark.parametrize(("open_for", "pauses"), [(1.0, [0.1, 0.2, 0.4]), (6.0, [0.1, 0.1, 0.1])])
def test_pauses_are_short_again_after_a_connection_that_was_open_for_a_while(
    clock: Clock, open_for: float, pauses: list[float]
) -> None:
    class Brief:
        def drain_events(self, timeout: float) -> None:
            clock.now += open_for
            raise ConnectionResetError("peer")

        def collect(self) -> None: ...

    def connects() -> Connection:
        clock.now += 15  # connecting does not count
        return cast(Connection, Brief())

    thread = Retrying(clock, connects, attempts=3)
    thread.run()
    assert thread.pauses == pytest.approx(pauses)


# --- limits -----------------------------------------------------------------------------------

LIMITS = {
    "NOT_ALLOWED - connection refused for user 'ann': user connection limit (1) is reached": "set_user_limits",
    "NOT_ALLOWED - access to vhost 'shop' refused for user 'ann': connection limit (1) is reached": "set_vhost_limits",
    "NOT_ALLOWED - connection refused: node connection limit (100) is reached": "rabbitmq.conf",
    "NOT_ALLOWED - number of channels opened for user 'ann' has reached the maximum allowed user limit of (4)": "raise",
    "NOT_ALLOWED - number of channels opened (8) has reached the negotiated channel_max (8)": "rabbitmq.conf",
    "PRECONDITION_FAILED - cannot declare queue 'q': queue limit in vhost 'shop' (3) is reached": "Delete unused",
}


@pytest.mark.parametrize("words", LIMITS)
def test_a_limit_is_named_with_its_way_out_and_is_worth_another_try(words: str) -> None:
    kind = amqp.exceptions.PreconditionFailed if words.startswith("PRECONDITION") else amqp.exceptions.NotAllowed
    described = describe(cast(Any, kind)(words), ADDRESS)
    assert isinstance(described, errors.LimitReached)
    assert not isinstance(described, FATAL)
    said = str(described)
    assert words in said
    assert LIMITS[words] in said
    assert "add_vhost" not in said
    assert "other arguments" not in said


@pytest.mark.parametrize(
    "words",
    [
        "NOT_ALLOWED - vhost shop not found",
        "NOT_ALLOWED - access to vhost 'shop' refused for user 'ann'",
    ],
)
def test_a_virtual_host_that_may_not_be_used_is_no_limit(words: str) -> None:
    described = describe(cast(Any, amqp.exceptions.NotAllowed)(words), ADDRESS)
    assert isinstance(described, errors.AccessRefused)
    assert "add_vhost" in str(described)


# As RabbitMQ 3.10 says it; those of 4.x differ in words after the name of the code only.
ANSWERS: dict[str, tuple[Any, type[errors.BrokerError], str]] = {
    "PRECONDITION_FAILED - inequivalent arg 'x-queue-type' for queue 'q' in vhost '/': received 'classic' but current "
    "is 'quorum'": (
        amqp.exceptions.PreconditionFailed,
        errors.TopologyConflict,
        "rabbitmqctl delete_queue --vhost shop q",
    ),
    "PRECONDITION_FAILED - inequivalent arg 'type' for exchange 'shop' in vhost '/': received 'direct' but current is "
    "'topic'": (amqp.exceptions.PreconditionFailed, errors.TopologyConflict, "delete the exchange"),
    "PRECONDITION_FAILED - message size 17000000 is larger than configured max size 16777216": (
        amqp.exceptions.PreconditionFailed,
        errors.LimitReached,
        "max_message_size",
    ),
    "PRECONDITION_FAILED - delivery acknowledgement on channel 1 timed out. Timeout value used: 1800000 ms": (
        amqp.exceptions.PreconditionFailed,
        errors.LimitReached,
        "consumer_timeout",
    ),
    "PRECONDITION_FAILED - invalid arg 'x-delivery-limit' for queue 'q' in vhost '/' of queue type rabbit_x": (
        amqp.exceptions.PreconditionFailed,
        errors.UnsupportedBroker,
        "enable_feature_flag",
    ),
    "PRECONDITION_FAILED - unknown delivery tag 77": (
        amqp.exceptions.PreconditionFailed,
        errors.BrokerError,
        "list_policies",
    ),
    "INTERNAL_ERROR - Cannot declare a queue 'queue 'q' in vhost '/'' on node 'r@a': nodedown": (
        amqp.exceptions.InternalError,
        errors.BrokerUnreachable,
        "cluster_status",
    ),
    "INTERNAL_ERROR - Feature `transient_nonexcl_queues` is deprecated.": (
        amqp.exceptions.InternalError,
        errors.UnsupportedBroker,
        "feature_flag",
    ),
    "INTERNAL_ERROR - access to vhost 'v' refused for user 'ann': vhost 'v' is down": (
        amqp.exceptions.InternalError,
        errors.BrokerUnreachable,
        "restart_vhost",
    ),
    "INTERNAL_ERROR - cannot declare queue 'q': queue limit in vhost 'v' (3) is reached": (
        amqp.exceptions.InternalError,
        errors.LimitReached,
        "set_vhost_limits",
    ),
    "COMMAND_INVALID - unknown exchange type 'x-delayed-message'": (
        amqp.exceptions.InvalidCommand,
        errors.UnsupportedBroker,
        "3.10 to 4.x",
    ),
    "NOT_ALLOWED - attempt to reuse consumer tag 'a'": (amqp.exceptions.NotAllowed, errors.BrokerError, "report it"),
    "NOT_FOUND - home node 'r@a' of durable queue 'q' in vhost '/' is down or inaccessible": (
        amqp.exceptions.NotFound,
        errors.BrokerUnreachable,
        "cluster_status",
    ),
    "NOT_FOUND - no queue 'q' in vhost '/'": (amqp.exceptions.NotFound, errors.TopologyMissing, "Start a worker"),
    "RESOURCE_LOCKED - cannot obtain exclusive access to locked queue 'q' in vhost '/'": (
        amqp.exceptions.ResourceLocked,
        errors.TopologyConflict,
        "owner_pid",
    ),
    "RESOURCE_ERROR - no more": (amqp.exceptions.ResourceError, errors.LimitReached, "alarms"),
    "CONNECTION_FORCED - broker forced connection closure with reason 'shutdown'": (
        amqp.exceptions.ConnectionForced,
        errors.BrokerUnreachable,
        "is shutting down",
    ),
}


@pytest.mark.parametrize("words", ANSWERS)
def test_an_answer_is_described_by_what_the_broker_said_with_a_next_step_that_fits(words: str) -> None:
    raised, expected, step = ANSWERS[words]
    described = describe(raised(words, (10, 50), "Connection.close"), ADDRESS)
    assert type(described) is expected
    assert words.rstrip(".") in str(described)
    assert step in str(described)
    assert "secret" not in str(described)
    assert ("other arguments" in str(described)) == ("inequivalent arg" in words)


@pytest.mark.parametrize(("number", "whose"), [(errno.EMFILE, "this process"), (errno.ENFILE, "this machine")])
def test_a_lack_of_descriptors_is_not_blamed_on_the_broker(number: int, whose: str) -> None:
    described = describe(OSError(number, "Too many open files"), ADDRESS)
    assert isinstance(described, errors.LimitReached)
    assert f"{whose} has too many open files" in str(described)
    assert "broker running" not in str(described)


def test_a_lack_of_descriptors_is_not_blamed_on_the_certificates_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_more(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("builtins.open", no_more)
    with pytest.raises(errors.LimitReached, match="too many open files"):
        BrokerAddresses.parse("amqps://127.0.0.1:1/?cafile=/ca.pem").connect("test")


# --- addresses --------------------------------------------------------------------------------


def test_a_name_that_cannot_be_looked_up_does_not_keep_the_others_from_being_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    for _ in range(4):  # their order is random
        BrokerAddresses.parse(["amqp://nowhere.invalid/", "memory://here"]).connect("test").close()
    with pytest.raises(errors.BrokerUnreachable, match=r"one\.invalid.*two\.invalid|two\.invalid.*one\.invalid"):
        BrokerAddresses.parse(["amqp://one.invalid/", "amqp://two.invalid/"]).connect("test")


def test_what_failed_comes_last_for_a_minute(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    failing = {"one"}

    def connect(endpoint: dial.Endpoint, name: str) -> Any:
        host = endpoint.address.url.removeprefix("memory://")
        tried.append(host)
        if host in failing:
            raise errors.BrokerUnreachable(host)
        return object()

    monkeypatch.setattr(dial, "_connect", connect)
    monkeypatch.setattr(dial.random, "sample", lambda population, k: list(population))  # pyright: ignore
    broker = BrokerAddresses.parse(["memory://one", "memory://two"])
    for _ in range(2):
        broker.connect("test")
    assert tried == ["one", "two", "two"]
    clock.now += 61
    broker.connect("test")
    assert tried[3:] == ["one", "two"]
    failing.clear()
    clock.now += 61
    broker.connect("test")
    broker.connect("test")
    assert tried[5:] == ["one", "one"]


# --- one thread at a time -----------------------------------------------------------------------


class Living(ConnectionThread):
    """Notes how many threads are in it at once."""

    def __init__(self) -> None:
        self.inside = self.most = 0
        self.ends = threading.Event()
        super().__init__(BrokerAddresses.parse("memory://never"), "test")

    def _live(self) -> None:
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.ends.wait(LIMIT)
        self.inside -= 1


class JobTooSlow(TimeoutError):
    """What a signal's handler raises."""


def test_a_start_that_was_interrupted_leaves_one_thread_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """So early that the first one does not count as alive yet: the next publish starts another."""
    started: list[threading.Thread] = []

    class Interrupted(threading.Thread):
        def start(self) -> None:
            super().start()
            started.append(self)
            if len(started) == 1:
                raise JobTooSlow

        def is_alive(self) -> bool:
            return super().is_alive() and self is not started[0]

    living = Living()
    with monkeypatch.context() as patched:
        patched.setattr(thread.threading, "Thread", Interrupted)
        with pytest.raises(JobTooSlow):
            living.ensure_started()
        living.ensure_started()
    first, second = started
    wait_until(lambda: living.inside, "a thread at work")
    second.join(0.3)  # in which it could begin to work, if it were to
    assert living.most == 1
    living.let_go()
    living.ends.set()
    for one in (first, second):
        threading.Thread.join(one, LIMIT)
        assert not threading.Thread.is_alive(one)
    assert living.most == 1
