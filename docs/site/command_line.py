"""The page on the command line, from the commands themselves: what `--help` says, as Markdown."""

from __future__ import annotations

import html
import inspect
import re
from collections.abc import Iterator

import click

KEPT = "\b\n"
"""click's mark before a paragraph whose lines stay as they are."""


def sections(command: click.Command, context: click.Context) -> Iterator[str]:
    """Blocks of Markdown about a command, and about each command of its group."""
    yield f"## {context.command_path}"
    yield block(" ".join([context.command_path, *command.collect_usage_pieces(context)]))
    yield from paragraphs(command.help or "")
    records = [record for one in command.get_params(context) if (record := one.get_help_record(context))]
    if rows := [f"| {code(names)} | {escaped(words)} |" for names, words in records if words and "--help" not in names]:
        yield "\n".join(["| option | |", "|---|---|", *rows])
    yield from paragraphs(command.epilog or "")
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            if inner is not None and not inner.hidden:
                yield from sections(inner, click.Context(inner, info_name=name, parent=context))


def paragraphs(text: str) -> Iterator[str]:
    """A help text's paragraphs; those that click does not wrap are blocks of text, one for all that are neighbours."""
    kept: list[str] = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        if paragraph.startswith(KEPT):
            kept.append(paragraph.removeprefix(KEPT))
            continue
        if kept:
            yield block("\n\n".join(kept))
            kept.clear()
        if paragraph:
            yield escaped(paragraph)
    if kept:
        yield block("\n\n".join(kept))


def block(text: str) -> str:
    return f"```text\n{text}\n```"


def escaped(text: str) -> str:
    """The text as Markdown, in which `code` is markup and nothing else is."""
    parts = re.split(r"(`[^`\n]+`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([\\*_|<\[\]#])", r"\\\1", part) for part in parts)


def code(text: str) -> str:
    """As HTML: a `|` would end a table's cell, in Markdown's code too."""
    return f"<code class='literal'>{html.escape(text).replace('|', '&#124;')}</code>"
