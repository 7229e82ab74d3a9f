"""What this service publishes and handles. Run it: python manage.py lightbus_worker"""

import attrs
from billing.settings import Settings

from lightbus import Lightbus, Outcome
from lightbus.django import Inbox, Outbox

settings = Settings.read()
app = Lightbus("billing", concurrency=settings.concurrency, include=["invoices.handlers"])
outbox = Outbox(app)
inbox = Inbox(app)


@app.event("invoice.written")
@attrs.frozen(kw_only=True)
class InvoiceWritten:
    """An invoice was stored."""

    id: str
    number: int
    cents: int


@app.observe
def note(outcome: Outcome) -> None:
    if outcome.kind == "skipped" and outcome.message is not None:
        print(f"skipped {outcome.message.id}", flush=True)
