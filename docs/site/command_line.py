"""The command line reference: the help texts of all commands, as Markdown."""

from __future__ import annotations

import html
import inspect
import re
from collections.abc import Iterator

import click

KEPT = "\b\n"
"""click's mark before a paragraph that it does not wrap."""


def sections(command: click.Command, context: click.Context) -> Iterator[str]:
    """Markdown for a command and, if it is a group, for each of its commands."""
    yield f"## {context.command_path}"
    yield block(" ".join([context.command_path, *command.collect_usage_pieces(context)]))
    yield from paragraphs(command.help or "")
    records = [record for one in command.get_params(context) if (record := one.get_help_record(context))]
    if rows := [f"| {code(names)} | {escaped(text)} |" for names, text in records if text and "--help" not in names]:
        yield "\n".join(["| option | |", "|---|---|", *rows])
    yield from paragraphs(command.epilog or "")
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            if inner is not None and not inner.hidden:
                yield from sections(inner, click.Context(inner, info_name=name, parent=context))


def paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of a help text. Adjacent paragraphs that click does not wrap become one block."""
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
    """The text as Markdown. Only `code` is markup."""
    parts = re.split(r"(`[^`\n]+`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([\\*_|<\[\]#])", r"\\\1", part) for part in parts)


def code(text: str) -> str:
    """Code as HTML: in Markdown, a `|` would end the table cell, even in code."""
    return f"<code class='literal'>{html.escape(text).replace('|', '&#124;')}</code>"
