"""Who reads a connection, its thread or an event loop: on a simulated clock, with a scripted loop and connection."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from lightbus.connection import reading
from lightbus.connection.loop_reader import Loop
from lightbus.connection.reading import TICK, SharedReading
from lightbus.connection.wake_up import WakeUp
from lightbus.transport import Connection


class ScriptedLoop:
    """asyncio's loop, as far as it is used: it runs when the test lets it."""

    def __init__(self) -> None:
        self.closed = False
        self.soon: list[Callable[[], object]] = []
        self.watched: Callable[[], object] | None = None

    def add_reader(self, descriptor: int, function: Callable[[], object]) -> None:
        self.watched = function

    def remove_reader(self, descriptor: int) -> None:
        self.watched = None

    def is_closed(self) -> bool:
        return self.closed

    def call_soon_threadsafe(self, function: Callable[[], object]) -> None:
        if self.closed:
            raise RuntimeError("Event loop is closed")
        self.soon.append(function)

    def run(self) -> None:
        soon, self.soon = self.soon, []
        for function in soon:
            function()


class ScriptedConnection:
    """A connection that a loop may watch."""

    may_wait = True

    def __init__(self) -> None:
        self.socket, self.peer = socket.socketpair()
        self.drained = 0
        self.on_unsent: Callable[[], object] | None = None

    def watched(self) -> ScriptedConnection:
        return self

    def fileno(self) -> int:
        return self.socket.fileno()

    def drain_events(self, timeout: float) -> None:
        self.drained += 1


class Owner:
    """A connection thread that runs in the test's own thread."""

    stopping = False

    def __init__(self) -> None:
        self.woken = 0
        self.error: Exception | None = None

    def wake(self) -> None:
        self.woken += 1

    def read_in_loop(self) -> None:
        if self.error is not None:
            raise self.error


class Scene:
    def __init__(self) -> None:
        self.now = 0.0
        self.native = ScriptedLoop()
        self.loop = new_loop(self.native)
        self.connection = ScriptedConnection()
        self.owner = Owner()
        self.wake_up = WakeUp()
        self.reading = SharedReading(self.wake_up)
        self.reading.using.acquire()  # the thread's, as in `ConnectionThread`

    def monotonic(self) -> float:
        return self.now

    def present(self) -> Any:
        return self.reading.present_reader(cast(Connection, self.connection), self.owner)

    def check(self) -> None:
        self.reading.check(cast(Connection, self.connection))

    def let_loop_read(self) -> Any:
        """Until the loop reads. Returns its reader."""
        assert self.reading.offer(self.loop)
        assert self.present() is None
        self.native.run()
        return self.present()


def new_loop(native: ScriptedLoop) -> Loop:
    return Loop(native, native.call_soon_threadsafe, native.call_soon_threadsafe)


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    scene = Scene()
    monkeypatch.setattr(reading, "time", scene)
    yield scene
    scene.reading.forget()
    scene.connection.socket.close()
    scene.connection.peer.close()


def test_the_thread_reads_until_a_loop_offers_to(scene: Scene) -> None:
    assert scene.present() is None
    assert not scene.native.soon


def test_a_loop_that_offers_reads_once_it_has_run(scene: Scene) -> None:
    assert scene.reading.offer(scene.loop)
    assert scene.present() is None
    assert scene.native.watched is None
    scene.native.run()
    assert scene.owner.woken == 1
    assert scene.native.watched is not None
    assert scene.present() is scene.reading.loop_reader
    assert scene.connection.on_unsent == scene.owner.wake


def test_a_loop_that_cannot_watch_sockets_does_not_read(scene: Scene) -> None:
    trio = Loop(object(), print, print)
    assert not scene.reading.offer(trio)
    assert scene.reading.loop is None


def test_a_second_loop_reads_only_after_the_first_has_ended(scene: Scene) -> None:
    scene.let_loop_read()
    second = new_loop(ScriptedLoop())
    assert not scene.reading.offer(second)
    scene.native.closed = True
    assert scene.reading.offer(second)
    assert scene.present() is None
    assert scene.reading.loop_reader is not None
    assert scene.reading.loop_reader.loop is second


def test_after_the_loop_has_ended_the_thread_reads(scene: Scene) -> None:
    scene.let_loop_read()
    scene.native.closed = True
    assert scene.present() is None
    assert scene.reading.loop_reader is None


def test_a_connection_that_cannot_be_watched_is_read_by_the_thread(scene: Scene) -> None:
    scene.connection.watched = lambda: None  # type: ignore[assignment, method-assign, return-value]
    assert scene.reading.offer(scene.loop)
    assert scene.present() is None
    assert scene.reading.loop_reader is None


def test_suspended_the_loop_does_not_read_for_a_second(scene: Scene) -> None:
    assert not scene.reading.suspend()  # no loop reads
    reader = scene.let_loop_read()
    assert not scene.reading.suspend()  # the thread does not stand by, so it need not be woken
    assert scene.present() is None
    scene.now = TICK - 0.1
    assert scene.present() is None
    scene.now = TICK
    assert scene.present() is reader


def test_a_thread_that_stands_by_lets_the_loop_use_the_connection(scene: Scene) -> None:
    reader = scene.let_loop_read()
    assert not reader.acquire()  # the thread uses it
    standing_by: list[bool] = []

    def wait(seconds: float) -> bool:
        standing_by.append(scene.reading.standing_by and scene.reading.suspend() and reader.acquire())
        assert not scene.connection.may_wait
        reader.release()
        return False

    scene.reading = reading_with(scene, wait)
    scene.reading.stand_by(reader, 1.0, scene.owner)
    assert standing_by == [True]
    assert not scene.reading.standing_by
    assert scene.connection.may_wait
    assert not reader.acquire()


def reading_with(scene: Scene, wait: Callable[[float], bool]) -> SharedReading:
    """The same, but the thread waits as `wait` does."""

    class Scripted(WakeUp):
        def wait(self, seconds: float) -> bool:
            return wait(seconds)

    changed = SharedReading(Scripted())
    changed.using, changed.loop, changed.loop_reader = (
        scene.reading.using,
        scene.reading.loop,
        scene.reading.loop_reader,
    )
    return changed


def test_a_thread_that_is_to_stop_does_not_stand_by(scene: Scene) -> None:
    reader = scene.let_loop_read()
    scene.owner.stopping = True

    def wait(seconds: float) -> bool:
        raise AssertionError("it waits")

    scene.reading = reading_with(scene, wait)
    scene.reading.stand_by(reader, 60.0, scene.owner)


def test_an_error_in_the_loop_is_raised_in_the_thread(scene: Scene) -> None:
    reader = scene.let_loop_read()
    scene.owner.error = ConnectionResetError("peer")

    def wait(seconds: float) -> bool:
        assert scene.native.watched is not None
        scene.native.watched()
        return True

    scene.reading = reading_with(scene, wait)
    with pytest.raises(ConnectionResetError, match="peer"):
        scene.reading.stand_by(reader, 1.0, scene.owner)
    assert scene.native.watched is None
    assert not reader.acquire()


def test_a_signal_handler_that_raises_in_the_loop_ends_the_threads_epoch(scene: Scene) -> None:
    reader = scene.let_loop_read()
    watched = scene.native.watched
    assert watched is not None
    scene.owner.read_in_loop = interrupted  # type: ignore[method-assign]
    scene.reading.using.release()
    with pytest.raises(KeyboardInterrupt):
        watched()
    scene.reading.using.acquire()
    assert isinstance(reader.error, InterruptedError)


def interrupted() -> None:
    raise KeyboardInterrupt


def test_a_loop_that_reads_is_left_alone_and_one_that_does_not_is_replaced_by_the_thread(scene: Scene) -> None:
    reader = scene.let_loop_read()
    scene.check()
    assert (scene.connection.drained, reader.active) == (0, True)
    reader.reads += 1
    scene.check()
    assert (scene.connection.drained, reader.active) == (0, True)
    scene.check()  # it has not read since
    assert (scene.connection.drained, reader.active) == (1, False)
    assert scene.present() is None  # and is started again
    scene.native.run()
    assert scene.present() is reader


def test_if_nothing_has_arrived_a_loop_that_has_not_read_stays_the_reader(scene: Scene) -> None:
    reader = scene.let_loop_read()

    def nothing(timeout: float) -> None:
        raise TimeoutError

    scene.connection.drain_events = nothing  # type: ignore[method-assign]
    scene.check()
    scene.check()
    assert reader.active


def test_after_an_error_that_the_connection_survived_the_loop_reads_again(scene: Scene) -> None:
    reader = scene.let_loop_read()
    reader.error = OSError("the channel was closed")
    scene.reading.resume()
    assert scene.present() is None
    scene.native.run()
    assert scene.present() is reader
    assert reader.error is None


@pytest.mark.parametrize("closed", [False, True])
def test_after_the_end_of_the_connection_the_loop_no_longer_watches_it(scene: Scene, closed: bool) -> None:
    reader = scene.let_loop_read()
    scene.native.closed = closed
    scene.reading.end()
    scene.native.run()
    assert scene.native.watched is None or closed
    assert scene.reading.loop_reader is None
    scene.reading.using.release()
    assert not reader.acquire()
    scene.reading.using.acquire()
