"""The tests in this folder run on every broker, with the same apps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lightbus import Lightbus
from tests.bus import QUICK, OrderCancelled, OrderPlaced
from tests.patience import LIMIT


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


MakeApp = Callable[..., Lightbus]


@pytest.fixture(autouse=True)
def _possible(request: pytest.FixtureRequest) -> None:
    marker = request.node.get_closest_marker("impossible_on_artemis")
    callspec = getattr(request.node, "callspec", None)
    if marker is not None and callspec is not None and callspec.params.get("broker_url") == "artemis":
        pytest.skip(f"impossible on Artemis: {marker.args[0]}")


@pytest.fixture
def make_app(broker_url: str) -> Iterator[MakeApp]:
    """`make_app("billing")`: an app on this test's broker, with a short retry schedule; closed at the end."""
    yield from apps_on(broker_url)


@pytest.fixture
def make_rabbitmq_app(rabbitmq_url: str) -> Iterator[MakeApp]:
    """The same, on RabbitMQ only."""
    yield from apps_on(rabbitmq_url)


def apps_on(url: str) -> Iterator[MakeApp]:
    made: list[Lightbus] = []

    def make(name: str, **options: Any) -> Lightbus:
        app = Lightbus(name, **{"url": url, "retry": QUICK, "publish_timeout": LIMIT, **options})
        made.append(app)
        return app

    yield make
    for app in made:
        app.__exit__(None, None, None)


@pytest.fixture
def shop(make_app: MakeApp) -> Lightbus:
    """An app that publishes `order.placed` and `order.cancelled`."""
    return declare_orders(make_app("shop"))


@pytest.fixture
def billing(make_app: MakeApp) -> Lightbus:
    """An app without handlers; each test registers its own."""
    return make_app("billing")


def declare_orders(app: Lightbus) -> Lightbus:
    app.event(OrderPlaced)
    app.event(OrderCancelled)
    return app
