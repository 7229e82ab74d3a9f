"""`lightbus relay`: send what an app's outbox has, until stopped."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

import click

from lightbus.cli import logs, running

if TYPE_CHECKING:
    from lightbus import Lightbus

EPILOG = """\b
Examples:
  lightbus relay billing.bus:app
  lightbus relay billing.bus:app --json-logs
  lightbus relay billing.bus:app --health-port 8080     (curl localhost:8080/readyz)
  lightbus relay billing.bus:app --health-port 8080 --metrics     (curl localhost:8080/metrics)

\b
Signals:
  SIGTERM, Ctrl-C      send what is left, up to --grace seconds, exit 0
  a second one         stop at once; what was not sent stays in the outbox (exit 143 or 130)

\b
Exit codes:
  0  stopped
  1  the relay failed, or did not finish within --grace
  2  the command line or MODULE:ATTR is invalid, or the app has no outbox
"""

STOPPED_AT_ONCE = "Stopped at once. What was not sent stays in the outbox.\n"


@click.command(short_help="Send the events of an outbox, without a worker.", epilog=EPILOG)
@click.argument("target", metavar="MODULE:ATTR")
@running.grace("sending what is left may take when the relay")
@running.log_options
@running.health_options("It is not ready while it cannot send.")
def relay(
    target: str,
    grace: float,
    log_level: str,
    json_logs: bool,
    no_configure_logging: bool,
    health_port: int | None,
    health_host: str,
    metrics: bool,
) -> None:
    """Send the events of an app's outbox, until stopped. ATTR names the app, or an Outbox of it.

    Workers of the app do this, too. Run a relay for an app without workers, or to send without them. You can start any
    number of relays: they share the work. A relay consumes no events; it also sweeps the app's inbox.
    """
    from lightbus.cli import banner, metrics_page
    from lightbus.cli import target as targets
    from lightbus.cli.outbox.stores import relays, require, require_shared_broker
    from lightbus.worker import process
    from lightbus.worker.health_server import HealthServer
    from lightbus.worker.services import ServiceRunner

    if not no_configure_logging:
        logs.configure(log_level, as_json=json_logs)
    metrics_page.check(metrics, health_port)
    page = metrics_page.MetricsPage() if metrics else None
    app, _ = targets.find_outbox(target)
    targets.load_handlers(app)
    require(relays(app), app)
    require_shared_broker(app)
    pages = {} if page is None else page.of(app)
    runner = ServiceRunner(app, grace=grace)
    if page is not None:
        page.watch(runner)
    health = None if health_port is None else HealthServer(runner, health_host, health_port, pages)
    logger = logging.getLogger("lightbus")
    logger.disabled = False  # the app's logging configuration may have disabled existing loggers
    logs.first_line(
        _title(app, target), own_logging=no_configure_logging, app=app.name, broker=banner.broker_name(app.broker)
    )
    with logs.outcomes_of(app):
        _ = app.publisher  # made here, so that it is observed
    if health is not None:
        health.start()
        logger.info("Health: %s%s", health.url, metrics_page.paths(metrics))
    how = " Press Ctrl-C to stop." if sys.stderr.isatty() else ""
    code = process.run(
        runner,
        on_started=lambda: logger.info("Started: sends events as they are committed.%s", how),
        second_signal_text="" if json_logs or no_configure_logging else STOPPED_AT_ONCE,
    )
    if page is not None:
        page.close()
    process.leave_process(code)


def _title(app: Lightbus, target: str) -> str:
    from lightbus import __version__
    from lightbus.cli import banner
    from lightbus.cli.outbox.stores import relays

    databases = " and ".join(one.store.name for one in relays(app))
    broker = banner.broker_line(app.broker)
    return f"Lightbus {__version__}: relay of app {app.name!r} ({target}), from {databases} to {broker}"
