"""The `lightbus` command. Each command group is one file, imported on demand."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

import click

from lightbus import __version__

COMMANDS = {
    "worker": "lightbus.cli.worker:worker",
    "relay": "lightbus.cli.relay:relay",
    "publish": "lightbus.cli.publish:publish",
    "tail": "lightbus.cli.tail:tail",
    "events": "lightbus.cli.events:events",
    "schema": "lightbus.cli.schema:schema",
    "contract": "lightbus.cli.contract:contract",
    "check": "lightbus.cli.check:check",
    "catalog": "lightbus.cli.catalog:catalog",
    "who": "lightbus.cli.who:who",
    "web": "lightbus.cli.web:web",
    "dead": "lightbus.cli.dead:dead",
    "outbox": "lightbus.cli.outbox:outbox",
    "doctor": "lightbus.cli.doctor:doctor",
    "health": "lightbus.cli.health:health",
    "topology": "lightbus.cli.topology:topology",
    "unbind": "lightbus.cli.unbind:unbind",
    "demo": "lightbus.cli.demo:demo",
    "new": "lightbus.cli.new:new",
}
"""Where each command is defined. These files import only click at the top, and the rest in the command function."""

PRELOADED = {
    "worker": ("connection.thread", "consuming.dispatcher", "worker.process"),
    "relay": ("connection.thread", "worker.process"),
    "tail": ("connection.thread", "consuming.dispatcher", "tail"),
}
"""Modules that are imported before Ctrl-C raises KeyboardInterrupt. An import can lose that exception, and these
commands would keep running."""


def did_you_mean(given: str, known: Iterable[str], otherwise: str) -> str:
    """A hint about a name that does not exist.

    Args:
        otherwise: the hint if no known name is similar.
    """
    from lightbus import errors

    near = errors.nearest(given, known)
    return f"Did you mean {near!r}?" if near else otherwise


class Group(click.Group):
    """Suggests a command if the given one does not exist."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = self.list_commands(ctx)
        if args and args[0] not in known and not args[0].startswith("-"):
            hint = did_you_mean(args[0], known, otherwise=f"There are: {', '.join(known)}.")
            ctx.fail(f"No such command {args[0]!r}. {hint}")
        return super().resolve_command(ctx, args)


class Commands(Group):
    """Imports a command when it is needed, and shows errors of Lightbus in one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        found = super().resolve_command(ctx, args)
        if ctx.obj is not None and not ctx.resilient_parsing:
            if args[0] in PRELOADED:
                for module in PRELOADED[args[0]]:
                    importlib.import_module(f"lightbus.{module}")
            ctx.obj()  # from here on, Ctrl-C raises KeyboardInterrupt: see lightbus/__main__.py
        return found

    def invoke(self, ctx: click.Context) -> Any:
        from lightbus import errors
        from lightbus.cli import logs

        importlib.import_module("lightbus.app")  # every command needs it, and here Ctrl-C shows no traceback

        ctx.color = logs.color_setting()  # click uses this in all commands
        try:
            return super().invoke(ctx)
        except errors.LightbusError as error:
            logs.show_error(str(error))
            usage = (errors.TargetError, errors.DeclarationError, errors.UnknownEvent)
            ctx.exit(2 if isinstance(error, usage) else 1)
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(130)
        except click.Abort as error:  # raised by a question
            if not isinstance(error.__context__, KeyboardInterrupt):
                raise
            click.echo("\nInterrupted.", err=True)  # on a separate line, below the question
            ctx.exit(130)


@contextmanager
def asking(otherwise: str) -> Generator[None]:
    """Around a question: if stdin ends without an answer, as in a script, the error names the option that skips it."""
    try:
        yield
    except click.Abort as error:
        if not isinstance(error.__context__, EOFError) or sys.stdin.isatty():  # then it was Ctrl-C or Ctrl-D
            raise
        click.echo(err=True)  # below the question
        raise click.ClickException(f"stdin ended without an answer. To skip the question: {otherwise}") from error


@click.command(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 success; 1 failure; 2 the command line or MODULE:ATTR is invalid; 130 interrupted.",
)
@click.version_option(__version__, prog_name="lightbus", message="%(prog)s %(version)s")
def main() -> None:
    """Lightbus: an event bus for Python over AMQP.

    MODULE:ATTR names your app, as `billing.bus:app` does for `app = Lightbus("billing")` in billing/bus.py.
    It is imported from the current directory.

    The broker is the app's url=, or else LIGHTBUS_URL (amqp://user:password@host:5672/vhost), or else the embedded
    broker.
    """
