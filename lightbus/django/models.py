"""The tables `lightbus_outbox` and `lightbus_inbox`. The same columns as in `lightbus.outbox.tables`."""

# pyright: reportArgumentType=false
# (Django has no types: that of db_default is taken for the one of its default.)

from __future__ import annotations

from django.db import models

from lightbus.outbox.rows import INBOX, OUTBOX


class OutboxRow(models.Model):
    """An event that waits to be sent: see `lightbus.outbox.tables.outbox`."""

    id = models.BigAutoField(primary_key=True)
    app = models.CharField(max_length=255)
    event = models.CharField(max_length=255)
    message_id = models.CharField(max_length=255)
    body = models.BinaryField()
    properties = models.BinaryField()
    delay = models.IntegerField(db_default=0)
    added_at = models.FloatField()
    state = models.SmallIntegerField(db_default=0)
    due = models.FloatField(db_default=0.0)
    attempts = models.IntegerField(db_default=0)
    error = models.TextField(null=True)

    class Meta:
        db_table = OUTBOX
        indexes = (models.Index(fields=["app", "state", "due", "id"], name=f"{OUTBOX}_due"),)

    def __str__(self) -> str:
        return f"{self.event} ({self.message_id})"


class InboxRow(models.Model):
    """An event that a handler has handled."""

    pk = models.CompositePrimaryKey("handler", "message_id")
    handler = models.CharField(max_length=511)
    message_id = models.CharField(max_length=255)
    handled_at = models.FloatField()

    class Meta:
        db_table = INBOX
        indexes = (models.Index(fields=["handled_at"], name=f"{INBOX}_handled_at"),)

    def __str__(self) -> str:
        return f"{self.handler} ({self.message_id})"
