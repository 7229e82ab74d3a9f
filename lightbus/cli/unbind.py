"""`lightbus unbind`: removes a binding that no handler needs."""

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
To list the bindings on RabbitMQ:
  rabbitmqctl list_bindings source_name routing_key destination_name

\b
Exit codes:
  0  the binding no longer exists, or never did
  1  a handler needs it; the queue or exchange does not exist; the broker refused
  2  the command line or MODULE:ATTR is invalid
"""


@click.command(short_help="Remove a binding that no handler needs.", epilog=EPILOG)
@click.argument("target", metavar="MODULE:ATTR")
@click.argument("pattern")
@click.option(
    "--queue", "suffix", default="main", metavar="NAME", help="'slow' for billing.slow; the app's own queue by default."
)
@click.option("--source", metavar="APP", help="The binding from this app's exchange instead of the bus.")
@click.option(
    "--force", is_flag=True, help="Remove it even if a handler needs it. The next worker that starts adds it again."
)
def unbind(target: str, pattern: str, suffix: str, source: str | None, force: bool) -> None:
    """Remove the binding with PATTERN from an app's queue.

    Workers add the bindings that their handlers need, but never remove one, because an older worker that still runs may
    need it. So when you remove a handler (or change its pattern), its binding stays: events still arrive, no handler
    matches, and they become dead letters. When all workers run the new code, remove the binding with this command.

    PATTERN must be exactly the pattern of the removed handler. Events that are already in the queue stay there.
    """
    from lightbus.cli import logs
    from lightbus.cli import target as targets
    from lightbus.wire import topology

    logs.configure("warning")
    app = targets.load_app(target)
    topology.check_pattern(pattern, "unbind")
    exchange = topology.BUS if source is None else topology.check_app_name(source)
    queue = topology.queue_name(app.name, suffix)
    needed = _handlers_that_need(app, suffix, exchange, pattern)
    if needed and not force:
        names = ", ".join(handler.name for handler in needed)
        raise click.ClickException(
            f"{names} of app {app.name!r} needs this binding for {pattern!r}: {exchange} -- {pattern} --> {queue}. "
            "Remove the handler first, or use --force (the next worker that starts adds it again)."
        )
    _unbind(app, queue, exchange, pattern)
    output.report(
        f"Removed the binding {exchange} -- {pattern} --> {queue}, if there was one (the broker does not report it)."
    )
    others = _others_that_match(app, suffix, pattern)
    if others:
        output.report(f"{queue} still receives it through other bindings: {', '.join(others)}.")
    if needed:
        output.report(
            f"{', '.join(handler.name for handler in needed)} receives nothing through it until a worker starts."
        )


def _handlers_that_need(app: Lightbus, suffix: str, exchange: str, pattern: str) -> list[Handler]:
    from lightbus.wire import topology

    return [
        handler
        for handler in app.handlers.values()
        if handler.queue == suffix and (handler.source or topology.BUS) == exchange and pattern in handler.patterns
    ]


def _others_that_match(app: Lightbus, suffix: str, pattern: str) -> list[str]:
    """Other bindings that route the same event to the queue."""
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
    from lightbus.inspection.states import connected

    try:
        with connected(app, "unbind") as connection:
            channel = connection.channel()
            channel.queue_declare(queue, passive=True)
            channel.exchange_declare(exchange, "topic", passive=True)
            channel.queue_unbind(queue, exchange, pattern)
    except errors.TopologyMissing as error:
        raise errors.TopologyMissing(f"This binding does not exist. {error}") from error
