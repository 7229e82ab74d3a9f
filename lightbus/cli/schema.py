"""`lightbus schema`: an app's events as JSON Schema."""

from __future__ import annotations

import json

import click

from lightbus.cli import output

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


@click.command(short_help="An app's events as JSON Schema.", epilog=EPILOG)
@click.argument("target", metavar="MODULE:ATTR")
@click.argument("event", required=False)
def schema(target: str, event: str | None) -> None:
    """Print the JSON Schema (2020-12) of an event's body; without EVENT, a JSON object with all of them, by name.

    The order is stable, so a diff of two versions shows the changed events. Consumers should ignore unknown fields, as
    Lightbus does: the schemas allow them, except that of a Pydantic model with `extra="forbid"`.
    """
    from lightbus import errors
    from lightbus.catalog import schemas
    from lightbus.cli import logs
    from lightbus.cli import target as targets

    logs.configure("error")
    app = targets.load_app(target)
    if event is not None and event not in app.events:
        raise errors.UnknownEvent(f"event {event!r} is not declared on app {app.name!r}. {app.suggestion(event)}")
    document = schemas.schemas(app) if event is None else schemas.schema_of(app.name, app.events[event])
    output.write(json.dumps(document, indent=2, ensure_ascii=False))
