"""The pytest plugin: the fixture `lightbus_bus`, a `TestBus` with the apps that a marker or pytest's settings name.

Every pytest run where Lightbus is installed loads this file, so it imports nothing before the fixture is used.
"""

from __future__ import annotations

import functools
import inspect
import unittest
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from lightbus.app import Lightbus
    from lightbus.testing import TestBus

MARKER = "lightbus_apps"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini(MARKER, "MODULE:ATTR of the Lightbus apps whose handlers run in `lightbus_bus`.", type="args")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        f"{MARKER}(*apps, **options): the Lightbus apps of `lightbus_bus`, as 'MODULE:ATTR' or themselves, and options "
        "of lightbus.testing.TestBus.",
    )


@pytest.fixture
def lightbus_bus(request: pytest.FixtureRequest) -> Generator[TestBus]:
    """A started TestBus with the apps of `@pytest.mark.lightbus_apps(...)`, or of the ini option `lightbus_apps`."""
    from lightbus.testing import TestBus

    marker = request.node.get_closest_marker(MARKER)
    named = marker.args if marker is not None and marker.args else request.config.getini(MARKER)
    if not named:
        pytest.fail(
            f"lightbus_bus: no apps given. Set them on the test, as in @pytest.mark.{MARKER}('billing.bus:app'), or "
            f"for all tests in pytest's configuration: {MARKER} = billing.bus:app",
            pytrace=False,
        )
    bus = TestBus(*[_app(one) for one in named], **({} if marker is None else marker.kwargs))
    if not _is_async(request):
        with bus:
            yield bus
        return
    # Handlers run in the event loop of the test. This fixture does not, so the task of the test starts and stops them.
    with bus.prepared() as running:
        test = request.node.obj

        @functools.wraps(test)
        async def on_the_bus(*arguments: Any, **keywords: Any) -> None:
            async with running():
                await test(*arguments, **keywords)

        request.node.obj = on_the_bus
        yield bus


def _app(named: str | Lightbus) -> Lightbus:
    from lightbus import errors
    from lightbus.cli.target import load_app

    if not isinstance(named, str):
        return named
    try:
        return load_app(named)
    except (errors.TargetError, errors.IncludeError) as error:
        pytest.fail(f"lightbus_bus: {error}", pytrace=False)


def _is_async(request: pytest.FixtureRequest) -> bool:
    # A unittest.TestCase runs its own method, and ignores a replacement.
    return inspect.iscoroutinefunction(request.node.obj) and not isinstance(request.instance, unittest.TestCase)
