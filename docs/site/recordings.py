"""Terminal recordings for docs/pictures: `make pictures` runs commands in a terminal and draws its last screen."""

from __future__ import annotations

import contextlib
import html
import itertools
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from fcntl import ioctl
from pathlib import Path
from termios import TIOCSWINSZ

import attrs

EXAMPLES = Path(__file__).parents[1] / "examples"
PICTURES = EXAMPLES.parent / "pictures"
LIMIT = 120.0
"""Seconds for one recording."""

ESCAPE = re.compile(r"\x1b\[([\d;]*)([A-Za-z])")
# The sixteen colours of a terminal, readable on the background below.
COLORS = dict(
    zip(
        [*range(30, 38), *range(90, 98)],
        ["#8b949e", "#ff7b72", "#56d364", "#e3b341", "#79c0ff", "#d2a8ff", "#56d4dd", "#e6edf3"] * 2,
        strict=True,
    )
)
BACKGROUND, TEXT, PROMPT = "#161b22", "#d1d7e0", "#56d364"
SIZE, LINE, WIDE, MARGIN = 13, 19, 7.83, 16
"""Pixels: font size, line height, character width (0.602 of the size in common fixed-width fonts), and margin."""


@attrs.frozen
class Style:
    color: str = TEXT
    bold: bool = False

    def after(self, codes: str) -> Style:
        style = self
        for code in (int(code or 0) for code in codes.split(";")):
            if code == 0:
                style = Style()
            elif code == 1:
                style = attrs.evolve(style, bold=True)
            elif code == 2:
                style = attrs.evolve(style, color=COLORS[90])
            elif code == 22:
                style = attrs.evolve(style, bold=False)
            elif code == 39:
                style = attrs.evolve(style, color=TEXT)
            elif code in COLORS:
                style = attrs.evolve(style, color=COLORS[code])
        return style


class Screen:
    """The part of a terminal that our commands use: colours, and lines that are written again."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.rows: list[list[tuple[str, Style]]] = [[]]
        self.row, self.column = 0, 0
        self.style = Style()

    def write(self, text: str) -> None:
        position = 0
        for escape in ESCAPE.finditer(text):
            self._put(text[position : escape.start()])
            position = escape.end()
            self._apply(escape[1], escape[2])
        self._put(text[position:])

    def _apply(self, number: str, letter: str) -> None:
        match letter:
            case "m":
                self.style = self.style.after(number)
            case "A":
                self.row = max(0, self.row - int(number or 1))
            case "J":
                del self.rows[self.row + 1 :]
                del self.rows[self.row][self.column :]
            case "K":
                del self.rows[self.row][self.column :]

    def _put(self, text: str) -> None:
        for character in text:
            if character == "\r":
                self.column = 0
            elif character == "\n" or self.column == self.columns:
                self.row, self.column = self.row + 1, 0
            if self.row == len(self.rows):
                self.rows.append([])
            if character >= " ":
                row = self.rows[self.row]
                row[self.column :] = [*row[self.column : self.column], (character, self.style), *row[self.column + 1 :]]
                self.column += 1

    def svg(self, title: str) -> str:
        while self.rows and not self.rows[-1]:
            self.rows.pop()
        width, height = self.columns * WIDE + 2 * MARGIN, len(self.rows) * LINE + 2 * MARGIN
        size = f'viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" height="{height}"'
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size}',
            f'  role="img" aria-label="{html.escape(title)}" font-size="{SIZE}"',
            '  font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, DejaVu Sans Mono, monospace">',
            f'<rect width="100%" height="100%" rx="8" fill="{BACKGROUND}"/>',
        ]
        for number, row in enumerate(self.rows):
            spans = "".join(self._spans(row))
            if spans:
                lines.append(f'<text y="{MARGIN + number * LINE + SIZE + 1}">{spans}</text>')
        return "\n".join([*lines, "</svg>"]) + "\n"

    def _spans(self, row: Sequence[tuple[str, Style]]) -> Iterator[str]:
        # Text after two spaces gets its own position: browsers collapse spaces, and fonts differ in width.
        column = 0
        for style, cells in itertools.groupby(row, key=lambda cell: cell[1]):
            line = "".join(character for character, _ in cells)
            for part in re.finditer(r"\S+( \S+)*", line):
                place = f'x="{MARGIN + (column + part.start()) * WIDE:.1f}" textLength="{len(part[0]) * WIDE:.1f}"'
                weight = ' font-weight="bold"' if style.bold else ""
                yield f'<tspan {place} fill="{style.color}"{weight}>{html.escape(part[0], quote=False)}</tspan>'
            column += len(line)


def run(command: str, folder: Path, screen: Screen, *, when: str = "", then: Callable[[], object] = bool) -> None:
    """Run a command in a terminal until it ends. Call `then` once it has printed `when`."""
    screen.write(f"\x1b[32m$\x1b[39m {command}\r\n")
    output, terminal = pty.openpty()
    ioctl(terminal, TIOCSWINSZ, struct.pack("HHHH", 50, screen.columns, 0, 0))
    process = subprocess.Popen(
        ["sh", "-c", f"exec {command}"],
        cwd=folder,
        env=environment(folder),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    seen, until = b"", time.monotonic() + LIMIT
    with contextlib.suppress(OSError):  # the terminal's other end is closed: the command has ended
        while time.monotonic() < until:
            if select.select([output], [], [], 1)[0]:
                seen += os.read(output, 65536)
            if when and when.encode() in seen:
                then()
                when = ""
    os.close(output)
    if process.poll() is None:
        process.kill()
    process.wait()
    screen.write(seen.decode().replace(str(folder), "/home/me"))


def environment(folder: Path) -> dict[str, str]:
    """Environment variables with this folder as the home folder, which holds the embedded broker."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("NO_COLOR", "LIGHTBUS_", "XDG_"))}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return kept | {"PATH": path, "TERM": "xterm-256color", "HOME": str(folder)}


@contextlib.contextmanager
def worker(target: str, folder: Path) -> Iterator[Callable[[str], None]]:
    """Run a worker outside of the terminal. Yields a function that waits until the worker has logged a text."""
    command = ["lightbus", "worker", target]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=folder, env=environment(folder), text=True, **streams)
    assert process.stderr is not None

    def wait_for(text: str) -> None:
        if not any(text in line for line in process.stderr or ()):
            raise RuntimeError(f"{target} did not log {text!r}")

    try:
        wait_for("Ready")
        yield wait_for
    finally:
        process.terminate()
        process.communicate()


# --- what is recorded -------------------------------------------------------------------------


def demo(folder: Path, screen: Screen) -> None:
    run("lightbus demo", folder, screen)


def dead(folder: Path, screen: Screen) -> None:
    with worker("kitchen:app", folder) as wait_for:
        order(folder, "calzone", "margherita", "calzone")
        for _ in range(2):
            wait_for("dead-lettered")
    run("lightbus dead list kitchen:app", folder, screen)
    run("lightbus dead list kitchen:app --stats", folder, screen)
    run("lightbus dead retry kitchen:app --error KeyError --dry-run", folder, screen)


def tail(folder: Path, screen: Screen) -> None:
    run(
        "lightbus tail 'order.#' --limit 3",
        folder,
        screen,
        when="Listening",
        then=lambda: order(folder, "margherita", "calzone", "marinara"),
    )


def order(folder: Path, *dishes: str) -> None:
    command = ["python", "shop.py", *dishes]
    subprocess.run(command, cwd=folder, env=environment(folder), check=True, stdout=subprocess.DEVNULL)


RECORDINGS = {
    "terminal-demo": (demo, 110, "lightbus demo: three services handle 2,000 commits, and a table of the results"),
    "terminal-tail": (tail, 110, "lightbus tail: three live events with their payloads"),
    "terminal-dead": (dead, 110, "lightbus dead list, with and without --stats, and a dry run of lightbus dead retry"),
}


def topology(folder: Path) -> str:
    """The output of `lightbus topology --format svg`."""
    command = ["lightbus", "topology", "billing:app", "--format", "svg"]
    return subprocess.run(
        command, cwd=EXAMPLES, env=environment(folder), check=True, capture_output=True, text=True
    ).stdout


if __name__ == "__main__":
    texts = {}
    for name, (record, columns, title) in RECORDINGS.items():
        with tempfile.TemporaryDirectory() as temporary:
            shutil.copytree(EXAMPLES / "tutorial", temporary, dirs_exist_ok=True)
            screen = Screen(columns)
            record(Path(temporary), screen)
            texts[name] = screen.svg(title)
    texts["topology-billing"] = topology(EXAMPLES)
    for name, text in texts.items():
        path = PICTURES / f"{name}.svg"
        path.write_text(text)
        print(path)
