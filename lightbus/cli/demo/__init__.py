"""`lightbus demo`: runs three services on a file of real commits.

The demo starts the services (docs/examples/demo) in separate processes, reads what they have recorded, asks the broker
what is waiting, and compares that with what it expects from the file.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Generator
from pathlib import Path

import click

EPILOG = """\b
Examples:
  lightbus demo
  lightbus demo --events 200
  lightbus demo --web                (the services as a page, until Ctrl-C)
  lightbus demo --url amqp://guest:guest@localhost:5672/

\b
Exit codes:
  0    every service handled the expected events
  1    they did not, or the broker is not usable
  2    the command line is invalid
  130  interrupted (with --web: 0)
"""


@click.command(short_help="Run three services on 2,000 real commits.", epilog=EPILOG)
@click.option(
    "--url",
    metavar="URL",
    help="A broker, for example amqp://localhost. Default: the embedded broker, in a temporary folder.",
)
@click.option(
    "--events", type=click.IntRange(min=1), metavar="N", help="Publish the first N commits only. The file has 2,000."
)
@click.option("--web", is_flag=True, help="Publish slowly, and show the services with `lightbus web`, until Ctrl-C.")
@click.option("--no-color", is_flag=True, help="No colors. Output to a file or a pipe never has colors.")
def demo(url: str | None, events: int | None, web: bool, no_color: bool) -> None:
    """Run three services on 2,000 real commits.

    forge publishes commit.pushed; stats counts commits; reviews publishes review.requested for large commits, and inbox
    handles it. Each runs in its own `lightbus worker` process. inbox fails on purpose for some events, to show retries
    and dead letters.

    The demo ends with a table that compares the handled events with the expected ones. With --web, it publishes 10
    commits/s until Ctrl-C, and prints the address of a page that shows the services at work: a map, live events, and
    dead letters to retry.

    With --url, the demo's queues and exchanges have names unique to this run, and are deleted at the end. (The bus
    exchange, `lightbus`, stays. Apps on that virtual host that subscribe to `#` receive the demo's events, too.)
    """
    from lightbus import errors
    from lightbus.cli.demo import page
    from lightbus.cli.demo.run import Run
    from lightbus.cli.demo.screen import Screen
    from lightbus.cli.demo.services import FOLDER
    from lightbus.cli.demo.stopping import Failed, Stopped, Stopping
    from lightbus.connection.dial import BrokerAddresses

    if url is not None and any(address.private for address in BrokerAddresses.parse(url).addresses):
        raise click.UsageError("memory:// works within one process; the demo has four. Omit --url, or use RabbitMQ.")
    if web:
        from lightbus.cli.web import check_extra

        check_extra()
    lines = (FOLDER / "commits.jsonl").read_bytes().splitlines(keepends=True)
    screen = Screen(terminal=sys.stdout.isatty(), color=False if no_color or "NO_COLOR" in os.environ else None)
    with Stopping() as stopping, _temporary_folder() as folder:
        try:
            run = Run(
                folder=folder,
                url=url or f"sqlite:///{folder}/bus.db",
                prefix=f"demo-{uuid.uuid4().hex[:6]}-" if url else "",
                lines=[] if web else lines[:events],
                screen=screen,
                stopping=stopping,
                contracts=web,
            )
            if web:
                page.show(run, lines[:events])
            equal = run.play()
        except Stopped:
            screen.keep()
            screen.write("Stopped.")
            sys.exit(0 if web else 130)
        except (Failed, errors.LightbusError) as error:
            screen.keep()
            screen.write(f"The demo failed: {error}", fg="red")
            sys.exit(1)
    sys.exit(0 if equal else 1)


@contextlib.contextmanager
def _temporary_folder() -> Generator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="lightbus-demo-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
