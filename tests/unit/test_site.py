"""The site that `make docs` builds: without a warning, whole, and without anything from elsewhere."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import attrs
import click
import pytest

import lightbus
from lightbus import errors, testing
from lightbus.cli import main

ROOT = Path(__file__).parents[2]


@attrs.define
class Page(HTMLParser):
    """What a page has that others may point to, and what it points to itself."""

    path: Path
    ids: set[str] = attrs.field(factory=set)
    links: list[str] = attrs.field(factory=list)
    loaded: list[str] = attrs.field(factory=list)

    def __attrs_post_init__(self) -> None:
        super().__init__()
        self.feed(self.path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        has = {name: value for name, value in attributes if value}
        self.ids.update(has[name] for name in ("id", "name") if name in has)
        if "src" in has or (tag == "link" and "href" in has):
            self.loaded.append(has.get("src") or has["href"])
        elif tag == "a" and "href" in has:
            self.links.append(has["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `make docs` builds it, elsewhere."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "--builder", "html", "--fail-on-warning", "--keep-going", "--quiet"]
    done = subprocess.run([*command, ROOT / "docs", folder], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


def test_each_page_of_the_documentation_is_a_page_of_the_site(pages: dict[Path, Page], site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        if "examples" not in page.parts:
            assert site / page.relative_to(ROOT / "docs").with_suffix(".html") in pages


def test_links_lead_somewhere(pages: dict[Path, Page]) -> None:
    for page in pages.values():
        for link in page.links + page.loaded:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path
            assert target.exists(), f"{page.path.name} links to {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].ids, f"{page.path.name} links to {link}"


def test_nothing_is_loaded_from_elsewhere(pages: dict[Path, Page], site: Path) -> None:
    for page in pages.values():
        for link in page.loaded:
            assert urlsplit(link).scheme in ("", "data"), f"{page.path.name} loads {link}"
    for style in site.rglob("*.css"):
        assert "url(http" not in style.read_text().replace('"', "").replace("'", "")


def test_each_drawing_is_as_its_program_draws_it_and_each_picture_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "site"))
    pictures = importlib.import_module("pictures")
    text = "".join(page.read_text() for page in (ROOT / "docs").rglob("*.md"))
    for name, draw in pictures.PICTURES.items():
        assert (pictures.FOLDER / f"{name}.svg").read_text() == draw(), "make pictures"
    for path in pictures.FOLDER.glob("*.svg"):
        assert f"pictures/{path.name})" in text


def test_a_recording_is_the_terminals_last_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "site"))
    screen = importlib.import_module("recordings").Screen(columns=10)
    screen.write("first\r\nold\r\n\x1b[1A\x1b[J\x1b[32mnew <1>\x1b[0m  end\r\n")
    shown = "".join("".join(character for character, _ in row) + "\n" for row in screen.rows)
    assert shown == "first\nnew <1>  e\nnd\n\n"
    drawn = screen.svg("a title")
    assert 'fill="#56d364">new &lt;1&gt;</tspan>' in drawn
    assert "old" not in drawn


def test_the_reference_has_every_public_name(pages: dict[Path, Page], site: Path) -> None:
    ids = pages[site / "reference" / "lightbus.html"].ids
    assert {f"lightbus.{name}" for name in lightbus.__all__} - {"lightbus.errors"} <= ids
    for module, page in ((errors, "errors.html"), (testing, "testing.html")):
        classes = [one for _, one in inspect.getmembers(module, inspect.isclass)]
        own = [one for one in classes if f"{one.__module__}.".startswith(f"{module.__name__}.")]
        public = {f"{module.__name__}.{one.__name__}" for one in own if not one.__name__.startswith("_")}
        assert public
        assert public <= pages[site / "reference" / page].ids


def test_the_reference_has_every_command_and_option(pages: dict[Path, Page], site: Path) -> None:
    page = pages[site / "reference" / "cli.html"]
    text = page.path.read_text()

    def check(command: click.Command, context: click.Context) -> None:
        assert context.command_path.replace(" ", "-") in page.ids
        for option in command.params:
            if isinstance(option, click.Option) and not option.hidden:
                assert option.opts[-1] in text
        if isinstance(command, click.Group):
            for name in command.list_commands(context):
                inner = command.get_command(context, name)
                assert inner is not None
                check(inner, click.Context(inner, info_name=name, parent=context))

    check(main, click.Context(main, info_name="lightbus"))
