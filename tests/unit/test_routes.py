"""Which handlers a delivery is for."""

from __future__ import annotations

from typing import Any, cast

import pytest

from lightbus import Lightbus, errors
from lightbus.consuming import routes
from lightbus.consuming.routes import Routes
from lightbus.transport import Channel, Delivery
from lightbus.wire import codec


def routes_of(app: Lightbus) -> Routes:
    (config,) = app.subscriptions()
    return Routes(app.name, config)


def delivered(exchange: str, routing_key: str, **headers: Any) -> Delivery:
    properties = {"headers": headers} if headers else {}
    return Delivery(cast(Channel, None), 1, False, exchange, routing_key, properties, b"{}")


@pytest.fixture
def app() -> Lightbus:
    app = Lightbus("billing", url="memory://")

    @app.on("order.*")
    async def any_order() -> None: ...

    @app.on("order.placed", source="shop")
    async def placed_by_shop() -> None: ...

    return app


def names(handlers: tuple[Any, ...]) -> list[str]:
    return [handler.name for handler in handlers]


def test_a_delivery_is_for_all_handlers_that_match_its_event_and_source(app: Lightbus) -> None:
    routes = routes_of(app)
    assert names(routes.find(delivered("shop", "order.placed"))) == ["any_order", "placed_by_shop"]
    assert names(routes.find(delivered("kiosk", "order.placed"))) == ["any_order"]
    assert names(routes.find(delivered("shop", "user.registered"))) == []
    assert names(routes.known["shop", "order.placed"]) == ["any_order", "placed_by_shop"]


def test_a_retried_copy_is_for_its_handler_alone_and_is_not_remembered(app: Lightbus) -> None:
    routes = routes_of(app)
    copy = delivered("billing.internal", "main", **{codec.HANDLER: "any_order", codec.SOURCE: "shop"})
    assert names(routes.find(copy)) == ["any_order"]
    assert routes.known == {}


def test_a_copy_for_a_removed_handler_has_none_and_the_error_names_the_next_step(app: Lightbus) -> None:
    routes = routes_of(app)
    copy = delivered("billing.internal", "main", **{codec.HANDLER: "removed", codec.SOURCE: "shop"})
    assert routes.find(copy) == ()
    assert str(routes.why_none(copy)) == (
        "the handler 'removed', whose retry this is, no longer exists. Deploy code that has this handler, then retry "
        "the dead letter."
    )


def test_an_unmatched_event_names_the_command_that_removes_its_binding(app: Lightbus) -> None:
    error = routes_of(app).why_none(delivered("shop", "user.registered"))
    assert isinstance(error, errors.NoHandler)
    assert "remove its binding too: lightbus unbind MODULE:ATTR PATTERN (one that matches 'user.registered')" in str(
        error
    )


def test_the_memory_of_routes_has_a_limit(app: Lightbus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "REMEMBERED", 3)
    known = routes_of(app)
    for number in range(10):
        known.find(delivered("shop", f"order.{number}"))
        assert len(known.known) <= 3


def test_an_event_of_another_app_than_all_handlers_name_is_meant_for_others() -> None:
    app = Lightbus("billing", url="memory://")
    app.on("order.placed", source="shop", name="one")(lambda: None)
    app.on("order.placed", source="till", name="two")(lambda: None)
    routes = routes_of(app)
    assert routes.meant_for_others(delivered("kiosk", "order.placed")) == ["shop", "till"]
    assert routes.meant_for_others(delivered("shop", "order.placed")) == []
    assert routes.meant_for_others(delivered("kiosk", "user.registered")) == []


def test_with_a_handler_that_names_no_app_nothing_is_meant_for_others(app: Lightbus) -> None:
    assert routes_of(app).meant_for_others(delivered("kiosk", "user.registered")) == []
