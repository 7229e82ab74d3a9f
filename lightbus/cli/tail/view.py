"""Takes events from the tail, and writes those that match."""

from __future__ import annotations

import contextlib
import os
import select
import stat
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from lightbus.cli import output, tables

if TYPE_CHECKING:
    from lightbus.cli.tail.conditions import Condition
    from lightbus.cli.tail.formats import Format
    from lightbus.message import Message
    from lightbus.tail import Tail, Taken

CHECK_INTERVAL = 0.25
"""Seconds between two checks whether the reader of stdout has exited."""


class View:
    """Takes events and writes those that match, until a limit is reached or the reader of stdout has exited."""

    def __init__(
        self,
        events: Tail,
        form: Format,
        filters: Sequence[Condition],
        limit: int | None,
        deadline: float | None,
    ) -> None:
        self.events = events
        self.form = form
        self.filters = filters
        self.limit = limit
        self.deadline = deadline
        self.seen = 0
        self.shown = 0
        self.dropped = 0
        self.unread = False
        """The reader of stdout has exited."""

    def run(self) -> None:
        while self.limit is None or self.shown < self.limit:
            left = CHECK_INTERVAL if self.deadline is None else min(CHECK_INTERVAL, self.deadline - time.monotonic())
            if left <= 0:
                return
            taken = self.events.take(left)
            if _has_no_reader() if taken is None else not self._show(taken):
                self.unread = True
                return

    def _show(self, taken: Taken) -> bool:
        """Returns False if the reader of stdout has exited."""
        from lightbus import errors
        from lightbus.wire import codec
        from lightbus.wire.topology import BUS

        self.seen += 1
        self.dropped += taken.dropped
        if taken.dropped:
            click.echo(
                f"... {taken.dropped:,} events were dropped: they arrived faster than they could be shown.", err=True
            )
        if taken.overrun:
            click.echo(
                "... some events may be missing: the queue was full, because this program was stopped or too slow.",
                err=True,
            )
        try:
            message = codec.read_message(BUS, taken.delivery)
        except errors.DecodeError as error:
            name = tables.printable(taken.delivery.routing_key)
            click.echo(f"... {name}: cannot be shown: {tables.printable(str(error))}", err=True)
            return True
        if self.filters and not self._matches(message):
            return True
        self.shown += 1  # counted first: an interruption may come directly after the write
        return output.write("\n".join(self.form.lines(message, taken)))

    def _matches(self, message: Message) -> bool:
        import msgspec

        try:
            payload = msgspec.json.decode(message.body)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return False
        return all(one.matches(payload) for one in self.filters)

    def summary(self) -> str:
        enough = self.limit is not None and self.shown >= self.limit  # the rest was not requested
        dropped = self.dropped + (0 if enough else self.events.left())
        text = f"{self.shown:,} shown"
        if self.seen > self.shown:
            text += f" of {self.seen:,} that passed"
        return f"{text}, {dropped:,} dropped." if dropped else f"{text}."


def _has_no_reader() -> bool:
    """Whether stdout is a pipe whose reader has exited, as with `| head -1`."""
    with contextlib.suppress(OSError, ValueError):
        descriptor = sys.stdout.fileno()
        if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            poll = select.poll()
            poll.register(descriptor, 0)
            return any(event & select.POLLERR for _, event in poll.poll(0))
    return False
