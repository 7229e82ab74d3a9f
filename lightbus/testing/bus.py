"""`TestBus`: what a test publishes, waits for, and asks about."""

# The end of a timeout is an error that says what is stuck; a cancel scope could not:
# ruff: noqa: ASYNC109

from __future__ import annotations

import contextlib
import difflib
import itertools
import math
import operator
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, overload

import anyio
import anyio.from_thread
import anyio.lowlevel
import attrs
import msgspec

from lightbus import app as app_module
from lightbus import errors
from lightbus import event as events
from lightbus.app import Lightbus
from lightbus.connection.declare import declare
from lightbus.connection.dial import BrokerAddresses
from lightbus.dead_letters.letter import DeadLetter
from lightbus.dead_letters.queue import opened
from lightbus.event import EventType
from lightbus.handler import Handler
from lightbus.message import Message, Receipt
from lightbus.pattern import topic_matches
from lightbus.publishing.publisher import Publisher
from lightbus.testing.host import GRACE, Deadline, Host, HostedWorker, NotedPublisher
from lightbus.testing.records import Dead, Failed, Handled, Published, R
from lightbus.transport import Delivery, Publication
from lightbus.transport.sqlite.channel import Holding, TestControl, forget_memory
from lightbus.wire import codec, topology

__tracebackhide__ = operator.methodcaller("errisinstance", errors.LightbusError)
"""For pytest: where the test did something wrong, it shows the test's line and the message."""

TIMEOUT = 10.0
"""Seconds that `drain` and `advance` take at most."""
SHOWN = 5
"""Handlers, queues or dead letters that an error shows at most."""

E = TypeVar("E")

_numbers = itertools.count(1)
_in_use: weakref.WeakKeyDictionary[Lightbus, TestBus] = weakref.WeakKeyDictionary()
_entering = threading.Lock()


def _release(apps: Sequence[Lightbus]) -> None:
    with _entering:
        for app in apps:
            del _in_use[app]
        if not _in_use:
            app_module.refuse_outsider = None


def _refuse_outsider(app: Lightbus) -> None:
    """
    Raises:
        errors.TestBusError: always. The app's own broker may be the one in production.
    """
    running = ", ".join(sorted({repr(bus) for bus in _in_use.values()}))
    raise errors.TestBusError(
        f"app {app.name!r} is not in the test ({running}), and would use its own broker. Pass it to the TestBus as "
        "well; or, if that is intended, connect it first: `async with app:`."
    )


Target = str | type[Any] | Callable[..., Any] | None


class TestBus:
    """Apps on a broker of their own, for one test.

    `async with TestBus(app, other_app) as bus:` runs their handlers and lifespans in the test's event loop;
    `with TestBus(app) as bus:` in a thread's, for tests without one.
    """

    __test__ = False  # pytest would take it for a test where it is imported

    def __init__(
        self,
        *apps: Lightbus,
        timeout: float = TIMEOUT,
        lifespan: bool = True,
        allow_dead: bool = False,
        backend: Literal["asyncio", "trio"] = "asyncio",
    ) -> None:
        """Nothing starts here.

        Args:
            apps: their handlers run. Whatever their url= or LIGHTBUS_URL, they publish to this bus meanwhile.
            timeout: seconds that `drain` and `advance` take at most.
            lifespan: False leaves the apps' lifespans out.
            allow_dead: accept dead letters at the end that the test never asked about (see `dead`).
            backend: the event loop of a `with` block; `async with` uses the test's own.

        Raises:
            errors.TestBusError: no app, something else than one, or two of the same name.
        """
        self.apps = _checked_apps(apps)
        self.timeout = _checked_seconds("timeout", timeout)
        self.lifespan = lifespan
        self.allow_dead = allow_dead
        self.backend = backend
        self._stack: contextlib.ExitStack | None = None
        self._portal: anyio.from_thread.BlockingPortal | None = None
        self._host: Host | None = None
        self._publishers: dict[str, NotedPublisher] = {}
        self._published: list[Published] = []
        self._attempts: list[Handled | Failed] = []
        self._dead: list[Dead] = []
        self._seen: set[tuple[str, str | None, str]] = set()
        self._drained_at = (0, 0)

    def __repr__(self) -> str:
        """What pytest shows beside a failed assertion."""
        state = ", ".join(self._state()) if self._publishers else "not started"
        return f"<TestBus of {', '.join(app.name for app in self.apps)}: {state}>"

    def _state(self) -> list[str]:
        handled = sum(isinstance(one, Handled) for one in self._attempts)
        state = [f"{len(self._published)} published", f"{handled} handled"]
        if failed := len(self._attempts) - handled:
            state.append(f"{failed} failed")
        if self._stack is None:
            state.append("ended")
        elif self._drained_at != (len(self._published), len(self._attempts)):
            state.append("not drained since")
        return state

    # --- its life

    async def __aenter__(self) -> Self:
        self._prepare()
        try:
            await self._start()
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self._stop()
            self._leave()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with anyio.CancelScope(shield=True):
                await self._stop()
        finally:
            self._leave()
        self._check_end(error)

    @contextlib.contextmanager
    def prepared(self) -> Generator[Callable[[], contextlib.AbstractAsyncContextManager[None]]]:
        """For the pytest fixture, which is not in an async test's event loop: within this block the apps publish to the
        bus, and within the async one that it gives their handlers run.
        """
        self._prepare()
        try:
            yield self._running
        finally:
            self._leave()

    @contextlib.asynccontextmanager
    async def _running(self) -> AsyncGenerator[None]:
        failure: BaseException | None = None
        try:
            if self._host is None:
                await self._start()
            yield
        except BaseException as error:
            failure = error
            raise
        finally:
            await self.__aexit__(None, failure, None)

    def __enter__(self) -> Self:
        _refuse_in_event_loop("with TestBus(...)", "async with TestBus(...)")
        self._prepare()
        try:
            self._start_sync()
        except BaseException:
            self._stop_sync()
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._stop_sync()
        finally:
            self._leave()
        self._check_end(error)

    def _prepare(self) -> None:
        """Declare everything on a new broker, and lead the apps there."""
        if self._stack is not None:
            raise errors.TestBusError(
                f"This TestBus of {self._names()} is already running. Create another one, or exit this one first."
            )
        self._published, self._attempts, self._dead, self._seen = [], [], [], set()
        self._drained_at = (0, 0)
        with contextlib.ExitStack() as stack:
            self._claim_apps(stack)
            name = f"test-{os.getpid()}-{next(_numbers)}"
            self._broker = BrokerAddresses.parse(f"memory://{name}")
            stack.callback(forget_memory, name)
            self._control = TestControl(f"memory://{name}")
            stack.callback(self._control.close)
            connection = self._broker.connect("lightbus testing")
            for app in self.apps:
                declare(connection, app.topology())
            connection.close()
            self._publishers = {}
            stack.callback(self._close_publishers)
            for app in self.apps:
                publisher = self._publisher(app.name, app.publish_timeout, app.queue_type)
                stack.enter_context(app.redirected(self._broker, publisher))
            self._stack = stack.pop_all()

    def _publisher(self, app: str, timeout: float, queue_type: topology.QueueType) -> NotedPublisher:
        self._publishers[app] = publisher = NotedPublisher(
            app, self._broker, self._note_published, timeout=timeout, queue_type=queue_type
        )
        return publisher

    def _claim_apps(self, stack: contextlib.ExitStack) -> None:
        with _entering:
            for app in self.apps:
                if app in _in_use:
                    raise errors.TestBusError(
                        f"app {app.name!r} is already in a TestBus ({_in_use[app]!r}), and can be in only one at a "
                        "time. Exit that one first, or pass all apps of the test to one: TestBus(app, other_app)."
                    )
            stack.callback(_release, self.apps)
            _in_use.update(dict.fromkeys(self.apps, self))
            app_module.refuse_outsider = _refuse_outsider

    def _leave(self) -> None:
        if self._stack is not None:
            with contextlib.suppress(errors.BrokerError):
                self._dead = self._read_dead()
            stack, self._stack = self._stack, None
            stack.close()

    def _close_publishers(self) -> None:
        for publisher in self._publishers.values():
            publisher.close(GRACE)

    def _check_end(self, error: BaseException | None) -> None:
        """
        Raises:
            errors.UnexpectedDeadLetters: the test has not asked for some, and has not failed otherwise.
        """
        unseen = [letter for letter in self._dead if _key(letter) not in self._seen]
        if unseen and error is None and not self.allow_dead:
            raise errors.UnexpectedDeadLetters(
                f"{_count(len(unseen), 'dead letter')} that the test did not check. If they are expected, check them: "
                f"`assert bus.dead({_as_argument(unseen[0])})`, or pass TestBus(..., allow_dead=True).\n"
                + _some([str(letter).replace("\n", "\n  ") for letter in unseen])
            )

    # --- its workers

    async def _start(self) -> None:
        workers = [HostedWorker(app, self.lifespan) for app in self.apps]
        for worker in workers:
            worker.consumer.handled_by = partial(self._note_handled, worker.app)
            worker.consumer.failed_by = partial(self._note_failed, worker.app)
        self._host = Host(workers)
        await self._host.start()

    async def _stop(self) -> None:
        host, self._host = self._host, None
        if host is not None:
            await host.end(self.timeout + GRACE)

    def _start_sync(self) -> None:
        assert self._stack is not None
        self._portal = self._stack.enter_context(anyio.from_thread.start_blocking_portal(self.backend))
        self._portal.call(self._start)

    def _stop_sync(self) -> None:
        portal, self._portal = self._portal, None
        if portal is not None:
            portal.call(self._stop)

    # --- publishing for others

    async def publish(
        self,
        event: str,
        payload: Mapping[str, Any] | bytes,
        *,
        source: str = "test",
        headers: Mapping[str, Any] | None = None,
        delay: float | None = None,
        id: str | None = None,
    ) -> Receipt:
        """Publish an event of an app that is not in the test.

        Args:
            event: its name.
            payload: what becomes JSON; or the body's exact bytes, JSON or not.
            source: the publishing app. If it is in the test, the payload must fit the event that it declares.
            headers: its publisher's own AMQP headers.
            delay: seconds until it is delivered.
            id: its message id; give the same one twice to test a duplicate.

        Raises:
            errors.UnknownEvent: no handler in the test handles it from there, so the test would prove nothing.
            errors.InvalidPayload, errors.PublishError: as for `Lightbus.publish`.
        """
        publisher, publication, level = self._from_outside(event, payload, source, headers, delay, id)
        return await publisher.publish(publication, delay_level=level)

    def publish_sync(
        self,
        event: str,
        payload: Mapping[str, Any] | bytes,
        *,
        source: str = "test",
        headers: Mapping[str, Any] | None = None,
        delay: float | None = None,
        id: str | None = None,
    ) -> Receipt:
        """`publish` for tests without an event loop."""
        _refuse_in_event_loop("publish_sync(...)", "await bus.publish(...)")
        publisher, publication, level = self._from_outside(event, payload, source, headers, delay, id)
        return publisher.publish_sync(publication, delay_level=level)

    def _from_outside(
        self,
        event: object,
        payload: Mapping[str, Any] | bytes,
        source: str,
        headers: Mapping[str, Any] | None,
        delay: float | None,
        id: str | None,
    ) -> tuple[Publisher, Publication, int | None]:
        self._check_started()
        if not isinstance(event, str):
            raise errors.UnknownEvent(
                f"bus.publish takes an event's name and its payload, not {_shown(event)}. An app's own event: "
                "`await app.publish(...)`."
            )
        event_type = self._outside_type(events.check_name(event, "bus.publish"), topology.check_app_name(source))
        if event_type.cls is not dict and not isinstance(payload, bytes):
            body = codec.encode(event_type, codec.build_event(event_type, msgspec.json.encode(payload)))
        else:
            body = payload if isinstance(payload, bytes) else codec.encode(event_type, dict(payload))
        properties = codec.event_properties(source, event_type, headers)
        if id is not None:
            properties["message_id"] = id
        publisher = self._publishers.get(source) or self._publisher(source, self.timeout, "quorum")
        if not delay:
            return publisher, Publication(source, event, body, properties), None
        seconds = topology.delay_seconds(delay)
        level = topology.delay_level(seconds)
        properties["headers"] |= topology.delay_headers(seconds)
        return publisher, Publication(topology.delay_exchange(source, level), event, body, properties), level

    def _outside_type(self, event: str, source: str) -> EventType:
        """
        Raises:
            errors.UnknownEvent: nothing in the test handles it, or its app in the test has not declared it.
        """
        app = self._app(source)
        if app is not None and event not in app.events:
            raise errors.UnknownEvent(f"{event!r} is not declared on app {source!r}. {app.suggestion(event)}")
        if not any(handler.matches(source, event) for _, handler in self._handlers()):
            patterns = sorted({pattern for _, handler in self._handlers() for pattern in handler.patterns})
            only = sorted({one.source for _, one in self._handlers() if one.source and one.matches(one.source, event)})
            near = difflib.get_close_matches(event, patterns, n=1)
            if only:
                hint = f"It is handled from {' and '.join(map(repr, only))} only: source={only[0]!r}."
            elif near:
                hint = f"Did you mean {near[0]!r}?"
            else:
                hint = f"They handle: {', '.join(patterns) or 'nothing'}."
            raise errors.UnknownEvent(f"No handler of {self._names()} handles {event!r} from {source!r}. {hint}")
        return EventType(event, 1, dict) if app is None else app.events[event]

    # --- waiting

    async def drain(self, *, timeout: float | None = None) -> None:
        """Return once no event is waiting or being handled any more. Retries come at once; delayed events stay.

        Args:
            timeout: seconds; by default the TestBus's.

        Raises:
            errors.DrainTimeout: not done within the timeout; says what is stuck.
        """
        self._check_started()
        if self._host is None:  # the pytest fixture's, in an async fixture before the test
            await self._start()
        for pause in self._drain(self._deadline(timeout)):
            await anyio.sleep(pause)

    def drain_sync(self, *, timeout: float | None = None) -> None:
        """`drain` for tests without an event loop."""
        _refuse_in_event_loop("drain_sync()", "await bus.drain()")
        for pause in self._drain(self._deadline(timeout)):
            time.sleep(pause)

    async def advance(self, seconds: float, *, timeout: float | None = None) -> None:
        """Let this many seconds pass on the broker's clock, draining before, after, and each time something falls due.

        Only the broker's clock moves, not Python's.

        Raises:
            errors.DrainTimeout: as `drain`.
        """
        self._check_started()
        if self._host is None:
            await self._start()
        for pause in self._advance(_checked_seconds("advance", seconds, lowest=0.0), self._deadline(timeout)):
            await anyio.sleep(pause)

    def advance_sync(self, seconds: float, *, timeout: float | None = None) -> None:
        """`advance` for tests without an event loop."""
        _refuse_in_event_loop("advance_sync(...)", "await bus.advance(...)")
        for pause in self._advance(_checked_seconds("advance", seconds, lowest=0.0), self._deadline(timeout)):
            time.sleep(pause)

    def _deadline(self, timeout: float | None) -> Deadline:
        return Deadline(self.timeout if timeout is None else _checked_seconds("timeout", timeout), len(self._attempts))

    def _drain(self, deadline: Deadline) -> Generator[float]:
        """Yields the seconds to wait until the next look."""
        self._check_started()
        self._check_handlers()
        consumed, retrying = self._queues()
        pause = 0.001
        while True:
            if self._host is not None:
                self._host.check()
            holdings = self._control.holdings()
            retries = [one.due_in for one in holdings if one.queue in retrying and one.due_in is not None]
            if not self._is_busy(holdings, consumed):
                if not retries:
                    self._drained_at = (len(self._published), len(self._attempts))
                    return
                # Those that are due first, first: the order of retries stays what it would be.
                self._control.expire_early(retrying, min(retries))
            if time.monotonic() > deadline.ends:
                raise errors.DrainTimeout(self._what_is_stuck(deadline, holdings, consumed, retrying))
            yield pause
            pause = min(0.02, pause * 1.5)

    def _is_busy(self, holdings: Sequence[Holding], consumed: Sequence[str]) -> bool:
        # An event is in a queue until its handlers have ended, and its retry is in one before that: so one look at
        # all queues at one moment misses nothing.
        return (
            any(publisher.busy for publisher in list(self._publishers.values()))
            or any(one.queue in consumed for one in holdings)
            or any(one.due_in is not None and one.due_in <= 0 for one in holdings)
        )

    def _advance(self, seconds: float, deadline: Deadline) -> Generator[float]:
        left = seconds
        while True:
            yield from self._drain(deadline)
            dues = [one.due_in for one in self._control.holdings() if one.due_in is not None and one.due_in <= left]
            if not dues:
                break
            self._control.advance(min(dues))
            left -= min(dues)
        self._control.advance(left)

    def _queues(self) -> tuple[list[str], list[str]]:
        """The names of the queues that the apps consume, and of those where retries wait."""
        queues = [queue for app in self.apps for queue in app.consumed_queues()]
        retrying = [f"{one.app}.{topology.retry_key(one.suffix, delay)}" for one in queues for delay in one.delays]
        return [one.name for one in queues], retrying

    def _what_is_stuck(
        self, deadline: Deadline, holdings: Sequence[Holding], consumed: Sequence[str], retrying: Sequence[str]
    ) -> str:
        lines = [f"Not drained within {deadline.seconds:g} s."]
        running = [] if self._host is None else self._host.running()
        if running:
            lines += ["Still running:", _some(running)]
        queues = [
            f"{one.queue}: {_count(one.ready, 'event')} waiting, {one.unready} in hand"
            for one in holdings
            if one.queue in consumed
        ]
        if queues:
            lines += ["In the queues:", _some(queues)]
        retries = [f"{one.queue}: {one.ready}" for one in holdings if one.queue in retrying]
        if retries:
            lines += ["Waiting for a retry:", _some(retries)]
        ended = Counter(f"{one.handler} of {one.app}" for one in self._attempts[deadline.attempts_before :])
        if ended:
            most = ", ".join(f"{who} ({number})" for who, number in ended.most_common(SHOWN))
            lines.append(f"Finished meanwhile: {most}.")
        if any(number > 100 for number in ended.values()):
            lines.append("Does a handler publish an event that it also handles?")
        elif running:
            lines.append("Provide what the handler waits for before draining, or set a longer drain(timeout=...).")
        return "\n".join(lines)

    # --- what came of it

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
        self._check_used()
        found = list(self._published)
        if event is None:
            return found
        if isinstance(event, type):
            event_type = self._declared(event)
            return [one.payload for one in found if one.event == event_type.name and isinstance(one.payload, event)]
        chosen = [one.payload for one in found if topic_matches(event, one.event)]
        if not chosen and not self._is_known(event):
            known = sorted({*self._event_names(), *(one.event for one in found)})
            raise errors.UnknownEvent(f"No event {event!r} is declared on {self._names()}. {_near(event, known)}")
        return chosen

    def handled(self, handler: Target = None) -> list[Handled]:
        """What handlers have handled, in the order in which they ended.

        Args:
            handler: a handler's name or function; or an event's class, name or topic pattern. Without it: all.

        Raises:
            errors.TestBusError: no app in the test has such a handler or event.
        """
        return self._chosen([one for one in list(self._attempts) if isinstance(one, Handled)], handler, "handled")

    def failed(self, handler: Target = None) -> list[Failed]:
        """The attempts that failed, whether retried or not. Arguments as for `handled`."""
        return self._chosen([one for one in list(self._attempts) if isinstance(one, Failed)], handler, "failed")

    def dead(self, handler: Target = None) -> list[Dead]:
        """What is in the apps' dead-letter queues. Arguments as for `handled`.

        A test fails if it ends with dead letters that it has not asked for; what this returns, it has asked for.
        """
        self._check_used()
        if self._stack is not None:
            self._dead = self._read_dead()
        chosen = self._chosen(self._dead, handler, "dead")
        self._seen.update(_key(letter) for letter in chosen)
        return chosen

    def _chosen(self, records: Sequence[R], target: Target, method: str) -> list[R]:
        self._check_used()
        if target is None:
            return list(records)
        if isinstance(target, type):
            name = self._declared(target).name
            return [one for one in records if one.event == name]
        if isinstance(target, str):
            handlers = {handler.name for _, handler in self._handlers()}
            if target in handlers:
                return [one for one in records if one.handler == target]
            chosen = [one for one in records if topic_matches(target, one.event)]
            if not chosen and not self._is_known(target):
                hint = _near(target, sorted({*handlers, *self._event_names()}))
                raise errors.TestBusError(
                    f"bus.{method}({target!r}): {self._names()} has no such handler or event. {hint}"
                )
            return chosen
        names = {(app.name, handler.name) for app, handler in self._handlers() if handler.function == target}
        if not names:
            raise errors.TestBusError(
                f"bus.{method}({_shown(target)}): that is not a handler of {self._names()}. "
                f"{_near(getattr(target, '__name__', ''), sorted({one.name for _, one in self._handlers()}))}"
            )
        return [one for one in records if (getattr(one, "app", None), one.handler) in names]

    def _read_dead(self) -> list[Dead]:
        found: list[Dead] = []
        for app in self.apps:
            with opened(app) as queue:
                found += [self._dead_record(app, letter) for letter in queue.dead_letters()]
        return found

    def _dead_record(self, app: Lightbus, letter: DeadLetter) -> Dead:
        handler = None if letter.handler is None else app.handlers.get(letter.handler)
        message = attrs.evolve(
            codec.read_message(app.name, letter.delivery),
            event=letter.event,
            source=letter.source,
            attempt=letter.attempt,
            redelivered=False,  # only by who looks at it
        )
        return Dead(
            handler=letter.handler,
            event=letter.event,
            payload=_payload(handler, letter.delivery),
            attempt=letter.attempt,
            error=f"{letter.error}: {letter.error_message}" if letter.error_message else letter.error,
            error_type=letter.error_type,
            traceback=letter.traceback,
            app=app.name,
            message=message,
        )

    # --- called by what runs

    def _note_published(self, publication: Publication, routed: bool) -> None:
        delivery = _as_delivery(publication)
        message = codec.read_message("", delivery)
        app = self._app(message.source)
        event_type = None if app is None else app.events.get(message.event)
        payload = _json(delivery.body)
        if event_type is not None:
            with contextlib.suppress(errors.InvalidPayload):
                payload = codec.build_event(event_type, delivery.body)
        headers = publication.properties.get("headers") or {}
        delay = sum(1 << level for level in range(topology.DELAY_LEVELS) if topology.delay_header(level) in headers)
        self._published.append(
            Published(
                event=message.event,
                payload=payload,
                source=message.source,
                delay=delay,
                routed=routed,
                message=message,
            )
        )

    def _note_handled(self, app: Lightbus, handler: Handler, delivery: Delivery) -> None:
        message = codec.read_message(app.name, delivery)
        self._attempts.append(
            Handled(
                handler=handler.name,
                event=message.event,
                payload=_payload(handler, delivery),
                attempt=message.attempt,
                app=app.name,
                message=message,
            )
        )

    def _note_failed(self, app: Lightbus, handler: Handler | None, delivery: Delivery, error: BaseException) -> None:
        with contextlib.suppress(errors.DecodeError):  # its properties are malformed: there is no envelope to show
            message = codec.read_message(app.name, delivery)
            self._attempts.append(
                Failed(
                    handler=None if handler is None else handler.name,
                    event=message.event,
                    payload=_payload(handler, delivery),
                    attempt=message.attempt,
                    error=errors.summary(errors.without_groups(error)),
                    exception=error,
                    app=app.name,
                    message=message,
                )
            )

    # --- asking the apps

    def _app(self, name: str) -> Lightbus | None:
        return next((app for app in self.apps if app.name == name), None)

    def _names(self) -> str:
        names = [repr(app.name) for app in self.apps]
        return f"app {names[0]}" if len(names) == 1 else f"the apps {', '.join(names)}"

    def _handlers(self) -> list[tuple[Lightbus, Handler]]:
        return [(app, handler) for app in self.apps for handler in app.handlers.values()]

    def _event_names(self) -> set[str]:
        """What the apps say, and what they hear by a full name."""
        heard = {pattern for _, handler in self._handlers() for pattern in handler.patterns}
        return {name for app in self.apps for name in app.events} | {one for one in heard if not _is_wild(one)}

    def _is_known(self, target: str) -> bool:
        return _is_wild(target) or target in self._event_names()

    def _declared(self, cls: type[Any]) -> EventType:
        """
        Raises:
            errors.UnknownEvent: none of the apps has declared it.
        """
        event_type = events.event_type_of(cls)
        for app in self.apps:
            if event_type is not None and app.events.get(event_type.name) == event_type:
                return event_type
        twins = [app.events[event_type.name].cls for app in self.apps if event_type and event_type.name in app.events]
        if event_type is None:
            why = "it is not an event class: decorate it with @app.event"
        elif twins:
            why = f"that declares {twins[0].__module__}.{twins[0].__qualname__}, another class. Import it from there"
        else:
            why = "it was declared on another app. Pass that app to the TestBus as well"
        raise errors.UnknownEvent(f"{cls.__module__}.{cls.__qualname__} is not declared on {self._names()}: {why}.")

    # --- is it used as it can be?

    def _check_started(self) -> None:
        if self._stack is None:
            raise errors.TestBusError(
                f"This TestBus of {self._names()} has not started: enter it first, "
                "`async with TestBus(app) as bus:`, or `with`."
            )

    def _check_used(self) -> None:
        if self._stack is None and not self._publishers:
            self._check_started()

    def _check_handlers(self) -> None:
        """
        Raises:
            errors.TestBusError: a handler was declared too late to be run.
        """
        if self._host is None:
            return
        for app in self.apps:
            late = set(app.handlers) - self._host.handlers[app.name]
            if late:
                raise errors.TestBusError(
                    f"handler {sorted(late)[0]!r} of app {app.name!r} was declared after the TestBus had started, so "
                    "it does not run. Declare it earlier."
                )


def _as_delivery(publication: Publication) -> Delivery:
    no_channel: Any = None
    return Delivery(
        no_channel,
        0,
        False,
        publication.exchange,
        publication.routing_key,
        dict(publication.properties),
        publication.body,
    )


def _payload(handler: Handler | None, delivery: Delivery) -> Any:
    """As the handler gets it; where it does not, or cannot, the JSON or the bytes."""
    if handler is not None:
        with contextlib.suppress(errors.DecodeError):
            for argument in handler.arguments(delivery):
                if not isinstance(argument, Message):
                    return argument
    return _json(delivery.body)


def _json(body: bytes) -> Any:
    try:
        return codec.decode(Any, body)
    except errors.DecodeError:
        return body


def _key(letter: Dead) -> tuple[str, str | None, str]:
    return letter.app, letter.handler, letter.message.id


def _is_wild(pattern: str) -> bool:
    return "*" in pattern or "#" in pattern


def _as_argument(letter: Dead) -> str:
    return repr(letter.event if letter.handler is None else letter.handler)


def _near(given: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(given, known, n=1)
    return f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(known) or 'none'}."


def _shown(value: object) -> str:
    name = getattr(value, "__name__", None)
    return name if isinstance(name, str) else repr(value)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _some(lines: Sequence[str]) -> str:
    shown = [f"  {line}" for line in lines[:SHOWN]]
    if len(lines) > SHOWN:
        shown.append(f"  ... and {len(lines) - SHOWN} more")
    return "\n".join(shown)


def _checked_apps(apps: Sequence[object]) -> tuple[Lightbus, ...]:
    """
    Raises:
        errors.TestBusError: no app, something else than one, or two of the same name.
    """
    checked: dict[str, Lightbus] = {}
    for app in apps:
        if not isinstance(app, Lightbus):
            raise errors.TestBusError(
                f"TestBus takes Lightbus apps, not {app!r}. Import the app: from billing.bus import app"
            )
        if checked.setdefault(app.name, app) is not app:
            raise errors.TestBusError(
                f"TestBus was given two apps called {app.name!r}, which would be the same app on a broker. "
                "Give them different names."
            )
    if not checked:
        raise errors.TestBusError("TestBus needs at least one app: TestBus(app).")
    return tuple(checked.values())


def _checked_seconds(option: str, value: object, *, lowest: float = 0.001) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not lowest <= value < math.inf:
        raise errors.InvalidOption(f"TestBus: {option}={value!r}: use seconds, {lowest:g} or more.")
    return float(value)


def _refuse_in_event_loop(called: str, instead: str) -> None:
    try:
        anyio.lowlevel.current_token()
    except RuntimeError:
        return
    raise errors.TestBusError(f"{called} would block the event loop that runs here. Use `{instead}`.")
