"""The invoices. This module does not import Lightbus, so it can be used and tested without it."""

from decimal import Decimal

import attrs


@attrs.define
class Invoice:
    id: str
    amount: Decimal
    paid: bool = False


_invoices: dict[str, Invoice] = {}  # an application has a database here


def create(order_id: str, amount: Decimal) -> Invoice:
    """The invoice for an order: the same one if it exists already."""
    return _invoices.setdefault(order_id, Invoice(order_id, amount))


def find(invoice_id: str) -> Invoice | None:
    return _invoices.get(invoice_id)


def remove(invoice_id: str) -> None:
    _invoices.pop(invoice_id, None)
