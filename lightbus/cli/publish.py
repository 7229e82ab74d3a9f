"""`lightbus publish`: one event from the command line, or a file of them."""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import IO, TYPE_CHECKING, Any

import click

from lightbus.cli import output

if TYPE_CHECKING:
    from lightbus import Lightbus, Receipt
    from lightbus.event import EventType

EPILOG = """\b
Examples:
  lightbus publish billing.bus:app invoice.paid invoice_id=i-1 amount=9.50
  lightbus publish billing.bus:app invoice.paid '{"invoice_id": "i-1", "amount": "9.50"}'
  lightbus publish billing.bus:app invoice.paid invoice_id=i-1 amount=9.50 --delay 90 --header tenant=acme
  lightbus publish billing.bus:app invoice.paid --jsonl invoices.jsonl
  zcat invoices.jsonl.gz | lightbus publish billing.bus:app invoice.paid --jsonl - --json

\b
Exit codes:
  0  published and confirmed (even if no queue is bound)
  1  invalid, or not confirmed; for a file: at least one line was not published
  2  the command line, MODULE:ATTR or the event's name is invalid
"""

CHUNK = 1000
"""Lines that are published at once at most: as many as may be unconfirmed."""
AHEAD_BYTES = 8 * 1024 * 1024
"""Read ahead at most (and one line more): memory stays the same however long the file is."""


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
@click.option("--json", "as_json", is_flag=True, help="Print the receipt (for a file: the summary) as JSON.")
def publish(
    target: str,
    event: str,
    payload: tuple[str, ...],
    path: str | None,
    delay: float | None,
    headers: tuple[str, ...],
    as_json: bool,
) -> None:
    """Publish events of an app, as its code does: validated, and confirmed by the broker.

    EVENT is the name of an event that the app declares. Give its fields as one JSON object, or one by one: each value
    is converted to the field's type, lists and objects are JSON. `address.city=Oslo` sets a nested field.

    With a file, invalid lines are reported on stderr; all others are published.
    """
    from lightbus.cli import logs
    from lightbus.cli import target as targets

    logs.configure("warning")
    table = _headers(headers)
    if path is not None and payload:
        raise click.UsageError("Give either the fields or --jsonl, not both.")
    if path is not None and delay is not None:
        raise click.UsageError("--delay works for single events, not with --jsonl.")
    app = targets.load_app(target)
    event_type = _event_type(app, event)
    if path is not None:
        sys.exit(_publish_file(app, event_type, _open(path), table, as_json=as_json))
    built = _build(event_type, payload)
    receipt = app.publish_sync(built, delay=delay, headers=table)
    if as_json:
        output.report(json.dumps({"id": receipt.id, "event": event_type.name, "routed": receipt.routed}))
    else:
        output.report(f"Published {event_type.name} {receipt.id}: {_fate(receipt, delay)}.")


def _fate(receipt: Receipt, delay: float | None) -> str:
    if delay:
        return f"confirmed, the broker holds it for {delay:g} s"
    return "confirmed, routed" if receipt.routed else "confirmed, not routed (no queue is bound for it)"


def _headers(given: tuple[str, ...]) -> dict[str, str]:
    table = {}
    for one in given:
        key, equals, value = one.partition("=")
        if not equals or not key:
            raise click.UsageError(f"--header {one!r} is not KEY=VALUE, as in tenant=acme.")
        table[key] = value
    return table


def _event_type(app: Lightbus, name: str) -> EventType:
    from lightbus import errors

    try:
        return app.events[name]
    except KeyError:
        raise errors.UnknownEvent(
            f"event {name!r} is not declared on app {app.name!r}. {app.suggestion(name)}"
        ) from None


def _open(path: str) -> IO[bytes]:
    """The reading thread's file, which nothing else closes: where that thread waits for a pipe, a thread that closes
    the file would wait for the thread (and Python, at its end, closes stdin)."""
    if path == "-" and sys.stdin is None:
        raise click.UsageError("--jsonl -: stdin is closed.")
    try:
        return open(os.dup(sys.stdin.fileno()) if path == "-" else path, "rb")
    except OSError as error:
        raise click.UsageError(f"--jsonl {path}: {error.strerror}.") from error


# --- one event of fields ----------------------------------------------------------------------


def _build(event_type: EventType, payload: tuple[str, ...]) -> Any:
    if len(payload) == 1 and payload[0].lstrip().startswith(("{", "[", '"')):
        body = payload[0].encode()
        _refuse_unknown_fields(event_type, _decode(event_type, body))
        return _checked(event_type, body)
    data = _fields(event_type, payload)
    _refuse_unknown_fields(event_type, data)
    return _checked(event_type, data)


def _checked(event_type: EventType, given: dict[str, Any] | bytes) -> Any:
    from lightbus import errors
    from lightbus.cli import events
    from lightbus.wire import codec

    try:
        return codec.build_event(event_type, given)
    except errors.InvalidPayload as error:
        fields = ", ".join(f"{one['name']}: {one['type']}" for one in events.fields(event_type.cls))
        raise errors.InvalidPayload(f"{error}. Its fields: {fields or 'none'}.") from error


def _decode(event_type: EventType, body: bytes) -> Any:
    import msgspec

    from lightbus import errors

    try:
        return msgspec.json.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise errors.InvalidPayload(f"event {event_type.name!r}: {error}") from error


def _fields(event_type: EventType, payload: tuple[str, ...]) -> dict[str, Any]:
    """`a=1 b.c=2` as an object. Values stay strings where the field's type can be read from one."""
    data: dict[str, Any] = {}
    types = _field_types(event_type)
    for one in payload:
        path, equals, value = one.partition("=")
        names = path.split(".")
        if not equals or not all(names):
            raise click.UsageError(f"{one!r} is not FIELD=VALUE, as in amount=9.50, nor a JSON object.")
        place = data
        for name in names[:-1]:
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise click.UsageError(f"{one!r}: {name!r} has a value already.")
        if names[-1] in place:
            raise click.UsageError(f"{path!r} is given twice. A list is written as JSON: {names[-1]}='[1, 2]'.")
        place[names[-1]] = _value(_type_at(types, names), value)
    return data


def _field_types(owner: Any) -> dict[str, Any]:
    """The types of an event's fields (or of a class within it), by the names that they have on the wire."""
    import msgspec

    info = msgspec.inspect.type_info(owner.cls) if hasattr(owner, "version") else owner
    return {field.encode_name: field.type for field in getattr(info, "fields", ())}


def _type_at(types: Mapping[str, Any], names: list[str]) -> Any:
    found = types.get(names[0])
    for name in names[1:]:
        found = next((part for part in _alternatives(found) if hasattr(part, "fields")), None)
        found = _field_types(found).get(name)
    return found


def _alternatives(info: Any) -> tuple[Any, ...]:
    return tuple(getattr(info, "types", (info,)))


def _value(info: Any, text: str) -> Any:
    """JSON, for a type that a plain string cannot be read as; else the string."""
    import msgspec

    plain = (
        msgspec.inspect.StrType,
        msgspec.inspect.BoolType,
        msgspec.inspect.IntType,
        msgspec.inspect.FloatType,
        msgspec.inspect.NoneType,
        msgspec.inspect.DecimalType,
        msgspec.inspect.DateTimeType,
        msgspec.inspect.DateType,
        msgspec.inspect.TimeType,
        msgspec.inspect.TimeDeltaType,
        msgspec.inspect.UUIDType,
        msgspec.inspect.EnumType,
        msgspec.inspect.LiteralType,
        msgspec.inspect.BytesType,
        msgspec.inspect.ByteArrayType,
    )
    alternatives = _alternatives(info)
    if any(isinstance(one, msgspec.inspect.StrType) for one in alternatives):
        return text
    if all(isinstance(one, plain) for one in alternatives):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _refuse_unknown_fields(event_type: EventType, data: Any) -> None:
    """A listener ignores fields that it does not know; a user who types a name needs to know that it is wrong."""
    from lightbus import errors

    unknown = _unknown_fields(event_type, data)
    if unknown:
        known = _field_types(event_type)
        near = errors.nearest(unknown[0], known)
        hint = f"Did you mean {near!r}?" if near else f"It has: {', '.join(known) or 'none'}."
        raise errors.InvalidPayload(f"event {event_type.name!r} has no field {unknown[0]!r}. {hint}")


def _unknown_fields(event_type: EventType, data: Any) -> list[str]:
    known = _known_fields(event_type)
    return [name for name in data if name not in known] if known and isinstance(data, dict) else []


@functools.cache
def _known_fields(event_type: EventType) -> frozenset[str]:
    return frozenset(_field_types(event_type))


# --- a file of events -------------------------------------------------------------------------


class Tally:
    """What became of the lines of a file."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.lines = 0
        """That are not empty."""
        self.last = 0
        """The last line's number."""
        self.published = 0
        self.unheard = 0
        self.bad = 0
        self.ignored: dict[str, None] = {}
        self.stopped: str | None = None

    def complain(self, number: int, reason: object) -> None:
        self.bad += 1
        click.echo(f"line {number}: {reason}", err=True)

    def as_dict(self) -> dict[str, Any]:
        seconds = time.monotonic() - self.began
        return {
            "lines": self.lines,
            "published": self.published,
            "bad": self.bad,
            "unheard": self.unheard,
            "seconds": round(seconds, 3),
            "rate": round(self.published / seconds) if seconds else 0,
        }

    def __str__(self) -> str:
        figures = self.as_dict()
        lines = "1 line" if self.lines == 1 else f"{self.lines:,} lines"
        text = f"Published {self.published:,} of {lines}"
        text += f" in {figures['seconds']:.1f} s ({figures['rate']:,}/s)"
        if self.bad:
            text += f"; {self.bad:,} not published, see above"
        if self.unheard:
            all_of_them = "it" if self.published == 1 else "them"
            unheard = all_of_them if self.unheard == self.published else f"{self.unheard:,} of them"
            text += f"; no queue is bound for {unheard}"
        return text + "."


class Lines:
    """A file's lines with their numbers, read ahead by a thread: what has arrived is published at once, also where
    the next line of a pipe takes its time. A line over the limit comes as None."""

    def __init__(self, file: IO[bytes], limit: int) -> None:
        self.file = file
        self.limit = limit
        self._lines: deque[tuple[int, bytes | None]] = deque()
        self._bytes = 0
        self._ended = False
        self.fault: OSError | None = None
        """Why the file was not read to its end."""
        self._changed = threading.Condition()
        threading.Thread(target=self._read, name="lightbus lines", daemon=True).start()

    def _read(self) -> None:
        try:
            self._read_all()
        except OSError as error:
            self.fault = error
        with self._changed:
            self._ended = True
            self._changed.notify()

    def _read_all(self) -> None:
        number = 0
        while line := self.file.readline(self.limit):
            number += 1
            whole = line.endswith(b"\n") or len(line) < self.limit
            while not line.endswith(b"\n") and len(line) == self.limit:
                line = self.file.readline(self.limit)
            with self._changed:
                self._lines.append((number, line if whole else None))
                self._bytes += len(line) if whole else 0
                self._changed.notify()
                self._changed.wait_for(lambda: self._bytes < AHEAD_BYTES and len(self._lines) < 2 * CHUNK)

    def chunks(self) -> Iterator[list[tuple[int, bytes | None]]]:
        """What has been read since, up to `CHUNK` lines; waits for the first of them."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self._ended)
                chunk = [self._lines.popleft() for _ in range(min(CHUNK, len(self._lines)))]
                self._bytes -= sum(len(line or b"") for _, line in chunk)
                self._changed.notify()
            if not chunk:
                return
            yield chunk


def _publish_file(
    app: Lightbus, event_type: EventType, file: IO[bytes], headers: dict[str, str], *, as_json: bool
) -> int:
    from lightbus.wire import codec

    tally = Tally()
    interrupted = False
    with ExitStack() as stack:
        bar: Any = None
        if sys.stderr.isatty() and file.seekable() and (size := os.fstat(file.fileno()).st_size):
            bar = stack.enter_context(click.progressbar(length=size, label=event_type.name, file=sys.stderr))
        try:
            lines = Lines(file, codec.MAX_BODY_BYTES)
            for chunk in lines.chunks():
                _publish_chunk(app, event_type, chunk, headers, tally)
                if bar is not None:
                    bar.update(sum(len(line or b"") for _, line in chunk))
                if tally.stopped is not None:
                    break
            else:
                if lines.fault is not None:
                    tally.stopped = f"The rest cannot be read: {lines.fault.strerror}."
        except KeyboardInterrupt:
            interrupted = True
            tally.stopped = "Interrupted. Later lines may have been published, too."
    if tally.ignored:
        names = ", ".join(map(repr, tally.ignored))
        click.echo(f"Ignored, because {event_type.name!r} has no such field: {names}.", err=True)
    if tally.stopped is not None:
        click.echo(f"Stopped after line {tally.last:,}. {tally.stopped}", err=True)
    output.report(json.dumps(tally.as_dict()) if as_json else str(tally))
    if interrupted:
        return 130
    return 1 if tally.bad or tally.stopped is not None else 0


def _publish_chunk(
    app: Lightbus,
    event_type: EventType,
    chunk: list[tuple[int, bytes | None]],
    headers: dict[str, str],
    tally: Tally,
) -> None:
    from lightbus import errors
    from lightbus.wire import codec

    events: dict[int, Any] = {}
    for number, line in chunk:
        tally.last = number
        if line is not None and not line.strip():
            continue
        tally.lines += 1
        if line is None:
            tally.complain(number, f"longer than {codec.MAX_BODY_BYTES:,} bytes")
            continue
        try:
            events[number] = codec.build_event(event_type, line)
        except errors.InvalidPayload as error:
            tally.complain(number, str(error).removeprefix(f"event {event_type.name!r}: "))
            continue
        tally.ignored |= dict.fromkeys(_unknown_fields(event_type, _names(line)))
    try:
        _send(app, events, headers, tally)
    except errors.InvalidPayload:  # nothing was sent; find out whose fault it is
        for number, event in list(events.items()):
            try:
                codec.encode(event_type, event)
            except errors.InvalidPayload as error:
                tally.complain(number, error)
                del events[number]
        _send(app, events, headers, tally)


def _names(line: bytes) -> dict[str, Any]:
    import msgspec

    return msgspec.json.decode(line, type=dict[str, msgspec.Raw])


def _send(app: Lightbus, events: Mapping[int, Any], headers: dict[str, str], tally: Tally) -> None:
    from lightbus import Receipt, errors

    outcomes: list[Any]
    try:
        outcomes = list(app.publish_many_sync(events.values(), headers=headers))
    except errors.PublishManyError as error:
        outcomes = error.outcomes
    failed: dict[int, errors.PublishError] = {}
    for number, outcome in zip(events, outcomes, strict=True):
        match outcome:
            case Receipt():
                tally.published += 1
                tally.unheard += not outcome.routed
            case errors.PublishNacked():
                tally.complain(number, outcome)
            case _:
                failed[number] = outcome
    if failed:  # the broker is what is wrong, not the lines: the next ones would fare no better
        tally.bad += len(failed)
        first = next(iter(failed))
        which = f"Line {first:,} was" if len(failed) == 1 else f"{len(failed):,} lines from line {first:,} on were"
        tally.stopped = f"{which} not confirmed: {failed[first]}"
