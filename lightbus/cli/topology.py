"""`lightbus topology`: the exchanges and queues of an app, permissions of its broker user, and settings of Artemis."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from lightbus.cli import output, tables

if TYPE_CHECKING:
    from lightbus import Lightbus
    from lightbus.inspection.states import ObjectState, States
    from lightbus.wire.topology import Exchange, Queue

EPILOG = """\b
Examples:
  lightbus topology billing.bus:app                     (short for: lightbus topology show ...)
  lightbus topology billing.bus:app --live
  lightbus topology billing.bus:app --format svg > billing.svg
  lightbus topology permissions billing.bus:app
  lightbus topology artemis                             (once for each broker: ActiveMQ Artemis)

\b
`lightbus topology COMMAND --help` shows the options of each.
"""

SHOW_EPILOG = """\b
Examples (`show` may be left out):
  lightbus topology show billing.bus:app
  lightbus topology billing.bus:app --live
  lightbus topology billing.bus:app --format svg > billing.svg
  lightbus topology billing.bus:app --format mermaid >> README.md      (between ```mermaid and ```)
  lightbus topology billing.bus:app --live --json | jq '.queues[] | select(.live.ready > 0) | .name'

\b
Exit codes:
  0  success, whatever was found (use `lightbus doctor` for a diagnosis)
  1  with --live: the broker is not usable
  2  the command line or MODULE:ATTR is invalid
"""

PERMISSIONS_EPILOG = """\b
Examples:
  lightbus topology permissions billing.bus:app
  lightbus topology permissions billing.bus:app --user billing-prod --vhost events
  lightbus topology permissions billing.bus:app | ssh broker sh

\b
All steps, once for each app, on the broker's machine:
  rabbitmqctl add_user billing                           (it asks for the password)
  lightbus topology permissions billing.bus:app | sh
Then, where the app runs: LIGHTBUS_URL=amqps://billing:PASSWORD@host/VHOST

\b
On ActiveMQ Artemis: add the output of this to <security-settings> in broker.xml, again after each new queue:
  lightbus topology permissions billing.bus:app --format artemis

\b
Exit codes:
  0  success; no broker is used
  2  the command line or MODULE:ATTR is invalid
"""


ARTEMIS_EPILOG = """\b
Examples:
  lightbus topology artemis
  lightbus topology artemis --admin-role operators
  lightbus topology artemis billing.bus:app

\b
All steps, once for each broker:
  1. Add the output to <core> in broker.xml. Elements that exist there, such as <addresses>, get the new children.
  2. Restart the broker.
Then, for each app:
  3. Add its user to artemis-users.properties.
  4. lightbus topology permissions billing.bus:app --format artemis
When the bindings of an existing queue change:
  5. lightbus topology artemis billing.bus:app, and add the output to <addresses>.

\b
Exit codes:
  0  success; no broker is used
  2  the command line is invalid
"""


class ShowsByDefault(click.Group):
    """`lightbus topology billing.bus:app` means `lightbus topology show billing.bus:app`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in ctx.help_option_names and not self._means_a_command(args[0]):
            args = ["show", *args]
        return super().parse_args(ctx, args)

    def _means_a_command(self, name: str) -> bool:
        """True for a misspelt command, too, so that the error is about the command and not about a module."""
        from lightbus import errors

        return name in self.commands or (
            ":" not in name and errors.nearest(name, self.commands, cutoff=0.8) is not None
        )


@click.group(cls=ShowsByDefault, short_help="Exchanges, queues, bindings: as a table or a picture.", epilog=EPILOG)
def topology() -> None:
    """Show the exchanges, queues and bindings of an app, as a table, JSON or a picture, and its permissions."""


# --- show -------------------------------------------------------------------------------------


@topology.command(short_help="Exchanges, queues, bindings: as a table or a picture.", epilog=SHOW_EPILOG)
@click.argument("target", metavar="MODULE:ATTR")
@click.option("--live", is_flag=True, help="Ask the broker, too: what exists, what waits, what differs.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json", "mermaid", "svg"]),
    default="table",
    show_default=True,
    help="A table; JSON; a Mermaid flowchart; an SVG picture (light or dark, as the reader prefers).",
)
@click.option("--json", "as_json", is_flag=True, help="Short for --format json.")
def show(target: str, live: bool, form: str, as_json: bool) -> None:
    """Show the exchanges, queues and bindings that each worker of an app declares, including its retry queues.

    The command uses no broker, unless --live is given, and never changes one. Bindings cannot be compared, because AMQP
    cannot list them. The queues of delayed events are not shown: they are declared when they are needed.
    """
    from lightbus.cli import logs, mermaid, picture
    from lightbus.cli import target as targets

    logs.configure("error")
    app = targets.load_app(target)
    states = _ask(app) if live else None
    match "json" if as_json else form:
        case "json":
            output.write(json.dumps(_described(app, states), indent=1))
        case "mermaid":
            output.write(mermaid.flowchart(app, states))
        case "svg":
            output.write(picture.draw(app, states, app.broker.masked if live else ""))
        case _:
            output.write("\n".join(_table(app, states, target)))


def _ask(app: Lightbus) -> States:
    from lightbus.inspection import states

    with states.connected(app, "topology") as connection:
        return states.states(connection, app)


def _described(app: Lightbus, states: States | None) -> dict[str, Any]:
    wanted = app.topology()
    exchanges = [
        {
            "name": one.name,
            "type": one.type,
            "internal": one.internal,
            "shared": one in wanted.shared,
            "arguments": one.arguments,
            **({} if states is None else {"live": _live(states.exchanges[one.name])}),
        }
        for one in (*wanted.shared, *wanted.exchanges)
    ]
    handlers = _handlers_by_queue(app)
    queues = [
        {
            "name": one.name,
            "arguments": one.arguments,
            "handlers": handlers.get(one.name, []),
            **({} if states is None else {"live": _live(states.queues[one.name], queue=True)}),
        }
        for one in wanted.queues
    ]
    bindings = [
        {"exchange": one.source, "key": one.key, "to": "queue" if one.to_queue else "exchange", "name": one.destination}
        for one in wanted.bindings
    ]
    return {"app": app.name, "exchanges": exchanges, "queues": queues, "bindings": bindings}


def _live(state: ObjectState, *, queue: bool = False) -> dict[str, Any]:
    counts = {"ready": state.ready, "consumers": state.consumers} if queue and state.exists else {}
    return {"exists": state.exists, "difference": state.difference or None, **counts}


def _handlers_by_queue(app: Lightbus) -> dict[str, list[str]]:
    """The names of the handlers of each consumed queue."""
    return {
        queue.name: [one.name for one in app.handlers.values() if one.queue == queue.suffix]
        for queue in app.consumed_queues()
    }


def _table(app: Lightbus, states: States | None, target: str) -> Iterator[str]:
    wanted = app.topology()
    everything = (*wanted.shared, *wanted.exchanges)
    rows = [[one.name, _kind(one), _exchange_purpose(app, one)] for one in everything]
    head = ["EXCHANGE", "TYPE", "PURPOSE"]
    if states is not None:
        head.insert(2, "EXISTS")
        for row, one in zip(rows, everything, strict=True):
            row.insert(2, _exists(states.exchanges[one.name]))
    yield from tables.table(head, rows)
    yield ""
    rows = [[one.name, _queue_purpose(app, one)] for one in wanted.queues]
    head = ["QUEUE", "PURPOSE"]
    if states is not None:
        head[1:1] = ["EXISTS", "READY", "CONSUMERS"]
        for row, queue in zip(rows, wanted.queues, strict=True):
            state = states.queues[queue.name]
            row[1:1] = [_exists(state), f"{state.ready:,}", str(state.consumers)]
    yield from tables.table(head, rows, right=() if states is None else (2, 3))
    yield ""
    bindings = [
        [one.source, one.key, f"{'queue' if one.to_queue else 'exchange'} {one.destination}"] for one in wanted.bindings
    ]
    yield from tables.table(["FROM EXCHANGE", "KEY", "TO"], bindings)
    if states is not None:
        yield ""
        yield from _verdict(states, target)


def _kind(exchange: Exchange) -> str:
    return f"{exchange.type}, internal" if exchange.internal else exchange.type


def _exchange_purpose(app: Lightbus, exchange: Exchange) -> str:
    from lightbus.wire.topology import BUS, internal_name

    match exchange.name:
        case name if name == BUS:
            return "events of all apps"
        case name if name == internal_name(app.name):
            return "retries and dead letters"
        case name:
            return f"events of {name}"


def _queue_purpose(app: Lightbus, queue: Queue) -> str:
    handlers = _handlers_by_queue(app)
    if queue.name in handlers:
        names = handlers[queue.name]
        return f"handled by {', '.join(names)}" if names else "no handler"
    milliseconds = queue.arguments.get("x-message-ttl")
    if milliseconds is None:
        return "dead letters"
    key = queue.arguments["x-dead-letter-routing-key"]
    return f"waits {milliseconds / 1000:g} s, then back ({key})"


def _exists(state: ObjectState) -> str:
    return "no" if not state.exists else "differs" if state.difference else "yes"


def _verdict(states: States, target: str) -> Iterator[str]:
    every = {**states.exchanges, **{f"{name} (queue)": state for name, state in states.queues.items()}}
    differ = [(name, state) for name, state in every.items() if state.difference]
    missing = [name for name, state in every.items() if not state.exists]
    for name, state in differ:
        yield f"{name}: {tables.printable(state.difference)}"
    if missing:
        yield f"Missing: {', '.join(missing)}. A worker declares them: lightbus worker {target}"
    if not differ and not missing:
        yield "All exchanges and queues exist as declared."
    yield f"AMQP cannot list bindings. To diagnose problems: lightbus doctor {target}"


# --- permissions ------------------------------------------------------------------------------


@topology.command(short_help="Print the minimal permissions of an app's broker user.", epilog=PERMISSIONS_EPILOG)
@click.argument("target", metavar="MODULE:ATTR")
@click.option("--user", help="The broker's user.  [default: the app's name]")
@click.option("--vhost", help="The virtual host.  [default: the one in the app's URL]")
@click.option(
    "--format",
    "form",
    type=click.Choice(["rabbitmqctl", "artemis"]),
    help="A command for RabbitMQ, or security-settings for the broker.xml of ActiveMQ Artemis.  [default: by the "
    "broker in the app's URL]",
)
@click.option("--admin-role", metavar="ROLE", help="With --format artemis: the administrators' role.  [default: amq]")
@click.option("--json", "as_json", is_flag=True, help="A JSON object: user, vhost, configure, write, read.")
def permissions(
    target: str, user: str | None, vhost: str | None, form: str | None, admin_role: str | None, as_json: bool
) -> None:
    """Print the rabbitmqctl command that gives an app's own broker user the minimal permissions.

    The user may configure, write and read the app's own exchanges and queues, and read the bus and the exchanges of
    apps that its handlers name with source=. It cannot publish as another app or to the bus directly, and it cannot
    read another app's queues. So the broker verifies the source of each event.

    The bus exchange, lightbus, must exist: start any app once as a user with permission to configure it.

    With --format artemis, it prints security-settings for the same. `lightbus topology artemis` prints what they need.
    """
    from lightbus.cli import logs
    from lightbus.cli import target as targets

    logs.configure("error")
    app = targets.load_app(target)
    form = form or app.broker.addresses[0].broker.permissions
    if form == "artemis" and (vhost is not None or as_json):
        raise click.UsageError("--vhost and --json are for RabbitMQ: omit them with --format artemis.")
    if form != "artemis" and admin_role is not None:
        raise click.UsageError("--admin-role is for ActiveMQ Artemis: add --format artemis.")
    if form == "artemis":
        from lightbus.transport.activemq import broker_xml

        queues = [one.name for one in app.consumed_queues()]
        role = broker_xml.ADMIN_ROLE if admin_role is None else admin_role
        output.write(broker_xml.permissions(app.name, queues, user=user, admin_role=role).rstrip())
        return
    user = app.name if user is None else user
    vhost = app.broker.addresses[0].vhost if vhost is None else vhost
    configure, write, read = rules(app)
    if as_json:
        output.write(json.dumps({"user": user, "vhost": vhost, "configure": configure, "write": write, "read": read}))
    else:
        output.write(shlex.join(["rabbitmqctl", "set_permissions", "--vhost", vhost, user, configure, write, read]))
    if others := sources(app):
        click.echo(
            f"Note: a user who may read the exchange of {', '.join(others)} (for source=) may also remove its binding "
            "to the bus. If the apps do not trust each other, omit source= and check Message.source.",
            err=True,
        )


def rules(app: Lightbus) -> tuple[str, str, str]:
    """The regular expressions for configure, write and read."""
    from lightbus.wire.topology import BUS

    own, bus = rf"{app.name}(\..+)?", rf"{BUS}(\.catalog)?"
    return rf"^{own}$", rf"^({own}|{bus})$", rf"^({'|'.join([own, bus, *sources(app)])})$"


def sources(app: Lightbus) -> list[str]:
    """The other apps that handlers name with source=."""
    return sorted({one.source for one in app.handlers.values() if one.source} - {app.name})


# --- artemis ----------------------------------------------------------------------------------


@topology.command(short_help="Print what Lightbus needs in the broker.xml of ActiveMQ Artemis.", epilog=ARTEMIS_EPILOG)
@click.argument("target", metavar="[MODULE:ATTR]", required=False)
@click.option("--admin-role", metavar="ROLE", default="amq", show_default=True, help="The administrators' role.")
def artemis(target: str | None, admin_role: str) -> None:
    """Print what Lightbus needs in the broker.xml of ActiveMQ Artemis, for all apps.

    These are addresses, diverts (which verify the source of each event), settings of addresses, and the rights that all
    apps have. `lightbus topology permissions MODULE:ATTR --format artemis` prints those of one app.

    With MODULE:ATTR, it prints the app's queues with their bindings instead. A worker creates them, so they are needed
    only to change the bindings of an existing queue.
    """
    from lightbus.cli import logs
    from lightbus.cli import target as targets
    from lightbus.transport.activemq import broker_xml, selector

    if target is None:
        output.write(broker_xml.administrator(admin_role).rstrip())
        return
    logs.configure("error")
    app = targets.load_app(target)
    try:
        selectors = {
            queue.name: selector.selector(selector.clause(exchange, pattern) for exchange, pattern in queue.patterns)
            for queue in app.consumed_queues()
        }
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    output.write(broker_xml.queues(selectors).rstrip())
