"""What the demo shows: its progress, and the table at the end."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import attrs
import click


class Screen:
    """Lines that are updated in place on a terminal. Elsewhere they are printed again, at most every 2 seconds."""

    def __init__(self, *, terminal: bool, color: bool | None) -> None:
        self.terminal = terminal
        self.color = color
        self._live: list[str] = []
        self._shown_at = 0.0
        self._shown: Sequence[str] = ()

    def write(self, text: str = "", **style: Any) -> None:
        """Write a line that stays."""
        self._erase()
        self._echo(text, **style)
        self._draw()

    def show(self, lines: Sequence[str], *, last: bool = False) -> None:
        """Show lines that the next call replaces, unless these are the last."""
        if self.terminal:
            self._erase()
            self._live = list(lines)
            self._draw()
        elif (last and lines != self._shown) or time.monotonic() > self._shown_at + 2:
            self._shown, self._shown_at = lines, time.monotonic()
            self._echo(" | ".join(lines))
        if last:
            self.keep()

    def keep(self) -> None:
        """Keep the current lines: the next call of `show` writes below them."""
        self._live = []

    def _erase(self) -> None:
        if self._live:
            click.echo(f"\x1b[{len(self._live)}A\x1b[J", nl=False)

    def _draw(self) -> None:
        width = shutil.get_terminal_size().columns - 1
        for line in self._live:
            self._echo(line[:width], fg="cyan")

    def _echo(self, text: str, **style: Any) -> None:
        click.secho(text, color=self.color, **style)
        sys.stdout.flush()


@attrs.frozen
class Row:
    """One line of the table at the end."""

    service: str
    what: str
    handled: int
    expected: int


def show_table(rows: Iterable[Row], screen: Screen) -> None:
    """Compare the columns, and mark the rows that differ."""
    screen.write(f"{'':9}{'':42}{'handled':>10}{'expected':>14}", bold=True)
    before = ""
    for row in rows:
        equal = row.handled == row.expected
        name = "" if row.service == before else row.service
        before = row.service
        mark = "" if equal else "  <- differs"
        screen.write(f"{name:9}{row.what:42}{row.handled:>10,}{row.expected:>14,}{mark}", fg=None if equal else "red")
