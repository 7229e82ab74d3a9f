"""`lightbus events`: the events that an app publishes and subscribes to."""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from lightbus.cli import output, tables

if TYPE_CHECKING:
    from lightbus import Lightbus
    from lightbus.event import EventType
    from lightbus.handler import Handler

EPILOG = """\b
Examples:
  lightbus events billing.bus:app
  lightbus events billing.bus:app --json | jq -r '.publishes[].name'
  lightbus events billing.bus:app --json | jq '.handles[] | select(.queue == "billing.slow")'

\b
Next:
  lightbus schema billing.bus:app        (the events as JSON Schema)
  lightbus topology billing.bus:app      (the exchanges and queues between them)

\b
Exit codes:
  0  success; no broker is used
  2  the command line or MODULE:ATTR is invalid
"""

_PREFIXES = re.compile(r"""('[^']*'|"[^"]*")|(?:[A-Za-z_<][\w<>]*\.)+(?=\w)""")


@click.command(short_help="List what an app publishes and subscribes to.", epilog=EPILOG)
@click.argument("target", metavar="MODULE:ATTR")
@click.option("--json", "as_json", is_flag=True, help="A JSON object: app, publishes, handles.")
def events(target: str, as_json: bool) -> None:
    """List what an app publishes and subscribes to.

    Events: name, version, class, fields, docstring. Subscriptions: pattern, source, handler, queue, retry schedule.
    """
    from lightbus.cli import logs
    from lightbus.cli import target as targets

    logs.configure("error")
    app = targets.load_app(target)
    if as_json:
        published = [_event(one) for one in _in_order(app)]
        subscriptions = [_subscription(app, one) for one in app.handlers.values()]
        output.write(json.dumps({"app": app.name, "publishes": published, "handles": subscriptions}, indent=1))
        return
    output.write("\n".join((*_published_lines(app), "", *_subscription_lines(app))))


def _in_order(app: Lightbus) -> list[EventType]:
    return [app.events[name] for name in sorted(app.events)]


def doc_of(thing: Any) -> str | None:
    """The docstring of a class or function. Not that of a base class, and not the signature that `dataclass` sets."""
    doc = vars(thing).get("__doc__") if isinstance(thing, type) else getattr(thing, "__doc__", None)
    if not isinstance(doc, str) or (isinstance(thing, type) and doc.startswith(f"{thing.__name__}(")):
        return None
    return inspect.cleandoc(doc) or None


# --- what it publishes ------------------------------------------------------------------------


def _event(event_type: EventType) -> dict[str, Any]:
    cls = event_type.cls
    return {
        "name": event_type.name,
        "version": event_type.version,
        "class": f"{cls.__module__}.{cls.__qualname__}",
        "doc": doc_of(cls),
        "fields": list(fields(cls)),
    }


def fields(cls: type[Any]) -> Iterator[dict[str, Any]]:
    """The fields of an event by their names on the wire, with `default` (as in JSON) or `default_factory`."""
    import msgspec

    from lightbus import pydantic_models

    if pydantic_models.is_model(cls):
        yield from _model_fields(cls)
        return
    info: Any = msgspec.inspect.type_info(cls)
    annotations = _annotations(cls)
    for field in info.fields:
        described = {"name": field.encode_name, "type": annotations.get(field.name, "?"), "required": field.required}
        if field.default is not msgspec.NODEFAULT:
            described["default"] = msgspec.to_builtins(field.default)
        elif not field.required:
            described["default_factory"] = getattr(field.default_factory, "__name__", "?")
        yield described


def _model_fields(cls: type[Any]) -> Iterator[dict[str, Any]]:
    """The same of a Pydantic model. A computed field has `computed`."""
    from lightbus import pydantic_models

    annotations = _annotations(cls)
    for field in pydantic_models.described(cls):
        name = field.pop("attribute")
        if "computed" in field:
            annotations[name] = _type_name(pydantic_models.computed_type(cls, name))
        yield {"name": field.pop("name"), "type": annotations.get(name, "?"), **field}


def _annotations(cls: type[Any]) -> dict[str, str]:
    """The annotations as in source code, without module names."""
    try:
        hints = typing.get_type_hints(cls, localns={cls.__name__: cls}, include_extras=not _is_model(cls))
    except NameError:  # the class is defined in a function, and uses its local names
        hints = {name: hint for base in reversed(cls.__mro__) for name, hint in inspect.get_annotations(base).items()}
    return {name: _type_name(hint) for name, hint in hints.items()}


def _is_model(cls: type[Any]) -> bool:
    """For Pydantic models, `Annotated` is left out: it may have validators."""
    from lightbus import pydantic_models

    return pydantic_models.is_model(cls)


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):  # typing.Union would be shown as `Optional[...]`
        return " | ".join(map(_type_name, typing.get_args(hint)))
    if hint is types.NoneType:
        return "None"
    text = hint if isinstance(hint, str) else inspect.formatannotation(hint)
    return _PREFIXES.sub(lambda found: found[1] or "", text)


def _published_lines(app: Lightbus) -> Iterator[str]:
    if not app.events:
        yield f"{app.name} publishes nothing yet: decorate a class with @app.event."
        return
    yield f"{app.name} publishes to the exchange {app.name}:"
    for event_type in _in_order(app):
        version = f"  version {event_type.version}" if event_type.version > 1 else ""
        yield ""
        yield f"  {event_type.name}{version}  ({event_type.cls.__module__}.{event_type.cls.__qualname__})"
        for line in (doc_of(event_type.cls) or "").splitlines():
            yield f"    {tables.printable(line)}".rstrip()
        yield from _field_lines(event_type)


def _field_lines(event_type: EventType) -> Iterator[str]:
    rows = [[field["name"], field["type"], _default(field)] for field in fields(event_type.cls)]
    if not rows:
        yield "    (no fields)"
        return
    for line in tables.table(["FIELD", "TYPE", ""], rows):
        yield f"    {line}"


def _default(field: dict[str, Any]) -> str:
    if field["required"]:
        return ""
    if "computed" in field:
        return "computed"
    if "default" in field:
        return f"= {tables.printable(json.dumps(field['default'], default=str), 40)}"
    return f"= {field['default_factory']}()"


# --- what it subscribes to --------------------------------------------------------------------


def _subscription(app: Lightbus, handler: Handler) -> dict[str, Any]:
    from lightbus.wire.topology import queue_name

    function = handler.function
    return {
        "patterns": list(handler.patterns),
        "source": handler.source,
        "handler": handler.name,
        "function": f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', '?')}",
        "doc": doc_of(function),
        "queue": queue_name(app.name, handler.queue),
        "retry": list(handler.retry.delays),
        "timeout": handler.timeout,
        "concurrency": handler.concurrency,
    }


def _subscription_lines(app: Lightbus) -> Iterator[str]:
    from lightbus.cli.banner import schedule
    from lightbus.wire.topology import queue_name

    if not app.handlers:
        yield f"{app.name} subscribes to nothing yet: decorate a function with @app.on('user.registered')."
        return
    yield f"{app.name} subscribes to:"
    yield ""
    rows = [
        [
            ", ".join(handler.patterns),
            handler.source or "any app",
            handler.name,
            queue_name(app.name, handler.queue),
            schedule(handler.retry),
            f"{handler.timeout:g} s",
        ]
        for handler in app.handlers.values()
    ]
    for line in tables.table(["EVENT", "FROM", "HANDLER", "QUEUE", "RETRY AFTER", "TIMEOUT"], rows):
        yield f"  {line}"
