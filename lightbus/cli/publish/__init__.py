"""`lightbus publish`: publishes one event from the command line, or a file of events."""

from __future__ import annotations

import json
import os
import sys
from typing import IO, TYPE_CHECKING

import click

from lightbus.cli import output

if TYPE_CHECKING:
    from datetime import datetime

    from lightbus import Lightbus, Receipt
    from lightbus.event import EventType

EPILOG = """\b
Examples:
  lightbus publish billing.bus:app invoice.paid invoice_id=i-1 amount=9.50
  lightbus publish billing.bus:app invoice.paid '{"invoice_id": "i-1", "amount": "9.50"}'
  lightbus publish billing.bus:app invoice.paid invoice_id=i-1 amount=9.50 --delay 90 --header tenant=acme
  lightbus publish billing.bus:app invoice.paid invoice_id=i-1 --id import-2026-05-04-1 --time 2026-05-04T12:00:00Z
  lightbus publish billing.bus:app invoice.paid --jsonl invoices.jsonl
  zcat invoices.jsonl.gz | lightbus publish billing.bus:app invoice.paid --jsonl - --json

\b
Exit codes:
  0  published and confirmed (even if no queue is bound)
  1  invalid, or not confirmed; for a file: at least one line was not published
  2  the command line, MODULE:ATTR or the event's name is invalid
"""


@click.command(short_help="Publish an event, or a file of them.", epilog=EPILOG)
@click.argument("target", metavar="MODULE:ATTR")
@click.argument("event")
@click.argument("payload", metavar="[JSON | FIELD=VALUE...]", nargs=-1)
@click.option("--jsonl", "path", metavar="FILE", help="Publish one event for each line (a JSON object); '-' is stdin.")
@click.option(
    "--delay",
    type=float,
    metavar="SECONDS",
    help="Delay the delivery by this many seconds, up to 30 days. The broker holds the event.",
)
@click.option("--header", "headers", multiple=True, metavar="KEY=VALUE", help="A custom AMQP header. Repeatable.")
@click.option("--id", "message_id", metavar="ID", help="The event's id, up to 255 bytes. Default: a new UUID.")
@click.option("--correlation-id", metavar="ID", help="The id of the chain of events that it belongs to.")
@click.option("--time", "published_at", metavar="TIME", help="When it happened: 2026-05-04T12:00:00Z. Default: now.")
@click.option("--json", "as_json", is_flag=True, help="Print the receipt (for a file: the summary) as JSON.")
def publish(
    target: str,
    event: str,
    payload: tuple[str, ...],
    path: str | None,
    delay: float | None,
    headers: tuple[str, ...],
    message_id: str | None,
    correlation_id: str | None,
    published_at: str | None,
    as_json: bool,
) -> None:
    """Publish events of an app, as its code does: validated, and confirmed by the broker.

    EVENT is the name of an event that the app declares. Give its fields as one JSON object, or one by one: each value
    is converted to the field's type, lists and objects are JSON. `address.city=Oslo` sets a nested field.

    With a file, invalid lines are reported on stderr; all others are published.
    """
    from lightbus.cli import logs
    from lightbus.cli import target as targets
    from lightbus.cli.publish import fields, file

    logs.configure("warning")
    table = _headers(headers)
    if path is not None and payload:
        raise click.UsageError("Give either the fields or --jsonl, not both.")
    for option, given in (("--delay", delay), ("--id", message_id), ("--time", published_at)):
        if path is not None and given is not None:
            raise click.UsageError(f"{option} works for single events, not with --jsonl.")
    time = None if published_at is None else _time(published_at)
    app = targets.load_app(target)
    event_type = _event_type(app, event)
    if path is not None:
        common = file.Common(headers=table, correlation_id=correlation_id)
        sys.exit(file.publish_file(app, event_type, _open(path), common, as_json=as_json))
    receipt = app.publish_sync(
        fields.build(event_type, payload),
        delay=delay,
        headers=table,
        id=message_id,
        correlation_id=correlation_id,
        time=time,
    )
    if as_json:
        output.report(json.dumps({"id": receipt.id, "event": event_type.name, "routed": receipt.routed}))
    else:
        output.report(f"Published {event_type.name} {receipt.id}: {_result(app, receipt, delay)}.")


def _result(app: Lightbus, receipt: Receipt, delay: float | None) -> str:
    if delay:
        return f"confirmed, the broker holds it for {delay:g} s"
    if not all(address.broker.reports_unrouted for address in app.broker.addresses):
        return "confirmed (this broker does not report whether a queue is bound for it)"
    return "confirmed, routed" if receipt.routed else "confirmed, not routed (no queue is bound for it)"


def _headers(given: tuple[str, ...]) -> dict[str, str]:
    table = {}
    for one in given:
        key, equals, value = one.partition("=")
        if not equals or not key:
            raise click.UsageError(f"--header {one!r} is not KEY=VALUE, as in tenant=acme.")
        table[key] = value
    return table


def _time(given: str) -> datetime:
    from datetime import datetime

    try:
        time = datetime.fromisoformat(given)
    except ValueError:
        raise click.UsageError(f"--time {given!r} is not a time, as in 2026-05-04T12:00:00Z.") from None
    if time.utcoffset() is None:
        raise click.UsageError(
            f"--time {given!r} has no UTC offset: write {time.isoformat()}Z for UTC, or {time.isoformat()}+02:00."
        )
    return time


def _event_type(app: Lightbus, name: str) -> EventType:
    from lightbus import errors

    try:
        return app.events[name]
    except KeyError:
        raise errors.UnknownEvent(
            f"event {name!r} is not declared on app {app.name!r}. {app.suggestion(name)}"
        ) from None


def _open(path: str) -> IO[bytes]:
    """Open the file for the thread that reads it. Nothing else closes it: closing a file waits while another thread
    reads it from a pipe. Python closes stdin at its end, so stdin is duplicated."""
    if path == "-" and sys.stdin is None:
        raise click.UsageError("--jsonl -: stdin is closed.")
    try:
        return open(os.dup(sys.stdin.fileno()) if path == "-" else path, "rb")
    except OSError as error:
        raise click.UsageError(f"--jsonl {path}: {error.strerror}.") from error
