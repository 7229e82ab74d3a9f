"""`Lightbus(include=)`: modules with handlers, imported when the handlers are needed."""

from __future__ import annotations

import importlib
import logging
import runpy
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import anyio
import pytest

from lightbus import Lightbus, errors
from lightbus.testing import TestBus
from lightbus.worker import serve
from tests.patience import LIMIT, wait_until

BUS = "from lightbus import Lightbus\napp = Lightbus('parcels', url='memory://parcels', include=INCLUDE)\n"
EVENTS = """\
import attrs
from parcels.bus import app

@app.event
@attrs.frozen
class ParcelSent:
    number: int
"""
HANDLERS = """\
from parcels.bus import app
from parcels.events import ParcelSent

handled = []

@app.on(ParcelSent)
def note(parcel: ParcelSent) -> None:
    handled.append(parcel.number)
"""

Write = Callable[..., Lightbus]


@pytest.fixture
def parcels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """`parcels(include=[...], handlers="...")`: a package of these modules. Returns its app."""

    def write(include: object = ("parcels.handlers",), /, **modules: str) -> Lightbus:
        package = tmp_path / "parcels"
        package.mkdir()
        bus = BUS.replace("INCLUDE", repr(include))
        for name, text in {"__init__": "", "bus": bus, "events": EVENTS, "handlers": HANDLERS, **modules}.items():
            path = package / name
            path.parent.mkdir(exist_ok=True)
            path.with_suffix(".py").write_text(text)
        app: Lightbus = importlib.import_module("parcels.bus").app
        return app

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return write


def imported(name: str) -> bool:
    return name in sys.modules


# --- when -------------------------------------------------------------------------------------


async def _publish(app: Lightbus) -> None:
    events = importlib.import_module("parcels.events")
    async with app:
        await app.publish(events.ParcelSent(number=1))


def test_a_process_that_only_publishes_does_not_import_them(parcels: Write) -> None:
    app = parcels()
    anyio.run(_publish, app)
    assert not imported("parcels.handlers")
    assert app.include == ("parcels.handlers",)


@pytest.mark.parametrize(
    "need",
    [
        lambda app: app.load(),
        lambda app: app.topology(),
        lambda app: app.consumed_queues(),
        lambda app: app.queue_suffixes(),
        lambda app: app.subscriptions(),
        lambda app: app.consumer(),
        lambda app: TestBus(app).__enter__().__exit__(None, None, None),
    ],
    ids=["load", "topology", "consumed_queues", "queue_suffixes", "subscriptions", "consumer", "TestBus"],
)
def test_whatever_needs_the_handlers_imports_them(parcels: Write, need: Callable[[Lightbus], Any]) -> None:
    app = parcels()
    assert not app.handlers
    need(app)
    assert [*app.handlers] == ["note"]
    assert [*app.events] == ["parcel.sent"]


def test_a_worker_runs_their_handlers(parcels: Write) -> None:
    app = parcels()

    async def main() -> None:
        stop, started = anyio.Event(), anyio.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: serve(app, stop=stop, on_started=started.set))
            with anyio.fail_after(LIMIT):
                await started.wait()
                await app.publish(sys.modules["parcels.events"].ParcelSent(number=7))
                while not sys.modules["parcels.handlers"].handled:  # noqa: ASYNC110 - a handler in a thread appends
                    await anyio.sleep(0.01)
            stop.set()

    anyio.run(main)
    assert sys.modules["parcels.handlers"].handled == [7]


def test_a_testbus_runs_their_handlers(parcels: Write) -> None:
    app = parcels()
    with TestBus(app) as bus:
        app.publish_sync(importlib.import_module("parcels.events").ParcelSent(number=1))
        bus.drain_sync()
        assert [one.handler for one in bus.handled()] == ["note"]


def test_loading_twice_imports_once(parcels: Write) -> None:
    app = parcels(handlers="import sys\nsys.parcels_imports = getattr(sys, 'parcels_imports', 0) + 1\n")
    try:
        app.load()
        app.load()
        app.topology()
        assert sys.parcels_imports == 1  # type: ignore[attr-defined]
    finally:
        del sys.parcels_imports  # type: ignore[attr-defined]


def test_threads_that_load_at_once_all_see_all_handlers(parcels: Write) -> None:
    slow = "import time\ntime.sleep(0.2)\n" + HANDLERS
    app = parcels(handlers=slow)
    seen: list[list[str]] = []
    ready = threading.Barrier(5)

    def load() -> None:
        ready.wait(LIMIT)
        app.load()
        seen.append([*app.handlers])

    threads = [threading.Thread(target=load) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert seen == [["note"]] * 5


def test_a_module_that_is_being_imported_may_need_the_handlers(parcels: Write) -> None:
    """As in a module that calls `app.topology()`, or an app that is created in the module that it includes."""
    app = parcels(
        ["parcels.handlers", "parcels.more"],
        handlers=HANDLERS + "queues = len(app.topology().queues)\n",
        more="from parcels.bus import app\nimport parcels.handlers\n@app.on('a.b')\ndef more(event: dict): ...\n",
    )
    app.load()
    assert [*app.handlers] == ["note", "more"]


def test_a_thread_waits_for_a_module_that_needs_the_handlers_while_it_is_imported(parcels: Write) -> None:
    """Not until then are all handlers declared."""
    handlers = "from parcels.bus import app\napp.topology()\nimport parcels.gate\n" + HANDLERS
    gate = "import threading\nreached, opened = threading.Event(), threading.Event()\nreached.set()\nopened.wait(60)\n"
    app = parcels(["parcels.handlers"], handlers=handlers, gate=gate)
    first = threading.Thread(target=app.load)
    first.start()
    wait_until(lambda: hasattr(sys.modules.get("parcels.gate"), "opened"), "the first thread is in the module")
    gate_module: Any = sys.modules["parcels.gate"]
    seen: list[list[str]] = []

    def load() -> None:
        app.load()
        seen.append([*app.handlers])

    second = threading.Thread(target=load)
    second.start()
    second.join(0.2)
    assert seen == []
    gate_module.opened.set()
    for thread in (first, second):
        thread.join(LIMIT)
    assert seen == [["note"]]


def test_a_proxy_in_an_included_module_is_left_alone(parcels: Write) -> None:
    proxy = """
class Proxy:
    @property
    def __class__(self):
        raise RuntimeError("not configured")

settings = Proxy()
"""
    app = parcels(handlers=proxy + HANDLERS)
    app.load()
    assert [*app.handlers] == ["note"]


def test_modules_that_import_each_other_are_loaded(parcels: Write) -> None:
    handlers = "import parcels.more\n" + HANDLERS
    more = "import parcels.handlers\nfrom parcels.bus import app\n@app.on('a.b')\ndef more(event: dict): ...\n"
    app = parcels(["parcels.handlers", "parcels.more"], handlers=handlers, more=more)
    app.load()
    assert sorted(app.handlers) == ["more", "note"]


def test_one_app_has_handlers_of_several_packages(parcels: Write) -> None:
    app = parcels(["parcels.handlers", "parcels.audit.notes"], **{"audit/notes": HANDLERS.replace("note", "audit")})
    app.load()
    assert [*app.handlers] == ["note", "audit"]


# --- a package --------------------------------------------------------------------------------


def test_a_package_that_imports_its_modules_includes_them(parcels: Write, caplog: pytest.LogCaptureFixture) -> None:
    app = parcels(["parcels.subjects"], **{"subjects/__init__": "from . import sent\n", "subjects/sent": HANDLERS})
    app.load()
    assert [*app.handlers] == ["note"]
    assert caplog.messages == []


def test_a_package_whose_modules_are_left_out_is_logged_with_their_names(
    parcels: Write, caplog: pytest.LogCaptureFixture
) -> None:
    app = parcels(
        ["parcels.subjects"], **{"subjects/__init__": "", "subjects/sent": HANDLERS, "subjects/lost": HANDLERS}
    )
    app.load()
    assert not app.handlers
    ((name, level, text),) = caplog.record_tuples
    assert (name, level) == ("lightbus", logging.WARNING)
    assert text == (
        "app 'parcels': include='parcels.subjects' is a package that declares nothing, and its modules are not "
        "imported with it. Include them: 'parcels.subjects.lost', 'parcels.subjects.sent'."
    )


def test_a_module_that_declares_nothing_is_no_error(parcels: Write, caplog: pytest.LogCaptureFixture) -> None:
    app = parcels(handlers="")
    app.load()
    assert not app.handlers
    assert caplog.messages == []


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("include", "words"),
    [
        ("billing.handlers", r"use a list of module names: include=\['billing.handlers'\]"),
        (b"billing", r"use a list of module names"),
        (importlib, r"use a list of module names: include=\['importlib'\]"),
        (7, r"use a list of module names, as in include=\['billing.handlers'\]"),
        (None, r"use a list of module names"),
        ({"billing.handlers"}, r"use a list of module names"),
        ([7], r"is not a module's name. Use a module's name, as in 'billing.handlers'"),
        ([importlib], r"is not a module's name. Use its name: 'importlib'"),
        ([""], r"is not a module's name"),
        ([".handlers"], r"Use the module's full name, as in 'billing.handlers': relative names are not resolved"),
        (["billing/handlers.py"], r"This is a path. Use the module's name: 'billing.handlers'"),
        (["billing.handlers.py"], r"is a file. Use the module's name: 'billing.handlers'"),
        (["billing.*"], r"Name each module: a package's name includes only the package's own module"),
        (["billing.bus:app"], r"Use a module's full name, as in 'billing.handlers'"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_what_is_not_a_list_of_modules_is_refused_where_it_is_written(include: Any, words: str) -> None:
    with pytest.raises(errors.InvalidOption, match=rf"Lightbus\('billing'\): include=.*{words}"):
        Lightbus("billing", include=include)


@pytest.mark.parametrize(
    ("include", "words"),
    [
        ("parcels.handler", "no module 'parcels.handler' in the package 'parcels' .*Did you mean 'parcels.handlers'?"),
        ("parcel.handlers", "no module 'parcel' in .*Did you mean 'parcels.handlers'?"),
        ("parcels.bus.handlers", "no module 'parcels.bus.handlers': 'parcels.bus' is a module, not a package."),
        ("parcels.xyz", "no module 'parcels.xyz' in the package 'parcels'"),
    ],
)
def test_a_module_that_does_not_exist_is_an_error_with_what_was_meant(parcels: Write, include: str, words: str) -> None:
    app = parcels([include])
    with pytest.raises(errors.IncludeError, match=rf"app 'parcels': include='{include}': {words}"):
        app.topology()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import os\n\nos.environ['PARCELS_DATABASE']\n", r"handlers.py:3: KeyError: 'PARCELS_DATABASE'"),
        ("def (\n", r"handlers.py:1: SyntaxError: .*"),
        ("raise SystemExit(3)\n", r"handlers.py:1: SystemExit: 3"),
        ("import parcels_is_missing\n", r"handlers.py:1: ModuleNotFoundError: .*Install what is missing for .*python"),
        ("import parcels.missing\n", r"handlers.py:1: ModuleNotFoundError: No module named 'parcels.missing'. .*"),
        ("from parcels.bus import app\napp.on()(print)\n", r"handlers.py:2: InvalidHandler: .*name at least one event"),
    ],
    ids=["KeyError", "SyntaxError", "SystemExit", "dependency", "typo", "declaration"],
)
def test_a_module_that_raises_is_an_error_with_the_line_and_its_cause(parcels: Write, text: str, words: str) -> None:
    app = parcels(handlers=text)
    pattern = rf"app 'parcels': include='parcels.handlers' cannot be imported: .*{words}"
    with pytest.raises(errors.IncludeError, match=pattern) as caught:
        app.load()
    assert type(caught.value.__cause__).__name__ in words


def test_a_failed_import_is_reported_again_and_not_as_a_duplicate(parcels: Write) -> None:
    """A second import of the module would declare its handlers twice, which is not what is wrong with it."""
    app = parcels(handlers=HANDLERS + "1 / 0\n")
    for _ in range(2):
        with pytest.raises(errors.IncludeError, match="ZeroDivisionError") as caught:
            app.load()
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(errors.IncludeError, match="ZeroDivisionError"), TestBus(app):
        pass


def test_two_handlers_of_one_name_in_two_modules_are_refused_with_both_places(parcels: Write) -> None:
    app = parcels(["parcels.handlers", "parcels.more"], more=HANDLERS)
    words = r"more.py:6: InvalidHandler: handler 'note' .* already exists \(parcels.handlers.note\). Pass a different"
    with pytest.raises(errors.IncludeError, match=words):
        app.load()


def test_an_app_of_a_program_that_its_handlers_import_by_name_is_refused(parcels: Write, tmp_path: Path) -> None:
    """`python parcels/bus.py`: that app is another one than the app of `from parcels.bus import app`."""
    parcels()
    program = runpy.run_path(str(tmp_path / "parcels" / "bus.py"), run_name="__main__")
    words = r"include='parcels.handlers' uses another Lightbus\('parcels'\), so its handlers would not run. The module"
    for _ in range(2):
        with pytest.raises(errors.IncludeError, match=words):
            program["app"].load()


# --- an event in a module that is not imported ------------------------------------------------

SHARED = "import attrs\n@attrs.frozen\nclass ParcelLost:\n    number: int\n"
DECLARES = "from parcels.bus import app\nfrom parcels.shared import ParcelLost\napp.event(ParcelLost)\n"


def test_publishing_an_event_of_a_module_that_is_not_imported_says_which_to_import(parcels: Write) -> None:
    app = parcels(["parcels.declares"], shared=SHARED, declares=DECLARES)
    lost = importlib.import_module("parcels.shared").ParcelLost(number=1)
    with pytest.raises(
        errors.UnknownEvent,
        match=r"ParcelLost is not declared on app 'parcels'. If a module of include= declares it \(parcels.declares\): "
        "publishing does not import these. Import that module where you publish",
    ):
        app.publish_sync(lost)
    app.load()
    app.publish_sync(lost)
    app.__exit__(None, None, None)


def test_the_hint_is_left_out_once_they_are_imported(parcels: Write) -> None:
    app = parcels(shared=SHARED)
    lost = importlib.import_module("parcels.shared").ParcelLost(number=1)
    app.load()
    with pytest.raises(errors.UnknownEvent) as caught:
        app.publish_sync(lost)
    assert "include" not in str(caught.value)


def test_an_app_without_include_does_not_import_the_module_that_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightbus.modules", ModuleType("lightbus.modules"))  # has nothing in it
    app = Lightbus("billing")
    app.load()
    assert app.topology()
    assert app.include == ()


@pytest.mark.parametrize("asks", ["override", "depends_on"])
def test_dependencies_of_included_handlers_are_known(asks: str, parcels: Write) -> None:
    handlers = HANDLERS + (
        "\nfrom typing import Annotated\nfrom lightbus import Depends\ndef scale() -> int:\n    return 1\n"
        "@app.on('scaled')\ndef weigh(weight: Annotated[int, Depends(scale)]) -> None: ...\n"
    )
    app = parcels(handlers=handlers)

    def scale() -> int:
        return 1

    if asks == "depends_on":
        assert not app.depends_on(scale)  # another one
    else:
        with pytest.raises(errors.InvalidDependency, match="Handlers depend on: scale"), app.override(scale, scale):
            pass
    assert "weigh" in app.handlers
