"""docs/reference/configuration.md lists every option with its default, and its figures match the code."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest

from lightbus import Lightbus, Retry, handler
from lightbus.connection import address
from lightbus.dead_letters import actions
from lightbus.options import MAX_DELAY
from lightbus.publishing import confirms
from lightbus.testing import TestBus
from lightbus.wire import codec

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "reference" / "configuration.md").read_text()


def rows_after(words: str) -> dict[str, str]:
    """The first table after this text: option (without `=`) to default."""
    table = PAGE[PAGE.index(words) :].split("\n\n")[1]
    return {name.rstrip("="): default for name, default in re.findall(r"^\| `(\S+?)` \| (.*?) \|", table, re.MULTILINE)}


def options(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {one.name: one.default for one in parameters if one.name != "self"}


@pytest.mark.parametrize(
    ("words", "function", "not_shown"),
    [
        ("`Lightbus(name, ...)`:", Lightbus.__init__, set()),
        ("`app.publish(event, ...)` and", Lightbus.publish, {"event"}),
        ("`app.publish(event, ...)` and", Lightbus.publish_sync, {"event"}),
        ("`@app.on(*targets, ...)`:", Lightbus.on, set()),
        ("`Retry(...)`, or", Retry.__init__, set()),
    ],
)
def test_each_option_is_listed_with_its_default(words: str, function: Callable[..., Any], not_shown: set[str]) -> None:
    shown, real = rows_after(words), options(function)
    assert set(shown) == set(real) - not_shown
    for name, default in real.items():
        match default:
            case bool() | None:
                pass
            case int() | float():
                assert shown[name] == f"{default:g}"
            case str():
                assert shown[name] == f'`"{default}"`'
            case tuple() if default:
                assert shown[name] == f"`{default}`"


def test_each_environment_variable_is_listed() -> None:
    code = "".join(file.read_text() for file in (DOCS.parent / "lightbus").rglob("*.py"))
    assert set(re.findall(r'"(LIGHTBUS_\w+)"', code)) == {*rows_after("## Environment")} - {"NO_COLOR"}


def test_the_url_options_match_the_code() -> None:
    assert set(re.findall(r"`\?(\w+)=`", PAGE)) == set(address.OPTIONS)
    assert f"| `?heartbeat=` | {address.HEARTBEAT} |" in PAGE
    assert f"| `?connect_timeout=` | {address.CONNECT_TIMEOUT:g} |" in PAGE
    for url in ("amqp://", "amqps://", "sqlite://", "memory://"):
        assert f"`{url}" in PAGE


def test_figures_are_the_codes() -> None:
    assert f"| `timeout=` | {handler.TIMEOUT:g} | seconds, at most {handler.LONGEST_TIMEOUT:,g} |" in PAGE
    assert f"| a body | {codec.MAX_BODY_BYTES // 1024**2} MiB |" in PAGE
    assert f"| unconfirmed events of an app's publisher | {confirms.WINDOW:,} |" in PAGE
    [queue] = [one for one in Lightbus("billing", url="memory://").topology().queues if one.name == "billing.main"]
    assert f"until it becomes a dead letter | {queue.arguments['x-delivery-limit']} |" in PAGE
    assert MAX_DELAY == 30 * 24 * 3600, "30 days, says the page"
    assert {address.URL_VARIABLE, address.REQUIRE_VARIABLE} <= set(re.findall(r"`(\w+)`", PAGE))


def test_the_figures_of_the_delivery_page_match_the_code() -> None:
    page = " ".join((DOCS / "explanation" / "delivery.md").read_text().split())
    [queue] = [one for one in Lightbus("billing", url="memory://").topology().queues if one.name == "billing.main"]
    assert f"after {queue.arguments['x-delivery-limit']} redeliveries" in page
    assert f"up to {actions.CHUNK} events exist twice" in page


def test_defaults_in_the_text_match_the_code() -> None:
    assert address.EMBEDDED == "sqlite://"
    retry = Retry()
    assert (retry.on, retry.never, retry.jitter) == ((Exception,), (), 0)
    assert "backend" in options(TestBus.__init__)
    assert {field.name for field in attrs.fields(Retry)} == set(rows_after("`Retry(...)`, or"))
