"""A bus for the tests of an application. Only the broker's address and its clock differ from production.

    async with TestBus(app) as bus:
        await app.publish(InvoicePaid(invoice_id="i-1", amount=Decimal("9.50")))
        await bus.drain()
        assert bus.handled("open_account")

Each TestBus has its own embedded broker (`memory://`). Its apps publish, declare and consume there with the code that
they use in production. The broker's clock stands still: `advance` moves it, for delayed events. `drain` lets retries
expire at once, so that a test does not wait for them.
"""

from lightbus.testing.bus import TestBus as TestBus
from lightbus.testing.records import Dead as Dead
from lightbus.testing.records import Failed as Failed
from lightbus.testing.records import Handled as Handled
from lightbus.testing.records import Published as Published
