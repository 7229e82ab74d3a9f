"""`lightbus health`: checks that an app's events are handled. For probes and scripts."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from lightbus.cli import output

if TYPE_CHECKING:
    from lightbus import Lightbus

EPILOG = """\b
Examples:
  lightbus health billing.bus:app
  lightbus health billing.bus:app --json
  lightbus health billing.bus:app || page-somebody

\b
Exit codes:
  0  the broker answers, and if the app has handlers, each queue exists and has a consumer
  1  unhealthy: the output shows the problem and the next step
  2  the command line or MODULE:ATTR is invalid

\b
This command asks the broker. A worker reports its own health with --health-port:
  lightbus worker billing.bus:app --health-port 8080
  curl localhost:8080/readyz
"""


@click.command(short_help="Check that an app's events are handled.", epilog=EPILOG)
@click.argument("target", metavar="MODULE:ATTR")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def health(target: str, as_json: bool) -> None:
    """Ask the broker whether an app's events are handled: it answers, and each queue exists and has a consumer."""
    from lightbus.cli import logs
    from lightbus.cli import target as targets

    logs.configure("error")
    app = targets.load_app(target)
    problems, queues = _ask(app, target)
    if as_json:
        answer = {"healthy": not problems, "broker": app.broker.masked, "queues": queues, "problems": problems}
        output.write(json.dumps(answer, indent=1))
    else:
        for queue in queues:
            state = f"{queue['ready']:,} ready, {queue['consumers']} consuming" if queue["exists"] else "missing"
            output.write(f"{queue['name']}: {state}")
        for problem in problems:
            click.echo(f"Unhealthy: {problem}", err=True)
        if not problems:
            output.write("Healthy." if app.handlers else f"Healthy: {app.name} has no handlers, so it needs no worker.")
    sys.exit(1 if problems else 0)


def _ask(app: Lightbus, target: str) -> tuple[list[str], list[dict[str, Any]]]:
    from lightbus import errors
    from lightbus.inspection.states import connected, consumed, queue_states

    try:
        with connected(app, "health") as connection:
            states = queue_states(connection, consumed(app))
    except errors.BrokerError as error:
        return [str(error)], []
    if not app.handlers:  # then only a queue with ready events needs a worker
        states = [state for state in states if state.ready]
    problems = []
    for state in states:
        if not state.exists:
            problems.append(f"the queue {state.name} does not exist. Start a worker: lightbus worker {target}")
        elif not state.consumers:
            problems.append(
                f"no consumer on {state.name} ({state.ready:,} ready). Start a worker: lightbus worker {target}"
            )
    queues = [
        {"name": state.name, "exists": state.exists, "ready": state.ready, "consumers": state.consumers}
        for state in states
    ]
    return problems, queues
