"""`Lightbus`: what an application publishes and handles, as decorators."""

# At the end of a timeout, a PublishError reports what is known of the outcome. A cancel scope could not report that.
# ruff: noqa: ASYNC109

from __future__ import annotations

import contextlib
import os
import sys
import weakref
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from contextvars import ContextVar
from datetime import datetime, timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeVar, dataclass_transform, overload

import anyio
import anyio.to_thread
import attrs

from lightbus import errors, event_loop, handler, options
from lightbus import event as events
from lightbus.event import EventType
from lightbus.handler import Handler, Inbox
from lightbus.living import Living
from lightbus.message import Receipt
from lightbus.retry import Retry
from lightbus.transport import Publication
from lightbus.unknown_events import suggestion, unknown_event
from lightbus.wire import codec, topology
from lightbus.wire.topology import BUS, MAIN, ConsumedQueue, QueueType

# Modules that connect are imported on first use: kombu and py-amqp would double the time of `import lightbus`.
if TYPE_CHECKING:
    from lightbus.connection.dial import BrokerAddresses
    from lightbus.consuming.dispatcher import Dispatcher
    from lightbus.consuming.subscription import SubscriptionConfig
    from lightbus.dependencies import Dependencies
    from lightbus.middleware import Middleware
    from lightbus.modules import Included
    from lightbus.outcome import Observe
    from lightbus.publishing.publisher import Publisher
    from lightbus.service import Service

PUBLISH_TIMEOUT = 10.0
"""Seconds."""
PREFETCH = 200
"""RabbitMQ recommends 100 to 300 for throughput: enough to hide the round trip and to ack many deliveries at once. When
a worker dies, the broker counts a return for each delivery in its prefetch (the limit is 20), so `Consumer` lowers
the prefetch while events arrive that came back."""
CONCURRENCY = 32
_NO_DELAY = (0, timedelta(0))

refuse_outsider: Callable[[Lightbus], None] | None = None
"""Called with an app that is about to use its own broker. Set by `lightbus.testing.apps` while a TestBus runs."""

on_create: list[Callable[[Lightbus], None]] = []
"""Functions that are called with each new app, at the end of its `__init__`: how telemetry that is switched on for the
whole process reaches the apps that are created later. `existing_apps` has those that were created before."""

preparing: ContextVar[bool] = ContextVar("lightbus_preparing", default=False)
"""True while `Lightbus.prepare` calls the functions of `on_publish`: the event is stored now, and sent later."""

_apps: Living[Lightbus] = Living()

C = TypeVar("C", bound=type[Any])
F = TypeVar("F", bound=Callable[..., Any])
M = TypeVar("M")
P = TypeVar("P", bound=Callable[[Any, dict[str, Any]], None])
Observer = TypeVar("Observer", bound="Observe")
Wrap = Callable[[Handler], Handler]
OnPublish = Callable[[Any, dict[str, Any]], None]
Lifespan = Callable[["Lightbus"], AbstractAsyncContextManager[Any]]


@attrs.frozen
class _Given:
    """The URL as the user passed it, with its password. Its repr hides it from `vars` and debuggers."""

    value: Any = attrs.field(repr=False)


_MEANT_FOR_APP = {
    **dict.fromkeys(("broker", "broker_url", "dsn", "host", "uri"), "Use url=."),
    **dict.fromkeys(("max_retries", "retries", "backoff", "retry_policy"), "Use retry=Retry(delays=(1, 5, 30))."),
    **dict.fromkeys(("workers", "max_workers", "max_concurrency", "threads"), "Use concurrency=."),
    **dict.fromkeys(("prefetch_count", "qos"), "Use prefetch=."),
    "timeout": "Use publish_timeout=; @app.on(timeout=) is for handlers.",
    **dict.fromkeys(("exchange", "queue", "queue_name"), "Their names are derived from the app's name."),
    **dict.fromkeys(("durable", "auto_delete"), "Lightbus's queues and exchanges are always durable: remove it."),
    **dict.fromkeys(
        ("imports", "modules", "handlers", "packages", "autodiscover"), "Use include=['billing.handlers'], a list."
    ),
}
"""What to use instead of options that other libraries have."""

_MEANT_FOR_HANDLER = {
    "queue_name": "Use queue=, which gives the handler a separate queue.",
    "exchange": "Use source= to handle the events of one app only.",
    **dict.fromkeys(
        ("routing_key", "pattern", "event", "topic", "events"),
        "Pass the events as positional arguments: @app.on('user.registered').",
    ),
    **dict.fromkeys(
        ("max_retries", "retries", "backoff", "autoretry_for", "retry_backoff", "countdown"),
        "Use retry=Retry(delays=(1, 5, 30)).",
    ),
    **dict.fromkeys(("time_limit", "soft_time_limit"), "Use timeout=."),
    **dict.fromkeys(("max_workers", "workers"), "Use concurrency=."),
    **dict.fromkeys(
        ("durable", "auto_delete", "exclusive"), "Lightbus's queues are always durable and shared: remove it."
    ),
}
"""The same, for `@app.on`."""


class Lightbus:
    """An application on the bus: it publishes to its own exchange, and consumes its own queues.

    One class of over 300 lines, because it is the whole API of an application: mostly signatures and docstrings.
    """

    @options.explains_options("Lightbus(...)", _MEANT_FOR_APP)
    def __init__(
        self,
        name: str,
        *,
        url: str | Sequence[str] | None = None,
        retry: Retry | None = None,
        prefetch: int = PREFETCH,
        concurrency: int = CONCURRENCY,
        lifespan: Lifespan | None = None,
        publish_timeout: float | timedelta = PUBLISH_TIMEOUT,
        queue_type: QueueType = "quorum",
        include: Sequence[str] = (),
    ) -> None:
        """Create an app; nothing connects yet.

        Args:
            name: the name of the app's exchange, and the prefix of its queues' names: `[a-z][a-z0-9_-]*`.
            url: the broker, or several nodes of one cluster; by default the environment's LIGHTBUS_URL, read when the
                app first connects, and without that the embedded broker (`sqlite://`), with a warning in the log, or
                an error if LIGHTBUS_REQUIRE_URL=1. A relative path in it (`sqlite:///bus.db`, `cafile=ca.pem`) is
                relative to the working directory in which the app was created.
            retry: for handlers without their own `retry`, and for events that no handler matches; by default `Retry()`.
            prefetch: maximum number of unsettled deliveries, for each queue and worker process. A worker takes about a
                second's work, but at least `concurrency` deliveries.
            concurrency: maximum number of handlers that run at once, for each queue and worker process.
            lifespan: called with the app; returns an async context manager that surrounds the worker's life. What it
                yields is the app's `state`.
            publish_timeout: seconds (or a timedelta) within which a publish is confirmed or fails.
            queue_type: "quorum" (replicated, the default) or "classic".
            include: full names of modules that declare handlers, as in `["billing.handlers"]`. They are imported when
                a worker, a command or a TestBus needs the handlers (see `load`), not when a process only publishes.

        Raises:
            errors.InvalidName, errors.InvalidOption: an argument has an invalid value.
        """
        self.name = topology.check_app_name(name)
        owner = f"Lightbus({name!r})"
        if queue_type not in ("quorum", "classic"):
            raise errors.InvalidOption(f"{owner}: queue_type={queue_type!r}: use 'quorum' or 'classic'.")
        self.retry = Retry() if retry is None else handler.check_retry(retry, owner)
        self.prefetch = options.check_count(prefetch, owner, "prefetch", 65535)
        self.concurrency = options.check_count(concurrency, owner, "concurrency", 10_000)
        self.lifespan = lifespan
        self.publish_timeout = options.check_publish_timeout(publish_timeout, owner)
        self.queue_type: QueueType = queue_type
        self._included: Included | None = None
        if include != ():
            from lightbus.modules import Included

            self._included = Included(name, include)
        self.events: dict[str, EventType] = {}
        """Declared events by name."""
        self.handlers: dict[str, Handler] = {}
        """Handlers by name."""
        self._url = _Given(url)
        self._folder = _working_directory()
        """The working directory when the app was created: relative paths in the broker's URL are relative to it."""
        self._by_class: dict[type[Any], EventType] = {}
        self._middleware: list[Middleware] = []
        self._on_publish: list[OnPublish] = []
        self._observers: list[Observe] = []
        self._wraps: list[Wrap] = []
        self.services: list[Service] = []
        """What runs in each worker beside the handlers, such as an outbox's relay."""
        self._states: list[list[Any]] = []
        """What lifespans that run now have yielded, the last one at the end."""
        self._overrides: dict[Any, Callable[..., Any]] = {}
        self._broker: BrokerAddresses | None = None
        self._publisher: Publisher | None = None
        _apps.add(self)
        for function in on_create:
            function(self)

    def __repr__(self) -> str:
        return f"<Lightbus {self.name!r}: {len(self.events)} events, {len(self.handlers)} handlers>"

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled: the URL may have a password, and the connections belong to this process."""
        raise TypeError(
            f"The app {self.name!r} cannot be pickled: its URL may have a password. Import the app where it is needed."
        )

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, _memo: object) -> Self:
        """A copy of an object that holds an app holds the same app."""
        return self

    # --- declaring

    @property
    def include(self) -> tuple[str, ...]:
        """The modules that `load` imports."""
        return () if self._included is None else self._included.names

    def load(self) -> None:
        """Import the modules of `include`, so that all handlers are declared. A later call does nothing.

        Workers, commands, TestBus and the methods below that need handlers call it. Call it to read `handlers` and
        `events` yourself. Works from any thread.

        Raises:
            errors.IncludeError: a module does not exist, or raised an error while it was imported.
        """
        if self._included is not None:
            self._included.load(self)

    @overload
    @dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(attrs.field,))
    def event(self, cls: C, /) -> C: ...

    @overload
    def event(self, name: str | None = None, /, *, version: int = 1) -> _EventDecorator: ...

    def event(self, target: Any = None, /, *, version: int = 1) -> Any:
        """Declare an event of this app: `@app.event`, or `@app.event("user.registered", version=2)`.

        A plain class becomes a frozen, slotted, keyword-only attrs class, with the fields of its plain base classes; a
        plain class over a dataclass becomes a keyword-only dataclass. An attrs class, a dataclass, a msgspec.Struct or
        a Pydantic model is taken as it is.

        Raises:
            errors.InvalidEvent: a field's type cannot be written as JSON, the field would not be sent, or its default
                would be shared by all events; the message names the field.
            errors.InvalidName, errors.DuplicateEvent: the name is invalid, or already taken.
            errors.InvalidOption: the version is not a positive integer.
        """
        if isinstance(target, type):
            return self._declare(target, None, version)
        if target is not None and not isinstance(target, str):
            raise errors.InvalidEvent(f"@app.event takes a class, or an event's name, not {target!r}.")

        def declare(cls: object) -> type[Any]:
            return self._declare(cls, target, version)

        return declare

    def _declare(self, cls: object, name: str | None, version: int) -> type[Any]:
        if not isinstance(cls, type):
            raise errors.InvalidEvent(f"@app.event decorates a class, not {cls!r}.")
        planned = name if name is not None else events.default_name(cls.__name__)
        if planned in self.events:
            other = self.events[planned].cls
            raise errors.DuplicateEvent(
                f"{cls.__name__}: app {self.name!r} has an event {planned!r} already "
                f"({other.__module__}.{other.__qualname__}). Give one of them another name: @app.event('...')."
            )
        event_type = events.define(cls, name, version)
        self.events[event_type.name] = event_type
        self._by_class[event_type.cls] = event_type
        return event_type.cls

    @options.explains_options("@app.on(...)", _MEANT_FOR_HANDLER)
    def on(
        self,
        *targets: str | type[Any],
        source: str | None = None,
        queue: str | None = None,
        retry: Retry | None = None,
        timeout: float | timedelta | None = None,
        concurrency: int | None = None,
        name: str | None = None,
        middleware: Sequence[Any] = (),
        inbox: Inbox | None = None,
    ) -> Callable[[F], F]:
        """Handle events: `@app.on("user.registered")`, `@app.on("user.*", "invoice.#")`, `@app.on(UserRegistered)`.

        Args:
            targets: AMQP topic patterns (`*` is one word, `#` any number of them), or event classes.
            source: handle only events of this app.
            queue: a separate queue for the handler, here `billing.slow` for "slow".
            retry: by default the app's.
            timeout: seconds, or a timedelta, after which the handler has failed; 60 by default, up to 1,500. An async
                handler is cancelled; a sync one, whose thread cannot be stopped, is abandoned.
            concurrency: maximum number of concurrent runs of this handler in a worker process; by default, only the
                app's limit applies.
            name: the handler's name in retries and dead letters; by default the function's name. Keep it when you
                rename the function.
            middleware: for this handler only, inside of the app's middleware; see `middleware`.
            inbox: of `lightbus.outbox` or `lightbus.django`: the handler's effects in the database happen once, however
                often the event is delivered.

        Raises:
            errors.InvalidMiddleware: one of `middleware` is none.
            errors.InvalidHandler: the function's parameters cannot be filled; the message names the parameter and why.
            errors.InvalidName, errors.InvalidOption: an argument has an invalid value.
        """
        handler.refuse_bare(targets)
        # Annotations that are strings may name local variables of the caller. It is two frames up: `explains_options`
        # adds one.
        local_names = sys._getframe(2).f_locals  # pyright: ignore[reportPrivateUsage]  # documented, despite its name

        def register(function: F) -> F:
            made = handler.build(
                self.name,
                function,
                middleware=self._read_middleware(middleware),
                taken=self.handlers,
                targets=targets,
                source=source,
                queue=queue,
                retry=retry,
                default_retry=self.retry,
                timeout=timeout,
                concurrency=concurrency,
                name=name,
                local_names=local_names,
                inbox=inbox,
            )
            if made.parameters:
                made = self._with_dependencies(made, local_names)
            self.handlers[made.name] = made
            return function

        return register

    # --- around handling and publishing

    def middleware(self, target: M, /) -> M:
        """Wrap every handler of this app: `@app.middleware`. The first one that is added is the outermost.

        An async function wraps async handlers; a sync function wraps sync handlers, in the handler's thread. A class
        with the methods `handle` (async) and `handle_sync` wraps both. Each is called with the message and `call_next`,
        which runs the rest: further middleware, the decoding of the payload, the handler. It may raise (then the retry
        policy decides), and it may leave out `call_next` (then the handler does not run, and the event counts as
        handled).

        Raises:
            errors.InvalidMiddleware: it cannot be called like this. When a worker starts: the app has a handler of a
                kind that it cannot wrap.
        """
        self._middleware += self._read_middleware([target])
        return target

    def _read_middleware(self, targets: Sequence[object]) -> list[Middleware]:
        if targets == ():
            return []
        from lightbus import middleware

        return middleware.read_all(targets, f"app {self.name!r}")

    def on_publish(self, function: P, /) -> P:
        """Call a function before each publish: `@app.on_publish`. It gets the event and the headers, a dict to which it
        may add headers. It runs for `publish`, `publish_sync`, `publish_many` and `publish_many_sync`, and not for the
        copies of failed events. If it raises, nothing is sent.

        Raises:
            errors.InvalidMiddleware: it is not a sync function of two arguments.
        """
        handler.check_hook(function, f"app {self.name!r}", "on_publish", ("event", "headers"), errors.InvalidMiddleware)
        self._on_publish.append(function)
        # Only for apps that have such a function: the others pay nothing.
        vars(self)["_publication"] = self._publication_with_hooks
        return function

    def observe(self, function: Observer, /) -> Observer:
        """Call a function with the `Outcome` of each attempt of a handler, and of each publish: for metrics and logs.

        It is called in the worker's event loop for attempts, and where the caller waits for publishes. It must not
        block. What it raises is logged, and changes nothing. Call this before the app's first publish and before its
        worker starts.

        Raises:
            errors.InvalidOption: the app has published already, or it is not a sync function of one argument.
        """
        if handler.is_async(function):
            raise errors.InvalidOption(
                f"app {self.name!r}: observe() takes a sync function, not an async one. Put what it gets into a queue "
                "(asyncio.Queue.put_nowait), and let a task take it from there."
            )
        handler.check_hook(function, f"app {self.name!r}", "observe()", ("outcome",), errors.InvalidOption)
        if self._publisher is not None:
            raise errors.InvalidOption(
                f"app {self.name!r}: observe() must be called before the app's first publish. Call it where the app is "
                "created."
            )
        self._observers.append(function)
        return function

    @contextlib.contextmanager
    def observed_by(self, function: Observe) -> Generator[None]:
        """`observe` for a while: for what makes a publisher and a consumer meanwhile."""
        self._observers.append(function)
        try:
            yield
        finally:
            self._observers.remove(function)

    @property
    def observer(self) -> Observe | None:
        """Calls all functions given to `observe`; None where there is none."""
        if not self._observers:
            return None
        from lightbus.outcome import notifier

        return notifier(self._observers.copy())

    def wrap_handlers(self, wrap: Wrap, /) -> None:
        """Replace each handler by `wrap(handler)` when a worker starts: for telemetry. It gets the handler with all of
        its middleware, and sees the `Delivery` itself. The last one that is added is the outermost.
        """
        self._wraps.append(wrap)

    # --- dependencies

    def _with_dependencies(self, one: Handler, local_names: Mapping[str, Any]) -> Handler:
        from lightbus.dependencies import Dependencies

        resolved = Dependencies(self.name, one, self._states, local_names)
        resolved.use(self._overrides)
        return attrs.evolve(one, dependencies=resolved)

    @property
    def state(self) -> Any:
        """What the `lifespan` of the running worker has yielded, in the worker's process.

        Handlers and dependencies get it typed: `pool: State[Pool]`.

        Raises:
            errors.NoState: no worker of this app runs in this process, or its lifespan yields nothing.
        """
        from lightbus.dependencies import current_state

        return current_state(self.name, self._states)

    @contextlib.contextmanager
    def with_state(self, value: object) -> Generator[None]:
        """Within this block, `value` is the app's `state`: for tests without the app's lifespan."""
        entry = [value]
        self._states.append(entry)
        try:
            yield
        finally:
            self._states[:] = [one for one in self._states if one is not entry]

    @contextlib.contextmanager
    def override(self, dependency: Callable[..., Any], replacement: Callable[..., Any]) -> Generator[None]:
        """Within this block, handlers get `replacement` wherever they ask for `dependency`: for tests.

        The replacement may be a function or a generator, and have dependencies. It does not need the kind or the
        parameters of the original. Also `TestBus.override`.

        Raises:
            errors.InvalidDependency: no handler of this app asks for `dependency`, or the replacement cannot be used.
            errors.IncludeError: a module of `include` cannot be imported.
        """
        from lightbus.dependencies import check_override

        self.load()
        key = check_override(self.name, self._dependencies(), dependency, replacement)
        before = self._overrides.copy()
        try:
            self._override({**before, key: replacement})
            yield
        finally:
            self._override(before)

    def depends_on(self, function: Callable[..., Any]) -> bool:
        """Whether a handler of this app has this dependency, itself or through another one."""
        self.load()
        return any(one.asks_for(function) for one in self._dependencies())

    def _override(self, replaced: Mapping[Any, Callable[..., Any]]) -> None:
        for one in self._dependencies():
            one.use(replaced)
        self._overrides = dict(replaced)

    def _dependencies(self) -> list[Dependencies]:
        return [one.dependencies for one in self.handlers.values() if one.dependencies is not None]

    # --- publishing

    async def publish(
        self,
        event: object,
        *,
        delay: float | timedelta | None = None,
        headers: Mapping[str, Any] | None = None,
        timeout: float | timedelta | None = None,
        id: str | None = None,
        correlation_id: str | None = None,
        time: datetime | None = None,
    ) -> Receipt:
        """Publish and return when the broker has confirmed.

        Args:
            event: an instance of a class that this app has declared with `@app.event`.
            delay: seconds, or a timedelta, until it is delivered: up to 30 days, rounded up to whole seconds. The
                broker holds it.
            headers: custom AMQP headers: strings, integers, floats, booleans, datetimes. No name begins with
                `lightbus-` or `x-`.
            timeout: seconds, or a timedelta; by default the app's `publish_timeout`.
            id: `Message.id`, for an event that has an id already, such as an idempotency key: 1 to 255 bytes of
                printable text. By default a new UUIDv7. Lightbus does not remove duplicates: a handler can, by this id.
            correlation_id: `Message.correlation_id`, of the same form, such as a request's id. By default that of the
                event that is being handled; else the event's own id.
            time: `Message.time`, a datetime with a timezone, in whole seconds. By default now.

        Raises:
            errors.UnknownEvent: the app has not declared it.
            errors.InvalidPayload: a value does not have its field's type, a header cannot be sent, or the body is too
                large. Nothing was sent.
            errors.InvalidOption: the delay, timeout, id, correlation id or time is invalid. Nothing was sent.
            errors.PublishTimeout: not confirmed in time. It may have arrived, except with the subclasses
                PublishUnreachable and PublishBlocked.
            errors.PublishError: the broker refused it (PublishNacked, PublishRefused), or the app (PublisherRefused).
            errors.InvalidURL, errors.UnsupportedBroker: the app's URL cannot be used.
        """
        publication, level = self._publication(event, delay, headers)
        if id is not None or correlation_id is not None or time is not None:
            codec.set_envelope(publication.properties, id, correlation_id, time)
        return await self.publisher.publish(publication, timeout=self._timeout(timeout), delay_level=level)

    def publish_sync(
        self,
        event: object,
        *,
        delay: float | timedelta | None = None,
        headers: Mapping[str, Any] | None = None,
        timeout: float | timedelta | None = None,
        id: str | None = None,
        correlation_id: str | None = None,
        time: datetime | None = None,
    ) -> Receipt:
        """`publish` for code without an event loop: Django and Flask views, scripts, sync handlers.

        Blocks until the broker has confirmed. Arguments and errors are those of `publish`, and:

        Raises:
            errors.PublishInEventLoop: an event loop runs in this thread, which it would block.
        """
        event_loop.refuse("publish_sync()", "await app.publish(...)", errors.PublishInEventLoop)
        publication, level = self._publication(event, delay, headers)
        if id is not None or correlation_id is not None or time is not None:
            codec.set_envelope(publication.properties, id, correlation_id, time)
        return self.publisher.publish_sync(publication, timeout=self._timeout(timeout), delay_level=level)

    async def publish_many(
        self,
        events: Iterable[object],
        *,
        headers: Mapping[str, Any] | None = None,
        timeout: float | timedelta | None = None,
        correlation_id: str | None = None,
    ) -> list[Receipt]:
        """Publish many events, pipelined, and return when all are confirmed: a receipt for each, in order.

        All are validated before the first is sent; up to 1,000 are in flight at once. For an `id`, `time` or `delay`,
        which are of one event, call `publish` in several tasks: that is pipelined, too.

        Args:
            events: instances of classes that this app has declared.
            headers: custom AMQP headers, the same for all events.
            timeout: seconds (or a timedelta) for each event, from when it is sent; by default the app's
                `publish_timeout`.
            correlation_id: as for `publish`, the same for all events.

        Raises:
            errors.InvalidPayload, errors.UnknownEvent, errors.InvalidOption: one of them cannot be sent, or an argument
                is invalid. Nothing was sent.
            errors.PublishManyError: some were not confirmed; `outcomes` has a receipt or an error for each.
        """
        publications = [self._publication(event, None, headers)[0] for event in events]
        if correlation_id is not None:
            for publication in publications:
                codec.set_envelope(publication.properties, None, correlation_id, None)
        return await self.publisher.publish_many(publications, timeout=self._timeout(timeout))

    def publish_many_sync(
        self,
        events: Iterable[object],
        *,
        headers: Mapping[str, Any] | None = None,
        timeout: float | timedelta | None = None,
        correlation_id: str | None = None,
    ) -> list[Receipt]:
        """`publish_many` for code without an event loop. Raises errors.PublishInEventLoop if one is running."""
        event_loop.refuse("publish_many_sync()", "await app.publish_many(...)", errors.PublishInEventLoop)
        publications = [self._publication(event, None, headers)[0] for event in events]
        if correlation_id is not None:
            for publication in publications:
                codec.set_envelope(publication.properties, None, correlation_id, None)
        return self.publisher.publish_many_sync(publications, timeout=self._timeout(timeout))

    def prepare(
        self,
        event: object,
        *,
        headers: Mapping[str, Any] | None = None,
        id: str | None = None,
        correlation_id: str | None = None,
        time: datetime | None = None,
    ) -> Publication:
        """The message that `publish` would send, with an id, without sending it: for an outbox.

        Arguments and errors are those of `publish`. Functions of `on_publish` are called.
        """
        token = preparing.set(True)
        try:
            publication, _ = self._publication(event, None, headers)
        finally:
            preparing.reset(token)
        if id is not None or correlation_id is not None or time is not None:
            codec.set_envelope(publication.properties, id, correlation_id, time)
        return publication

    def _publication(
        self, event: object, delay: float | timedelta | None, headers: Mapping[str, Any] | None
    ) -> tuple[Publication, int | None]:
        event_type = self._by_class.get(type(event))
        if event_type is None:
            raise unknown_event(self.name, self.events, event, self._not_loaded())
        body = codec.encode(event_type, event)
        publication = Publication(
            self.name, event_type.name, body, codec.event_properties(self.name, event_type, headers)
        )
        if delay is None or delay in _NO_DELAY:
            return publication, None
        return topology.delayed(publication, delay)

    _encode = _publication
    """The same where `on_publish` has replaced it."""

    def _publication_with_hooks(
        self, event: object, delay: float | timedelta | None, headers: Mapping[str, Any] | None
    ) -> tuple[Publication, int | None]:
        from lightbus import middleware

        if type(event) not in self._by_class:
            return self._encode(event, delay, headers)  # raises the error
        added = dict(headers or {})
        for function in self._on_publish:
            returned = function(event, added)
            if returned is not None:
                owner = (
                    f"event not sent: on_publish of app {self.name!r}: {getattr(function, '__qualname__', function)}"
                )
                middleware.refuse_unfinished(returned, owner, may_be_entered=True)
        return self._encode(event, delay, added)

    def suggestion(self, event_name: str) -> str:
        """A hint for an unknown event name: the most similar one."""
        return suggestion(self.events, event_name, self._not_loaded())

    def _not_loaded(self) -> tuple[str, ...]:
        return () if self._included is None or self._included.loaded else self._included.names

    def _timeout(self, timeout: float | timedelta | None) -> float:
        return self.publish_timeout if timeout is None else options.check_publish_timeout(timeout, "publish")

    # --- connecting

    @property
    def broker(self) -> BrokerAddresses:
        """The broker that the app connects to.

        Raises:
            errors.InvalidURL, errors.UnsupportedBroker: the URL cannot be read or used, or is not set although
                LIGHTBUS_REQUIRE_URL=1.
            errors.TestBusError: a test runs on a TestBus that does not have this app.
        """
        if self._broker is None:
            from lightbus.connection.dial import BrokerAddresses

            if refuse_outsider is not None:
                refuse_outsider(self)
            if self._url.value is None:
                self._broker = BrokerAddresses.from_environment(folder=self._folder)
            else:
                self._broker = BrokerAddresses.parse(self._url.value, folder=self._folder)
        return self._broker

    @property
    def has_publisher(self) -> bool:
        """Whether the app has published, was opened, or has a worker in this process."""
        return self._publisher is not None

    @property
    def publisher(self) -> Publisher:
        """The app's publisher. It connects with its first publish."""
        publisher = self._publisher
        if publisher is None:
            made = self._new_publisher()
            # Two threads may get here at once. Both use the publisher that is set first; the other one never starts.
            publisher = self._publisher = self.__dict__.setdefault("_first_publisher", made)
            if publisher is made:
                # The publisher's thread keeps the publisher alive: let go of it when the app is garbage-collected.
                weakref.finalize(self, publisher.let_go).atexit = False
        return publisher

    def _new_publisher(self) -> Publisher:
        from lightbus.publishing.publisher import Publisher

        observe = self.observer
        if observe is None:
            return Publisher(self.name, self.broker, timeout=self.publish_timeout, queue_type=self.queue_type)
        from lightbus.publishing.observed import ObservedPublisher

        return ObservedPublisher(
            self.name, self.broker, timeout=self.publish_timeout, queue_type=self.queue_type, observe=observe
        )

    @contextlib.contextmanager
    def redirected(self, broker: BrokerAddresses, publisher: Publisher) -> Generator[None]:
        """Within this block, publish to and consume from another broker. For `lightbus.testing`."""
        before = self._broker, self._publisher
        self._broker, self._publisher = broker, publisher
        try:
            yield
        finally:
            self._broker, self._publisher = before

    async def __aenter__(self) -> Self:
        await anyio.to_thread.run_sync(self.publisher.open, self.publish_timeout)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self.publisher.close)

    def __enter__(self) -> Self:
        self.publisher.open(self.publish_timeout)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.publisher.close()

    # --- consuming

    def queue_suffixes(self) -> list[str]:
        """The queues that this app consumes: the app's own (`main`) first, then the separate ones of handlers.

        Raises:
            errors.IncludeError: see `load`.
        """
        self.load()
        return [MAIN, *sorted({one.queue for one in self.handlers.values()} - {MAIN})]

    def consumed_queues(self) -> list[ConsumedQueue]:
        """The queues with their patterns and retry delays."""
        return [self._consumed_queue(suffix) for suffix in self.queue_suffixes()]

    def _consumed_queue(self, suffix: str) -> ConsumedQueue:
        mine = [one for one in self.handlers.values() if one.queue == suffix]
        patterns = dict.fromkeys((one.source or BUS, pattern) for one in mine for pattern in one.patterns)
        delays = {delay for one in mine for delay in one.retry.delays} | set(self.retry.delays)
        return ConsumedQueue(self.name, suffix, tuple(patterns), tuple(sorted(delays)))

    def topology(self) -> topology.Topology:
        """Everything that a worker of this app declares."""
        return topology.consuming(self.name, self.consumed_queues(), self.queue_type)

    def consumer(
        self, *, queues: Sequence[str] = (), prefetch: int | None = None, concurrency: int | None = None
    ) -> Dispatcher:
        """A consumer of the app's queues, or of some of them (by suffix; `main` is the app's own).

        Raises:
            errors.InvalidOption: a queue that the app does not have.
        """
        from lightbus.consuming.dispatcher import Dispatcher

        return Dispatcher(
            app=self.name,
            broker=self.broker,
            subscriptions=self.subscriptions(queues=queues, prefetch=prefetch, concurrency=concurrency),
            wanted=self.topology(),
            publisher=self.publisher,
            retry=self.retry,
            observe=self.observer,
        )

    def subscriptions(
        self, *, queues: Sequence[str] = (), prefetch: int | None = None, concurrency: int | None = None
    ) -> list[SubscriptionConfig]:
        """The queues that a worker consumes, and how.

        Raises:
            errors.InvalidOption: a queue that the app does not have.
            errors.InvalidMiddleware: a middleware cannot wrap one of the handlers.
            errors.IncludeError: see `load`.
        """
        from lightbus.consuming import credit
        from lightbus.consuming.subscription import SubscriptionConfig

        known = self.queue_suffixes()
        for queue in queues:
            if queue not in known:
                raise errors.InvalidOption(f"app {self.name!r} has no queue {queue!r}. It has: {', '.join(known)}.")
        wanted = list(dict.fromkeys(queues) or known)
        return [
            SubscriptionConfig(
                name=topology.queue_name(self.name, suffix),
                suffix=suffix,
                handlers={one.name: self._wrapped(one) for one in self.handlers.values() if one.queue == suffix},
                prefetch=self.prefetch
                if prefetch is None
                else options.check_count(prefetch, "worker", "prefetch", 65535),
                concurrency=self.concurrency
                if concurrency is None
                else options.check_count(concurrency, "worker", "concurrency", 10_000),
                budget=credit.BUDGET // len(wanted),
            )
            for suffix in wanted
        ]

    def _wrapped(self, one: Handler) -> Handler:
        if one.dependencies is not None:
            one.dependencies.check_state(has_lifespan=self.lifespan is not None)
            one = one.dependencies.around(one)
        if one.inbox is not None:
            one = one.inbox.around(one)
        stack = (*self._middleware, *one.middleware)
        if stack:
            from lightbus import middleware

            one = middleware.around(self.name, one, stack)
        for wrap in self._wraps:
            one = wrap(one)
        return one


class _EventDecorator:
    """The type of `@app.event(...)`, for type checkers only."""

    @dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(attrs.field,))
    def __call__(self, cls: C, /) -> C:
        raise NotImplementedError


def existing_apps() -> list[Lightbus]:
    """The apps of this process that are in use."""
    return [*_apps]


def _working_directory() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # deleted, which matters only for relative paths
        return None
