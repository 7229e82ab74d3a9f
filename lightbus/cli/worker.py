"""`lightbus worker`: handle an app's events until stopped."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import click

from lightbus.cli import logs, running

if TYPE_CHECKING:
    from lightbus.worker.health_server import HealthServer, Page
    from lightbus.worker.worker import Worker

EPILOG = """\b
Examples:
  lightbus worker billing.bus:app
  lightbus worker billing.bus:app --queue slow --concurrency 4
  lightbus worker billing.bus:app --processes 4 --json-logs
  lightbus worker billing.bus:app --reload
  lightbus worker billing.bus:app --health-port 8080     (curl localhost:8080/readyz)
  lightbus worker billing.bus:app --health-port 8080 --metrics     (curl localhost:8080/metrics)

\b
Signals:
  SIGTERM, Ctrl-C      stop consuming, finish running handlers within --grace seconds, exit 0
  a second one         stop at once; unfinished events are redelivered (exit 143 or 130)

\b
Exit codes:
  0  stopped, and all running handlers finished
  1  the broker is not usable, or handlers did not finish within --grace
  2  the command line or MODULE:ATTR is invalid
"""


@click.command(epilog=EPILOG)
@click.argument("target", metavar="MODULE:ATTR")
@click.option(
    "--queue",
    "queues",
    multiple=True,
    metavar="NAME",
    help="Consume only this queue: 'main' is the app's default queue, 'slow' is that of @app.on(..., queue='slow'). "
    "Repeatable. Default: all queues.",
)
@click.option(
    "--concurrency",
    type=click.IntRange(1, 10_000),
    metavar="N",
    help="Maximum number of concurrent handlers, for each queue and process.",
)
@click.option(
    "--prefetch",
    type=click.IntRange(1, 65_535),
    metavar="N",
    help="Maximum number of unacknowledged events, for each queue and process.",
)
@click.option(
    "--processes",
    type=click.IntRange(1, 512),
    metavar="N",
    default=1,
    show_default=True,
    help="Number of worker processes. One that crashes is replaced.",
)
@click.option(
    "--reload",
    is_flag=True,
    help="Restart when a .py file in this folder, or a module of include=, changes. Needs watchfiles (pip install "
    "watchfiles).",
)
@running.grace("running handlers may take to finish when the worker")
@running.log_options
@click.option(
    "--blocked-after",
    type=click.FloatRange(0, 3600),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Log a warning, with the stack, if an async handler blocks the event loop for longer. 0: never.",
)
@click.option(
    "--backend",
    type=click.Choice(["asyncio", "trio"]),
    default="asyncio",
    show_default=True,
    help="The event loop; asyncio uses uvloop if it is installed.",
)
@running.health_options(
    "With --processes, the second process takes the next port, and so on.", metrics_of=", of all processes together"
)
@click.option(
    "--no-contract",
    is_flag=True,
    help="Do not publish the app's contract, which `lightbus catalog` and `lightbus who` read.",
)
@click.option(
    "--supervised",
    hidden=True,
    help="Set by the supervisor: its socket, the number of this process, and the number for the banner.",
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
    no_configure_logging: bool,
    blocked_after: float,
    backend: str,
    health_port: int | None,
    health_host: str,
    metrics: bool,
    no_contract: bool,
    supervised: str | None,
) -> None:
    """Handle the events of one app, until stopped.

    Declares the app's exchange, queues and bindings, and runs its handlers. You can start any number of workers of an
    app, on any number of machines: they share the work.
    """
    from lightbus import errors
    from lightbus.cli import banner, metrics_page
    from lightbus.cli import target as targets
    from lightbus.connection import dial
    from lightbus.modules import files_of
    from lightbus.worker import process
    from lightbus.worker.supervisor import Supervisor
    from lightbus.worker.worker import Worker

    place = Place() if supervised is None else Place.of_supervised(supervised)
    supervises = supervised is None and (processes > 1 or reload)
    if supervises or not no_configure_logging:
        logs.configure(log_level, as_json=json_logs, label=place.label)
    metrics_page.check(metrics, health_port)
    if supervises:
        command = [
            target,
            *(f"--queue={queue}" for queue in queues),
            *([] if concurrency is None else [f"--concurrency={concurrency}"]),
            *([] if prefetch is None else [f"--prefetch={prefetch}"]),
            f"--grace={grace}",
            f"--log-level={log_level}",
            f"--backend={backend}",
            f"--blocked-after={blocked_after}",
            *(["--json-logs"] if json_logs else []),
            *(["--no-configure-logging"] if no_configure_logging else []),
            *([] if health_port is None else [f"--health-port={health_port}", f"--health-host={health_host}"]),
            *(["--metrics"] if metrics else []),
            *(["--no-contract"] if no_contract else []),
        ]
        folder = os.getcwd() if reload else None
        with contextlib.ExitStack() as stack:
            shared = stack.enter_context(contextlib.closing(metrics_page.shared_folder())) if metrics else None
            supervisor = Supervisor(command, processes=processes, grace=grace, reload=folder, companion=shared)
            sys.exit(supervisor.run())
    as_text = not (json_logs or no_configure_logging)
    try:
        page = metrics_page.MetricsPage(place.worker_number) if metrics else None
        app = targets.find_app(target)
        place.watch(files_of(app.include))  # first: a module that cannot be imported is corrected next
        targets.load_handlers(app)
        _ = app.broker  # first: with an invalid URL, no process can run
        pages = {} if page is None else page.of(app)
        with logs.outcomes_of(app):
            one = Worker(
                app,
                queues=queues,
                prefetch=prefetch,
                concurrency=concurrency,
                grace=grace,
                blocked_after=blocked_after,
            )
        if page is not None:
            page.watch(one)
        health = None if health_port is None else _serve_health(one, health_host, place.health_port(health_port), pages)
    except errors.LightbusError:
        place.report_fatal()
        raise
    logger = logging.getLogger("lightbus")
    logger.disabled = False  # the app's logging configuration may have disabled existing loggers
    if place.processes and as_text:
        about = banner.lines(app, target, one.consumer, processes=place.processes)
        banner.show(about, color=logs.use_color(sys.stderr))
    elif not as_text:
        text = f"{banner.title(app, target)} on {banner.broker_line(app.broker)}"
        logs.first_line(text, own_logging=no_configure_logging, app=app.name, broker=banner.broker_name(app.broker))
    dial.warned = dial.warned or not place.processes  # another process logs the warning
    for hint in one.misspelt():
        logger.warning("%s", hint)
    if health is not None:
        logger.info("Health: %s%s", health.url, metrics_page.paths(metrics))
    how = " Press Ctrl-C to stop." if sys.stderr.isatty() else ""

    def started() -> None:
        logger.info("Ready: %r waits for events.%s", app.name, how)
        if place.number <= 1 and not no_contract:  # of several processes, one publishes it
            from lightbus.catalog.announcer import announce

            announce(app)

    code = process.run(
        one,
        backend=backend,
        supervisor=place.socket,
        on_started=started,
        second_signal_text=process.STOPPED_AT_ONCE if as_text else "",
    )
    if page is not None:
        page.close()
    process.leave_process(code)


def _serve_health(worker: Worker, host: str, port: int, pages: Mapping[str, Page]) -> HealthServer:
    from lightbus.worker.health_server import HealthServer

    server = HealthServer(worker, host, port, pages)
    server.start()
    return server


class Place:
    """The number of this process among those of a supervisor, and the socket to the supervisor."""

    socket: socket.socket | None = None
    label = ""
    number = 0
    """From 1, if there are several; else 0."""
    processes = 1
    """Their number, for the banner; 0 if another process shows the banner."""

    @classmethod
    def of_supervised(cls, supervised: str) -> Place:
        # The supervisor has blocked SIGINT until here. Only the supervisor reacts to Ctrl-C.
        signal.signal(signal.SIGINT, lambda _number, _frame: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        descriptor, number, processes = map(int, supervised.split(","))
        place = cls()
        place.socket = socket.socket(fileno=descriptor)
        place.socket.set_inheritable(False)
        place.label = f"[{number}]" if number else ""
        place.number = number
        place.processes = processes
        return place

    @property
    def worker_number(self) -> int:
        """Among those of the supervisor, from 1; 0 without one."""
        return 0 if self.socket is None else max(1, self.number)

    def health_port(self, first: int) -> int:
        """The port of this process; 0 is for any free one."""
        return first + max(0, self.number - 1) if first else 0

    def watch(self, files: Iterable[str]) -> None:
        """Ask the supervisor to watch these files as well, where they are not in the folder that it watches."""
        from lightbus.worker.process import END, WATCH

        folder = os.path.join(os.getcwd(), "")
        for path in files:
            if self.socket is not None and not path.startswith(folder):
                with contextlib.suppress(OSError):
                    self.socket.sendall(WATCH + os.fsencode(path) + END)

    def report_fatal(self) -> None:
        """Report to the supervisor that another process would fail, too."""
        from lightbus.worker.process import GIVE_UP

        if self.socket is not None:
            with contextlib.suppress(OSError):
                self.socket.send(GIVE_UP)
