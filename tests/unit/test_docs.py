"""The documentation matches the code: code blocks are files that run, links are valid, lists are complete."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import sys
import tempfile
import textwrap
import traceback
from pathlib import Path
from types import CodeType, FrameType
from typing import Any
from unittest import mock

import anyio
import pytest

import lightbus
from lightbus import Lightbus
from lightbus.cli import COMMANDS
from lightbus.wire import codec
from tests.patience import LIMIT

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "docs" / "examples").rglob("*.py"))
PROJECTS = {
    "cron",
    "dependencies",
    "django",
    "fastapi",
    "flask",
    "larger",
    "logs",
    "node",
    "outbox",
    "script",
    "shell",
    "testing",
    "traces",
}
"""Folders of docs/examples that tests/integrations runs as complete projects, with their frameworks."""
PACKAGE = str(Path(lightbus.__file__).parent)

BLOCK = re.compile(
    r"^(?:<!-- (?P<file>\S+) -->\n)?```(?P<language>[\w{}-]*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


NOT_CODE = {"", "text", "console", "{toctree}", "{eval-rst}", "{include}"}
"""Blocks of these languages need no file. tests/integration/test_commands_shown.py tests `console` blocks."""


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_each_code_block_is_an_example_file_or_lines_of_one_or_a_fragment(page: Path) -> None:
    for block in BLOCK.finditer(page.read_text()):
        if block["file"] == "fragment":
            if block["language"] == "python":
                compile(block["code"], name_of(page), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            continue
        if block["language"] in NOT_CODE and not block["file"]:
            continue
        assert block["file"], f"{name_of(page)}: no <!-- docs/examples/... --> before the block:\n{block['code']}"
        source = (ROOT / block["file"]).read_text()
        assert block["code"] in (source, *excerpts(source, block["code"])), (
            f"{name_of(page)}: differs from {block['file']}"
        )


def excerpts(source: str, code: str) -> list[str]:
    """All sequences of whole lines of a file with the length of `code`, without their indentation."""
    lines = source.splitlines(keepends=True)
    size = code.count("\n")
    return [textwrap.dedent("".join(lines[start : start + size])) for start in range(len(lines))]


def test_readme_shows_the_complete_examples() -> None:
    readme = (ROOT / "README.md").read_text()
    for name in ("hello.py", "auth.py", "welcome.py", "billing.py"):
        assert (ROOT / "docs" / "examples" / name).read_text() in readme


def project_of(path: Path) -> str:
    """The folder of docs/examples that a file is in, or the file's own name."""
    return path.relative_to(ROOT / "docs" / "examples").parts[0]


def test_each_project_is_run_by_a_test_and_shown_completely_on_a_page() -> None:
    tests = "".join(path.read_text() for path in (ROOT / "tests" / "integrations").glob("*.py"))
    pages = "".join(path.read_text() for path in (ROOT / "docs" / "howto").glob("*.md"))
    for project in PROJECTS:
        assert f'example("{project}")' in tests
        for file in (ROOT / "docs" / "examples" / project).rglob("*"):
            if file.suffix in (".py", ".js", ".sh") and "migrations" not in file.parts and file.stat().st_size:
                assert file.read_text() in pages, f"{name_of(file)} is shown on no page of docs/howto"


@pytest.mark.parametrize("path", [path for path in EXAMPLES if project_of(path) not in PROJECTS], ids=name_of)
def test_each_example_can_be_imported(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if path.name == "foreign.py" or path.name.startswith("before_"):  # their dependencies are not installed for tests
        compile(path.read_text(), path, "exec")
        return
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with mock.patch.dict(os.environ):  # gunicorn's configuration sets a variable
        spec.loader.exec_module(module)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_are_valid(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", without_code(page.read_text())):
        if "://" not in target:
            file = page.parent / target if target else page
            assert file.exists(), f"{name_of(page)} links to {target}"
            assert not anchor or anchor in anchors(file), f"{name_of(page)} links to {target}#{anchor}"


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]+`", "", BLOCK.sub("", text))


def anchors(page: Path) -> set[str]:
    """The anchors of its headings, as GitHub generates them."""
    titles = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_on_a_page_exist(page: Path) -> None:
    text = page.read_text()
    for command in re.findall(r"(?:^\$ |`)lightbus ([a-z]+)", text, re.MULTILINE):
        assert command in COMMANDS, f"{name_of(page)} names `lightbus {command}`"
    makefiles = [ROOT / "Makefile"]
    if page.name == "new-service.md":  # also the targets of the created service
        makefiles += (ROOT / "cookiecutter").glob("*/Makefile")
    targets = {found for one in makefiles for found in re.findall(r"^([a-z]+):", one.read_text(), re.MULTILINE)}
    for target in re.findall(r"(?:^\$ |`)make ([a-z]+)", text, re.MULTILINE):
        assert target in targets, f"{name_of(page)} names `make {target}`"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_command_quotes_the_home_folder(page: Path) -> None:
    """Neither a shell nor pip expands `~` within quotes."""
    assert not re.findall(r"""^\$ .*["']~/""", page.read_text(), re.MULTILINE)


def test_the_architecture_page_lists_every_module() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    for module in Path(PACKAGE).rglob("*.py"):
        shown = module.relative_to(PACKAGE)
        if shown.parts[0] not in ("cli", "__main__.py") and shown.name != "__init__.py":
            assert f"`{shown}`" in page, f"{shown} is missing in docs/architecture.md"


def test_the_wire_format_page_lists_every_header() -> None:
    page = (ROOT / "docs" / "wire.md").read_text().replace("`-", "`lightbus-error-")
    for header in (
        codec.VERSION,
        codec.CAUSATION,
        codec.ATTEMPT,
        codec.HANDLER,
        codec.SOURCE,
        codec.ROUTING_KEY,
        codec.QUEUE,
        codec.ERROR_TYPE,
        codec.ERROR_MESSAGE,
        codec.ERROR_TRACEBACK,
        codec.ERROR_TIME,
    ):
        assert f"`{header}`" in page


def test_the_architecture_page_lists_the_calls_from_arrival_to_handler() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    documented = re.findall(r"^\d\. `([\w.]+)\(", page, re.MULTILINE)
    assert documented == calls_to_the_users_function()
    assert len(documented) <= 6


def calls_to_the_users_function() -> list[str]:
    """The calls of Lightbus from the arrival of a delivery to the handler, in order.

    It has arrived when the connection has read it and put it where the consumer finds it. Calls that return on the
    way are left out (each is a detail of its caller), except for the one that fills the function's parameters.
    """
    app = Lightbus("traced", url="memory://traced-by-a-test")

    @app.event
    class Counted:
        number: int

    calls: list[CodeType] = []
    stack: list[CodeType] = []
    received: dict[int, anyio.Event] = {}
    handing_over: list[str] = []

    @app.on("counted")
    async def handle(counted: Counted) -> None:
        if counted.number == 2:
            sys.setprofile(None)
            frame: FrameType | None = sys._getframe()
            while frame is not None:
                stack.append(frame.f_code)
                frame = frame.f_back
        received[counted.number].set()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            if frame.f_code.co_qualname == "QueueRunner.receive":
                calls.clear()
            calls.append(frame.f_code)

    async def main() -> None:
        received.update({1: anyio.Event(), 2: anyio.Event()})
        consumer = app.consumer()
        async with app, anyio.create_task_group() as tasks:
            await tasks.start(consumer.run)
            (queue_consumer,) = consumer.consumers
            hand_over_unseen = queue_consumer.hand_over

            def hand_over(batch: Any) -> None:
                codes = [frame.f_code for frame, _ in traceback.walk_stack(sys._getframe(1))]
                ours = [code.co_qualname for code in codes if code.co_filename.startswith(PACKAGE)]
                # What is left is the thread itself, which also calls `drain_events`: where the delivery arrives.
                handing_over[:] = reversed(ours[: ours.index("ConnectionThread._work_on")])
                hand_over_unseen(batch)

            queue_consumer.hand_over = hand_over
            await app.publish(Counted(number=1))  # what happens once (a route is looked up) is not what is counted
            await received[1].wait()
            sys.setprofile(note)
            with anyio.fail_after(LIMIT):
                await app.publish(Counted(number=2))
                await received[2].wait()
            await consumer.stop(5)

    try:
        anyio.run(main)
    finally:
        sys.setprofile(None)
    fills = app.handlers["handle"].arguments.__code__  # type: ignore[attr-defined]
    way = [code for code in calls if code in stack or code is fills or code.co_qualname == "QueueRunner.receive"]
    return handing_over + ["handler.arguments" if code is fills else code.co_qualname for code in way]
