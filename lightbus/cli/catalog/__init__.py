"""`lightbus catalog`: all apps and events of a bus. One file for each format."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from lightbus.cli import output, tables
from lightbus.cli.catalog import reading

EPILOG = """\b
Examples:
  lightbus catalog                                     (the broker in LIGHTBUS_URL)
  lightbus catalog billing.bus:app                     (the broker of this app)
  lightbus catalog --format html > catalog.html
  lightbus catalog --json | jq -r '.notices[].text'
  lightbus catalog --json > catalog.json               (a snapshot)
  lightbus catalog --from catalog.json --format asyncapi > asyncapi.json

\b
Next:
  lightbus who order.placed                            (who publishes and who gets one event)

\b
Exit codes:
  0  success, whatever was found
  1  the contracts cannot be read, or the broker is not usable
  2  the command line or MODULE:ATTR is invalid
"""


@click.command(short_help="All apps and events of a bus: who publishes, who listens.", epilog=EPILOG)
@click.argument("target", metavar="[MODULE:ATTR]", required=False)
@reading.from_option
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json", "asyncapi", "mermaid", "svg", "html"]),
    default="table",
    show_default=True,
    help="Tables; JSON, also a snapshot for --from; an AsyncAPI 3.0 document; a Mermaid flowchart; an SVG picture; one "
    "HTML page.",
)
@click.option("--json", "as_json", is_flag=True, help="Short for --format json.")
def catalog(target: str | None, file: Path | None, form: str, as_json: bool) -> None:
    """Show all apps and events of a bus: who publishes them, and which handlers get them.

    With a broker: the consumers of each app's queues, the messages that wait, and the dead letters. What the broker's
    user may not see, or what is not answered within 5 seconds, is shown as `?`. Nothing is changed.

    Also shown: events that no handler gets, patterns that match no event, unknown source= apps, and contracts that are
    ignored because another user wrote them. These are no errors: the other side may not be deployed yet.
    """
    from lightbus.cli import logs

    logs.configure("error")
    found = reading.read(target, file)
    match "json" if as_json else form:
        case "json":
            from lightbus.cli.catalog import described

            output.write(json.dumps(described.described(found), indent=1))
        case "asyncapi":
            from lightbus.catalog import asyncapi

            output.write(json.dumps(asyncapi.document(found.catalog), indent=1))
        case "mermaid":
            from lightbus.cli.catalog import flowchart

            output.write(flowchart.flowchart(found))
        case "svg":
            from lightbus.cli.catalog import picture

            output.write(picture.draw(found))
        case "html":
            from lightbus.cli.catalog import page

            output.write(page.page(found))
        case _:
            from lightbus.cli.catalog import overview

            lines = overview.lines(found)
            output.write("\n".join(tables.fitted(lines, 80) if sys.stdout.isatty() else lines))
