"""`lightbus tail`: shows live events."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING

import click

from lightbus.cli import banner, logs
from lightbus.cli.tail.formats import LONGEST_TEXT

if TYPE_CHECKING:
    from lightbus.connection.dial import BrokerAddresses
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
    from lightbus.cli.tail.conditions import Condition
    from lightbus.cli.tail.formats import JSONLines, Text
    from lightbus.cli.tail.view import View
    from lightbus.tail import Tail
    from lightbus.wire.topology import BUS, check_app_name

    logs.configure("info")
    broker, owner, patterns = _read(arguments)
    filters = [Condition.parse(one) for one in conditions]
    wanted = frozenset(map(check_app_name, sources))
    place = banner.broker_line(broker)
    one = Tail(broker, patterns, owner=owner or BUS, keep=_keep(wanted), place=place)
    form = JSONLines() if as_json else Text(full=full, color=logs.use_color(sys.stdout))
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell makes background processes ignore SIGINT
        signal.signal(number, _interrupt)
    deadline = None if timeout is None else time.monotonic() + timeout
    view = View(one, form, filters, limit, deadline)
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
    dial.warned = True  # the first line shows the broker
    return BrokerAddresses.parse(first) if first else BrokerAddresses.from_environment(), None, patterns


def _keep(sources: frozenset[str]) -> Callable[[Delivery], bool]:
    # The exchange of a delayed event is `billing.delay.N`.
    return lambda delivery: not sources or delivery.exchange.partition(".")[0] in sources
