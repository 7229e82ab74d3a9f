"""OpenTelemetry: a span for each publish and for each attempt of a handler, and the metrics of the conventions.

`LightbusInstrumentor` switches it on. Needs `lightbus-amqp[otel]`, which is the API package only: what is recorded, and
where it goes, is decided by the SDK that the program sets up. Names are those of the semantic conventions for messaging
in the version of `SCHEMA_URL`.

The span of a publish travels with the message until the outcome of the publish is known: as a `_Carrier`, a header's
value. So no table of open spans is needed: if an outcome is never known, the span is released with its message.
"""

from __future__ import annotations

import atexit
import inspect
import logging
import time
import weakref
from collections.abc import Awaitable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self
from urllib.parse import urlsplit

import attrs
import msgspec
from opentelemetry import context as contexts
from opentelemetry import metrics, propagate, trace
from opentelemetry.context import Context
from opentelemetry.metrics import MeterProvider
from opentelemetry.propagators.textmap import Getter, Setter, TextMapPropagator
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode, TracerProvider

from lightbus import app as apps
from lightbus import errors, exit_handlers, middleware
from lightbus.app import Lightbus
from lightbus.handler import Handler
from lightbus.message import origin_of
from lightbus.outcome import Outcome
from lightbus.pattern import topic_matches
from lightbus.transport import Delivery, Publication
from lightbus.version import __version__
from lightbus.wire import codec, topology

if TYPE_CHECKING:  # it imports kombu
    from lightbus.connection.dial import BrokerAddresses

logger = logging.getLogger("lightbus")

SCHEMA_URL: Final = "https://opentelemetry.io/schemas/1.44.0"
"""The version of the semantic conventions. Those for messaging are not stable yet, so a later one may rename
things."""

RUNNING = 10_000
"""Runs of handlers whose outcome is not known yet; with more, the span of the oldest one ends without it."""
REMEMBERED = 10_000
"""Destinations whose names are remembered; forgotten all at once when there are more."""

SYSTEM: Final = "messaging.system"
OPERATION_NAME: Final = "messaging.operation.name"
OPERATION_TYPE: Final = "messaging.operation.type"
DESTINATION: Final = "messaging.destination.name"
TEMPLATE: Final = "messaging.destination.template"
ROUTING_KEY: Final = "messaging.rabbitmq.destination.routing_key"
DELIVERY_TAG: Final = "messaging.rabbitmq.message.delivery_tag"
MESSAGE_ID: Final = "messaging.message.id"
CONVERSATION_ID: Final = "messaging.message.conversation_id"
SERVER_ADDRESS: Final = "server.address"
SERVER_PORT: Final = "server.port"
ERROR_TYPE: Final = "error.type"

HANDLER: Final = "lightbus.handler"
ATTEMPT: Final = "lightbus.attempt"
OUTCOME: Final = "lightbus.outcome"
DELAY: Final = "lightbus.delay"
ROUTED: Final = "lightbus.routed"
REDELIVERED: Final = "lightbus.redelivered"

_BOUNDARIES = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
"""Seconds, as the conventions give them."""

Attributes = dict[str, str | int | float | bool]


class LightbusInstrumentor:
    """Traces and metrics of all apps of this process, or of some of them.

    `opentelemetry-instrument` finds it by its entry point and calls `instrument`. As with OpenTelemetry's own
    instrumentors, there is one per process: each `LightbusInstrumentor()` is the same object. (It is none of their
    subclasses: these need the package opentelemetry-instrumentation, which a program without that command does not.)
    """

    _instance: ClassVar[Any] = None

    def __new__(cls) -> Self:
        if cls._instance is None:
            cls._instance = super().__new__(cls)
        found: Self = cls._instance
        return found

    def __init__(self) -> None:
        if hasattr(self, "_by_app"):
            return
        self._everywhere: _Instruments | None = None
        self._by_app: weakref.WeakKeyDictionary[Lightbus, _Instrumented] = weakref.WeakKeyDictionary()
        atexit.register(self._end_running)
        exit_handlers.before_exit.append(self._send_now)

    @property
    def is_instrumented_by_opentelemetry(self) -> bool:
        """Whether `instrument` was called, and not undone."""
        return self._everywhere is not None

    def instrument(
        self, *, tracer_provider: TracerProvider | None = None, meter_provider: MeterProvider | None = None, **_: Any
    ) -> None:
        """Instrument all apps: those that exist, and those that will be created.

        An app that has published already cannot be observed any more: it is left out, with a warning in the log.

        Args:
            tracer_provider, meter_provider: by default the global ones, also if they are set later.
        """
        if self._everywhere is not None:
            logger.warning("Lightbus is instrumented already. To use other providers, call uninstrument() first.")
            return
        self._everywhere = _Instruments(tracer_provider, meter_provider)
        apps.on_create.append(self._on_create)
        for app in apps.existing_apps():
            try:
                self._instrument(app, self._everywhere)
            except errors.InvalidOption:
                logger.warning(
                    "App %r is not traced: it has published already. Call LightbusInstrumentor().instrument() before "
                    "the first publish, where the program starts.",
                    app.name,
                )

    def uninstrument(self, **_: Any) -> None:
        """Undo `instrument` and `instrument_app`. Spans of handlers that run now end here."""
        if self._everywhere is not None:
            apps.on_create.remove(self._on_create)
            self._everywhere = None
        for app in [*self._by_app]:
            self.uninstrument_app(app)

    def instrument_app(
        self,
        app: Lightbus,
        *,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
    ) -> None:
        """Instrument one app. Call it before the app's first publish and before its worker starts.

        Args:
            tracer_provider, meter_provider: by default the global ones, also if they are set later.

        Raises:
            errors.InvalidOption: the app has published already.
        """
        self._instrument(app, _Instruments(tracer_provider, meter_provider))

    def uninstrument_app(self, app: Lightbus) -> None:
        """Undo this for one app."""
        instrumented = self._by_app.get(app)
        if instrumented is not None:
            instrumented.end()

    def _on_create(self, app: Lightbus) -> None:
        if self._everywhere is not None:
            self._instrument(app, self._everywhere)

    def _instrument(self, app: Lightbus, instruments: _Instruments) -> None:
        instrumented = self._by_app.get(app)
        if instrumented is None:
            instrumented = _Instrumented(app)
            app.observe(instrumented.observe)  # first: it may refuse
            app.on_publish(instrumented.on_publish)
            app.wrap_handlers(instrumented.wrap)
            self._by_app[app] = instrumented
        instrumented.instruments = instruments

    def _end_running(self) -> None:
        """At the end of the process, and before the SDK sends its last spans."""
        for instrumented in [*self._by_app.values()]:
            instrumented.end()

    def _send_now(self) -> None:
        """At the end of a process that does not wait for its handlers: the SDK cannot notice that."""
        used = [self._everywhere, *(one.instruments for one in self._by_app.values())]
        self._end_running()
        for instruments in dict.fromkeys(filter(None, used)):
            instruments.send_now()


class _Instruments:
    """What records: a tracer, and an instrument for each metric."""

    def __init__(self, tracer_provider: TracerProvider | None, meter_provider: MeterProvider | None) -> None:
        self._providers = tracer_provider, meter_provider
        self.tracer = trace.get_tracer("lightbus", __version__, tracer_provider, SCHEMA_URL)
        meter = metrics.get_meter("lightbus", __version__, meter_provider, SCHEMA_URL)
        self.sent = meter.create_counter(
            "messaging.client.sent.messages",
            unit="{message}",
            description="Number of messages producer attempted to send to the broker.",
        )
        self.consumed = meter.create_counter(
            "messaging.client.consumed.messages",
            unit="{message}",
            description="Number of messages that were delivered to the application.",
        )
        self.operation_duration = meter.create_histogram(
            "messaging.client.operation.duration",
            unit="s",
            description="Duration of messaging operation initiated by a producer or consumer client.",
            explicit_bucket_boundaries_advisory=_BOUNDARIES,
        )
        self.process_duration = meter.create_histogram(
            "messaging.process.duration",
            unit="s",
            description="Duration of processing operation.",
            explicit_bucket_boundaries_advisory=_BOUNDARIES,
        )

    def send_now(self) -> None:
        """Have the SDK send what it has: its providers can, the API's cannot."""
        tracers, meters = self._providers
        for provider in (tracers or trace.get_tracer_provider(), meters or metrics.get_meter_provider()):
            flush = getattr(provider, "force_flush", None)
            if flush is not None:
                flush()


class _Carrier(str):
    """The value of a header, and the span whose context it has, until the outcome of its publish is known."""

    __slots__ = ("span",)
    span: Span | None

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (str.__str__(self),)


class _HeaderGetter(Getter[Mapping[str, Any]]):
    """Reads the context from the headers of a message, which any AMQP program may have written."""

    def get(self, carrier: Mapping[str, Any], key: str) -> list[str] | None:
        value = carrier.get(key)
        return [value] if isinstance(value, str) else None

    def keys(self, carrier: Mapping[str, Any]) -> list[str]:
        return [*carrier]


class _HeaderSetter(Setter[dict[str, Any]]):
    """Writes the context into headers; those that the publisher has given stay."""

    def set(self, carrier: dict[str, Any], key: str, value: str) -> None:
        carrier.setdefault(key, value)


_getter = _HeaderGetter()
_setter = _HeaderSetter()
_NOWHERE: Final = Context()


@attrs.frozen
class _Destination:
    """What all spans of one event and one operation have in common."""

    span: str
    """The span's name."""
    attributes: Attributes
    metrics: Attributes

    def labels(self, error: BaseException | None) -> Attributes:
        """The attributes of metrics."""
        return self.metrics if error is None else {**self.metrics, ERROR_TYPE: errors.type_name(error)}


class _Run(msgspec.Struct, eq=False):
    """A handler's run whose outcome is not known yet."""

    span: Span
    destination: _Destination
    delivery: Delivery
    """So that no other delivery gets its `id`."""
    ended: int | None = None
    """Nanoseconds since 1970."""


class _Instrumented:
    """One app: the functions that its hooks call. No error in here may reach them."""

    def __init__(self, app: Lightbus) -> None:
        self.name = app.name
        self.instruments: _Instruments | None = None
        """None: the app is not instrumented (any more)."""
        self._app = weakref.ref(app)
        self._broker: BrokerAddresses | None = None
        self._internal = topology.internal_name(app.name)
        self._system: Attributes = {}
        self._names: dict[type, str] = {}
        self._textmap: TextMapPropagator | None = None
        self._fields: set[str] = set()
        """The headers that the global propagator writes."""
        self._destinations: dict[Any, _Destination] = {}
        self._running: dict[tuple[int, str | None], _Run] = {}

    def end(self) -> None:
        self.instruments = None
        for key in [*self._running]:
            self._end_without_outcome(key)

    def _end_without_outcome(self, key: tuple[int, str | None]) -> None:
        run = self._running.pop(key, None)
        if run is not None:
            run.span.end(run.ended)

    # --- publishing

    def on_publish(self, event: object, headers: dict[str, Any]) -> None:
        instruments = self.instruments
        if instruments is None:
            return
        try:
            self._start_publish(instruments, event, headers)
        except Exception:
            logger.exception("App %r publishes without a span, since OpenTelemetry has failed.", self.name)

    def _start_publish(self, instruments: _Instruments, event: object, headers: dict[str, Any]) -> None:
        textmap = propagate.get_global_textmap()
        if textmap is not self._textmap:
            self._textmap, self._fields = textmap, textmap.fields
        fields, context = self._fields, contexts.get_current()
        if not fields:  # nothing travels with the message: `_take_span` starts the span
            return
        name = self._event_name(type(event))
        prepared = apps.preparing.get()
        kind, links = SpanKind.PRODUCER, None
        if headers and not fields.isdisjoint(headers):
            given = textmap.extract(headers, Context(), _getter)
            creation = trace.get_current_span(given).get_span_context()
            if creation.is_valid:  # the publisher's own context: the subscribers' spans belong to that
                if prepared:
                    return
                kind, links = SpanKind.CLIENT, [Link(creation)]
                if not trace.get_current_span(context).get_span_context().is_valid:
                    context = given
        one = self._publishing("create" if prepared else "publish", name)
        span = instruments.tracer.start_span(one.span, context, kind, one.attributes, links)
        textmap.inject(headers, trace.set_span_in_context(span, context), _setter)
        if prepared:
            span.end()
            return
        for key in fields:
            value = headers.get(key)
            if isinstance(value, str):
                headers[key] = carrier = _Carrier(value)
                carrier.span = span
                return

    def _published(self, instruments: _Instruments, outcome: Outcome) -> None:
        publication: Publication = origin_of(outcome.message)
        error = outcome.error
        one = self._publishing("publish", publication.routing_key)
        span = self._take_span(instruments, outcome, publication, one)
        try:
            if span.is_recording():
                properties = publication.properties
                attributes: Attributes = {
                    MESSAGE_ID: properties["message_id"],
                    CONVERSATION_ID: properties["correlation_id"],
                }
                if outcome.delay is not None:
                    attributes[DELAY] = outcome.delay
                if outcome.receipt is not None and not outcome.receipt.routed:
                    attributes[ROUTED] = False
                span.set_attributes(attributes)
                if error is not None:
                    _record(span, error)
        finally:
            span.end()
        labels = one.labels(error)
        instruments.sent.add(1, labels)
        instruments.operation_duration.record(outcome.seconds, labels)

    def _take_span(
        self, instruments: _Instruments, outcome: Outcome, publication: Publication, one: _Destination
    ) -> Span:
        """The span that `on_publish` has started; else a new one: of an event that was prepared before, such as a
        relay's, or where the propagator writes no header. The caller's context is current here."""
        headers = publication.properties["headers"]
        for key, value in headers.items():
            if type(value) is _Carrier and value.span is not None:
                span, value.span = value.span, None
                headers[key] = str.__str__(value)  # other observers get what they expect
                return span
        context = propagate.extract(headers, _NOWHERE, _getter)
        creation = trace.get_current_span(context).get_span_context()
        began = time.time_ns() - int(outcome.seconds * 1e9)
        if not creation.is_valid:
            return instruments.tracer.start_span(
                one.span, contexts.get_current(), SpanKind.PRODUCER, one.attributes, start_time=began
            )
        return instruments.tracer.start_span(
            one.span, context, SpanKind.CLIENT, one.attributes, [Link(creation)], began
        )

    # --- handling

    def wrap(self, handler: Handler) -> Handler:
        """The same handler, in a span for each run, which is current while it runs."""
        function, arguments = handler.function, handler.arguments
        name, queue, running = handler.name, topology.queue_name(self.name, handler.queue), self._running

        def ended(delivery: Delivery) -> None:
            run = running.get((id(delivery), name))
            if run is not None:
                run.ended = time.time_ns()

        async def traced(delivery: Delivery) -> Any:
            self._start_run(handler, queue, delivery)
            try:
                return await function(*arguments(delivery))
            finally:
                ended(delivery)

        async def rest(delivery: Delivery, returned: Awaitable[Any]) -> Any:
            try:
                return await returned
            finally:
                ended(delivery)

        def traced_sync(delivery: Delivery) -> Any:
            self._start_run(handler, queue, delivery)
            try:
                returned = function(*arguments(delivery))
            except BaseException:
                ended(delivery)
                raise
            if returned is not None and inspect.isawaitable(returned):
                return rest(delivery, returned)
            ended(delivery)
            return returned

        return attrs.evolve(
            handler, function=traced if handler.is_async else traced_sync, arguments=middleware.the_delivery
        )

    def _start_run(self, handler: Handler, queue: str, delivery: Delivery) -> None:
        """Start the span, and make it current: each run has a separate context, so nothing needs to be undone."""
        instruments = self.instruments
        if instruments is None:
            return
        try:
            key = id(delivery), handler.name
            if key in self._running:  # it was interrupted, and runs again
                self._end_without_outcome(key)
            one, attempt = self._handling(delivery, handler, queue)
            span, context = _start_process(instruments, one, delivery, attempt)
            contexts.attach(trace.set_span_in_context(span, context))
            if span.is_recording():
                if len(self._running) >= RUNNING:
                    self._end_without_outcome(next(iter(self._running.copy())))
                self._running[key] = _Run(span, one, delivery)
        except Exception:
            logger.exception("Handler %r runs without a span, since OpenTelemetry has failed.", handler.name)

    def _handled(self, instruments: _Instruments, outcome: Outcome) -> None:
        delivery: Delivery = origin_of(outcome.message)
        run = self._running.pop((id(delivery), outcome.handler), None)
        error = outcome.error
        if run is None:
            one, span = self._without_run(instruments, outcome, delivery)
        else:
            one, span = run.destination, run.span
        if span is not None:
            ended = None if run is None else run.ended
            try:
                span.set_attribute(OUTCOME, outcome.kind)
                if outcome.delay is not None:
                    span.set_attribute(DELAY, outcome.delay)
                if error is not None:
                    _record(span, error, ended)
            finally:
                span.end(ended)
        labels = one.labels(error)
        instruments.consumed.add(1, labels)
        instruments.process_duration.record(outcome.seconds, labels)

    def _without_run(
        self, instruments: _Instruments, outcome: Outcome, delivery: Delivery
    ) -> tuple[_Destination, Span | None]:
        """For an event that no handler matches, there is a span too. Another one without a run is not sampled."""
        app = self._app()
        handler = None if outcome.handler is None or app is None else app.handlers.get(outcome.handler)
        one, attempt = self._handling(delivery, handler, outcome.queue or "")
        if outcome.handler is not None:
            return one, None
        span, _ = _start_process(instruments, one, delivery, attempt)
        return one, span if span.is_recording() else None

    def observe(self, outcome: Outcome) -> None:
        """What it raises is logged by its caller."""
        instruments = self.instruments
        if instruments is None:
            return
        if outcome.queue is None:
            self._published(instruments, outcome)
        else:
            self._handled(instruments, outcome)

    # --- names

    def _event_name(self, cls: type) -> str:
        name = self._names.get(cls)
        if name is None:
            app = self._app()
            events = {} if app is None else app.events
            name = self._names[cls] = next(name for name, one in reversed(events.items()) if one.cls is cls)
        return name

    def _publishing(self, operation: str, event: str) -> _Destination:
        """What spans of an event that this app publishes have in common."""
        destinations = self._known_destinations()
        found = destinations.get((operation, event))
        if found is None:
            kind = "send" if operation == "publish" else operation
            app = self._app()
            # The rows of an outbox may have any number of names that this app does not declare.
            template = (self.name,) if app is not None and event not in app.events else None
            found = _destination(self._system, operation, kind, (self.name, event), event, {}, template)
            destinations[operation, event] = found
        return found

    def _handling(self, delivery: Delivery, handler: Handler | None, queue: str) -> tuple[_Destination, int]:
        """What spans of an event and its handler have in common; and which attempt this is."""
        destinations = self._known_destinations()
        source, event, attempt = delivery.exchange, delivery.routing_key, 1
        if not source or source == self._internal or "." in source:  # a copy; or a delayed event
            try:
                envelope = codec.read_envelope(self.name, delivery)
            except errors.DecodeError:
                pass
            else:
                source, event, attempt = envelope.source, envelope.event, envelope.attempt
        name = None if handler is None else handler.name
        key = source, event, name, queue
        found = destinations.get(key)
        if found is None:
            own: Attributes = {}
            template: tuple[str, ...] | None = (queue,)  # no handler: any routing key may have come
            if handler is not None:
                own[HANDLER] = handler.name
                if event in handler.patterns:
                    template = None
                else:
                    template = (source, next((one for one in handler.patterns if topic_matches(one, event)), ""), queue)
            found = _destination(self._system, "process", "process", (source, event, queue), event, own, template)
            destinations[key] = found
        return found, attempt

    def _known_destinations(self) -> dict[Any, _Destination]:
        """Those of the broker that the app uses now: within a TestBus it is another one."""
        app = self._app()
        if app is not None:
            try:
                broker = app.broker
            except errors.LightbusError:  # `outbox.add` in a process that has no broker
                broker = None
            if broker is not self._broker or not self._system:
                self._broker, self._system, self._destinations = broker, _system(broker), {}
        if len(self._destinations) >= REMEMBERED:
            self._destinations.clear()
        return self._destinations


def _system(broker: BrokerAddresses | None) -> Attributes:
    """The broker, as far as it is known: which node of a cluster a connection has, is not."""
    if broker is None:
        return {SYSTEM: "rabbitmq"}
    address = broker.addresses[0]
    attributes: Attributes = {SYSTEM: address.broker.messaging_system}
    if len(broker.addresses) == 1 and address.port is not None:
        attributes[SERVER_ADDRESS] = urlsplit(address.plain).hostname or "localhost"
        attributes[SERVER_PORT] = address.port
    return attributes


def _destination(
    system: Attributes,
    operation: str,
    operation_type: str,
    name: tuple[str, ...],
    event: str,
    own: Attributes,
    template: tuple[str, ...] | None = None,
) -> _Destination:
    """
    Args:
        name: exchange, routing key and queue, as far as there are such.
        template: the same with few values, where `name` may have very many.
    """
    full, event = _as_text(":".join(filter(None, name))), _as_text(event)
    common: Attributes = {**system, OPERATION_NAME: operation, OPERATION_TYPE: operation_type}
    attributes: Attributes = {**common, DESTINATION: full, **own}
    if event:
        attributes[ROUTING_KEY] = event
    if template is None:
        return _Destination(f"{operation} {full}", attributes, {**common, DESTINATION: full})
    short = _as_text(":".join(filter(None, template)))
    attributes[TEMPLATE] = short
    return _Destination(f"{operation} {short}", attributes, {**common, TEMPLATE: short})


def _as_text(name: str) -> str:
    """Names of other programs may be no UTF-8. An exporter drops such an attribute, and for a name its whole batch."""
    return name.encode(errors="backslashreplace").decode()


def _start_process(
    instruments: _Instruments, one: _Destination, delivery: Delivery, attempt: int
) -> tuple[Span, Context]:
    """The span of an attempt, and the context that came with the message. It has all attributes that are known now:
    the sampler sees them, and the SDK needs 0.9 us less than for a second set of them later.
    """
    attributes = {**one.attributes, ATTEMPT: attempt, DELIVERY_TAG: delivery.delivery_tag}
    if delivery.redelivered:
        attributes[REDELIVERED] = True
    headers: Any = None
    try:
        properties = codec.read_properties(delivery)
    except errors.DecodeError:
        pass
    else:
        headers = properties.get("headers")
        for name, key in ((MESSAGE_ID, "message_id"), (CONVERSATION_ID, "correlation_id")):
            value = properties.get(key)
            if isinstance(value, str) and value:
                attributes[name] = value
    context = propagate.extract(headers if isinstance(headers, dict) else {}, _NOWHERE, _getter)
    return instruments.tracer.start_span(one.span, context, SpanKind.CONSUMER, attributes), context


def _record(span: Span, error: BaseException, at: int | None = None) -> None:
    """As `Span.record_exception`, which fails where the error cannot be printed."""
    error_type, message = errors.type_name(error), errors.message_of(error)
    span.set_attribute(ERROR_TYPE, error_type)
    span.set_status(Status(StatusCode.ERROR, message))
    trace = _as_text(errors.format_traceback(error))
    exception = {"exception.type": error_type, "exception.message": message, "exception.stacktrace": trace}
    span.add_event("exception", exception, at)
