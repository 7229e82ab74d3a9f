"""`lightbus unbind`: remove a binding that no handler needs any more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lightbus.cli import output

if TYPE_CHECKING:
    from lightbus import Lightbus
    from lightbus.handler import Handler

EPILOG = """\b
Examples:
  lightbus unbind billing.bus:app user.registered
  lightbus unbind billing.bus:app 'user.*' --queue slow
  lightbus unbind billing.bus:app user.registered --source auth

\b
Which bindings there are, on RabbitMQ:
  rabbitmqctl list_bindings source_name routing_key destination_name

\b
Exit codes:
  0  the binding is not there (any more)
  1  a handler needs it; the queue or exchange is not there; the broker refused
  2  the command line, or what MODULE:ATTR names, is wrong
"""


@click.command(short_help="Stop hearing what no handler needs any more.", epilog=EPILOG)
@click.argument("target", metavar="MODULE:ATTR")
@click.argument("pattern")
@click.option(
    "--queue", "suffix", default="main", metavar="NAME", help="'slow' for billing.slow; the app's own queue by default."
)
@click.option("--source", metavar="APP", help="The binding to this app's exchange, rather than to the bus.")
@click.option("--force", is_flag=True, help="Also where a handler needs it. A worker that starts binds it again.")
def unbind(target: str, pattern: str, suffix: str, source: str | None, force: bool) -> None:
    """Remove the binding with PATTERN from an app's queue.

    Workers add the bindings that their handlers need, and never remove one: an older worker that still runs may need
    it. So when a handler goes (or hears something else), its binding stays, and so do its events: they arrive, no
    handler matches, and they end as dead letters. Once all workers run the new code, remove the binding with this.

    PATTERN is the one that the handler had, letter for letter. What is in the queue already stays there.
    """
    from lightbus import topology
    from lightbus.cli import logs
    from lightbus.cli import target as targets

    logs.configure("warning")
    app = targets.load_app(target)
    topology.check_pattern(pattern, "unbind")
    exchange = topology.BUS if source is None else topology.check_app_name(source)
    queue = topology.queue_name(app.name, suffix)
    needed = _handlers_that_need(app, suffix, exchange, pattern)
    if needed and not force:
        names = ", ".join(handler.name for handler in needed)
        raise click.ClickException(
            f"{names} of app {app.name!r} hears {pattern!r} by this binding: {exchange} -- {pattern} --> {queue}. "
            "Remove the handler first, or use --force (a worker that starts binds it again)."
        )
    _unbind(app, queue, exchange, pattern)
    output.report(f"No binding {exchange} -- {pattern} --> {queue} any more (a broker does not say if there was one).")
    others = _others_that_match(app, suffix, pattern)
    if others:
        output.report(f"{queue} still hears it by its other bindings: {', '.join(others)}.")
    if needed:
        output.report(f"{', '.join(handler.name for handler in needed)} hears nothing by it until a worker starts.")


def _handlers_that_need(app: Lightbus, suffix: str, exchange: str, pattern: str) -> list[Handler]:
    from lightbus import topology

    return [
        handler
        for handler in app.handlers.values()
        if handler.queue == suffix and (handler.source or topology.BUS) == exchange and pattern in handler.patterns
    ]


def _others_that_match(app: Lightbus, suffix: str, pattern: str) -> list[str]:
    """Bindings of the queue that lead the same event there."""
    from lightbus.pattern import topic_matches

    if "*" in pattern or "#" in pattern:
        return []
    return [
        f"{exchange} -- {other} -->"
        for queue in app.consumed_queues()
        if queue.suffix == suffix
        for exchange, other in queue.patterns
        if other != pattern and topic_matches(other, pattern)
    ]


def _unbind(app: Lightbus, queue: str, exchange: str, pattern: str) -> None:
    from lightbus import errors
    from lightbus.connection import LOST, address_of, describe

    connection = app.broker.connect(f"lightbus {app.name} unbind")
    try:
        channel = connection.channel()
        channel.queue_declare(queue, passive=True)
        channel.exchange_declare(exchange, "topic", passive=True)
        channel.queue_unbind(queue, exchange, pattern)
    except LOST as error:
        connection.collect()
        said = describe(error, address_of(connection, app.broker))
        if isinstance(said, errors.TopologyMissing):
            raise errors.TopologyMissing(f"There is no such binding to remove. {said}") from error
        raise said from error
    connection.close()
