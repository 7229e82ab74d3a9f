"""Tests of the shop, without a broker. Try it: pytest"""

from collections.abc import Iterator

import pytest
from shop import create_app
from shop.bus import OrderPlaced, bus

from lightbus.errors import PublishTimeout
from lightbus.testing import TestBus

ORDER = "/orders/3f6c0f0e-8f5a-4a51-9a3b-0d9a3c1e7b10"


@pytest.fixture
def on_bus() -> Iterator[TestBus]:
    with TestBus(bus) as on_bus:
        yield on_bus


def test_an_order_is_confirmed_by_mail(on_bus: TestBus) -> None:
    assert create_app().test_client().put(ORDER, json={"email": "a@example.com"}).status_code == 202
    on_bus.drain_sync()
    assert [order.email for order in on_bus.published(OrderPlaced)] == ["a@example.com"]
    assert len(on_bus.handled("confirm_by_mail")) == 1


def test_a_failed_publish_returns_503(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(event: object) -> None:
        raise PublishTimeout("no confirm")

    monkeypatch.setattr(bus, "publish_sync", fail)
    response = create_app().test_client().put(ORDER, json={"email": "a@example.com"})
    assert response.status_code == 503
    assert response.headers["Retry-After"] == "5"
