"""`lightbus who`: who publishes and who gets an event, or reads a field of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lightbus.cli import output, tables
from lightbus.cli.catalog.reading import Reading, from_option, read

if TYPE_CHECKING:
    from lightbus.catalog.who import Answer, Publisher, Reader

EPILOG = """\b
Examples (with quotes, because * and # are special in a shell):
  lightbus who order.placed                            (the broker in LIGHTBUS_URL)
  lightbus who billing.bus:app order.placed            (the broker of this app)
  lightbus who order.placed.lines.article
  lightbus who 'order.*'
  lightbus who order.placed.email --json | jq -r '.[].handlers[].name'
  lightbus who order.placed --from catalog.json        (of lightbus catalog --json, without a broker)

\b
Exit codes:
  0  success
  1  no such event or field; the contracts cannot be read; or the broker is not usable
  2  the command line or MODULE:ATTR is invalid
"""


@click.command(short_help="Who publishes and who gets an event, or reads a field of it.", epilog=EPILOG)
@click.argument("arguments", metavar="[MODULE:ATTR] EVENT[.FIELD]", nargs=-1, required=True)
@from_option
@click.option("--json", "as_json", is_flag=True, help="A JSON array, with an object for each event or field.")
def who(arguments: tuple[str, ...], file: Path | None, as_json: bool) -> None:
    """Show who publishes an event and which handlers get it, with the fields that each reads.

    EVENT is a name or a topic pattern, where * matches one word and # any number of words. FIELD is a field of its
    body, or a path: order.placed.lines.article is `article` of each element of `lines`. If a name is both an event and
    a field of another event, both are shown.

    A handler that takes the whole body (dict) reads any field. With a broker, the consumers of each handler's queue are
    shown.
    """
    from lightbus.catalog import who as answers
    from lightbus.cli import logs

    logs.configure("error")
    target, question = _read(arguments)
    found = read(target, file)
    answered = answers.who(found.catalog, question)
    if as_json:
        output.write(json.dumps([_described(found, one) for one in answered], indent=1))
        return
    output.write("\n\n".join("\n".join(_lines(found, one)) for one in answered))


def _read(arguments: tuple[str, ...]) -> tuple[str | None, str]:
    """MODULE:ATTR, and the question."""
    target = arguments[0] if ":" in arguments[0] else None
    rest = arguments[1:] if target is not None else arguments
    if len(rest) != 1:
        raise click.UsageError("Give one EVENT[.FIELD], after MODULE:ATTR if there is one.")
    return target, rest[0]


# --- as text ----------------------------------------------------------------------------------


def _lines(reading: Reading, answer: Answer) -> Iterator[str]:
    for one in answer.publishers:
        yield _published(answer, one)
        if not answer.field:
            yield from (f"  {tables.printable(line)}".rstrip() for line in one.event.doc.splitlines())
    if not answer.publishers:
        yield f"{tables.printable(answer.name)}: no app with a contract publishes it"
    readers = [one for one in answer.handlers if not answer.field or one.reads != "no"]
    if readers:
        yield ""
        head = ["HANDLER", "READS", "QUEUE", *(["CONSUMERS", "WAITING"] if reading.live is not None else [])]
        yield from tables.table(head, [_row(reading, answer, one) for one in readers], right=range(3, len(head)))
    else:
        yield f"No handler {'reads it' if answer.field else 'gets it'}."
    others = [tables.printable(one.subscriber.name) for one in answer.handlers if one not in readers]
    if others:
        yield ""
        yield f"{'Gets' if len(others) == 1 else 'Get'} the event without reading this field: {', '.join(others)}"


def _published(answer: Answer, one: Publisher) -> str:
    release = f" (release {tables.printable(one.contract.release, 30)})" if one.contract.release else ""
    event = f"{tables.printable(answer.name)}: published by {tables.printable(one.contract.app)}{release}"
    match one.field:
        case None:
            return f"{event}, version {one.event.version}"
        case field if field.known == "no":
            return f"{event} without this field"
        case field if field.known == "open":
            return f"{event}, where its schema allows any field"
        case field:
            return f"{event}, {tables.printable(field.type, 200)}"


def _row(reading: Reading, answer: Answer, one: Reader) -> list[str]:
    row = [tables.printable(one.subscriber.name), _reads(answer, one), tables.printable(one.subscriber.listener.queue)]
    if reading.live is not None:
        state = reading.live.queue(one.subscriber.listener.queue)
        row += ["?", "?"] if state is None else [f"{state.consumers:,}" if state.exists else "-", f"{state.ready:,}"]
    return row


def _reads(answer: Answer, one: Reader) -> str:
    if one.reads == "any":
        return "any field"
    if answer.field:
        return tables.printable(answer.field)
    return tables.printable(", ".join(one.fields or ())) or "no payload"


# --- as JSON ----------------------------------------------------------------------------------


def _described(reading: Reading, answer: Answer) -> dict[str, Any]:
    return {
        "event": answer.event,
        "field": answer.field or None,
        "publishers": [_publisher(one) for one in answer.publishers],
        "handlers": [_handler(reading, one) for one in answer.handlers],
    }


def _publisher(one: Publisher) -> dict[str, Any]:
    found: dict[str, Any] = {
        "app": one.contract.app,
        "release": one.contract.release,
        "version": one.event.version,
        "doc": one.event.doc,
        "fields": one.event.fields,
    }
    if one.field is not None:
        found |= {"has_field": one.field.known, "type": one.field.type or None}
    return found


def _handler(reading: Reading, one: Reader) -> dict[str, Any]:
    from lightbus.cli.catalog.described import queue_state

    listener = one.subscriber.listener
    return {
        "name": one.subscriber.name,
        "app": one.subscriber.contract.app,
        "handler": listener.handler,
        "patterns": listener.patterns,
        "source": listener.source,
        "queue": listener.queue,
        "doc": listener.doc,
        "reads": one.reads,
        "fields": one.fields,
        "live": queue_state(reading, one.subscriber),
    }
