"""Reads the dead-letter queue, with its progress on stderr, and writes what was read to stdout."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from lightbus.cli import output

if TYPE_CHECKING:
    from lightbus import Lightbus
    from lightbus.dead_letters.actions import Outcome
    from lightbus.dead_letters.letter import DeadLetter
    from lightbus.dead_letters.queue import DeadQueue

NONE = "No dead letters (another `lightbus dead` command may hold some)."


@contextmanager
def opened(app: Lightbus, outcome: Outcome | None = None, done: str = "") -> Generator[DeadQueue]:
    """The app's dead-letter queue. On a terminal, its progress is shown if it takes more than a second.

    Args:
        outcome: the progress includes how many dead letters it counts as done.
        done: the verb for these: "retried" or "purged".
    """
    from lightbus.dead_letters import queue

    progress = _Progress(outcome, done)
    try:
        if sys.stderr.isatty():
            with queue.opened(app, on_read=progress.update) as found:
                yield found
        else:
            with queue.opened(app) as found:
                yield found
    finally:
        progress.erase()


class _Progress:
    """One line on stderr that is updated in place."""

    def __init__(self, outcome: Outcome | None, done: str) -> None:
        self.outcome = outcome
        self.done = done
        self.width = 0
        """Of the line that is shown now."""
        self.next_update = time.monotonic() + 1.0

    def update(self, queue: DeadQueue) -> None:
        if time.monotonic() < self.next_update:
            return
        self.next_update = time.monotonic() + 0.2
        line = f"{queue.seen:,} of {queue.count:,} read"
        if self.outcome is not None:
            line += f", {self.outcome.done:,} {self.done}"
        click.echo("\r" + line.ljust(self.width), nl=False, err=True)
        self.width = len(line)

    def erase(self) -> None:
        if self.width:
            click.echo("\r" + " " * self.width + "\r", nl=False, err=True)


def write(text: str, *, nl: bool = True) -> None:
    """Write to stdout. If its reader has exited, end the command: there may be many more dead letters."""
    if not output.write(text, nl=nl):
        raise click.exceptions.Exit(0)


def write_array(items: Iterator[str]) -> None:
    """Write a JSON array of any length, one item at a time. The items are JSON texts."""
    empty = True
    for item in items:
        write(("[\n " if empty else ",\n ") + item, nl=False)
        empty = False
    write("[]" if empty else "\n]")


def as_json(value: Any) -> str:
    return json.dumps(value, default=str)


def described(dead_letter: DeadLetter) -> dict[str, Any]:
    """The fields that `list --json` and `show --json` have in common."""
    return {
        "id": dead_letter.id,
        "event": dead_letter.event,
        "source": dead_letter.source,
        "source_proven": dead_letter.proven,
        "handler": dead_letter.handler,
        "queue": dead_letter.queue,
        "attempt": dead_letter.attempt,
        "error_type": dead_letter.error_type,
        "error_message": dead_letter.error_message,
        "by_broker": dead_letter.by_broker,
        "published": None if dead_letter.published is None else dead_letter.published.isoformat(),
        "died": None if dead_letter.died is None else dead_letter.died.isoformat(),
    }
