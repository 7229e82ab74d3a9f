"""`TestBus`: what a test publishes, waits for, and asks about."""

# At the end of a timeout, an error reports what is stuck. A cancel scope could not report that.
# ruff: noqa: ASYNC109

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from datetime import datetime, timedelta
from time import sleep
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, overload

import anyio
import msgspec

from lightbus import errors, event_loop
from lightbus import event as events
from lightbus.app import Lightbus
from lightbus.message import Receipt
from lightbus.publishing.publisher import Publisher
from lightbus.testing.apps import Apps, Target
from lightbus.testing.drain import Drain
from lightbus.testing.messages import checked_seconds, hide_lightbus_errors, shown
from lightbus.testing.recorder import Recorder
from lightbus.testing.records import Dead, Failed, Handled, Published
from lightbus.testing.session import Session
from lightbus.transport import Publication
from lightbus.wire import codec, topology

__tracebackhide__ = hide_lightbus_errors

TIMEOUT = 10.0
"""Seconds: the limit of `drain` and `advance`."""

E = TypeVar("E")


class TestBus:
    """Apps on a separate, embedded broker, for one test.

    `async with TestBus(app, other_app) as bus:` runs their handlers and lifespans in the test's event loop;
    `with TestBus(app) as bus:` in the event loop of another thread, for tests without one.

    One class of over 300 lines, because it is the whole API of a test: mostly signatures and docstrings.
    """

    __test__ = False  # else pytest collects it as a test where it is imported

    def __init__(
        self,
        *apps: Lightbus,
        timeout: float | timedelta = TIMEOUT,
        lifespan: bool = True,
        allow_dead: bool = False,
        backend: Literal["asyncio", "trio"] = "asyncio",
    ) -> None:
        """Nothing starts here.

        Args:
            apps: their handlers run. Whatever their url= or LIGHTBUS_URL, they publish to this bus meanwhile.
            timeout: the maximum duration of `drain` and `advance`, in seconds.
            lifespan: False leaves the apps' lifespans out.
            allow_dead: accept dead letters at the end that the test never asked about (see `dead`).
            backend: the event loop of a `with` block; `async with` uses the test's own.

        Raises:
            errors.TestBusError: no app, a value that is not an app, or two apps of the same name.
            errors.InvalidOption: the timeout is not a number of seconds.
        """
        self._apps = Apps(apps)
        self.apps = self._apps.all
        self.timeout = checked_seconds("timeout", timeout)
        self.lifespan = lifespan
        self.allow_dead = allow_dead
        self.backend = backend
        self._session: Session | None = None
        self._recorder: Recorder | None = None

    def __repr__(self) -> str:
        """What pytest shows beside a failed assertion."""
        recorder = self._recorder
        state = "not started" if recorder is None else str(recorder)
        if recorder is not None and self._session is None:
            state += ", ended"
        elif recorder is not None and not recorder.drained:
            state += ", not drained since"
        return f"<TestBus of {', '.join(app.name for app in self.apps)}: {state}>"

    # --- start and end

    async def __aenter__(self) -> Self:
        session = self._open()
        try:
            await session.ensure_started()
        except BaseException:
            with anyio.CancelScope(shield=True):
                await session.stop()
            self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._session is not None:
                with anyio.CancelScope(shield=True):
                    await self._session.stop()
        finally:
            self._close()
        self._check_end(error)

    def __enter__(self) -> Self:
        event_loop.refuse("with TestBus(...)", "async with TestBus(...)", errors.TestBusError)
        session = self._open()
        try:
            session.start_in_thread(self.backend)
        except BaseException:
            session.stop_in_thread()
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._session is not None:
                self._session.stop_in_thread()
        finally:
            self._close()
        self._check_end(error)

    @contextlib.contextmanager
    def prepared(self) -> Generator[Callable[[], contextlib.AbstractAsyncContextManager[None]]]:
        """For the pytest fixture, which does not run in the event loop of an async test.

        Within this block the apps publish to the bus. It gives an async context manager, in which their handlers run.
        """
        self._open()
        try:
            yield self._running
        finally:
            self._close()

    @contextlib.asynccontextmanager
    async def _running(self) -> AsyncGenerator[None]:
        failure: BaseException | None = None
        try:
            await self._started().ensure_started()
            yield
        except BaseException as error:
            failure = error
            raise
        finally:
            await self.__aexit__(None, failure, None)

    def _open(self) -> Session:
        if self._session is not None:
            raise errors.TestBusError(
                f"This TestBus of {self._apps} is already running. Create another one, or exit this one first."
            )
        for app in self.apps:
            app.load()
        recorder = Recorder(self._apps)
        self._session = Session(self._apps, recorder, self, lifespan=self.lifespan, timeout=self.timeout)
        self._recorder = recorder
        return self._session

    def _close(self) -> None:
        if self._session is not None:
            with contextlib.suppress(errors.BrokerError):
                self._session.recorder.read_dead()
            session, self._session = self._session, None
            session.close()

    def _check_end(self, error: BaseException | None) -> None:
        """
        Raises:
            errors.UnexpectedDeadLetters: the test did not ask about some dead letters, and has not failed otherwise.
        """
        if error is None and not self.allow_dead and self._recorder is not None:
            self._recorder.check_dead()

    # --- dependencies

    def override(self, dependency: Callable[..., Any], replacement: Callable[..., Any]) -> None:
        """Give handlers `replacement` wherever they ask for `dependency`, until this TestBus ends.

        The replacement may be a function or a generator, async for async handlers, and have dependencies.

        Raises:
            errors.InvalidDependency: no handler in the test asks for `dependency`, or the replacement cannot be used.
        """
        self._started().override(dependency, replacement)

    # --- publishing for other apps

    async def publish(
        self,
        event: str,
        payload: Mapping[str, Any] | bytes,
        *,
        source: str = "test",
        headers: Mapping[str, Any] | None = None,
        delay: float | timedelta | None = None,
        id: str | None = None,
        correlation_id: str | None = None,
        time: datetime | None = None,
    ) -> Receipt:
        """Publish an event of an app that is not in the test.

        Args:
            event: its name.
            payload: the data, which is sent as JSON; or the exact body as bytes, JSON or not.
            source: the publishing app. If it is in the test, the payload must fit the event that it declares.
            headers: its publisher's own AMQP headers.
            delay: seconds, or a timedelta, until it is delivered.
            id: its message id; give the same one twice to test a duplicate.
            correlation_id, time: as for `Lightbus.publish`.

        Raises:
            errors.UnknownEvent: no handler in the test handles it from there, so the test would prove nothing.
            errors.InvalidPayload, errors.InvalidOption, errors.PublishError: as for `Lightbus.publish`.
        """
        publisher, publication, level = self._from_outside(
            event, payload, source, headers, delay, id, correlation_id, time
        )
        return await publisher.publish(publication, delay_level=level)

    def publish_sync(
        self,
        event: str,
        payload: Mapping[str, Any] | bytes,
        *,
        source: str = "test",
        headers: Mapping[str, Any] | None = None,
        delay: float | timedelta | None = None,
        id: str | None = None,
        correlation_id: str | None = None,
        time: datetime | None = None,
    ) -> Receipt:
        """`publish` for tests without an event loop."""
        event_loop.refuse("publish_sync(...)", "await bus.publish(...)", errors.TestBusError)
        publisher, publication, level = self._from_outside(
            event, payload, source, headers, delay, id, correlation_id, time
        )
        return publisher.publish_sync(publication, delay_level=level)

    def _from_outside(
        self,
        event: object,
        payload: Mapping[str, Any] | bytes,
        source: str,
        headers: Mapping[str, Any] | None,
        delay: float | timedelta | None,
        id: str | None,
        correlation_id: str | None,
        time: datetime | None,
    ) -> tuple[Publisher, Publication, int | None]:
        session = self._started()
        if not isinstance(event, str):
            raise errors.UnknownEvent(
                f"bus.publish takes an event's name and its payload, not {shown(event)}. An app's own event: "
                "`await app.publish(...)`."
            )
        event_type = self._apps.event_type(events.check_name(event, "bus.publish"), topology.check_app_name(source))
        if isinstance(payload, bytes):
            body = payload
        elif event_type.cls is dict:
            body = codec.encode(event_type, dict(payload))
        else:
            body = codec.encode(event_type, codec.build_event(event_type, msgspec.json.encode(payload)))
        properties = codec.event_properties(source, event_type, headers)
        codec.set_envelope(properties, id, correlation_id, time)
        publication = Publication(source, event, body, properties)
        publisher = session.publisher_of(source)
        if not delay:  # None, 0, timedelta(0)
            return publisher, publication, None
        return publisher, *topology.delayed(publication, delay)

    # --- waiting

    async def drain(self, *, timeout: float | timedelta | None = None) -> None:
        """Return once no event is waiting or being handled any more. Retries come at once; delayed events stay.

        Args:
            timeout: seconds; by default the TestBus's.

        Raises:
            errors.DrainTimeout: not done within the timeout; the message lists what is stuck.
        """
        drain = await self._new_drain(timeout)
        for pause in drain.until_idle():
            await anyio.sleep(pause)

    def drain_sync(self, *, timeout: float | timedelta | None = None) -> None:
        """`drain` for tests without an event loop."""
        event_loop.refuse("drain_sync()", "await bus.drain()", errors.TestBusError)
        for pause in self._drain_of(self._started(), timeout).until_idle():
            sleep(pause)

    async def advance(self, seconds: float | timedelta, *, timeout: float | timedelta | None = None) -> None:
        """Let this many seconds (or a timedelta) pass on the broker's clock, draining before, after, and each time
        something falls due.

        Only the broker's clock moves, not Python's.

        Raises:
            errors.DrainTimeout: as `drain`.
        """
        drain = await self._new_drain(timeout)
        for pause in drain.advance(checked_seconds("advance", seconds, lowest=0.0)):
            await anyio.sleep(pause)

    def advance_sync(self, seconds: float | timedelta, *, timeout: float | timedelta | None = None) -> None:
        """`advance` for tests without an event loop."""
        event_loop.refuse("advance_sync(...)", "await bus.advance(...)", errors.TestBusError)
        drain = self._drain_of(self._started(), timeout)
        for pause in drain.advance(checked_seconds("advance", seconds, lowest=0.0)):
            sleep(pause)

    async def _new_drain(self, timeout: float | timedelta | None) -> Drain:
        session = self._started()
        await session.ensure_started()  # not yet, in an async fixture that uses the pytest fixture before the test
        return self._drain_of(session, timeout)

    def _drain_of(self, session: Session, timeout: float | timedelta | None) -> Drain:
        return Drain(session, self.timeout if timeout is None else checked_seconds("timeout", timeout))

    # --- records

    @overload
    def published(self) -> list[Published]: ...

    @overload
    def published(self, event: type[E]) -> list[E]: ...

    @overload
    def published(self, event: str) -> list[Any]: ...

    def published(self, event: str | type[Any] | None = None) -> list[Any]:
        """What was published, in the order of the confirms: by the apps and by `bus.publish`, handled or not.

        Args:
            event: an event class, for a list of its instances; or a name or topic pattern, for a list of instances of
                what the apps declared (of dicts, for other apps'). Without it: a list of `Published`.

        Raises:
            errors.UnknownEvent: no app in the test declares it, and none published it.
        """
        found = list(self._used().publishes)
        return found if event is None else self._apps.chosen_events(found, event)

    def handled(self, handler: Target = None) -> list[Handled]:
        """What handlers have handled, in the order in which they ended.

        Args:
            handler: a handler's name or function; or an event's class, name or topic pattern. Without it: all.

        Raises:
            errors.TestBusError: no app in the test has such a handler or event.
        """
        return self._apps.chosen(self._used().handled_attempts(), handler, "handled")

    def failed(self, handler: Target = None) -> list[Failed]:
        """The attempts that failed, whether retried or not. Arguments as for `handled`."""
        return self._apps.chosen(self._used().failed_attempts(), handler, "failed")

    def dead(self, handler: Target = None) -> list[Dead]:
        """What is in the apps' dead-letter queues. Arguments as for `handled`.

        A test fails if it ends with dead letters that it did not ask about. What this returns, it asked about.
        """
        recorder = self._used()
        if self._session is not None:
            recorder.read_dead()
        chosen = self._apps.chosen(recorder.dead, handler, "dead")
        recorder.mark_checked(chosen)
        return chosen

    # --- is it running?

    def _started(self) -> Session:
        if self._session is None:
            raise errors.TestBusError(
                f"This TestBus of {self._apps} has not started: enter it first, "
                "`async with TestBus(app) as bus:`, or `with`."
            )
        return self._session

    def _used(self) -> Recorder:
        """The records of a TestBus that runs or has ended."""
        return self._started().recorder if self._recorder is None else self._recorder
