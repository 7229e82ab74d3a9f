"""A management command that runs a command of `lightbus`, with its options."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser
from typing import Any

import click
from django.core.management.base import BaseCommand, CommandError

from lightbus.cli import main
from lightbus.django.target import TARGET, VARIABLE, name_of_app


class Forward(BaseCommand):
    """Runs `subcommand` of `lightbus` for the app of the setting LIGHTBUS_APP."""

    subcommand = ""

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--app", metavar="MODULE:ATTR", help=f"The app. Default: the setting {VARIABLE}.")
        for option in self._options():
            add_option(parser, option)

    def _options(self) -> list[click.Option]:
        command = main.get_command(click.Context(main), self.subcommand)
        assert command is not None
        return [one for one in command.params if isinstance(one, click.Option) and not one.hidden]

    def handle(self, *_: Any, **options: Any) -> None:
        name = options["app"] or name_of_app()
        if not name:
            raise CommandError(
                f'Which app? Set {VARIABLE} = "shop.bus:app" in the settings, or pass --app shop.bus:app.'
            )
        target = name
        if options.get("reload") or int(options.get("processes") or 1) > 1:
            # Other processes, which have to set up Django, from where manage.py is.
            target, os.environ[VARIABLE] = TARGET, name
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [sys.path[0], os.environ.get("PYTHONPATH")]))
        main([self.subcommand, target, *self._arguments(options)], prog_name="lightbus")

    def _arguments(self, options: dict[str, Any]) -> list[str]:
        found: list[str] = []
        for option in self._options():
            value = options.get(option.name or "")
            if value is True:
                found.append(option.opts[0])
            elif value is not None and value is not False:
                values: list[Any] = value if option.multiple else [value]
                found += [f"{option.opts[0]}={one}" for one in values]
        return found


def add_option(parser: ArgumentParser, option: click.Option) -> None:
    """An option of click, for argparse. Its value is checked by click."""
    text = option.help or ""
    default = option.to_info_dict()["default"]
    if option.show_default and default is not None:
        text = f"{text} Default: {default}.".strip()
    named: dict[str, Any] = {"dest": option.name, "default": None, "help": text.replace("%", "%%")}
    if option.is_flag:
        named["action"] = "store_true"
    else:
        choices = getattr(option.type, "choices", None)
        named["metavar"] = option.metavar or ("{" + ",".join(choices) + "}" if choices else None)
        named["action"] = "append" if option.multiple else "store"
    parser.add_argument(*option.opts, **named)
