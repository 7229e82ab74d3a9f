"""The same without pytest. Try it: PYTHONPATH=.. python -m unittest test_with_unittest"""

from unittest import IsolatedAsyncioTestCase, TestCase

import billing

from lightbus.testing import TestBus

ORDER = {"order_id": "o-1", "amount": "0"}


class Charging(IsolatedAsyncioTestCase):
    async def asyncSetUp(self) -> None:
        self.bus = await self.enterAsyncContext(TestBus(billing.app))

    async def test_zero_amount_is_rejected(self) -> None:
        await self.bus.publish("order.placed", ORDER, source="shop")
        await self.bus.drain()
        assert [dead.error for dead in self.bus.dead()] == ["Reject: nothing to pay"]


class ChargingInThreads(TestCase):
    def setUp(self) -> None:
        self.bus = self.enterContext(TestBus(billing.app))

    def test_zero_amount_is_rejected(self) -> None:
        self.bus.publish_sync("order.placed", ORDER, source="shop")
        self.bus.drain_sync()
        assert [dead.error for dead in self.bus.dead()] == ["Reject: nothing to pay"]
