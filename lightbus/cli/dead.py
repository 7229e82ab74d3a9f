"""`lightbus dead`: what failed for good, why, and what to do with it."""

from __future__ import annotations

import base64
import itertools
import json
import re
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from lightbus.cli import Group, asking, output, tables

if TYPE_CHECKING:
    from lightbus import Lightbus
    from lightbus.dead_letters.actions import Outcome
    from lightbus.dead_letters.letter import Filter, Letter
    from lightbus.dead_letters.queue import DeadQueue

EPILOG = """\b
Find out what failed and why, look at one dead letter, fix the cause, and retry:
  lightbus dead list billing.bus:app --stats
  lightbus dead list billing.bus:app --error TimeoutError --newer 2h
  lightbus dead show billing.bus:app 0198c5d2-7a3b
  lightbus dead retry billing.bus:app --error TimeoutError --dry-run
  lightbus dead retry billing.bus:app --error TimeoutError

\b
You can interrupt each of these commands at any time: nothing is lost.
`lightbus dead COMMAND --help` shows the options of each.
"""

LIST_EPILOG = """\b
Examples:
  lightbus dead list billing.bus:app
  lightbus dead list billing.bus:app --stats
  lightbus dead list billing.bus:app --event 'invoice.*' --handler charge --newer 2h
  lightbus dead list billing.bus:app --error KeyError --limit 0 --json | jq '.[].id'

\b
Next: lightbus dead show MODULE:ATTR ID

\b
Exit codes:
  0  success, even if there are no dead letters
  1  the broker is not usable, or the queue does not exist
  2  the command line or MODULE:ATTR is invalid
"""

SHOW_EPILOG = """\b
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

RETRY_EPILOG = """\b
Examples:
  lightbus dead retry billing.bus:app --id 0198c5d2-7a3b
  lightbus dead retry billing.bus:app --handler charge --error TimeoutError --dry-run
  lightbus dead retry billing.bus:app --event 'invoice.*' --older 1h --rate 20
  lightbus dead retry billing.bus:app --limit 1     (try one first)

\b
Exit codes:
  0    every matching dead letter was retried
  1    some were not retried; the output says which, and why
  2    the command line or MODULE:ATTR is invalid
  130  interrupted: confirmed ones are retried, the others are unchanged
"""

PURGE_EPILOG = """\b
Examples:
  lightbus dead purge billing.bus:app --error ValueError --older 7d --dry-run
  lightbus dead purge billing.bus:app --id 0198c5d2-7a3b
  lightbus dead purge billing.bus:app --handler old_handler --yes

\b
To keep a copy first:
  lightbus dead show billing.bus:app --all --json > letters.json

\b
Exit codes:
  0    success
  1    you answered no; the broker is not usable, or the queue does not exist
  2    the command line or MODULE:ATTR is invalid
  130  interrupted: purged ones are deleted, the others are unchanged
"""


NONE = "No dead letters (another `lightbus dead` command may hold some)."
LEAST_ERROR = 40
"""Characters of an error that `list` shows also where the terminal has no room for them: it wraps then."""


def _age(_ctx: click.Context, _param: click.Parameter, value: str | None) -> float | None:
    try:
        return None if value is None else tables.read_age(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is not an age: use 90s, 5m, 2h, 7d or 1w.") from None


def _ids(_ctx: click.Context, _param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    if "" in value:  # from a shell's variable that is not set: each id begins with it
        raise click.BadParameter("it is empty and would match every dead letter. Give an ID, or a prefix of one.")
    return value


def _filters(command: Any) -> Any:
    for option in reversed(
        [
            click.option("--event", metavar="PATTERN", help="Events whose name matches, as in 'invoice.*'."),
            click.option("--handler", metavar="NAME", help="Only those that this handler failed on."),
            click.option(
                "--error",
                metavar="TYPE",
                help="The error's type, as in TimeoutError; 'delivery_limit' for events that crashed their workers.",
            ),
            click.option("--older", callback=_age, metavar="AGE", help="Dead for at least this long: 90s, 5m, 2h, 7d."),
            click.option("--newer", callback=_age, metavar="AGE", help="Dead for at most this long."),
            click.option(
                "--id",
                "ids",
                multiple=True,
                callback=_ids,
                metavar="ID",
                help="The ID, or a prefix of it. Repeatable.",
            ),
        ]
    ):
        command = option(command)
    return command


@click.group(cls=Group, short_help="List, show, retry or purge dead letters.", epilog=EPILOG)
def dead() -> None:
    """Inspect and retry an app's dead letters, in its queue APP.dead.

    An event becomes a dead letter when its handler fails and no retries are left, raises Reject, or cannot decode it,
    or when it crashes its worker repeatedly. It stays there, complete, until it is retried or purged.
    """


# --- list -------------------------------------------------------------------------------------


@dead.command("list", short_help="List dead letters, or count them with --stats.", epilog=LIST_EPILOG)
@click.argument("target", metavar="MODULE:ATTR")
@_filters
@click.option("--stats", is_flag=True, help="Count them by handler and error, over the whole queue.")
@click.option("--limit", type=click.IntRange(0), metavar="N", help="Show at most N; 0 shows all.  [default: 50]")
@click.option("--json", "as_json", is_flag=True, help="A JSON array.")
def list_(target: str, stats: bool, limit: int | None, as_json: bool, **given: Any) -> None:
    """List the dead letters of an app, in the order of their queue.

    This changes nothing: the dead letters are read and returned to the queue in order. While the command runs, other
    `lightbus dead` commands see fewer of them.
    """
    app, wanted = _start(target, given)
    most = (None if stats else 50) if limit is None else limit or None
    with _opened(app) as queue, _Progress(queue):
        found = itertools.islice(_matching(queue, wanted), most)
        if stats:
            groups = _grouped(found)
            if groups or as_json:
                _print_stats(groups, target, as_json=as_json)
            else:
                _say_none(target, queue, wanted)
        elif as_json:
            _print_array(_json(_summary(letter)) for letter in found)
        else:
            _print_list(list(map(_row, found)), target, queue, wanted, most)


def _matching(queue: DeadQueue, wanted: Filter) -> Iterator[Letter]:
    now = time.time()
    return (letter for letter in queue.letters() if wanted.fits(letter, now))


def _row(letter: Letter) -> list[str]:
    message = letter.error_message.strip().splitlines()
    return [
        tables.printable(letter.id, 40),
        tables.age_of(letter.died),
        tables.printable(letter.event, 40) or "?",
        tables.printable(letter.handler or "-", 30),
        str(letter.attempt),
        tables.printable(f"{letter.error}: {message[0]}" if message else letter.error, 100),
    ]


def _print_list(rows: list[list[str]], target: str, queue: DeadQueue, wanted: Filter, most: int | None) -> None:
    if not rows:
        _say_none(target, queue, wanted)
        return
    lines = tables.table(["ID", "AGE", "EVENT", "HANDLER", "ATTEMPT", "ERROR"], rows, right=(1, 4))
    for line in tables.fitted(lines, lines[0].index("ERROR") + LEAST_ERROR) if sys.stdout.isatty() else lines:
        _write(line)
    unseen = queue.count - queue.seen
    if most is not None and len(rows) == most and unseen > 0:
        _write(f"\n{unseen:,} more were not read: --limit 0 shows all, --stats counts them.")
    _write(f"\nShow one: lightbus dead show {target} ID")


def _say_none(target: str, queue: DeadQueue, wanted: Filter) -> None:
    if wanted.given and queue.count:
        _write(f"None of the {queue.count:,} dead letters match. To see all: lightbus dead list {target} --stats")
        return
    from lightbus import inspection

    _write(NONE)
    if waiting := inspection.retrying(queue.connection, queue.app):
        wait = "event waits for its" if waiting == 1 else "events wait for their"
        _write(f"{waiting:,} {wait} next attempt and may become dead letters after the last one.")


def _summary(letter: Letter) -> dict[str, Any]:
    return {
        "id": letter.id,
        "event": letter.event,
        "source": letter.source,
        "source_proven": letter.proven,
        "handler": letter.handler,
        "queue": letter.queue,
        "attempt": letter.attempt,
        "error_type": letter.error_type,
        "error_message": letter.error_message,
        "by_broker": letter.by_broker,
        "published": None if letter.published is None else letter.published.isoformat(),
        "died": None if letter.died is None else letter.died.isoformat(),
    }


def _print_array(items: Iterator[str]) -> None:
    """An array of any length, piece by piece, of what is JSON already."""
    empty = True
    for item in items:
        _write(("[\n " if empty else ",\n ") + item, nl=False)
        empty = False
    _write("[]" if empty else "\n]")


def _json(value: Any) -> str:
    return json.dumps(value, default=str)


class _Group:
    def __init__(self) -> None:
        self.count = 0
        self.oldest: Any = None
        self.newest: Any = None
        self.events: dict[str, int] = {}
        self.example = ""
        self.message = ""

    def add(self, letter: Letter) -> None:
        self.count += 1
        self.example = self.example or letter.id
        self.message = self.message or letter.error_message
        if len(self.events) < 100 or letter.event in self.events:
            self.events[letter.event] = self.events.get(letter.event, 0) + 1
        if letter.died is not None:
            self.oldest = letter.died if self.oldest is None else min(self.oldest, letter.died)
            self.newest = letter.died if self.newest is None else max(self.newest, letter.died)


_Groups = dict[tuple[str, str], _Group]


def _grouped(letters: Iterator[Letter]) -> _Groups:
    groups: _Groups = {}
    for letter in letters:
        groups.setdefault((letter.handler or "-", letter.error), _Group()).add(letter)
    return dict(sorted(groups.items(), key=lambda item: -item[1].count))


def _print_stats(groups: _Groups, target: str, *, as_json: bool) -> None:
    if as_json:
        _print_array(
            _json(
                {
                    "handler": None if handler == "-" else handler,
                    "error": error,
                    "count": group.count,
                    "oldest": None if group.oldest is None else group.oldest.isoformat(),
                    "newest": None if group.newest is None else group.newest.isoformat(),
                    "events": group.events,
                    "example": group.example,
                }
            )
            for (handler, error), group in groups.items()
        )
        return
    rows = [
        [
            f"{group.count:,}",
            tables.printable(handler, 30),
            tables.printable(error, 40),
            tables.age_of(group.oldest),
            tables.age_of(group.newest),
            tables.printable(", ".join(group.events), 40),
            tables.printable(group.example, 40),
        ]
        for (handler, error), group in groups.items()
    ]
    for line in tables.table(
        ["COUNT", "HANDLER", "ERROR", "OLDEST", "NEWEST", "EVENTS", "EXAMPLE"], rows, right=(0, 3, 4)
    ):
        _write(line)
    total = sum(group.count for group in groups.values())
    what = "1 dead letter. Show it:" if total == 1 else f"{total:,} dead letters. Show one:"
    _write(f"\n{what} lightbus dead show {target} ID")


# --- show -------------------------------------------------------------------------------------


@dead.command(short_help="Show one dead letter: payload, headers, traceback.", epilog=SHOW_EPILOG)
@click.argument("target", metavar="MODULE:ATTR")
@click.argument("letter_id", metavar="ID", required=False)
@click.option("--all", "all_", is_flag=True, help="Show all dead letters instead of one.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="A JSON array (an event that two handlers failed on gives two dead letters).",
)
def show(target: str, letter_id: str | None, all_: bool, as_json: bool) -> None:
    """Show a dead letter: its payload, headers, attempts, times, where it came from, and the traceback.

    A prefix of the ID is enough. An event that several handlers failed on has one dead letter for each of them.
    """
    if (not letter_id) != all_:
        raise click.UsageError("Give an ID (lightbus dead list shows them), or --all.")
    app, _ = _start(target, {})
    from lightbus.dead_letters.letter import Filter

    wanted = Filter(ids=(letter_id,) if letter_id else ())
    found = False
    with _opened(app) as queue, _Progress(queue):
        letters = _matching(queue, wanted)
        if as_json:
            first = next(letters, None)
            found = first is not None
            _print_array(map(_whole, itertools.chain([] if first is None else [first], letters)))
        else:
            for letter in letters:
                _write("\n" if found else "", nl=False)
                found = True
                _print_letter(letter, app)
                _print_next(letter, app, target)
    if all_ and not found:
        click.echo(NONE, err=as_json)
    elif not found:
        click.echo(f"Error: no dead letter of {app.name!r} has an id that begins with {letter_id!r}.", err=True)
        sys.exit(1)


def _whole(letter: Letter) -> str:
    payload = tables.json_in_ascii(letter.delivery.body)
    head = {
        **_summary(letter),
        "correlation_id": letter.delivery.properties.get("correlation_id"),
        "headers": _own_headers(letter),
        "traceback": letter.traceback,
    }
    if payload is None:
        return _json({**head, "body_base64": base64.b64encode(letter.delivery.body).decode()})
    return f'{_json(head)[:-1]}, "payload": {payload}}}'


def _own_headers(letter: Letter) -> dict[str, Any]:
    headers = letter.delivery.properties.get("headers")
    return {
        key: value
        for key, value in (headers.items() if isinstance(headers, dict) else ())
        if not key.startswith(("lightbus-error-", "x-death", "x-first-death", "x-last-death", "x-delivery-count"))
    }


def _print_letter(letter: Letter, app: Lightbus) -> None:
    claim = "" if letter.proven else "  (not verified: see `lightbus dead retry --help` on --trust-origin)"
    handler = letter.handler or "every handler that matches"
    failed_as = "failed"
    if letter.by_broker:
        failed_as = "could not be copied" if letter.error == "rejected" else "crashed its worker"
    _field("id", letter.id)
    _field("event", f"{letter.event}  from {letter.source or '?'}{claim}")
    _field("handler", handler + ("  (no longer exists in this code)" if _is_gone(letter, app) else ""))
    _field("queue", letter.queue)
    _field("attempt", f"{letter.attempt}, the last one {failed_as}")
    _field("published", _moment(letter.published))
    _field("dead since", _moment(letter.died))
    correlation = letter.delivery.properties.get("correlation_id")
    if isinstance(correlation, str) and correlation != letter.id:
        _field("correlation", correlation)
    _field("error", f"{letter.error_type}: {letter.error_message}" if letter.error_message else letter.error_type)
    if letter.traceback:
        _write("\ntraceback" + (" (its end)" if letter.traceback.startswith("... ") else ""))
        _write(_indented(letter.traceback))
    _write("\nheaders")
    for key, value in sorted(_own_headers(letter).items()):
        _write(f"  {tables.printable(key)}: {tables.printable(str(value), 300)}")
    text = tables.json_laid_out(letter.delivery.body, indent=2)
    size = f"{len(letter.delivery.body):,} bytes"
    if text is not None:
        _write(f"\npayload ({size})\n{_indented(text)}")
    else:
        _write(f"\nbody ({size}, not JSON)\n  {tables.printable(repr(letter.delivery.body[:2000]))}")


def _print_next(letter: Letter, app: Lightbus, target: str) -> None:
    which = f"{target} --id {letter.id}"
    if letter.handler is not None and _IN_SHELL.fullmatch(letter.handler):
        which += f" --handler {letter.handler}"
    if not _IN_SHELL.fullmatch(letter.id):  # a stranger's message may have any id
        return
    if _is_gone(letter, app):
        _write(f"\nNext: restore the handler, or run: lightbus dead purge {which}")
    else:
        _write(
            f"\nAfter fixing the cause, run: lightbus dead retry {which}{'' if letter.proven else ' --trust-origin'}"
        )


_IN_SHELL = re.compile(r"[\w.:~-]+")
"""What may be pasted into a shell as it is."""


def _is_gone(letter: Letter, app: Lightbus) -> bool:
    return letter.handler is not None and letter.handler not in app.handlers


def _field(name: str, value: str) -> None:
    _write(f"{name:<12} {tables.printable(value)}")


def _moment(moment: Any) -> str:
    return "not known" if moment is None else f"{moment:%Y-%m-%d %H:%M:%S} UTC  ({tables.age_of(moment)} ago)"


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in tables.printable_lines(text).split("\n"))


# --- retry ------------------------------------------------------------------------------------


@dead.command(short_help="Retry dead letters, each for the handler that failed.", epilog=RETRY_EPILOG)
@click.argument("target", metavar="MODULE:ATTR")
@_filters
@click.option(
    "--all", "all_", is_flag=True, help="All dead letters. Required if neither a filter nor --limit is given."
)
@click.option("--dry-run", is_flag=True, help="Only show what would be retried.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Retry at most N.")
@click.option("--rate", type=click.FloatRange(0, 100_000, min_open=True), metavar="N", help="At most N per second.")
@click.option("--trust-origin", is_flag=True, help="Include dead letters whose source is not verified; see above.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def retry(
    target: str,
    all_: bool,
    dry_run: bool,
    limit: int | None,
    rate: float | None,
    trust_origin: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Put dead letters back into their queue, only for the handler that failed on them.

    They start again at attempt 1, with the full retry schedule. Each is removed from the dead letters only after the
    broker has confirmed its copy: if you interrupt the command, nothing is lost, and up to 100 may be retried twice.
    Only dead letters that exist at the start are retried: those that fail again in the meantime stay.

    When an event crashes its worker repeatedly, the broker dead-letters it, and the app cannot record its source. A
    publisher can forge the source on RabbitMQ before 4.0, so the command skips these dead letters. It also skips those
    that were moved between queues by hand (for example in the management UI), and those that a queue has dead-lettered
    to the bus. If you trust everyone who can publish on this broker, add --trust-origin.
    """
    from lightbus.dead_letters import actions

    app, wanted = _start(target, given)
    if not (wanted.given or limit or all_):
        raise click.UsageError("Select dead letters: use a filter (see --help), --limit N, or --all.")
    if dry_run:
        with _opened(app) as queue, _Progress(queue):
            _dry_run(queue, wanted, limit, "retried", as_json=as_json, unless_unproven=not trust_origin)
        return
    outcome = actions.Outcome()
    with _told(app, outcome, "retried", as_json=as_json):
        try:
            with _opened(app) as queue, _Progress(queue, outcome, "retried"):
                actions.retry(queue, wanted, outcome, limit=limit, rate=rate, trust_origin=trust_origin)
        finally:
            app.publisher.close(1.0)
    sys.exit(1 if outcome.left else 0)


def _dry_run(
    queue: DeadQueue,
    wanted: Filter,
    limit: int | None,
    done: str,
    *,
    as_json: bool,
    unless_unproven: bool = False,
) -> None:
    left = 0

    def meant() -> Iterator[Letter]:
        nonlocal left
        for letter in _matching(queue, wanted):
            if unless_unproven and not letter.proven:
                left += 1
            else:
                yield letter

    groups = _grouped(itertools.islice(meant(), limit))
    total = sum(group.count for group in groups.values())
    if as_json:
        _write(_json({"dry_run": True, "matched": total + left, done: total, "left": left}))
        return
    if groups:
        rows = [
            [
                f"{group.count:,}",
                tables.printable(handler, 30),
                tables.printable(error, 40),
                tables.printable(", ".join(group.events), 60),
            ]
            for (handler, error), group in groups.items()
        ]
        for line in tables.table(["COUNT", "HANDLER", "ERROR", "EVENTS"], rows, right=(0,)):
            _write(line)
        _write("")
    _write(f"{total:,} of {queue.count:,} would be {done}. Nothing was changed (--dry-run).")
    if done == "retried":
        for (handler, _), group in groups.items():
            if handler != "-" and handler not in queue.app.handlers:
                _write(_without_handler(handler, group.count, "would be"))
    if left:
        _write(f"{left:,} more would be skipped: their source is not verified (--trust-origin).")


def _without_handler(handler: str, count: int, are: str) -> str:
    return (
        f"{count:,} of them {are} for the handler {tables.printable(handler)}, which does not exist in this code: if "
        "no worker has it, they become dead letters again."
    )


@contextmanager
def _told(app: Lightbus, outcome: Outcome, done: str, *, as_json: bool) -> Generator[None]:
    """Says at the end what was done, also where that is less than was meant."""
    from lightbus import errors

    try:
        yield
    except KeyboardInterrupt:
        _say_done(app, outcome, done, as_json=as_json, interrupted=True)
        sys.exit(130)
    except errors.BrokerError as error:
        if not outcome.matched:
            raise
        outcome.problem = str(error)
        _say_done(app, outcome, done, as_json=as_json)
        sys.exit(1)
    _say_done(app, outcome, done, as_json=as_json)


def _say_done(app: Lightbus, outcome: Outcome, done: str, *, as_json: bool, interrupted: bool = False) -> None:
    if as_json:
        output.report(
            _json(
                {
                    "matched": outcome.matched,
                    done: outcome.done,
                    "left": outcome.left,
                    "left_unproven": outcome.unproven,
                    "left_without_queue": outcome.stranded,
                    "problem": outcome.problem or None,
                    "interrupted": interrupted,
                }
            )
        )
        return
    if interrupted:
        click.echo(f"\nInterrupted: {outcome.done:,} {done}. All others are in {app.name}.dead as before.", err=True)
    elif not (outcome.matched or outcome.vanished):
        output.report("No matching dead letters.")
    else:
        output.report(f"{outcome.done:,} {done}.")
    for queue, count in outcome.stranded.items():
        click.echo(
            f"{count:,} skipped: their queue {tables.printable(queue)} does not exist. Start a worker whose handlers "
            "use it (the worker declares the queue), then retry again.",
            err=True,
        )
    for handler, count in outcome.gone.items():
        click.echo(_without_handler(handler, count, "are"), err=True)
    if outcome.unproven:
        click.echo(
            f"{outcome.unproven:,} skipped: the broker dead-lettered them (they crashed their workers, or a copy was "
            "refused), somebody moved them by hand, or a queue dead-lettered them to the bus, so their source is not "
            "verified. If you trust everyone who can publish on this broker, add --trust-origin.",
            err=True,
        )
    if outcome.vanished:
        are = "1 of those shown is" if outcome.vanished == 1 else f"{outcome.vanished:,} of those shown are"
        click.echo(f"{are} no longer there: retried, purged or being read by another command.", err=True)
    if outcome.problem:
        click.echo(f"Stopped: {outcome.problem} What was not confirmed is in {app.name}.dead as before.", err=True)


# --- purge ------------------------------------------------------------------------------------


@dead.command(short_help="Delete dead letters permanently.", epilog=PURGE_EPILOG)
@click.argument("target", metavar="MODULE:ATTR")
@_filters
@click.option(
    "--all", "all_", is_flag=True, help="All dead letters. Required if neither a filter nor --limit is given."
)
@click.option("--dry-run", is_flag=True, help="Only show what would be purged.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Purge at most N.")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON. Needs --yes or --dry-run.")
def purge(target: str, all_: bool, dry_run: bool, limit: int | None, yes: bool, as_json: bool, **given: Any) -> None:
    """Delete dead letters permanently.

    The command shows them and asks first, unless --yes is given. It deletes only those that it has shown, none that
    arrive in the meantime.
    """
    from lightbus.dead_letters import actions
    from lightbus.dead_letters.letter import Filter

    app, wanted = _start(target, given)
    if not (wanted.given or limit or all_):
        raise click.UsageError("Select dead letters: use a filter (see --help), --limit N, or --all.")
    if as_json and not (yes or dry_run):
        raise click.UsageError("--json does not ask: add --yes or --dry-run.")
    shown: set[bytes] | None = None
    total = 0
    if dry_run or not yes:
        with _opened(app) as queue, _Progress(queue):
            if dry_run:
                _dry_run(queue, wanted, limit, "purged", as_json=as_json)
                return
            shown = set()
            groups = _grouped(_noted(itertools.islice(_matching(queue, wanted), limit), shown))
        total = sum(group.count for group in groups.values())
        if not total:
            _write("No matching dead letters.")
            return
        _print_stats(groups, target, as_json=False)
        with asking("--yes"):
            agreed = click.confirm(f"Purge {total:,} of them permanently?", err=True)
        if not agreed:
            click.echo("Nothing was purged.", err=True)
            sys.exit(1)
        wanted = Filter()  # what was shown is meant, also where it has grown too old for --newer
    outcome = actions.Outcome()
    with (
        _told(app, outcome, "purged", as_json=as_json),
        _opened(app) as queue,
        _Progress(queue, outcome, "purged"),
    ):
        actions.purge(queue, wanted, outcome, limit=limit if shown is None else total, only=shown)
        outcome.vanished = max(0, total - outcome.matched)


def _noted(letters: Iterator[Letter], digests: set[bytes]) -> Iterator[Letter]:
    for letter in letters:
        digests.add(letter.digest)
        yield letter


# --- all of them ------------------------------------------------------------------------------


def _start(target: str, given: dict[str, Any]) -> tuple[Lightbus, Filter]:
    from lightbus.cli import logs
    from lightbus.cli import target as targets
    from lightbus.dead_letters.letter import Filter
    from lightbus.wire.topology import check_pattern

    logs.configure("error")
    if given.get("event") is not None:
        check_pattern(given["event"], "--event")
    return targets.load_app(target), Filter(**given)


def _opened(app: Lightbus) -> Any:
    from lightbus.dead_letters.queue import opened

    return opened(app)


def _write(text: str, *, nl: bool = True) -> None:
    """Where nobody reads it any more, the command ends: it has shown enough, and there may be many more letters."""
    if not output.write(text, nl=nl):
        raise click.exceptions.Exit(0)


class _Progress:
    """How far it is, on a terminal only, and only where it takes more than a second."""

    def __init__(self, queue: DeadQueue, outcome: Outcome | None = None, done: str = "") -> None:
        self.queue = queue
        self.outcome = outcome
        self.done = done
        self.shown = 0
        self.next = time.monotonic() + 1.0

    def __enter__(self) -> None:
        if sys.stderr.isatty():
            self.queue.on_look = self.look

    def look(self) -> None:
        if time.monotonic() < self.next:
            return
        self.next = time.monotonic() + 0.2
        line = f"{self.queue.seen:,} of {self.queue.count:,} read"
        if self.outcome is not None:
            line += f", {self.outcome.done:,} {self.done}"
        click.echo("\r" + line.ljust(self.shown), nl=False, err=True)
        self.shown = len(line)

    def __exit__(self, *_: object) -> None:
        if self.shown:
            click.echo("\r" + " " * self.shown + "\r", nl=False, err=True)
