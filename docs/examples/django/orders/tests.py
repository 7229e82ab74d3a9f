"""Tests of the shop, without a broker. Try it: python manage.py test"""

from unittest import mock
from uuid import UUID

from django.db import transaction
from django.test import TransactionTestCase

from lightbus.errors import PublishInEventLoop, PublishTimeout
from lightbus.testing import TestBus
from orders.bus import OrderPlaced, OrderSeen
from orders.handlers import bus
from orders.models import Order

ID = UUID("3f6c0f0e-8f5a-4a51-9a3b-0d9a3c1e7b10")
PATH = f"/orders/{ID}"


class Orders(TransactionTestCase):  # not TestCase: handlers run in threads, which see only committed data
    def setUp(self) -> None:
        self.bus = self.enterContext(TestBus(bus))

    def place(self) -> int:
        return self.client.put(PATH, {"email": "a@example.com"}, content_type="application/json").status_code

    def test_an_order_is_stored_and_confirmed(self) -> None:
        assert self.place() == 202
        self.bus.drain_sync()
        assert Order.objects.get(id=ID).confirmed

    def test_what_a_failing_handler_has_stored_is_rolled_back(self) -> None:
        with mock.patch("orders.handlers.print", create=True, side_effect=OSError("no mail server")):
            assert self.place() == 202
            self.bus.drain_sync()
        [dead] = self.bus.dead("confirm")
        assert dead.error == "OSError: no mail server"
        assert not Order.objects.get(id=ID).confirmed

    def test_a_rolled_back_order_is_not_published(self) -> None:
        with transaction.atomic():
            assert self.place() == 202
            transaction.set_rollback(True)
        self.bus.drain_sync()
        assert self.bus.published(OrderPlaced) == []
        assert not Order.objects.exists()

    def test_a_failed_publish_returns_503(self) -> None:
        with mock.patch.object(bus, "publish_sync", side_effect=PublishTimeout("no confirm")):
            assert self.place() == 503
        assert Order.objects.exists()

    async def test_an_async_view_awaits_publish(self) -> None:
        with self.assertRaisesMessage(PublishInEventLoop, "Use `await app.publish(...)`"):
            bus.publish_sync(OrderSeen(order_id=ID))
        assert (await self.async_client.post(f"{PATH}/seen")).status_code == 202
        assert [seen.order_id for seen in self.bus.published(OrderSeen)] == [ID]
