"""A bus for an application's own tests: everything is real except the broker's address and its clock.

    async with TestBus(app) as bus:
        await app.publish(InvoicePaid(invoice_id="i-1", amount=Decimal("9.50")))
        await bus.drain()
        assert bus.handled("open_account")

Each TestBus has its own embedded broker (`memory://`). Its apps publish, declare and consume there with the code
that they use in production. Two things differ. The broker's clock stands still, so that a delayed event comes when
`advance` says so; and `drain` lets retries expire early, so that nobody waits for them.
"""

from lightbus.testing.bus import TestBus as TestBus
from lightbus.testing.records import Dead as Dead
from lightbus.testing.records import Failed as Failed
from lightbus.testing.records import Handled as Handled
from lightbus.testing.records import Published as Published
