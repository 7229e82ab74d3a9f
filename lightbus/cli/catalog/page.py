"""A catalogue as one HTML page: without scripts, and without anything from elsewhere."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from lightbus.cli import tables
from lightbus.cli.catalog import overview, picture

if TYPE_CHECKING:
    from lightbus.cli.catalog.reading import Reading

STYLE = """\
:root { color-scheme: light dark; --ground: #ffffff; --ink: #1f2328; --soft: #59636e; --rule: #d1d9e0;
  --stripe: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #0d1117; --ink: #e6edf3; --soft: #9198a1; --rule: #3d444d; --stripe: #161b22; } }
body { margin: 0 auto; max-width: 1240px; padding: 1.5rem 1rem 4rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p.summary { color: var(--soft); margin: .25rem 0 0; overflow-wrap: anywhere; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
th, td { border-bottom: 1px solid var(--rule); padding: .4rem .9rem .4rem .4rem; text-align: left;
  vertical-align: top; }
tbody tr:nth-child(even) { background: var(--stripe); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td:first-child { font-family: ui-monospace, Menlo, "DejaVu Sans Mono", Consolas, monospace; font-size: .85rem; }
td:last-child { min-width: 9rem; }
ul { padding-left: 1.25rem; } li { overflow-wrap: anywhere; }
div.wide svg { display: block; }"""


def page(reading: Reading) -> str:
    """The page."""
    from lightbus.catalog.notices import notices

    live = reading.live is not None
    title = "Event catalogue"
    parts = [
        f"<h1>{title}</h1>",
        f'<p class="summary">{_text(overview.heading(reading))}</p>',
        "<h2>Apps</h2>",
        _table("Apps", *overview.app_rows(reading), numbers={2, 3, 4, 5, 6} if live else {2, 3}),
    ]
    if note := overview.unknown_note(reading):
        parts.append(f"<p>{_text(note)}</p>")
    parts += ["<h2>Events</h2>", _table("Events", *overview.event_rows(reading), numbers={1})]
    if found := notices(reading.catalog):
        items = "\n".join(f"<li>{_text(one.text)}</li>" for one in found)
        parts += ["<h2>To look at</h2>", f"<ul>\n{items}\n</ul>"]
    parts += ["<h2>Picture</h2>", f"{_wide('Picture')}\n{picture.draw(reading)}\n</div>"]
    body = "\n".join(parts)
    # No script can run and nothing is loaded, whatever another app's contract contains.
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return f"""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{STYLE}
</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>"""


def _table(name: str, head: list[str], rows: list[list[str]], numbers: set[int]) -> str:
    def cells(tag: str, row: list[str]) -> str:
        scope = ' scope="col"' if tag == "th" else ""
        return "".join(
            f"<{tag}{scope}{' class=' + chr(34) + 'number' + chr(34) if at in numbers else ''}>{_text(cell)}</{tag}>"
            for at, cell in enumerate(row)
        )

    names = [name.capitalize() for name in head]
    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f"{_wide(name)}\n<table>\n<thead><tr>{cells('th', names)}</tr></thead>\n<tbody>\n{body}\n"
        "</tbody>\n</table>\n</div>"
    )


def _wide(name: str) -> str:
    """The start of what can be scrolled sideways, also with the keyboard."""
    return f'<div class="wide" role="region" aria-label="{name}" tabindex="0">'


def _text(text: str) -> str:
    return escape(tables.printable(text))
