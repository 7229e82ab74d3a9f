"""The same without pytest. Try it: PYTHONPATH=.. python -m unittest test_with_unittest"""

from unittest import IsolatedAsyncioTestCase, TestCase

import billing

from lightbus.testing import TestBus

ORDER = {"order_id": "o-1", "amount": "0"}


class Charging(IsolatedAsyncioTestCase):
    async def asyncSetUp(self) -> None:
        self.bus = await self.enterAsyncContext(TestBus(billing.app))

    async def test_who_owes_nothing_is_not_charged(self) -> None:
        await self.bus.publish("order.placed", ORDER, source="shop")
        await self.bus.drain()
        assert [letter.error for letter in self.bus.dead()] == ["Reject: nothing to pay"]


class ChargingInThreads(TestCase):
    def setUp(self) -> None:
        self.bus = self.enterContext(TestBus(billing.app))

    def test_who_owes_nothing_is_not_charged(self) -> None:
        self.bus.publish_sync("order.placed", ORDER, source="shop")
        self.bus.drain_sync()
        assert [letter.error for letter in self.bus.dead()] == ["Reject: nothing to pay"]
