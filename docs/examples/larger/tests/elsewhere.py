"""Apps that stand for other services, to try billing: lightbus publish tests.elsewhere:shop order.placed ..."""

from decimal import Decimal

import attrs

from lightbus import Lightbus

shop = Lightbus("shop")
bank = Lightbus("bank")


@shop.event
@attrs.frozen
class OrderPlaced:
    order_id: str
    amount: Decimal


@bank.event
@attrs.frozen
class PaymentReceived:
    invoice_id: str
