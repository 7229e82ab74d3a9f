"""What a worker prints at its start: its broker, queues, bindings and handlers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from lightbus import Lightbus, Retry
    from lightbus.connection.dial import BrokerAddresses
    from lightbus.consuming.dispatcher import Dispatcher


def lines(app: Lightbus, target: str, consumer: Dispatcher, *, processes: int = 1) -> list[str]:
    """The banner, without colors. The password is masked."""
    workers = f", {processes} processes" if processes > 1 else ""
    return [
        title(app, target) + workers,
        *_block("broker", [[broker_line(app.broker)]]),
        *_block("exchange", [[f"{app.name} (events of this app), bound to lightbus (events of all apps)"]]),
        *_block("queues", _queues(consumer)),
        *_block("bindings", _bindings(app, consumer)),
        *_block("handlers", _handlers(consumer, target)),
    ]


def title(app: Lightbus, target: str) -> str:
    from lightbus import __version__

    return f"Lightbus {__version__}: worker of app {app.name!r} ({target})"


def broker_line(broker: BrokerAddresses) -> str:
    """The broker that an app connects to, without the password, and how to use another one."""
    return ", or ".join(f"{one.place}{one.hint}" for one in broker.addresses)


def broker_name(broker: BrokerAddresses) -> str:
    """The same without advice, as a field of a log record."""
    return ", or ".join(address.place for address in broker.addresses)


def _queues(consumer: Dispatcher) -> list[list[str]]:
    return [
        [subscription.name, f"prefetch {subscription.prefetch}", f"concurrency {subscription.concurrency}"]
        for subscription in consumer.subscriptions
    ]


def _bindings(app: Lightbus, consumer: Dispatcher) -> list[list[str]]:
    consumed = {subscription.name for subscription in consumer.subscriptions}
    return [
        [exchange, f"-- {pattern} -->", queue.name]
        for queue in app.consumed_queues()
        if queue.name in consumed
        for exchange, pattern in queue.patterns
    ]


def _handlers(consumer: Dispatcher, target: str) -> list[list[str]]:
    rows = [
        [
            ", ".join(handler.patterns) + (f" from {handler.source}" if handler.source else ""),
            f"-> {handler.name}",
            "async" if handler.is_async else "in a thread",
            f"retry {schedule(handler.retry)}",
            f"timeout {handler.timeout:g} s" + (f", {handler.concurrency} at once" if handler.concurrency else ""),
        ]
        for subscription in consumer.subscriptions
        for handler in subscription.handlers.values()
    ]
    module = target.partition(":")[0]
    return rows or [
        [f"none. Decorate functions with @app.on('user.registered'), in {module} or in a module that include= names."]
    ]


def schedule(retry: Retry) -> str:
    """`1, 5, 30 s`, or `never`."""
    return ", ".join(f"{delay:g}" for delay in retry.delays) + " s" if retry.delays else "never"


def _block(title: str, rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [f"  {title if number == 0 else '':<9} {row}" for number, row in enumerate(table)]


def show(text: Sequence[str], *, color: bool) -> None:
    """Write the banner to stderr."""
    first, *rest = text
    click.echo(click.style(first, bold=True) if color else first, err=True)
    for line in rest:
        click.echo(line, err=True)
