"""The order of the house: imports point one way, and importing Lightbus is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightbus
from tests.patience import LIMIT

HOUSE = Path(lightbus.__file__).parent

ORDER = [
    "version",
    "errors",
    "event_loop",
    "exit_handlers",
    "living",
    "options",
    "pattern",
    "pydantic_models",
    "event",
    "message",
    "transport",
    "wire",
    "retry",
    "handler",
    "middleware",
    "dependencies",
    "outcome",
    "logs",
    "service",
    "unknown_events",
    "modules",
    "connection",
    "publishing",
    "consuming",
    "app",
    "dead_letters",
    "inspection",
    "tail",
    "catalog",
    "worker",
    "outbox",
    "telemetry",
    "testing",
    "web",
    "cli",
    "django",
    "pytest_plugin",
    "__main__",
]
"""A module or package imports from those before it only."""

INNER_ORDER = {
    "wire": ["collisions", "topology", "codec"],
    "transport.amqp": ["wire", "frames", "endpoint", "link", "writer", "channel", "connection"],
    "transport.activemq": [
        "names",
        "answers",
        "message",
        "selector",
        "broker_xml",
        "stream",
        "links",
        "engine",
        "management",
        "transactions",
        "declarations",
        "channel",
        "connection",
    ],
    "transport.sqlite": [
        "schema",
        "place",
        "answers",
        "tables",
        "topology",
        "clock",
        "wake_pipe",
        "file",
        "session",
        "entries",
        "dead_letters",
        "deliveries",
        "declarations",
        "clients",
        "store",
        "control",
        "channel",
        "connection",
    ],
    "connection": [
        "brokers",
        "brokers.row",
        "brokers.rabbitmq",
        "brokers.embedded",
        "brokers.artemis",
        "brokers.table",
        "loop_reader",
        "wake_up",
        "reading",
        "address",
        "diagnosis",
        "dial",
        "declare",
        "counts",
        "thread",
    ],
    "connection.brokers": ["row", "rabbitmq", "embedded", "artemis", "table"],
    "publishing": ["confirms", "connection", "publisher", "observed"],
    "consuming": [
        "acks",
        "watchdog",
        "credit",
        "stall",
        "coroutines",
        "subscription",
        "deliveries",
        "retired",
        "consumer",
        "connection",
        "turns",
        "slots",
        "threads",
        "routes",
        "tasks",
        "failure",
        "runner",
        "observed",
        "timeouts",
        "dispatcher",
    ],
    "dead_letters": ["letter", "queue", "actions"],
    "outbox": ["rows", "store", "relay", "tables", "statements", "engine", "sweep", "outbox", "inbox", "examination"],
    "django": [
        "database",
        "store",
        "outbox",
        "inbox",
        "models",
        "migrations",
        "migrations.0001_initial",
        "target",
        "checks",
        "apps",
        "command",
        "management",
        "management.commands",
        "management.commands.lightbus_relay",
        "management.commands.lightbus_worker",
    ],
    "inspection": ["finding", "broker", "comparison", "states", "trial", "contracts", "examination"],
    "catalog": [
        "exact",
        "schemas",
        "validity",
        "contract",
        "catalog",
        "who",
        "notices",
        "live",
        "asyncapi",
        "differences",
        "compatibility",
        "storage",
        "announcer",
    ],
    "worker": ["loop_watch", "worker", "services", "process", "reload", "supervisor", "health", "health_server"],
    "telemetry": ["families", "queues", "processes", "series", "prometheus", "opentelemetry"],
    "web": [
        "text",
        "source",
        "fields",
        "letters",
        "picture",
        "security",
        "stream",
        "frame",
        "overview",
        "dead",
        "live",
        "login",
        "site",
        "server",
    ],
    "testing": ["messages", "records", "apps", "recorder", "host", "session", "drain", "bus"],
}
"""The same within a package."""

TRANSPORTS = {"version", "errors", "pattern", "transport"}
"""What the transports themselves may import."""

HEAVY = {
    "aiohttp",
    "amqp",
    "cookiecutter",
    "cryptography",
    "django",
    "hypothesis",
    "kombu",
    "lightbus.catalog",
    "lightbus.cli",
    "lightbus.connection",
    "lightbus.django",
    "lightbus.pytest_plugin",
    "lightbus.telemetry",
    "lightbus.testing",
    "lightbus.transport.activemq",
    "lightbus.transport.amqp",
    "lightbus.transport.sqlite",
    "lightbus.worker",
    "multiprocessing",
    "opentelemetry",
    "lightbus.outbox",
    "lightbus.service",
    "platformdirs",
    "prometheus_client",
    "proton",
    "pydantic",
    "pydantic_core",
    "pytest",
    "sqlalchemy",
    "sqlite3",
    "trio",
    "uvloop",
    "jinja2",
    "lightbus.web",
    "starlette",
    "uvicorn",
    "watchfiles",
}
"""What `import lightbus` does not need: what connects, what a command needs, what an extra brings."""


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(HOUSE.rglob("*.py")):
        parts = path.relative_to(HOUSE).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__"), path


def imported(name: str, path: Path) -> Iterator[tuple[str, int]]:
    """(module of the house, line) for each import anywhere in a file: in functions and for type checkers too."""
    package = ["lightbus", *name.split(".")] if path.name == "__init__.py" else ["lightbus", *name.split(".")[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names):
                found = [alias.name for alias in names]
            case ast.ImportFrom(module, names, level):
                base = (
                    ".".join([*package[: len(package) - level + 1], *([module] if module else [])]) if level else module
                )
                found = [f"{base}.{alias.name}" for alias in names]
            case _:
                continue
        for one in found:
            if one == "lightbus" or one.startswith("lightbus."):
                yield one.removeprefix("lightbus").removeprefix("."), node.lineno


def is_module(name: str) -> bool:
    return name != "" and ((HOUSE / name).is_dir() or (HOUSE / f"{name}.py").is_file())


def test_every_module_has_its_place_in_the_order() -> None:
    rooms = {name.partition(".")[0] for name, _ in modules()} - {""}
    assert rooms <= set(ORDER)


@pytest.mark.parametrize(("name", "path"), [pytest.param(name, path, id=name) for name, path in modules() if name])
def test_a_module_imports_only_from_those_before_it(name: str, path: Path) -> None:
    room, _, inner = name.partition(".")
    allowed = TRANSPORTS if room == "transport" and inner else {*ORDER[: ORDER.index(room)], *([room] if inner else [])}
    if path.name == "__init__.py":
        allowed = allowed | {room}  # a package may gather what is its own
    for one, line in imported(name, path):
        target = one.partition(".")[0]
        if not is_module(target):
            continue  # a public name of the package: `from lightbus import Lightbus`
        assert target in allowed, f"{path.relative_to(HOUSE)}:{line} imports {one}, which stands below it"


@pytest.mark.parametrize("package", INNER_ORDER)
def test_within_a_package_a_module_imports_only_from_those_before_it(package: str) -> None:
    order = INNER_ORDER[package]
    inside = {name.removeprefix(f"{package}."): path for name, path in modules() if name.startswith(f"{package}.")}
    assert sorted(inside) == sorted(order)
    for name, path in inside.items():
        for one, line in imported(f"{package}.{name}", path):
            target = one.removeprefix(f"{package}.").partition(".")[0]
            if one.startswith(f"{package}.") and target in order:
                allowed = order[: order.index(name)]
                assert target in allowed, f"{path.relative_to(HOUSE)}:{line} imports {one}, which stands below it"


@pytest.mark.parametrize(
    "package", sorted(path.parent for path in HOUSE.rglob("__init__.py")), ids=lambda path: path.name
)
def test_a_package_has_a_docstring(package: Path) -> None:
    text = ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8")))
    assert text, package


@pytest.mark.parametrize(("name", "path"), [pytest.param(name, path, id=name) for name, path in modules() if name])
def test_a_module_takes_names_from_where_they_are_made(name: str, path: Path) -> None:
    """`from lightbus import Message` inside of the package would be a cycle through its front door."""
    if name.partition(".")[0] in ("testing", "cli", "__main__"):
        return
    through_the_door = [(one, line) for one, line in imported(name, path) if not is_module(one.partition(".")[0])]
    assert not through_the_door


@pytest.mark.parametrize(("name", "path"), [pytest.param(name, path, id=name) for name, path in modules() if name])
def test_a_module_uses_no_private_names_of_other_objects(name: str, path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Attribute(ast.Name("self" | "cls") | ast.Call(ast.Name("super"))):
                continue
            case ast.Attribute(_, attribute) if is_private(attribute):
                assert ast.unparse(node) in PRIVATE_OF_PYTHON, f"{path.relative_to(HOUSE)}:{node.lineno}"
            case ast.ImportFrom(_, names):
                assert not [one.name for one in names if is_private(one.name)], (
                    f"{path.relative_to(HOUSE)}:{node.lineno}"
                )


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


PRIVATE_OF_PYTHON = {"os._exit", "sys._getframe", "sys._current_frames"}
"""Documented, in spite of their names."""


@pytest.mark.parametrize(("name", "path"), [pytest.param(name, path, id=name) for name, path in modules() if name])
def test_a_long_class_gives_the_reason_in_its_docstring(name: str, path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and (node.end_lineno or 0) - node.lineno > LONG_CLASS:
            assert "300 lines" in (ast.get_docstring(node) or ""), f"{path.relative_to(HOUSE)}:{node.lineno}"


LONG_CLASS = 340
"""Lines. A class has about 300 at most; a longer one names the reason."""


def _printed_by(code: str) -> list[str]:
    """The words that a new Python process prints, which runs this code."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=HOUSE.parent, timeout=LIMIT
    )
    return done.stdout.split()


def test_the_public_names_are_imported_when_they_are_asked_for() -> None:
    code = "import sys; import lightbus; print(*sorted(one for one in sys.modules if one.startswith('lightbus')))"
    printed = _printed_by(code)
    assert printed == ["lightbus"]
    assert [getattr(lightbus, name).__name__.removeprefix("lightbus.") for name in lightbus.__all__] == lightbus.__all__
    with pytest.raises(AttributeError, match="module 'lightbus' has no attribute 'Bus'"):
        lightbus.Bus  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Bus' from 'lightbus'"):
        from lightbus import Bus  # type: ignore[attr-defined]  # noqa: F401


def test_the_import_on_windows_names_where_lightbus_runs() -> None:
    on_windows = "import os; os.name = 'nt'; import lightbus"
    done = subprocess.run(
        [sys.executable, "-c", on_windows], capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.stderr.splitlines()[-1] == (
        "ImportError: Lightbus runs on Linux, not on Windows. Use it in WSL or in a container."
    )


def test_importing_lightbus_brings_in_nothing_heavy() -> None:
    code = "import sys; before = set(sys.modules); from lightbus import *; print(*sorted(set(sys.modules) - before))"
    printed = _printed_by(code)
    assert set(printed) & HEAVY == set()


def test_declaring_events_and_handlers_brings_in_nothing_heavy_either() -> None:
    code = """
import sys
from lightbus import Lightbus
app = Lightbus("billing", url="amqp://localhost/")
@app.event
class InvoicePaid:
    id: int
@app.on("user.registered", queue="slow")
async def greet(user: dict): ...
app.topology()
print(*sorted(sys.modules))
"""
    printed = _printed_by(code)
    assert set(printed) & {*HEAVY, "lightbus.dependencies"} == set()


def test_the_parts_of_the_outbox_for_any_database_library_do_without_sqlalchemy() -> None:
    code = """
import sys
sys.modules["sqlalchemy"] = None  # as if it was not installed
import lightbus.outbox.rows, lightbus.outbox.store
from lightbus.outbox import Relay
print(Relay.__name__)
try:
    from lightbus.outbox import Outbox
except ImportError:
    print("Outbox needs it")
"""
    assert " ".join(_printed_by(code)) == "Relay Outbox needs it"
    import lightbus.outbox

    with pytest.raises(AttributeError, match=r"module 'lightbus\.outbox' has no attribute 'Sender'"):
        lightbus.outbox.Sender  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize(
    ("room", "libraries"),
    [("telemetry", {"opentelemetry", "prometheus_client"}), ("web", {"jinja2", "starlette", "uvicorn"})],
)
def test_only_one_room_imports_the_libraries_of_an_extra(room: str, libraries: set[str]) -> None:
    importing: set[str] = set()
    for name, path in modules():
        found = {
            one.partition(".")[0]
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for one in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
        }
        if found & libraries:
            importing.add(name.partition(".")[0])
    assert importing == {room}
