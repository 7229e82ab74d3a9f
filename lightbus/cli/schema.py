"""`lightbus schema`: an app's events as JSON Schema."""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING, Any

import click

from lightbus.cli import output

if TYPE_CHECKING:
    from lightbus import Lightbus
    from lightbus.event import EventType

EPILOG = """\b
Examples:
  lightbus schema billing.bus:app invoice.paid
  lightbus schema billing.bus:app > events.schema.json
  lightbus schema billing.bus:app | jq keys

\b
Keep the file under version control, and let CI detect changed events:
  lightbus schema billing.bus:app > events.schema.json && git diff --exit-code events.schema.json

\b
Exit codes:
  0  success; no broker is used
  2  the command line, MODULE:ATTR or the event's name is invalid
"""

DIALECT = "https://json-schema.org/draft/2020-12/schema"


@click.command(short_help="An app's events as JSON Schema.", epilog=EPILOG)
@click.argument("target", metavar="MODULE:ATTR")
@click.argument("event", required=False)
def schema(target: str, event: str | None) -> None:
    """Print the JSON Schema (2020-12) of an event's body; without EVENT, a JSON object with all of them, by name.

    The order is stable, so a diff of two versions shows the changed events. Consumers should ignore unknown fields, as
    Lightbus does: the schemas allow them, except that of a Pydantic model with `extra="forbid"`.
    """
    from lightbus import errors
    from lightbus.cli import logs
    from lightbus.cli import target as targets

    logs.configure("error")
    app = targets.load_app(target)
    if event is not None and event not in app.events:
        raise errors.UnknownEvent(f"event {event!r} is not declared on app {app.name!r}. {app.suggestion(event)}")
    document = schemas(app) if event is None else schema_of(app.name, app.events[event])
    output.write(json.dumps(document, indent=2, ensure_ascii=False))


def schemas(app: Lightbus) -> dict[str, Any]:
    """The schema of each event, by name."""
    return {name: schema_of(app.name, app.events[name]) for name in sorted(app.events)}


def schema_of(app: str, event_type: EventType) -> dict[str, Any]:
    """A complete schema: everything that it refers to is in its `$defs`."""
    root, parts = _components(event_type.cls)
    return {
        "$schema": DIALECT,
        "title": event_type.name,
        "$comment": (
            f"Version {event_type.version} of the event that {app!r} publishes with the routing key "
            f"{event_type.name!r}."
        ),
        **root,
        "$defs": {name: _cleaned(parts[name]) for name in sorted(parts)},
    }


def _components(cls: type[Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The schema of a class as a reference, and the schemas that it refers to, by name."""
    import msgspec

    from lightbus import pydantic_models

    if pydantic_models.is_model(cls):
        return pydantic_models.json_schema(cls)
    (root,), parts = msgspec.json.schema_components([cls], ref_template="#/$defs/{name}")
    return root, parts


def _cleaned(part: dict[str, Any]) -> dict[str, Any]:
    """Remove the indentation of docstrings."""
    return part | {"description": inspect.cleandoc(part["description"])} if "description" in part else part
