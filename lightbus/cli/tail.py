"""`lightbus tail`: events as they pass."""

from __future__ import annotations

import base64
import contextlib
import fnmatch
import json
import os
import re
import select
import shutil
import signal
import stat
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from types import FrameType
from typing import TYPE_CHECKING, Any

import attrs
import click

from lightbus.cli import banner, logs, output, tables

if TYPE_CHECKING:
    from lightbus.connection.dial import BrokerAddresses
    from lightbus.message import Message
    from lightbus.tail import Tail, Taken
    from lightbus.transport import Delivery

EPILOG = """\b
Examples (with quotes, because * and # are special in a shell):
  lightbus tail
  lightbus tail 'user.#' 'invoice.*'
  lightbus tail billing.bus:app 'invoice.*'
  lightbus tail amqp://user:password@host:5672/vhost
  lightbus tail --source auth --where email='*@example.com'
  lightbus tail --json | jq -c '[.event, .payload.amount]'
  lightbus tail invoice.paid --limit 1 --timeout 30 && echo "one came"

\b
Exit codes:
  0  stopped by Ctrl-C, SIGTERM, --timeout or --limit, or because the reader of its output has exited
  1  the broker is not usable; or fewer than --limit events arrived
  2  the command line or MODULE:ATTR is invalid
"""

LONGEST_TEXT = 2000
"""Characters of a payload that are shown without --full."""
LONGEST_BODY = 64 * 1024
"""Bytes of a body that are laid out as JSON without --full: a larger one is cut first."""
LOOK = 0.25
"""Seconds after which it checks whether the reader of its output still exists."""

_TOKENS = re.compile(
    r'(?P<string>"(?:\\.|[^"\\])*")(?P<colon>\s*:)?|(?P<number>-?\d[\d.eE+-]*)|(?P<word>true|false|null)'
)


@click.command(short_help="Show live events.", epilog=EPILOG)
@click.argument("arguments", metavar="[MODULE:ATTR|URL] [PATTERN]...", nargs=-1)
@click.option("--source", "sources", multiple=True, metavar="APP", help="Only events of this app. Repeatable.")
@click.option(
    "--where",
    "conditions",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Only payloads with this value; FIELD!=VALUE for all others. `user.name=A*` matches a nested field; * matches "
    "anything. Several are combined with AND.",
)
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Stop after N events.")
@click.option("--timeout", type=click.FloatRange(0, min_open=True), metavar="SECONDS", help="Stop after this time.")
@click.option("--full", is_flag=True, help=f"Whole payloads, not just {LONGEST_TEXT:,} characters of each.")
@click.option("--json", "as_json", is_flag=True, help="One complete JSON object per line.")
def tail(
    arguments: tuple[str, ...],
    sources: tuple[str, ...],
    conditions: tuple[str, ...],
    limit: int | None,
    timeout: float | None,
    full: bool,
    as_json: bool,
) -> None:
    """Show live events, on the broker of an app, of a URL, or of LIGHTBUS_URL.

    PATTERN is a topic pattern, as in @app.on: * matches one word, # any number of words. Default: all events. Retries
    and dead letters are not shown: each event appears once, when it is published (a delayed one when it is due).

    The command uses an exclusive, auto-delete queue and takes no events from other consumers. It never slows publishers
    down: if it is too slow, the oldest events are dropped, and it shows how many. While it runs, publishers get
    `routed` for these events, even if no other queue is bound. With MODULE:ATTR, the queue's name begins with the app's
    name, so that the app's own broker user may declare it.
    """
    from lightbus import errors
    from lightbus.tail import Tail
    from lightbus.wire.topology import BUS, check_app_name

    logs.configure("info")
    broker, owner, patterns = _read(arguments)
    filters = [_condition(one) for one in conditions]
    wanted = frozenset(map(check_app_name, sources))
    place = banner.broker_line(broker)
    one = Tail(broker, patterns, owner=owner or BUS, keep=_from(wanted), place=place)
    show = _JSONLines() if as_json else _Lines(full=full, colour=logs.in_colour(sys.stdout))
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell lets what it starts with & ignore SIGINT
        signal.signal(number, _interrupt)
    deadline = None if timeout is None else time.monotonic() + timeout
    view = _View(one, show.lines, filters, limit, deadline)
    try:
        one.ensure_started()
        view.run()
    except KeyboardInterrupt:
        pass
    except errors.AccessRefused as error:
        if owner or "permission missing" not in str(error):
            raise
        hint = "An app's own user can use: lightbus tail MODULE:ATTR."
        raise errors.AccessRefused(f"{error} {hint}") from error
    else:
        if not view.unread and not one.queue:
            raise errors.BrokerUnreachable(f"{place} did not answer within --timeout: no event could be seen.")
    one.stop(2.0)
    if not view.unread:
        click.echo(view.summary(), err=True)
    sys.exit(1 if limit is not None and view.shown < limit and not view.unread else 0)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _read(arguments: Sequence[str]) -> tuple[BrokerAddresses, str | None, list[str]]:
    """The broker, the app's name if one is given, and the patterns."""
    from lightbus.cli import target as targets
    from lightbus.connection import dial
    from lightbus.connection.dial import BrokerAddresses
    from lightbus.wire.topology import check_pattern

    first, rest = (arguments[0], arguments[1:]) if arguments and ":" in arguments[0] else ("", arguments)
    for other in rest:
        if ":" in other:  # a URL may hold a password
            what = "A URL" if "@" in other or "//" in other else repr(other)
            raise click.UsageError(f"{what} is not a pattern. Give MODULE:ATTR or a URL first, and only one.")
    patterns = [check_pattern(pattern, "tail") for pattern in rest] or ["#"]
    if first and "://" not in first and "@" not in first:
        app = targets.load_app(first)
        return app.broker, app.name, patterns
    dial.warned = True  # the first line says it
    return BrokerAddresses.parse(first) if first else BrokerAddresses.from_environment(), None, patterns


# --- which ones -------------------------------------------------------------------------------


def _from(sources: frozenset[str]) -> Callable[[Delivery], bool]:
    # Of a delayed event the exchange is `billing.delay.N`.
    return lambda delivery: not sources or delivery.exchange.partition(".")[0] in sources


@attrs.frozen
class Condition:
    """One --where."""

    path: tuple[str, ...]
    value: str
    equal: bool

    def fits(self, payload: Any) -> bool:
        return any(self._is(found) for found in self._find(payload)) == self.equal

    def _find(self, payload: Any) -> list[Any]:
        """What is at the end of the path: nothing, or one value."""
        for name in self.path:
            match payload:
                case dict() if name in payload:
                    payload = payload[name]
                case list() if name.isdecimal() and int(name) < len(payload):
                    payload = payload[int(name)]
                case _:
                    return []
        return [payload]

    def _is(self, found: Any) -> bool:
        if isinstance(found, (int, float)) and not isinstance(found, bool):
            with contextlib.suppress(ValueError):
                if float(self.value) == found:
                    return True
        text = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False, separators=(",", ":"))
        return fnmatch.fnmatchcase(text, self.value)


def _condition(given: str) -> Condition:
    field, equals, value = given.partition("=")
    path = tuple(field.removesuffix("!").split("."))
    if not equals or not all(path):
        raise click.UsageError(f"--where {given!r} is not FIELD=VALUE, as in amount=9.50 or user.name='A*'.")
    return Condition(path, value, not field.endswith("!"))


# --- showing them -----------------------------------------------------------------------------


class _View:
    """Takes events and writes them, until it has been enough."""

    def __init__(
        self,
        events: Tail,
        lines: Callable[[Message, Taken], list[str]],
        filters: Sequence[Condition],
        limit: int | None,
        deadline: float | None,
    ) -> None:
        self.events = events
        self.lines = lines
        self.filters = filters
        self.limit = limit
        self.deadline = deadline
        self.seen = 0
        self.shown = 0
        self.dropped = 0
        self.unread = False
        """Nobody reads what is written here any more."""

    def run(self) -> None:
        while self.limit is None or self.shown < self.limit:
            left = LOOK if self.deadline is None else min(LOOK, self.deadline - time.monotonic())
            if left <= 0:
                return
            taken = self.events.take(left)
            if _has_no_reader() if taken is None else not self._show(taken):
                self.unread = True
                return

    def _show(self, taken: Taken) -> bool:
        """False where nobody reads it."""
        from lightbus import errors
        from lightbus.wire import codec
        from lightbus.wire.topology import BUS

        self.seen += 1
        self.dropped += taken.dropped
        if taken.dropped:
            click.echo(
                f"... {taken.dropped:,} events were dropped: they arrived faster than they could be shown.", err=True
            )
        if taken.overrun:
            click.echo(
                "... some events may be missing: the queue was full, because this program was stopped or too slow.",
                err=True,
            )
        try:
            message = codec.read_message(BUS, taken.delivery)
        except errors.DecodeError as error:
            name = tables.printable(taken.delivery.routing_key)
            click.echo(f"... {name}: cannot be shown: {tables.printable(str(error))}", err=True)
            return True
        if self.filters and not self._fits(message):
            return True
        self.shown += 1  # before it is written: an interruption may come right after
        return output.write("\n".join(self.lines(message, taken)))

    def _fits(self, message: Message) -> bool:
        import msgspec

        try:
            payload = msgspec.json.decode(message.body)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return False
        return all(one.fits(payload) for one in self.filters)

    def summary(self) -> str:
        enough = self.limit is not None and self.shown >= self.limit  # then nobody misses the rest
        dropped = self.dropped + (0 if enough else self.events.left())
        text = f"{self.shown:,} shown"
        if self.seen > self.shown:
            text += f" of {self.seen:,} that passed"
        return f"{text}, {dropped:,} dropped." if dropped else f"{text}."


def _has_no_reader() -> bool:
    """Whether stdout is a pipe that nobody reads any more, as after `| head -1`."""
    with contextlib.suppress(OSError, ValueError):
        descriptor = sys.stdout.fileno()
        if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            poll = select.poll()
            poll.register(descriptor, 0)
            return any(event & select.POLLERR for _, event in poll.poll(0))
    return False


class _JSONLines:
    """One JSON object a line, in ASCII: no payload can break a line or steer a terminal."""

    def lines(self, message: Message, taken: Taken) -> list[str]:
        head = {
            "received": datetime.fromtimestamp(taken.received, UTC).isoformat(timespec="milliseconds"),
            "id": message.id,
            "event": message.event,
            "source": message.source,
            "time": message.time.isoformat(),
            "version": message.version,
            "correlation_id": message.correlation_id,
            "causation_id": message.causation_id,
            "headers": message.headers,
        }
        payload = tables.json_in_ascii(message.body)
        if payload is None:
            head["body_base64"] = base64.b64encode(message.body).decode()
            return [json.dumps(head, default=str)]
        return [f'{json.dumps(head, default=str)[:-1]}, "payload": {payload}}}']


class _Lines:
    """For people: who said what when, and the payload below."""

    def __init__(self, *, full: bool, colour: bool) -> None:
        self.full = full
        self.colour = colour

    def lines(self, message: Message, taken: Taken) -> list[str]:
        moment = datetime.fromtimestamp(taken.received)
        head = [
            self._in(f"{moment:%H:%M:%S}.{moment.microsecond // 1000:03d}", "bright_black"),
            self._in(tables.printable(message.event) or "(no name)", "cyan", bold=True),
            f"from {self._in(tables.printable(message.source) or '?', 'green')}",
            *([f"version {message.version}"] if message.version > 1 else []),
            self._in(tables.printable(message.id, 40), "bright_black"),
        ]
        lines = ["  ".join(head)]
        if message.causation_id is not None:
            lines.append(self._in(f"  caused by {tables.printable(message.causation_id, 40)}", "bright_black"))
        for key, value in sorted(message.headers.items()):
            lines.append(f"  {tables.printable(key, 60)}: {tables.printable(str(value), 200)}")
        return [*lines, *self._payload(message.body)]

    def _payload(self, body: bytes) -> list[str]:
        if not body:
            return ["  (no body)"]
        size = f"  ({len(body):,} bytes in all; --full shows them)"
        if len(body) > LONGEST_BODY and not self.full:
            return [f"  {tables.printable(body[:LONGEST_TEXT].decode(errors='replace'), LONGEST_TEXT)}", size]
        text = tables.json_laid_out(body, indent=0)
        if text is None:
            shown = tables.printable(repr(body), 0 if self.full else 200)
            return [f"  {shown}  (not JSON, {len(body):,} bytes)"]
        if len(text) > shutil.get_terminal_size((100, 24)).columns - 2:
            text = tables.json_laid_out(body, indent=2) or text
        cut = len(text) > LONGEST_TEXT and not self.full
        text = tables.printable_lines(text[:LONGEST_TEXT] if cut else text)
        lines = [f"  {self._painted(line)}" for line in text.split("\n")]
        return [f"{lines[-1]}…" if line is lines[-1] and cut else line for line in lines] + ([size] if cut else [])

    def _painted(self, line: str) -> str:
        return _TOKENS.sub(self._paint, line) if self.colour else line

    def _paint(self, found: re.Match[str]) -> str:
        if found["string"] is not None:
            if found["colon"] is not None:
                return self._in(found["string"], "blue") + found["colon"]
            return self._in(found["string"], "green")
        return self._in(found[0], "yellow" if found["number"] else "magenta")

    def _in(self, text: str, colour: str, *, bold: bool = False) -> str:
        return click.style(text, fg=colour, bold=bold or None) if self.colour else text
