"""`lightbus worker`: handle an app's events until stopped."""

from __future__ import annotations

import sys

import click

from lightbus.cli import logs

EPILOG = """\b
Examples:
  lightbus worker billing.bus:app
  lightbus worker billing.bus:app --queue slow --concurrency 4
  lightbus worker billing.bus:app --processes 4 --json-logs
  lightbus worker billing.bus:app --reload

\b
Signals:
  SIGTERM, Ctrl-C      take no more events, finish those in flight within --grace seconds, exit 0
  a second one         stop at once; what was in flight is delivered again (exit 143 or 130)

\b
Exit codes:
  0  stopped as asked, everything in flight finished
  1  the broker cannot be used as it is, or handlers did not finish within --grace
  2  the command line, or what MODULE:ATTR names, is wrong
"""


@click.command(epilog=EPILOG)
@click.argument("target", metavar="MODULE:ATTR")
@click.option(
    "--queue",
    "queues",
    multiple=True,
    metavar="NAME",
    help="Consume this queue only: 'main' is the app's own, 'slow' is that of @app.on(..., queue='slow'). "
    "May be given several times. All of them by default.",
)
@click.option("--concurrency", type=click.IntRange(1, 10_000), help="Handlers that run at once, for each queue and process.")
@click.option("--prefetch", type=click.IntRange(1, 65_535), help="Events taken ahead at most, for each queue and process.")
@click.option("--processes", type=click.IntRange(1, 512), default=1, show_default=True, help="One that dies is replaced.")
@click.option("--reload", is_flag=True, help="Start again when a .py file in this folder changes. Needs lightbus[reload].")
@click.option(
    "--grace",
    type=click.FloatRange(0, 86_400),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="How long handlers in flight may take to finish when the worker is stopped.",
)
@click.option("--log-level", type=click.Choice(logs.LEVELS, case_sensitive=False), default="info", show_default=True)
@click.option("--json-logs", is_flag=True, help="One JSON object a line: time, level, logger, message, exception.")
@click.option(
    "--backend",
    type=click.Choice(["asyncio", "trio"]),
    default="asyncio",
    show_default=True,
    help="The event loop; asyncio uses uvloop where it is installed.",
)
def worker(
    target: str,
    queues: tuple[str, ...],
    concurrency: int | None,
    prefetch: int | None,
    processes: int,
    reload: bool,
    grace: float,
    log_level: str,
    json_logs: bool,
    backend: str,
) -> None:
    """Handle the events of one app, until stopped.

    Declares the app's exchange, queues and bindings, says what it hears and who handles it, and runs the handlers.
    Start as many workers of one app as you like, on as many machines: they share the work.
    """
    import logging

    from lightbus import worker as workers
    from lightbus.cli import banner, target as targets

    logs.configure(log_level, as_json=json_logs)
    app = targets.load_app(target)
    logging.getLogger("lightbus").disabled = False  # the app's own logging configuration may disable "existing" loggers
    one = workers.Worker(app, queues=queues, prefetch=prefetch, concurrency=concurrency, grace=grace)
    if not json_logs:
        banner.show(banner.lines(app, target, one.consumer), colour=logs.in_colour(sys.stderr))
    ready = f"Ready: {app.name!r} waits for events. Press Ctrl-C to stop."
    sys.exit(workers.run(one, backend=backend, on_started=lambda: logging.getLogger("lightbus").info(ready)))
