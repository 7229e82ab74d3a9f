"""The site that `make docs` builds: no warnings, no missing page, nothing from elsewhere, readable at any width."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import attrs
import click
import jinja2
import pytest

import lightbus
from lightbus import errors, outbox, testing
from lightbus.cli import main
from tests import browser

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
    for path in pictures.FOLDER.iterdir():
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
    assert {"lightbus.logs.current_fields", "lightbus.logs.JSONLines"} <= ids
    assert {f"lightbus.outbox.{name}" for name in outbox.__all__} <= pages[site / "reference" / "outbox.html"].ids
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


# --- the first page ---------------------------------------------------------------------------


def test_the_first_page_has_the_figures_of_the_last_runs(site: Path) -> None:
    data = json.loads((ROOT / "docs" / "performance" / "results.json").read_text())["cases"]["consume"]
    ours = [run["parts"][""]["rate"] for run in data["runs"] if run["label"] == "Lightbus"]
    of_events, _, _ = (ROOT / "docs" / "reliability.md").read_text().partition("<!-- written by `make faults`, outbox")
    table = re.findall(r"^\| [^|]+ \| *[\d,]+ *\| *([\d,]+) .*\| (\d+) +\| [^|]+\|$", of_events, re.MULTILINE)
    confirmed = sum(int(one.replace(",", "")) for one, _ in table)
    shown = re.sub(r"<[^>]+>", "", re.findall(r'<div class="figures">.*?</div>', (site / "index.html").read_text())[0])
    assert f"{statistics.median(ours):,.0f} events/s" in shown
    lost = sum(int(lost) for _, lost in table)
    assert f"{lost} lost of {confirmed:,} confirmed events, in {len(table)} fault tests" in shown


def test_the_readme_has_the_figures_of_the_last_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "site"))
    figures = importlib.import_module("figures")
    text = (ROOT / "README.md").read_text()
    faults = figures.faults()
    for figure in (
        f"{figures.median('cpu_us', 'Lightbus'):.1f} us",
        f"{figures.median('rate', 'Lightbus'):,.0f}",
        *(f"{figures.ratio('cpu_us', peer):.1f} times as much" for peer in ("FastStream", "Celery")),
        f"{figures.median('rate', 'FastStream'):,.0f} (1/{figures.ratio('rate', 'FastStream'):.0f})",
        f"{figures.median('rate', 'Celery, solo'):,.0f} (1/{figures.ratio('rate', 'Celery'):.0f})",
        f"In {faults.scenarios} fault scenarios, ",
        f"{faults.lost} of {faults.confirmed:,} confirmed events were lost",
    ):
        assert figure in text, f"README.md does not have {figure!r}"
    rows = {tuple(row) for row in cells((ROOT / "docs" / "reliability.md").read_text())}
    head = (
        "fault",
        "times",
        "confirmed",
        "handled",
        "dead",
        "queued",
        "failed publishes",
        "duplicates",
        "lost",
        "recovery",
    )
    assert head in rows
    measured = {(row[0], row[1], row[2], row[8]) for row in rows if len(row) == len(head)}
    _, _, excerpt = text.partition("| fault |")
    shown = [tuple(row) for row in cells("| fault |" + excerpt.partition("\n\n")[0])][2:]
    assert len(shown) == 5
    assert set(shown) <= measured


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in re.findall(r"^\|.*\|$", text, re.MULTILINE)]


def test_the_repository_is_linked_if_its_address_is_configured(pages: dict[Path, Page], site: Path) -> None:
    template = jinja2.Template((ROOT / "docs" / "site" / "templates" / "repository.html").read_text())
    assert 'href="https://git.example/lightbus"' in template.render(repository="https://git.example/lightbus")
    assert not template.render(repository="")
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {})
    assert (urls.get("Repository") in pages[site / "index.html"].links) == ("Repository" in urls)


# --- in a browser -----------------------------------------------------------------------------

CUT_OFF = (ROOT / "tests" / "unit" / "cut_off.js").read_text()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    program = browser.find()
    if program is None:
        pytest.skip(f"THE LAYOUT OF THE SITE IS NOT TESTED. {browser.INSTALL}")
    with browser.start(program, tmp_path_factory.mktemp("chromium")) as started:
        yield started


def test_nothing_is_cut_off_on_a_telephone_or_a_wide_screen(
    pages: dict[Path, Page], site: Path, chromium: browser.Browser
) -> None:
    found = {}
    for path in pages:
        chromium.open(path)
        for width in (360, 1600):
            chromium.resize(width)
            if cut_off := chromium.evaluate(CUT_OFF):
                found[f"{path.relative_to(site)} at {width} px"] = cut_off
    assert not found, json.dumps(found, indent=1)


def test_the_first_page_fits_at_each_width(site: Path, chromium: browser.Browser) -> None:
    chromium.open(site / "index.html")
    for width in range(360, 1601, 20):
        chromium.resize(width)
        assert not chromium.evaluate(CUT_OFF), f"{width} px"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_and_the_logo_fits_the_scheme(scheme: str, site: Path, chromium: browser.Browser) -> None:
    chromium.prefer(scheme)
    chromium.open(site / "index.html")
    chromium.resize(1280)
    shown = "[...document.querySelectorAll('.sidebar-logo')].filter((one) => one.offsetWidth).map((one) => one.src)"
    (logo,) = chromium.evaluate(shown)
    assert logo.endswith(f"logo-{scheme}.svg")
    for element in ("article p", "pre", ".figures strong", ".figures span", ".sidebar-tree a"):
        assert chromium.evaluate(CONTRAST % element) >= 4.5, element


CONTRAST = """(() => {
  const one = document.querySelector('%s');
  const parts = (color) => color.match(/[\\d.]+/g).map(Number);
  let behind = one;
  while (behind && (parts(getComputedStyle(behind).backgroundColor)[3] ?? 1) === 0) behind = behind.parentElement;
  const luminance = (color) => {
    const [r, g, b] = parts(color).map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const [dark, light] = [getComputedStyle(one).color, getComputedStyle(behind ?? document.body).backgroundColor]
    .map(luminance).sort((a, b) => a - b);
  return (light + 0.05) / (dark + 0.05);
})()"""
"""The ratio of WCAG 2; 4.5 is what its level AA requires of text."""


def test_a_copy_button_takes_commands_without_prompt_and_output(site: Path, chromium: browser.Browser) -> None:
    chromium.open(site / "howto" / "install.html")
    assert chromium.evaluate(COPIED) == [
        "python3 -m venv .venv\n. .venv/bin/activate\npip install ~/lightbus\nlightbus --version"
    ]


COPIED = """(() => {
  const copied = [];
  document.execCommand = () => copied.push(document.activeElement.value);
  document.querySelector('.highlight-console .copybtn').click();
  return copied;
})()"""
