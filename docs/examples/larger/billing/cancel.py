"""Cancels an invoice. It publishes only, so it imports no handlers. Try it: python -m billing.cancel o-1"""

import sys

from billing.bus import app
from billing.events import InvoiceCancelled


def cancel(invoice_id: str) -> None:
    # The same id each time: so a repeated command, or a handler that gets the event twice, can detect the duplicate.
    app.publish_sync(InvoiceCancelled(invoice_id=invoice_id), id=f"cancel-{invoice_id}")


if __name__ == "__main__":
    cancel(sys.argv[1])
