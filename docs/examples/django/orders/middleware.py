"""One transaction for each event, as ATOMIC_REQUESTS has one for each request."""

from django.db import close_old_connections, transaction

from lightbus import Message, NextSync


def in_transaction(message: Message, call_next: NextSync) -> None:
    close_old_connections()  # as Django does before and after a request
    try:
        with transaction.atomic():
            call_next()  # a handler that raises rolls back
    finally:
        close_old_connections()
