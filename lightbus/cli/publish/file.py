"""Publishes a file of events (JSON Lines), in chunks."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import IO, TYPE_CHECKING, Any, TypedDict

import click

from lightbus.cli import output
from lightbus.cli.publish.fields import unknown_fields

if TYPE_CHECKING:
    from lightbus import Lightbus
    from lightbus.event import EventType

CHUNK = 1000
"""Maximum number of lines that are published at once: the maximum number of unconfirmed messages."""
AHEAD_BYTES = 8 * 1024 * 1024
"""Maximum size of the lines that are read ahead (plus one line). So memory does not grow with the file."""


class Common(TypedDict):
    """The options that all events of a file are published with."""

    headers: dict[str, str]
    correlation_id: str | None


class Tally:
    """The result of publishing a file: how many lines were published, and what happened to the others."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.lines = 0
        """Without empty ones."""
        self.last = 0
        """The last line's number."""
        self.published = 0
        self.unrouted = 0
        self.bad = 0
        self.ignored: dict[str, None] = {}
        """Names of unknown fields."""
        self.stopped: str | None = None
        """Why the file was not published to its end."""

    def reject(self, number: int, reason: object) -> None:
        self.bad += 1
        click.echo(f"line {number}: {reason}", err=True)

    def as_dict(self) -> dict[str, Any]:
        seconds = time.monotonic() - self.began
        return {
            "lines": self.lines,
            "published": self.published,
            "bad": self.bad,
            "unrouted": self.unrouted,
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
        if self.unrouted:
            all_of_them = "it" if self.published == 1 else "them"
            unrouted = all_of_them if self.unrouted == self.published else f"{self.unrouted:,} of them"
            text += f"; no queue is bound for {unrouted}"
        return text + "."


class Lines:
    """The lines of a file with their numbers, read ahead by a thread. So lines are published as soon as they arrive,
    even if the next line of a pipe arrives much later. A line over the limit is None."""

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
        """The lines read since the last chunk, up to `CHUNK`. Waits for the first one."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self._ended)
                chunk = [self._lines.popleft() for _ in range(min(CHUNK, len(self._lines)))]
                self._bytes -= sum(len(line or b"") for _, line in chunk)
                self._changed.notify()
            if not chunk:
                return
            yield chunk


def publish_file(app: Lightbus, event_type: EventType, file: IO[bytes], common: Common, *, as_json: bool) -> int:
    """Publish an event for each line, report the result, and return the exit code."""
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
                _publish_chunk(app, event_type, chunk, common, tally)
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
    common: Common,
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
            tally.reject(number, f"longer than {codec.MAX_BODY_BYTES:,} bytes")
            continue
        try:
            events[number] = codec.build_event(event_type, line)
        except errors.InvalidPayload as error:
            tally.reject(number, str(error).removeprefix(f"event {event_type.name!r}: "))
            continue
        tally.ignored |= dict.fromkeys(unknown_fields(event_type, _names(line)))
    try:
        _send(app, events, common, tally)
    except errors.InvalidPayload:  # nothing was sent: find the invalid events
        for number, event in list(events.items()):
            try:
                codec.encode(event_type, event)
            except errors.InvalidPayload as error:
                tally.reject(number, error)
                del events[number]
        _send(app, events, common, tally)


def _names(line: bytes) -> dict[str, Any]:
    import msgspec

    return msgspec.json.decode(line, type=dict[str, msgspec.Raw])


def _send(app: Lightbus, events: Mapping[int, Any], common: Common, tally: Tally) -> None:
    from lightbus import Receipt, errors

    outcomes: list[Any]
    try:
        outcomes = list(app.publish_many_sync(events.values(), **common))
    except errors.PublishManyError as error:
        outcomes = error.outcomes
    failed: dict[int, errors.PublishError] = {}
    for number, outcome in zip(events, outcomes, strict=True):
        match outcome:
            case Receipt():
                tally.published += 1
                tally.unrouted += not outcome.routed
            case errors.PublishNacked():
                tally.reject(number, outcome)
            case _:
                failed[number] = outcome
    if failed:  # the cause is the broker, not these lines: the next ones would fail, too
        tally.bad += len(failed)
        first = next(iter(failed))
        which = f"Line {first:,} was" if len(failed) == 1 else f"{len(failed):,} lines from line {first:,} on were"
        tally.stopped = f"{which} not confirmed: {failed[first]}"
