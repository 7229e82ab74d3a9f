"""The pytest plugin, and TestBus with each test framework. Each test runs a separate pytest, as a user does."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.test_house import HEAVY

APP = """
from contextlib import asynccontextmanager
import anyio
from lightbus import Lightbus

@asynccontextmanager
async def lifespan(app):
    async with anyio.create_task_group():
        yield

app = Lightbus("billing", url="amqp://production/", lifespan=lifespan)
other = Lightbus("other", url="amqp://production/")

@app.event
class InvoicePaid:
    number: int

loops = []

@app.on(InvoicePaid)
async def archive(paid: InvoicePaid) -> None:
    loops.append(anyio.lowlevel.current_token())
    if paid.number < 0:
        raise ValueError("less than nothing")

@other.on("invoice.paid")
def hear_too() -> None: ...
"""

HEADER = """
import anyio, pytest, unittest
from lightbus.testing import TestBus
import billing
from billing import InvoicePaid, app, archive
"""

Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run a file of tests in a separate pytest, check its last line, and return its output."""

    def run(code: str, expected: str, *arguments: str, ini: str = "") -> str:
        (tmp_path / "billing.py").write_text(APP)
        (tmp_path / "test_it.py").write_text(HEADER + code)
        (tmp_path / "pytest.ini").write_text(
            f"[pytest]\npythonpath = .\nasyncio_default_fixture_loop_scope = function\n{ini}"
        )
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--strict-markers", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        output = done.stdout + done.stderr
        assert re.search(rf"=+ {expected} in ", output), output
        return output

    return run


SYNC = """
def test_sync(lightbus_bus):
    app.publish_sync(InvoicePaid(number=1))
    lightbus_bus.drain_sync()
    assert [one.payload.number for one in lightbus_bus.handled(archive)] == [1]
"""

ASYNC = """
async def test_async(lightbus_bus):
    await app.publish(InvoicePaid(number=1))
    await lightbus_bus.drain()
    assert [one.payload.number for one in lightbus_bus.handled(archive)] == [1]
    assert billing.loops.pop() == anyio.lowlevel.current_token()
"""

FIXTURE = """
async def bus():
    async with TestBus(app) as bus:
        yield bus

async def test_fixture(bus):
    await app.publish(InvoicePaid(number=1))
    await bus.drain()
    assert len(bus.handled(archive)) == 1
    assert billing.loops.pop() == anyio.lowlevel.current_token()
"""


def test_the_settings_name_the_apps(run: Run) -> None:
    run(SYNC + "    assert len(lightbus_bus.apps) == 2", "1 passed", ini="lightbus_apps = billing:app billing:other")


@pytest.mark.parametrize("argument", ["'billing:app'", "billing.app"])
def test_a_marker_names_the_apps(run: Run, argument: str) -> None:
    marked = (
        f"\n@pytest.mark.lightbus_apps({argument}, timeout=3)\n{SYNC.strip()}\n    assert lightbus_bus.timeout == 3"
    )
    run(marked, "1 passed", ini="lightbus_apps = billing:other")


def test_a_marker_may_give_options_only(run: Run) -> None:
    code = "\n@pytest.mark.lightbus_apps(allow_dead=True)" + SYNC.replace("number=1", "number=-1").replace("[1]", "[]")
    run(code, "1 passed", ini="lightbus_apps = billing:app")


def test_an_error_of_the_test_is_shown_at_the_tests_line(run: Run) -> None:
    output = run(SYNC.replace("handled(archive)", "handled('archvie')"), "1 failed", ini="lightbus_apps = billing:app")
    assert "bus.handled('archvie'): app 'billing' has no such handler or event. Did you mean 'archive'?" in output
    assert re.search(r"^test_it.py:\d+: TestBusError", output, re.MULTILINE), output
    assert "def chosen" not in output


def test_pytest_asyncio(run: Run) -> None:
    mark, fixture = "@pytest.mark.asyncio", "import pytest_asyncio\n@pytest_asyncio.fixture"
    code = f"{SYNC}\n{mark}{ASYNC}\n{fixture}{FIXTURE}".replace(
        "async def test_fixture", f"{mark}\nasync def test_fixture"
    )
    run(code, "3 passed", ini="lightbus_apps = billing:app")
    run(
        SYNC + ASYNC + "\n@pytest.fixture" + FIXTURE, "3 passed", ini="lightbus_apps = billing:app\nasyncio_mode = auto"
    )


def test_pytest_asyncio_with_one_loop_for_the_module(run: Run) -> None:
    code = (
        "\npytestmark = pytest.mark.asyncio(loop_scope='module')\n" + ASYNC + ASYNC.replace("test_async", "test_again")
    )
    run(code, "2 passed", ini="lightbus_apps = billing:app")


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_anyio(run: Run, backend: str) -> None:
    code = f"""
pytestmark = pytest.mark.anyio

@pytest.fixture
def anyio_backend():
    return {backend!r}
"""
    run(f"{code}{ASYNC}\n@pytest.fixture{FIXTURE}", "2 passed", ini="lightbus_apps = billing:app")


def test_a_method_of_a_class_and_parameters(run: Run) -> None:
    code = """
@pytest.mark.asyncio
class TestBilling:
    @pytest.mark.parametrize("number", [1, 2])
    async def test_it(self, lightbus_bus, number):
        await app.publish(InvoicePaid(number=number))
        await lightbus_bus.drain()
        assert lightbus_bus.handled(archive)[0].payload.number == number
"""
    run(code, "2 passed", ini="lightbus_apps = billing:app")


def test_an_async_fixture_that_builds_on_the_bus(run: Run) -> None:
    code = """
import pytest_asyncio

@pytest_asyncio.fixture
async def paid(lightbus_bus):
    await app.publish(InvoicePaid(number=1))
    await lightbus_bus.drain()
    return lightbus_bus

@pytest.mark.asyncio
async def test_it(paid):
    assert len(paid.handled(archive)) == 1
    await app.publish(InvoicePaid(number=2))
    await paid.drain()
    assert len(paid.handled(archive)) == 2
"""
    run(code, "1 passed", ini="lightbus_apps = billing:app")


def test_unittest(run: Run) -> None:
    code = """
class Async(unittest.IsolatedAsyncioTestCase):
    async def asyncSetUp(self):
        self.bus = await self.enterAsyncContext(TestBus(app))

    async def test_it(self):
        await app.publish(InvoicePaid(number=1))
        await self.bus.drain()
        assert len(self.bus.handled(archive)) == 1

class Sync(unittest.TestCase):
    def setUp(self):
        self.bus = self.enterContext(TestBus(app))

    def test_it(self):
        app.publish_sync(InvoicePaid(number=1))
        self.bus.drain_sync()
        assert len(self.bus.handled(archive)) == 1

@pytest.mark.usefixtures("lightbus_bus")
class Both(unittest.IsolatedAsyncioTestCase):
    async def test_it(self):
        assert (await app.publish(InvoicePaid(number=1))).routed
"""
    run(code, "3 passed", ini="lightbus_apps = billing:app")


def test_without_apps_the_error_explains_how_to_name_them(run: Run) -> None:
    output = run(SYNC, "1 error")
    assert (
        "lightbus_bus: no apps given. Set them on the test, as in @pytest.mark.lightbus_apps('billing.bus:app')"
        in output
    )
    assert "or for all tests in pytest's configuration: lightbus_apps = billing.bus:app" in output
    assert "pytest_plugin.py" not in output


def test_an_unknown_app_is_an_error_that_lists_the_existing_ones(run: Run) -> None:
    output = run(SYNC, "1 error", ini="lightbus_apps = billing:ap")
    assert "lightbus_bus: module 'billing' has no 'ap'. Did you mean billing:app or billing:other?" in output


@pytest.mark.parametrize(("test", "expected"), [(SYNC, "1 passed, 1 error"), (ASYNC, "1 failed")])
def test_a_dead_letter_that_the_test_did_not_ask_about_is_shown(run: Run, test: str, expected: str) -> None:
    code = ("\n@pytest.mark.asyncio" if test is ASYNC else "") + test.replace("number=1", "number=-1").replace(
        "[1]", "[]"
    )
    output = run(code, expected, ini="lightbus_apps = billing:app")
    assert "UnexpectedDeadLetters: 1 dead letter that the test did not check" in output
    assert "billing.py" in output
    assert 'raise ValueError("less than nothing")' in output


def test_a_failing_test_reports_its_own_failure_only(run: Run) -> None:
    code = "\n@pytest.mark.asyncio" + ASYNC.replace("number=1", "number=-1")
    output = run(code, "1 failed", ini="lightbus_apps = billing:app")
    assert "assert [] == [1]" in output
    assert "UnexpectedDeadLetters" not in output


def test_the_plugin_costs_no_more_than_importing_lightbus() -> None:
    code = "import pytest, sys; old = {*sys.modules}; import lightbus.pytest_plugin; print(*{*sys.modules} - old)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert set(done.stdout.split()) & (HEAVY - {"lightbus.pytest_plugin", "pytest"}) == set()


def test_an_included_module_that_raises_is_an_error_with_the_traceback_of_the_users_code(
    run: Run, tmp_path: Path
) -> None:
    (tmp_path / "shop.py").write_text(
        "from lightbus import Lightbus\napp = Lightbus('shop', include=['shop_handlers'])\n"
    )
    (tmp_path / "shop_handlers.py").write_text("raise ValueError('no database')\n")
    output = run(SYNC, "1 error", ini="lightbus_apps = shop:app")
    error = "shop_handlers.py:1: ValueError: no database"
    assert f"lightbus_bus: app 'shop': include='shop_handlers' cannot be imported: {error}" in output
    assert 'shop_handlers.py", line 1, in <module>' in output
    assert "pytest_plugin.py" not in output
