"""Log records as JSON lines, with the event that is being handled. For `--json-logs`, and for your own configuration.

Import it yourself: `import lightbus` does not.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from lightbus import errors
from lightbus.message import Message
from lightbus.outcome import Outcome
from lightbus.transport import Delivery
from lightbus.wire import codec, topology

logger = logging.getLogger("lightbus")

SCHEMA: Final = (
    "time",
    "level",
    "logger",
    "message",
    "worker",
    "app",
    "broker",
    "event",
    "id",
    "handler",
    "queue",
    "attempt",
    "outcome",
    "seconds",
    "delay",
    "trace_id",
    "span_id",
    "exception",
    "stack",
)
"""The names that `JSONLines` gives a meaning, in the order of a line; docs/howto/logs.md describes each. New names may
be added; these keep their meaning."""

ATTRIBUTE: Final = "lightbus"
"""The attribute of a record that has its `Fields`: records of Lightbus itself."""

_OTHER: Final = "extra_"
"""Before the name of a value of `extra=` that is in `SCHEMA`."""
_STANDARD: Final = frozenset({*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"})
_TRACEPARENT: Final = re.compile(r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")


class Fields(dict[str, Any]):
    """Fields of `SCHEMA` that a record of Lightbus has, in its attribute `lightbus`."""


# --- the event --------------------------------------------------------------------------------


def current_fields() -> dict[str, Any]:
    """The event that is being handled here: `app`, `event`, `id`, `handler`, `queue`, `attempt` and `trace_id`.

    Also in functions and tasks that the handler starts, and in middleware. Empty outside of a handler, except for
    `trace_id` and `span_id` where an OpenTelemetry span is active. The span's `trace_id` comes before that of the
    event's `traceparent` header.
    """
    run = codec.current_run.get()
    fields = Fields()
    if run is not None:
        delivery, handler, _ = run
        app = codec.current_app.get()
        queue = None if handler is None else topology.queue_name(app, handler.queue)
        fields = fields_of(app, delivery, None if handler is None else handler.name, queue)
    fields.update(_current_span())
    return fields


def fields_of(app: str, delivery: Delivery, handler: str | None, queue: str | None, **more: Any) -> Fields:
    """The fields of one attempt to handle a delivery. Without those that are None."""
    try:
        envelope = codec.read_envelope(app, delivery)
        event, attempt = envelope.event, envelope.attempt
        trace_id = trace_id_of(codec.read_properties(delivery).get("headers"))
    except errors.DecodeError:
        event, attempt, trace_id = delivery.routing_key, 1, None
    message_id, _ = codec.read_cause(delivery)
    return _fields(
        app=app,
        event=event,
        id=message_id,
        handler=handler,
        queue=queue,
        attempt=attempt,
        trace_id=trace_id,
        **more,
    )


def _fields(**given: Any) -> Fields:
    return Fields({name: given[name] for name in SCHEMA if given.get(name) is not None})


def trace_id_of(headers: object) -> str | None:
    """The trace id of a `traceparent` header (W3C Trace Context); None if there is none, or it is invalid."""
    value = headers.get("traceparent") if isinstance(headers, Mapping) else None
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    found = _TRACEPARENT.fullmatch(value) if isinstance(value, str) else None
    if found is None or (found[1] == "00" and found[3]):  # only later versions may have more
        return None
    return found[2]


def _current_span() -> dict[str, str]:
    """The ids of the current OpenTelemetry span. This does not import the package: where nothing has imported it, no
    span is active."""
    tracing: Any = sys.modules.get("opentelemetry.trace")
    if tracing is None:
        return {}
    try:
        context = tracing.get_current_span().get_span_context()
        if not context.is_valid:
            return {}
        return {"trace_id": format(context.trace_id, "032x"), "span_id": format(context.span_id, "016x")}
    except AttributeError:  # it is being imported by another thread
        return {}


# --- outcomes ---------------------------------------------------------------------------------


def log_outcome(outcome: Outcome) -> None:
    """For `app.observe`: a line at level DEBUG for each event that was handled, skipped, or published.

    Failed attempts have their line already, at a higher level.
    """
    match outcome.kind:
        case "handled" | "skipped":
            text = "%s %s %s in %r, attempt %d, after %.3f s"
            arguments: tuple[Any, ...] = (outcome.handler, outcome.kind, _what(outcome.message), outcome.queue)
            _log(outcome, text, *arguments, outcome.attempt, outcome.seconds)
        case "published":
            _log(outcome, "published %s in %.3f s", _what(outcome.message), outcome.seconds)
        case "failed":
            _log(outcome, "not published: %s after %.3f s: %s", _what(outcome.message), outcome.seconds, outcome.error)
        case _:
            pass


def _what(message: Message) -> str:
    try:
        event, message_id = message.event, message.id
    except errors.DecodeError:
        return "an event that cannot be read"
    return f"{event!r} ({message_id if message_id.isprintable() else ascii(message_id)})"


def _log(outcome: Outcome, text: str, *arguments: object) -> None:
    if not logger.isEnabledFor(logging.DEBUG):
        return
    message = outcome.message
    read: dict[str, Any] = {}
    with contextlib.suppress(errors.DecodeError):
        read = {"event": message.event, "id": message.id, "trace_id": trace_id_of(message.headers)}
    fields = _fields(
        app=outcome.app,
        event=read.get("event"),
        id=read.get("id"),
        handler=outcome.handler,
        queue=outcome.queue,
        attempt=None if outcome.queue is None else outcome.attempt,
        outcome=outcome.kind,
        seconds=round(outcome.seconds, 6),
        delay=outcome.delay,
        trace_id=read.get("trace_id"),
    )
    logger.debug(text, *arguments, extra={ATTRIBUTE: fields})


# --- lines ------------------------------------------------------------------------------------


class JSONLines(logging.Formatter):
    """A formatter: one JSON object per record, on one line, with the names of `SCHEMA`, and everything of `extra=`.

    Use it in your own `logging.config.dictConfig` as `{"()": "lightbus.logs.JSONLines"}`.
    """

    def __init__(self, label: str = "") -> None:
        """
        Args:
            label: the field `worker`: the number of this process, if there are several.
        """
        super().__init__()
        self.label = label.strip("[]")

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
        }
        if self.label:
            line["worker"] = self.label
        own = getattr(record, ATTRIBUTE, None)
        if isinstance(own, Fields):
            line |= own
        else:
            own = None
            line |= current_fields()
        exception = self._exception(record)
        for name, value in vars(record).items():
            if name not in _STANDARD and not (own is not None and name == ATTRIBUTE):
                line[_free_name(str(name), line)] = _plain(value)
        if exception:
            line["exception"] = exception
        if record.stack_info:
            line["stack"] = self.formatStack(record.stack_info)
        text = json.dumps(line, ensure_ascii=False, default=_shown)
        # json.dumps does not escape these control characters: delete (U+007F), and U+0080 to U+009F.
        return text if text.isprintable() else "".join(map(_escaped, text))

    def _exception(self, record: logging.LogRecord) -> str:
        if not record.exc_info or record.exc_info[0] is None:
            return record.exc_text or ""
        try:
            return self.formatException(record.exc_info)
        except Exception as error:  # noqa: BLE001  # its own __str__ may raise
            return f"{record.exc_info[0].__name__} (cannot be shown: {type(error).__name__})"


def _message(record: logging.LogRecord) -> str:
    """Its text; where the arguments do not fit, the text and the arguments: logging would print a traceback."""
    try:
        return record.getMessage()
    except Exception:  # noqa: BLE001  # the user's __str__ may raise anything
        return f"{_shown(record.msg)} {_shown(record.args)}"


def _free_name(name: str, line: Mapping[str, Any]) -> str:
    while name in SCHEMA or name in line:
        name = _OTHER + name
    return name


def _plain(value: Any) -> Any:
    """The value if JSON has it, else its text."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    try:
        json.dumps(value, allow_nan=False, default=_shown)
    except (TypeError, ValueError, RecursionError):  # a key that is not a string, NaN, a cycle
        return _shown(value)
    return value


def _shown(value: object) -> str:
    try:
        return str(value)
    except Exception as error:  # noqa: BLE001  # the user's __str__ may raise anything
        return f"<{type(value).__name__}: its __str__ raised {type(error).__name__}>"


def _escaped(character: str) -> str:
    return character if character.isprintable() else json.dumps(character)[1:-1]
