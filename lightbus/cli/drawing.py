"""What the SVG pictures of commands are drawn with. They adapt to the reader's light or dark color scheme."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape as escape_html

from lightbus.cli import tables

CHARACTER = 7.4
"""Maximum width of a character of the common monospaced fonts at 12 px, in pixels."""
LONGEST = 44
"""Maximum number of characters of a name. A longer one is cut in the middle; the tooltip has the whole name."""
MARGIN, ROW, BOX, GAP = 24, 24, 44, 16

STYLE = """\
svg { --back: #ffffff; --text: #1f2328; --faint: #59636e; --line: #818b98; --box: #f6f8fa; --bad: #cf222e;
  --c0: #0969da; --c1: #8250df; --c2: #1a7f37; --c3: #9a6700; }
@media (prefers-color-scheme: dark) {
  svg { --back: #0d1117; --text: #e6edf3; --faint: #9198a1; --line: #656c76; --box: #161b22; --bad: #ff7b72;
    --c0: #58a6ff; --c1: #bc8cff; --c2: #3fb950; --c3: #d29922; } }
.back { fill: var(--back); }
text { font: 12px ui-monospace, Menlo, "DejaVu Sans Mono", Consolas, monospace; fill: var(--text); }
.name { font-weight: bold; }
.faint { fill: var(--faint); }
.bad { fill: var(--bad); }
rect.exchange, rect.queue, rect.handler { fill: var(--box); stroke: var(--line); stroke-width: 1.5; }
rect.queue { stroke-width: 2.5; }
rect.handler { stroke-dasharray: 4 3; }
rect.wrong { stroke: var(--bad); }
path { fill: none; stroke: var(--line); stroke-width: 1.5; }
path.again { stroke-dasharray: 5 4; }
path.tip { fill: var(--line); stroke: none; }
path.line.c0 { stroke: var(--c0); } path.line.c1 { stroke: var(--c1); }
path.line.c2 { stroke: var(--c2); } path.line.c3 { stroke: var(--c3); }
path.tip.c0 { fill: var(--c0); } path.tip.c1 { fill: var(--c1); }
path.tip.c2 { fill: var(--c2); } path.tip.c3 { fill: var(--c3); }"""


class Canvas:
    """The parts of a picture, in the order in which they are drawn."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def svg(self, title: str, width: int, height: int, style: str = STYLE) -> str:
        """The picture, as an element that a page can contain, too."""
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
                f'height="{height}" role="img">',
                f"<title>{escaped(title)}</title>",
                f"<style>\n{style}\n</style>",
                f'<rect class="back" width="{width}" height="{height}" rx="8"/>',
                *self.parts,
                "</svg>",
            ]
        )

    def rectangle(
        self, kind: str, x: int, y: int, width: int, height: int, wrong: bool = False, radius: int = 4
    ) -> None:
        kind = f"{kind} wrong" if wrong else kind
        self.parts.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}"/>')

    def text(self, x: int, y: int, text: str, kind: str = "", *, anchor: str = "", whole: bool = False) -> None:
        shown = text if whole or len(text) <= LONGEST else f"{text[: LONGEST // 2]}…{text[1 - LONGEST // 2 :]}"
        more = f"<title>{escaped(text)}</title>" if shown != text else ""
        attributes = (f' class="{kind}"' if kind else "") + (f' text-anchor="{anchor}"' if anchor else "")
        self.parts.append(f'<text{attributes} x="{x}" y="{y}">{escaped(shown)}{more}</text>')

    def line(self, points: Sequence[tuple[int, int]], kind: str = "") -> None:
        """A line that ends with an arrow to the right or to the left."""
        way = " L".join(f"{x} {y}" for x, y in points)
        (before, _), (x, y) = points[-2:]
        back = -8 if x > before else 8
        self.parts.append(f'<path class="line {kind}" d="M{way}"/>')
        self.parts.append(f'<path class="tip {kind}" d="M{x} {y} l{back} -4 v8 z"/>')


def width_of(texts: Sequence[str], least: int = 0) -> int:
    """The width of the longest text in pixels, as it is shown."""
    return max([least, *(round(min(len(text), LONGEST) * CHARACTER) for text in texts)])


def escaped(text: str) -> str:
    """A text in XML, without control characters."""
    return escape_html(tables.printable(text), quote=False)
