"""`lightbus dead show`."""

from __future__ import annotations

import base64
import itertools
import re
import sys
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from lightbus.cli import tables
from lightbus.cli.dead import reading, selection
from lightbus.cli.dead.reading import write

if TYPE_CHECKING:
    from lightbus import Lightbus
    from lightbus.dead_letters.letter import DeadLetter

EPILOG = """\b
Examples:
  lightbus dead show billing.bus:app 0198c5d2-7a3b
  lightbus dead show billing.bus:app 0198c5d2-7a3b --json | jq '.[0].payload'

\b
Next: lightbus dead retry MODULE:ATTR --id ID

\b
Exit codes:
  0  success
  1  no dead letter has this ID; the broker is not usable, or the queue does not exist
  2  the command line or MODULE:ATTR is invalid
"""

NOT_SHOWN = ("lightbus-error-", "x-death", "x-first-death", "x-last-death", "x-delivery-count")
"""The beginnings of the headers that describe the failure: the fields above the headers show it."""

_IN_SHELL = re.compile(r"[\w.:~-]+")
"""Text that a shell takes as it is, without quotes."""


@click.command(short_help="Show one dead letter: payload, headers, traceback.", epilog=EPILOG)
@click.argument("target", metavar="MODULE:ATTR")
@click.argument("id_", metavar="ID", required=False)
@click.option("--all", "all_", is_flag=True, help="Show all dead letters instead of one.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="A JSON array (an event that two handlers failed on gives two dead letters).",
)
def show(target: str, id_: str | None, all_: bool, as_json: bool) -> None:
    """Show a dead letter: its payload, headers, attempts, times, where it came from, and the traceback.

    A prefix of the ID is enough. An event that several handlers failed on has one dead letter for each of them.
    """
    if (not id_) != all_:
        raise click.UsageError("Give an ID (lightbus dead list shows them), or --all.")
    app, wanted = selection.prepare(target, {"ids": (id_,) if id_ else ()})
    found = False
    with reading.opened(app) as queue:
        dead_letters = queue.matching(wanted)
        if as_json:
            first = next(dead_letters, None)
            found = first is not None
            reading.write_array(map(_as_json, itertools.chain([] if first is None else [first], dead_letters)))
        else:
            for one in dead_letters:
                write("\n" if found else "", nl=False)
                found = True
                _show(one, app)
                _show_next_step(one, app, target)
    if all_ and not found:
        click.echo(reading.NONE, err=as_json)
    elif not found:
        click.echo(f"Error: no dead letter of {app.name!r} has an id that begins with {id_!r}.", err=True)
        sys.exit(1)


def _as_json(dead_letter: DeadLetter) -> str:
    payload = tables.json_in_ascii(dead_letter.delivery.body)
    head = {
        **reading.described(dead_letter),
        "correlation_id": dead_letter.delivery.properties.get("correlation_id"),
        "headers": _headers(dead_letter),
        "traceback": dead_letter.traceback,
    }
    if payload is None:
        return reading.as_json({**head, "body_base64": base64.b64encode(dead_letter.delivery.body).decode()})
    return f'{reading.as_json(head)[:-1]}, "payload": {payload}}}'


def _headers(dead_letter: DeadLetter) -> dict[str, Any]:
    headers = dead_letter.delivery.properties.get("headers")
    return {
        key: value
        for key, value in (headers.items() if isinstance(headers, dict) else ())
        if not key.startswith(NOT_SHOWN)
    }


def _show(dead_letter: DeadLetter, app: Lightbus) -> None:
    claim = "" if dead_letter.proven else "  (not verified: see `lightbus dead retry --help` on --trust-origin)"
    handler = dead_letter.handler or "every handler that matches"
    failure = "failed"
    if dead_letter.by_broker:
        failure = "could not be copied" if dead_letter.error == "rejected" else "crashed its worker"
    error_type, message = dead_letter.error_type, dead_letter.error_message
    _field("id", dead_letter.id)
    _field("event", f"{dead_letter.event}  from {dead_letter.source or '?'}{claim}")
    _field("handler", handler + ("  (no longer exists in this code)" if _lacks_handler(app, dead_letter) else ""))
    _field("queue", dead_letter.queue)
    _field("attempt", f"{dead_letter.attempt}, the last one {failure}")
    _field("published", _moment(dead_letter.published))
    _field("dead since", _moment(dead_letter.died))
    correlation = dead_letter.delivery.properties.get("correlation_id")
    if isinstance(correlation, str) and correlation != dead_letter.id:
        _field("correlation", correlation)
    first, *others = (f"{error_type}: {message}" if message else error_type).splitlines() or [""]
    _field("error", first)
    for line in others:
        _field("", line)
    if dead_letter.traceback:
        write("\ntraceback" + (" (its end)" if dead_letter.traceback.startswith("... ") else ""))
        write(_indented(dead_letter.traceback))
    write("\nheaders")
    for key, value in sorted(_headers(dead_letter).items()):
        write(f"  {tables.printable(key)}: {tables.printable(str(value), 300)}")
    body = dead_letter.delivery.body
    text = tables.json_laid_out(body, indent=2)
    size = f"{len(body):,} bytes"
    if text is not None:
        write(f"\npayload ({size})\n{_indented(text)}")
    else:
        write(f"\nbody ({size}, not JSON)\n  {tables.printable(repr(body[:2000]))}")


def _show_next_step(dead_letter: DeadLetter, app: Lightbus, target: str) -> None:
    if not _IN_SHELL.fullmatch(dead_letter.id):  # other publishers may use any id
        return
    which = f"{target} --id {dead_letter.id}"
    if dead_letter.handler is not None and _IN_SHELL.fullmatch(dead_letter.handler):
        which += f" --handler {dead_letter.handler}"
    if _lacks_handler(app, dead_letter):
        write(f"\nNext: restore the handler, or run: lightbus dead purge {which}")
    else:
        trust = "" if dead_letter.proven else " --trust-origin"
        write(f"\nAfter fixing the cause, run: lightbus dead retry {which}{trust}")


def _lacks_handler(app: Lightbus, dead_letter: DeadLetter) -> bool:
    return dead_letter.handler is not None and dead_letter.handler not in app.handlers


def _field(name: str, value: str) -> None:
    write(f"{name:<12} {tables.printable(value)}")


def _moment(moment: datetime | None) -> str:
    return "not known" if moment is None else f"{moment:%Y-%m-%d %H:%M:%S} UTC  ({tables.age_of(moment)} ago)"


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in tables.printable_lines(text).split("\n"))
