"""Django's migrations of `lightbus_outbox` and `lightbus_inbox`."""
